"""What a release would change, cluster by cluster, and the hash that stands for it. Pure.

A pod template holds secrets: in environment values, arguments, commands, annotations, and wherever its
author put them. So a value is shown only at the places that `_PODS` names: images, numbers, amounts and
words of Kubernetes' own. Of all else, no more than that it changed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect_rollout.errors import PlanChangedError
from prefect_rollout.models import (
    Action,
    Change,
    Difference,
    Id,
    Procedure,
    ReleasePlan,
    Strategy,
    Template,
    Version,
    cloud_words,
    same_or_none,
    template_name,
)
from prefect_rollout.revisions import shortened, unknown_words
from prefect_rollout.text import one_line

_BY_DEFAULT = Procedure()

SHOWN_CHANGES = 100
"""How many changes of a cluster are listed; the rest is counted."""


@dataclass(frozen=True)
class Found:
    """What one cluster has, and what it is to get.

    Attributes:
        online: the template that is online, if any.
        before: the same with its text; `None` where it cannot be read.
        after: the template to publish, or to make the new one from.
        images: the images to come, `{container: image}`.
        pods: pods that are listed; `None` where that is unknown.
        replicas: replicas wanted.
        desired: pods that the platform was asked for before, where it reports that.
        assumed: whether `replicas` replaces a number that the platform does not report.
        note: what a person has to know of the replicas, as a clause.
    """

    cluster: str
    online: Id | None
    before: Template | None
    after: Template
    images: Mapping[str, str]
    pods: int | None
    replicas: int
    desired: int | None = None
    assumed: bool = False
    note: str = ""


def release_plan(
    action: Action,
    clusters: Sequence[Found],
    *,
    platform: str,
    cloud: str = "",
    target: str = "",
    app_id: Id,
    deployment_id: Id,
    deployment: str,
    base: Id | None,
    strategy: Strategy | None,
    in_place: bool,
    procedure: Procedure = _BY_DEFAULT,
    notes: Sequence[str] = (),
    unknown: Sequence[Id] = (),
) -> ReleasePlan:
    """The plan of a release, with its hash.

    The hash covers whatever decides what is written, and nothing that changes by itself such as pods.

    Args:
        action: what is to be done.
        clusters: what was found, cluster by cluster.
        platform: `Platform.identity`.
        cloud: the platform's address, to be shown.
        target: the block that it was reached through, to be shown.
        app_id: the app's id.
        deployment_id: the deployment's id.
        deployment: its name.
        base: the template that a new one is made from; `None` where none is made.
        strategy: how old pods give way, by the metaData.
        in_place: whether pods keep their names.
        procedure: in which order it writes, and what follows a failure.
        notes: templates that were skipped, and why.
        unknown: chosen templates of which no release is on record.

    Raises:
        UnreadableTemplateError: a template to come is not a Deployment.
    """
    facts = {
        "action": action.value,
        "platform": platform,
        "app": str(app_id),
        "deployment": str(deployment_id),
        "strategy": strategy and strategy.model_dump(mode="json"),
        "in_place": in_place,
        "procedure": procedure.model_dump(mode="json"),
        # One after the other, their order decides which are written at all where one fails.
        "sequence": [each.cluster for each in clusters] if procedure.order == "one-by-one" else None,
        "notes": list(notes),
        "clusters": sorted(
            (
                {
                    "cluster": each.cluster,
                    "online": None if each.online is None else str(each.online),
                    "before": each.before and _content(each.before.version),
                    "template": str(each.after.id),
                    "after": _content(each.after.version),
                    "images": dict(each.images),
                    # One that is assumed goes by the pods that happen to be listed, and is not written.
                    "replicas": None if each.assumed else each.replicas,
                }
                for each in clusters
            ),
            key=lambda each: str(each["cluster"]),
        ),
    }
    return ReleasePlan(
        action=action,
        plan_hash=hashlib.sha256(_canonical(facts)).hexdigest()[:16],
        cloud=cloud,
        target=target,
        app_id=app_id,
        deployment=deployment,
        base_template_id=base,
        strategy=strategy,
        in_place=in_place,
        procedure=procedure,
        notes=list(notes),
        unknown=list(unknown),
        clusters=[_difference(each, action, new=base is not None, in_place=in_place) for each in clusters],
    )


def _content(version: Version) -> list[Any]:
    return [version.digest, version.images]


def _difference(found: Found, action: Action, *, new: bool, in_place: bool) -> Difference:
    changes: list[Change] | None = None
    if found.before is not None:
        changes = differences(found.before.pods, found.after.pods)
    elif found.online is None:
        changes = []  # nothing is online: all is new
    images_before = found.before.version.images if found.before else None
    stays = action is Action.SCALE or (changes == [] and images_before == dict(found.images))
    replaced = action is Action.RESTART or not stays
    unseen = found.pods is None and found.online is not None and replaced and not in_place
    return Difference(
        cluster=found.cluster,
        template_before=found.online,
        template=None if new else found.after.id,
        images_before=images_before,
        images=dict(found.images),
        pods=found.pods,
        replicas=found.replicas,
        desired=found.desired,
        assumed=found.assumed,
        notes=[note for note in (found.note, UNSEEN if unseen else "") if note],
        changes=changes and changes[:SHOWN_CHANGES],
        more=max(0, len(changes or []) - SHOWN_CHANGES),
    )


def hold_to(plan: ReleasePlan, expected: str) -> None:
    """Returns where the plan has the hash expected, or none is expected.

    Raises:
        PlanChangedError: it has another.
    """
    if expected and plan.plan_hash != expected:
        raise PlanChangedError(
            f"this is not what the plan {expected} was: the plan is {plan.plan_hash} now, {summary(plan)}",
            plan_hash=plan.plan_hash,
            expect_plan=expected,
        )


def hold_choice(plan: ReleasePlan, choice: Mapping[str, tuple[Id, Mapping[str, str], int]]) -> None:
    """Returns where a run is about to do what the plan says.

    A run reads some of it before it has its lock, or in an earlier try.

    Args:
        plan: what was read last.
        choice: what the run goes by, `{cluster: (template or base, images, replicas)}`.

    Raises:
        PlanChangedError: it goes by something else.
    """
    planned = {
        each.cluster: (
            str(plan.base_template_id if each.template is None else each.template),
            each.images,
            None if each.assumed else each.replicas,
        )
        for each in plan.clusters
    }
    assumed = {each.cluster for each in plan.clusters if each.assumed}
    mine = {
        cluster: (str(template), dict(images), None if cluster in assumed else count)
        for cluster, (template, images, count) in choice.items()
    }
    if planned != mine:
        raise PlanChangedError(
            f"the deployment or its templates changed while this run was under way: the plan is "
            f"{plan.plan_hash} now, {summary(plan)}",
            advice="Look at a dry run, and start a new release; nothing was written.",
            plan_hash=plan.plan_hash,
        )


def hold_online(plan: ReleasePlan, online: Mapping[str, Id | None]) -> None:
    """Returns where what stands before the writes, `{cluster: template}`, is what the plan began from.

    Raises:
        PlanChangedError: something else was published since.
    """
    for each in plan.clusters:
        if each.cluster in online and not same_or_none(online[each.cluster], each.template_before):
            raise PlanChangedError(
                f"{template_name(online[each.cluster])} is online in {one_line(each.cluster, 80)}, and "
                f"{template_name(each.template_before)} was when the plan {plan.plan_hash} was checked",
                advice="Make a dry run again, and look at what it shows; nothing was published.",
                plan_hash=plan.plan_hash,
                cluster=each.cluster,
            )


# ---- in words -----------------------------------------------------------------------------------
# As plain text: whoever shows it makes it safe by `text.one_line` or `text.markdown`.

NOTHING = "Nothing would change: every cluster has these images and settings, with the replicas wanted."


UNSEEN = "its pods are not reported now: new and old pods cannot be told apart by their names"


RESTARTED = "Every pod would be replaced by a new one of the same template."


def template_words(plan: ReleasePlan, each: Difference) -> str:
    """Such as `1343102 → new, from 1343169`."""
    before = "nothing online" if each.template_before is None else str(each.template_before)
    if each.template is not None and same_or_none(each.template, each.template_before):
        return f"{before} stays"
    return f"{before} → {f'new, from {plan.base_template_id}' if each.template is None else each.template}"


def pods_words(each: Difference) -> str:
    """Such as `2 → 3`, of the pods listed now and the replicas wanted."""
    return f"{'unknown' if each.pods is None else each.pods} → {each.replicas}"


def strategy_words(plan: ReleasePlan) -> str:
    """Such as `RollingUpdate, maxUnavailable 25%, maxSurge 25%`."""
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
    return ", ".join(part for part in parts if part) or "the cloud's own"


def procedure_words(plan: ReleasePlan) -> str:
    """Such as `canary c2 first, then all other clusters at once; on failure: rollback; no approval`."""
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
        approval[how.approval] if how.approval else "",
    ]
    return "; ".join(part for part in parts if part)


def image_rows(each: Difference) -> list[tuple[str, str, str]]:
    """`(container, before, after)` of every container that has an image, or had one."""
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


def change_words(change: Change) -> str:
    """Such as `1 → 2`, `added: 8080`, `removed` or `value changed, not shown`."""
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


def others_words(each: Difference) -> str:
    """What there is to say of the changes that are not listed; empty for nothing."""
    if each.changes is None:
        return "the template that is online cannot be read: what else changes is not known"
    return f"… and {each.more} more" if each.more else ""


def plan_lines(plan: ReleasePlan) -> list[str]:
    """The plan for a terminal, line by line and safe for it."""
    where = cloud_words(plan.cloud, plan.target)
    of = f"{one_line(plan.deployment, 120)}{where and f' on {one_line(where, 400)}'}"
    lines = [f"Plan of {of}, by {one_line(strategy_words(plan), 120)}:"]
    for each in plan.clusters:
        lines.append(
            f"  {one_line(each.cluster, 80)}: template {one_line(template_words(plan, each), 120)}; "
            f"pods {pods_words(each)}"
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
    lines.append(f"  {one_line(procedure_words(plan))}")
    if plan.nothing:
        lines.append(NOTHING)
    if plan.action is Action.RESTART:
        lines.append(RESTARTED)
    lines += notes_of(plan)
    return [*lines, f"Plan hash: {plan.plan_hash}"]


def notes_of(plan: ReleasePlan) -> list[str]:
    """Return the sentences about the choice of the templates; safe for a terminal."""
    unknown = unknown_words(plan.unknown)
    return [*(f"{one_line(note, 400)}." for note in plan.notes), *([unknown] if unknown else [])]


def summary(plan: ReleasePlan, limit: int = 5) -> str:
    """The plan as a clause of a sentence, of the first `limit` clusters; safe for a log."""
    notes = [shortened(plan.notes)] if plan.notes else []
    if plan.nothing:
        return "; ".join([one_line(NOTHING[0].lower() + NOTHING[1:].rstrip(".")), *notes])
    told = [_in_short(plan, each) for each in plan.clusters[:limit]]
    if len(plan.clusters) > limit:
        told.append(f"and {len(plan.clusters) - limit} clusters more")
    return "; ".join([*told, *notes])


def _in_short(plan: ReleasePlan, each: Difference) -> str:
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


# ---- what differs between two pod templates -----------------------------------------------------

Leaf = Callable[[Any], str | None]
"""A value as text to show, or `None` where it does not look like what belongs there."""


def _like(pattern: str) -> Leaf:
    matches = re.compile(pattern, re.ASCII).fullmatch

    def shown(value: Any) -> str | None:
        return value if isinstance(value, str) and matches(value) else None

    return shown


def _hidden(_value: Any) -> None:
    return None


def _number(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) and abs(value) < 10**12 else None


def _either(*leaves: Leaf) -> Leaf:
    return lambda value: next((text for leaf in leaves if (text := leaf(value)) is not None), None)


@dataclass(frozen=True)
class _Named:
    """A list whose entries are identified by one of their fields, in any order.

    `shown` says whether that field names the entry in a path; else its place in the list does.
    """

    key: str
    entry: "_Shape"
    shown: bool = True


@dataclass(frozen=True)
class _Each:
    """A mapping of free keys that are names themselves, such as labels."""

    value: Leaf


_Shape = Leaf | _Named | _Each | dict[str, Any]

_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?"
_KEY = re.compile(rf"([a-z0-9.-]{{1,253}}/)?{_NAME}", re.ASCII).fullmatch
_ENTRY = re.compile(r"[A-Za-z0-9_./-]{1,253}", re.ASCII).fullmatch
# What Kubernetes allows in the fields that take one of a few words.
_word = _like(
    "Always|IfNotPresent|Never|OnFailure|HTTP|HTTPS|TCP|UDP|SCTP|Memory|HugePages|None|HostToContainer|"
    "Bidirectional|Disabled|IfPossible|Enabled|File|FallbackToLogsOnError|Directory|DirectoryOrCreate|"
    "FileOrCreate|Socket|CharDevice|BlockDevice|ClusterFirst|ClusterFirstWithHostNet|Default|"
    "PreemptLowerPriority"
)
_quantity = _either(_number, _like(r"[0-9.]{1,20}([numkKMGTPE]|[KMGTPE]i)?"))
_image = _like(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,500}(@sha256:[0-9a-f]{64})?")

_PROBE = {
    "httpGet": {"path": _hidden, "port": _number, "scheme": _word, "host": _hidden, "httpHeaders": _hidden},
    "tcpSocket": {"port": _number, "host": _hidden},
    "grpc": {"port": _number, "service": _hidden},
    "exec": _hidden,
    "initialDelaySeconds": _number,
    "periodSeconds": _number,
    "timeoutSeconds": _number,
    "successThreshold": _number,
    "failureThreshold": _number,
    "terminationGracePeriodSeconds": _number,
}
_AMOUNTS = {"limits": _Each(_quantity), "requests": _Each(_quantity), "claims": _hidden}
_CONTAINER = {
    "name": _hidden,
    "image": _image,
    "imagePullPolicy": _word,
    "ports": _Named(
        "containerPort",
        {
            "name": _hidden,
            "containerPort": _number,
            "hostPort": _number,
            "hostIP": _hidden,
            "protocol": _word,
        },
    ),
    "resources": _AMOUNTS,
    "livenessProbe": _PROBE,
    "readinessProbe": _PROBE,
    "startupProbe": _PROBE,
    "env": _Named("name", {"name": _hidden, "value": _hidden, "valueFrom": _hidden}),
    "volumeMounts": _Named(
        "mountPath",
        {
            "name": _hidden,
            "mountPath": _hidden,
            "readOnly": _number,
            "subPath": _hidden,
            "subPathExpr": _hidden,
            "mountPropagation": _word,
            "recursiveReadOnly": _word,
        },
        shown=False,
    ),
    "terminationMessagePolicy": _word,
    "restartPolicy": _word,
    **dict.fromkeys(
        (
            *("command", "args", "workingDir", "envFrom", "lifecycle", "resizePolicy", "securityContext"),
            *("stdin", "stdinOnce", "terminationMessagePath", "tty", "volumeDevices"),
        ),
        _hidden,
    ),
}
_VOLUME = {
    "name": _hidden,
    "emptyDir": {"medium": _word, "sizeLimit": _quantity},
    "hostPath": {"path": _hidden, "type": _word},
    "configMap": {"name": _hidden, "items": _hidden, "defaultMode": _number, "optional": _hidden},
    "secret": {"secretName": _hidden, "items": _hidden, "defaultMode": _number, "optional": _hidden},
    "persistentVolumeClaim": {"claimName": _hidden, "readOnly": _number},
}
_PODS: dict[str, Any] = {
    "metadata": {
        "name": _hidden,
        "namespace": _hidden,
        "labels": _Each(_hidden),
        "annotations": _Each(_hidden),
        "creationTimestamp": _hidden,
    },
    "spec": {
        "containers": _Named("name", _CONTAINER),
        "initContainers": _Named("name", _CONTAINER),
        "volumes": _Named("name", _VOLUME),
        "nodeSelector": _Each(_hidden),
        "imagePullSecrets": _Named("name", {"name": _hidden}),
        "terminationGracePeriodSeconds": _number,
        "activeDeadlineSeconds": _number,
        "priority": _number,
        "minReadySeconds": _number,
        "restartPolicy": _word,
        "dnsPolicy": _word,
        "preemptionPolicy": _word,
        "serviceAccountName": _hidden,
        "serviceAccount": _hidden,
        "schedulerName": _hidden,
        "priorityClassName": _hidden,
        "runtimeClassName": _hidden,
        "nodeName": _hidden,
        "hostNetwork": _number,
        "hostPID": _number,
        "hostIPC": _number,
        "shareProcessNamespace": _number,
        "automountServiceAccountToken": _number,
        **dict.fromkeys(
            (
                *("affinity", "dnsConfig", "ephemeralContainers", "hostAliases", "hostname", "hostUsers"),
                *("enableServiceLinks", "os", "overhead", "readinessGates", "resourceClaims", "resources"),
                *("schedulingGates", "securityContext", "setHostnameAsFQDN", "subdomain", "tolerations"),
                "topologySpreadConstraints",
            ),
            _hidden,
        ),
    },
}
"""The fields of a pod template that are named, and what is shown of their values."""


class _Missing:
    """What stands where there is no value; JSON's null is one."""


