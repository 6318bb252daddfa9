"""Chooses what each cluster goes back to."""

from collections.abc import AsyncIterator, Collection, Mapping

from prefect.cache_policies import NO_CACHE

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import NoPreviousTemplateError, TemplateNotFoundError
from prefect_rollout.models import Chosen, Deployment, Id, Template, maker_of, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.records import known_here
from prefect_rollout.revisions import Known, Revision, choose, shortened, taken_anyway
from prefect_rollout.tasks.before import Before
from prefect_rollout.tasks.get_template import Selected, belongs, foreign
from prefect_rollout.tasks.step import run_logger, say, step
from prefect_rollout.text import one_line

OPTION = "--to-template"


@step("choose rollback", "choose what {deployment.name} goes back to")
async def choose_rollback(
    deployment: Deployment,
    before: Mapping[str, Before],
    to_template: int | str | None = None,
    *,
    over: Mapping[str, int | str] | None = None,
    target: str,
) -> dict[str, Chosen]:
    """Return `{cluster: version}`: `to_template`, or the last one that was released in each cluster.

    Templates whose release did not end well there, has not ended, or was rolled back are skipped.

    Args:
        deployment: as step 1 found it.
        before: what is online in each cluster; with `over`, what was online before it.
        to_template: one template for all clusters; `None` and empty text mean each cluster's last one.
        over: what a release has published since. Each cluster goes back to what was online before, if
            that was released; a cluster with nothing to go back to is left out.
        target: the block document `type-slug/name` of the platform.

    Raises:
        NoPreviousTemplateError: the history has no other template for a cluster that was released there.
        TemplateNotFoundError: there is no template `to_template`.
        ForeignTemplateError: `to_template` belongs to another deployment.
        UnreadableTemplateError: it is not an apps/v1 Deployment.
        ConfigurationError: the Prefect API did not answer.
    """
    online = {cluster: each.template_id for cluster, each in before.items()}
    async with open_target(target) as platform:
        if over is None:
            selected = await find_previous(platform, deployment, online, to_template)
        else:
            selected, _ = await _search(platform, deployment, over, before=online)
    found = {cluster: each.chosen for cluster, each in selected.items()}
    for note in [note for each in found.values() for note in each.notes]:
        run_logger().warning("%s", note)
    say(
        "choose rollback",
        ", ".join(f"{one_line(name, 80)} to template {one_line(v.id, 40)}" for name, v in found.items()),
    )
    return found


# Judged again under the lock: a template may have been released, or rolled back, in the meantime.
@step("choose rollback", "look where template {template_id} was live", cache_policy=NO_CACHE)
async def find_where_live(
    deployment: Deployment, clusters: Collection[str], template_id: int | str, *, target: str
) -> list[str]:
    """Return those of the clusters in which the template was released at any time.

    Args:
        deployment: as step 1 found it.
        clusters: where to look.
        template_id: which.
        target: the block document `type-slug/name` of the platform.

    Raises:
        ConfigurationError: the Prefect API did not answer.
    """
    published: set[str] = set()
    async with open_target(target) as platform:
        async for publication in platform.history(deployment):
            if publication.status == 1 and same_id(publication.template_id, template_id):
                published.add(publication.cluster)
                if published >= set(clusters):
                    break
        known: dict[str, Known] = {}
        if published:
            template = await _template(platform, deployment, template_id)
            known = await _known_of(platform, deployment, template, {})
    return [
        cluster
        for cluster in clusters
        if cluster in published and (cluster not in known or known[cluster].was_live)
    ]


async def find_previous(
    platform: Platform,
    deployment: Deployment,
    online: Mapping[str, Id | None],
    to_template: Id | None = None,
) -> dict[str, Selected]:
    """Return the templates that `choose_rollback` chooses; the same errors.

    Args:
        platform: where to look.
        deployment: as step 1 found it.
        online: `{cluster: template}` of what is online.
        to_template: one template for all clusters; `None` and empty text mean each cluster's last one.
    """
    if to_template is not None and to_template != "":
        template = await _template(platform, deployment, to_template)
        known = await _known_of(platform, deployment, template, None)
        return {cluster: Selected(template, taken_anyway(template.id, known, cluster)) for cluster in online}
    found, skipped = await _search(platform, deployment, online)
    missing = [cluster for cluster in online if cluster not in found]
    if missing:
        notes = [note for cluster in missing for note in skipped[cluster]]
        named = ", ".join(one_line(cluster, 80) for cluster in missing)
        name = one_line(deployment.name, 120)
        raise NoPreviousTemplateError(
            f"the history of {name} has no earlier template for {named}"
            + (f" that was released there: {shortened(notes)}" if notes else ""),
            clusters=missing,
        )
    return {cluster: found[cluster] for cluster in online}


async def _search(
    platform: Platform,
    deployment: Deployment,
    now: Mapping[str, Id | None],
    *,
    before: Mapping[str, Id | None] | None = None,
) -> tuple[dict[str, Selected], dict[str, list[str]]]:
    """Return what each cluster goes back to, as far as there is anything, and what was skipped in each.

    Args:
        platform: where to look.
        deployment: as step 1 found it.
        now: what is not to stay.
        before: what to try first.
    """
    templates: dict[str, Template] = {}
    known: dict[str, dict[str, Known]] = {}
    found: dict[str, Selected] = {}
    notes: dict[str, list[str]] = {cluster: [] for cluster in now}
    async for cluster, template_id in _candidates(platform, deployment, now, before or {}):
        key = str(template_id)
        if cluster in found:
            continue
        if key not in known:
            try:
                templates[key] = await _template(platform, deployment, template_id)
            except TemplateNotFoundError:
                shown = one_line(template_id, 40)
                notes[cluster].append(f"{shown} is skipped in {one_line(cluster, 80)}: it was deleted")
                continue
            known[key] = await _known_of(platform, deployment, templates[key], before or now)
        choice = choose([Revision(template_id)], known, option=OPTION, cluster=cluster)
        notes[cluster] += choice.notes
        if choice.revision is not None:
            found[cluster] = Selected(templates[key], notes[cluster], choice.unknown)
            if len(found) == len(now):
                break
    return found, notes


async def _candidates(
    platform: Platform, deployment: Deployment, now: Mapping[str, Id | None], before: Mapping[str, Id | None]
) -> AsyncIterator[tuple[str, Id]]:
    """Yield what was published to each cluster, newest first, each template once, less what is there now."""
    passed = {(cluster, str(template_id)) for cluster, template_id in now.items()}
    for cluster, template_id in before.items():
        if template_id is not None and (cluster, str(template_id)) not in passed:
            passed.add((cluster, str(template_id)))
            yield cluster, template_id
    async for publication in platform.history(deployment):
        cluster, template_id = publication.cluster, publication.template_id
        if publication.status != 1 or now.get(cluster) is None or (cluster, str(template_id)) in passed:
            continue
        passed.add((cluster, str(template_id)))
        yield cluster, template_id


async def _template(platform: Platform, deployment: Deployment, template_id: Id) -> Template:
    template = await platform.template(deployment, template_id)
    if not belongs(template, deployment):
        raise foreign(template_id, deployment)
    return template


async def _known_of(
    platform: Platform, deployment: Deployment, template: Template, online: Mapping[str, Id | None] | None
) -> dict[str, Known]:
    """Return what is known of one template, by cluster."""
    known = await known_here(platform, deployment, [Revision(template.id, maker_of(template))], online)
    return known[str(template.id)]
