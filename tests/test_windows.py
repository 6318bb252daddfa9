"""When a window is closed and when it reopens; the block that holds the rules."""

import zoneinfo
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import ValidationError

from prefect_rollout.blocks import ContainerCloud, ReleaseWindows
from prefect_rollout.ids import first_mistake
from prefect_rollout.release.windows import HORIZON, Closed, Rule, _zones, iso_time, judge, zone

WEEKEND: dict[str, Any] = {"name": "weekend freeze", "cron": "0 22 * * FRI", "duration_minutes": 3480}
OFFICE: dict[str, Any] = {"name": "office", "effect": "allow", "cron": "0 9 * * 1-5", "duration_minutes": 480}


def asked(
    at: str, *rules: dict[str, Any], app: int | str = 3290, clusters: str = "c1", zone: str = "Asia/Shanghai"
) -> Closed | None:
    """What closes the clusters at a moment of the zone's wall clock."""
    moment = datetime.fromisoformat(at).replace(tzinfo=ZoneInfo(zone))
    return judge([Rule.model_validate(rule) for rule in rules], zone, app, clusters.split(), moment)


def reopens(closed: Closed | None) -> str:
    assert closed is not None
    assert closed.reopens is not None
    return closed.reopens.isoformat(timespec="minutes")


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "closed"),
    [
        ("2026-11-27T21:59:59", False),
        ("2026-11-27T22:00:00", True),
        ("2026-11-30T07:59:59", True),
        ("2026-11-30T08:00:00", False),
    ],
)
def test_a_deny_rule_closes_from_its_first_moment_until_before_its_end(at: str, closed: bool) -> None:
    assert (asked(at, WEEKEND) is not None) is closed


def test_what_closes_is_told_with_the_moment_at_which_it_reopens() -> None:
    closed = asked("2026-11-28T12:00", WEEKEND, clusters="pub-bjwdt pub-bjyt")
    assert closed is not None
    assert closed.clause("release-windows/default") == (
        "the release window 'weekend freeze' of release-windows/default is closed for pub-bjwdt, pub-bjyt "
        "until Mon 2026-11-30 08:00 Asia/Shanghai"
    )


def test_what_does_not_reopen_within_a_year_is_told_so() -> None:
    closed = asked("2026-01-01", {"name": "end of life", "start": "2025-01-01", "end": "2030-01-01"})
    assert closed is not None
    assert closed.reopens is None
    assert closed.clause("b").endswith("is closed for c1 and does not reopen within a year")


def test_what_is_told_of_a_rule_cannot_steer_a_terminal() -> None:
    closed = asked("2026-11-28T12:00", {**WEEKEND, "name": "a\x1b[31m\nb"})
    assert closed is not None
    assert closed.clause("b").isprintable()


@pytest.mark.parametrize(
    ("at", "until"),
    [
        ("2026-11-27T08:59", "2026-11-27T09:00+08:00"),
        ("2026-11-27T17:00", "2026-11-30T09:00+08:00"),  # over the weekend
    ],
)
def test_outside_of_an_allow_rule_it_is_closed_until_the_next(at: str, until: str) -> None:
    assert reopens(asked(at, OFFICE)) == until
    assert asked(until[:16], OFFICE) is None


def test_one_of_several_allow_rules_is_enough_and_a_deny_rule_outweighs_them() -> None:
    night = {"name": "night", "effect": "allow", "cron": "0 22 * * *", "duration_minutes": 120}
    lunch = {"name": "lunch", "cron": "0 12 * * *", "duration_minutes": 60}
    assert asked("2026-11-27T22:30", OFFICE, night, lunch) is None
    closed = asked("2026-11-27T20:00", OFFICE, night, lunch)
    assert closed is not None
    assert closed.rules == ("office", "night")
    assert reopens(closed) == "2026-11-27T22:00+08:00"
    closed = asked("2026-11-27T12:30", OFFICE, night, lunch)
    assert closed is not None
    assert closed.rules == ("lunch",)


def test_it_reopens_only_where_no_other_rule_closes_it_then() -> None:
    stocktaking = {"name": "stocktaking", "start": "2026-11-30T07:30", "end": "2026-11-30T12:00"}
    # The weekend ends on Monday at 8, inside of the stocktaking, which ends inside of office hours.
    assert reopens(asked("2026-11-28T12:00", WEEKEND, stocktaking, OFFICE)) == "2026-11-30T12:00+08:00"


