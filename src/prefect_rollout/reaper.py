"""Killed releases are found: the automation that marks them Crashed, so that they can be retried.

Prefect leaves a run whose process was killed in `Running` for ever. A release tells every
`heartbeat_seconds` that it lives; this automation of the Prefect server ends a run that has not for
four and a half such spans. Prefect's own heartbeat would not do: by default it comes every 180 s.
"""

from datetime import timedelta

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from prefect_rollout.settings import liveness

HEARTBEAT = "prefect-rollout.heartbeat"
"""The event of a release that lives."""

NAME = "prefect-rollout: releases that were killed"

_ensured: set[str] = set()


def automation(
    name: str = NAME, *, within_seconds: float, runs: str = "prefect.flow-run.*"
) -> AutomationCore:
    """The automation.

    Args:
        name: its name in the Prefect UI.
        within_seconds: how long a run may be silent; at least 10.
        runs: the resource id of the runs that it looks after.
    """
    return AutomationCore(
        name=name,
        description=(
            "Marks a release Crashed when its process has been silent: killed, or cut off. "
            "Retry such a run; it goes on where it stopped. Created by prefect-rollout."
        ),
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": runs}),
            after={HEARTBEAT},
            # Any change of state ends the wait, or starts it anew with the next heartbeat.
            expect={HEARTBEAT, "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=within_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=(
                    f"No sign of life for {within_seconds:.0f} s: the release's process was killed or cut "
                    "off. Retry the run; it goes on where it stopped."
                ),
            )
        ],
    )


async def ensure(client: PrefectClient) -> None:
    """Creates the automation where the server has none; one that was switched off stays so."""
    server = str(client.api_url)
    if server in _ensured:
        return
    if not await client.read_automations_by_name(NAME):
        created = await client.create_automation(
            automation(within_seconds=max(10, liveness().heartbeat_seconds * 4.5))
        )
        # Two releases that start at once both find none: the elder automation stays.
        found = sorted(await client.read_automations_by_name(NAME), key=lambda each: str(each.id))
        if found and found[0].id != created:
            await client.delete_automation(created)
    _ensured.add(server)
