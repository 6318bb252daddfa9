"""What the tools answer. Pure: Prefect's and our records in, models out.

All text of others is marked by `quoting`.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from prefect_rollout.batch import BatchResult, plan_of_all
from prefect_rollout.difference import plan_lines
from prefect_rollout.mcp.quoting import advice_of, quoted, quoted_all
from prefect_rollout.models import RUNNING, ClusterResult, Outcome, Pod, ReleasePlan
from prefect_rollout.progress import ROLL_BACK, STEPS, STEPS_OF, WAIT_FOR_ROLLBACK, steps_with
from prefect_rollout.text import one_line

MOST_PODS = 20
"""Pods of a cluster that an answer lists, those in trouble first."""

MOST_RELEASES = 100
"""Releases of a batch that an answer lists, those in trouble first."""

MOST_LINES = 300
"""Lines of a batch's plan that an answer shows."""

StepState = Literal["waiting", "running", "retrying", "done", "failed", "stopped"]


class Step(BaseModel):
    """One step of a release."""

    number: int
    step: str = Field(description="Its name, such as 'wait for pods'.")
    state: StepState
    seconds: float | None = Field(default=None, description="What it took, or has taken so far.")


class PodView(BaseModel):
    """A pod at the last look."""

    name: str
    state: str = Field(description="Running means running and ready.")
    why: str = Field(default="", description="Why it is not ready, where that is known.")


class Cluster(BaseModel):
    """What is live in one cluster, and what the release wanted there."""

    cluster: str
    online_template: int | str | None = Field(
        default=None, description="Template that is online; null where none is, or it is not known."
    )
    online_known: bool = Field(default=False, description="Whether it was found out what is online.")
    template: int | str | None = Field(default=None, description="Template that the release wants there.")
    template_before: int | str | None = Field(default=None, description="Template online before the release.")
    published: bool | None = Field(
        default=None, description="Whether the cluster accepted the write; null when that is not known."
    )
    rolled_back: bool | None = Field(default=None, description="Whether it was rolled back, where tried.")
    replicas: int | None = Field(
        default=None, description="Pods wanted: what the cloud was asked for, where it reports that."
    )
    ready: int | None = Field(default=None, description="New pods that were ready at the last look.")
    running: int | None = Field(default=None, description="Pods of any template that are running and ready.")
    note: str = Field(default="", description="What had to be assumed or is special there, in words.")
    pods: list[PodView] = []
    more_pods: int = Field(default=0, description="Pods beyond those listed.")


class Diagnosis(BaseModel):
    """Why a release did not end well."""

    category: str = Field(description="A fixed word, such as ImagePullError or Unschedulable.")
    cluster: str = ""
    pod: str = ""
    summary: str = ""
    events: list[str] = Field(default=[], description="What the platform said.")


class BatchRow(BaseModel):
    """One release of a batch."""

    release: str
    wave: int | None = None
    state: str
    why: str = ""
    notes: list[str] = Field(default=[], description="Templates that were skipped, and why.")
    flow_run_id: str | None = None


class Plan(BaseModel):
    """What a release would change."""

    plan_hash: str = Field(description="Pass it as `confirm` to do exactly this.")
    changes_nothing: bool = False
    lines: list[str] = Field(description="What would change, cluster by cluster, as lines to show.")


class Run(BaseModel):
    """What every answer tells of a flow run."""

    flow_run_id: str
    name: str
    flow: str = Field(description="deploy-latest-image, deploy-batch, rollback, restart or scale.")
    cloud: str = Field(
        default="", description="Address of the cloud, and the block that it is reached through; once known."
    )
    app_id: str = ""
    deployment: str = ""
    dry_run: bool = False
    state: str = Field(description="Prefect's name for the state, such as Running.")
    ended: bool
    reason: str = ""
    requested_by: str = ""
    seconds: float | None = Field(default=None, description="From its first start until now, or its end.")
    ui_link: str = Field(description="The flow run's page in the Prefect UI, for a person.")


