"""Step 3: get the template to release."""

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import NoTemplateError, UnreadableTemplateError
from prefect_rollout.ids import Id, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.revisions import Choice, choose, shortened, taken_anyway
from prefect_rollout.release.workload import Chosen, Workload
from prefect_rollout.runs.records import known_here
from prefect_rollout.runs.step import run_logger, say, step
from prefect_rollout.text import one_line

_AT_ONCE = 20  # revisions whose releases are looked up in one request

OPTION = "--template-id"


@step("get template", "get template of {workload.name}")
async def get_template(
    workload: Workload,
    template_id: int | str | None = None,
    *,
    cluster: str | None = None,
    release_id: str | None = None,
    target: str,
) -> Chosen:
    """Find the template with that id, or the newest by id whose release did not fail.

    Templates whose release failed, has not ended, or was rolled back are skipped; `notes` names them. A
    template without a release on record counts as released.

    Args:
        workload: from step 1.
        template_id: a number or text, compared as text; `None` or empty text for the newest.
        cluster: choose among the revisions of this cluster, and by its releases.
        release_id: identifies the release; it does not start from a template that it created itself.
        target: block of the platform, as type-slug/name.

    Raises:
        NoTemplateError: the deployment has no template, or none that was released.
        TemplateNotFoundError: there is no template with that id.
        ForeignTemplateError: the template belongs to another deployment.
        UnreadableTemplateError: the template is not an apps/v1 Deployment.
        ConfigurationError: the Prefect API did not answer.
    """
    async with open_target(target) as platform:
        if template_id is None or template_id == "":
            choice = await _newest(platform, workload, release_id, cluster)
        else:
            choice = await _named(platform, workload, template_id, cluster)
    chosen = choice.take()
    if chosen is None:
        raise NoTemplateError(
            f"no template of {one_line(workload.name, 120)} was released: {shortened(choice.notes)}",
            advice="Name the template to release with template_id.",
        )
    check_readable(chosen)
    notes = [shortened(chosen.notes)] if chosen.notes else []
    where = f" in {one_line(cluster, 80)}" if cluster else ""
    say("get template", "; ".join([f"template {one_line(chosen.id, 80)}{where}", *notes]))
    return chosen


def check_readable(chosen: Chosen) -> None:
    """Raise `UnreadableTemplateError` if a release cannot publish the revision; log its notes otherwise."""
    if chosen.problem:
        raise UnreadableTemplateError(chosen.problem, template_id=chosen.id)
    for note in chosen.notes:
        run_logger().warning("%s", note)


async def _named(platform: Platform, workload: Workload, template_id: Id, cluster: str | None) -> Choice:
    revision = await platform.revision(workload, template_id, cluster)
    known = await known_here(platform, workload, [revision])
    return Choice(revision, taken_anyway(revision.id, known[str(revision.id)], cluster))


async def _newest(
    platform: Platform, workload: Workload, release_id: str | None, cluster: str | None
) -> Choice:
    """Choose among all revisions, newest first; older ones are looked up only if needed."""
    revisions = [
        revision
        for revision in await platform.revisions(workload, cluster)
        if release_id is None or revision.made_by is None or not same_id(revision.made_by, release_id)
    ]
    if not revisions:
        raise NoTemplateError(f"deployment {one_line(workload.name, 120)} has no template")
    notes: list[str] = []
    for start in range(0, len(revisions), _AT_ONCE):
        few = revisions[start : start + _AT_ONCE]
        choice = choose(few, await known_here(platform, workload, few), option=OPTION, cluster=cluster)
        notes += choice.notes
        if choice.revision is not None:
            return choice._replace(notes=notes)
    return Choice(None, notes)
