"""One pod of the simulated cloud: what state it is in at a given moment.

A pod's whole life follows from when it began and what fate it has, so its state is computed, never
stored: a pod that crashes for a year costs nothing until somebody looks. States are those of the
contract. All times are simulated seconds.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from prefect_rollout.simulator.scenario import BehaviourKind

# Kubernetes' alphabet for generated names: no vowels, so no words (apimachinery, util/rand).
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"

# kubelet backs off from 10 s to 5 min. Here a crashing container restarts every 7 s, so that a few
# polls show several restarts; 7 has no factor in common with the usual 5-second poll, which thereby
# meets the moment of Running sooner or later.
CRASH_EVERY = 7.0
CRASH_LOOKS_RUNNING = 1.5


@dataclass(frozen=True, slots=True)
class Revision:
    """What pods are made from. Two templates with the same pod template make the same revision.

    Args:
        content: a digest of the pod template (`spec.template`).
        restarts: how often a restart was asked for, which makes pods outdated as well.
        images: `{container: image}`.
    """

    content: str
    images: tuple[tuple[str, str], ...]
    restarts: int = 0

    @classmethod
    def of(cls, content: str, images: Mapping[str, str]) -> "Revision":
        """The revision of a pod template."""
        return cls(content=content, images=tuple(images.items()))


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a pod's containers: seconds to `pull` and to `start`, and how it turns out.

    `failing` are the seconds of a slow pull in which the image cannot be pulled.
    """

    pull: float
    start: float
    kind: BehaviourKind = "normal"
    failing: float = 0

    @property
    def ready_after(self) -> float:
        """Seconds from the containers' beginning until ready; infinite when never."""
        hopeless = self.never_starts or self.kind in {"crash_loop", "never_ready"}
        return math.inf if hopeless else self.pull + self.start

    @property
    def never_starts(self) -> bool:
        """Whether the containers are never even made."""
        return self.kind in {"image_cannot_be_pulled", "invalid_image", "unschedulable", "config_error"}


@dataclass(slots=True)
class Pod:
    """A pod.

    Args:
        name: such as `qapm-home-6d4cf56db6-x2x7q`.
        serial: counts the pods of a deployment in a cluster; its address follows from it.
        revision: what its containers are made from.
        template_id: the template that it is labelled with.
        fate: what becomes of its containers.
        born: when the pod was created.
        began: since when its present containers are made; later than `born` after an in-place update.
        updates: how often it was updated in place, each time restarting its containers.
        deleted: when it was told to go.
    """

    name: str
    serial: int
    revision: Revision
    template_id: int
    fate: Fate
    born: float
    began: float
    updates: int = 0
    deleted: float | None = None

    @property
    def ready_at(self) -> float:
        """When it becomes Running for good."""
        return self.began + self.fate.ready_after

    def is_ready(self, now: float) -> bool:
        """Whether it runs for good. A crashing pod's moments of Running do not count."""
        return self.deleted is None and now >= self.ready_at

    def state(self, now: float) -> str:
        """Its state in the contract's words."""
        if self.deleted is not None:
            return "Terminating"
        age = now - self.began
        if self.fate.never_starts or age < self.fate.pull:
            # An updated pod keeps its phase Running, which only its containers contradict.
            return "ContainersNotReady" if self.updates else "Pending"
        if self.fate.kind == "crash_loop":
            crashes, since = divmod(age - self.fate.pull, CRASH_EVERY)
            return "Running" if crashes >= 1 and since < CRASH_LOOKS_RUNNING else "ContainersNotReady"
        return "Running" if now >= self.ready_at else "ContainersNotReady"

    def restart_count(self, now: float) -> int:
        """How often its containers were restarted."""
        crashes = 0.0
        if self.fate.kind == "crash_loop":
            until = now if self.deleted is None else self.deleted
            crashes = max(0.0, (until - self.began - self.fate.pull) // CRASH_EVERY)
        return self.updates + int(crashes)


def pod_name(deployment: str, cluster: str, revision: Revision, serial: int) -> str:
    """A name as Kubernetes makes them, the same in every run: deployment, pod template, pod."""
    template = _letters(f"{revision.content} {revision.restarts}", 10)
    return f"{deployment}-{template}-{_letters(f'{deployment} {cluster} {serial}', 5)}"


def _letters(text: str, length: int) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])
    letters = ""
    for _ in range(length):
        number, index = divmod(number, len(_LETTERS))
        letters += _LETTERS[index]
    return letters