class Release(Run):
    """A flow run: how far it is, how it ended, what is live, and what to do next."""

    outcome: Outcome | None = Field(
        default=None,
        description="Once there is one: released is the only good end. planned: a dry run, nothing written.",
    )
    verdict: str = Field(default="", description="How it stands or ended, in a sentence.")
    live: str = Field(default="", description="What each cluster ran at `live_at`.")
    live_at: datetime | None = Field(
        default=None,
        description="When `live` and `clusters` were read; get_deployment_status says what is live now.",
    )
    diagnosis: Diagnosis | None = Field(default=None, description="Why it did not end well.")
    cause: Diagnosis | None = Field(
        default=None,
        description="Of a rollback that failed: why the release had failed; diagnosis is the rollback's.",
    )
    next: str = Field(description="What to do now.")
    steps: list[Step] = []
    clusters: list[Cluster] = []
    evidence: str = Field(
        default="", description="strong: the cloud's own revisions agree; weak: pod names and states only."
    )
    images: dict[str, str] = Field(default={}, description="Images that were released, by container.")
    notes: list[str] = Field(
        default=[], description="Templates that were skipped, and why; `template_id` takes one anyway."
    )
    releases: list[BatchRow] = Field(default=[], description="Of a batch: its releases, bad ones first.")
    more_releases: int = Field(default=0, description="Releases of the batch beyond those listed.")
    plan: Plan | None = Field(default=None, description="Of a dry run: what would change.")
    confirm_retry: str = Field(
        default="", description="What retry_release wants as `confirm`, where the run can be gone on with."
    )
    started: datetime | None = None


class Submitted(BaseModel):
    """A flow run that a request started, or had started before."""

    flow_run_id: str
    state: str = Field(description="Prefect's name for the state by now, such as Scheduled or Running.")
    repeated: bool = Field(
        description="True: the same request was made within ten minutes, and this is the run it started then."
    )
    outcome: Outcome | None = Field(
        default=None, description="How it ended, if it has: released is the only good end."
    )
    verdict: str = Field(default="", description="How it stands or ended, in a sentence.")
    live: str = Field(default="", description="What each cluster ran at `live_at`, once it has ended.")
    live_at: datetime | None = None
    cloud: str = Field(default="", description="Address of the cloud, and its block, once that is known.")
    next: str = Field(description="What to do now.")
    ui_link: str = Field(description="The flow run's page in the Prefect UI, for a person.")


class Planned(BaseModel):
    """What a dry run found."""

    flow_run_id: str = Field(description="Of the dry run.")
    state: str
    plan: Plan | None = Field(default=None, description="Null while the dry run runs, and where it failed.")
    cloud: str = Field(default="", description="Address of the cloud, and its block, once that is known.")
    releases: list[BatchRow] = Field(default=[], description="Of a batch: its releases.")
    verdict: str = ""
    next: str
    ui_link: str


class Row(Run):
    """One flow run of a list."""

    created: datetime | None = None


class Releases(BaseModel):
    """Flow runs, the newest first."""

    releases: list[Row]
    next_cursor: str = Field(default="", description="Pass it as `cursor` for older ones; empty: no more.")


class Line(BaseModel):
    """One line of a log."""

    at: datetime
    level: str
    message: str


class Logs(BaseModel):
    """A page of a flow run's log, oldest first."""

    lines: list[Line]
    next_cursor: str = Field(
        default="", description="Pass it as `cursor` for later ones; empty: no more by now."
    )


class TemplateView(BaseModel):
    """A template of a deployment."""

    template_id: int | str
    images: dict[str, str] = {}
    description: str = ""
    created: str = ""
    by: str = ""
    not_released: str = Field(
        default="", description="Why a release that names no template skips it; empty if it does not."
    )
    online_in: list[str] = Field(default=[], description="Clusters in which it is online.")


class Templates(BaseModel):
    """Templates of a deployment, the newest first."""

    cloud: str = Field(description="Address of the cloud, and its block.")
    deployment: str
    templates: list[TemplateView]
    more: int = Field(default=0, description="Older templates beyond those listed.")


