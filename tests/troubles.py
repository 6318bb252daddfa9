"""The faults on the wire that tests walk through, and the error that the client makes of each."""

from typing import Any, NamedTuple

from prefect_rollout.errors import (
    ConflictError,
    OverloadedError,
    RolloutError,
    ServerFaultError,
    UnreachableError,
    UnusableAnswerError,
)
from prefect_rollout.simulator.fault import Fault


class Trouble(NamedTuple):
    """A fault as the simulator takes it; empty for a refused connection, which the port itself has."""

    fault: dict[str, Any]
    error: type[RolloutError]

    @property
    def effective(self) -> bool:
        """Whether a write takes effect all the same."""
        return bool(self.fault) and Fault.model_validate(self.fault).effective

    @property
    def times_out(self) -> bool:
        return self.fault.get("kind") == "never"


def status(code: int, **more: Any) -> dict[str, Any]:
    return {"kind": "status", "status": code, **more}


TROUBLES = {
    "reset before the effect": Trouble({"kind": "reset_before"}, UnreachableError),
    "reset after the effect": Trouble({"kind": "reset_after"}, UnreachableError),
    "connection refused": Trouble({}, UnreachableError),
    "time-out before the effect": Trouble({"kind": "never"}, UnreachableError),
    "time-out after the effect": Trouble({"kind": "never", "takes_effect": True}, UnreachableError),
    "500 after the effect": Trouble(status(500, takes_effect=True), ServerFaultError),
    "502 as HTML": Trouble(status(502, html=True), ServerFaultError),
    "503, Retry-After in seconds": Trouble(status(503, retry_after="1"), OverloadedError),
    "503, Retry-After as a date": Trouble(status(503, retry_after="http-date:1"), OverloadedError),
    "429, Retry-After in seconds": Trouble(status(429, retry_after="1"), OverloadedError),
    "429, Retry-After as a date": Trouble(status(429, retry_after="http-date:1"), OverloadedError),
    "login page after the effect": Trouble({"kind": "html", "takes_effect": True}, UnusableAnswerError),
    "answer cut off": Trouble({"kind": "cut"}, UnreachableError),
    "half of the JSON": Trouble({"kind": "malformed"}, UnusableAnswerError),
    "409001": Trouble(status(409, sub_code=409001), ConflictError),
}
