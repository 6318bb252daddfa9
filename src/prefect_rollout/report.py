"""A release's result as a page that a person reads in the Prefect UI. Pure: result in, markdown out."""

from collections.abc import Iterable, Sequence
from urllib.parse import quote

from prefect_rollout.diagnosis import Diagnosis
from prefect_rollout.models import Action, ClusterResult, Outcome, ReleaseResult
from prefect_rollout.text import markdown, one_line

_DONE = {
    Action.DEPLOY: "released",
    Action.ROLLBACK: "rolled back",
    Action.RESTART: "restarted",
    Action.SCALE: "scaled",
}
_OF_URLS = ":/?#[]@!$&'*+,;=%~"  # what may stand in a URL, less the parentheses that end one in markdown
_TITLE = {
    Outcome.RELEASED: "✅ {name} is {done}",
    Outcome.FAILED: "❌ {name} failed: not {done}",
    Outcome.TIMED_OUT: "❌ {name} timed out: not {done}",
    Outcome.CANCELLED: "⏹ {name} was cancelled: not {done}",
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
    title = _TITLE[result.outcome].format(name=markdown(result.deployment), done=_DONE[result.action])
    if any(cluster.rolled_back is False for cluster in result.clusters):
        title = f"🚨 ROLLBACK FAILED: {markdown(result.deployment)}"
    elif any(cluster.rolled_back for cluster in result.clusters):
        title += ", and rolled back"
    parts = [f"# {title}", *_error(result)]
    parts.append("\n".join(f"- **{name}:** {value}" for name, value in facts if value))
    if result.clusters:
        parts += [
            "## Clusters",
            _table(
                ("Cluster", "Template before", "Template asked for", "Written", "Ready / wanted", "Live now"),
                [_cluster(cluster) for cluster in result.clusters],
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
    links = [_link(label, url) for label, url in result.links.items()]
    if links:
        parts.append(" · ".join(links))
    return "\n\n".join(parts) + "\n"


def _error(result: ReleaseResult) -> list[str]:
    """What went wrong, where, for how long, and what to do: the diagnosis that the error carries."""
    if not result.error:
        return []
    error = result.error
    diagnosis = Diagnosis.model_validate(error["diagnosis"])
    step = f"**{markdown(error.get('step') or 'release')}:** "
    quote = [f"{step}{markdown(error.get('message', ''), 2000)}"]
    if diagnosis.pod or diagnosis.reported:
        quote.append(f"**Diagnosis:** {markdown(diagnosis, 1000)}")
    quote += [f"- {markdown(event)}" for event in diagnosis.events]
    quote.append(f"**What to do:** {markdown(error.get('advice', ''), 1000)}")
    if result.live and error.get("live"):
        quote.append(f"**Live now:** {markdown(error['live'], 2000)}")
    return ["> " + "\n>\n> ".join(quote)]


def _template(result: ReleaseResult) -> str:
    base = "" if result.base_template_id is None else markdown(result.base_template_id)
    if result.template_id is None:
        return f"none created (base {base})" if base else ""
    return f"{markdown(result.template_id)}, made from {base}" if base else markdown(result.template_id)


def _evidence(result: ReleaseResult) -> str:
    if result.outcome is not Outcome.RELEASED:
        return ""
    if result.evidence == "strong":
        return "strong: the platform's own revisions agree"
    return "weak: the platform reports pod names and states only; they stood for two looks"


_WRITTEN = {True: "yes", False: "no", None: "unknown"}


def _cluster(cluster: ClusterResult) -> Sequence[str]:
    back = {True: ", rolled back", False: ", rollback failed", None: ""}[cluster.rolled_back]
    return (
        markdown(cluster.cluster),
        _id(cluster.template_before),
        _id(cluster.template),
        _WRITTEN[cluster.published] + back,
        f"{cluster.ready} / {cluster.replicas}",
        _live(cluster),
    )


def _live(cluster: ClusterResult) -> str:
    if cluster.online is None:
        return "not looked at" if cluster.published is False else "unknown"
    return f"{markdown(cluster.online)}, {'?' if cluster.running is None else cluster.running} Running"


def _id(template_id: int | str | None) -> str:
    return "none or unknown" if template_id is None else markdown(template_id)


def _images(result: ReleaseResult) -> Iterable[Sequence[str]]:
    # One below the other: two image names side by side are wider than the page.
    for container, image in result.images.items():
        before = {(cluster.images_before or {}).get(container, "unknown") for cluster in result.clusters}
        yield markdown(container), "before", ", ".join(map(markdown, sorted(before)))
        yield "", "after", markdown(image)


def _link(label: str, url: str) -> str:
    if not url.startswith(("http://", "https://")):
        return f"{markdown(label)}: {markdown(url)}"
    return f"[{markdown(label)}]({quote(url, safe=_OF_URLS)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
