"""The state that a rollout has to reach, and the time and restarts that it gets."""

from pydantic import BaseModel, Field

from prefect_rollout.ids import Id


class Grace(BaseModel, frozen=True):
    """The time and restarts that a new pod gets to recover.

    Attributes:
        seconds: time that a pod may spend in one trouble, from the first observation of it.
        restarts: restarts of a container that fail the release, from the first observation of the pod.
    """

    seconds: float = Field(default=30, ge=0)
    restarts: int = Field(default=3, ge=1)


class Expected(BaseModel):
    """The state that a cluster has to reach.

    Attributes:
        revision: the revision that was published.
        replicas: desired replicas; `None` for the number that the platform reports at each observation.
        baseline: `{pod: state}` before the publish; `None` if unknown: then only labels of the platform show
            which pods are new.
        mixed: the baseline may contain pods of the published revision, and it is unknown which.
        generation_before: the generation before the publish, if it is reported.
        changed: the pods change; if not, old pods may stay.
        in_place: the platform updates pods in place, so that they keep their names.
        restarted: the same revision is published again to replace its pods. Pods in the baseline are old,
            regardless of their labels.
    """

    cluster: str
    revision: Id
    replicas: int | None
    baseline: dict[str, str | None] | None = None
    mixed: bool = False
    generation_before: int | None = None
    changed: bool = True
    in_place: bool = False
    restarted: bool = False