class DeploymentStatus(BaseModel):
    """What is live of a deployment, asked of the platform just now."""

    cloud: str = Field(description="Address of the cloud, and its block.")
    app_id: str
    app: str
    deployment: str
    clusters: list[Cluster]


_STEPS = {step for steps in STEPS_OF.values() for step in steps} | {ROLL_BACK, WAIT_FOR_ROLLBACK}

# ---- how they are made --------------------------------------------------------------------------


def cluster_of(result: ClusterResult) -> Cluster:
    """A cluster as a release's result tells of it."""
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
    """The pods that are listed, those in trouble first, and how many are not."""
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
    """An id of the platform's, which may be any text."""
    return value if value is None or isinstance(value, int) else quoted(value, 253)


def steps_of(action: str, seen: Mapping[str, tuple[StepState, float | None]]) -> list[Step]:
    """The steps of a release: all that it has, by the steps that were seen of it.

    Args:
        action: deploy, rollback, restart or scale.
        seen: `{step: (state, seconds)}`.
    """
    waiting: tuple[StepState, float | None] = ("waiting", None)
    return [
        Step(number=number, step=name, state=seen.get(name, waiting)[0], seconds=seen.get(name, waiting)[1])
        for number, name in enumerate(steps_with(seen, action), 1)
    ]


def steps_done(record: Mapping[str, Any]) -> dict[str, tuple[StepState, float | None]]:
    """The steps that a release's record tells of: it is there before Prefect has recorded all task runs."""
    seconds = {str(step): round(float(took), 1) for step, took in (record.get("seconds") or {}).items()}
    found: dict[str, tuple[StepState, float | None]] = {
        step: ("done", took) for step, took in seconds.items()
    }
    for step in [(record.get("error") or {}).get("step"), *(record.get("failed_steps") or [])]:
        if step in _STEPS:
            found[step] = "failed", seconds.get(step)
    return {**found, STEPS[-1]: ("done", None)}


def diagnosis_of(error: Mapping[str, Any]) -> Diagnosis:
    """Why a release did not end well, by its error's `to_dict`."""
    told = error.get("diagnosis") or {}
    return Diagnosis(
        category=quoted(told.get("category") or "Internal", 60),
        cluster=quoted(told.get("cluster") or "", 253),
        pod=quoted(told.get("pod") or "", 253),
        summary=quoted(told.get("summary") or "", 1000),
        events=[quoted(event, 500) for event in (told.get("events") or [])[:10]],
    )


def plan_of(plan: Mapping[str, Any]) -> Plan:
    """The plan of a dry run's record."""
    found = ReleasePlan.model_validate(plan)
    return Plan(
        plan_hash=found.plan_hash,
        changes_nothing=found.nothing,
        lines=[quoted(line, 1000) for line in plan_lines(found)],
    )


def plan_of_batch(record: Mapping[str, Any]) -> Plan:
    """The plan of a batch's dry run, by its record."""
    found = BatchResult.model_validate(record)
    lines = plan_of_all(found)
    more = [f"… and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
    return Plan(
        plan_hash=found.plan_hash,
        changes_nothing=all(row.plan.nothing for row in found.releases if row.plan),
        lines=[*(quoted(line, 1000) for line in lines[:MOST_LINES]), *more],
    )


def rows_of(rows: Iterable[Mapping[str, Any]]) -> tuple[list[BatchRow], int]:
    """The releases of a batch's record, those that did not end well first, and how many are not listed."""
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
    """How a run ended by its record, in a sentence, and what to do."""
    error = record.get("error")
    if error:
        step = f"{error['step']}: " if error.get("step") in _STEPS else ""
        return f"{step}{quoted(error.get('message') or '')}", advice_of(error)
    return "", ""


def outcome_of(record: Mapping[str, Any]) -> Outcome | None:
    """How a run ended, by its record."""
    outcome = record.get("outcome")
    return Outcome(outcome) if outcome in list(Outcome) else None


def result_fields(record: Mapping[str, Any], at: datetime | None = None) -> dict[str, Any]:
    """Return the fields of a `Release` that its record has; `at` is when the run ended."""
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
