"""Step 8: report how the release ended."""

import hashlib
import json
import re

from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from prefect_rollout.release.report import render
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs.history import with_record
from prefect_rollout.runs.step import step
from prefect_rollout.text import markdown


@step("report release", "report {result.deployment} {result.outcome.value}", cache_policy=NO_CACHE)
async def report_release(result: ReleaseResult) -> ReleaseResult:
    """Create an artifact that shows how the release ended, and return `result`.

    Its key is the same for every release of a deployment, so that its versions are the deployment's history.
    """
    await acreate_markdown_artifact(
        with_record(render(result), result),
        key=artifact_key(result, "plan" if result.dry_run else "release"),
        description=f"{markdown(result.deployment, 80)}: {result.outcome.value}",
    )
    return result


def artifact_key(result: ReleaseResult, kind: str = "release") -> str:
    """Return `<kind>-<app id>-<deployment>` in the characters that Prefect allows: a-z, 0-9 and dashes.

    If the key is ambiguous, as for `web_api`, it ends in two dashes and a hash, so that no two deployments
    share a key.
    """
    app_id, deployment = str(result.app_id), result.deployment
    key = f"{kind}-{app_id}-{deployment}"
    if re.fullmatch(r"[a-z]+-[a-z0-9]+(-[a-z0-9]+)+", key) and "-" not in app_id and len(key) <= 255:
        return key
    exact = json.dumps([app_id, deployment]).encode()
    shown = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
    return f"{shown[:200]}--{hashlib.sha256(exact).hexdigest()[:16]}"