def test_all_clusters_of_a_release_have_to_be_open_at_once() -> None:
    morning = {
        "name": "m",
        "effect": "allow",
        "cron": "0 9 * * *",
        "duration_minutes": 180,
        "clusters": ["a"],
    }
    late = {"name": "l", "effect": "allow", "cron": "0 11 * * *", "duration_minutes": 180, "clusters": ["b"]}
    closed = asked("2026-11-27T08:00", morning, late, clusters="a b c")
    assert closed is not None
    assert (closed.rules, closed.clusters) == (("m", "l"), ("a", "b"))
    assert reopens(closed) == "2026-11-27T11:00+08:00"
    never = {**late, "cron": "0 13 * * *"}
    closed = asked("2026-11-27T08:00", morning, never, clusters="a b")
    assert closed is not None
    assert closed.reopens is None


def test_a_day_is_whole_and_the_last_one_belongs_to_the_rule() -> None:
    holiday = {"name": "holiday", "start": "2026-12-24", "end": "2026-12-26"}
    assert asked("2026-12-23T23:59", holiday) is None
    assert reopens(asked("2026-12-24T00:00", holiday)) == "2026-12-27T00:00+08:00"
    assert asked("2026-12-27T00:00", holiday) is None


def test_a_rule_concerns_the_apps_and_clusters_that_it_names() -> None:
    rule = {**WEEKEND, "apps": [3290, "web"], "clusters": ["pub-bjwdt", "test-*"]}
    at = "2026-11-28T12:00"
    assert asked(at, rule, clusters="pub-bjwdt")
    assert asked(at, rule, app="3290", clusters="test-1")
    assert asked(at, rule, app="web", clusters="test-1")
    assert asked(at, rule, app=3291, clusters="pub-bjwdt") is None
    assert asked(at, rule, clusters="pub-bjyt PUB-BJWDT") is None
    closed = asked(at, rule, clusters="pub-bjyt test-1")
    assert closed is not None
    assert closed.clusters == ("test-1",)


def test_an_allow_rule_for_other_apps_and_clusters_closes_nothing() -> None:
    assert asked("2026-11-28T12:00", {**OFFICE, "clusters": ["other"]}, {**OFFICE, "apps": ["1"]}) is None


def test_a_rule_may_have_a_time_zone_of_its_own() -> None:
    rule = {**WEEKEND, "timezone": "America/New_York"}
    assert asked("2026-11-28T10:59", rule) is None
    assert reopens(asked("2026-11-28T11:00", rule)) == "2026-11-30T08:00-05:00"


# ---- summer time ---------------------------------------------------------------------------------

NIGHTLY = {"name": "n", "cron": "30 2 * * *", "duration_minutes": 60}


@pytest.mark.parametrize(
    ("day", "begins", "ends"),
    [
        ("2026-03-28", "01:30", "02:30"),  # winter, UTC+1
        ("2026-03-29", "01:00", "02:00"),  # 02:30 is skipped: right after the change, at 03:00 of UTC+2
        ("2026-03-30", "00:30", "01:30"),
        ("2026-10-25", "00:30", "01:30"),  # 02:30 comes twice: the first
        ("2026-10-26", "01:30", "02:30"),
    ],
)
def test_a_rules_clock_is_its_zones_through_the_changes_of_summer_time(
    day: str, begins: str, ends: str
) -> None:
    found = []
    was = False
    for minute in range(24 * 60):
        at = datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(minutes=minute)
        closed = judge([Rule.model_validate(NIGHTLY)], "Europe/Berlin", 1, ["c"], at) is not None
        if closed != was:
            found.append(f"{at:%H:%M}")
        was = closed
    assert found == [begins, ends]


def test_a_day_of_dates_has_23_hours_where_the_zone_says_so() -> None:
    rule = Rule(name="d", start="2026-03-29", end="2026-03-29")
    ((start, end),) = rule.spans(ZoneInfo("Europe/Berlin"), datetime(2026, 1, 1, tzinfo=UTC))
    assert end - start == timedelta(hours=23)


# ---- at random -----------------------------------------------------------------------------------

ZONES = ["UTC", "Asia/Shanghai", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]
names = st.lists(st.sampled_from(["c1", "c2", "c*"]), max_size=1)
fields: dict[str, Any] = {
    "effect": st.sampled_from(["deny", "allow"]),
    "timezone": st.sampled_from(["", *ZONES]),
    "apps": st.lists(st.sampled_from(["1", "2"]), max_size=1),
    "clusters": names,
}
crons = st.builds(
    "{} {} {} * {}".format,
    st.integers(0, 59),
    st.sampled_from(["0", "2", "1-3", "*/8", "22"]),
    st.sampled_from(["*", "*", "25-31", "L"]),
    st.sampled_from(["*", "SUN", "MON-FRI", "5"]),
)
by_cron = st.fixed_dictionaries({**fields, "cron": crons, "duration_minutes": st.integers(1, 4000)})
spring, autumn = datetime(2026, 3, 20), datetime(2026, 10, 20)  # noqa: DTZ001 - a wall clock's
walls = st.one_of(
    st.datetimes(spring, spring + timedelta(days=20)), st.datetimes(autumn, autumn + timedelta(days=20))
)
by_dates = st.builds(
    lambda fixed, start, minutes: {
        **fixed,
        "start": start.isoformat(),
        "end": (start + timedelta(minutes=minutes)).isoformat(),
    },
    st.fixed_dictionaries(fields),
    walls,
    st.integers(120, 9000),
)
some_rules = st.lists(by_cron | by_dates, min_size=1, max_size=5).map(
    lambda found: [Rule(name=f"r{number}", **rule) for number, rule in enumerate(found)]
)


