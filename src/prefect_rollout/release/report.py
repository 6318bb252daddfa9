"""The report of a release as markdown for the Prefect UI. Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from prefect_rollout.release.image_facts import CheckedImage
from prefect_rollout.release.plan import ClusterPlan, ReleasePlan
from prefect_rollout.release.plan_words import (
    NOTHING,
    RESTARTED,
    change_words,
    image_rows,
    notes_of,
    others_words,
    pods_words,
    procedure_words,
    strategy_words,
    template_words,
)
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import BACK, ClusterResult, Outcome, ReleaseResult, cloud_words
from prefect_rollout.text import link, markdown, number, one_line, table, when
from prefect_rollout.verdict.diagnosis import Diagnosis

_DONE = {
    Action.DEPLOY: "released",
    Action.ROLLBACK: "rolled back",
    Action.RESTART: "restarted",
    Action.SCALE: "scaled",
}
_TITLE = {
    Outcome.RELEASED: "✅ {name} is {done}",
    Outcome.FAILED: "❌ {name} failed: not {done}",
    Outcome.TIMED_OUT: "❌ {name} timed out: not {done}",
    Outcome.CANCELLED: "⏹ {name} was cancelled: not {done}",
    Outcome.PLANNED: "📋 Plan: {name}, not yet {done}",
}


def render(result: ReleaseResult) -> str:
    """Return the report of a release: outcome, changes, images, pods, and seconds of each step."""
    facts = [
        ("App", app_words(result)),
        ("Deployment", markdown(result.deployment)),
        ("Cloud", "" if result.outcome is Outcome.PLANNED else _cloud(result)),  # its plan names it
        ("Template", _template(result)),
        ("Held to plan", f"`{result.plan.plan_hash}`" if result.plan and not result.dry_run else ""),
        ("Reason", markdown(result.reason, 1000)),
        ("Break glass", markdown(result.break_glass, 1000)),
        ("Requested by", markdown(result.requested_by)),
        ("Trigger", markdown(result.trigger)),
        ("Approved by", _approval(result)),
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
    if result.outcome is Outcome.PLANNED and result.plan:
        parts += [render_plan(result.plan), _how_to_apply(result.plan)]
    elif result.clusters:
        parts += [
            "## Clusters",
            table(
                (
                    "Cluster",
                    "Template before",
                    "Template requested",
                    "Written",
                    "Ready / wanted",
                    "Live at the end",
                ),
                [_cluster(cluster) for cluster in result.clusters],
            ),
        ]
    noted = [each for each in result.clusters if each.note]
    if noted:
        parts.append("\n".join(f"- {markdown(each.cluster)}: {markdown(each.note)}" for each in noted))
    if result.notes and result.outcome is not Outcome.PLANNED:
        parts += ["## Notes", render_notes(result.notes)]
    if result.images and result.outcome is not Outcome.PLANNED:
        parts += ["## Images", table(("Container", "", "Image"), _images(result)), *_registry(result.checked)]
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
        parts += ["## Pods at the last look", table(("Cluster", "Pod", "State", "Node"), rows)]
        if len(pods) > len(rows):
            parts.append(f"… and {len(pods) - len(rows)} more.")
    if result.seconds:
        steps = [(step.capitalize(), f"{seconds:.1f}") for step, seconds in result.seconds.items()]
        parts += ["## Time", table(("Step", "Seconds"), steps)]
    commands = [_code(command) for cluster in result.clusters for command in cluster.commands]
    if commands:
        parts += ["## Commands", "\n".join(f"- {each}" for each in commands[:30])]
    links = [link(label, url) for label, url in result.links.items()]
    if links:
        parts.append(" · ".join(links))
    return "\n\n".join(parts) + "\n"


def app_words(result: ReleaseResult) -> str:
    """Return the app as markdown, such as `qapm (3290)`."""
    app_id = markdown(result.app_id)
    return f"{markdown(result.app)} ({app_id})" if result.app else app_id


def _cloud(of: ReleaseResult | ReleasePlan) -> str:
    return markdown(cloud_words(of.cloud, of.target), 400)


def render_plan(plan: ReleasePlan) -> str:
    """Return the changes of a plan: clusters, images, and other changes of the pod template."""
    parts = [f"**{NOTHING}**"] if plan.nothing else []
    clusters = [
        (markdown(each.cluster), markdown(template_words(plan, each)), markdown(pods_words(each)))
        for each in plan.clusters
    ]
    parts += ["## Clusters", table(("Cluster", "Template", "Pods"), clusters)]
    if where := _cloud(plan):
        parts.append(f"Cloud: {where}")
    # A list: the approval form truncates table cells.
    notes = [(each.cluster, note) for each in plan.clusters for note in each.notes]
    if notes:
        parts.append("\n".join(f"- {markdown(cluster)}: {markdown(note)}" for cluster, note in notes))
    parts.append(f"Strategy: {markdown(strategy_words(plan))}")
    parts.append(f"Procedure: {markdown(procedure_words(plan))}")
    for names, each in _alike(plan):
        where = f" in {names}" if len(plan.clusters) > 1 else ""
        images = list(_image_lines(each))
        if images:
            parts += [f"## Images{where}", "\n".join(images)]
            parts += _registry(plan.checked)
        changes = [(markdown(change.path), markdown(change_words(change))) for change in each.changes or []]
        others = others_words(each)
        if changes or others:
            parts.append(f"## Other changes of the pod template{where}")
        if changes:
            parts.append(table(("Where", "What"), changes))
        if others:
            parts.append(f"{others[0].upper()}{others[1:]}.")
    if plan.action is Action.RESTART:
        parts.append(RESTARTED)
    if choice := notes_of(plan):
        parts += ["## Choice of template and images", render_notes(choice)]
    parts.append(f"Plan hash: `{plan.plan_hash}`")
    return "\n\n".join(parts)


def render_notes(notes: Sequence[str]) -> str:
    """Return the notes of a plan or result as a list."""
    return "\n".join(f"- {markdown(note, 400)}" for note in notes)


def _registry(checked: Sequence[CheckedImage]) -> Iterable[str]:
    """Yield a table of the images as their registries have them, if any was read."""
    head = ("In the registry", "Built", "Age", "Size", "Platform", "Digest")
    rows = [
        (
            markdown(each.container),
            f"{each.created:%Y-%m-%d}" if each.created else "unknown",
            each.age or "unknown",
            each.megabytes,
            markdown(each.platform),
            markdown(each.digest),
        )
        for each in checked
        if each.digest
    ]
    if rows:
        yield table(head, rows)


def _image_lines(each: ClusterPlan) -> Iterable[str]:
    # A list: the approval form truncates tags in a table.
    for container, before, after in image_rows(each):
        if before == after:
            yield f"- **{markdown(container)}** stays {markdown(after, 2000)}"
        else:
            yield f"- **{markdown(container)}** before: {markdown(before, 2000)}"
            yield f"- **{markdown(container)}** after: {markdown(after, 2000)}"


def _alike(plan: ReleasePlan) -> Iterable[tuple[str, ClusterPlan]]:
    """Yield each distinct set of differences once, with the names of its clusters."""
    groups: dict[str, list[ClusterPlan]] = {}
    for each in plan.clusters:
        same = each.model_dump_json(include={"images", "images_before", "changes", "more"})
        groups.setdefault(same, []).append(each)
    for group in groups.values():
        yield ", ".join(markdown(each.cluster, 80) for each in group), group[0]


def _how_to_apply(plan: ReleasePlan) -> str:
    return (
        f"Nothing was written. To do exactly this, start it again with `expect_plan={plan.plan_hash}` and "
        f"without `dry_run`; on the command line with `--expect-plan {plan.plan_hash}`. The release is "
        "refused if any of this has changed in the meantime."
    )


def _error(result: ReleaseResult) -> list[str]:
    """Return the error as a quote: problem, diagnosis, and the next action."""
    if not result.error:
        return []
    error = result.error
    diagnosis = Diagnosis.model_validate(error["diagnosis"])
    step = f"**{markdown(error.get('step') or 'release')}:** "
    quote = [f"{step}{markdown(error.get('message', ''), 2000)}"]
    if diagnosis.pod or diagnosis.reported:
        quote.append(f"**Diagnosis:** {markdown(diagnosis, 1000)}")
    quote += [f"- {markdown(event)}" for event in diagnosis.events]
    quote += [f"- Output: {markdown(line)}" for line in diagnosis.log_lines]
    quote += [f"- See more: {_code(command)}" for command in diagnosis.commands]
    if cause := error.get("cause"):
        earlier = Diagnosis.model_validate(cause["diagnosis"])
        quote.append(f"**The release failed first:** {markdown(earlier, 1000)}")
        quote += [f"- {markdown(event)}" for event in earlier.events]
    todo = f"{error.get('advice', '')} {error.get('next_step', '')}"
    quote.append(f"**What to do:** {markdown(todo, 1000)}")
    if result.live and error.get("live"):
        seen = error.get("live_at")
        at = when(datetime.fromisoformat(seen) if seen else None)
        quote.append(f"**Live at {at}:** {markdown(error['live'], 2000)}")
    return ["> " + "\n>\n> ".join(quote)]


def _code(command: str) -> str:
    return f"`{one_line(command, 500).replace('`', '')}`"


def _template(result: ReleaseResult) -> str:
    base = "" if result.base_template_id is None else markdown(result.base_template_id)
    if result.template_id is None:
        return f"none created (base {base})" if base else ""
    return f"{markdown(result.template_id)}, made from {base}" if base else markdown(result.template_id)


def _approval(result: ReleaseResult) -> str:
    comment = f": {markdown(result.approval_comment, 1000)}" if result.approval_comment else ""
    return f"{markdown(result.approved_by)}{comment}" if result.approved_by else ""


def _evidence(result: ReleaseResult) -> str:
    if result.outcome is not Outcome.RELEASED:
        return ""
    if result.evidence == "strong":
        return "strong: the platform's own revisions agree"
    return "weak: the platform reports only pod names and states; they were the same in two polls"


_WRITTEN = {True: "yes", False: "no", None: "unknown"}


def _cluster(cluster: ClusterResult) -> Sequence[str]:
    return (
        markdown(cluster.cluster),
        _id(cluster.template_before, cluster.object_before),
        _id(cluster.template, cluster.object),
        _WRITTEN[cluster.published] + BACK[cluster.rolled_back],
        f"{number(cluster.ready)} / {number(cluster.wanted)}",
        _live(cluster),
    )


def _live(cluster: ClusterResult) -> str:
    if not cluster.online_known:
        return "not looked at" if cluster.published is False else "unknown"
    online = "nothing" if cluster.online is None else markdown(cluster.online)
    return f"{online}, {number(cluster.running)} Running"


def _id(template_id: int | str | None, held_by: str = "") -> str:
    shown = "none or unknown" if template_id is None else markdown(template_id)
    return f"{shown}, {markdown(held_by)}" if held_by else shown


def _images(result: ReleaseResult) -> Iterable[Sequence[str]]:
    # Two rows, because before and after side by side are wider than the page.
    for container, image in result.images.items():
        before = {(cluster.images_before or {}).get(container, "unknown") for cluster in result.clusters}
        yield markdown(container), "before", ", ".join(map(markdown, sorted(before)))
        yield "", "after", markdown(image)
