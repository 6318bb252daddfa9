"""A plan as plain text. Callers make it safe with `text.one_line` or `text.markdown`."""

from prefect_rollout.ids import same_or_none
from prefect_rollout.release.image_facts import image_notes, image_warnings
from prefect_rollout.release.plan import ClusterPlan, ReleasePlan
from prefect_rollout.release.pod_diff import FieldChange
from prefect_rollout.release.replicas import NOT_CHANGED
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import cloud_words
from prefect_rollout.release.revisions import shortened, unknown_words
from prefect_rollout.text import one_line

NOTHING = "Nothing would change: every cluster has these images, settings and replicas."
RESTARTED = "Every pod would be replaced by a new one of the same template."


def template_words(plan: ReleasePlan, each: ClusterPlan) -> str:
    """Return the change of templates, such as `1343102 → new, from 1343169`."""
    before = "nothing online" if each.template_before is None else str(each.template_before)
    if each.template is not None and same_or_none(each.template, each.template_before):
        return f"{before} stays"
    base = plan.base_template_id if each.base_template_id is None else each.base_template_id
    return f"{before} → {f'new, from {base}' if each.template is None else each.template}"


def pods_words(each: ClusterPlan) -> str:
    """Return the listed pods and the desired replicas, such as `2 → 3` or `2, replicas not changed`."""
    listed = "unknown" if each.pods is None else each.pods
    return f"{listed}, {NOT_CHANGED}" if each.replicas is None else f"{listed} → {each.replicas}"


def strategy_words(plan: ReleasePlan) -> str:
    """Return the strategy, such as `RollingUpdate, maxUnavailable 25%, maxSurge 25%`."""
    strategy = plan.strategy
    parts = [strategy.type or ""] if strategy else []
    if strategy and strategy.rolling_update:
        bounds = strategy.rolling_update
        parts += [
            f"{name} {bound}"
            for name, bound in (
                ("maxUnavailable", bounds.max_unavailable),
                ("maxSurge", bounds.max_surge),
            )
            if bound is not None
        ]
    parts.append("in place" if plan.in_place else "")
    return ", ".join(part for part in parts if part) or "the platform's own"


def procedure_words(plan: ReleasePlan) -> str:
    """Return the procedure: `canary c2 first, then all other clusters at once; on failure: rollback`."""
    how = plan.procedure
    order = "one cluster after the other" if how.order == "one-by-one" else "all clusters at once"
    if how.canary is not None:
        rest = "one cluster after the other" if how.order == "one-by-one" else "all other clusters at once"
        order = f"canary {how.canary} first, then {rest}"
    approval = {"none": "no approval", "before-release": "only after a person's approval"}
    parts = [
        order,
        f"{how.pause_seconds:g} s between clusters" if how.pause_seconds else "",
        f"on failure: {how.on_failure}" if how.on_failure else "",
        "pods that block their replacement are deleted" if how.unblock else "",
        approval[how.approval] if how.approval else "",
    ]
    return "; ".join(part for part in parts if part)


def image_rows(each: ClusterPlan) -> list[tuple[str, str, str]]:
    """Return `(container, before, after)` of every container that has or had an image."""
    names = list(dict.fromkeys([*each.images, *(each.images_before or {})]))
    known = each.images_before
    absent = "nothing online" if each.template_before is None else "unknown"
    return [
        (
            name,
            absent if known is None else known.get(name, "no such container"),
            each.images.get(name, "removed"),
        )
        for name in names
    ]


def change_words(change: FieldChange) -> str:
    """Return a change, such as `1 → 2`, `added: 8080`, `removed` or `value changed, not shown`."""
    if change.what == "reordered":
        return "order changed"
    if change.what == "changed":
        if change.before is None and change.after is None:
            return "value changed, not shown"
        hidden = "(not shown)"
        return f"{hidden if change.before is None else change.before} → " + (
            hidden if change.after is None else change.after
        )
    value = change.before if change.what == "removed" else change.after
    return change.what if value is None else f"{change.what}: {value}"


