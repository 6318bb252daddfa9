"""All errors, as one tree. Some are in `batch.errors` and `release.image_errors`.

RolloutError
├── InputError                  a value of the caller cannot be used; no request was sent
│   └── PlanError               a plan of releases has mistakes; all are listed
├── ConfigurationError          a block, environment variable or file is missing or unusable
├── NotFoundError               the platform does not have the named object
│   ├── AppNotFoundError
│   ├── DeploymentNotFoundError
│   ├── TemplateNotFoundError   the requested template id is unknown
│   ├── NoTemplateError         the deployment has no template, or none that was released
│   ├── NoPreviousTemplateError the history has no released template to go back to
│   ├── ClusterNotFoundError
│   ├── ContainerNotFoundError
│   └── ImageNotFoundError      the registry has no such repository or tag
├── UnsuitableImageError        the image exists, but not for the nodes' platform
├── RegistryError               the registry did not say whether it has an image
│   ├── RegistryAccessError     401 and 403
│   ├── RegistryLimitError      429, possibly with Retry-After
│   └── RegistryUnreachableError no answer, or 5xx
├── WorkloadError               the deployment's configuration cannot be read or is incomplete
├── TemplateError               the template cannot be released
│   ├── ForeignTemplateError    it belongs to another deployment
│   └── UnreadableTemplateError it is not an apps/v1 Deployment
├── UpgradeError                the upgrade did not leave exactly one new template
├── PlatformError               the platform refused or failed
│   ├── AuthenticationError     401
│   ├── AccessDeniedError       403
│   │   └── QuotaExceededError  403, sub-code 403001
│   ├── RejectedError           400 and other refusals that a repeat does not change
│   ├── ConflictError           409
│   ├── OverloadedError         429 and 503, possibly with Retry-After
│   ├── ServerFaultError        500, 502, 504: a write may have taken effect
│   ├── UnreachableError        no answer: refused, reset, timed out: a write may have taken effect
│   └── UnusableAnswerError     the answer does not follow the contract
├── SkippedError                the run is late, or a newer run supersedes it
├── LockedError                 another release of the same deployment and cluster is running
├── WindowClosedError           a release window is closed
├── PlanChangedError            the plan is no longer the one that the dry run showed
├── LockLostError               the lock is lost, or another process continues the run: no more writes
├── BatchFailedError            not all releases of a batch succeeded
├── UnforeseenError             an unexpected error in this package or a library
└── ReleaseError                the release failed after its start
    ├── ReleaseFailedError      the platform or a pod reports that it cannot succeed
    ├── ReleaseTimedOutError    not all pods were ready within the allowed polls
    ├── RollbackFailedError     the release failed, and its rollback failed as well
    └── ReleaseCancelledError   a person cancelled it
        └── NotApprovedError    a person rejected it, or nobody approved it in time; nothing was written

Every error also has `step` (of the release) and `diagnosis` (category, cluster, pod, next action).
`retry_helps` is true if a retry of the run can end differently; code that offers a retry checks it, so no
`advice` mentions a retry.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from prefect_rollout.text import one_line, when
from prefect_rollout.verdict.diagnosis import Category, Diagnosis, resolution_of
from prefect_rollout.verdict.verdict import Verdict

_SHOWN = ("status", "code", "request_id")  # in the message; the rest of `data` is for programs


class RolloutError(Exception):
    """Base class of all errors.

    Args:
        problem: what is wrong, as a clause without a final period.
        advice: what the user can do, as a sentence; by default the class's own.
        retryable: True if the same call may succeed later; by default the class's own.
        retry_after: seconds that the platform asked to wait, if it did.
        data: further facts, such as status, code, request_id and cluster; `None` values are dropped.
    """

    category: ClassVar[Category] = Category.INTERNAL
    passes: ClassVar[bool] = False
    advice: str = "Read the flow run's log for the circumstances."
    retryable: bool = False

    def __init_subclass__(cls, **attributes: Any) -> None:
        """Set the attributes in the head of a class; its category gives its advice unless it has its own."""
        for name, value in attributes.items():
            setattr(cls, name, value)
        if "category" in vars(cls) and "advice" not in vars(cls):
            cls.advice = resolution_of(cls.category)

    def __init__(
        self,
        problem: str,
        *,
        advice: str | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        **data: Any,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.step: str | None = None
        self.advice = self.advice if advice is None else advice
        self.retryable = self.retryable if retryable is None else retryable
        self.retry_after = retry_after
        self.data = {name: value for name, value in data.items() if value is not None}
        self.result: Any = None
        self.live: str | None = None
        self.live_at: datetime | None = None

    def saw(self, live: str | None) -> None:
        """Record the revision that each cluster runs now; `None` if it cannot be read."""
        self.live, self.live_at = live, datetime.now(UTC)

    def __str__(self) -> str:
        """Return `step: problem (status …, request id …). Advice. Live at …: ….`, on one line."""
        where = f"{self.step}: " if self.step else ""
        circumstances = f" ({self.circumstances})" if self.circumstances else ""
        live = f" Live at {when(self.live_at)}: {self.live}." if self.live else ""
        advice = f"{self.advice} {self.next_step}".rstrip()
        return f"{where}{self.problem}{circumstances}. {self._detail}{advice}{live}"

    @property
    def circumstances(self) -> str:
        """The data that operators ask for, such as `status 500, request id 7f1c`; may be empty."""
        shown = [key for key in _SHOWN if key in self.data]
        return ", ".join(f"{key.replace('_', ' ')} {one_line(self.data[key], 80)}" for key in shown)

    @property
    def _detail(self) -> str:
        """Text between the problem and the advice, with a final period and a blank."""
        return ""

    @property
    def may_pass(self) -> bool:
        """True if the cause can pass, or be removed, while the request stays the same."""
        return self.passes

    @property
    def retry_helps(self) -> bool:
        """True if a retry of the run that this error ended can end differently."""
        return self.result is not None and not self.result.over and self.may_pass

    @property
    def next_step(self) -> str:
        """Next action for the run itself, as a sentence; empty if there is none."""
        if self.retry_helps:
            return "Retry the run to continue where it stopped."
        over = self.result is not None and self.result.rolled_back
        return "This run is over: start a new release once that is fixed." if over else ""

    @property
    def diagnosis(self) -> Diagnosis:
        """Problem and next action, in the form that reports and answers show."""
        cluster = self.data.get("cluster")
        found = Diagnosis.of(self.category, summary=self.problem, cluster=cluster and str(cluster))
        return found.model_copy(update={"resolution": self.advice})

    def to_dict(self) -> dict[str, Any]:
        """Return the error for programs; `retry_helps` and `next_step` concern the run that it ended."""
        return {
            **self.data,
            "type": type(self).__name__,
            "step": self.step,
            "message": self.problem,
            "retryable": self.retryable,
            "advice": self.advice,
            "retry_helps": self.retry_helps,
            "next_step": self.next_step,
            "live": self.live,
            "live_at": self.live_at and self.live_at.isoformat(timespec="seconds"),
            "diagnosis": self.diagnosis.model_dump(mode="json"),
        }


class InputError(RolloutError, category=Category.INVALID_INPUT):
    """A value of the caller cannot be used. Raised before any request or write."""

    advice = "Correct the value and start again; nothing was written."


class ConfigurationError(RolloutError, category=Category.CONFIGURATION):
    """A block, an environment variable or a file is missing or unusable."""

    @property
    def may_pass(self) -> bool:
        """True if the Prefect API did not answer, and nothing is misconfigured."""
        return self.retryable or bool(self.data.get("prefect_api"))


class NotFoundError(RolloutError, category=Category.NOT_FOUND):
    """The platform does not have an object of that name. `kind` is its noun, such as `deployment`."""

    kind: ClassVar[str] = "object"

    @classmethod
    def named(
        cls,
        name: object,
        known: Sequence[str] = (),
        where: str = "",
        advice: str | None = None,
        **data: Any,
    ) -> "NotFoundError":
        """Return the error for `name`; `where` is such as `in app 3290`.

        The advice lists `known` names; if there are none, it is `advice`, or that of the class.
        """
        shown = [one_line(other, 80) for other in known]
        advice = f"There {'is' if len(shown) == 1 else 'are'}: {', '.join(shown)}." if shown else advice
        problem = f"there is no {cls.kind} {one_line(name, 120)!r}{where and ' ' + where}"
        return cls(problem, advice=advice, known=shown or None, **data)

    def unlist(self) -> None:
        """Forget the known names, for users who may not be allowed to see them."""
        self.data.pop("known", None)
        self.advice = type(self).advice


class AppNotFoundError(NotFoundError, kind="app"):
    """The platform has no app with that id."""

    advice = "Look up the app's id; the credentials must be allowed to read it."


class DeploymentNotFoundError(NotFoundError, kind="deployment"):
    """The app has no deployment with exactly that name."""

    advice = "Look up the deployment's name."


class TemplateNotFoundError(NotFoundError, kind="template"):
    """The deployment has no template with that id."""

    advice = "Leave the template id empty to release the newest template."


class NoTemplateError(NotFoundError, kind="template"):
    """The deployment has no template, or none that was released."""

    advice = "Create the deployment's first template."


class NoPreviousTemplateError(NotFoundError, kind="template"):
    """The history has no released template that was online before the current one."""

    advice = "Name the template to go back to with to_template."


class ClusterNotFoundError(NotFoundError, kind="cluster"):
    """The deployment does not have that cluster."""

    advice = "Add the cluster to the deployment first."


class ContainerNotFoundError(NotFoundError, kind="container"):
    """The template has no container of that name, or none at all."""

    advice = "Name a container that the template has."


class WorkloadError(RolloutError, category=Category.WORKLOAD):
    """The deployment's configuration cannot be read, or lacks what a release needs."""

    advice = "Complete the deployment's clusters and replicas; nothing was written."


