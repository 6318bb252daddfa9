"""The rollout of one deployment in one cluster, step by step as Kubernetes takes them.

Pure: simulated time comes in as a number, there is no clock and no I/O. Between two events (a write is
observed, a pod becomes ready or vanishes) nothing changes but what `Pod.state` computes, so `advance`
goes from event to event and costs the same after a second and after a year.

The steps follow the deployment controller (kubernetes, pkg/controller/deployment/rolling.go).
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from prefect_rollout.simulator.pod import Fate, Pod, Revision, pod_name


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a rolling update may go: numbers of pods."""

    surge: int
    unavailable: int

    @classmethod
    def of(cls, max_surge: object, max_unavailable: object, wanted: int) -> "Bounds":
        """The bounds for `wanted` replicas; what cannot be read counts as Kubernetes' default, 25%.

        Kubernetes rounds the surge up and the unavailable down, and where both come to nothing it
        lets one pod be unavailable, or no update would ever move (ResolveFenceposts).
        """
        surge = _resolve(max_surge, wanted, math.ceil)
        unavailable = _resolve(max_unavailable, wanted, math.floor)
        return cls(surge, unavailable) if surge or unavailable else cls(0, 1)


def _resolve(bound: object, wanted: int, rounding: Callable[[float], int]) -> int:
    if isinstance(bound, int) and not isinstance(bound, bool) and bound >= 0:
        return bound
    percent = 25
    if isinstance(bound, str) and bound.endswith("%") and bound[:-1].isascii() and bound[:-1].isdigit():
        percent = min(int(bound[:4].rstrip("%")), 100)
    return rounding(percent * wanted / 100)


@dataclass(frozen=True, slots=True)
class Spec:
    """What a deployment shall be in a cluster: the last write, or the last one observed."""

    template_id: int
    revision: Revision
    wanted: int
    max_surge: object = "25%"
    max_unavailable: object = "25%"
    in_place: bool = False
    no_pods_for: float = 0

    @property
    def bounds(self) -> Bounds:
        """The bounds of its rolling update."""
        return Bounds.of(self.max_surge, self.max_unavailable, self.wanted)


