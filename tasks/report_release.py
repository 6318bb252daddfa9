"""Step 8: report how the release ended."""

import re

from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from prefect_rollout.models import ReleaseResult
from prefect_rollout.report import render
from prefect_rollout.tasks.step import step
from prefect_rollout.text import markdown


@step("report release", "report {result.deployment} {result.outcome.value}", cache_policy=NO_CACHE)
async def report_release(result: ReleaseResult) -> ReleaseResult:
    """Leaves a markdown artifact that tells a person how the release ended, and returns `result`.

    The artifact's key is the same for every release of a deployment, so that its versions are the
    deployment's history.
    """
    await acreate_markdown_artifact(
        render(result),
        key=artifact_key(result),
        description=f"{markdown(result.deployment, 80)}: {result.outcome.value}",
    )
    return result


def artifact_key(result: ReleaseResult) -> str:
    """`release-<app id>-<deployment>` in the characters that Prefect allows: a-z, 0-9 and dashes."""
    name = f"release-{result.app_id}-{result.deployment}".lower()
    return re.sub(r"-+", "-", re.sub(r"[^a-z0-9]", "-", name)).strip("-")[:255]
