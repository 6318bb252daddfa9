"""The plan of a batch: many releases, in waves, from one file or one JSON object.

A *wave* starts when every release of the earlier waves has ended; waves run in ascending order, and the
default is 1. `after` adds order inside a wave: the release starts after the named releases succeed, and
is skipped if one of them fails or is skipped. `after` can also name releases of an earlier wave, but not
of a later one.

The name of a release is its `name`, or `<app_id>/<deployment>`. Names are unique.

`Plan.of` and `load_plan` report all mistakes at once; `Plan.model_validate` raises pydantic's error with
the same mistakes. A `Plan` object has none, except that the blocks of its targets are not checked yet:
see `Plan.refuse_targets`. The only I/O here is reading the file.
"""

import heapq
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from prefect_rollout.batch.errors import Mistake, PlanError
from prefect_rollout.batch.mistakes import (
    between_releases,
    default_name,
    in_words,
    mistake,
    same_mistake,
)
from prefect_rollout.batch.yaml_lines import Document, read_yaml
from prefect_rollout.batch.yaml_lines import Path as FieldPath
from prefect_rollout.errors import InputError
from prefect_rollout.ids import Id
from prefect_rollout.release.images import CheckImages
from prefect_rollout.release.request import (
    DAY,
    DEFAULT_TARGET,
    ENVIRONMENT,
    ApprovalSeconds,
    Checked,
    Cluster,
    FlowRequest,
    Image,
    Name,
    NewestPolicy,
    OnFailure,
    Order,
    PollAttempts,
    PollSeconds,
    Reason,
    ReleaseRequest,
    Seconds,
)
from prefect_rollout.release.workload import digest
from prefect_rollout.text import one_line

LARGEST_FILE = 2**20  # bytes; a thousand releases with all their options take less than half
MOST_RELEASES = 1000


def _option(name: str) -> Any:
    """Return a field with the description from the release request, empty by default."""
    return Field(default=None, description=ReleaseRequest.model_fields[name].description)


class Options(Checked):
    """Options of one release or, in `defaults`, of all. Empty options are as in `deploy_latest_image`."""

    clusters: list[Cluster] | None = _option("clusters")
    reason: Reason | None = _option("reason")
    newest: NewestPolicy | None = _option("newest")
    pin_digest: bool | None = _option("pin_digest")
    check_images: CheckImages | None = _option("check_images")
    on_failure: OnFailure | None = _option("on_failure")
    order: Order | None = _option("order")
    canary: Cluster | None = _option("canary")
    pause_seconds: Seconds | None = _option("pause_seconds")
    poll_seconds: PollSeconds | None = _option("poll_seconds")
    poll_attempts: PollAttempts | None = _option("poll_attempts")
    grace_seconds: Seconds | None = _option("grace_seconds")
    lock_wait_seconds: Seconds | None = _option("lock_wait_seconds")


def _own_first(schema: dict[str, Any]) -> None:
    """Show the fields that only a release has, such as its app, before the common options."""
    fields = schema["properties"]
    schema["properties"] = {
        **{name: field for name, field in fields.items() if name not in Options.model_fields},
        **fields,
    }


class Release(Options):
    """One release of a plan; empty options are as in the plan's `defaults` and `target`."""

    model_config = ConfigDict(json_schema_extra=_own_first)

    app_id: Id = Field(description=ReleaseRequest.model_fields["app_id"].description)
    deployment: Name = Field(description=ReleaseRequest.model_fields["deployment"].description)
    template_id: Id | None = _option("template_id")
    images: dict[str, Image] | None = _option("images")
    target: str | None = Field(
        default=None,
        description="Block with the platform's credentials; by default the `target` of the plan.",
    )
    name: Annotated[str, Field(max_length=507)] = Field(
        default="",
        description="Name for `after` and the report; by default <app_id>/<deployment>.",
    )
    wave: Annotated[int, Field(strict=True, ge=1, le=MOST_RELEASES)] = Field(
        default=1, description="Waves run in ascending order; each starts when the one before has ended."
    )
    after: list[str] = Field(
        default=[],
        description="Names of releases of this or an earlier wave that must succeed first.",
    )

    @field_validator("name")
    @classmethod
    def _usable_name(cls, value: str) -> str:
        if not value.isprintable() or value != value.strip():
            raise ValueError("a name is printable text without outer blanks")
        return value

    @model_validator(mode="after")
    def _named(self) -> Self:
        self.name = self.name or default_name(self.app_id, self.deployment)
        return self


