"""Choice of a revision by what flow runs recorded about it. Pure.

A revision names the flow run that created it. Each run keeps a `Record` in a label: the last event of each
revision that it published or replaced. The latest record of a revision in a cluster wins. A revision without
a record counts as released: another tool created it, or Prefect no longer has its run.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ValidationError

from prefect_rollout.ids import Id, same_id
from prefect_rollout.release.workload import Chosen, Revision
from prefect_rollout.text import one_line, when

Event = Literal["ready", "failed", "left"]
"""Last event of a revision in a cluster: its pods became ready, failed, or were rolled back."""


class Entry(BaseModel):
    """One event and its time."""

    event: Event
    at: AwareDatetime


class Record(BaseModel):
    """The record of a flow run: its deployment and clusters, and the last event of each revision in each."""

    platform: str  # `Platform.realm`
    deployment: str  # id, as text
    clusters: list[str]  # `Platform.place`
    seen: dict[str, dict[str, Entry]] = {}  # by revision and cluster

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


class Past(NamedTuple):
    """A flow run, its state and its record."""

    run_id: str
    name: str
    state: str  # Prefect's type of the state, such as FAILED
    at: datetime  # when the run entered that state
    record: Record


class Known(NamedTuple):
    """Knowledge about a revision in a cluster."""

    released: bool  # it counts as released there now
    was_live: bool  # it was released there at some time
    why: str = ""  # why it does not count as released, as a clause


class Choice(NamedTuple):
    """The chosen revision, if any, and notes on the choice."""

    revision: Revision | None
    notes: list[str]  # the skipped revisions and why, as sentences without a period
    unknown: bool = False  # no release of the chosen revision is on record

    def take(self) -> Chosen | None:
        """Return the revision with its notes; `None` if none was chosen."""
        if self.revision is None:
            return None
        kept = self.revision.model_dump(include=set(Revision.model_fields))
        return Chosen(**kept, notes=capped(self.notes), unknown=self.unknown)


def known_of(revision: Revision, pasts: Iterable[Past], online: Mapping[str, Id | None]) -> dict[str, Known]:
    """Return what is known about a revision, by cluster; unknown clusters are absent.

    Args:
        revision: the revision.
        pasts: the run that created it, and the runs that recorded an event of it.
        online: the revision online in each cluster. If a rollback replaced a revision that is online again,
            another tool published it.
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
    """One run's record about a revision in a cluster."""

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
    """Return when and how the run that created a revision ended; a running one counts as the latest."""
    if past.state == "COMPLETED":
        return past.at, ""
    if past.state in _ENDS:
        return past.at, f"its release {_ENDS[past.state]} on {when(past.at)}"
    return datetime.max.replace(tzinfo=UTC), f"its release, {one_line(past.name, 80)}, is still under way"


def _last_word(said: list[_Said]) -> Known:
    said.sort(key=lambda each: each.at)
    since = next((number for number in range(len(said), 0, -1) if not said[number - 1].why), 0)
    bad = said[since:]
    # The failure of a revision says more than the rollback from it.
    why = next((each.why for each in bad if each.made_here), bad[0].why if bad else "")
    was_live = any(not each.why for each in said) or not any(each.made_here for each in said)
    return Known(released=not why, was_live=was_live, why=why)


def why_not(known: Mapping[str, Known], cluster: str | None) -> str:
    """Return why a revision does not count as released in the cluster, or in any; empty if it does."""
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
        option: command-line option that takes a revision anyway.
        cluster: cluster in which it must be released; `None`: it must not have failed in any.
    """
    notes: list[str] = []
    for revision in revisions:
        of_revision = known.get(str(revision.id), {})
        why = why_not(of_revision, cluster)
        if not why:
            return Choice(revision, notes, unknown=not of_revision)
        shown = one_line(revision.id, 40)
        where = f" in {one_line(cluster, 80)}" if cluster is not None else ""
        notes.append(f"{shown} is skipped{where}: {why}; {option} {shown} takes it anyway")
    return Choice(None, notes)


def taken_anyway(revision: Id, known: Mapping[str, Known], cluster: str | None = None) -> list[str]:
    """Return a note if a named revision does not count as released."""
    where = f" in {one_line(cluster, 80)}" if cluster is not None else ""
    why = why_not(known, cluster)
    return [f"{one_line(revision, 40)} is taken{where} because it was named, although {why}"] if why else []


def capped(notes: Sequence[str], limit: int = 10) -> list[str]:
    """Return at most `limit` notes, then a count of the others."""
    more = len(notes) - limit
    return list(notes) if more < 2 else [*notes[:limit], f"{more} older ones are skipped, too"]


def shortened(notes: Sequence[str], limit: int = 3) -> str:
    """Return the first notes as a clause."""
    more = [f"and {len(notes) - limit} more"] if len(notes) > limit else []
    return "; ".join([*notes[:limit], *more])


def unknown_words(revisions: Sequence[Id]) -> str:
    """Return the sentence about revisions without a record; empty if there are none."""
    if not revisions:
        return ""
    shown = ", ".join(one_line(each, 40) for each in revisions)
    one = len(revisions) == 1
    return (
        f"No release of {'template' if one else 'templates'} {shown} is on record in this Prefect: "
        f"{'it counts' if one else 'they count'} as released."
    )