@settings(deadline=None, max_examples=60)
@given(some_rules, st.sampled_from(ZONES), walls, st.randoms(use_true_random=False))
def test_it_reopens_at_the_first_moment_at_which_all_is_open(
    rules: list[Rule], zone: str, at: datetime, random: Any
) -> None:
    at = at.replace(tzinfo=UTC)
    closed = judge(rules, zone, 1, ["c1", "c2"], at)
    if closed is None:
        return
    assert closed.rules
    assert set(closed.clusters) <= {"c1", "c2"}
    until = at + min(HORIZON, timedelta(days=60))
    if closed.reopens is not None:
        assert judge(rules, zone, 1, ["c1", "c2"], closed.reopens) is None
        until = closed.reopens.astimezone(UTC)
    assert until > at
    for moment in [
        until - timedelta(microseconds=1),
        *(at + random.random() * (until - at) for _ in range(10)),
    ]:
        assert judge(rules, zone, 1, ["c1", "c2"], min(moment, until - timedelta(microseconds=1)))


@settings(deadline=None)
@given(
    st.integers(0, 59),
    st.integers(0, 23),
    st.sampled_from(["*", "1", "5", "7"]),
    st.integers(1, 4000),
    st.sampled_from(ZONES),
    st.integers(0, 30 * 24 * 60),
)
def test_a_rule_is_on_for_its_minutes_since_its_zones_clock_stood_so(
    minute: int, hour: int, weekday: str, lasts: int, zone: str, at: int
) -> None:
    """Against the minutes of a clock, one by one; in June, where no zone's clock changes."""
    moment = datetime(2026, 6, 1, tzinfo=UTC) + timedelta(minutes=at)
    on = False
    for back in range(lasts):
        clock = (moment - timedelta(minutes=back)).astimezone(ZoneInfo(zone))
        stands = (clock.minute, clock.hour) == (minute, hour) and weekday in {"*", str(clock.isoweekday())}
        on = on or stands
    rule = Rule(name="r", cron=f"{minute} {hour} * * {weekday}", duration_minutes=lasts)
    assert (judge([rule], zone, 1, ["c"], moment) is not None) is on


# ---- the block -----------------------------------------------------------------------------------


