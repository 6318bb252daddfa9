"""What can go wrong, as one tree.

RolloutError
├── InputError                  a value that the caller gave cannot be used; nothing was asked
│   └── PlanError               a plan of releases has mistakes; all are listed
├── ConfigurationError          a block, environment variable or file is missing or unusable
├── NotFoundError               the platform does not have what was named
│   ├── AppNotFoundError
│   ├── DeploymentNotFoundError
│   ├── TemplateNotFoundError   the template id that was asked for is unknown
│   ├── NoTemplateError         the deployment has no template, or none that was released
│   ├── NoPreviousTemplateError the history has no released template to go back to
│   ├── ClusterNotFoundError
│   └── ContainerNotFoundError
├── MetaDataError               the deployment's metaData cannot be read or lacks what a release needs
├── TemplateError               the template cannot be released
│   ├── ForeignTemplateError    it belongs to another deployment
│   └── UnreadableTemplateError it is not an apps/v1 Deployment
├── UpgradeError                the upgrade did not leave exactly one new template
├── PlatformError               the platform did not do what it was asked
│   ├── AuthenticationError     401
│   ├── AccessDeniedError       403
│   │   └── QuotaExceededError  403, sub-code 403001
│   ├── RejectedError           400 and other refusals that a repeat does not change
│   ├── ConflictError           409
│   ├── OverloadedError         429 and 503, perhaps with a time to wait
│   ├── ServerFaultError        500, 502, 504: a write may have taken effect
│   ├── UnreachableError        no answer: refused, reset, timed out: a write may have taken effect
│   └── UnusableAnswerError     an answer that is not what the contract says
├── SkippedError                the run came too late, or a newer one takes its place; nothing was asked
├── LockedError                 another release of the same deployment and cluster is running
├── WindowClosedError           a release window is closed, and it may not start now
├── PlanChangedError            what a release would do is not what its dry run showed any more
├── LockLostError               the release's lock, or its right to go on, was lost: it stops before a write
├── BatchFailedError            not all releases of a batch were released
├── UnforeseenError             something of ours or of a library's went wrong that nobody foresaw
└── ReleaseError                the release was started and did not end well
    ├── ReleaseFailedError      the platform or a pod says that it cannot succeed
    ├── ReleaseTimedOutError    the pods were not all ready within the polls allowed
    ├── RollbackFailedError     what had failed could not be rolled back either
    └── ReleaseCancelledError   a person cancelled it
        └── NotApprovedError    a person rejected it, or nobody approved it in time; nothing was written

Every error carries `step` (the step of the release), `problem`, `advice` (what the user can do next),
`retryable` (whether the same call may succeed later), `retry_after` (seconds), `data` (status, code,
request_id, cluster, template_id and the like, where known) and `diagnosis` (category, cluster, pod and
what to do next, for people and programs alike). `retry_helps` says whether a retry of the run that it ended
can end otherwise; whoever offers a retry asks that, so no `advice` speaks of one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict

from prefect_rollout.diagnosis import Category, Diagnosis
from prefect_rollout.text import one_line, when

if TYPE_CHECKING:
    from prefect_rollout.batch import BatchResult
    from prefect_rollout.models import ReleaseResult
    from prefect_rollout.verdict import Verdict

UNLISTED = "names-unlisted"
"""Tag of a flow run whose errors do not list which names there are: who started it may not know them."""

# What stands in the sentence itself; the rest of `data` is for programs.
_SHOWN = {"status": "status", "code": "code", "request_id": "request id"}


class RolloutError(Exception):
    """The root of the tree.

    Args:
        problem: what was wrong, as a clause without a final period.
        advice: what the user can do, as a sentence; defaults to the class's own.
        retryable: whether the same call may succeed later; defaults to the class's own.
        retry_after: seconds that the platform asked to wait, if it did.
        data: what is known of the circumstances; `None` values are dropped.
    """

    category: ClassVar[Category] = Category.INTERNAL
    passes: ClassVar[bool] = False
    advice: str = "Read the flow run's log for the circumstances."
    retryable: bool = False

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
        if advice is not None:
            self.advice = advice
        if retryable is not None:
            self.retryable = retryable
        self.retry_after = retry_after
        self.data = {name: value for name, value in data.items() if value is not None}
        self.result: ReleaseResult | None = None
        self.batch: BatchResult | None = None
        self._live: str | None = None
        self.live_at: datetime | None = None

    @property
    def live(self) -> str | None:
        """What each cluster ran at `live_at`, the moment when this was set; `None` if nobody looked."""
        return self._live

    @live.setter
    def live(self, live: str | None) -> None:
        self._live, self.live_at = live, datetime.now(UTC)

    def __str__(self) -> str:
        """`step: problem (status …, request id …). Advice. Live at …: ….`, on one line."""
        where = f"{self.step}: " if self.step else ""
        known = [
            f"{label} {one_line(self.data[name], 80)}" for name, label in _SHOWN.items() if name in self.data
        ]
        circumstances = f" ({', '.join(known)})" if known else ""
        live = f" Live at {when(self.live_at)}: {self.live}." if self.live else ""
        advice = f"{self.advice} {self.next_step}".rstrip()
        return f"{where}{self.problem}{circumstances}. {self._told}{advice}{live}"

    @property
    def _told(self) -> str:
        """What stands between the problem and the advice, with its final period and a blank."""
        return ""

    @property
    def may_pass(self) -> bool:
        """True if the cause can pass, or be removed, while the request stays the same."""
        return self.passes

    @property
    def retry_helps(self) -> bool:
        """True if a retry of the run that this error ended can end otherwise."""
        run = self.batch or self.result
        return run is not None and not run.over and self.may_pass

    @property
    def next_step(self) -> str:
        """The next action for the run itself, as a sentence; empty if there is none."""
        if self.retry_helps:
            return "Retry the run to continue where it stopped."
        over = self.result is not None and self.result.rolled_back
        return "This run is over: start a new release once that is fixed." if over else ""

    @property
    def diagnosis(self) -> Diagnosis:
        """What is wrong and what to do next, in the shape that the report and the answers show."""
        cluster = self.data.get("cluster")
        told = Diagnosis.of(self.category, summary=self.problem, cluster=cluster and str(cluster))
        return told.model_copy(update={"resolution": self.advice})

    def to_dict(self) -> dict[str, Any]:
        """The error for programs: `type`, `step`, `message`, `retryable`, `advice`, `diagnosis`, data.

        `retry_helps` and `next_step` concern the run that it ended.
        """
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


class InputError(RolloutError):
    """A value that the caller gave cannot be used. Raised before anything is asked or written."""

    category = Category.INVALID_INPUT
    advice = "Correct the value and start again; nothing was written."


class Mistake(TypedDict):
    """One mistake of a plan.

    Attributes:
        line: line of the file, from 1; `None` where there is no file.
        field: path of the field, such as `releases.3.app_id`, counted from 0; empty for the whole plan.
        problem: what is wrong, as a clause.
    """

    line: int | None
    field: str
    problem: str


class PlanError(InputError):
    """A plan of releases has mistakes; nothing was started. `data["mistakes"]` has every `Mistake`."""

    advice = "Correct the plan and start again; nothing was started."
    shown: ClassVar[int] = 100  # a screen or a log holds no more; `data` has the rest

    @classmethod
    def of(cls, mistakes: Sequence[Mistake], plan: str = "the plan") -> Self:
        """The error for those mistakes of `plan`, such as `the plan release.yaml`."""
        safe = [
            Mistake(
                line=mistake["line"],
                field=one_line(mistake["field"], 200),
                problem=one_line(mistake["problem"]),
            )
            for mistake in mistakes
        ]
        count = "a mistake" if len(safe) == 1 else f"{len(safe)} mistakes"
        return cls(f"{one_line(plan)} has {count}", mistakes=safe)

    def __str__(self) -> str:
        """`problem:`, then each mistake on a line of its own, then the advice."""
        mistakes: list[Mistake] = self.data.get("mistakes", [])
        if not mistakes:
            return super().__str__()
        where = f"{self.step}: " if self.step else ""
        lines = [f"{where}{self.problem}:"]
        for mistake in mistakes[: self.shown]:
            line = f"line {mistake['line']}" if mistake["line"] else ""
            lines.append(
                "  " + ": ".join(part for part in (line, mistake["field"], mistake["problem"]) if part)
            )
        if len(mistakes) > self.shown:
            lines.append(f"  and {len(mistakes) - self.shown} more")
        return "\n".join([*lines, self.advice])


class ConfigurationError(RolloutError):
    """A block, an environment variable or a file is missing or unusable."""

    category = Category.CONFIGURATION
    advice = "Run `prefect-rollout configure`, or correct the block in the Prefect UI."

    @property
    def may_pass(self) -> bool:
        """True if nothing is misconfigured: the Prefect API did not answer."""
        return self.retryable or bool(self.data.get("prefect_api"))


class NotFoundError(RolloutError):
    """The platform does not have what was named.

    Args:
        kind: the noun, such as `deployment`.
        name: what was asked for.
        known: names that exist, nearest first; the advice lists them.
        data: further data; see `RolloutError`.
    """

    category = Category.NOT_FOUND
    kind: ClassVar[str] = "object"

    @classmethod
    def named(cls, name: object, known: Sequence[str] = (), where: str = "", **data: Any) -> "NotFoundError":
        """The error for `name`, which `where` (such as `in app 3290`) does not have."""
        shown = [one_line(other, 80) for other in known]
        advice = f"There {'is' if len(shown) == 1 else 'are'}: {', '.join(shown)}." if shown else None
        problem = f"there is no {cls.kind} {one_line(name, 120)!r}{where and ' ' + where}"
        return cls(problem, advice=advice, known=shown or None, **data)

    def unlist(self) -> None:
        """Forget which names there are, for somebody who may not know them."""
        self.data.pop("known", None)
        self.advice = type(self).advice


class AppNotFoundError(NotFoundError):
    """The platform has no app with that id."""

    kind = "app"
    advice = "Look up the app's id in the cloud's console; the key must belong to its project."


class DeploymentNotFoundError(NotFoundError):
    """The app has no deployment with exactly that name."""

    kind = "deployment"
    advice = "Look up the deployment's name in the cloud's console."


class TemplateNotFoundError(NotFoundError):
    """The deployment has no template with that id."""

    kind = "template"
    advice = "Leave the template id empty to release the newest template."


class NoTemplateError(NotFoundError):
    """The deployment has no template, or none that was released."""

    kind = "template"
    advice = "Create the deployment's first template in the cloud's console."


class NoPreviousTemplateError(NotFoundError):
    """The publish history has no released template that was online before the present one."""

    kind = "template"
    advice = "Name the template to go back to with to_template."


class ClusterNotFoundError(NotFoundError):
    """The deployment's metaData does not have that cluster."""

    kind = "cluster"
    advice = "Add the cluster to the deployment in the cloud's console first."


