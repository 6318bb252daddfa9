"""The actions that an assistant can plan and start. Their arguments derive from the request models."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from prefect_rollout.batch.plan import BatchRequest, Plan
from prefect_rollout.release.request import Checked, ReleaseRequest, Request, RollbackRequest, ScaleRequest

# The fields that an assistant may set, in the order of the forms. No field overrides a release window.
_FIELDS = (
    *("app_id", "deployment", "template_id", "images", "to_template", "replicas", "plan"),
    *("clusters", "target", "reason", "on_failure", "order", "canary", "approval"),
    *("poll_seconds", "poll_attempts", "only_failed"),
)
_DEFAULTS = {
    "app_id": "Defaults to K8S_APP_ID.",
    "deployment": "Defaults to K8S_DEPLOY_NAME.",
    "template_id": "Defaults to K8S_TEMPLATE_ID for the deployment K8S_DEPLOY_NAME.",
}


class _PlanSchema:
    """Show an object as a plan in the schema. `Plan.of_parameter` validates it and reports all mistakes."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source)

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(Plan.__pydantic_core_schema__)


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


def argument(model: type[Checked], name: str, *, optional: bool = False) -> inspect.Parameter:
    """Return the tool argument for a field of a request model: its type, limits, description and default."""
    field = model.model_fields[name]
    description = " ".join(filter(None, (field.description, _DEFAULTS.get(name))))
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    default = inspect.Parameter.empty if field.is_required() else field.default
    if name == "plan":
        kind = Annotated[dict[str, Any], _PlanSchema()]
    if optional or name in _DEFAULTS:
        kind, default = kind | None, None
    if default is None:
        kind = Annotated[kind, BeforeValidator(_none_if_empty)]
    annotation = Annotated[kind, Field(description=description)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


@dataclass(frozen=True)
class Action:
    """An action, and the tool that starts it.

    Attributes:
        tool: name of the tool.
        flow: name of the flow.
        request: model of the flow's parameters.
        title: for people.
        description: for models.
        fields: fields of the request that are arguments of the tool, if it has them.
    """

    tool: str
    flow: str
    request: type[Checked]
    title: str
    description: str
    fields: tuple[str, ...] = _FIELDS

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The arguments of the tool, by name."""
        return {
            name: argument(self.request, name) for name in self.fields if name in self.request.model_fields
        }


_ANSWER = (
    "Returns flow_run_id, state and ui_link at once; follow the run with get_release. The client asks the "
    "user to agree; if it cannot ask, pass `confirm`. Repeating a request within ten minutes returns the run "
    "that it started (`repeated`); attempt=2 starts another one."
)

ACTIONS = {
    "deploy": Action(
        "deploy_latest_image",
        "deploy-latest-image",
        ReleaseRequest,
        "Release a deployment",
        "Release a deployment: publish a template, the newest released one by default, to its clusters and "
        f"watch the pods. Use it if the user asks to deploy or release. {_ANSWER}",
    ),
    "batch": Action(
        "deploy_batch",
        "deploy-batch",
        BatchRequest,
        "Release many deployments",
        "Release many deployments in waves, each as its own flow run. The batch continues after a failure "
        f"until the failure budget is used up. {_ANSWER}",
        ("plan", "only_failed"),
    ),
    "rollback": Action(
        "rollback",
        "rollback",
        RollbackRequest,
        "Roll a deployment back",
        "Roll a deployment back to the last template released before the current one, and watch the pods. "
        f"Use it if a release was bad and the user wants the previous version. {_ANSWER}",
    ),
    "restart": Action(
        "restart",
        "restart",
        Request,
        "Restart a deployment",
        f"Replace the pods of a deployment with new pods of the same template, and watch them. {_ANSWER}",
    ),
    "scale": Action(
        "scale",
        "scale",
        ScaleRequest,
        "Scale a deployment",
        "Change the number of pods of a deployment in each cluster until its next release, and watch them. "
        f"{_ANSWER}",
    ),
}


_MODELS = {name: action.request for action in ACTIONS.values() for name in action.arguments}
ARGUMENTS = {
    name: argument(_MODELS[name], name, optional=_MODELS[name].model_fields[name].is_required())
    for name in _FIELDS
}
"""The arguments of all actions, by name; none is required."""


def with_arguments(fn: Callable[..., Any], arguments: Iterable[inspect.Parameter]) -> Callable[..., Any]:
    """Return `fn` with these arguments in place of its `**`; the SDK reads the schema from its signature."""
    signature = inspect.signature(fn)
    own = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in signature.parameters.values()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    parameters = [*own[:1], *arguments, *own[1:]]
    changed: Any = fn
    changed.__signature__ = signature.replace(parameters=parameters)
    changed.__annotations__ = {each.name: each.annotation for each in parameters} | {
        "return": signature.return_annotation
    }
    return fn
