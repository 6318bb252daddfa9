"""Answers of the tools. Pure: records in, models out. Untrusted text is marked."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, field_serializer, model_serializer

from prefect_rollout.batch.result import BatchResult, plan_of_all
from prefect_rollout.mcp.untrusted import advice_of, quoted, quoted_all
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.progress import ROLL_BACK, STEPS, STEPS_OF, WAIT_FOR_ROLLBACK, steps_with
from prefect_rollout.release.result import BACK, ClusterResult, Outcome
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import RUNNING, Pod

MOST_PODS = 20
"""Pods per cluster in an answer."""

MOST_RELEASES = 100
"""Releases of a batch in an answer; releases that did not succeed come first."""

MOST_LINES = 300
"""Lines of a batch plan in an answer."""

StepState = Literal["waiting", "running", "retrying", "done", "failed", "stopped"]
Seen = tuple[StepState, float | None]
"""State and seconds of a step."""


class Answer(BaseModel):
    """An object in an answer. It leaves out optional fields that have no value."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in write(self).items()
            if fields[name].is_required() or value != fields[name].default
        }


class Step(Answer):
    """A step of a release."""

    number: int
    step: str
    state: StepState
    seconds: float | None = None


class PodView(Answer):
    """A pod that is not running and ready."""

    name: str
    state: str
    why: str = ""


class Cluster(Answer):
    """The live state of a cluster, and the desired state of the release."""

    cluster: str
    online_template: int | str | None = None
    template: int | str | None = None
    template_before: int | str | None = None
    published: bool | None = None
    rolled_back: bool | None = None
    replicas: int | None = None
    ready: int | None = None
    pods: str = ""
    note: str = ""
    not_ready: list[PodView] = []
    more_pods: int = 0


class Diagnosis(Answer):
    """The cause of a failure."""

    category: str
    cluster: str = ""
    pod: str = ""
    summary: str = ""
    events: list[str] = []
    log: list[str] = []


class BatchRow(Answer):
    """A release of a batch."""

    release: str
    wave: int | None = None
    state: str
    why: str = ""
    notes: list[str] = []
    flow_run_id: str | None = None


class Plan(Answer):
    """The changes that a release would make."""

    plan_hash: str
    changes_nothing: bool = False
    lines: list[str]


class Brief(Answer):
    """The state of a flow run in short."""

    flow_run_id: str
    state: str
    outcome: Outcome | None = None
    verdict: str = ""
    live: str = ""
    live_at: datetime | None = None
    cloud: str = ""
    next: str
    ui_link: str


class Submitted(Brief):
    """A flow run that this request or an earlier one started."""

    repeated: bool


class Planned(Brief):
    """A dry run and its plan."""

    plan: Plan | None = None
    releases: list[BatchRow] = []


class Row(Answer):
    """A flow run in a list. Absent fields have no value."""

    flow_run_id: str
    flow: str
    cloud: str = ""
    app_id: str = ""
    deployment: str = ""
    dry_run: bool = False
    state: str
    ended: bool
    outcome: Outcome | None = None
    images: dict[str, str] = {}
    reason: str = ""
    requested_by: str = ""
    started: datetime | None = None
    seconds: float | None = None
    ui_link: str


class Release(Row, Planned):
    """A flow run: progress, result, live state, and what to do next."""

    confirm_retry: str = ""
    diagnosis: Diagnosis | None = None
    cause: Diagnosis | None = None
    """Diagnosis of the release, if the rollback failed, too."""
    steps: list[Step] = []
    clusters: list[Cluster] = []
    evidence: str = ""
    notes: list[str] = []
    more_releases: int = 0

    @field_serializer("steps")
    def _open_steps(self, steps: list[Step]) -> list[Step]:
        return [step for step in steps if step.state not in {"done", "waiting"}]


class Releases(Answer):
    """Flow runs, newest first."""

    releases: list[Row]
    next_cursor: str = ""


class Line(Answer):
    """A line of a log."""

    at: datetime
    level: str
    message: str