class ContainerNotFoundError(NotFoundError):
    """The template has no container of that name, or none at all."""

    kind = "container"
    advice = "Name a container that the template has."


class MetaDataError(RolloutError):
    """The deployment's metaData cannot be read, or lacks what a release needs."""

    category = Category.META_DATA
    advice = "Complete the deployment's clusters and replicas in the cloud's console; nothing was written."


class TemplateError(RolloutError):
    """The template cannot be released."""

    category = Category.TEMPLATE
    advice = "Choose another template; nothing was written."


class ForeignTemplateError(TemplateError):
    """The template belongs to another deployment."""


class UnreadableTemplateError(TemplateError):
    """The template's text is not an apps/v1 Deployment."""


class UpgradeError(RolloutError):
    """The upgrade did not leave exactly one new template to publish."""

    category = Category.TEMPLATE
    advice = "Nothing was published. Look at the deployment's templates in the cloud's console."


class PlatformError(RolloutError):
    """The platform did not do what it was asked. `data` has `status`, `code` and `request_id`."""

    category = Category.REJECTED
    advice = "Give the request id to the cloud's operators."

    @property
    def may_pass(self) -> bool:
        """True if the platform may answer otherwise, or stopped a run that was half done."""
        return self.passes or self.retryable or (self.result is not None and self.result.wrote)


