"""Answers of the tools. Pure: records in, models out. Untrusted text is marked."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from prefect_rollout.batch.result import BatchResult, plan_of_all
from prefect_rollout.mcp.untrusted import advice_of, quoted, quoted_all
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.progress import ROLL_BACK, STEPS, STEPS_OF, WAIT_FOR_ROLLBACK, steps_with
from prefect_rollout.release.result import ClusterResult, Outcome
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import RUNNING, Pod

MOST_PODS = 20
"""Pods per cluster in an answer; pods that are not running come first."""

MOST_RELEASES = 100
"""Releases of a batch in an answer; releases that did not succeed come first."""

MOST_LINES = 300
"""Lines of a batch plan in an answer."""

StepState = Literal["waiting", "running", "retrying", "done", "failed", "stopped"]


class Step(BaseModel):
    """A step of a release."""

    number: int
    step: str = Field(description="Name, such as 'wait for pods'.")
    state: StepState
    seconds: float | None = Field(default=None, description="Duration so far.")


class PodView(BaseModel):
    """A pod at the last observation."""

    name: str
    state: str = Field(description="Running means running and ready.")
    why: str = Field(default="", description="Reason why it is not ready, if known.")


class Cluster(BaseModel):
    """The live state of a cluster, and the desired state of the release."""

    cluster: str
    online_template: int | str | None = Field(
        default=None, description="Template that is online; null if none is, or if it is unknown."
    )
    online_known: bool = Field(default=False, description="True if online_template is known.")
    template: int | str | None = Field(default=None, description="Template that the release publishes.")
    template_before: int | str | None = Field(
        default=None, description="Template that was online before the release."
    )
    published: bool | None = Field(
        default=None, description="True if the cluster accepted the write; null if that is unknown."
    )
    rolled_back: bool | None = Field(
        default=None, description="True if it was rolled back; null if no rollback was tried."
    )
    replicas: int | None = Field(
        default=None, description="Desired replicas, as the cloud reports them, if it does."
    )
    ready: int | None = Field(default=None, description="New pods that are ready.")
    running: int | None = Field(default=None, description="Pods of any template that are running and ready.")
    note: str = Field(default="", description="Assumptions and special conditions.")
    pods: list[PodView] = []
    more_pods: int = Field(default=0, description="Number of pods that are not listed.")


class Diagnosis(BaseModel):
    """The cause of a failure."""

    category: str = Field(description="Stable category, such as ImagePullError or Unschedulable.")
    cluster: str = ""
    pod: str = ""
    summary: str = ""
    events: list[str] = Field(default=[], description="Events of the platform.")


class BatchRow(BaseModel):
    """A release of a batch."""

    release: str
    wave: int | None = None
    state: str
    why: str = ""
    notes: list[str] = Field(default=[], description="Skipped templates, with reasons.")
    flow_run_id: str | None = None


class Plan(BaseModel):
    """The changes that a release would make."""

    plan_hash: str = Field(description="Pass it as `confirm` to do exactly this.")
    changes_nothing: bool = False
    lines: list[str] = Field(description="Changes per cluster, as lines to show to the user.")


class Run(BaseModel):
    """Fields of every flow run."""

    flow_run_id: str
    name: str
    flow: str = Field(description="deploy-latest-image, deploy-batch, rollback, restart or scale.")
    cloud: str = Field(default="", description="Address of the cloud and its block, once known.")
    app_id: str = ""
    deployment: str = ""
    dry_run: bool = False
    state: str = Field(description="State in Prefect, such as Running.")
    ended: bool
    reason: str = ""
    requested_by: str = ""
    seconds: float | None = Field(default=None, description="Duration since its first start.")
    ui_link: str = Field(description="Page of the flow run in the Prefect UI, for people.")


class Release(Run):
    """A flow run: progress, result, live state, and what to do next."""

    outcome: Outcome | None = Field(
        default=None,
        description="Null until it ends. Only released is a success; planned is a dry run.",
    )
    verdict: str = Field(default="", description="Progress or result, in a sentence.")
    live: str = Field(default="", description="What each cluster ran at `live_at`.")
    live_at: datetime | None = Field(
        default=None,
        description="Time at which `live` and `clusters` were read; get_deployment_status reads them again.",
    )
    diagnosis: Diagnosis | None = Field(default=None, description="Cause of the failure.")
    cause: Diagnosis | None = Field(
        default=None,
        description="Cause of the failure if the rollback failed too; diagnosis is that of the rollback.",
    )
    next: str = Field(description="What to do next.")
    steps: list[Step] = []
    clusters: list[Cluster] = []
    evidence: str = Field(
        default="",
        description="strong: the revisions that the cloud reports agree; weak: only pod names and states.",
    )
    images: dict[str, str] = Field(default={}, description="Released images, by container.")
    notes: list[str] = Field(
        default=[], description="Skipped templates, with reasons; `template_id` releases one anyway."
    )
    releases: list[BatchRow] = Field(
        default=[], description="Releases of a batch; those that did not succeed come first."
    )
    more_releases: int = Field(default=0, description="Number of releases that are not listed.")
    plan: Plan | None = Field(default=None, description="Plan of a dry run.")
    confirm_retry: str = Field(
        default="", description="Pass it to retry_release as `confirm`; empty if a retry is not possible."
    )
    started: datetime | None = None


class Brief(BaseModel):
    """The state of a flow run in short."""

    flow_run_id: str
    state: str = Field(description="State in Prefect, such as Scheduled or Running.")
    cloud: str = Field(default="", description="Address of the cloud and its block, once known.")
    verdict: str = Field(default="", description="Progress or result, in a sentence.")
    next: str = Field(description="What to do next.")
    ui_link: str = Field(description="Page of the flow run in the Prefect UI, for people.")


class Submitted(Brief):
    """A flow run that this request or an earlier one started."""

    repeated: bool = Field(
        description="True if the same request started this run within the last ten minutes."
    )
    outcome: Outcome | None = Field(
        default=None, description="Null until it ends. Only released is a success."
    )
    live: str = Field(default="", description="What each cluster ran at `live_at`.")
    live_at: datetime | None = None


class Planned(Brief):
    """A dry run and its plan."""

    plan: Plan | None = Field(default=None, description="Null until the dry run ends, or if it failed.")
    releases: list[BatchRow] = Field(default=[], description="Releases of a batch.")


class Row(Run):
    """A flow run in a list."""

    created: datetime | None = None


class Releases(BaseModel):
    """Flow runs, newest first."""

    releases: list[Row]
    next_cursor: str = Field(
        default="", description="Pass it as `cursor` for the next page; empty on the last."
    )


class Line(BaseModel):
    """A line of a log."""

    at: datetime
    level: str
    message: str


class Logs(BaseModel):
    """A page of the log of a flow run, oldest line first."""

    lines: list[Line]
    next_cursor: str = Field(
        default="", description="Pass it as `cursor` for the next page; empty at the end so far."
    )


class TemplateView(BaseModel):
    """A template of a deployment."""

    template_id: int | str
    images: dict[str, str] = {}
    description: str = ""
    created: str = ""
    by: str = ""
    not_released: str = Field(
        default="", description="Reason why a release without template_id skips it; empty if it does not."
    )
    online_in: list[str] = Field(default=[], description="Clusters that run it.")


class Templates(BaseModel):
    """Templates of a deployment, newest first."""

    cloud: str = Field(description="Address of the cloud and its block.")
    deployment: str
    templates: list[TemplateView]
    more: int = Field(default=0, description="Number of older templates that are not listed.")


class DeploymentStatus(BaseModel):
    """The live state of a deployment."""

    cloud: str = Field(description="Address of the cloud and its block.")
    app_id: str
    app: str
    deployment: str
    clusters: list[Cluster]


STEP_NAMES = {step for steps in STEPS_OF.values() for step in steps} | {ROLL_BACK, WAIT_FOR_ROLLBACK}

# ---- from records --------------------------------------------------------------------------


def cluster_of(result: ClusterResult) -> Cluster:
    """Return a cluster of a release result."""
    pods, more = pods_of(result.pods)
    return Cluster(
        cluster=quoted(result.cluster),
        online_template=id_of(result.online),
        online_known=result.online_known,
        template=id_of(result.template),
        template_before=id_of(result.template_before),
        published=result.published,
        rolled_back=result.rolled_back,
        replicas=result.replicas,
        ready=result.ready,
        running=result.running,
        note=one_line(result.note),
        pods=pods,
        more_pods=more,
    )


def pods_of(pods: Sequence[Pod]) -> tuple[list[PodView], int]:
    """Return the listed pods, those that are not running first, and the number of the others."""
    ordered = sorted(pods, key=lambda pod: pod.state == RUNNING)
    listed = [
        PodView(
            name=quoted(pod.name),
            state=quoted(pod.state or "unknown", 200),
            why=_why(pod),
        )
        for pod in ordered[:MOST_PODS]
    ]
    return listed, len(pods) - len(listed)


def _why(pod: Pod) -> str:
    text = ": ".join(part for part in (pod.reason, pod.message) if part)
    return quoted(text, 500) if text and pod.state != RUNNING else ""


def id_of(value: int | str | None) -> int | str | None:
    """Return an ID of the platform, marked unless it is a plain word."""
    return value if value is None or isinstance(value, int) else quoted(value, 253)


def steps_of(action: str, seen: Mapping[str, tuple[StepState, float | None]]) -> list[Step]:
    """Return all steps of a release.

    Args:
        action: deploy, rollback, restart or scale.
        seen: `{step: (state, seconds)}` of the steps that have started.
    """
    waiting: tuple[StepState, float | None] = ("waiting", None)
    return [
        Step(number=number, step=name, state=seen.get(name, waiting)[0], seconds=seen.get(name, waiting)[1])
        for number, name in enumerate(steps_with(seen, action), 1)
    ]


def steps_done(record: Mapping[str, Any]) -> dict[str, tuple[StepState, float | None]]:
    """Return the steps in a release's record, which is complete before Prefect has recorded all task runs."""
    seconds = {str(step): round(float(took), 1) for step, took in (record.get("seconds") or {}).items()}
    found: dict[str, tuple[StepState, float | None]] = {
        step: ("done", took) for step, took in seconds.items()
    }
    for step in [(record.get("error") or {}).get("step"), *(record.get("failed_steps") or [])]:
        if step in STEP_NAMES:
            found[step] = "failed", seconds.get(step)
    return {**found, STEPS[-1]: ("done", None)}


