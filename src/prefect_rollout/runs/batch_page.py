"""The page of a batch in the Prefect UI, and its progress, kept up to date while it runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import Pause, PrefectException

from prefect_rollout.batch.result import BatchResult, render
from prefect_rollout.runs.endings import LAST_SECONDS
from prefect_rollout.runs.history import with_record
from prefect_rollout.text import one_line

_UPDATE_SECONDS = 5.0


class BatchPage:
    """The artifacts of a batch."""

    def __init__(self, result: BatchResult, client: PrefectClient) -> None:
        self._result = result
        self._client = client
        self._progress: UUID | None = None
        self._page: UUID | None = None
        self._shown = ""

    @asynccontextmanager
    async def kept_up_to_date(self) -> AsyncIterator[None]:
        """Keep the artifacts up to date within the context."""

        async def keep_updating() -> None:
            while True:
                await self.update(running=True)
                await asyncio.sleep(_UPDATE_SECONDS)

        updates = asyncio.create_task(keep_updating())
        waiting = False
        try:
            yield
        except Pause:
            waiting = True
            raise
        finally:
            updates.cancel()
            await asyncio.wait([updates])
            if waiting:
                await self.update(running=True)

    async def update(self, *, running: bool) -> None:
        """Write the page; at the end, when `running` is false, also the result for programs."""
        state = self._result.model_dump_json()
        if running and state == self._shown:
            return
        try:
            async with asyncio.timeout(LAST_SECONDS):
                await self._write(running=running)
            self._shown = state
        # A failure to write the page does not affect the releases.
        except (httpx.HTTPError, PrefectException, TimeoutError) as error:
            why = one_line(error) or type(error).__name__
            get_run_logger().warning("The batch's page could not be updated: %s", why)

    async def _write(self, *, running: bool) -> None:
        page, progress = render(self._result, running=running), self._result.progress
        if not running:
            page = with_record(page, self._result)
        if self._progress is None:
            self._progress = await acreate_progress_artifact(progress, description="Releases that have ended")
        else:
            await self._client.update_artifact(self._progress, ArtifactUpdate(data=progress))
        counted = self._result.counted
        if self._page is None:
            key = f"batch-{self._result.plan_digest}"  # each version is a batch of the plan
            self._page = await acreate_markdown_artifact(page, key=key, description=counted)
        else:
            await self._client.update_artifact(self._page, ArtifactUpdate(data=page, description=counted))