class Rollout:
    """The pods of one deployment in one cluster.

    Args:
        deployment: its name, which the pods' names begin with.
        cluster: the cluster's name.
        observe: seconds from a write until the cluster acts on it.
        terminate: seconds that an old pod takes to vanish.
        fate: what becomes of pods with these images, asked whenever containers are made.
    """

    def __init__(
        self,
        deployment: str,
        cluster: str,
        *,
        observe: float,
        terminate: float,
        fate: Callable[[Mapping[str, str]], Fate],
    ) -> None:
        self.deployment = deployment
        self.cluster = cluster
        self.spec: Spec | None = None
        self.generation = 0
        self.observed: Spec | None = None
        self.observed_generation = 0
        self.done_at: float | None = None
        self.pods: list[Pod] = []
        self._observe = observe
        self._terminate = terminate
        self._fate = fate
        self._now = 0.0
        self._unobserved: deque[tuple[float, int, Spec]] = deque()
        self._no_pods_until = 0.0
        self._serial = 0

    # ---- writes -----------------------------------------------------------------------------

    def start_online(self, spec: Spec, since: float) -> None:
        """Puts `spec` online as if it had been released before the simulation began."""
        self.spec = self.observed = spec
        self.generation = self.observed_generation = 1
        for _ in range(spec.wanted):
            self._create(spec, since, Fate(0, 0))
        self.done_at = self._now

    def publish(self, now: float, spec: Spec) -> None:
        """Asks for `spec`, whose revision keeps the restarts asked for before."""
        self.advance(now)
        restarts = self.spec.revision.restarts if self.spec else 0
        self._no_pods_until = now + spec.no_pods_for
        self._write(now, replace(spec, revision=replace(spec.revision, restarts=restarts)))

    def restart(self, now: float) -> None:
        """Asks for all pods to be replaced by alike ones. Needs something published."""
        spec = self._published()
        revision = replace(spec.revision, restarts=spec.revision.restarts + 1)
        self._write(now, replace(spec, revision=revision))

    def scale(self, now: float, wanted: int) -> None:
        """Asks for another number of pods. Needs something published."""
        self._write(now, replace(self._published(), wanted=wanted))

    def _published(self) -> Spec:
        if self.spec is None:
            raise ValueError(f"nothing of {self.deployment} was ever published to {self.cluster}")
        return self.spec

    def _write(self, now: float, spec: Spec) -> None:
        self.advance(now)
        self.spec = spec
        self.generation += 1
        self.done_at = None
        self._unobserved.append((now + self._observe, self.generation, spec))
        self._settle()

    # ---- reads, as of the last advance -----------------------------------------------------------

    @property
    def lists_no_pods(self) -> bool:
        """Whether the cluster keeps silent about pods (behaviour `no_pods`)."""
        return self._now < self._no_pods_until

    @property
    def ready(self) -> int:
        """Pods that run for good and stay."""
        return sum(pod.is_ready(self._now) for pod in self.pods)

    @property
    def updated(self) -> int:
        """Pods of the observed revision: until a write is observed, this speaks of the one before."""
        if self.observed is None:
            return 0
        return sum(pod.revision == self.observed.revision for pod in self._alive())

    @property
    def rolled_out(self) -> bool:
        """The truth: what was asked for last runs in full, and nothing else is left."""
        spec = self.spec
        return (
            spec is not None
            and self.observed_generation == self.generation
            and len(self.pods) == spec.wanted
            and all(
                pod.revision == spec.revision
                and pod.template_id == spec.template_id
                and pod.is_ready(self._now)
                for pod in self.pods
            )
        )

    # ---- time -------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Lets time pass until `now`; a moment in the past changes nothing."""
        while (moment := self._next_event()) <= now:
            self._now = moment
            self._settle()
        self._now = max(self._now, now)

    def _next_event(self) -> float:
        moments = [at for at, _, _ in self._unobserved]
        moments += [
            pod.ready_at if pod.deleted is None else pod.deleted + self._terminate for pod in self.pods
        ]
        moments.append(self._no_pods_until)
        return min((moment for moment in moments if moment > self._now), default=math.inf)

    def _settle(self) -> None:
        """Does all that is due now."""
        while self._unobserved and self._unobserved[0][0] <= self._now:
            _, self.observed_generation, self.observed = self._unobserved.popleft()
            for pod in self._alive():
                if pod.revision == self.observed.revision:
                    pod.template_id = self.observed.template_id  # the same pods, under a new label
        if self.observed is not None:
            step = self._update_in_place if self.observed.in_place else self._roll
            changed = True
            while changed:
                changed = step(self.observed)
                self.pods = [pod for pod in self.pods if not self._is_gone(pod)]
        if self.done_at is None and self.rolled_out:
            self.done_at = self._now

    def _is_gone(self, pod: Pod) -> bool:
        return pod.deleted is not None and pod.deleted + self._terminate <= self._now

    def _alive(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.deleted is None]

    def _roll(self, spec: Spec) -> bool:
        """One step of a rolling update; says whether anything changed."""
        bounds = spec.bounds
        alive = self._alive()
        new = [pod for pod in alive if pod.revision == spec.revision]
        old = [pod for pod in alive if pod.revision != spec.revision]
        # Surplus new pods go, and whatever exceeds the surge after a scaling down, unready ones first.
        surplus = self._unready_first(new)[: max(0, len(new) - spec.wanted)]
        beyond = len(alive) - len(surplus) - spec.wanted - bounds.surge
        waiting = [pod for pod in old + new if pod not in surplus and not pod.is_ready(self._now)]
        if doomed := surplus + waiting[: max(0, beyond)]:
            return self._delete(doomed)
        # The controller scales up first, then down by what stays available.
        room = min(spec.wanted + bounds.surge - len(alive), spec.wanted - len(new))
        if room > 0 and not self.lists_no_pods:
            for _ in range(room):
                self._create(spec, self._now)
            return True
        least = spec.wanted - bounds.unavailable
        spare = len(alive) - least - sum(not pod.is_ready(self._now) for pod in new)
        if spare <= 0:
            return False
        old_unready = [pod for pod in old if not pod.is_ready(self._now)]
        old_ready = [pod for pod in old if pod.is_ready(self._now)]
        return self._delete(old_unready[:spare] + old_ready[: max(0, self.ready - least)])

    def _update_in_place(self, spec: Spec) -> bool:
        """One step of an update that keeps the pods and restarts their containers."""
        alive = self._alive()
        if len(alive) > spec.wanted:
            return self._delete(self._unready_first(alive)[: len(alive) - spec.wanted])
        if len(alive) < spec.wanted and not self.lists_no_pods:
            for _ in range(spec.wanted - len(alive)):
                self._create(spec, self._now)
            return True
        outdated = self._unready_first([pod for pod in alive if pod.revision != spec.revision])
        # No pod is added meanwhile, so at least one must be allowed to be unavailable.
        budget = max(1, spec.bounds.unavailable) - (len(alive) - self.ready)
        changed = False
        for pod in outdated:
            if pod.is_ready(self._now):
                if budget <= 0:
                    break
                budget -= 1
            pod.revision, pod.template_id = spec.revision, spec.template_id
            pod.fate = self._fate(dict(spec.revision.images))
            pod.began = self._now
            pod.updates += 1
            changed = True
        return changed

    def _unready_first(self, pods: list[Pod]) -> list[Pod]:
        return sorted(pods, key=lambda pod: (pod.is_ready(self._now), -pod.serial))

    def _create(self, spec: Spec, since: float, fate: Fate | None = None) -> None:
        self._serial += 1
        self.pods.append(
            Pod(
                name=pod_name(self.deployment, self.cluster, spec.revision, self._serial),
                serial=self._serial,
                revision=spec.revision,
                template_id=spec.template_id,
                fate=fate or self._fate(dict(spec.revision.images)),
                born=since,
                began=since,
            )
        )

    def _delete(self, pods: list[Pod]) -> bool:
        for pod in pods:
            pod.deleted = self._now
        return bool(pods)
