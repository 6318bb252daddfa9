"""Which revisions of a deployment were released, by what our own flow runs recorded of them. Pure.

The description of a template names the flow run that created it. Each run keeps, as a label, what it saw of
the revisions that it moved clusters between (`Record`). The last word about a revision in a cluster wins. A
revision of which nothing is on record counts as released: it was made past this tool, or Prefect no longer
has its run.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ValidationError

from prefect_rollout.models import Id, same_id
from prefect_rollout.text import one_line, when

Event = Literal["ready", "failed", "left"]
"""The last event of a revision in a cluster: all its pods were ready, they did not get ready, or a rollback
moved the cluster to another revision."""


class Entry(BaseModel):
    """One event, and when it was recorded."""

    event: Event
    at: AwareDatetime


class Record(BaseModel):
    """The record of a flow run: its place, and the last event of each revision in each cluster.

    Attributes:
        platform: `Platform.identity`.
        deployment: the deployment's id as text.
        clusters: the clusters that the run is about.
        seen: `{revision: {cluster: entry}}`.
    """

    platform: str
    deployment: str
    clusters: list[str]
    seen: dict[str, dict[str, Entry]] = {}

    @classmethod
    def read(cls, label: object) -> Self | None:
        """Return the record that a label holds, or `None` if it holds none."""
        try:
            return cls.model_validate_json(str(label or ""))
        except ValidationError:
            return None

    def note(self, event: Event, revision: Id, cluster: str, at: datetime) -> None:
        """Add an event; a repeated `left` keeps its first time."""
        of_revision = self.seen.setdefault(str(revision), {})
        before = of_revision.get(cluster)
        if not (event == "left" and before and before.event == "left"):
            of_revision[cluster] = Entry(event=event, at=at)


class Revision(NamedTuple):
    """A revision, and the flow run that its description names as its maker."""

    id: Id
    made_by: str | None = None


class Past(NamedTuple):
    """A flow run of ours: its state and its record.

    Attributes:
        state: Prefect's type of its state, such as `FAILED`.
        at: when it entered that state.
    """

    run_id: str
    name: str
    state: str
    at: datetime
    record: Record


class Known(NamedTuple):
    """The knowledge about a revision in a cluster.

    Attributes:
        released: whether it counts as released there now.
        was_live: whether it was ever released there.
        why: why it does not count as released, as a clause.
    """

    released: bool
    was_live: bool
    why: str = ""


class Choice(NamedTuple):
    """The revision that was chosen, if any, and what there is to say about it.

    Attributes:
        notes: sentences without a period: the revisions that were skipped, and why.
        unknown: whether nothing is on record of the one that was chosen.
    """

    revision: Revision | None
    notes: list[str]
    unknown: bool = False


def known_of(revision: Revision, pasts: Iterable[Past], online: Mapping[str, Id | None]) -> dict[str, Known]:
    """Return what is known of a revision, by cluster; clusters of which nothing is known are left out.

    Args:
        revision: which.
        pasts: the run that made it and the runs that recorded anything of it; others do not matter.
        online: what is online in each cluster: a revision that a rollback left, and that is online there
            again, was published again past this tool.
    """
    found: dict[str, list[_Said]] = {}
    for past in pasts:
        made_here = past.run_id == revision.made_by
        seen = past.record.seen.get(str(revision.id), {})
        for cluster in past.record.clusters if made_here else seen:
            back = online.get(cluster) is not None and same_id(online[cluster], revision.id)
            if said := _said(past, seen.get(cluster), made_here=made_here, back=back):
                found.setdefault(cluster, []).append(said)
    return {cluster: _last_word(said) for cluster, said in found.items()}


class _Said(NamedTuple):
    """The word of one run on a revision in a cluster."""

    at: datetime
    why: str
    made_here: bool


def _said(past: Past, entry: Entry | None, *, made_here: bool, back: bool) -> _Said | None:
    if entry and entry.event == "ready":
        return _Said(entry.at, "", made_here)
    if made_here:
        return _Said(*_of_release(past), made_here)
    if entry is None or (entry.event == "left" and back):
        return None
    what = "it was rolled back on" if entry.event == "left" else "a rollback to it failed on"
    return _Said(entry.at, f"{what} {when(entry.at)}", made_here)


_ENDS = {"FAILED": "failed", "CRASHED": "crashed", "CANCELLED": "was cancelled"}


def _of_release(past: Past) -> tuple[datetime, str]:
    """Return when and how the run ended that made a revision; a running one has the last word."""
    if past.state == "COMPLETED":
        return past.at, ""
    if past.state in _ENDS:
        return past.at, f"its release {_ENDS[past.state]} on {when(past.at)}"
    return datetime.max.replace(tzinfo=UTC), f"its release, {one_line(past.name, 80)}, is still under way"


def _last_word(said: list[_Said]) -> Known:
    said.sort(key=lambda each: each.at)
    since = next((number for number in range(len(said), 0, -1) if not said[number - 1].why), 0)
    bad = said[since:]
    # A rollback from what had failed says less than the failure.
    why = next((each.why for each in bad if each.made_here), bad[0].why if bad else "")
    was_live = any(not each.why for each in said) or not any(each.made_here for each in said)
    return Known(released=not why, was_live=was_live, why=why)


def why_not(known: Mapping[str, Known], cluster: str | None) -> str:
    """Return why a revision does not count as released in a cluster, or in any one; empty if it does."""
    if cluster is not None:
        return known[cluster].why if cluster in known else ""
    return next((each.why for each in known.values() if each.why), "")


def choose(
    revisions: Sequence[Revision],
    known: Mapping[str, Mapping[str, Known]],
    *,
    option: str,
    cluster: str | None = None,
) -> Choice:
    """Choose the first revision that counts as released.

    Args:
        revisions: newest first.
        known: `{revision: known_of(...)}`.
        option: the option of the command line that takes a revision anyway.
        cluster: where it has to be released; `None` asks that it failed nowhere.
    """
    notes: list[str] = []
    for revision in revisions:
        of_revision = known.get(str(revision.id), {})
        why = why_not(of_revision, cluster)
        if not why:
            return Choice(revision, notes, unknown=not of_revision)
        shown = one_line(revision.id, 40)
        where = f" in {one_line(cluster, 80)}" if cluster is not None else ""
        notes.append(f"{shown} is skipped{where}: {why}; `{option} {shown}` takes it anyway")
    return Choice(None, notes)


def taken_anyway(revision: Id, known: Mapping[str, Known], cluster: str | None = None) -> list[str]:
    """Return what there is to say of a revision that was named: that it does not count as released."""
    where = f" in {one_line(cluster, 80)}" if cluster is not None else ""
    why = why_not(known, cluster)
    return [f"{one_line(revision, 40)} is taken{where} because it was named, although {why}"] if why else []


def capped(notes: Sequence[str], limit: int = 10) -> list[str]:
    """Return the notes, of which the last one counts those that are too many to list."""
    more = len(notes) - limit
    return list(notes) if more < 2 else [*notes[:limit], f"{more} older ones are skipped likewise"]


def shortened(notes: Sequence[str], limit: int = 3) -> str:
    """Return the first notes as a clause."""
    more = [f"and {len(notes) - limit} more"] if len(notes) > limit else []
    return "; ".join([*notes[:limit], *more])


def unknown_words(revisions: Sequence[Id]) -> str:
    """Return the sentence about revisions of which nothing is on record; empty if there are none."""
    if not revisions:
        return ""
    shown = ", ".join(one_line(each, 40) for each in revisions)
    one = len(revisions) == 1
    return (
        f"No release of {'template' if one else 'templates'} {shown} is on record in this Prefect: "
        f"{'it counts' if one else 'they count'} as released, and nothing more is known of "
        f"{'it' if one else 'them'}."
    )