class TestPrefectsConventions(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return ReleaseWindows


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            {"cron": "0 22 * * FRIDAY", "duration_minutes": 1},
            "rules.1.cron: Value error, of 'x': Bad day-of-week",
        ),
        ({"cron": "0 22 * *", "duration_minutes": 1}, "five fields"),
        ({"cron": "* 22 * * *", "duration_minutes": 1}, "its minute is one number"),
        ({"cron": "60 22 * * *", "duration_minutes": 1}, "Bad minute"),
        ({"cron": "0 0 30 2 *", "duration_minutes": 1}, "Bad day-of-month"),
        ({"cron": "0 0 * * *", "duration_minutes": -1}, "rules.1.duration_minutes"),
        (
            {"cron": "0 0 * * *"},
            "rules.1: Value error, 'x' needs cron and duration_minutes, or start and end; it has cron",
        ),
        ({}, "it has none of them"),
        (
            {"cron": "0 0 * * *", "duration_minutes": 1, "end": "2026-01-01"},
            "it has cron and duration_minutes and end",
        ),
        (
            {"start": "2026-02-30", "end": "2026-03-01"},
            "rules.1.start: Value error, of 'x': '2026-02-30' is neither a day",
        ),
        ({"start": "2026-02-20", "end": "0001-01-01"}, "years are 2000 to 2200"),
        ({"start": "2026-02-20T10:00+08:00", "end": "2026-03-01"}, "give the time zone in its own field"),
        ({"start": "2026-02-20", "end": "2026-02-19"}, "end of 'x': it is not after start"),
        ({"start": "2026-02-20T10:00", "end": "2026-02-20T10:00"}, "end of 'x': it is not after start"),
        (
            {"start": "2026-02-20", "end": "2026-02-20", "timezone": "Asia/Peking"},
            "rules.1.timezone: Value error, of 'x': there is no time zone 'Asia/Peking'",
        ),
        ({"start": "2026-02-20", "end": "2026-02-20", "cluster": "c"}, "rules.1.cluster: Extra"),
        ({"start": "2026-02-20", "end": "2026-02-20", "clusters": [""]}, "rules.1.clusters.0"),
        ({"start": "2026-02-20", "end": "2026-02-20", "effect": "block"}, "rules.1.effect"),
        (
            {"start": "2026-02-20", "end": "2026-02-20", "name": "weekend freeze"},
            "given twice: weekend freeze",
        ),
    ],
)
def test_a_rule_that_cannot_work_is_refused_by_name_and_field(rule: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ReleaseWindows(rules=[WEEKEND, {"name": "x", **rule}])
    assert says in first_mistake(caught.value)


@pytest.mark.parametrize("fields", [{"timezone": "Mars/Olympus"}, {"timezone": ""}, {"rule": []}])
def test_a_block_that_would_close_nothing_by_mistake_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReleaseWindows(**fields)


@given(st.text(alphabet="0123456789*/-,#LW MONFRI\t", max_size=30))
def test_any_cron_is_taken_or_refused(cron: str) -> None:
    try:
        rule = Rule(name="x", cron=cron, duration_minutes=1)
    except ValidationError:
        return
    assert next(rule.spans(ZoneInfo("UTC"), datetime(2026, 1, 1, tzinfo=UTC)))


@pytest.mark.parametrize("nothing", ["", None])
def test_what_a_form_leaves_empty_is_not_given(nothing: str | None) -> None:
    fields = {"name": "x", "cron": nothing, "timezone": nothing, "start": "2026-02-20", "end": "2026-02-20"}
    assert asked("2026-02-20T12:00", fields)


def test_every_field_of_the_form_is_described() -> None:
    schema = ReleaseWindows.model_json_schema()
    for fields in (schema["properties"], schema["definitions"]["Rule"]["properties"]):
        assert all(field["description"].endswith(".") and field["title"] for field in fields.values())


def test_what_all_targets_have_are_the_last_fields_of_a_form() -> None:
    fields = ContainerCloud.model_json_schema()["properties"]
    last = sorted(fields, key=lambda name: fields[name]["position"])[-4:]
    assert last == ["windows", "allowed_images", "image_registries", "node_platform"]
    assert fields["windows"]["default"] == "default"


# ---- the same on every machine -------------------------------------------------------------------


@pytest.mark.parametrize(
    "zone",
    [
        *("localtime", "posixrules", "posix/Asia/Shanghai", "right/UTC", "asia/shanghai", "Asia", "Asia/"),
        *("/etc/localtime", "../localtime", "Asia/../UTC", "CST-8", "UTC+8", "Asia/Shanghai ", "zone.tab"),
    ],
)
def test_no_time_zone_of_the_machine_is_one(zone: str) -> None:
    with pytest.raises(ValidationError, match=r"give an IANA name such as Asia/Shanghai or UTC"):
        ReleaseWindows(timezone=zone)
    with pytest.raises(ValidationError, match=r"of 'x': there is no time zone"):
        Rule(name="x", start="2026-02-20", end="2026-02-20", timezone=zone)


def test_a_time_zone_has_the_rules_of_the_package_whatever_the_machine_has() -> None:
    before = zoneinfo.TZPATH
    zoneinfo.reset_tzpath(to=[])
    try:
        assert all(zone(name).key == name for name in ("Asia/Shanghai", "America/Argentina/Ushuaia", "UTC"))
    finally:
        zoneinfo.reset_tzpath(to=before)
    for name in _zones():
        assert zone(name).utcoffset(datetime(2026, 7, 1)) is not None  # noqa: DTZ001 - a wall clock's


@pytest.mark.parametrize(
    "text",
    [
        *("20261224", "2026-W52-4", "2026W524", "2026-12-24 18:00", "2026-12-24T18", "2026-12-24T1800"),
        *(
            "2026-12-24T18:00:00,5",
            "2026-12-24T24:00",
            "2026-12-24T18:60",
            "2026-12-24T18:00Z",
            " 2026-12-24",
        ),
        *("2026-12-24T18:00+08:00", "2026-12-24t18:00", "２０２６-12-24", "2026-12-24\n", "2026-358"),
    ],
)
def test_a_date_has_one_form(text: str) -> None:
    with pytest.raises(ValidationError, match="is neither a day such as 2026-12-24 nor a moment such as"):
        Rule(name="x", start=text, end="2027-01-01")


@pytest.mark.parametrize("text", ["2026-12-24T18:00", "2026-12-24T18:00:30", "2026-12-24T18:00:30.250000"])
def test_a_moment_may_have_seconds(text: str) -> None:
    assert iso_time(text) == datetime.fromisoformat(text)