class AuthenticationError(PlatformError):
    """401: the platform does not accept the key, the signature, the clock or the nonce."""

    category = Category.UNAUTHENTICATED
    advice = "Check the block's key id and secret key with `prefect-rollout configure`."


class AccessDeniedError(PlatformError):
    """403: the key may not do this, or the cluster is not allowed for the app."""

    category = Category.ACCESS_DENIED
    advice = "Ask the app's administrators for a key with the right to release it there."


class QuotaExceededError(AccessDeniedError):
    """403, sub-code 403001: the namespace's quota does not suffice."""

    category = Category.QUOTA_EXCEEDED
    passes = True
    advice = "Free or raise the namespace's quota."


class RejectedError(PlatformError):
    """The platform refuses the request, and a repeat would change nothing."""

    category = Category.REJECTED
    advice = "Correct what the message names, then start again."


class ConflictError(PlatformError):
    """409: another publish is running (409001, retryable), or an idempotency key was used before."""

    category = Category.CONFLICT
    advice = "Wait for the other publish to end."

    @property
    def may_pass(self) -> bool:
        """True if another publish is running, which ends by itself, and none has followed."""
        return self.retryable


class OverloadedError(PlatformError):
    """429 or 503: the platform is overloaded; `retry_after` holds the seconds it asked for."""

    category = Category.OVERLOADED
    retryable = True
    advice = "Wait until the cloud has recovered."


