"""Faults on the wire: which answers are spoilt, and how."""

import asyncio
import contextlib
import random
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Call = Literal[
    "any",
    "app",
    "deployments",
    "templates",
    "template",
    "upgrade",
    "publish",
    "status",
    "online",
    "history",
    "restart",
    "scale",
]

FaultKind = Literal[
    "status",
    "delay",
    "reset_before",
    "reset_after",
    "cut",
    "malformed",
    "html",
    "empty",
    "endless",
    "never",
]

# Whether the call takes effect where the fault does not say. The first group cannot do otherwise.
_EFFECT_FIXED = {"delay": True, "reset_before": False, "reset_after": True, "cut": True, "malformed": True}
_EFFECT_DEFAULT = {"status": False, "html": False, "empty": True, "endless": False, "never": False}


def _plural(value: Any) -> Any:
    return "deployments" if value == "deployment" else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class Fault(BaseModel):
    """One fault. It strikes every call that it concerns unless `nth`, `probability` or `times` limit it.

    - `status`: an error `status`, with `sub_code`, `message` and `retry_after`, or with an HTML body.
    - `delay`: the true answer, `seconds` late, or as soon as the faults are replaced.
    - `reset_before`, `reset_after`: a TCP reset before, or after, the call took effect.
    - `cut`: the true answer's headers and half its body, then the connection ends.
    - `malformed`: half the true answer's body with a length that fits: broken JSON.
    - `html`, `empty`: 200 with an HTML page, or with no body.
    - `endless`: 200 with a body that does not end.
    - `never`: no answer, while the connection stays open.
    """

    model_config = ConfigDict(extra="forbid")

    kind: FaultKind
    call: Annotated[Call, BeforeValidator(_plural)] = "any"
    cluster: str | None = Field(default=None, description="Only calls that name this cluster.")
    deployment: str | None = Field(default=None, description="Only calls about this deployment, by name.")
    nth: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_listed)] | None = Field(
        default=None, description="Only these of the calls that it concerns, counted from 1."
    )
    probability: float | None = Field(default=None, ge=0, le=1)
    seed: int = Field(default=0, description="Makes `probability` repeatable.")
    times: int | None = Field(default=None, ge=1, description="Strikes at most so often.")
    takes_effect: bool | None = Field(
        default=None,
        description="Whether the call does its work before the fault. "
        "By default: status, html, endless, never no; empty yes.",
    )
    status: int | None = Field(default=None, ge=400, le=599)
    sub_code: int = 0
    message: str = "服务暂时不可用，请稍后重试"
    retry_after: str | None = Field(
        default=None,
        description="The Retry-After header: seconds, or `http-date:<seconds>` for the moment in so many.",
        pattern=r"^(http-date:)?\d{1,6}$",
        coerce_numbers_to_str=True,
    )
    html: bool = Field(default=False, description="An HTML page in place of the error's JSON.")
    seconds: float | None = Field(
        default=None, ge=0, le=3600, allow_inf_nan=False, description="Of real time, for delay."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if (self.kind == "status") != (self.status is not None):
            raise ValueError("kind status needs a status, and no other kind has one")
        if (self.kind == "delay") != (self.seconds is not None):
            raise ValueError("kind delay needs seconds, and no other kind has them")
        if self.kind != "status" and (self.html or self.retry_after is not None or self.sub_code):
            raise ValueError(f"kind {self.kind} has neither html nor retry_after nor sub_code")
        if self.nth is not None and self.probability is not None:
            raise ValueError("give either nth or probability")
        if self.takes_effect is not None and self.kind in _EFFECT_FIXED:
            raise ValueError(f"kind {self.kind} leaves takes_effect no choice")
        return self

    @property
    def effective(self) -> bool:
        """Whether the call does its work."""
        if self.takes_effect is not None:
            return self.takes_effect
        return (_EFFECT_FIXED | _EFFECT_DEFAULT)[self.kind]

    def concerns(self, call: str, clusters: Collection[str], deployment: str | None) -> bool:
        """Whether a call is of the kind that the fault is about."""
        return (
            self.call in {"any", call}
            and (self.cluster is None or self.cluster in clusters)
            and (self.deployment is None or self.deployment == deployment)
        )


class FaultPlan:
    """The faults in force, with their counters."""

    def __init__(self, faults: Collection[Fault]) -> None:
        self._armed = [_Armed(fault) for fault in faults]
        self.replaced = asyncio.Event()

    def strike(self, call: str, clusters: Collection[str], deployment: str | None) -> Fault | None:
        """The fault that this call meets: the first in order that is due. Counts the call for all."""
        struck = None
        for armed in self._armed:
            if armed.fault.concerns(call, clusters, deployment) and armed.is_due() and struck is None:
                armed.struck += 1
                struck = armed.fault
        return struck

    async def delay(self, fault: Fault | None) -> None:
        """Wait for the seconds of a delay, or until the faults are replaced."""
        if fault is not None and fault.seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.replaced.wait(), fault.seconds)


class _Armed:
    """A fault and what it has seen."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.seen = 0
        self.struck = 0
        self._dice = random.Random(fault.seed)  # noqa: S311 - repeatable on purpose

    def is_due(self) -> bool:
        self.seen += 1
        if self.fault.times is not None and self.struck >= self.fault.times:
            return False
        if self.fault.nth is not None:
            return self.seen in self.fault.nth
        if self.fault.probability is not None:
            return self._dice.random() < self.fault.probability
        return True
