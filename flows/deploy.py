"""The flow that releases one deployment of an app."""

from typing import Annotated, Any

import httpx
import prefect.runtime
from prefect import flow, get_client, get_run_logger
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.utilities.urls import url_for
from pydantic import Field

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ReleaseError, ReleaseTimedOutError, RolloutError
from prefect_rollout.models import ClusterResult, Outcome, ReleaseRequest, ReleaseResult
from prefect_rollout.progress import Progress, listening
from prefect_rollout.tasks import (
    build_image_list,
    check_deployment,
    get_template,
    parse_metadata,
    publish_deployment,
    report_release,
    upgrade_deployment,
    wait_for_pods,
)
from prefect_rollout.text import one_line
from prefect_rollout.verdict import Expected, Verdict


def _first_name() -> str:
    parameters: dict[str, Any] = prefect.runtime.flow_run.parameters
    template = parameters.get("template_id")
    asked = "newest" if template in (None, "") else f"template {one_line(template, 40)}"
    return f"{one_line(parameters.get('deployment'), 80)} → {asked}"


@flow(name="deploy-latest-image", flow_run_name=_first_name, persist_result=True, validate_parameters=False)
async def deploy_latest_image(
    app_id: int | str,
    deployment: str,
    template_id: int | str | None = None,
    target: str = "container-cloud/default",
    clusters: list[str] | None = None,
    images: dict[str, str] | None = None,
    reason: str = "",
    poll_seconds: Annotated[float, Field(gt=0, le=3600)] = 5,
    poll_attempts: Annotated[int, Field(ge=1, le=100_000)] = 20,
) -> ReleaseResult:
    """Release a deployment: the images of a template, the newest by default, to all its clusters.

    The eight steps of the article, each a task that is retried by itself. The flow run is green only
    when every cluster runs the new template with the replicas wanted and nothing else.

    Args:
        app_id: Id of the app, such as 3290.
        deployment: Exact name of the deployment, such as qapm-home.
        template_id: Template to release from; empty for the newest.
        target: Block with the platform's credentials, as type-slug/name.
        clusters: Release only these clusters; empty for all that the metaData names.
        images: Images in place of the template's, by container: {"qapm-home": "registry/name:tag"}.
        reason: Why; kept in the new template's description and in the report.
        poll_seconds: Seconds between looks at the pods.
        poll_attempts: Looks at the pods before the release counts as timed out.

    Raises:
        ReleaseTimedOutError: the pods were not all ready within the polls allowed.
        RolloutError: whatever else ended the release; `error.result` is the result so far.
    """
    request = ReleaseRequest.of(
        app_id=app_id,
        deployment=deployment,
        template_id=template_id,
        target=target,
        clusters=clusters,
        images=images,
        reason=reason,
        poll_seconds=poll_seconds,
        poll_attempts=poll_attempts,
    )
    release_id = str(prefect.runtime.flow_run.id)
    result = ReleaseResult(
        outcome=Outcome.FAILED,
        app_id=request.app_id,
        deployment=request.deployment,
        release_id=release_id,
        reason=request.reason,
    )

    def note_seconds(progress: Progress) -> None:
        if progress.seconds:
            total = result.seconds.get(progress.step, 0) + progress.seconds
            result.seconds[progress.step] = round(total, 3)

    try:
        with listening(note_seconds):
            async with open_target(target) as platform:
                result.links = _links(release_id) | platform.links()
                await _release(request, result)
    except RolloutError as error:
        if isinstance(error, ReleaseTimedOutError):
            result.outcome = Outcome.TIMED_OUT
        if isinstance(error, ReleaseError) and error.verdict:
            _note_pods(result, error.verdict)
        result.error = error.to_dict()
        error.result = result
        await _report(result)
        raise
    result.outcome = Outcome.RELEASED
    await _report(result)
    return result


async def _release(request: ReleaseRequest, result: ReleaseResult) -> None:
    """Steps 1 to 7. `result` is filled as they go, so that it is true wherever they end."""
    target = request.target
    checked = await check_deployment(request.app_id, request.deployment, target=target)
    deployment, result.app = checked.deployment, checked.app.name

    scope = await parse_metadata(deployment, request.clusters)
    result.clusters = [ClusterResult(cluster=name, replicas=count) for name, count in scope.replicas.items()]

    template = await get_template(
        deployment, request.template_id, release_id=result.release_id, target=target
    )
    result.base_template_id = template.id

    result.images = await build_image_list(template, request.images)
    await _rename(result)

    upgrade = await upgrade_deployment(
        deployment,
        template,
        list(scope.replicas),
        result.images,
        release_id=result.release_id,
        reason=request.reason,
        target=target,
    )
    result.template_id = upgrade.template_id
    for cluster in result.clusters:
        cluster.template_before = upgrade.before[cluster.cluster].template_id
        cluster.images_before = upgrade.before[cluster.cluster].images

    baseline = {name: before.pods for name, before in upgrade.before.items()}
    for cluster in result.clusters:
        pods = await publish_deployment(
            deployment,
            upgrade.template_id,
            cluster.cluster,
            cluster.replicas,
            release_id=result.release_id,
            target=target,
        )
        cluster.published = True
        known = baseline[cluster.cluster]
        baseline[cluster.cluster] = None if known is None else known | (pods or {})

    verdict = await wait_for_pods(
        deployment,
        [
            Expected(
                cluster=cluster.cluster,
                template_id=upgrade.template_id,
                replicas=cluster.replicas,
                baseline=baseline[cluster.cluster],
                generation_before=upgrade.before[cluster.cluster].generation,
                changed=upgrade.before[cluster.cluster].changed,
                in_place=scope.meta.in_place,
            )
            for cluster in result.clusters
        ],
        poll_seconds=request.poll_seconds,
        poll_attempts=request.poll_attempts,
        target=target,
    )
    result.evidence = verdict.evidence
    _note_pods(result, verdict)


def _note_pods(result: ReleaseResult, verdict: Verdict) -> None:
    judged = {cluster.cluster: cluster for cluster in verdict.clusters}
    for cluster in result.clusters:
        cluster.ready = judged[cluster.cluster].ready
        cluster.pods = judged[cluster.cluster].pods


async def _rename(result: ReleaseResult) -> None:
    """Names the flow run after what it releases, so that a list of runs can be read."""
    tags = sorted(
        {image.rpartition("/")[2].partition(":")[2] or "latest" for image in result.images.values()}
    )
    more = f" +{len(tags) - 1}" if len(tags) > 1 else ""
    try:
        async with get_client() as client:
            await client.update_flow_run(
                flow_run_id=prefect.runtime.flow_run.id,
                name=f"{one_line(result.deployment, 80)} → {one_line(tags[0], 80)}{more}",
            )
    except httpx.HTTPError as error:
        get_run_logger().warning("The run keeps its first name: %s", one_line(error))


async def _report(result: ReleaseResult) -> None:
    """Step 8. A report that Prefect's API does not take changes nothing of how the release ended."""
    try:
        await report_release(result)
    except httpx.HTTPError as error:
        get_run_logger().warning("The report could not be left: %s", one_line(error))


def _links(release_id: str) -> dict[str, str]:
    if not (PREFECT_UI_URL.value() or PREFECT_API_URL.value()):
        return {}  # the embedded API serves no UI
    url = url_for("flow-run", obj_id=release_id)
    return {"Flow run": url} if url else {}