class TemplateError(RolloutError, category=Category.TEMPLATE):
    """The template cannot be released."""

    advice = "Choose another template; nothing was written."


class ForeignTemplateError(TemplateError):
    """The template belongs to another deployment."""


class UnreadableTemplateError(TemplateError):
    """The template's text is not an apps/v1 Deployment."""


class UpgradeError(RolloutError, category=Category.TEMPLATE):
    """The upgrade did not leave exactly one new template to publish."""

    advice = "Nothing was published. Look at the deployment's templates."


class PlatformError(RolloutError, category=Category.REJECTED):
    """The platform refused or failed. `data` has `status`, `code` and `request_id`."""

    advice = "Give the request id to the cloud's operators."

    @property
    def may_pass(self) -> bool:
        """True if the platform may answer differently, or the run stopped after a write."""
        return self.passes or self.retryable or (self.result is not None and self.result.wrote)


class AuthenticationError(PlatformError, category=Category.UNAUTHENTICATED):
    """401: the platform does not accept the key, the signature, the clock or the nonce."""


class AccessDeniedError(PlatformError, category=Category.ACCESS_DENIED):
    """403: the key may not do this, or the cluster is not allowed for the app."""


class QuotaExceededError(AccessDeniedError, category=Category.QUOTA_EXCEEDED, passes=True):
    """403, sub-code 403001: the namespace's quota is not sufficient."""


