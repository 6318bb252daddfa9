"""Consent of the user: the client asks before anything is written, or the caller passes a confirmation."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context, Elicit, Resolve
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

from prefect_rollout.mcp import types
from prefect_rollout.mcp.untrusted import unquoted
from prefect_rollout.release.request import Checked


class Consent(BaseModel):
    """The answer of the user."""

    proceed: bool = Field(title="Proceed", description="Yes to do exactly this; no to do nothing.")


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to run once the user agrees."""

    request: Checked | None = None  # to submit, bound to its plan
    known: str = ""  # ID of the run that the same request started; for a retry, the token of the run's end
    question: str = ""  # empty if there is nothing to ask, or if `confirm` answers it


def asking(
    prepare: Callable[..., Awaitable[Prepared]],
) -> Callable[..., Awaitable[Elicit[Consent] | Consent]]:
    """Return a resolver that asks the question of `prepare`; it works in every protocol version."""

    async def consent(prepared: Annotated[Prepared, Resolve(prepare)]) -> Elicit[Consent] | Consent:
        return Elicit(prepared.question, Consent) if prepared.question else Consent(proceed=True)

    return consent


def require(consent: ElicitationResult[Consent]) -> None:
    """Raise `ToolError` if the user declined."""
    if not (isinstance(consent, AcceptedElicitation) and consent.data.proceed):
        raise ToolError("The user did not agree; nothing was submitted. Ask the user what to do instead.")


def can_ask(ctx: Context) -> bool:
    """Return True if the client can show a form to the user."""
    capabilities = ctx.client_capabilities
    elicitation = capabilities.elicitation if capabilities else None
    # A client that declares only `url` shows no form; one that declares neither predates the modes.
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


def bound(request: Checked, plan_hash: str) -> Checked:
    """Return the request, bound to the plan: the run writes nothing if its own plan has another hash."""
    given = {name: getattr(request, name) for name in request.model_fields_set}
    return type(request).of(**given | {"expect_plan": plan_hash})


def question(title: str, plan: types.Plan) -> str:
    """Return the question about a plan."""
    # The hash covers what a long plan leaves out: if that changes, the client asks again.
    return f"{title}?\n" + unquoted("\n".join(plan.lines)) + f"\nPlan hash: {plan.plan_hash}."
