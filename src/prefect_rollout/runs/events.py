"""Prefect events of releases, for automations.

An event is `prefect-rollout.release.` and one of:

- `started`: the deployment and its clusters are known; once per attempt of the run
- `published`: a cluster accepted a publish, a restart or a scaling
- `released`, `failed`, `timed-out`, `rolled-back`, `cancelled`, `skipped`: the end. `rolled-back`
  ends a rollback, and a failed release that was rolled back; `failed` ends a failed rollback

Dry runs emit no events. The resource is the deployment; its labels `app-id`, `deployment`, `platform` and
`action` have the exact names. The app, the clusters and, added by Prefect, the flow run are related.
"""

from typing import Any

from prefect.events import emit_event
from prefect.exceptions import EventTooLarge
from prefect.logging import get_logger

from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.text import one_line

PREFIX = "prefect-rollout.release."

# An event may have 100 related resources; Prefect needs some for the run and its tags.
_CLUSTERS = 50


def emit(what: str, result: ReleaseResult, platform: str | None, **more: Any) -> None:
    """Emit an event of a release, whose name ends in `what`; log it if it is too large.

    Prefect sends it in the background, and waits for it when the process ends. The platform's identity is
    `None` if its block could not be loaded.
    """
    if result.dry_run:
        return
    try:
        emit_event(
            PREFIX + what,
            resource=resource(result, platform),
            related=_related(result, platform),
            payload=payload(result) | more,
        )
    except EventTooLarge as error:
        get_logger("prefect_rollout").warning("The event %s could not be sent: %s", what, one_line(error))


def published(
    result: ReleaseResult,
    platform: str,
    cluster: ClusterResult,
    template: int | str,
    *,
    rollback: bool = False,
) -> None:
    """Emit `published`: the cluster accepted a write, after which it runs `template`."""
    only = result.model_copy(update={"clusters": [cluster]})
    emit(
        "published",
        only,
        platform,
        cluster=one_line(cluster.cluster),
        template=_id(template),
        rollback=rollback,
    )


def ended(result: ReleaseResult, platform: str | None) -> None:
    """Emit the event for the end of a release."""
    error = result.error or {}
    emit(
        ending(result),
        result,
        platform,
        outcome=result.outcome.value,
        live=one_line(error.get("live") or result.live, 2000),
        error={
            "type": error["type"],
            "step": error["step"],
            "message": one_line(error["message"], 2000),
            "advice": one_line(error["advice"], 1000),
            "category": error["diagnosis"]["category"],
        }
        if error
        else None,
    )


def ending(result: ReleaseResult) -> str:
    """Return the last word of the event for the end of a release."""
    back = {cluster.rolled_back for cluster in result.clusters}
    if False in back:
        return Outcome.FAILED.value
    if True in back or (result.action is Action.ROLLBACK and result.outcome is Outcome.RELEASED):
        return "rolled-back"
    return result.outcome.value


def resource(result: ReleaseResult, platform: str | None) -> dict[str, str]:
    """Return the deployment as the resource of an event."""
    app_id, deployment = one_line(result.app_id), one_line(result.deployment)
    return {
        "prefect.resource.id": f"prefect-rollout.deployment.{_platform(platform)}.{app_id}.{deployment}",
        "prefect.resource.name": deployment,
        "app-id": app_id,
        "deployment": deployment,
        "platform": _platform(platform),
        "action": result.action.value,
    }


def _related(result: ReleaseResult, platform: str | None) -> list[dict[str, str]]:
    app_id = one_line(result.app_id)
    clusters = [one_line(cluster.cluster) for cluster in result.clusters[:_CLUSTERS]]
    related = [("app", app_id, one_line(result.app) if result.app else app_id)]
    related += [("cluster", name, name) for name in clusters]
    return [
        {
            "prefect.resource.id": f"prefect-rollout.{role}.{_platform(platform)}.{key}",
            "prefect.resource.role": role,
            "prefect.resource.name": name,
        }
        for role, key, name in related
    ]


def payload(result: ReleaseResult) -> dict[str, Any]:
    """Return the payload of every event of a release: each text on one line, ids as text."""
    return {
        "action": result.action.value,
        "app": one_line(result.app or ""),
        "reason": one_line(result.reason, 1000),
        "requested_by": one_line(result.requested_by, 200),
        "trigger": result.trigger,
        "break_glass": one_line(result.break_glass, 1000),
        "release_id": result.release_id,
        "try": result.tries,
        "template": _id(result.template_id),
        "images": {one_line(name): one_line(image, 2000) for name, image in result.images.items()},
        "clusters": [_cluster(cluster) for cluster in result.clusters],
        "link": result.links.get("Flow run", ""),
    }


def _cluster(cluster: ClusterResult) -> dict[str, Any]:
    return {
        "cluster": one_line(cluster.cluster),
        "before": _id(cluster.template_before),
        "after": _id(cluster.template),
        "online": _id(cluster.online),
        "online_known": cluster.online_known,
        "published": cluster.published,
        "rolled_back": cluster.rolled_back,
        "ready": cluster.ready,
        "replicas": cluster.replicas,
    }


def _platform(identity: str | None) -> str:
    return one_line(identity or "unknown")


def _id(template_id: int | str | None) -> str | None:
    return None if template_id is None else one_line(template_id, 80)