class RejectedError(PlatformError, category=Category.REJECTED):
    """The platform refuses the request, and a repeat does not change that."""


class ConflictError(PlatformError, category=Category.CONFLICT):
    """409: another publish is running (409001, retryable), or an idempotency key was used before."""

    @property
    def may_pass(self) -> bool:
        """True if another publish is running, which ends by itself, and no publish followed."""
        return self.retryable


class OverloadedError(PlatformError, category=Category.OVERLOADED, retryable=True):
    """429 or 503: the platform is overloaded. `retry_after` has the seconds that it asked to wait."""


class ServerFaultError(PlatformError, category=Category.SERVER_FAULT, retryable=True):
    """500, 502, 504: the platform failed; a write may have taken effect."""


class UnreachableError(PlatformError, category=Category.UNREACHABLE, retryable=True):
    """No answer: refused, reset or timed out; a write may have taken effect."""


class UnusableAnswerError(PlatformError, category=Category.UNUSABLE_ANSWER):
    """The platform's answer does not follow its contract."""


class SkippedError(RolloutError, category=Category.CANCELLED):
    """The run is late, or a newer run supersedes it. No request was sent to the platform."""

    advice = "Start a new run to release it anyway."


class LockedError(RolloutError, category=Category.LOCKED, passes=True):
    """Another release of the same deployment and cluster is running. Nothing was written."""

    advice = "Wait for it to end, or cancel it."

    @classmethod
    def held(cls, locks: Sequence[str], holder: str, waited_seconds: float) -> "LockedError":
        """Return the error for `locks` that `holder` (a clause, empty if unknown) did not release."""
        waited = f" for {waited_seconds:.0f} s" if waited_seconds else ""
        if holder:
            return cls(f"another release holds this deployment{waited}: {holder}", locks=list(locks))
        advice = (
            "A killed release frees it within a minute. If it stays locked, the Prefect server has lost the "
            "lease: set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE to a storage that lasts, and run "
            f"`prefect gcl update '{locks[0]}' --active-slots 0`."
        )
        problem = f"this deployment is locked{waited}, and no running release holds it"
        return cls(problem, advice=advice, locks=list(locks))


