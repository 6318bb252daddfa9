"""The plan of a batch: many releases, in waves, from one file or one JSON object.

A *wave* starts when every release of the waves before it has ended; waves run in ascending order and
are 1 where nothing is said. `after` adds order inside a wave: the release starts when those named have
succeeded, and is skipped when one of them failed or was skipped. Naming a release of an earlier wave
is allowed and adds just that condition; naming one of a later wave is a mistake.

A release is named by its `name`, or else by `<app_id>/<deployment>`; no two share a name.

`Plan.of` and `load_plan` report all mistakes at once; `Plan.model_validate` raises pydantic's error with
the same mistakes. A plan that exists has none, but for targets whose blocks nobody has looked up yet:
`Plan.refuse_targets`. Nothing is asked or written here; the only I/O is the reading of the file.
"""

import difflib
import hashlib
import heapq
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
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
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefect_rollout import yaml_lines
from prefect_rollout.errors import InputError, Mistake, PlanError
from prefect_rollout.models import (
    DEFAULT_TARGET,
    ENVIRONMENT,
    ApprovalSeconds,
    Checked,
    Cluster,
    Id,
    Image,
    LateMinutes,
    Name,
    OnFailure,
    Order,
    Person,
    PlanHash,
    PollAttempts,
    PollSeconds,
    Reason,
    ReleaseRequest,
    Seconds,
    WindowWait,
)
from prefect_rollout.text import one_line

LARGEST_FILE = 2**20  # bytes; a thousand releases with all their options take less than half
MOST_RELEASES = 1000


class Options(Checked):
    """What may be said for one release or, in `defaults`, for all; what is empty is as in `deploy`."""

    clusters: list[Cluster] | None = Field(
        default=None,
        description="Release only these clusters; an empty list for all that the metaData names.",
    )
    reason: Reason | None = Field(
        default=None, description="Why; kept in the new template's description and in the report."
    )
    on_failure: OnFailure | None = Field(
        default=None,
        description="stop leaves a failed release as it is; rollback puts back what it touched.",
    )
    order: Order | None = Field(
        default=None,
        description="together publishes everywhere, then watches; one-by-one goes on when one is ready.",
    )
    canary: Cluster | None = Field(
        default=None, description="Cluster that is published and watched before all others."
    )
    pause_seconds: Seconds | None = Field(
        default=None, description="Seconds between one cluster's being ready and the next publish."
    )
    poll_seconds: PollSeconds | None = Field(default=None, description="Seconds between looks at the pods.")
    poll_attempts: PollAttempts | None = Field(
        default=None, description="Looks at the pods before the release counts as timed out."
    )
    grace_seconds: Seconds | None = Field(
        default=None, description="Seconds that a new pod may be in trouble before the release has failed."
    )
    lock_wait_seconds: Seconds | None = Field(
        default=None, description="Seconds to wait for another release of the deployment; 0 refuses at once."
    )


def _own_first(schema: dict[str, Any]) -> None:
    """Has a form begin with what a release has of its own, such as its app."""
    fields = schema["properties"]
    schema["properties"] = {
        **{name: field for name, field in fields.items() if name not in Options.model_fields},
        **fields,
    }


class Release(Options):
    """One release of a plan; what is empty is as the plan's `defaults` and `target` say."""

    model_config = ConfigDict(json_schema_extra=_own_first)

    app_id: Id = Field(description="Id of the app, such as 3290.")
    deployment: Name = Field(description="Exact name of the deployment, such as qapm-home.")
    template_id: Id | None = Field(
        default=None, description="Template to release from; empty for the newest released one."
    )
    images: dict[str, Image] | None = Field(
        default=None, description="Images in place of the template's, by container."
    )
    target: str | None = Field(default=None, description="Block with the credentials, as type-slug/name.")
    name: Annotated[str, Field(max_length=507)] = Field(
        default="",
        description="Name for `after` and the report; <app_id>/<deployment> if empty.",
    )
    wave: Annotated[int, Field(strict=True, ge=1, le=MOST_RELEASES)] = Field(
        default=1, description="Waves run in ascending order, each when the one before has ended."
    )
    after: list[str] = Field(
        default=[],
        description="Names of releases of this wave or an earlier one that have to succeed first.",
    )

    @field_validator("name")
    @classmethod
    def _usable_name(cls, value: str) -> str:
        if not value.isprintable() or value != value.strip():
            raise ValueError("a name is printable text without outer blanks")
        return value

    @model_validator(mode="after")
    def _named(self) -> Self:
        self.name = self.name or _default_name(self.app_id, self.deployment)
        return self


