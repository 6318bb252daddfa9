"""When releases may start: rules that close clusters or open them, and what they say of a moment. Pure.

A deny rule closes while it is on. Where any allow rule concerns an app and a cluster, that cluster is
open only while one of those is on. A deny rule that is on outweighs every allow rule.
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

from prefect_rollout.models import Id, same_id
from prefect_rollout.text import one_line

HORIZON = timedelta(days=366)
"""How far ahead it is looked for the moment at which a closed window reopens."""

_YEARS = range(2000, 2201)
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


class Rule(BaseModel):
    """A time at which no release may start (deny), or the only time at which one may (allow).

    It comes by `cron`, for `duration_minutes` of elapsed time, or lasts once from `start` to `end`. Times
    are those of a wall clock in its time zone. One that a change to summer time skips counts as right
    after the change, one that the change back repeats as the first of the two.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    name: str = Field(
        min_length=1, max_length=100, title="Name", description="What refusals call it: weekend freeze."
    )
    effect: Literal["deny", "allow"] = Field(
        default="deny",
        title="Effect",
        description="deny: no release may start; allow: releases may start then, and else at no time.",
    )
    cron: str = Field(
        default="",
        title="Cron",
        description="When it comes: minute, hour, day of the month, month, weekday; 0 22 * * FRI.",
    )
    duration_minutes: int = Field(
        default=0,
        ge=0,
        le=31 * 24 * 60,
        title="Minutes",
        description="With cron, how long it lasts: 3480 from Friday 22:00 to Monday 08:00.",
    )
    start: str = Field(
        default="",
        title="Start",
        description="Without cron, its first day, 2026-12-24, or first moment, 2026-12-24T18:00.",
    )
    end: str = Field(
        default="",
        title="End",
        description="Its last day, all of it, or the moment at which it is over.",
    )
    timezone: str = Field(
        default="",
        title="Time zone",
        description="IANA name of a time zone of its own, such as Asia/Shanghai; empty for the block's.",
    )
    apps: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, title="Apps", description="Ids of the apps that it concerns; empty for all."
    )
    clusters: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        title="Clusters",
        description="Clusters that it concerns, by name or by pattern such as pub-*; empty for all.",
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
        """When it is on, as `[start, end)` in UTC and in order; only what ends later than `after`.

        Args:
            own: the time zone of a rule that names none.
            after: an aware moment.
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
            if start > latest:  # an hour that is repeated may be gone through twice
                latest = start
                yield start, start + lasts

    def concerns(self, app_id: Id, cluster: str) -> bool:
        """Whether it is about that app in that cluster."""
        return (not self.apps or any(same_id(app, app_id) for app in self.apps)) and (
            not self.clusters or any(fnmatchcase(cluster, pattern) for pattern in self.clusters)
        )


class Closed(NamedTuple):
    """What closes clusters at a moment.

    Attributes:
        rules: names of the rules that close them, in the order of the rules.
        clusters: those that are closed.
        reopens: when all clusters that were asked about are open for the first time, in the time zone of
            the first of those rules; `None` where that is not within `HORIZON`.
    """

    rules: tuple[str, ...]
    clusters: tuple[str, ...]
    reopens: datetime | None

    def told(self, block: str) -> str:
        """A clause: `the release window 'freeze' of {block} is closed for pub-bjwdt until Mon 2026-…`."""
        names = ", ".join(repr(one_line(rule, 80)) for rule in self.rules)
        plural, are = ("s", "are") if len(self.rules) > 1 else ("", "is")
        until = f"until {_told(self.reopens)}" if self.reopens else "and does not reopen within a year"
        clusters = one_line(", ".join(self.clusters))
        return f"the release window{plural} {names} of {block} {are} closed for {clusters} {until}"


def judge(
    rules: Sequence[Rule], timezone: str, app_id: Id, clusters: Sequence[str], at: datetime
) -> Closed | None:
    """What closes any of an app's clusters at a moment; `None` where all are open.

    Args:
        rules: all that there are.
        timezone: IANA name of the time zone of rules that name none.
        app_id: the app.
        clusters: those that a release is about.
        at: the moment, aware of its time zone.
    """
    own, at = zone(timezone), at.astimezone(UTC)
    turns = [_Turns(rule, own, at) for rule in rules]
    concern = {name: [turn for turn in turns if turn.rule.concerns(app_id, name)] for name in clusters}

    def closing(moment: datetime) -> dict[str, _Closing]:
        found = {name: _closing(rules, moment) for name, rules in concern.items()}
        return {name: closed for name, closed in found.items() if closed}

    first = closed = closing(at)
    if not first:
        return None
    by = [turn.rule for turn in turns if any(turn in each.by for each in first.values())]
    names, reopens = tuple(rule.name for rule in by), at
    while closed:
        # Each cluster is closed until its own moment at least: they are all open at the last, or later.
        reopens = max(each.until for each in closed.values())
        if reopens - at > HORIZON:
            return Closed(names, tuple(first), None)
        closed = closing(reopens)
    where = zone(by[0].timezone) if by[0].timezone else own
    return Closed(names, tuple(first), reopens.astimezone(where))


@cache
def zone(name: str) -> ZoneInfo:
    """Return the time zone of that IANA name, by the rules of the package `tzdata`.

    `ZoneInfo(name)` reads the machine's own directories first: it also finds `localtime` and whatever else
    lies there, which is another clock on each worker.

    Raises:
        ValueError: there is none.
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


