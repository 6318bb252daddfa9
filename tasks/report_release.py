"""Step 8: report how the release ended."""

import hashlib
import json
import re
from datetime import UTC, datetime

from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from prefect_rollout.release.report import render
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs.history import KEY, changes, leave_record, table
from prefect_rollout.runs.step import step
from prefect_rollout.text import markdown


@step("report release", "report {result.deployment} {result.outcome.value}", cache_policy=NO_CACHE)
async def report_release(result: ReleaseResult) -> ReleaseResult:
    """Create artifacts that show how the release ended, and return `result`.

    They are a page for people, the result for programs, and a table of the changes in each cluster, except
    for a dry run. The keys are the same for every release of a deployment, so that
    the artifacts' versions are the deployment's history.
    """
    await leave_record(result)
    description = f"{markdown(result.deployment, 80)}: {result.outcome.value}"
    await acreate_markdown_artifact(
        render(result),
        key=artifact_key(result, "plan" if result.dry_run else "release"),
        description=description,
    )
    if rows := changes(result, datetime.now(UTC)):
        await acreate_table_artifact(table(rows), key=artifact_key(result, KEY), description=description)
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
