"""Choose the revision that each cluster returns to."""

from collections.abc import AsyncIterator, Mapping

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import NoPreviousTemplateError, TemplateNotFoundError
from prefect_rollout.ids import Id
from prefect_rollout.platforms.port import Platform, revision_groups
from prefect_rollout.release.revisions import Choice, Known, choose, shortened, taken_anyway
from prefect_rollout.release.workload import Baseline, Chosen, Revision, Workload
from prefect_rollout.runs.records import known_here
from prefect_rollout.runs.step import say, step
from prefect_rollout.tasks.get_template import check_readable
from prefect_rollout.text import one_line

OPTION = "--to-template"


@step("choose rollback", "choose the rollback of {workload.name}")
async def choose_rollback(
    workload: Workload,
    before: Mapping[str, Baseline],
    to_template: int | str | None = None,
    *,
    over: Mapping[str, int | str] | None = None,
    target: str,
) -> dict[str, Chosen]:
    """Return `{cluster: revision}`: `to_template`, or the last one that was released in each cluster.

    Templates whose release failed there, has not ended, or was rolled back are skipped.

    Args:
        workload: from step 1.
        before: the state of each cluster; with `over`, the state before that release.
        to_template: one template for all clusters; `None` or empty text for each cluster's last one.
        over: templates that a release has published since. Each cluster returns to what was online before,
            if that was released; a cluster without such a template is absent.
        target: block of the platform, as type-slug/name.

    Raises:
        NoPreviousTemplateError: the history has no other template for a cluster that was released there.
        TemplateNotFoundError: there is no template `to_template`.
        ForeignTemplateError: `to_template` belongs to another deployment.
        UnreadableTemplateError: it is not an apps/v1 Deployment.
        ConfigurationError: the Prefect API did not answer.
    """
    online = {cluster: each.online for cluster, each in before.items()}
    async with open_target(target) as platform:
        if over is not None:
            choices, _ = await _search(platform, workload, over, before=online)
        elif to_template is None or to_template == "":
            choices = await _previous(platform, workload, online)
        else:
            choices = {}
            for group, where in revision_groups(platform, list(online)):
                revision = await platform.revision(workload, to_template, where)
                known = await _known_of(platform, workload, revision, None)
                for cluster in group:
                    choices[cluster] = Choice(revision, taken_anyway(revision.id, known, cluster))
    found = {cluster: chosen for cluster, choice in choices.items() if (chosen := choice.take())}
    for chosen in found.values():
        check_readable(chosen)
    listed = (f"{one_line(name, 80)} to template {one_line(each.id, 40)}" for name, each in found.items())
    say("choose rollback", ", ".join(listed))
    return found


async def _previous(
    platform: Platform, workload: Workload, online: Mapping[str, Id | None]
) -> dict[str, Choice]:
    found, skipped = await _search(platform, workload, online)
    missing = [cluster for cluster in online if cluster not in found]
    if missing:
        notes = [note for cluster in missing for note in skipped[cluster]]
        named = ", ".join(one_line(cluster, 80) for cluster in missing)
        raise NoPreviousTemplateError(
            f"the history of {one_line(workload.name, 120)} has no earlier template for {named}"
            + (f" that was released there: {shortened(notes)}" if notes else ""),
            clusters=missing,
        )
    return {cluster: found[cluster] for cluster in online}


async def _search(
    platform: Platform,
    workload: Workload,
    now: Mapping[str, Id | None],
    *,
    before: Mapping[str, Id | None] | None = None,
) -> tuple[dict[str, Choice], dict[str, list[str]]]:
    """Return the choice for each cluster that has one, and the skipped revisions of each cluster.

    A choice replaces the revision in `now`; the revisions in `before` are tried first.
    """
    revisions: dict[str, Revision] = {}
    known: dict[str, dict[str, Known]] = {}
    found: dict[str, Choice] = {}
    notes: dict[str, list[str]] = {cluster: [] for cluster in now}
    online = {cluster: revision for cluster, revision in (before or now).items() if revision is not None}
    async for cluster, candidate in _candidates(platform, workload, now, before or {}):
        key = str(candidate)
        if cluster in found:
            continue
        if key not in known:
            try:
                revisions[key] = await platform.revision(workload, candidate)
            except TemplateNotFoundError:
                shown = one_line(candidate, 40)
                notes[cluster].append(f"{shown} is skipped in {one_line(cluster, 80)}: it was deleted")
                continue
            known[key] = await _known_of(platform, workload, revisions[key], online)
        choice = choose([revisions[key]], known, option=OPTION, cluster=cluster)
        notes[cluster] += choice.notes
        if choice.revision is not None:
            found[cluster] = choice._replace(notes=notes[cluster])
            if len(found) == len(now):
                break
    return found, notes


async def _candidates(
    platform: Platform, workload: Workload, now: Mapping[str, Id | None], before: Mapping[str, Id | None]
) -> AsyncIterator[tuple[str, Id]]:
    """Yield the revisions published to each cluster, newest first, each once, without the current one."""
    passed = {(cluster, str(revision)) for cluster, revision in now.items()}
    for cluster, revision in before.items():
        if revision is not None and (cluster, str(revision)) not in passed:
            passed.add((cluster, str(revision)))
            yield cluster, revision
    async for cluster, revision in platform.published(workload):
        if now.get(cluster) is not None and (cluster, str(revision)) not in passed:
            passed.add((cluster, str(revision)))
            yield cluster, revision


async def _known_of(
    platform: Platform, workload: Workload, revision: Revision, online: Mapping[str, Id] | None
) -> dict[str, Known]:
    """Return what is known about one revision, by cluster."""
    return (await known_here(platform, workload, [revision], online))[str(revision.id)]
