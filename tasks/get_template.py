"""Step 3: get the template to release."""

from typing import NamedTuple

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ForeignTemplateError, NoTemplateError, TemplateNotFoundError
from prefect_rollout.models import (
    Chosen,
    Deployment,
    Id,
    Template,
    maker_of,
    marked,
    newest_first,
    same_id,
)
from prefect_rollout.platforms.port import Platform
from prefect_rollout.records import known_here
from prefect_rollout.revisions import Choice, Revision, capped, choose, shortened, taken_anyway
from prefect_rollout.tasks.step import run_logger, say, step
from prefect_rollout.text import one_line

_AT_ONCE = 20  # templates whose releases are looked up in one request

OPTION = "--template-id"


class Selected(NamedTuple):
    """A template with its text, which may hold secrets, and what there is to say about the choice."""

    template: Template
    notes: list[str]
    unknown: bool = False

    @property
    def chosen(self) -> Chosen:
        """Return what a release keeps of it."""
        return Chosen(**self.template.version.model_dump(), notes=capped(self.notes), unknown=self.unknown)


@step("get template", "get template of {deployment.name}")
async def get_template(
    deployment: Deployment,
    template_id: int | str | None = None,
    *,
    release_id: str | None = None,
    target: str,
) -> Chosen:
    """Find the template with that id, or the newest by id that was not released in vain.

    Templates whose release did not end well, has not ended, or was rolled back are skipped; `notes` says
    which. A template of which no release is on record counts as released.

    What it returns is kept with the flow run's results; the template's text is not, for its
    environment values may be secrets.

    Args:
        deployment: as step 1 found it.
        template_id: a number or text, compared as text; `None` and empty text mean the newest.
        release_id: names this release; a template that it created itself is no base for it.
        target: the block document `type-slug/name` of the platform.

    Raises:
        NoTemplateError: the deployment has no template, or none that was released.
        TemplateNotFoundError: there is no template with that id.
        ForeignTemplateError: the template belongs to another deployment.
        UnreadableTemplateError: the template is not an apps/v1 Deployment.
        ConfigurationError: the Prefect API did not answer.
    """
    async with open_target(target) as platform:
        selected = await find_template(platform, deployment, template_id, release_id)
    chosen = selected.chosen
    for note in chosen.notes:
        run_logger().warning("%s", note)
    notes = [shortened(chosen.notes)] if chosen.notes else []
    say("get template", "; ".join([f"template {one_line(chosen.id, 80)}", *notes]))
    return chosen


async def find_template(
    platform: Platform, deployment: Deployment, template_id: Id | None, release_id: str | None
) -> Selected:
    """Return the template that `get_template` chooses; the same errors."""
    if template_id is None or template_id == "":
        return await _newest(platform, deployment, release_id)
    template = await _by_id(platform, deployment, template_id)
    revision = Revision(template.id, maker_of(template))
    known = await known_here(platform, deployment, [revision])
    return Selected(template, taken_anyway(template.id, known[str(template.id)]))


def belongs(template: Template, deployment: Deployment) -> bool:
    """Return whether a template is one of the deployment's, as far as it says."""
    return template.deployment_id is None or same_id(template.deployment_id, deployment.id)


async def _newest(platform: Platform, deployment: Deployment, release_id: str | None) -> Selected:
    newest: Template | None = None
    revisions: list[Revision] = []
    # Not the first of the answer: a platform may sort otherwise, or not at all.
    async for template in platform.templates(deployment):
        if not belongs(template, deployment) or (release_id is not None and marked(template, release_id)):
            continue
        revisions.append(Revision(template.id, maker_of(template)))
        if newest is None or newest_first(template.id) > newest_first(newest.id):
            newest = template
    if newest is None:
        raise NoTemplateError(f"deployment {one_line(deployment.name, 120)} has no template")
    revisions.sort(key=lambda revision: newest_first(revision.id), reverse=True)
    choice = await _released(platform, deployment, revisions)
    if choice.revision is None:
        raise NoTemplateError(
            f"no template of {one_line(deployment.name, 120)} was released: {shortened(choice.notes)}",
            advice="Name the template to release with template_id.",
        )
    if not same_id(choice.revision.id, newest.id):
        newest = await platform.template(deployment, choice.revision.id)
    return Selected(newest, choice.notes, choice.unknown)


async def _released(platform: Platform, deployment: Deployment, revisions: list[Revision]) -> Choice:
    """Choose among all revisions, newest first; older ones are looked up only where they are needed."""
    notes: list[str] = []
    for start in range(0, len(revisions), _AT_ONCE):
        few = revisions[start : start + _AT_ONCE]
        choice = choose(few, await known_here(platform, deployment, few), option=OPTION)
        notes += choice.notes
        if choice.revision is not None:
            return choice._replace(notes=notes)
    return Choice(None, notes)


async def _by_id(platform: Platform, deployment: Deployment, template_id: Id) -> Template:
    async for template in platform.templates(deployment):
        if same_id(template.id, template_id) and belongs(template, deployment):
            return template
    # Not among the deployment's own: either another deployment's, or nobody's.
    template = await platform.template(deployment, template_id)
    if not same_id(template.id, template_id):
        raise TemplateNotFoundError.named(template_id, (), f"of {one_line(deployment.name, 120)}")
    raise foreign(template_id, deployment)


def foreign(template_id: Id, deployment: Deployment) -> ForeignTemplateError:
    """Return the error of a template that is another deployment's."""
    return ForeignTemplateError(
        f"template {one_line(template_id, 120)} is not one of {one_line(deployment.name, 120)}'s",
        template_id=template_id,
    )
