"""The actions that an assistant can plan and start. Their arguments derive from the request models."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_origin

from pydantic import BeforeValidator, Field, WithJsonSchema

from prefect_rollout.batch.plan import BatchRequest, Plan
from prefect_rollout.ids import Id
from prefect_rollout.mcp.schemas import arguments_schema
from prefect_rollout.release.request import Checked, ReleaseRequest, Request, RollbackRequest, ScaleRequest
from prefect_rollout.settings import VARIABLES

# The fields that an assistant may set, in the order of the forms. No field overrides a release window.
_FIELDS = (
    *("app_id", "deployment", "template_id", "images", "newest", "to_template", "replicas", "plan"),
    *("clusters", "target", "reason", "on_failure", "order", "canary", "approval"),
    "pin_digest",
    *("poll_seconds", "poll_attempts", "only_failed"),
)


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


_OWN = {"template_id": " for the deployment K8S_DEPLOY_NAME"}


def described(name: str, model: type[Checked] = Request) -> str:
    """Return the description of a field of a request model, with its default from the environment."""
    default = f" Defaults to {VARIABLES[name]}{_OWN.get(name, '')}." if name in VARIABLES else ""
    return f"{model.model_fields[name].description}{default}"


AppId = Annotated[Id | None, Field(description=described("app_id"))]
Deployment = Annotated[str | None, Field(description=described("deployment"))]
Target = Annotated[str, Field(description="Block with the credentials, as type-slug/name, or environment.")]
FlowRunId = Annotated[str, Field(description="ID of the release's flow run, or its link.")]
WaitSeconds = Annotated[float, Field(ge=0, le=50, description="Seconds to wait for the end.")]
Limit = Annotated[int, Field(ge=1, le=50, description="Maximum number of entries.")]
Cursor = Annotated[str, Field(description="next_cursor of the page before.")]


def _plan_schema(*, whole: bool) -> dict[str, Any]:
    """Return the schema of a plan; `Plan.of_parameter` validates it and reports all mistakes.

    It describes what deploy_latest_image does not; unless it is `whole`, it has only the outer fields.
    """
    schema: dict[str, Any] = arguments_schema(Plan.model_json_schema())
    fields = schema["properties"]
    release = fields["releases"]["items"]
    release["required"].remove("app_id")
    release["description"] = "Options are as in deploy_latest_image."
    for name, option in release["properties"].items():
        if name in ReleaseRequest.model_fields:
            option.pop("description", None)
            option.pop("properties", None)
            if name in _FIELDS:
                option.pop("enum", None)
    release["properties"]["app_id"]["description"] = described("app_id")
    # They are those of the releases.
    fields["defaults"]["properties"] = {name: {} for name in fields["defaults"]["properties"]}
    fields["target"]["description"] = "Target of all releases that name none."
    if not whole:
        schema["properties"] = {
            name: {key: each[key] for key in ("type", "anyOf") if key in each}
            for name, each in fields.items()
        }
        schema["properties"]["releases"]["items"] = {"type": "object"}
    return schema


def argument(model: type[Checked], name: str, *, see: str = "", optional: bool = False) -> inspect.Parameter:
    """Return the tool argument for a field of a request model: its type, limits, description and default.

    With `see`, the description refers to the tool that describes the argument.
    """
    field = model.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    default = inspect.Parameter.empty if field.is_required() else field.default
    if name == "plan":
        kind = Annotated[dict[str, Any], WithJsonSchema(_plan_schema(whole=not see))]
    if see and (name == "newest" or get_origin(field.annotation) is Literal):
        kind = Annotated[kind, WithJsonSchema({"type": "object" if name == "newest" else "string"})]
    if optional or name in VARIABLES:
        kind, default = kind | None, None
    if default is None:
        kind = Annotated[kind, BeforeValidator(_none_if_empty)]
    description = f"As in {see}." if see else described(name, model)
    annotation = Annotated[kind, Field(description=description)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


@dataclass(frozen=True)
class Action:
    """An action: its tool and flow, the model of the flow's parameters, and the fields that are arguments."""

    tool: str
    flow: str
    request: type[Checked]
    title: str
    description: str
    fields: tuple[str, ...] = _FIELDS

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The arguments of the tool, by name; those of a release are described only there."""
        return {
            name: argument(self.request, name, see=self._see(name))
            for name in self.fields
            if name in self.request.model_fields
        }

    def _see(self, name: str) -> str:
        released = name in ReleaseRequest.model_fields and name not in {"app_id", "deployment"}
        return "deploy_latest_image" if released and self.request is not ReleaseRequest else ""


ACTIONS = {
    "deploy": Action(
        "deploy_latest_image",
        "deploy-latest-image",
        ReleaseRequest,
        "Release a deployment",
        "Release a deployment: publish a template, by default the newest released one, to its clusters and "
        "watch the pods.",
    ),
    "batch": Action(
        "deploy_batch",
        "deploy-batch",
        BatchRequest,
        "Release many deployments",
        "Release many deployments in waves, each as its own flow run.",
        ("plan", "only_failed"),
    ),
    "rollback": Action(
        "rollback",
        "rollback",
        RollbackRequest,
        "Roll a deployment back",
        "Roll a deployment back to the last template released before the current one, and watch the pods.",
    ),
    "restart": Action(
        "restart",
        "restart",
        Request,
        "Restart a deployment",
        "Replace the pods of a deployment with new pods of the same template, and watch them.",
    ),
    "scale": Action(
        "scale",
        "scale",
        ScaleRequest,
        "Scale a deployment",
        "Change the number of pods of a deployment in each cluster until its next release, and watch them.",
    ),
}

_REQUESTS = {name: action for action in reversed(ACTIONS.values()) for name in action.arguments}
DEFAULTS = {name: argument(_REQUESTS[name].request, name).default for name in _FIELDS}
"""The defaults of the arguments of all actions."""


def all_arguments(*, alone: bool) -> list[inspect.Parameter]:
    """Return the arguments of all actions; unless plan_release is `alone`, other tools describe them."""
    return [
        argument(
            (action := _REQUESTS[name]).request,
            name,
            see="" if alone else action.tool,
            optional=DEFAULTS[name] is inspect.Parameter.empty,
        )
        for name in _FIELDS
    ]


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