def others_words(each: ClusterPlan) -> str:
    """Return a line about the changes that are not listed; empty if all are listed."""
    if each.changes is None:
        return "what else changes in the pod template is not known"
    return f"… and {each.more} more" if each.more else ""


def plan_lines(plan: ReleasePlan) -> list[str]:
    """Return the plan for a terminal, line by line, safe to print."""
    where = cloud_words(plan.cloud, plan.target)
    of = f"{one_line(plan.deployment, 120)}{where and f' on {one_line(where, 400)}'}"
    lines = [f"Plan of {of}, by {one_line(strategy_words(plan), 120)}:"]
    for each in [] if plan.nothing else plan.clusters:  # a dry run says one thing
        lines.append(
            f"  {one_line(each.cluster, 80)}: template {one_line(template_words(plan, each), 120)}; "
            f"pods {pods_words(each)}{_effect(plan, each)}"
        )
        lines += [f"    {one_line(note)}" for note in each.notes]
        lines += [
            f"    image {one_line(container, 80)}: "
            + (f"stays {one_line(after)}" if before == after else f"{one_line(before)} → {one_line(after)}")
            for container, before, after in image_rows(each)
        ]
        lines += [
            f"    {one_line(change.path)}: {one_line(change_words(change))}" for change in each.changes or []
        ]
        if others := others_words(each):
            lines.append(f"    {others}")
    lines += [f"  in the registry: {words}" for words in _digests(plan)]
    lines.append(f"  {one_line(procedure_words(plan))}")
    if plan.nothing:
        lines.append(NOTHING)
    if plan.action is Action.RESTART:
        lines.append(RESTARTED)
    lines += notes_of(plan)
    return [*lines, f"Plan hash: {plan.plan_hash}"]


def _digests(plan: ReleasePlan) -> list[str]:
    return [f"{one_line(each.container, 80)} is {each}" for each in plan.checked if each.digest]


def _effect(plan: ReleasePlan, each: ClusterPlan) -> str:
    """Return the effect on the running pods as a clause; empty if it is not known, or said elsewhere."""
    known = each.changes is not None and each.images_before is not None
    if plan.action in {Action.RESTART, Action.SCALE} or not known:
        return ""
    if each.images != each.images_before:
        return "; pods are replaced"
    return "; image unchanged, pods restart" if each.changes or each.more else "; running pods stay"


def notes_of(plan: ReleasePlan) -> list[str]:
    """Return the sentences about the choice of templates and images, safe to print."""
    unknown = unknown_words(plan.unknown)
    images = (f"{note[0].upper()}{note[1:].rstrip('.')}." for note in image_notes(plan.checked))
    return [*(f"{one_line(note, 400)}." for note in plan.notes), *([unknown] if unknown else []), *images]


def summary(plan: ReleasePlan, limit: int = 5) -> str:
    """Return the plan of the first `limit` clusters as a clause, safe for a log."""
    notes = [shortened(plan.notes)] if plan.notes else []
    notes += [*_digests(plan), *image_warnings(plan.checked)]
    if plan.nothing:
        return "; ".join([one_line(NOTHING[0].lower() + NOTHING[1:].rstrip(".")), *notes])
    parts = [_in_short(plan, each) for each in plan.clusters[:limit]]
    if len(plan.clusters) > limit:
        parts.append(f"and {len(plan.clusters) - limit} clusters more")
    return "; ".join([*parts, *notes])


def _in_short(plan: ReleasePlan, each: ClusterPlan) -> str:
    images = {after for _, before, after in image_rows(each) if before != after}
    count = len(each.changes or []) + each.more
    parts = [
        f"template {one_line(template_words(plan, each), 90)}",
        one_line(", ".join(sorted(images)), 160),
        f"pods {pods_words(each)}",
        *(one_line(note) for note in each.notes),
        f"{count} {'change' if count == 1 else 'changes'} of the pod template" if count else "",
    ]
    if plan.action is Action.RESTART:
        parts.append("every pod is replaced")
    return f"{one_line(each.cluster, 60)}: {', '.join(part for part in parts if part)}"
