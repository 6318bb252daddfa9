"""The flow that releases one deployment of an app."""

from functools import partial
from typing import Any, NamedTuple

import prefect.runtime
from prefect import flow

from prefect_rollout.errors import InputError, LockLostError, RolloutError
from prefect_rollout.flows.rollback import roll_back
from prefect_rollout.ids import Id
from prefect_rollout.platforms.port import revision_groups
from prefect_rollout.release.image_facts import image_warnings
from prefect_rollout.release.parameters import takes
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.progress import silence
from prefect_rollout.release.request import Action, ReleaseRequest
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.workload import Baseline, Change, Chosen, Published
from prefect_rollout.runs.allowed_images import refuse_forbidden_images
from prefect_rollout.runs.approval import approve, question, refuse_where_nobody_answers
from prefect_rollout.runs.flow_runs import this_run
from prefect_rollout.runs.lifecycle import asked_for, run_release, tags_of
from prefect_rollout.runs.moves import Move
from prefect_rollout.runs.run import Run
from prefect_rollout.settings import rollout_settings
from prefect_rollout.tasks import (
    build_image_list,
    check_deployment,
    get_template,
    images_that_ran,
    look_up_images,
    parse_metadata,
    pause,
    plan_release,
    publish_deployment,
    report_release,
    upgrade_deployment,
    wait_for_pods,
)
from prefect_rollout.tasks.look_up_images import LookedUp
from prefect_rollout.text import one_line


def _first_name() -> str:
    run = this_run()
    if run.parent_task_run_id is not None:  # its batch has named it
        return run.name
    parameters: dict[str, Any] = prefect.runtime.flow_run.parameters
    plan = "plan " if parameters.get("dry_run") else ""
    return f"{plan}{one_line(parameters.get('deployment'), 80)} → {asked_for(parameters)}"


@flow(name="deploy-latest-image", flow_run_name=_first_name, persist_result=True, validate_parameters=False)
@takes(ReleaseRequest)
async def deploy_latest_image(app_id: Id, deployment: str, **options: Any) -> ReleaseResult:
    """Release a template, by default the newest, to all clusters of a deployment.

    Each of the eight steps is a task with its own retries. The run completes only when every cluster runs
    the new template with the desired replicas and no other pods. By default it skips templates whose release
    failed or was rolled back.

    Raises:
        ReleaseFailedError: the platform or a pod reports that the release cannot succeed.
        ReleaseTimedOutError: not all pods were ready within the allowed polls.
        RollbackFailedError: the release and its rollback failed.
        NotApprovedError: a person rejected the release, or nobody approved it in time.
        RolloutError: any other failure; `error.result` is the result so far.
    """
    request = ReleaseRequest.of(app_id=app_id, deployment=deployment, **options)
    return await run_release(Action.DEPLOY, request, _deploy, report=report_release)  # step 8


class _Prepared(NamedTuple):
    """The result of steps 1 to 4: base and images of each cluster, and the plan."""

    templates: dict[str, Chosen]
    images: dict[str, dict[str, str]]
    baseline: dict[str, Baseline]
    plan: ReleasePlan


async def _prepare(run: Run, request: ReleaseRequest, *, lock: bool) -> _Prepared:
    """Run steps 1 to 4, which write nothing."""
    target, result = request.target, run.result
    checked = await run.reading(check_deployment)(request.app_id, request.deployment, target=target)
    run.found(checked.workload, checked.platform)

    placement = await run.reading(parse_metadata)(run.workload, request.clusters, target=target)
    if await run.begin(placement, lock=lock):  # it has waited for a release window or another release
        return await _prepare(run, request, lock=lock)

    templates: dict[str, Chosen] = {}
    images: dict[str, dict[str, str]] = {}
    baseline: dict[str, Baseline] = {}
    result.notes, result.images, result.checked = [], {}, []
    ran = partial(images_that_ran, run.workload, target=target)
    for group, where in revision_groups(run.platform, run.clusters):
        template = await run.reading(get_template)(
            run.workload,
            request.template_id,
            cluster=where,
            release_id=result.release_id,
            target=target,
        )
        if run.platform.starts_from_live and not _names_something(request):
            raise _no_images(run.workload.name, template)
        listed = await run.reading(build_image_list)(
            run.workload, group, template, request.images, target=target
        )
        await refuse_forbidden_images(target, listed.images, request.images or {}, ran)
        found = await _looked_up(run, request, listed.images)
        templates |= dict.fromkeys(group, template)
        images |= dict.fromkeys(group, found.images)
        baseline |= listed.baseline
        result.notes += template.notes
        result.images = found.images | result.images
        result.checked += [each for each in found.checked if each not in result.checked]
    result.notes += image_warnings(result.checked)
    result.base_template_id = templates[run.clusters[0]].id
    await run.guard.rename(f"{run.guard.run.name.rpartition(' → ')[0]} → {tags_of(result.images.values())}")
    plan = run.plan(baseline, templates, images, creates=True, checked=result.checked)
    return _Prepared(templates, images, baseline, plan)