class Logs(Answer):
    """A page of the log of a flow run, oldest line first."""

    lines: list[Line]
    next_cursor: str = ""


class TemplateView(Answer):
    """A template of a deployment."""

    template_id: int | str
    images: dict[str, str] = {}
    description: str = ""
    created: str = ""
    by: str = ""
    not_released: str = ""
    online_in: list[str] = []


class Templates(Answer):
    """Templates of a deployment, newest first."""

    cloud: str
    deployment: str
    templates: list[TemplateView]
    more: int = 0


class DeploymentStatus(Answer):
    """The live state of a deployment."""

    cloud: str
    app_id: str
    app: str
    deployment: str
    clusters: list[Cluster]


STEP_NAMES = {step for steps in STEPS_OF.values() for step in steps} | {ROLL_BACK, WAIT_FOR_ROLLBACK}
B = TypeVar("B", bound=Brief)


def brief(kind: type[B], release: Release, **more: Any) -> B:
    """Return the fields of a release that a shorter answer has."""
    return kind(**{name: getattr(release, name) for name in kind.model_fields if name not in more}, **more)


# ---- from records --------------------------------------------------------------------------


def cluster_of(
    name: str, pods: Sequence[Pod] | None, *, online: int | str | None, wanted: int | None, **more: Any
) -> Cluster:
    """Return a cluster with its pods by template, and those that are not ready."""
    waiting = [pod for pod in pods or () if pod.state != RUNNING]
    shown = [
        PodView(name=quoted(pod.name), state=quoted(pod.state or "unknown", 200), why=_why(pod))
        for pod in waiting[:MOST_PODS]
    ]
    return Cluster(
        cluster=quoted(name),
        online_template=id_of(online),
        replicas=wanted,
        pods="" if pods is None else "; ".join(_groups(pods, online, wanted)),
        not_ready=shown,
        more_pods=len(waiting) - len(shown),
        **more,
    )


def _groups(pods: Sequence[Pod], online: int | str | None, wanted: int | None) -> Iterable[str]:
    """Yield such as `1343173: 0 of 2 ready`, and `1343122: 2 running` for pods of other templates."""
    labelled = all(pod.template_id is not None for pod in pods)
    groups: dict[str, list[Pod]] = {str(online): []} if labelled and online is not None else {}
    for pod in pods:
        groups.setdefault(str(pod.template_id) if labelled else pod.name.rpartition("-")[0], []).append(pod)
    for name, members in groups.items():
        ready = sum(pod.state == RUNNING for pod in members)
        if name == str(online):
            yield f"{quoted(name, 253)}: {ready} of {len(members) if wanted is None else wanted} ready"
        elif ready == len(members):
            yield f"{quoted(name, 253)}: {ready} running"
        else:
            yield f"{quoted(name, 253)}: {ready} of {len(members)} running"


def _why(pod: Pod) -> str:
    return quoted(": ".join(part for part in (pod.reason, pod.message) if part), 500)


def id_of(value: int | str | None) -> int | str | None:
    """Return an ID of the platform, marked unless it is a plain word."""
    return value if value is None or isinstance(value, int) else quoted(value, 253)


def steps_of(action: str, seen: Mapping[str, Seen]) -> list[Step]:
    """Return all steps of an action, such as deploy, with the state of those that have started."""
    found = {name: seen.get(name, ("waiting", None)) for name in steps_with(seen, action)}
    return [
        Step(number=number, step=name, state=state, seconds=seconds)
        for number, (name, (state, seconds)) in enumerate(found.items(), 1)
    ]


def steps_done(record: Mapping[str, Any]) -> dict[str, Seen]:
    """Return the steps in a release's record, which is complete before Prefect has recorded all task runs."""
    seconds = {str(step): round(float(took), 1) for step, took in (record.get("seconds") or {}).items()}
    found: dict[str, Seen] = {step: ("done", took) for step, took in seconds.items()}
    for step in [(record.get("error") or {}).get("step"), *(record.get("failed_steps") or [])]:
        if step in STEP_NAMES:
            found[step] = "failed", seconds.get(step)
    return {**found, STEPS[-1]: ("done", None)}