def _one_sentence(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        raise ValueError(
            f"a failure budget is a number from 0 to {MOST_RELEASES}, or a percentage from 0% to 100%"
        ) from None


FailureBudget = Annotated[
    Annotated[int, Field(strict=True, ge=0, le=MOST_RELEASES)]
    | Annotated[str, Field(pattern=r"^(100|[1-9]?[0-9])%$")],
    WrapValidator(_one_sentence),
]


@dataclass(frozen=True)
class Ready:
    """The next actions of a batch.

    Attributes:
        start: releases to start now, in the order of the plan.
        skipped: releases that never start, by name, each with the reason as a clause. A skipped
            release stays skipped, but its reason may change to a more direct one.
        wave: the current wave; `None` if nothing is left to start or to wait for.
    """

    start: list[Release] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    wave: int | None = None


class Plan(Checked):
    """A batch of releases, in waves."""  # the form in the Prefect UI shows this

    releases: list[Release] = Field(
        min_length=1, max_length=MOST_RELEASES, description="What is released, in any order."
    )
    target: str = Field(
        default="",
        description=f"Block with the credentials, as type-slug/name, for all releases that name none; "
        f"{ENVIRONMENT} for the K8S_ variables. Empty for {DEFAULT_TARGET}, or the variables if nobody saved "
        "it.",
    )
    max_parallel: Annotated[int, Field(strict=True, ge=1, le=500)] = Field(
        default=10, description="Releases that run at once."
    )
    failure_budget: FailureBudget = Field(
        default=0,
        description=(
            "When more releases than this have failed, no new one is started: a number, or a percentage "
            "of all releases, rounded down, such as 10%."
        ),
    )
    soak_seconds: Seconds = Field(
        default=0, description="Seconds between the end of a wave and the start of the next."
    )
    defaults: Options = Field(default=Options(), description="Options of all releases that do not set them.")

    # The plan's source, for mistakes that are found later.
    _document: Document = PrivateAttr(default_factory=Document)
    _source: str = PrivateAttr(default="the plan")

    @classmethod
    def of(cls, /, **values: Any) -> Self:
        """Return the plan made of `values`, such as a flow's parameters.

        Raises:
            PlanError: the plan has mistakes; all are listed, without lines.
        """
        return cls._of_document(Document(value=values), "the plan")

    @classmethod
    def of_parameter(cls, value: Any) -> Self:
        """Return the plan in a flow's parameter, which arrives as JSON from the Prefect API.

        Raises:
            InputError: the value is not an object.
            PlanError: the plan has mistakes; all are listed.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise InputError("plan: should be an object with a list of releases", field="plan")
        return cls.of(**value)

    @classmethod
    def _of_document(cls, document: Document, source: str) -> Self:
        mistakes = [_located(flaw.path, flaw.problem, flaw.line) for flaw in document.flaws]
        values = {} if document.value is None else document.value
        plan = None
        try:
            if document.value is not None or not mistakes:
                plan = cls.model_validate(values)
        except ValidationError as error:
            problems = in_words(error, values, _keys)
            mistakes += [_located(path, why, document.line(path)) for path, why in problems.items()]
        if plan is None or mistakes:
            raise PlanError.of(sorted(mistakes, key=lambda each: each["line"] or 0), source)
        plan._document, plan._source = document, source
        return plan

    @model_validator(mode="wrap")
    @classmethod
    def _sound(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """Report mistakes between releases together with the mistakes in each."""
        found = []
        plan: Self | None = None
        try:
            plan = read(data)
        except ValidationError as error:
            found += [same_mistake(details) for details in error.errors(include_url=False)]
        raw = plan.__dict__ if plan else data if isinstance(data, dict) else {}
        found += [mistake(path, problem) for path, problem in between_releases(raw)]
        if plan and not found:
            for number, release in enumerate(plan.releases):
                try:
                    plan.request(release)
                except InputError as error:
                    found.append(mistake(("releases", number), error.problem))
        if plan is None or found:
            raise ValidationError.from_exception_data(cls.__name__, found, hide_input=True)
        return plan

    @property
    def budget(self) -> int:
        """The number of releases that may fail before no new one is started."""
        if isinstance(self.failure_budget, int):
            return self.failure_budget
        return len(self.releases) * int(self.failure_budget.removesuffix("%")) // 100

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the content of the plan."""
        return digest(self.model_dump(mode="json"))[:12]

    @property
    def procedure(self) -> dict[str, Any]:
        """The options that decide if and when each release starts."""
        return {
            "waves": [[release.wave, release.name, sorted(release.after)] for release in self.releases],
            "max_parallel": self.max_parallel,
            "failure_budget": self.failure_budget,
            "soak_seconds": self.soak_seconds,
        }

    @cached_property
    def waves(self) -> list[list[Release]]:
        """The releases by wave, ascending. Inside a wave, in the plan's order with predecessors first."""
        numbers = {release.name: number for number, release in enumerate(self.releases)}
        order = TopologicalSorter(
            {numbers[release.name]: [numbers[name] for name in release.after] for release in self.releases}
        )
        order.prepare()
        waves: dict[int, list[Release]] = {}
        free: list[tuple[int, int]] = []
        while order.is_active():
            for number in order.get_ready():
                heapq.heappush(free, (self.releases[number].wave, number))
            wave, number = heapq.heappop(free)
            waves.setdefault(wave, []).append(self.releases[number])
            order.done(number)
        return list(waves.values())

    def ready(self, done: Collection[str], failed: Collection[str], running: Collection[str]) -> Ready:
        """Return what may start now, given the names of the releases in each state.

        Releases that timed out, crashed or were cancelled count as failed.
        """
        succeeded, failing, active = set(done), set(failed), set(running)
        failures = sum(release.name in failing for release in self.releases)
        skipped: dict[str, str] = {}
        start: list[Release] = []
        current: int | None = None
        room = self.max_parallel - len(active)
        for release in (release for wave in self.waves for release in wave):
            if release.name in active:
                current = release.wave if current is None else current
                continue
            if release.name in failing or release.name in succeeded:
                continue
            reason = next(self._reasons_to_skip(release, failing, skipped, failures), None)
            if reason:
                skipped[release.name] = reason
                continue
            current = release.wave if current is None else current
            if release.wave == current and len(start) < room and succeeded.issuperset(release.after):
                start.append(release)
        return Ready(start=start, skipped=skipped, wave=current)

    def _reasons_to_skip(
        self, release: Release, failed: set[str], skipped: Mapping[str, str], failures: int
    ) -> Iterator[str]:
        for name in release.after:
            if name in failed:
                yield f"{one_line(name, 120)} failed"
            if name in skipped:
                yield f"{one_line(name, 120)} was skipped"
        if failures > self.budget:
            yield f"{failures} failed, more than the failure budget of {self.budget}"

    def request(self, release: Release) -> ReleaseRequest:
        """Return the request for one release of this plan."""
        values: dict[str, Any] = {"target": self.target}
        for options in (self.defaults, release):
            values |= options.model_dump(exclude={"name", "wave", "after"}, exclude_none=True)
        return ReleaseRequest.of(**values)

    @property
    def targets(self) -> list[str]:
        """The targets of the plan, each once."""
        return list(dict.fromkeys(release.target or self.target for release in self.releases))

    def refuse_targets(self, problems: Mapping[str, str]) -> None:
        """Refuse the plan if targets cannot be used; `problems` has the reason for each of them.

        Raises:
            PlanError: `problems` is not empty; the error has the line of each field with such a target.
        """
        places: dict[FieldPath, str] = {}
        for number, release in enumerate(self.releases):
            used = release.target or self.target
            if used in problems:
                places[("releases", number, "target") if release.target else ("target",)] = problems[used]
        self.refuse(places)

    def refuse(self, places: Mapping[FieldPath, str]) -> None:
        """Refuse the plan if it has mistakes; `places` has the mistake at each path.

        Raises:
            PlanError: `places` is not empty; the error has the line of each path.
        """
        if places:
            mistakes = [_located(path, why, self._document.line(path)) for path, why in places.items()]
            raise PlanError.of(mistakes, self._source)


BatchApproval = Literal["none", "before-release", "between-waves"]
RunIn = Literal["process", "work-pool"]


class BatchRequest(FlowRequest):
    """A request to release a batch."""

    plan: Plan = Field(
        description="Releases in waves, their defaults, the failure budget and how many run at once."
    )
    run_in: RunIn = Field(
        default="process",
        description="process runs all releases in one process; work-pool starts a run of the child "
        "deployment for each.",
    )
    child_deployment: str = Field(
        default="deploy-latest-image/batch-release",
        pattern=r"^[^/]+/[^/]+$",
        max_length=500,
        description="Deployment of the flow deploy-latest-image for work-pool, as flow/deployment.",
    )
    only_failed: bool = Field(
        default=False, description="Leave out releases that succeeded in earlier batches of the same plan."
    )
    approval: BatchApproval = Field(
        default="none",
        description="Suspend the run until a person approves in the Prefect UI: before-release before the "
        "first release, between-waves before each later wave.",
    )
    approval_seconds: ApprovalSeconds = DAY

    @field_validator("plan", mode="before")
    @classmethod
    def _all_mistakes(cls, value: Any) -> Plan:
        return Plan.of_parameter(value)


def load_plan(path: Path | str) -> Plan:
    """Return the plan in a YAML or JSON file.

    Raises:
        PlanError: the file cannot be read, or has mistakes; all are listed, each with its line.
    """
    source = f"the plan {one_line(path, 200)}"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        why = getattr(error, "strerror", None) or error
        raise PlanError(
            f"{source} cannot be read: {one_line(why, 160)}", advice="Name a readable file."
        ) from None
    if len(raw) > LARGEST_FILE:
        raise PlanError.of([Mistake(line=None, field="", problem="the file is larger than 1 MiB")], source)
    return Plan._of_document(read_yaml(raw), source)


def _located(path: FieldPath, problem: str, line: int | None) -> Mistake:
    return Mistake(line=line, field=".".join(one_line(part, 80) for part in path), problem=problem)


def _keys(path: FieldPath) -> list[str]:
    if "newest" in path[:-1]:
        return list(NewestPolicy.model_fields)
    models: dict[int, type[Checked]] = {1: Plan, 2: Options}
    return list(models.get(len(path), Release).model_fields)