async def _looked_up(run: Run, request: ReleaseRequest, images: dict[str, str]) -> LookedUp:
    """Return the images to release as their registries have them, if the release looks them up."""
    check = request.check_images or rollout_settings().check_images
    if check == "off" and not request.newest and not request.pin_digest:
        return LookedUp(images=images, checked=[])
    return await run.reading(look_up_images)(
        run.workload,
        images,
        request.images,
        check=check,
        policy=request.newest,
        pin=request.pin_digest,
        target=request.target,
    )


def _names_something(request: ReleaseRequest) -> bool:
    """Return whether the release names what to release."""
    return bool(request.images or request.newest or request.template_id not in {None, ""})


def _no_images(deployment: str, template: Chosen) -> InputError:
    """Return the error for a release that names neither images nor a template where both are needed."""
    container, image = next(iter(template.images.items()), ("web", "registry.example/web:1"))
    example = f"{one_line(container, 80)}={one_line(image.rpartition(':')[0] or image, 200)}:NEW-TAG"
    return InputError(
        f"images: {one_line(deployment, 120)} runs its newest template, and the release names no image",
        advice=f"Give an image for a container, such as `--image {example}`, or `--template-id`. Its "
        f"containers are: {', '.join(one_line(each, 80) for each in template.images)}.",
        field="images",
    )


async def _deploy(run: Run, request: ReleaseRequest) -> None:
    """Run steps 1 to 7. The result is updated after each change, so that it is correct wherever they end."""
    result = run.result
    asks = request.approval != "none" and request.writes
    if asks:
        refuse_where_nobody_answers()
    templates, images, baseline, plan = await _prepare(run, request, lock=request.writes and not asks)
    if not request.writes:
        run.planned(await plan_release(run.workload, plan, target=request.target))
        return
    if asks:
        await _approved(run, request, plan)
        approved = plan.plan_hash
        # Others may have released while the person decided: read everything again, under the lock.
        run.phase = "approved"
        with silence():
            templates, images, baseline, plan = await _prepare(run, request, lock=True)
        run.hold_to(plan, approved)
    run.hold_to(plan)

    changes: dict[str, Change] = {}
    for group in run.platform.groups(run.clusters):
        change = await upgrade_deployment(
            run.workload,
            templates[group[0]],
            group,
            images[group[0]],
            release_id=result.release_id,
            reason=request.reason,
            requested_by=result.requested_by,
            target=request.target,
        )
        changes |= dict.fromkeys(group, change)
    made = {str(change.revision): change.revision for change in changes.values()}
    result.template_id = next(iter(made.values())) if len(made) == 1 else None
    new = {
        name: template.model_copy(
            update={"id": changes[name].revision or template.id, "images": images[name]}
        )
        for name, template in templates.items()
    }
    moves = run.moves(plan, baseline, new)

    async def publish(move: Move) -> Published:
        return await publish_deployment(
            run.workload,
            changes[move.cluster],
            move.cluster,
            move.replicas,
            over=move.before.online,
            release_id=result.release_id,
            unblock=request.unblock,
            target=request.target,
        )

    try:
        # Steps 6 and 7, stage by stage: the canary first, or one cluster after the other.
        await run.roll_out(moves, publish, wait_for_pods, pause)
    except RolloutError as error:
        # Without the lock nothing may be written, not even a rollback.
        if request.on_failure == "rollback" and not isinstance(error, LockLostError):
            await roll_back(run, moves, error)
        raise


async def _approved(run: Run, request: ReleaseRequest, plan: ReleasePlan) -> None:
    """Wait until a person has approved the plan, and record who did."""
    run.hold_to(plan)
    shown = await plan_release(run.workload, plan, target=request.target)
    decision = await approve(
        question(request, run.result, shown),
        key="release",
        seconds=request.approval_seconds,
        requested_by=request.requested_by,
    )
    run.result.approved_by, run.result.approval_comment = decision.name, decision.comment
