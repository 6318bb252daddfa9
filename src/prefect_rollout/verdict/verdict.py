"""The verdict on a rollout, as data. The rules are in `judge`."""

from enum import StrEnum

from pydantic import BaseModel

from prefect_rollout.text import number, one_line
from prefect_rollout.verdict.diagnosis import Category, Diagnosis
from prefect_rollout.verdict.pods import PodMemory
from prefect_rollout.verdict.status import Pod, state_of


class Ending(StrEnum):
    """The state of a rollout: in progress, or one of three endings."""

    WAITING = "waiting"
    RELEASED = "released"
    FAILED = "failed"
    TIMED_OUT = "timed-out"


class Condition(BaseModel):
    """A reason why a cluster is not released, and its start time."""

    category: Category
    text: str
    since: float
    reported: str | None = None
    final: bool = False


class ClusterVerdict(BaseModel):
    """The verdict on one cluster.

    Attributes:
        wanted: desired replicas; `None` if unknown.
        ready: new pods that are ready; `None` if unknown.
        conditions: the reasons why the cluster is not released; empty if it is.
        not_ready: new pods that are not ready.
        old: pods of another revision.
        unclear: pods whose revision is unknown.
        pods: all pods that the platform lists; `None` if it lists none.
        revision_object: the platform's own object that holds the new revision.
        strong: the platform reports revisions, and they agree.
        events: warnings that are not about a listed pod.
        memory: what is remembered of each new pod for the next observation.
        seen: names and states of the pods, which the next observation may confirm.
        refused: pods that the quota has refused.
        refused_first: the same at the first observation that reports events.
    """

    cluster: str
    wanted: int | None
    ready: int | None = None
    conditions: list[Condition] = []
    not_ready: list[Pod] = []
    old: list[Pod] = []
    unclear: list[Pod] = []
    pods: list[Pod] | None = None
    revision_object: str = ""
    strong: bool = False
    events: tuple[str, ...] = ()
    memory: dict[str, PodMemory] = {}
    seen: list[tuple[str, str | None]] | None = None
    refused: int | None = None
    refused_first: int | None = None

    @property
    def missing(self) -> list[str]:
        """Return the conditions in words."""
        return [condition.text for condition in self.conditions]

    @property
    def released(self) -> bool:
        """True if the cluster runs the new revision with the desired replicas, and nothing else."""
        return not self.conditions

    @property
    def failed(self) -> bool:
        """True if a condition or a pod shows that the release cannot succeed."""
        return any(each.final for each in self.conditions) or any(s.final for s in self.memory.values())


class Verdict(BaseModel):
    """The verdict on all clusters of a release, at the time `at`."""

    ending: Ending
    at: float
    clusters: list[ClusterVerdict]
    diagnosis: Diagnosis | None = None

    @property
    def released(self) -> bool:
        """True if every cluster is released."""
        return self.ending is Ending.RELEASED

    @property
    def evidence(self) -> str:
        """Return `strong` if every cluster reports revisions, else `weak`."""
        return "strong" if all(cluster.strong for cluster in self.clusters) else "weak"

    @property
    def counts(self) -> str:
        """Return the ready new pods and the desired replicas, such as `pub-bjwdt 1/1, pub-bjyt 2/3`."""
        return ", ".join(
            f"{one_line(c.cluster, 60)} {number(c.ready)}/{number(c.wanted)}" for c in self.clusters
        )

    @property
    def progress(self) -> str:
        """Return the counts and the states of new pods that are not ready: `pub-bjwdt 0/2, ErrImagePull`."""
        pods = ((cluster.memory.get(pod.name), pod) for cluster in self.clusters for pod in cluster.not_ready)
        words = dict.fromkeys(memory.word if memory else state_of(pod) for memory, pod in pods)
        return ", ".join((self.counts, *words))

    def explain(self, most: int = 5) -> str:
        """Return the unmet conditions of each cluster, with at most `most` of its pods.

        For example `2 of 3 new pods ready in pub-bjwdt; qapm-home-…-x2x7q: ImagePullBackOff for 35 s`.
        """
        parts = []
        for cluster in self.clusters:
            if cluster.released:
                continue
            parts.append(f"{', '.join(cluster.missing)} in {one_line(cluster.cluster, 60)}")
            pods = [self._described(pod, cluster) for pod in cluster.not_ready]
            pods += [f"old {self._described(pod, cluster)}" for pod in cluster.old]
            pods += [self._described(pod, cluster) for pod in cluster.unclear]
            more = f" and {len(pods) - most} more" if len(pods) > most else ""
            if pods:
                parts.append(", ".join(pods[:most]) + more)
        return "; ".join(parts)

    def _described(self, pod: Pod, cluster: ClusterVerdict) -> str:
        memory = cluster.memory.get(pod.name)
        seconds = self.at - memory.since if memory else 0
        long = f" for {seconds:.0f} s" if seconds >= 0.5 else ""
        return f"{one_line(pod.name, 80)}: {memory.word if memory else state_of(pod)}{long}"