class ServerFaultError(PlatformError):
    """500, 502, 504: the platform failed; a write may have taken effect."""

    category = Category.SERVER_FAULT
    retryable = True
    advice = "Wait until the cloud has recovered."


class UnreachableError(PlatformError):
    """No answer: refused, reset or timed out; a write may have taken effect."""

    category = Category.UNREACHABLE
    retryable = True
    advice = "Check the network and the block's api_url."


class UnusableAnswerError(PlatformError):
    """The platform answered something else than its contract says."""

    category = Category.UNUSABLE_ANSWER
    advice = "Check that the block's api_url is the cloud's Open API and not a login page or a proxy."


class SkippedError(RolloutError):
    """The run came too late, or a newer one takes its place. Nothing was asked of the platform."""

    category = Category.CANCELLED
    advice = "Start a new run to release all the same."


class LockedError(RolloutError):
    """Another release of the same deployment and cluster is running. Nothing was written."""

    category = Category.LOCKED
    passes = True
    advice = "Wait for it to end, or cancel it."

    @classmethod
    def held(cls, locks: Sequence[str], holder: str, waited_seconds: float) -> "LockedError":
        """The error for `locks` that `holder` (told as a clause, empty if unknown) did not give back."""
        waited = f" for {waited_seconds:.0f} s" if waited_seconds else ""
        if holder:
            return cls(f"another release holds this deployment{waited}: {holder}", locks=list(locks))
        return cls(
            f"this deployment is locked{waited}, and no release that runs holds it",
            advice=(
                "A killed release frees it within a minute. If it stays locked, the Prefect server has "
                "lost the lease: set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE to a storage that lasts, and "
                f"run `prefect gcl update '{locks[0]}' --active-slots 0`."
            ),
            locks=list(locks),
        )


class WindowClosedError(RolloutError):
    """A release window is closed. `data` has `windows`, `block`, `clusters` and `reopens` (ISO 8601).

    `reopens` is missing where that is more than a year away.
    """

    category = Category.WINDOW_CLOSED
    passes = True
    advice = (
        "Wait until the window is open; or start again with window_wait_seconds, to wait for that, "
        "or with the reason why it cannot wait as break_glass."
    )


