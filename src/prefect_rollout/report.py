"""A release's result as a page that a person reads in the Prefect UI. Pure: result in, markdown out."""

from collections.abc import Iterable, Sequence

from prefect_rollout.models import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.text import markdown, one_line

_TITLE = {
    Outcome.RELEASED: "✅ {} is released",
    Outcome.FAILED: "❌ {} failed",
    Outcome.TIMED_OUT: "❌ {} timed out",
}


def render(result: ReleaseResult) -> str:
    """The report of one release: outcome, what changed in each cluster, images, pods, time a step."""
    app = f"{markdown(result.app)} ({markdown(result.app_id)})" if result.app else markdown(result.app_id)
    facts = [
        ("App", app),
        ("Deployment", markdown(result.deployment)),
        ("Template", _template(result)),
        ("Reason", markdown(result.reason, 1000)),
        ("Evidence", _evidence(result)),
        ("Release id", f"`{one_line(result.release_id, 80)}`"),
    ]
    parts = [f"# {_TITLE[result.outcome].format(markdown(result.deployment))}", *_error(result)]
    parts.append("\n".join(f"- **{name}:** {value}" for name, value in facts if value))
    if result.clusters:
        parts += [
            "## Clusters",
            _table(
                ("Cluster", "Template before", "Template after", "Published", "Ready / wanted"),
                [_cluster(result, cluster) for cluster in result.clusters],
            ),
        ]
    if result.images:
        parts += ["## Images", _table(("Container", "", "Image"), _images(result))]
    pods = [(cluster.cluster, pod) for cluster in result.clusters for pod in cluster.pods]
    if pods:
        rows = [
            (
                markdown(cluster),
                markdown(pod.name),
                markdown(pod.state or "no state"),
                markdown(pod.node_name or ""),
            )
            for cluster, pod in pods[:100]
        ]
        parts += ["## Pods at the last look", _table(("Cluster", "Pod", "State", "Node"), rows)]
        if len(pods) > len(rows):
            parts.append(f"… and {len(pods) - len(rows)} more.")
    if result.seconds:
        steps = [(step.capitalize(), f"{seconds:.1f}") for step, seconds in result.seconds.items()]
        parts += ["## Time", _table(("Step", "Seconds"), steps)]
    links = [f"[{markdown(label)}]({url})" for label, url in result.links.items()]
    if links:
        parts.append(" · ".join(links))
    return "\n\n".join(parts) + "\n"


def _error(result: ReleaseResult) -> list[str]:
    if not result.error:
        return []
    step = f"**{markdown(result.error.get('step') or 'release')}:** "
    advice = markdown(result.error.get("advice", ""), 1000)
    return [f"> {step}{markdown(result.error.get('message', ''), 2000)}\n>\n> **What to do:** {advice}"]


def _template(result: ReleaseResult) -> str:
    base = markdown(result.base_template_id) if result.base_template_id is not None else ""
    if result.template_id is None:
        return f"none created (base {base})" if base else ""
    return f"{markdown(result.template_id)}, made from {base}"


def _evidence(result: ReleaseResult) -> str:
    if result.outcome is not Outcome.RELEASED:
        return ""
    if result.evidence == "strong":
        return "strong: the platform's own revisions agree"
    return "weak: the platform reports pod names and states only; they stood for two looks"


def _cluster(result: ReleaseResult, cluster: ClusterResult) -> Sequence[str]:
    published, after = {
        True: ("yes", result.template_id),
        False: ("no", cluster.template_before),
        None: ("unknown", cluster.online),
    }[cluster.published]
    return (
        markdown(cluster.cluster),
        _id(cluster.template_before),
        _id(after),
        published,
        f"{cluster.ready} / {cluster.replicas}",
    )


def _id(template_id: int | str | None) -> str:
    return "none or unknown" if template_id is None else markdown(template_id)


def _images(result: ReleaseResult) -> Iterable[Sequence[str]]:
    # One below the other: two image names side by side are wider than the page.
    for container, image in result.images.items():
        before = {(cluster.images_before or {}).get(container, "unknown") for cluster in result.clusters}
        yield markdown(container), "before", ", ".join(map(markdown, sorted(before)))
        yield "", "after", markdown(image)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
