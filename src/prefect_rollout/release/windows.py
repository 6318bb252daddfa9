"""Release windows: rules that close clusters to releases, and their evaluation at a moment. Pure.

A deny rule closes its clusters while it is active. A cluster with allow rules is open only while one of them
is active. An active deny rule overrides every allow rule.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, time, timedelta
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Annotated, Literal, NamedTuple, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from prefect_rollout.ids import Id, same_id
from prefect_rollout.text import one_line

HORIZON = timedelta(days=366)
"""Longest time ahead to search for the end of a closed window."""

_YEARS = range(2000, 2201)
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


class Rule(BaseModel):
    """A time when no release may start (deny), or the only time when releases may start (allow).

    It recurs by `cron`, for `duration_minutes` of elapsed time, or lasts once from `start` to `end`. Times
    are wall-clock times in its time zone. A time that a change to summer time skips means right after the
    change; a time that the change back repeats means the first of the two.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    name: str = Field(
        min_length=1, max_length=100, title="Name", description="Name in refusals, such as weekend freeze."
    )
    effect: Literal["deny", "allow"] = Field(
        default="deny",
        title="Effect",
        description="deny: no release may start then; allow: releases may start only then.",
    )
    cron: str = Field(
        default="",
        title="Cron",
        description="Start times: minute, hour, day of the month, month, weekday; 0 22 * * FRI.",
    )
    duration_minutes: int = Field(
        default=0,
        ge=0,
        le=31 * 24 * 60,
        title="Minutes",
        description="Duration with cron: 3480 from Friday 22:00 to Monday 08:00.",
    )
    start: str = Field(
        default="",
        title="Start",
        description="Without cron, its first day, 2026-12-24, or first moment, 2026-12-24T18:00.",
    )
    end: str = Field(
        default="",
        title="End",
        description="Its last day, inclusive, or the moment at which it ends.",
    )
    timezone: str = Field(
        default="",
        title="Time zone",
        description="IANA name of its time zone, such as Asia/Shanghai; empty for the block's.",
    )
    apps: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, title="Apps", description="Ids of the apps that it applies to; empty for all."
    )
    clusters: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        title="Clusters",
        description="Clusters that it applies to, by name or pattern such as pub-*; empty for all.",
    )

    @field_validator("cron", "start", "end", "timezone", mode="before")
    @classmethod
    def _empty_if_none(cls, value: object) -> object:
        return "" if value is None else value

    @field_validator("cron", "start", "end", "timezone")
    @classmethod
    def _usable(cls, value: str, info: ValidationInfo) -> str:
        if not value:
            return value
        try:
            if info.field_name == "cron":
                _check_cron(value)
            elif info.field_name == "timezone":
                zone(value)
            else:
                _wall_clock(value)
        except ValueError as error:
            raise ValueError(f"of {one_line(info.data.get('name', '?'), 80)!r}: {error}") from None
        return value

    @model_validator(mode="after")
    def _cron_or_dates(self) -> Self:
        given = [name for name in ("cron", "duration_minutes", "start", "end") if getattr(self, name)]
        name = one_line(self.name, 80)
        if given not in (["cron", "duration_minutes"], ["start", "end"]):
            raise ValueError(
                f"{name!r} needs cron and duration_minutes, or start and end; "
                f"it has {' and '.join(given) or 'none of them'}"
            )
        if self.start and self.end and _wall_clock(self.start) >= _wall_clock(self.end, last=True):
            raise ValueError(f"end of {name!r}: it is not after start")
        return self

    def spans(self, own: ZoneInfo, after: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Yield the active times as `[start, end)` in UTC, in order, without those that end by `after`.

        `own` is the time zone of a rule without one.
        """
        where = zone(self.timezone) if self.timezone else own
        if not self.cron:
            start, end = _wall_clock(self.start), _wall_clock(self.end, last=True)
            once = start.replace(tzinfo=where).astimezone(UTC), end.replace(tzinfo=where).astimezone(UTC)
            yield from [once] if once[1] > after else []
            return
        lasts = timedelta(minutes=self.duration_minutes)
        latest = after.astimezone(UTC) - lasts
        for moment in CronSim(self.cron, latest.astimezone(where)):
            start = moment.astimezone(UTC)
            if start > latest:  # cron may yield a repeated hour twice
                latest = start
                yield start, start + lasts

    def applies_to(self, app_id: Id, cluster: str) -> bool:
        """Return True if the rule applies to the app in the cluster."""
        return (not self.apps or any(same_id(app, app_id) for app in self.apps)) and (
            not self.clusters or any(fnmatchcase(cluster, pattern) for pattern in self.clusters)
        )


class Closed(NamedTuple):
    """The closed clusters of a release at a moment.

    Attributes:
        rules: names of the rules that close them, in the order of the rules.
        clusters: the closed clusters.
        reopens: first moment when all clusters of the release are open, in the time zone of the first of
            those rules; `None` if it is not within `HORIZON`.
    """

    rules: tuple[str, ...]
    clusters: tuple[str, ...]
    reopens: datetime | None

    def clause(self, block: str) -> str:
        """Return a clause such as `the release window 'freeze' of {block} is closed for c1 until Mon …`."""
        names = ", ".join(repr(one_line(rule, 80)) for rule in self.rules)
        plural, are = ("s", "are") if len(self.rules) > 1 else ("", "is")
        until = f"until {_clock(self.reopens)}" if self.reopens else "and does not reopen within a year"
        clusters = one_line(", ".join(self.clusters))
        return f"the release window{plural} {names} of {block} {are} closed for {clusters} {until}"


def judge(
    rules: Sequence[Rule], timezone: str, app_id: Id, clusters: Sequence[str], at: datetime
) -> Closed | None:
    """Return the closed clusters of a release at an aware moment; `None` if all are open.

    `timezone` is the IANA name of the time zone of rules without one.
    """
    own, at = zone(timezone), at.astimezone(UTC)
    schedules = [_Schedule(rule, own, at) for rule in rules]
    applying = {name: [each for each in schedules if each.rule.applies_to(app_id, name)] for name in clusters}

    def closing(moment: datetime) -> dict[str, _Closing]:
        found = {name: _closing(theirs, moment) for name, theirs in applying.items()}
        return {name: closed for name, closed in found.items() if closed}

    first = closed = closing(at)
    if not first:
        return None
    by = [each.rule for each in schedules if any(each in closed_by.by for closed_by in first.values())]
    names, reopens = tuple(rule.name for rule in by), at
    while closed:
        # Each cluster stays closed at least until its own moment: all are open at the last one or later.
        reopens = max(each.until for each in closed.values())
        if reopens - at > HORIZON:
            return Closed(names, tuple(first), None)
        closed = closing(reopens)
    where = zone(by[0].timezone) if by[0].timezone else own
    return Closed(names, tuple(first), reopens.astimezone(where))


@cache
def zone(name: str) -> ZoneInfo:
    """Return the time zone with that IANA name, from the package `tzdata`.

    `ZoneInfo(name)` reads the machine's own directories first, in which names such as `localtime` mean a
    different zone on each worker.

    Raises:
        ValueError: there is no such time zone.
    """
    if name not in _zones():
        raise ValueError(
            f"there is no time zone {one_line(name, 80)!r}; give an IANA name such as Asia/Shanghai or UTC"
        )
    with resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as rules:
        return ZoneInfo.from_file(rules, key=name)


@cache
def _zones() -> frozenset[str]:
    return frozenset(resources.files("tzdata").joinpath("zones").read_text("ascii").split())


class _Schedule:
    """The active times of a rule, read forward in time only."""

    def __init__(self, rule: Rule, own: ZoneInfo, at: datetime) -> None:
        self.rule = rule
        self._spans = rule.spans(own, at)
        self._span = next(self._spans, None)

    def span(self, moment: datetime) -> tuple[datetime, datetime] | None:
        """Return the active time at `moment`, or the next one; `None` if none is left."""
        while self._span and self._span[1] <= moment:
            self._span = next(self._spans, None)
        return self._span


class _Closing(NamedTuple):
    """The rules that close a cluster, and the earliest moment when it may reopen."""

    by: list[_Schedule]
    until: datetime


_NEVER = datetime.max.replace(tzinfo=UTC)


def _closing(schedules: Sequence[_Schedule], moment: datetime) -> _Closing | None:
    """Return how `schedules`, all of which apply to a cluster, close it; `None` if it is open."""
    ends: dict[_Schedule, datetime] = {}
    begins: dict[_Schedule, datetime] = {}
    for schedule in schedules:
        span = schedule.span(moment)
        if span and span[0] <= moment:
            ends[schedule] = span[1]
        else:
            begins[schedule] = span[0] if span else _NEVER
    denying = [each for each in ends if each.rule.effect == "deny"]
    if denying:
        return _Closing(denying, max(ends[each] for each in denying))
    allowing = [each for each in schedules if each.rule.effect == "allow"]
    if not allowing or any(each in ends for each in allowing):
        return None
    return _Closing(allowing, min(begins[each] for each in allowing))


def _check_cron(cron: str) -> None:
    fields = cron.split()
    if len(fields) != 5:
        raise ValueError("a cron has five fields, such as 0 22 * * FRI")
    # The search for the end of a window covers a year: windows must not recur more often.
    if not fields[0].isdecimal():
        raise ValueError("its minute is one number from 0 to 59: a window recurs at most once an hour")
    try:
        next(CronSim(cron, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise ValueError(f"{one_line(error, 80)}; a cron is such as 0 22 * * FRI") from None
    except StopIteration:
        raise ValueError("it never occurs") from None


def _wall_clock(text: str, *, last: bool = False) -> datetime:
    """Return a moment without a time zone. A day means its start, or its end if `last`."""
    moment = iso_time(text)
    if moment is None or moment.tzinfo or moment.year not in _YEARS:
        raise ValueError(
            f"{one_line(text, 40)!r} is neither a day such as 2026-12-24 nor a moment such as "
            f"2026-12-24T18:00; years are {_YEARS[0]} to {_YEARS[-1]}; give the time zone in its own field"
        )
    if "T" in text:
        return moment
    return datetime.combine(moment.date() + timedelta(days=last), time())


_ISO_TIME = re.compile(
    r"\d{4}-\d\d-\d\d(T([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII
)


def iso_time(text: str) -> datetime | None:
    """Return the moment in a text, or the start of a day; `None` if it has another form.

    The forms are 2026-12-24, 2026-12-24T18:00 and 2026-12-24T18:00:30, the latter two also with an offset:
    2026-12-24T18:00+08:00. `datetime.fromisoformat` accepts more, and differs between Python versions.
    """
    try:
        return datetime.fromisoformat(text) if _ISO_TIME.fullmatch(text) else None
    except ValueError:
        return None


def _clock(moment: datetime) -> str:
    """Return a moment such as `Mon 2026-11-30 08:00 Asia/Shanghai`."""
    whole = "minutes" if moment.second == moment.microsecond == 0 else "seconds"
    clock = moment.replace(tzinfo=None).isoformat(" ", whole)
    return f"{_WEEKDAYS[moment.weekday()]} {clock} {moment.tzinfo}"
