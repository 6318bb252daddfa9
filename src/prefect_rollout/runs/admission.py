"""Admission of runs by the release windows of their target."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from prefect import get_run_logger

from prefect_rollout.blocks import forget_blocks, load_windows
from prefect_rollout.errors import RolloutError, WindowClosedError
from prefect_rollout.ids import Id, template_name
from prefect_rollout.release.progress import Progress, tell
from prefect_rollout.release.request import Request, RollbackRequest
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.windows import Closed
from prefect_rollout.runs.guard import Guard
from prefect_rollout.runs.throttle import slot_released
from prefect_rollout.text import one_line

BREAK_GLASS = "rollout.break-glass"
"""Label of a flow run that overrode a closed window; its value is the reason."""

# Interval at which a waiting run reads the windows, which may change.
_ASK_AGAIN_SECONDS = 30.0


class _Refusal(NamedTuple):
    block: str
    closed: Closed
    text: str


WayBack = Callable[[], Awaitable[Collection[str]]]


async def admit(
    app_id: Id,
    request: Request,
    result: ReleaseResult,
    guard: Guard,
    *,
    wait_seconds: float,
    way_back: WayBack | None = None,
) -> bool:
    """Wait until the run's windows are open or it breaks the glass; return True if it waited.

    Windows do not apply to a dry run. If they exempt rollbacks, they apply to a rollback only in the clusters
    in which its template was never live; `way_back` returns the others. A request with `break_glass` does not
    wait, and the result records it. With `wait_seconds` 0, a closed window refuses the run at once.

    Raises:
        WindowClosedError: a window stays closed for longer than `wait_seconds`.
        ConfigurationError: the windows cannot be read, or the label cannot be written.
    """
    if not request.writes:
        return False
    until = _now() + timedelta(seconds=wait_seconds)
    refusal: _Refusal | None = None
    said = ""
    while True:
        try:
            refusal = await _refusal(app_id, request, result, way_back)
        except RolloutError as error:
            # A temporary failure of the API must not end a wait of days.
            if refusal is None or not error.retryable or _now() > until:
                raise
            get_run_logger().warning("Still waiting: %s", one_line(error.problem))
            await _sleep(_ASK_AGAIN_SECONDS)
            continue
        if refusal is None:
            return bool(said)
        if reason := request.break_glass.strip():
            if not result.break_glass:
                await guard.label({BREAK_GLASS: one_line(reason, 1000)})
                result.break_glass = reason
                _say(f"breaking the glass: {refusal.text}: {one_line(reason)}")
            return bool(said)
        reopens = refusal.closed.reopens
        if reopens is None or reopens > until:
            raise _error(refusal, wait_seconds)
        if said != (said := refusal.text):
            _say(f"waiting: {refusal.text}")
        left = (reopens - _now()).total_seconds()
        await _sleep(min(_ASK_AGAIN_SECONDS, max(0.05, left)))


async def _sleep(seconds: float) -> None:
    async with slot_released():
        await asyncio.sleep(seconds)
    forget_blocks()


async def _refusal(
    app_id: Id, request: Request, result: ReleaseResult, way_back: WayBack | None
) -> _Refusal | None:
    """Return why the run must not start now; `None` if it may. Ask the Prefect API each time."""
    found = await load_windows(request.target)
    if found is None:
        return None
    block, windows = found
    clusters, why = [cluster.cluster for cluster in result.clusters], ""
    closed = windows.judge(app_id, clusters, _now())
    if closed is not None and way_back is not None and windows.rollback_exempt:
        exempt = await way_back()
        clusters = [cluster for cluster in clusters if cluster not in exempt]
        closed = windows.judge(app_id, clusters, _now()) if clusters else None
        asked_for = template_name(request.to_template if isinstance(request, RollbackRequest) else None)
        why = f"; this rollback is not exempt: {asked_for} was never released there"
    return closed and _Refusal(block, closed, closed.clause(block) + why)


def _error(refusal: _Refusal, waited_seconds: float) -> WindowClosedError:
    closed = refusal.closed
    longer = f", longer than the {waited_seconds:.0f} s that it may wait" if waited_seconds else ""
    return WindowClosedError(
        refusal.text + longer,
        windows=list(closed.rules),
        block=refusal.block,
        clusters=list(closed.clusters),
        cluster=closed.clusters[0] if len(closed.clusters) == 1 else None,
        reopens=closed.reopens and closed.reopens.isoformat(),
    )


def _say(what: str) -> None:
    tell(Progress("parse metadata", "running", what, aloud=True))
    get_run_logger().warning("%s", what)


def _now() -> datetime:
    return datetime.now(UTC)
