"""What a template's JSON text says: its containers, its selector, and what its pods are made from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_rollout.ids import first_mistake
from prefect_rollout.simulator.pod import Revision


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Container(_Open):
    name: str
    image: str


class _PodSpec(_Open):
    containers: list[_Container] = Field(min_length=1)


class _PodTemplate(_Open):
    spec: _PodSpec


class _Selector(_Open):
    match_labels: dict[str, str] = Field(default={}, alias="matchLabels")


class _Spec(_Open):
    selector: _Selector = _Selector()
    template: _PodTemplate


class _Workload(_Open):
    kind: str = Field(pattern="^Deployment$")
    spec: _Spec


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A readable template.

    Args:
        revision: what its pods are made from; equal for equal `spec.template`.
        selector: the labels of `spec.selector.matchLabels`, sorted.
    """

    revision: Revision
    selector: tuple[tuple[str, str], ...]


@lru_cache(maxsize=4096)
def read_blueprint(text: str) -> Blueprint:
    """The blueprint in a template's text.

    Raises:
        ValueError: it is not JSON, or not a Deployment with containers.
    """
    try:
        workload = json.loads(text)
        spec = _Workload.model_validate(workload).spec
        content = json.dumps(workload["spec"]["template"], sort_keys=True, ensure_ascii=False)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    images = {container.name: container.image for container in spec.template.spec.containers}
    return Blueprint(
        revision=Revision.of(hashlib.sha256(content.encode()).hexdigest(), images),
        selector=tuple(sorted(spec.selector.match_labels.items())),
    )


def with_images(text: str, images: Mapping[str, str]) -> str:
    """A readable template's text with other images for the containers named; the same if none differs."""
    workload = json.loads(text)
    changed = False
    for container in workload["spec"]["template"]["spec"]["containers"]:
        image = images.get(container["name"], container["image"])
        changed = changed or image != container["image"]
        container["image"] = image
    return json.dumps(workload, ensure_ascii=False) if changed else text