def _default_name(app_id: object, deployment: object) -> str:
    return f"{app_id}/{deployment}"


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
    """What a batch can do next.

    Attributes:
        start: releases to start now, in the order of the plan.
        skipped: releases that will never start, by name, each with the reason as a clause. Once
            skipped, a release stays so; its reason may become a nearer one.
        wave: the wave that runs or is to be started; `None` when nothing is left to start or to end.
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
    defaults: Options = Field(
        default=Options(), description="Options of all releases that do not say otherwise."
    )

    # Where the plan was read, for mistakes that are found later.
    _document: yaml_lines.Document = PrivateAttr(default_factory=yaml_lines.Document)
    _source: str = PrivateAttr(default="the plan")

    @classmethod
    def of(cls, /, **values: Any) -> Self:
        """The plan made of `values`, such as a flow's parameters.

        Raises:
            PlanError: listing every mistake, without lines.
        """
        return cls._of_document(yaml_lines.Document(value=values), "the plan")

    @classmethod
    def of_parameter(cls, value: Any) -> Self:
        """The plan that a flow's parameter is; it arrives as JSON from the Prefect API.

        Raises:
            InputError: it is none.
            PlanError: it has mistakes; all are listed.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise InputError("plan: should be an object with a list of releases", field="plan")
        return cls.of(**value)

    @classmethod
    def _of_document(cls, document: yaml_lines.Document, source: str) -> Self:
        mistakes = [_mistake(flaw.path, flaw.problem, flaw.line) for flaw in document.flaws]
        values = {} if document.value is None else document.value
        plan = None
        try:
            if document.value is not None or not mistakes:
                plan = cls.model_validate(values)
        except ValidationError as error:
            mistakes += [
                _mistake(path, problem, document.line(path)) for path, problem in _told(error, values).items()
            ]
        if plan is None or mistakes:
            raise PlanError.of(sorted(mistakes, key=lambda mistake: mistake["line"] or 0), source)
        plan._document, plan._source = document, source
        return plan

    @model_validator(mode="wrap")
    @classmethod
    def _sound(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """Reports what is wrong between releases together with what is wrong in each."""
        found: list[InitErrorDetails] = []
        plan: Self | None = None
        try:
            plan = read(data)
        except ValidationError as error:
            found += [_again(details) for details in error.errors(include_url=False)]
        raw = plan.__dict__ if plan else data if isinstance(data, dict) else {}
        outlines = _outlines(raw)
        for path, problem in _between(outlines):
            found.append(InitErrorDetails(type=_custom(problem), loc=path, input=None))
        if plan and not found:
            for number, release in enumerate(plan.releases):
                try:
                    plan.request(release)
                except InputError as error:
                    found.append(
                        InitErrorDetails(type=_custom(error.problem), loc=("releases", number), input=None)
                    )
        if plan is None or found:
            raise ValidationError.from_exception_data(cls.__name__, found, hide_input=True)
        return plan

    @property
    def budget(self) -> int:
        """How many releases may fail before no new one is started."""
        if isinstance(self.failure_budget, int):
            return self.failure_budget
        return len(self.releases) * int(self.failure_budget.removesuffix("%")) // 100

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that two plans share only if they ask for the same."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    @property
    def procedure(self) -> dict[str, Any]:
        """The options that decide which release starts when, or at all."""
        return {
            "waves": [[release.wave, release.name, sorted(release.after)] for release in self.releases],
            "max_parallel": self.max_parallel,
            "failure_budget": self.failure_budget,
            "soak_seconds": self.soak_seconds,
        }

    @cached_property
    def waves(self) -> list[list[Release]]:
        """The releases by wave, ascending; in each, in the plan's order with predecessors first."""
        numbers = {release.name: number for number, release in enumerate(self.releases)}
        left = [len({numbers[name] for name in release.after}) for release in self.releases]
        successors: dict[int, list[int]] = {}
        for number, release in enumerate(self.releases):
            for name in set(release.after):
                successors.setdefault(numbers[name], []).append(number)
        free = [(release.wave, number) for number, release in enumerate(self.releases) if not left[number]]
        heapq.heapify(free)
        waves: dict[int, list[Release]] = {}
        while free:
            wave, number = heapq.heappop(free)
            waves.setdefault(wave, []).append(self.releases[number])
            for successor in successors.get(number, ()):
                left[successor] -= 1
                if not left[successor]:
                    heapq.heappush(free, (self.releases[successor].wave, successor))
        return list(waves.values())

    def ready(self, done: Collection[str], failed: Collection[str], running: Collection[str]) -> Ready:
        """What may start now, given the names of the releases in each state.

        Args:
            done: ended well.
            failed: ended in any other way: failed, timed out, crashed or cancelled.
            running: started and not ended.
        """
        ended_well, ended_badly, active = set(done), set(failed), set(running)
        failures = sum(release.name in ended_badly for release in self.releases)
        skipped: dict[str, str] = {}
        start: list[Release] = []
        current: int | None = None
        room = self.max_parallel - len(active)
        for release in (release for wave in self.waves for release in wave):
            if release.name in active:
                current = release.wave if current is None else current
                continue
            if release.name in ended_badly or release.name in ended_well:
                continue
            reason = next(self._hindrances(release, ended_badly, skipped, failures), None)
            if reason:
                skipped[release.name] = reason
                continue
            current = release.wave if current is None else current
            if release.wave == current and len(start) < room and ended_well.issuperset(release.after):
                start.append(release)
        return Ready(start=start, skipped=skipped, wave=current)

    def _hindrances(
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
        """The parameters of `deploy_latest_image` for one release of this plan."""
        values: dict[str, Any] = {"target": self.target}
        for options in (self.defaults, release):
            said = options.model_dump(exclude={"name", "wave", "after"}, exclude_none=True)
            values.update(said)
        return ReleaseRequest.of(**values)

    @property
    def targets(self) -> list[str]:
        """The targets that the plan needs, each once, for a look at their blocks before the start."""
        return list(dict.fromkeys(release.target or self.target for release in self.releases))

    def refuse_targets(self, problems: Mapping[str, str]) -> None:
        """Refuses the plan for targets that cannot be used; `problems` says why, by target.

        Raises:
            PlanError: unless `problems` is empty; with the line of each field that names such a target.
        """
        places: dict[yaml_lines.Path, str] = {}
        for number, release in enumerate(self.releases):
            used = release.target or self.target
            if used in problems:
                places[("releases", number, "target") if release.target else ("target",)] = problems[used]
        self.refuse(places)

    def refuse(self, places: Mapping[yaml_lines.Path, str]) -> None:
        """Refuse the plan for what is wrong at each path.

        Raises:
            PlanError: unless `places` is empty; with the line of each path.
        """
        if places:
            mistakes = [_mistake(path, why, self._document.line(path)) for path, why in places.items()]
            raise PlanError.of(mistakes, self._source)


BatchApproval = Literal["none", "before-release", "between-waves"]
RunIn = Literal["process", "work-pool"]


class BatchRequest(Checked):
    """What a batch is asked for. `plan` has been checked when it is made."""

    plan: Plan
    run_in: RunIn = "process"
    child_deployment: str = Field(
        default="deploy-latest-image/batch-release", pattern=r"^[^/]+/[^/]+$", max_length=500
    )
    only_failed: bool = False
    approval: BatchApproval = "none"
    approval_seconds: ApprovalSeconds = 86_400
    dry_run: bool = False
    expect_plan: PlanHash = ""
    requested_by: Person = ""
    window_wait_seconds: WindowWait = 0
    break_glass: Reason = ""
    late_minutes: LateMinutes = 60


def load_plan(path: Path | str) -> Plan:
    """The plan in a YAML or JSON file.

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
    return Plan._of_document(yaml_lines.read_yaml(raw), source)


def _mistake(path: yaml_lines.Path, problem: str, line: int | None) -> Mistake:
    return Mistake(line=line, field=".".join(one_line(part, 80) for part in path), problem=problem)


# ---- mistakes in pydantic's words, and in ours --------------------------------------------------


def _custom(problem: str) -> PydanticCustomError:
    return PydanticCustomError("plan", "{problem}", {"problem": problem})


def _again(details: Any) -> InitErrorDetails:
    """One of pydantic's errors, to be raised once more."""
    kind = details["type"]
    if kind in {"value_error", "assertion_error"}:
        kind = _custom(str(details["ctx"]["error"]))
    elif "problem" in details.get("ctx", {}):  # one of ours
        kind = _custom(details["ctx"]["problem"])
    return InitErrorDetails(type=kind, loc=details["loc"], input=details["input"], ctx=details.get("ctx", {}))


def _told(error: ValidationError, values: Any) -> dict[yaml_lines.Path, str]:
    """The mistakes by path, as clauses. What the branches of a union say of one value is one mistake."""
    told: dict[yaml_lines.Path, list[str]] = {}
    for details in error.errors(include_url=False):
        kind, loc = details["type"], details["loc"]
        path = _path(loc, values)
        if kind == "missing":
            path = (*path, loc[-1])
            problem = "is missing"
        elif kind == "extra_forbidden":
            near = difflib.get_close_matches(str(loc[-1]), _keys(loc), 1)
            problem = f"there is no such key; did you mean {near[0]}?" if near else "there is no such key"
        elif kind in {"model_type", "model_attributes_type"}:
            problem = "should be a mapping of keys to values"
        else:
            problem = details["msg"]
        problems = told.setdefault(path, [])
        if problem not in problems:
            problems.append(problem)
    return {path: "; or: ".join(problems) for path, problems in told.items()}


def _keys(loc: yaml_lines.Path) -> list[str]:
    models: dict[int, type[BaseModel]] = {1: Plan, 2: Options}
    return list(models.get(len(loc), Release).model_fields)


def _path(loc: Sequence[str | int], values: Any) -> yaml_lines.Path:
    """`loc` without what pydantic adds to it: the names of a union's branches."""
    path: list[str | int] = []
    for part in loc:
        held: Any = values.__dict__ if isinstance(values, BaseModel) else values
        if isinstance(held, dict):
            there = part in held
        else:
            there = isinstance(held, list | tuple) and isinstance(part, int) and part < len(held)
        if there:
            values = held[part]
            path.append(part)
    return tuple(path)


# ---- mistakes between releases ------------------------------------------------------------------


@dataclass(frozen=True)
class _Outline:
    """What of a release can be read, be other fields of it wrong; `None` is what cannot."""

    name: str | None
    wave: int | None
    after: dict[int, str]
    place: tuple[str, str, str] | None
    clusters: list[str] | None


def _outlines(plan: Mapping[str, Any]) -> list[_Outline]:
    releases = plan.get("releases")
    defaults = _mapping(plan.get("defaults"))
    target = plan.get("target") or DEFAULT_TARGET
    return [
        _outline(_mapping(release), defaults, target)
        for release in (releases if isinstance(releases, list | tuple) else ())
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Options):
        return value.__dict__
    return value if isinstance(value, dict) else {}


def _outline(release: Mapping[str, Any], defaults: Mapping[str, Any], target: object) -> _Outline:
    app_id, deployment = release.get("app_id"), release.get("deployment")
    known = isinstance(app_id, int | str) and isinstance(deployment, str) and deployment != ""
    name = release.get("name") or (_default_name(app_id, deployment) if known else None)
    wave = release.get("wave", 1)
    after = release.get("after")
    clusters = release.get("clusters")
    if clusters is None:
        clusters = defaults.get("clusters")
    readable = clusters is None or (
        isinstance(clusters, list | tuple) and all(isinstance(cluster, str) for cluster in clusters)
    )
    where = release.get("target")
    return _Outline(
        name=name if isinstance(name, str) else None,
        wave=wave if type(wave) is int else None,
        after={
            number: other
            for number, other in enumerate(after if isinstance(after, list | tuple) else ())
            if isinstance(other, str)
        },
        place=(str(where or target), str(app_id), str(deployment)) if known and readable else None,
        clusters=list(clusters) if readable and clusters else None,
    )


def _between(outlines: Sequence[_Outline]) -> Iterator[tuple[yaml_lines.Path, str]]:
    """What is wrong between releases: path and problem."""
    yield from _twice(outlines)
    numbers: dict[str, int] = {}
    for number, outline in enumerate(outlines):
        if outline.name is not None:
            first = numbers.setdefault(outline.name, number)
            if first != number:
                yield (
                    ("releases", number, "name"),
                    f"releases.{first} has the name {_quoted(outline.name)} too; give one another `name`",
                )
    edges: dict[int, list[int]] = {}
    guesses = 20  # each goes through all names
    for number, outline in enumerate(outlines):
        for place, other in outline.after.items():
            path = ("releases", number, "after", place)
            if other not in numbers:
                near = _near(other, numbers) if guesses > 0 else ""
                guesses -= 1
                yield path, f"there is no release named {_quoted(other)}{near}"
                continue
            before = outlines[numbers[other]]
            if outline.wave is not None and before.wave is not None and before.wave > outline.wave:
                yield (
                    path,
                    f"{_quoted(other)} is of wave {before.wave}, and this release of wave {outline.wave}",
                )
            else:
                edges.setdefault(number, []).append(numbers[other])
    for cycle in _cycles(edges):
        names = [_quoted(outlines[number].name or "") for number in [*cycle, cycle[0]]]
        if len(names) > 12:
            names[6:-5] = [f"… {len(names) - 11} more …"]
        yield ("releases", cycle[0], "after"), f"these wait for each other: {' after '.join(names)}"


def _twice(outlines: Sequence[_Outline]) -> Iterator[tuple[yaml_lines.Path, str]]:
    """Releases of one deployment that would run in the same cluster."""
    taken: dict[tuple[str, str, str], dict[str | None, int]] = {}
    for number, outline in enumerate(outlines):
        if outline.place is None:
            continue
        here = taken.setdefault(outline.place, {})
        clusters: Sequence[str | None] = outline.clusters or [None]  # None stands for all
        if outline.clusters is None:
            clash = min(here.values(), default=None)
        else:
            clash = min((here[name] for name in (None, *clusters) if name in here), default=None)
        if clash is not None:
            yield (
                ("releases", number, "deployment"),
                f"releases.{clash} releases this deployment too; remove one, or give both other `clusters`",
            )
        for cluster in clusters:
            here.setdefault(cluster, number)


def _cycles(edges: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
    """Cycles that share no release, so that every release in one stands at most once.

    Releases that wait for none of the others are taken away until each left waits for another left;
    going from each to the first that it waits for must then come round.
    """
    successors: dict[int, list[int]] = {}
    for number, others in edges.items():
        for other in others:
            successors.setdefault(other, []).append(number)
    waits = {number: len(others) for number, others in edges.items()}
    free = [number for number in successors if number not in waits]
    while free:
        for successor in successors.get(free.pop(), ()):
            waits[successor] -= 1
            if not waits[successor]:
                free.append(successor)
    seen: set[int] = set()
    for begin in sorted(number for number, count in waits.items() if count):
        path: dict[int, None] = {}
        number = begin
        while number not in seen:
            seen.add(number)
            path[number] = None
            number = next(other for other in edges[number] if waits.get(other))
        if number in path:
            way = list(path)
            yield way[way.index(number) :]


def _quoted(name: str) -> str:
    return repr(one_line(name, 120))


def _near(name: str, known: Mapping[str, int]) -> str:
    same = [other for other in known if other.rpartition("/")[2] == name]
    near = same[:1] or difflib.get_close_matches(name[:200], list(known), 1)
    return f"; did you mean {_quoted(near[0])}?" if near else ""
