"""Options of the commands, made from the request models."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter
from pydantic import BaseModel

from prefect_rollout.batch.plan import load_plan
from prefect_rollout.cli.output import me
from prefect_rollout.errors import InputError
from prefect_rollout.release.parameters import GROUPS, parameters_of
from prefect_rollout.release.request import Checked
from prefect_rollout.text import one_line

Request = TypeVar("Request", bound=Checked)

WHAT, HOW, WATCH, SAFETY, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate((*GROUPS, "Output"))
)
_GROUP_OF = {
    name: group
    for group, names in zip((WHAT, HOW, WATCH, SAFETY), GROUPS.values(), strict=True)
    for name in names
}

AsJson = Annotated[
    bool,
    Parameter(
        name="--json",
        group=OUTPUT,
        negative="",
        show_default=False,
        help="Print the result as one JSON object on standard output, and nothing else.",
    ),
]

# Options that have another form on the command line than in Python.
_TEXT = {
    "plan": (Path, Parameter(help="YAML or JSON file of the releases.")),
    "app_id": (str, Parameter(env_var="K8S_APP_ID")),
    "deployment": (str, Parameter(env_var="K8S_DEPLOY_NAME")),
    "template_id": (str | None, Parameter(env_var="K8S_TEMPLATE_ID")),
    "to_template": (str | None, Parameter()),
    "clusters": (
        list[str] | None,
        Parameter(name="--cluster", help="Cluster to change; may be repeated. By default all clusters."),
    ),
    "images": (
        list[str] | None,
        Parameter(
            name="--image", help="Image that replaces the template's, as container=image; may be repeated."
        ),
    ),
    "requested_by": (str, Parameter(show_default="you")),
}


def options(model: type[BaseModel]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command an option for each field of `model`, and `--json`."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            _option(each, model.model_fields[each.name].description)
            for each in parameters_of(model)
            if each.name != "late_minutes"  # for scheduled runs
        ]
        parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=AsJson))
        vars(command)["__signature__"] = inspect.Signature(parameters, return_annotation=int)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _option(field: inspect.Parameter, text: str | None) -> inspect.Parameter:
    kind, own = _TEXT.get(field.name, (field.annotation.__origin__, Parameter()))
    described = Parameter(
        help=text,
        group=_GROUP_OF[field.name],
        negative="",
        show_default=None if field.default is not False and field.default != "" else False,
    )
    return field.replace(
        annotation=Annotated[kind, described, own],
        kind=inspect.Parameter.POSITIONAL_ONLY if field.name == "plan" else inspect.Parameter.KEYWORD_ONLY,
    )


def request_of(model: type[Request], values: Mapping[str, Any]) -> Request:
    """Return the request made of the options that the user gave.

    Raises:
        InputError: an option cannot be used.
    """
    read = {name: _READ[name](value) if name in _READ else value for name, value in values.items()}
    return model.of(**{"requested_by": me(), **read})


def _images(given: list[str] | None) -> dict[str, str] | None:
    images = {}
    for pair in given or []:
        container, _, image = pair.partition("=")
        if not container or not image:
            raise InputError(f"image: {one_line(pair, 120)!r} is not container=image", field="image")
        if container in images:
            raise InputError(f"image: container {one_line(container, 80)!r} is given twice", field="image")
        images[container] = image
    return images or None


_READ: dict[str, Callable[[Any], Any]] = {"plan": load_plan, "images": _images}
