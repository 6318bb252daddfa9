"""The differences between two pod templates, without their secrets. Pure.

A pod template can contain secrets in environment values, arguments, commands, annotations and other fields.
Therefore values are shown only for the fields in `_PODS`: images, numbers, quantities and keywords of
Kubernetes. For other fields, only the fact that they changed is shown.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from prefect_rollout.release.workload import digest


class FieldChange(BaseModel):
    """One difference between two pod templates. A value that might be a secret is never kept.

    Attributes:
        path: the place in the pod template, such as `spec.containers[web].resources.limits.cpu`.
        what: the kind of change; `reordered` is a list whose named entries changed their order.
        before: the value as text; `None` if there was none or it is not shown.
        after: the new value as text; `None` likewise.
    """

    path: str
    what: Literal["added", "removed", "changed", "reordered"]
    before: str | None = None
    after: str | None = None


Leaf = Callable[[Any], str | None]
"""Return a value as text, or `None` if it does not look like a value of that field."""


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

    Paths name an entry by that field if `shown`, else by its position in the list.
    """

    key: str
    entry: "_Shape"
    shown: bool = True


@dataclass(frozen=True)
class _Each:
    """A mapping with arbitrary names as keys, such as labels."""

    value: Leaf


_Shape = Leaf | _Named | _Each | dict[str, Any]

_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?"
_KEY = re.compile(rf"([a-z0-9.-]{{1,253}}/)?{_NAME}", re.ASCII).fullmatch
_ENTRY = re.compile(r"[A-Za-z0-9_./-]{1,253}", re.ASCII).fullmatch
# Values that Kubernetes allows in fields with a fixed set of words.
_word = _like(
    "Always|IfNotPresent|Never|OnFailure|HTTP|HTTPS|TCP|UDP|SCTP|Memory|HugePages|None|HostToContainer|"
    "Bidirectional|Disabled|IfPossible|Enabled|File|FallbackToLogsOnError|Directory|DirectoryOrCreate|"
    "FileOrCreate|Socket|CharDevice|BlockDevice|ClusterFirst|ClusterFirstWithHostNet|Default|"
    "PreemptLowerPriority"
)
_quantity = _either(_number, _like(r"[0-9.]{1,20}([numkKMGTPE]|[KMGTPE]i)?"))
_image = _like(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,500}(@sha256:[0-9a-f]{64})?")


def _all(leaf: Leaf, fields: str) -> dict[str, _Shape]:
    return dict.fromkeys(fields.split(), leaf)


