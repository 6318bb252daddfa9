"""Function parameters from request models, with the same order and text in forms, options and tools."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

Function = TypeVar("Function", bound=Callable[..., Any])

GROUPS = {
    "What": (
        *("plan", "app_id", "deployment", "replicas", "images", "newest", "template_id", "to_template"),
        *("pin_digest", "dry_run", "only_failed", "clusters", "target", "reason", "requested_by"),
    ),
    "How": ("order", "canary", "pause_seconds", "on_failure", "unblock", "run_in", "child_deployment"),
    "Watch": ("poll_seconds", "poll_attempts", "grace_seconds"),
    "Safety": (
        *("check_images", "expect_plan", "approval", "approval_seconds", "lock_wait_seconds"),
        *("window_wait_seconds", "force", "break_glass", "late_minutes"),
    ),
}
"""All fields of the requests in the order of forms and help, by the groups of the help."""

_ORDER = [name for names in GROUPS.values() for name in names]


def parameters_of(model: type[BaseModel]) -> list[inspect.Parameter]:
    """Return a parameter for each field of a model; fields with a default are keyword-only."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if field.is_required()
            else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=Annotated[field.annotation, field],
        )
        for name, field in sorted(model.model_fields.items(), key=lambda each: _ORDER.index(each[0]))
    ]


def takes(model: type[BaseModel]) -> Callable[[Function], Function]:
    """Give a function with `**` parameters a parameter for each field of `model`.

    Prefect makes the form of a deployment from the signature and from the docstring's `Args`.
    """

    def decorate(function: Function) -> Function:
        parameters = parameters_of(model)
        lines = (f"    {each.name}: {model.model_fields[each.name].description}" for each in parameters)
        returned = inspect.signature(function).return_annotation
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines])
        vars(function)["__signature__"] = inspect.Signature(parameters, return_annotation=returned)
        return function

    return decorate