def diagnosis_of(error: Mapping[str, Any]) -> Diagnosis:
    """Return the diagnosis of an error's `to_dict`."""
    found = error.get("diagnosis") or {}
    return Diagnosis(
        category=quoted(found.get("category") or "Internal", 60),
        cluster=quoted(found.get("cluster") or "", 253),
        pod=quoted(found.get("pod") or "", 253),
        summary=quoted(found.get("summary") or "", 1000),
        events=[quoted(event, 500) for event in (found.get("events") or [])[:10]],
    )


def plan_of(plan: Mapping[str, Any]) -> Plan:
    """Return the plan of a dry run's record."""
    found = ReleasePlan.model_validate(plan)
    return Plan(
        plan_hash=found.plan_hash,
        changes_nothing=found.nothing,
        lines=[quoted(line, 1000) for line in plan_lines(found)],
    )


def plan_of_batch(record: Mapping[str, Any]) -> Plan:
    """Return the plan from the record of a batch's dry run."""
    found = BatchResult.model_validate(record)
    lines = plan_of_all(found)
    more = [f"… and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
    return Plan(
        plan_hash=found.plan_hash,
        changes_nothing=all(row.plan.nothing for row in found.releases if row.plan),
        lines=[*(quoted(line, 1000) for line in lines[:MOST_LINES]), *more],
    )


def rows_of(rows: Iterable[Mapping[str, Any]]) -> tuple[list[BatchRow], int]:
    """Return the listed releases of a batch, failures first, and the number of the others."""
    good = {"released", "planned"}
    ordered = sorted(rows, key=lambda row: str(row.get("stage")) in good)
    listed = [
        BatchRow(
            release=quoted(row.get("name"), 507),
            wave=row.get("wave"),
            state=str(row.get("stage")),
            why=quoted(row.get("detail") or "", 1000),
            notes=[quoted(note, 500) for note in row.get("notes") or []],
            flow_run_id=row.get("flow_run_id"),
        )
        for row in ordered[:MOST_RELEASES]
    ]
    return listed, len(ordered) - len(listed)


def verdict_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return the verdict and the advice of a run's record."""
    error = record.get("error")
    if error:
        step = f"{error['step']}: " if error.get("step") in STEP_NAMES else ""
        return f"{step}{quoted(error.get('message') or '')}", advice_of(error)
    return "", ""


def outcome_of(record: Mapping[str, Any]) -> Outcome | None:
    """Return the outcome of a run's record."""
    outcome = record.get("outcome")
    return Outcome(outcome) if outcome in list(Outcome) else None


def result_fields(record: Mapping[str, Any], at: datetime | None = None) -> dict[str, Any]:
    """Return the fields of `Release` from a record; `at` is the end of the run."""
    error = record.get("error")
    clusters = [ClusterResult.model_validate(each) for each in record.get("clusters") or []]
    return {
        "outcome": outcome_of(record),
        "live": quoted("; ".join(each.live for each in clusters)) if not record.get("dry_run") else "",
        "live_at": at if clusters and not record.get("dry_run") else None,
        "diagnosis": diagnosis_of(error) if error else None,
        "cause": diagnosis_of(error["cause"]) if error and error.get("cause") else None,
        "clusters": [cluster_of(each) for each in clusters],
        "evidence": str(record.get("evidence") or ""),
        "images": quoted_all(record.get("images") or {}),
        "notes": [quoted(note, 500) for note in record.get("notes") or []],
        "plan": plan_of(record["plan"]) if record.get("plan") and record.get("dry_run") else None,
    }
