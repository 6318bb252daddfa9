"""What the cloud keeps, as the shapes that it answers with."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from prefect_rollout.simulator.engine import Rollout
from prefect_rollout.simulator.events import events_of
from prefect_rollout.simulator.pod import Pod
from prefect_rollout.simulator.shapes import (
    ContainerShape,
    DeploymentStateShape,
    Page,
    PodCountShape,
    PodShape,
    StatusShape,
)
from prefect_rollout.simulator.state import Deployment

T = TypeVar("T")


def page_of(items: Sequence[T], number: int, size: int) -> Page[T]:
    """One page of `items`; its `list` is null when empty."""
    shown = list(items[(number - 1) * size : number * size])
    return Page(
        page_no=number,
        page_size=size,
        total_page=-(-len(items) // size),
        total_count=len(items),
        list=shown or None,
    )


def status_of(
    deployment: Deployment, cluster: str, now: float, iso: Callable[[float], str], *, full: bool
) -> StatusShape:
    """A deployment's status in a cluster; without the optional fields unless `full`.

    `pods` is null where the cluster is down or keeps silent, and empty where nothing was published.
    """
    rollout = deployment.rollout(cluster)
    if deployment.is_down(cluster):
        return StatusShape(cluster=cluster, pods=None) if full else StatusShape(pods=None)
    pods = None if rollout.lists_no_pods else pods_of(deployment, rollout, now, iso, full=full)
    if not full:
        return StatusShape(pods=pods)
    if rollout.spec is None:
        return StatusShape(cluster=cluster, pods=pods)
    return StatusShape(
        cluster=cluster,
        pods=pods,
        deployment=DeploymentStateShape(
            name=deployment.name,
            namespace=deployment.app.namespace,
            # Wayne fills `current` with the available replicas.
            pod_state=PodCountShape(
                current=rollout.ready,
                desired=rollout.spec.wanted,
                warnings=[]
                if pods is None
                else [e for pod in rollout.pods for e in events_of(pod, now, iso)],
            ),
        ),
        # Wayne's rule, which asks neither whether the write was observed nor which template runs.
        healthz=rollout.ready == rollout.spec.wanted
        and all(pod.state == "Running" and pod.pod_ip for pod in pods or ()),
        template_id=rollout.spec.template_id,
        generation=rollout.generation,
        observed_generation=rollout.observed_generation,
        updated_replicas=rollout.updated,
    )


def pods_of(
    deployment: Deployment, rollout: Rollout, now: float, iso: Callable[[float], str], *, full: bool = True
) -> list[PodShape]:
    """The pods of a rollout, the old and the new in one list."""
    if not full:
        return [PodShape(name=pod.name, state=pod.state(now)) for pod in rollout.pods]
    return [_pod(deployment, rollout.cluster, pod, now, iso) for pod in rollout.pods]


def _pod(deployment: Deployment, cluster: str, pod: Pod, now: float, iso: Callable[[float], str]) -> PodShape:
    state = pod.state(now)
    restarts = pod.restart_count(now)
    # A pod that no node takes has none; one updated in place stays where it is.
    homeless = pod.fate.kind == "unschedulable" and not pod.updates
    return PodShape(
        name=pod.name,
        namespace=deployment.app.namespace,
        state=state,
        # A pod has its address once its sandbox runs.
        pod_ip="" if state == "Pending" else _address(deployment, pod),
        node_name="" if homeless else f"{cluster.removeprefix('pub-')}-n{pod.serial % 30 + 1}",
        start_time=iso(pod.born),
        container_status=[
            ContainerShape(name=name, restart_count=restarts) for name, _ in pod.revision.images
        ],
        template_id=pod.template_id,
    )


def _address(deployment: Deployment, pod: Pod) -> str:
    return f"10.{deployment.id % 250}.{pod.serial // 250 % 250}.{pod.serial % 250 + 1}"