class PlanChangedError(RolloutError):
    """What the release would do is not what was planned. `data` has `plan_hash` and `expect_plan`."""

    category = Category.CONFLICT
    advice = "Make a dry run again, and look at what it shows; nothing was written."


class LockLostError(RolloutError):
    """The release may not write any more: its lock is gone, or someone else goes on with the run."""

    category = Category.LOCKED
    passes = True
    advice = "See whether another process continues this run."


class BatchFailedError(RolloutError):
    """Not all releases of a batch were released; `batch` has a row for each."""

    category = Category.BATCH
    advice = (
        "Fix the causes that the releases name; a new batch of the same plan with only_failed leaves out "
        "what was released."
    )

    @property
    def may_pass(self) -> bool:
        """True if any of its releases can end otherwise."""
        return self.batch is not None and any(row.may_pass for row in self.batch.releases)


class UnforeseenError(RolloutError):
    """Something went wrong that nobody foresaw; its `__cause__` says what, in the flow run's log."""

    passes = True
    advice = "Read the flow run's log, and report what it says to the maintainers."


class ReleaseError(RolloutError):
    """The release was started and did not end well. `verdict` is the last look at its clusters."""

    category = Category.UNKNOWN_STATE
    passes = True
    verdict: "Verdict | None" = None
    advice = "Look at the named pods in the cloud's console."

    @property
    def diagnosis(self) -> Diagnosis:
        """The verdict's; where none was reached, what the problem says."""
        return (self.verdict and self.verdict.diagnosis) or super().diagnosis

    @property
    def _told(self) -> str:
        diagnosis = self.verdict and self.verdict.diagnosis
        return f"{str(diagnosis).rstrip('.')}. " if diagnosis else ""


class ReleaseFailedError(ReleaseError):
    """The platform or a pod says that the release cannot succeed."""

    @property
    def may_pass(self) -> bool:
        """True if the cause can be removed: the name of an image in a template cannot be."""
        return self.diagnosis.category is not Category.INVALID_IMAGE_NAME


class ReleaseTimedOutError(ReleaseError):
    """The new pods were not all ready within the polls allowed."""

    advice = (
        "Look at the named pods' events in the cloud's console; if they only need longer, "
        "start again with more polls."
    )


class RollbackFailedError(ReleaseError):
    """A release failed, and rolling it back failed as well. The first failure is its `__cause__`.

    Attributes:
        found: what is wrong with the rollback, where more is known of it than its problem.
        cause: the first failure, as by `to_dict`.
    """

    advice = "Put the deployment right in the cloud's console now; the clusters' state stands in the report."
    found: Diagnosis | None = None
    cause: dict[str, Any] | None = None

    @property
    def diagnosis(self) -> Diagnosis:
        """The diagnosis of the rollback; `cause` has the release's."""
        return self.found or super().diagnosis

    @property
    def _told(self) -> str:
        cause = self.cause and Diagnosis.model_validate(self.cause["diagnosis"])
        told = (("Rollback", self.found), ("Release", cause))
        return "".join(f"{of}: {str(each).rstrip('.')}. " for of, each in told if each)

    def to_dict(self) -> dict[str, Any]:
        """As of every error, and `cause`: the failure of the release, in the same shape."""
        return {**super().to_dict(), "cause": self.cause}


class ReleaseCancelledError(ReleaseError):
    """A person cancelled the release. What was written by then stays; nothing more is written."""

    category = Category.CANCELLED
    advice = "Look at what is live; roll back to undo what was published."


class NotApprovedError(ReleaseCancelledError):
    """A person rejected it (`data["rejected_by"]`), or nobody approved it in time; nothing was written."""

    advice = "Nothing was written. Start a new release if it shall go out after all."

    @property
    def rejected(self) -> bool:
        """Whether a person rejected it."""
        return "rejected_by" in self.data

    @property
    def may_pass(self) -> bool:
        """True if somebody can be asked again: whoever has answered is not."""
        return not self.rejected and "refused" not in self.data
