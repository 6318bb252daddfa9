"""Tools and controllers that manage a workload, and may revert a release. Pure."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prefect_rollout.platforms.kubernetes.objects import Object
from prefect_rollout.text import one_line


class Manager(NamedTuple):
    """A tool that applies workloads from a source of its own.

    Attributes:
        name: its name for people.
        marks: labels or annotations that it sets, whose value names its application or release.
        fields: its names as a field manager.
        reverts: when it reverts a change that its source does not have.
    """

    name: str
    marks: tuple[str, ...]
    fields: tuple[str, ...]
    reverts: str


_SOON = "it reverts the release unless its source has the same images"
_MANAGERS = (
    Manager(
        "Argo CD",
        ("argocd.argoproj.io/tracking-id", "argocd.argoproj.io/instance"),
        ("argocd-controller", "argocd-application-controller"),
        _SOON,
    ),
    Manager(
        "Flux",
        ("helm.toolkit.fluxcd.io/name", "kustomize.toolkit.fluxcd.io/name"),
        ("kustomize-controller", "helm-controller"),
        _SOON,
    ),
    Manager(
        "Helm",
        ("meta.helm.sh/release-name",),
        ("helm", "Helm"),
        "its next upgrade reverts the release unless the chart's values have the same images",
    ),
)


def managed_by(workload: Object) -> list[str]:
    """Return a note for each manager that may revert a change of the workload."""
    metadata = workload["metadata"]
    marks: dict[str, str] = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    fields = set(_field_managers(metadata))
    found: list[str] = []
    for manager in _MANAGERS:
        value = next((marks[mark] for mark in manager.marks if mark in marks), None)
        if value is None and fields.isdisjoint(manager.fields):
            continue
        if found and manager.name == "Helm":  # of Flux or Argo CD, which is named already
            continue
        named = f" ({one_line(value.partition(':')[0], 80)})" if value else ""
        found.append(f"managed by {manager.name}{named}: {manager.reverts}")
    for owner in metadata.get("ownerReferences") or []:
        if owner.get("controller"):
            shown = one_line(f"{owner.get('kind')} {owner.get('name')}", 120)
            found.append(f"managed by its owner, {shown}: its controller may revert the release")
    return found


def _field_managers(metadata: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of those who set fields of the spec."""
    entries = metadata.get("managedFields")
    for each in entries if isinstance(entries, list) else []:
        if "f:spec" in (each.get("fieldsV1") or {}) and not each.get("subresource"):
            yield str(each.get("manager") or "")