_AMOUNTS: dict[str, _Shape] = {
    "limits": _Each(_quantity),
    "requests": _Each(_quantity),
    "claims": _hidden,
}
_PROBE: dict[str, _Shape] = {
    "httpGet": {"port": _number, "scheme": _word, **_all(_hidden, "path host httpHeaders")},
    "tcpSocket": {"port": _number, "host": _hidden},
    "grpc": {"port": _number, "service": _hidden},
    "exec": _hidden,
    **_all(_number, "initialDelaySeconds periodSeconds timeoutSeconds successThreshold failureThreshold"),
    "terminationGracePeriodSeconds": _number,
}
_PORT = {**_all(_number, "containerPort hostPort"), "protocol": _word, **_all(_hidden, "name hostIP")}
_MOUNT = {
    **_all(_hidden, "name mountPath subPath subPathExpr"),
    **_all(_word, "mountPropagation recursiveReadOnly"),
    "readOnly": _number,
}
_CONTAINER: dict[str, _Shape] = {
    "image": _image,
    "ports": _Named("containerPort", _PORT),
    "resources": _AMOUNTS,
    "livenessProbe": _PROBE,
    "readinessProbe": _PROBE,
    "startupProbe": _PROBE,
    "env": _Named("name", _all(_hidden, "name value valueFrom")),
    "volumeMounts": _Named("mountPath", _MOUNT, shown=False),
    **_all(_word, "imagePullPolicy terminationMessagePolicy restartPolicy"),
    **_all(_hidden, "name command args workingDir envFrom lifecycle resizePolicy securityContext stdin"),
    **_all(_hidden, "stdinOnce terminationMessagePath tty volumeDevices"),
}
_VOLUME: dict[str, _Shape] = {
    "name": _hidden,
    "emptyDir": {"medium": _word, "sizeLimit": _quantity},
    "hostPath": {"path": _hidden, "type": _word},
    "configMap": {"defaultMode": _number, **_all(_hidden, "name items optional")},
    "secret": {"defaultMode": _number, **_all(_hidden, "secretName items optional")},
    "persistentVolumeClaim": {"claimName": _hidden, "readOnly": _number},
}
_PODS: dict[str, _Shape] = {
    "metadata": {
        "labels": _Each(_hidden),
        "annotations": _Each(_hidden),
        **_all(_hidden, "name namespace creationTimestamp"),
    },
    "spec": {
        "containers": _Named("name", _CONTAINER),
        "initContainers": _Named("name", _CONTAINER),
        "volumes": _Named("name", _VOLUME),
        "nodeSelector": _Each(_hidden),
        "imagePullSecrets": _Named("name", {"name": _hidden}),
        **_all(_word, "restartPolicy dnsPolicy preemptionPolicy"),
        **_all(_number, "terminationGracePeriodSeconds activeDeadlineSeconds priority minReadySeconds"),
        **_all(_number, "hostNetwork hostPID hostIPC shareProcessNamespace automountServiceAccountToken"),
        **_all(_hidden, "serviceAccountName serviceAccount schedulerName priorityClassName nodeName"),
        **_all(_hidden, "runtimeClassName affinity dnsConfig ephemeralContainers hostAliases hostname"),
        **_all(_hidden, "hostUsers enableServiceLinks os overhead readinessGates resourceClaims resources"),
        **_all(_hidden, "schedulingGates securityContext setHostnameAsFQDN subdomain tolerations"),
        "topologySpreadConstraints": _hidden,
    },
}
"""The known fields of a pod template, and the part of their values that is shown."""


_MISSING = object()
"""A missing value. JSON's null is a value."""


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[FieldChange]:
    """Return the differences between two pod templates, as JSON objects; empty if they are the same.

    Entries of lists are matched by name. The result contains neither values that might be secrets nor
    unknown keys.
    """
    return list(_walk("", _PODS, before, after))


def _walk(path: str, shape: _Shape, before: Any, after: Any) -> Iterator[FieldChange]:
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
) -> Iterator[FieldChange]:
    places = {name: str(place) for known in (before, after) for place, name in enumerate(known)}
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name, _MISSING), after.get(name, _MISSING)
        where = f"{path}[{name if shape.shown else places[name]}]"
        if one is _MISSING or other is _MISSING:
            yield _change(where, _hidden, one, other)
        else:
            yield from _walk(where, shape.entry, one, other)
    if [name for name in before if name in after] != [name for name in after if name in before]:
        yield FieldChange(path=path, what="reordered")


def _walk_fields(
    path: str, shape: dict[str, Any] | _Each, before: dict[str, Any], after: dict[str, Any]
) -> Iterator[FieldChange]:
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
        yield FieldChange(path=f"{path}.(another field)".lstrip("."), what="changed")


def _change(path: str, leaf: Leaf, before: Any, after: Any) -> FieldChange:
    what = "added" if before is _MISSING else "removed" if after is _MISSING else "changed"
    return FieldChange.model_validate(
        {"path": path or "pod template", "what": what, "before": leaf(before), "after": leaf(after)}
    )


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of an object, none if it is absent, or `None` if it is not an object."""
    if value is _MISSING:
        return {}
    return value if isinstance(value, dict) else None


def _entries(value: Any, key: str) -> dict[str, Any] | None:
    """Return a list's entries by name, none if it is absent, or `None` if names are missing or repeated."""
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
    return digest(one) == digest(other)  # 1, 1.0 and true are equal in Python
