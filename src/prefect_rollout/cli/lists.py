"""Lists on standard output: changes, runs, clusters and templates. Each fits into 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from prefect_rollout.cli.output import label, out
from prefect_rollout.ids import same_id, template_name
from prefect_rollout.release.result import cloud_words
from prefect_rollout.text import one_line, when
from prefect_rollout.verdict.status import RUNNING, running

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from prefect_rollout.execution.deployments import Live, Templates
    from prefect_rollout.runs.history import Change

_MOST_PODS = 20


def entry(head: Sequence[str], *more: tuple[str, object]) -> None:
    """Print one entry of a list on standard output: a line of words, then labelled lines."""
    out.print(Text("  ".join(one_line(word, 300) for word in head if word)), soft_wrap=not out.is_terminal)
    for name, text in more:
        if text:
            label(name, text, console=out)


def show_changes(found: "Sequence[Change]") -> None:
    """Print the changes of the history."""
    for change in found:
        who = f"{change.who} ({change.trigger})" if change.trigger else change.who
        if change.approved_by:
            who += f", approved by {change.approved_by}"
        why = f"{change.why} [break glass: {change.break_glass}]" if change.break_glass else change.why
        entry(
            (when(change.when), f"{change.action}: {change.outcome}"),
            ("of", f"{change.deployment} (app {change.app_id})"),
            ("template", f"{change.before} → {change.after} in {change.cluster}"),
            ("cloud", cloud_words(change.cloud, change.target)),
            ("who", who),
            ("why", why),
            ("run", change.run_id),
        )


def run_document(run: "FlowRun") -> dict[str, Any]:
    """Return a run for `--json`."""
    from prefect_rollout.runs.lifecycle import run_link

    return {
        "flow_run_id": str(run.id),
        "name": run.name,
        "state": run.state.name if run.state else None,
        "message": run.state.message if run.state else None,
        "ended": bool(run.state and run.state.is_final()),
        "app_id": run.parameters.get("app_id"),
        "deployment": run.parameters.get("deployment"),
        "dry_run": bool(run.parameters.get("dry_run")),
        "created": run.created and run.created.isoformat(timespec="seconds"),
        "link": run_link(run.id),
    }


def show_runs(runs: Sequence["FlowRun"]) -> None:
    """Print runs, each with the beginning of its id."""
    for run in runs:
        state = run.state
        failed = state is not None and state.is_final() and not state.is_completed()
        entry(
            (str(run.id)[:8], when(run.start_time or run.created), (state and state.name) or "unknown"),
            ("of", f"{'dry run: ' if run.parameters.get('dry_run') else ''}{run.name}"),
            ("who", run.parameters.get("requested_by")),
            ("why", run.parameters.get("reason")),
            ("ended", one_line(state.message, 200) if failed and state and state.message else ""),
        )


def show_live(live: "Live") -> dict[str, Any]:
    """Print the state of a deployment, and return it for `--json`."""
    workload = live.workload
    entry((f"{workload.name} (app {workload.app_id}) on {live.cloud}",))
    clusters = []
    for each in live.clusters:
        pods = each.pods or []
        count = "pods not reported" if each.pods is None else f"{running(pods)} pods Running"
        entry(
            (f"{each.name}: {template_name(each.online)} online, {count}, {each.replicas.number} wanted",),
            ("note", each.replicas.note),
        )
        trouble = [pod for pod in pods if pod.state != RUNNING]
        for pod in trouble[:_MOST_PODS]:
            why = ": ".join(part for part in (pod.state or "unknown", pod.reason, pod.message) if part)
            label("pod", f"{pod.name}: {why}", out)
        if len(trouble) > _MOST_PODS:
            label("pod", f"and {len(trouble) - _MOST_PODS} more that are not Running", out)
        clusters.append(
            {
                "cluster": each.name,
                "online_template": each.online,
                "replicas": each.replicas.number,
                "note": each.replicas.note,
                "running": None if each.pods is None else running(pods),
                "pods": [pod.model_dump(mode="json", exclude_none=True) for pod in pods],
            }
        )
    return {
        "cloud": live.cloud,
        "app_id": workload.app_id,
        "deployment": workload.name,
        "clusters": clusters,
    }


def show_templates(found: "Templates") -> dict[str, Any]:
    """Print the templates of a deployment, and return them for `--json`."""
    documents = []
    for each, reason in found.newest:
        online = [cluster for cluster, revision in found.online.items() if same_id(revision, each.id)]
        entry(
            (str(each.id), f"created {each.created}" if each.created else "", each.author),
            ("online", ", ".join(online)),
            *(("image", f"{container}: {image}") for container, image in each.images.items()),
            ("note", each.note),
            ("failed", reason),
        )
        documents.append(
            {
                "template_id": each.id,
                "created": each.created,
                "by": each.author,
                "images": dict(each.images),
                "description": each.note,
                "online_in": online,
                "not_released": reason,
            }
        )
    if found.more:
        entry((f"and {found.more} older; --limit shows more",))
    return {
        "cloud": found.cloud,
        "app_id": found.workload.app_id,
        "deployment": one_line(found.workload.name),
        "templates": documents,
        "more": found.more,
    }