_MISSING = _Missing()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What differs between two pod templates, as JSON objects; empty where they are the same.

    Entries of lists are matched by name. Neither a value that might be a secret nor a key that nobody
    knows stands in what is returned.
    """
    return list(_walk("", _PODS, before, after))


def _walk(path: str, shape: _Shape, before: Any, after: Any) -> Iterator[Change]:
    if _same(before, after):
        return
    if isinstance(shape, _Named):
        one, other = _entries(before, shape.key), _entries(after, shape.key)
        if (one or other) and one is not None and other is not None:
            yield from _walk_entries(path, shape, one, other)
            return
    elif isinstance(shape, dict | _Each):
        one, other = _fields(before), _fields(after)
        if (one or other) and one is not None and other is not None:
            yield from _walk_fields(path, shape, one, other)
            return
    yield _change(path, shape if callable(shape) else _hidden, before, after)


def _walk_entries(
    path: str, shape: _Named, before: dict[str, Any], after: dict[str, Any]
) -> Iterator[Change]:
    places = {name: str(place) for known in (before, after) for place, name in enumerate(known)}
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name, _MISSING), after.get(name, _MISSING)
        where = f"{path}[{name if shape.shown else places[name]}]"
        if one is _MISSING or other is _MISSING:
            yield _change(where, _hidden, one, other)
        else:
            yield from _walk(where, shape.entry, one, other)
    if [name for name in before if name in after] != [name for name in after if name in before]:
        yield Change(path=path, what="reordered")


def _walk_fields(
    path: str, shape: dict[str, Any] | _Each, before: dict[str, Any], after: dict[str, Any]
) -> Iterator[Change]:
    unnamed = False
    for key in dict.fromkeys([*before, *after]):
        one, other = before.get(key, _MISSING), after.get(key, _MISSING)
        if isinstance(shape, _Each) and _KEY(key):
            yield from _walk(f"{path}[{key}]", shape.value, one, other)
        elif isinstance(shape, dict) and key in shape:
            yield from _walk(f"{path}.{key}".lstrip("."), shape[key], one, other)
        else:
            unnamed = unnamed or not _same(one, other)
    if unnamed:
        yield Change(path=f"{path}.(another field)".lstrip("."), what="changed")


def _change(path: str, leaf: Leaf, before: Any, after: Any) -> Change:
    what = "added" if before is _MISSING else "removed" if after is _MISSING else "changed"
    return Change.model_validate(
        {"path": path or "pod template", "what": what, "before": leaf(before), "after": leaf(after)}
    )


def _fields(value: Any) -> dict[str, Any] | None:
    """The object's fields, none where there is no object; `None` where it is something else."""
    if value is _MISSING:
        return {}
    return value if isinstance(value, dict) else None


def _entries(value: Any, key: str) -> dict[str, Any] | None:
    """The list's entries by name, none where there is no list; `None` where not all are told apart."""
    if value is _MISSING:
        return {}
    if not isinstance(value, list):
        return None
    keys = [entry.get(key) if isinstance(entry, dict) else None for entry in value]
    names = [str(name) if isinstance(name, str | int) else "" for name in keys]
    if len(set(names)) != len(names) or not all(_ENTRY(name) for name in names):
        return None
    return dict(zip(names, value, strict=True))


def _same(one: Any, other: Any) -> bool:
    if one is _MISSING or other is _MISSING:
        return one is other
    return _canonical(one) == _canonical(other)  # 1, 1.0 and true are equal in Python


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