def _diagnosis_of(error: Mapping[str, Any]) -> Diagnosis:
    found = error.get("diagnosis") or {}
    return Diagnosis(
        category=quoted(found.get("category") or "Internal", 60),
        **{name: quoted(found.get(name) or "", 1000) for name in ("cluster", "pod", "summary")},
        events=[quoted(event, 500) for event in (found.get("events") or [])[:10]],
        log=[quoted(line, 500) for line in (found.get("log_lines") or [])[-10:]],
    )


def plan_of(plan: Mapping[str, Any]) -> Plan:
    """Return the plan of a dry run's record."""
    found = ReleasePlan.model_validate(plan)
    lines = [quoted(line, 1000) for line in plan_lines(found)]
    return Plan(plan_hash=found.plan_hash, changes_nothing=found.nothing, lines=lines)


def _plan_of_batch(record: Mapping[str, Any]) -> Plan:
    found = BatchResult.model_validate(record)
    lines = plan_of_all(found)
    more = [f"… and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
    return Plan(
        plan_hash=found.plan_hash,
        changes_nothing=all(row.plan.nothing for row in found.releases if row.plan),
        lines=[*(quoted(line, 1000) for line in lines[:MOST_LINES]), *more],
    )


def rows_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields with the releases of a batch, failures first, and the number of those left out."""
    ordered = sorted(rows, key=lambda row: str(row.get("stage")) in {"released", "planned"})
    listed = [
        BatchRow(
            release=quoted(row.get("name"), 507),
            wave=row.get("wave"),
            state=f"{row.get('stage')}{BACK[row.get('rolled_back')]}",
            why=quoted(row.get("detail") or "", 1000),
            notes=[quoted(note, 500) for note in row.get("notes") or []],
            flow_run_id=row.get("flow_run_id"),
        )
        for row in ordered[:MOST_RELEASES]
    ]
    return {"releases": listed, "more_releases": len(ordered) - len(listed)}


def verdict_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return the verdict and the advice of a run's record."""
    error = record.get("error")
    if not error:
        return "", ""
    step = f"{error['step']}: " if error.get("step") in STEP_NAMES else ""
    return f"{step}{quoted(error.get('message') or '')}", advice_of(error)


def result_fields(record: Mapping[str, Any], at: datetime | None = None) -> dict[str, Any]:
    """Return the fields of `Release` from the record of a run or a batch; `at` is the end of the run."""
    outcome, dry_run, error = record.get("outcome"), record.get("dry_run"), record.get("error")
    fields: dict[str, Any] = {"outcome": Outcome(outcome) if outcome in list(Outcome) else None}
    if "releases" in record:
        plan = _plan_of_batch(record) if dry_run and record.get("plan_hash") else None
        return fields | rows_of(record["releases"] or []) | {"plan": plan}
    clusters = [ClusterResult.model_validate(each) for each in record.get("clusters") or []]
    return fields | {
        "live": "" if dry_run else quoted("; ".join(each.live for each in clusters)),
        "live_at": at.replace(microsecond=0) if at and clusters and not dry_run else None,
        "diagnosis": _diagnosis_of(error) if error else None,
        "cause": _diagnosis_of(error["cause"]) if error and error.get("cause") else None,
        "clusters": [_cluster_of_result(each) for each in clusters],
        "evidence": str(record.get("evidence") or ""),
        "images": quoted_all(record.get("images") or {}),
        "notes": [quoted(note, 500) for note in record.get("notes") or []],
        "plan": plan_of(record["plan"]) if record.get("plan") and dry_run else None,
    }


def _cluster_of_result(result: ClusterResult) -> Cluster:
    return cluster_of(
        result.cluster,
        None if result.running is None else result.pods,
        online=result.online,
        wanted=result.wanted,
        template=id_of(result.template),
        template_before=id_of(result.template_before),
        published=result.published,
        rolled_back=result.rolled_back,
        ready=result.ready,
        note=one_line(result.note),
    )
