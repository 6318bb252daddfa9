"""The state of one pod across observations: whether it is new, and its trouble so far."""

from collections.abc import Sequence

from pydantic import BaseModel

from prefect_rollout.ids import same_id
from prefect_rollout.text import one_line
from prefect_rollout.verdict.diagnosis import Category
from prefect_rollout.verdict.expected import Expected, Grace
from prefect_rollout.verdict.reasons import (
    EVENTS_SHOWN,
    Tier,
    is_disrupted,
    log_lines_of,
    restarts_of,
    trouble_of,
)
from prefect_rollout.verdict.status import ENDING, RUNNING, Event, Pod, state_of


class PodMemory(BaseModel):
    """The memory of a new pod, kept while the pod is listed.

    Attributes:
        category: its condition; `None` if it is ready and not crashing.
        since: start of that condition.
        trouble: the last reported trouble from which the pod has not recovered.
        trouble_since: start of that trouble; alternating troubles count as one.
        restarts: `{container: restarts}`, as last reported.
        restarts_first: the same at the first observation of the pod.
        word: the condition as shown to people.
        reported: the platform's own text.
        log_lines: the last lines of output that were seen; a container that starts again has none.
        final: the pod shows that the release cannot succeed.
    """

    category: Category | None = None
    since: float
    trouble: Category | None = None
    trouble_since: float = 0
    restarts: dict[str, int] = {}
    restarts_first: dict[str, int] = {}
    word: str = ""
    reported: str | None = None
    container: str | None = None
    events: tuple[str, ...] = ()
    log_lines: tuple[str, ...] = ()
    final: bool = False


def is_new(pod: Pod, expected: Expected) -> bool | None:
    """Return whether the pod is of the published revision; `None` if that is unknown."""
    replaces = expected.restarted and not expected.in_place
    if pod.template_id is not None:
        labelled = same_id(pod.template_id, expected.revision)
        if not labelled or not replaces:
            return labelled
    elif expected.in_place or not (expected.changed or expected.restarted):
        return True  # it keeps its name, or does not change
    if expected.baseline is None:
        return None
    if pod.name not in expected.baseline:
        return True
    return None if expected.mixed else False


def remember(
    pod: Pod, events: Sequence[Event], expected: Expected, before: PodMemory | None, at: float, grace: Grace
) -> PodMemory:
    """Return the memory of a new pod after this observation.

    A pod counts as ready if it runs and has not restarted since the last observation, because a crashing
    container also runs for short times.
    """
    before = before or PodMemory(since=at)
    restarts = before.restarts | restarts_of(pod)
    first = {name: min(count, before.restarts_first.get(name, count)) for name, count in restarts.items()}
    grown = max((count - first[name] for name, count in restarts.items()), default=0)
    grew = any(count > before.restarts.get(name, 0) for name, count in restarts.items())
    if pod.state == RUNNING and not grew:
        since = at if before.category else before.since
        return PodMemory(since=since, restarts=restarts, restarts_first=first, word=RUNNING)

    disrupted = is_disrupted(pod, events)
    silent = disrupted or pod.state == RUNNING or pod.state in ENDING
    trouble = None if silent else trouble_of(pod, events, in_place=expected.in_place)
    last, trouble_since = before.trouble, before.trouble_since
    if trouble and trouble.tier is not Tier.NEVER:
        if not last or _kind(last) is not _kind(trouble.category):
            last, trouble_since = trouble.category, at
        elif last is not Category.OOM_KILLED:  # it alternates with CrashLoopBackOff and is more specific
            last = trouble.category
    elif pod.state == "ContainersNotReady" and last and _kind(last) is not Category.CRASH_LOOP_BACK_OFF:
        last = None  # its containers exist: image, configuration and node were found

    # An update in place restarts the containers once. A labelled pod counts as new only after that.
    by_itself = 1 if expected.in_place and pod.template_id is None else 0
    restarted = grown >= grace.restarts + by_itself
    waited = trouble is not None and (
        trouble.tier is Tier.AT_ONCE
        or (trouble.tier is Tier.AFTER_GRACE and at - trouble_since >= grace.seconds)
    )
    if trouble and trouble.tier is not Tier.NEVER:
        category: Category | None = last
        since = trouble_since
    else:
        category = trouble.category if trouble else _condition(pod, grown - by_itself)
        since = before.since if before.category is category else at
    count = f"{grown} restart{'s' if grown > 1 else ''}" if grown else ""
    word = trouble.word if trouble else state_of(pod)
    container = trouble.container if trouble else None
    return PodMemory(
        category=category,
        since=since,
        trouble=last,
        trouble_since=trouble_since,
        restarts=restarts,
        restarts_first=first,
        word=", ".join(filter(None, (one_line(word, 40), count))),
        reported=(trouble.reported if trouble else pod.message or pod.reason) or count or None,
        container=container,
        events=shown(events),
        log_lines=log_lines_of(pod, container) or before.log_lines,
        final=(waited or restarted)
        and not disrupted
        and pod.state not in ENDING
        and _began_well(pod, expected),
    )


def _kind(category: Category) -> Category:
    return Category.CRASH_LOOP_BACK_OFF if category is Category.OOM_KILLED else category


def _condition(pod: Pod, restarts: int) -> Category:
    """Return the condition of a pod that is not ready and has no reported trouble."""
    if restarts > 0:
        return Category.CRASH_LOOP_BACK_OFF
    return {
        RUNNING: Category.UNCONFIRMED,
        "Pending": Category.POD_PENDING,
        "ContainersNotReady": Category.CONTAINER_NOT_READY,
    }.get(pod.state or "", Category.UNKNOWN_STATE)


def _began_well(pod: Pod, expected: Expected) -> bool:
    """Return whether the release is the cause of this pod's trouble.

    A pod of the baseline without a label may still run the old revision, even if the update keeps its name:
    its trouble counts only if it was ready before and is updated in place.
    """
    if pod.template_id is not None:
        return True
    if expected.baseline is None:
        return False
    if pod.name not in expected.baseline:
        return True
    return expected.in_place and expected.baseline[pod.name] == RUNNING


def shown(events: Sequence[Event]) -> tuple[str, ...]:
    """Return the newest events as text."""
    return tuple(str(event) for event in events[-EVENTS_SHOWN:])