class WindowClosedError(RolloutError, category=Category.WINDOW_CLOSED, passes=True):
    """A window is closed. `data`: `windows`, `block`, `clusters`, `reopens` (ISO 8601, if within a year)."""

    advice = (
        "Start again when the window is open, or with window_wait_seconds to wait for it. "
        "If the release cannot wait, give the reason as break_glass."
    )


class PlanChangedError(RolloutError, category=Category.CONFLICT):
    """The plan of the release has changed. `data` has `plan_hash` and `expect_plan`."""

    advice = "Nothing was written. Make a new dry run and check its plan."


class LockLostError(RolloutError, category=Category.LOCKED, passes=True):
    """The release must stop writing: its lock is lost, or another process continues the run."""

    advice = "Check whether another process continues this run."


class UnforeseenError(RolloutError, passes=True):
    """An unexpected error. The flow run's log has its `__cause__`."""

    advice = "Read the flow run's log, and report what it says to the maintainers."


class ReleaseError(RolloutError, category=Category.UNKNOWN_STATE, passes=True):
    """The release failed after its start. `verdict` is the last one on its clusters."""

    verdict: Verdict | None = None
    advice = "Look at the named pods."

    @property
    def diagnosis(self) -> Diagnosis:
        """Diagnosis of the verdict; without one, the problem itself."""
        return (self.verdict and self.verdict.diagnosis) or super().diagnosis

    @property
    def circumstances(self) -> str:
        """The data that operators ask for, such as `status 500, request id 7f1c`; may be empty."""
        shown = [key for key in _SHOWN if key in self.data]
        return ", ".join(f"{key.replace('_', ' ')} {one_line(self.data[key], 80)}" for key in shown)

    @property
    def _detail(self) -> str:
        diagnosis = self.verdict and self.verdict.diagnosis
        return f"{str(diagnosis).rstrip('.')}. " if diagnosis else ""


class ReleaseFailedError(ReleaseError):
    """The platform or a pod reports that the release cannot succeed."""

    @property
    def may_pass(self) -> bool:
        """True if the cause can be removed: the name of an image in a template cannot."""
        return self.diagnosis.category is not Category.INVALID_IMAGE_NAME


class ReleaseTimedOutError(ReleaseError):
    """Not all new pods were ready within the allowed polls."""

    advice = "Check the events of the named pods. If they only need longer, start again with more polls."


class RollbackFailedError(ReleaseError):
    """A release failed, and its rollback failed as well. The first failure is the `__cause__`."""

    advice = "Repair the deployment now; the report has the state of its clusters."
    found: Diagnosis | None = None  # of the rollback, if more is known than its problem
    cause: dict[str, Any] | None = None  # `to_dict()` of the first failure

    @property
    def diagnosis(self) -> Diagnosis:
        """Diagnosis of the rollback; `cause` has the release's."""
        return self.found or super().diagnosis

    @property
    def circumstances(self) -> str:
        """The data that operators ask for, such as `status 500, request id 7f1c`; may be empty."""
        shown = [key for key in _SHOWN if key in self.data]
        return ", ".join(f"{key.replace('_', ' ')} {one_line(self.data[key], 80)}" for key in shown)

    @property
    def _detail(self) -> str:
        cause = self.cause and Diagnosis.model_validate(self.cause["diagnosis"])
        both = (("Rollback", self.found), ("Release", cause))
        return "".join(f"{of}: {str(each).rstrip('.')}. " for of, each in both if each)

    def to_dict(self) -> dict[str, Any]:
        """Return the error for programs, with `cause`, the failure of the release, in the same form."""
        return {**super().to_dict(), "cause": self.cause}


class ReleaseCancelledError(ReleaseError, category=Category.CANCELLED):
    """A person cancelled the release. Earlier writes stay; nothing more is written."""

    advice = "Look at what is live; roll back to undo what was published."


class NotApprovedError(ReleaseCancelledError):
    """A person rejected the release (`data["rejected_by"]`), or nobody approved it in time."""

    advice = "Nothing was written. Start a new release to release it anyway."

    @property
    def rejected(self) -> bool:
        """True if a person rejected it."""
        return "rejected_by" in self.data

    @property
    def may_pass(self) -> bool:
        """True if nobody has answered yet, so a person can be asked again."""
        return not self.rejected and "refused" not in self.data
