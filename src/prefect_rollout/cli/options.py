"""Options of the commands, made from the request models."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter
from pydantic import BaseModel

from prefect_rollout.batch.plan import load_plan
from prefect_rollout.cli.output import Ended, me, say
from prefect_rollout.errors import InputError
from prefect_rollout.release.parameters import GROUPS, parameters_of
from prefect_rollout.release.request import Checked
from prefect_rollout.settings import VARIABLES, cloud_environment
from prefect_rollout.text import one_line

Command = Callable[..., Ended]
Request = TypeVar("Request", bound=Checked)

WHAT, HOW, WATCH, SAFETY, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate((*GROUPS, "Output"))
)
_GROUP_OF = {
    name: group
    for group, names in zip((WHAT, HOW, WATCH, SAFETY), GROUPS.values(), strict=True)
    for name in names
}

_JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        Parameter(
            name="--json",
            group=OUTPUT,
            negative="",
            show_default=False,
            help="Print the result as one JSON object on standard output, and nothing else.",
        ),
    ],
)

# Options that have another form on the command line than in Python.
_TEXT = {
    "plan": (Path, Parameter(help="YAML or JSON file of the releases.")),
    "app_id": (str, Parameter(env_var=VARIABLES["app_id"])),
    "deployment": (str, Parameter(env_var=VARIABLES["deployment"])),
    "template_id": (
        str | None,
        Parameter(
            help="Template to release, even if it failed before; by default K8S_TEMPLATE_ID if app and "
            "deployment are K8S_APP_ID and K8S_DEPLOY_NAME, else the newest released one."
        ),
    ),
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


def command_of(model: type[BaseModel], run: Callable[[dict[str, Any]], Ended]) -> Command:
    """Return a command with an option for each field of `model`; `run` gets those that the user gave."""

    def command(*plan: Path, **given: Any) -> Ended:
        return run({"plan": plan[0], **given} if plan else given)

    parameters = [
        _option(each, model.model_fields[each.name].description)
        for each in parameters_of(model)
        if each.name != "late_minutes"  # for scheduled runs
    ]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def with_json(function: Command) -> Command:
    """Give a command the option `--json`, which `__main__.run` obeys."""

    @functools.wraps(function)
    def command(*arguments: Any, as_json: bool = False, **options: Any) -> Ended:
        return function(*arguments, **options)

    parameters = [*inspect.signature(function).parameters.values(), _JSON]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


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
        InputError: an option or a variable cannot be used.
    """
    read = {name: _READ[name](value) if name in _READ else value for name, value in values.items()}
    environment = cloud_environment()
    if environment.template_id and "template_id" in model.model_fields and not read.get("template_id"):
        own = {"app_id": environment.app_id, "deployment": environment.deploy_name}
        if read.get("images"):
            say("K8S_TEMPLATE_ID is not used: images are given.")
        elif all(str(read.get(name)) == value for name, value in own.items()):
            read["template_id"] = environment.template_id
        else:
            say("K8S_TEMPLATE_ID is not used: it is for K8S_APP_ID and K8S_DEPLOY_NAME only.")
    try:
        return model.of(**{"requested_by": me(), **read})
    except InputError as error:
        error.advice = f"{error.advice} {set_by_variable(error.data.get('field', ''), read)}".rstrip()
        raise


def set_by_variable(field: str, values: Mapping[str, Any]) -> str:
    """Return a sentence that names the variable which may have set the field; else an empty text."""
    name = {"app": "app_id", "template": "template_id"}.get(field, field)
    variable = VARIABLES.get(name, "")
    value = os.environ.get(variable)
    return f"{variable} is set to it." if value and value == str(values.get(name) or value) else ""


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