class _Turns:
    """The spans of a rule, gone through along with a moment that never goes back."""

    def __init__(self, rule: Rule, own: ZoneInfo, at: datetime) -> None:
        self.rule = rule
        self._spans = rule.spans(own, at)
        self._span = next(self._spans, None)

    def span(self, moment: datetime) -> tuple[datetime, datetime] | None:
        """The one that is on at `moment`, or else the next; `None` where none is left."""
        while self._span and self._span[1] <= moment:
            self._span = next(self._spans, None)
        return self._span


class _Closing(NamedTuple):
    """What closes a cluster, and until when at least."""

    by: list[_Turns]
    until: datetime


_NEVER = datetime.max.replace(tzinfo=UTC)


def _closing(turns: Sequence[_Turns], moment: datetime) -> _Closing | None:
    """What closes a cluster that all of `turns` concern."""
    ends: dict[_Turns, datetime] = {}
    begins: dict[_Turns, datetime] = {}
    for turn in turns:
        span = turn.span(moment)
        if span and span[0] <= moment:
            ends[turn] = span[1]
        else:
            begins[turn] = span[0] if span else _NEVER
    denying = [turn for turn in ends if turn.rule.effect == "deny"]
    if denying:
        return _Closing(denying, max(ends[turn] for turn in denying))
    allowing = [turn for turn in turns if turn.rule.effect == "allow"]
    if not allowing or any(turn in ends for turn in allowing):
        return None
    return _Closing(allowing, min(begins[turn] for turn in allowing))


def _check_cron(cron: str) -> None:
    fields = cron.split()
    if len(fields) != 5:
        raise ValueError("a cron has five fields, such as 0 22 * * FRI")
    # More often, it would be no window; and a year of them is gone through to find one that is open.
    if not fields[0].isdecimal():
        raise ValueError("its minute is one number, 0 to 59: it comes once an hour at most")
    try:
        next(CronSim(cron, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise ValueError(f"{one_line(error, 80)}; a cron is such as 0 22 * * FRI") from None
    except StopIteration:
        raise ValueError("it never comes") from None


def _wall_clock(text: str, *, last: bool = False) -> datetime:
    """The moment without a time zone; of a day its begin, or its end where it is the `last`."""
    moment = iso_time(text)
    if moment is None or moment.tzinfo or moment.year not in _YEARS:
        raise ValueError(
            f"{one_line(text, 40)!r} is no day such as 2026-12-24 and no moment such as 2026-12-24T18:00; "
            f"years are {_YEARS[0]} to {_YEARS[-1]}, and the time zone is a field of its own"
        )
    if "T" in text:
        return moment
    return datetime.combine(moment.date() + timedelta(days=last), time())


_ISO_TIME = re.compile(
    r"\d{4}-\d\d-\d\d(T([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII
)


def iso_time(text: str) -> datetime | None:
    """Return the moment that a text names, or the begin of a day; `None` if it is in another form.

    The forms are 2026-12-24, 2026-12-24T18:00 and 2026-12-24T18:00:30, the latter two also with an offset:
    2026-12-24T18:00+08:00. `datetime.fromisoformat` reads more, and not the same in each Python version.
    """
    try:
        return datetime.fromisoformat(text) if _ISO_TIME.fullmatch(text) else None
    except ValueError:
        return None


def _told(moment: datetime) -> str:
    """Such as `Mon 2026-11-30 08:00 Asia/Shanghai`."""
    whole = "minutes" if moment.second == moment.microsecond == 0 else "seconds"
    clock = moment.replace(tzinfo=None).isoformat(" ", whole)
    return f"{_WEEKDAYS[moment.weekday()]} {clock} {moment.tzinfo}"
