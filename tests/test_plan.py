import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from prefect_rollout.batch import plan as plan_module
from prefect_rollout.batch.errors import PlanError
from prefect_rollout.batch.plan import BatchRequest, Options, Plan, Release, load_plan
from prefect_rollout.batch.yaml_lines import read_yaml
from prefect_rollout.release.request import NewestPolicy, ReleaseRequest
from prefect_rollout.verdict.diagnosis import Category

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA = DOCS / "plan.schema.json"
EXAMPLE = DOCS / "plan.example.yaml"


def release(name: str, **more: Any) -> dict[str, Any]:
    return {"app_id": 1, "deployment": name, "name": name, **more}


def plan(*releases: dict[str, Any], **more: Any) -> Plan:
    return Plan.of(releases=list(releases), **more)


def mistakes(text: str, tmp_path: Path) -> list[tuple[int | None, str, str]]:
    """What is wrong with the plan of that text; a JSON object of the same values says the same."""
    file = tmp_path / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        load_plan(file)
    found = [(each["line"], each["field"], each["problem"]) for each in caught.value.data["mistakes"]]
    document = read_yaml(file.read_bytes())
    if isinstance(document.value, dict) and not document.flaws:
        with pytest.raises(PlanError) as caught:
            Plan.of(**document.value)
        unlocated = [(each["line"], each["field"], each["problem"]) for each in caught.value.data["mistakes"]]
        assert sorted(unlocated) == sorted((None, field, problem) for _, field, problem in found)
    return found


# ---- what a plan says ---------------------------------------------------------------------------


def test_the_example_is_a_plan() -> None:
    example = load_plan(EXAMPLE)
    assert [[each.name for each in wave] for wave in example.waves] == [
        ["3290/qapm-home", "qapm-api first"],
        ["qapm-api rest", "3291/pay"],
    ]
    assert example.request(example.releases[2]) == ReleaseRequest.of(
        app_id=3290,
        deployment="qapm-api",
        target="container-cloud/default",
        template_id=1343161,
        clusters=["pub-bjyt", "pub-shbt"],
        canary="pub-bjyt",
        order="one-by-one",
        on_failure="rollback",
        poll_attempts=60,
        reason="July release",
    )


def test_a_release_goes_before_the_defaults_and_they_before_those_of_a_single_release() -> None:
    [one, two] = (
        batch := plan(
            release("a", poll_seconds=1, clusters=[], target="other/x", reason=""),
            release("b", poll_seconds=None),
            target="container-cloud/live",
            defaults={"poll_seconds": 9, "clusters": ["east"], "reason": "July"},
        )
    ).releases
    assert batch.request(one) == ReleaseRequest.of(
        app_id=1, deployment="a", poll_seconds=1, clusters=None, target="other/x"
    )
    assert batch.request(two) == ReleaseRequest.of(
        app_id=1,
        deployment="b",
        poll_seconds=9,
        clusters=["east"],
        target="container-cloud/live",
        reason="July",
    )


def test_every_option_of_a_release_can_stand_in_a_plan() -> None:
    # The rest is asked of the batch as a whole.
    batch = {field for field in BatchRequest.model_fields if field in ReleaseRequest.model_fields}
    # A person consents to the deletion of pods for one release at a time.
    asked = set(ReleaseRequest.model_fields) - batch - {"unblock"}
    assert set(Release.model_fields) == {*asked, "name", "wave", "after"}
    assert set(Options.model_fields) == asked - {"app_id", "deployment", "template_id", "images", "target"}


@pytest.mark.parametrize(
    ("budget", "number"), [(0, 0), (2, 2), ("0%", 0), ("10%", 1), ("33%", 6), ("99%", 18), ("100%", 19)]
)
def test_a_percentage_is_of_all_releases_and_rounded_down(budget: int | str, number: int) -> None:
    assert plan(*(release(f"r{n}") for n in range(19)), failure_budget=budget).budget == number


def test_a_plan_stays_the_same_through_json_and_pickle() -> None:
    example = load_plan(EXAMPLE)
    assert Plan.of(**json.loads(example.model_dump_json())).model_dump() == example.model_dump()
    assert Plan.of(**dict(example)).model_dump() == example.model_dump()
    assert pickle.loads(pickle.dumps(example)) == example


# ---- mistakes -----------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = """\
target: nowhere
defaults: {poll_seconds: 0, on_failur: stop}
max_parallel: 501
failure_budget: 150%
soak_seconds: -1
releases:
  - {app_id: 1, deployment: a, wave: 2}
  - {app_id: 1, deployment: b, after: [1/a, 1/c]}
  - app_id: 1.5
    images: {web: "a b"}
    template_id: ".."
    clusters: [x, x]
  - 7
  - {app_id: 2, deployment: d, after: [2/e]}
  - {app_id: 2, deployment: e, after: [2/d]}
"""
    assert [(line, field) for line, field, _ in mistakes(text, tmp_path)] == [
        (1, "target"),
        (2, "defaults.poll_seconds"),
        (2, "defaults.on_failur"),
        (3, "max_parallel"),
        (4, "failure_budget"),
        (5, "soak_seconds"),
        (8, "releases.1.after.0"),
        (8, "releases.1.after.1"),
        (9, "releases.2.app_id"),
        (9, "releases.2.deployment"),
        (10, "releases.2.images.web"),
        (11, "releases.2.template_id"),
        (12, "releases.2.clusters"),
        (13, "releases.3"),
        (14, "releases.4.after"),
    ]


@pytest.mark.parametrize(
    ("releases", "field", "problem"),
    [
        ("[{app_id: 1, deployment: a, wav: 2}]", "releases.0.wav", "did you mean wave?"),
        ("[{app_id: 1, deployment: a, wave: 0}]", "releases.0.wave", "greater than or equal to 1"),
        ("[{app_id: 1, deployment: a, wave: true}]", "releases.0.wave", "valid integer"),
        ("[{app_id: 1}]", "releases.0.deployment", "is missing"),
        ("[{app_id: 1, deployment: a, name: ' a'}]", "releases.0.name", "printable text"),
        ("[{app_id: 1, deployment: a, after: a}]", "releases.0.after", "valid list"),
        ("[{app_id: 1, deployment: web, after: [wob]}]", "releases.0.after.0", "no release named 'wob'"),
        ("[{app_id: 1, deployment: a, after: [1/a]}]", "releases.0.after", "'1/a' after '1/a'"),
        ("[]", "releases", "at least 1 item"),
        ("{}", "releases", "valid list"),
        ("", "releases", "valid list"),
    ],
)
def test_what_is_wrong_with_a_release_is_said(
    releases: str, field: str, problem: str, tmp_path: Path
) -> None:
    [(line, where, what)] = mistakes(f"releases: {releases}", tmp_path)
    assert (line, where) == (1, field)
    assert problem in what


@pytest.mark.parametrize(
    "budget", ["-1", "1.5", "101%", "1.5%", "-1%", "true", "two", "1001", "[1]", "010%", "null"]
)
def test_a_budget_that_makes_no_sense_is_told_in_one_sentence(budget: str, tmp_path: Path) -> None:
    text = f"releases: [{{app_id: 1, deployment: a}}]\nfailure_budget: {budget}"
    [(line, field, problem)] = mistakes(text, tmp_path)
    assert (line, field) == (2, "failure_budget")
    assert "a number from 0 to 1000, or a percentage" in problem


def test_the_name_meant_is_told(tmp_path: Path) -> None:
    text = "releases: [{app_id: 1, deployment: web}, {app_id: 1, deployment: api, after: [web]}]"
    [(_, _, problem)] = mistakes(text, tmp_path)
    assert problem == "there is no release named 'web'; did you mean '1/web'?"


def test_a_cycle_is_named_and_each_is_told(tmp_path: Path) -> None:
    text = """\
releases:
  - {app_id: 1, deployment: a, name: a, after: [c, x]}
  - {app_id: 1, deployment: b, name: b, after: [a]}
  - {app_id: 1, deployment: c, name: c, after: [b]}
  - {app_id: 1, deployment: d, name: d, after: [a]}
  - {app_id: 1, deployment: x, name: x}
  - {app_id: 1, deployment: y, name: y, after: [z, z, x]}
  - {app_id: 1, deployment: z, name: z, after: [y]}
"""
    assert mistakes(text, tmp_path) == [
        (2, "releases.0.after", "these wait for each other: 'a' after 'c' after 'b' after 'a'"),
        (7, "releases.5.after", "these wait for each other: 'y' after 'z' after 'y'"),
    ]


def test_a_long_cycle_is_told_by_its_ends() -> None:
    ring = [release(f"r{n}", after=[f"r{(n + 1) % 1000}"]) for n in range(1000)]
    with pytest.raises(PlanError, match=r"'r0' after 'r1' .* 990 more .* after 'r999' after 'r0'"):
        plan(*ring)


@pytest.mark.parametrize(
    ("one", "two", "ok"),
    [
        ({}, {}, False),
        ({"clusters": ["x"]}, {}, False),
        ({}, {"clusters": ["x"]}, False),
        ({"clusters": []}, {"clusters": ["x"]}, False),
        ({"clusters": ["x", "y"]}, {"clusters": ["y", "z"]}, False),
        ({"wave": 1}, {"wave": 2}, False),
        ({"app_id": "1"}, {}, False),
        ({"target": "container-cloud/default"}, {}, False),
        ({"clusters": ["x"]}, {"clusters": ["y"]}, True),
        ({"target": "other/x"}, {}, True),
        ({"app_id": 2}, {}, True),
    ],
)
def test_one_deployment_is_released_once_in_a_cluster(
    one: dict[str, Any], two: dict[str, Any], ok: bool
) -> None:
    releases = [
        {"app_id": 1, "deployment": "a", "name": name, **more} for name, more in [("1", one), ("2", two)]
    ]
    if ok:
        plan(*releases)
        return
    with pytest.raises(PlanError) as caught:
        plan(*releases)
    [mistake] = caught.value.data["mistakes"]
    assert mistake["field"] == "releases.1.deployment"
    assert "releases.0 releases this deployment too" in mistake["problem"]


def test_default_clusters_count_for_overlaps() -> None:
    with pytest.raises(PlanError, match=r"releases\.0 releases this deployment too"):
        plan(
            {"app_id": 1, "deployment": "a", "name": "1"},
            {"app_id": 1, "deployment": "a", "name": "2", "clusters": ["x"]},
            defaults={"clusters": ["x"]},
        )


def test_a_deployment_split_by_clusters_needs_names() -> None:
    with pytest.raises(PlanError, match=r"releases\.0 has the name '1/a' too"):
        plan(*({"app_id": 1, "deployment": "a", "clusters": [cluster]} for cluster in "xy"))


def test_a_plan_has_at_most_a_thousand_releases() -> None:
    assert len(plan(*(release(f"r{n}") for n in range(1000))).releases) == 1000
    with pytest.raises(PlanError, match="at most 1000 items"):
        plan(*(release(f"r{n}") for n in range(1001)))


def test_a_key_that_stands_twice_is_told_with_the_other_mistakes(tmp_path: Path) -> None:
    text = "max_parallel: 1\nreleases:\n  - {app_id: 1, deployment: a, wave: x}\nmax_parallel: 0\n"
    assert [(line, field) for line, field, _ in mistakes(text, tmp_path)] == [
        (3, "releases.0.wave"),
        (4, "max_parallel"),
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "null", "{}"])
def test_an_empty_file_is_no_plan(text: str, tmp_path: Path) -> None:
    assert [(field, problem) for _, field, problem in mistakes(text, tmp_path)] == [
        ("releases", "is missing")
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "words", "7"])
def test_a_file_of_something_else_is_no_plan(text: str, tmp_path: Path) -> None:
    assert mistakes(text, tmp_path) == [(1, "", "should be a mapping of keys to values")]


def test_a_file_that_is_not_yaml_is_told_by_its_line(tmp_path: Path) -> None:
    [(line, field, problem)] = mistakes("releases:\n  - {app_id: 1\n  - x", tmp_path)
    assert (line, field) == (3, "")
    assert problem.startswith("neither YAML nor JSON: ")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the plan .* cannot be read: .*\. Name a readable file\."):
        load_plan(tmp_path / name)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes(b"# " * plan_module.LARGEST_FILE)
    with pytest.raises(PlanError, match="larger than 1 MiB"):
        load_plan(file)


def test_json_and_carriage_returns_and_merges_work(tmp_path: Path) -> None:
    file = tmp_path / "plan"
    file.write_text(json.dumps({"releases": [release("a")]}, indent=1))
    assert load_plan(file).releases[0].name == "a"
    file.write_bytes(b"releases:\r\n  - &a {app_id: 1, deployment: no}\r\n  - {<<: *a, deployment: b}\r\n")
    assert [each.name for each in load_plan(file).releases] == ["1/no", "1/b"]


HOSTILE = "\x1b[31m\n\u202eforged: line 1 {problem} \ud800"


def test_what_stands_in_a_plan_forges_no_line() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.of(
            **{HOSTILE: 1},
            releases=[
                release(HOSTILE, after=[HOSTILE * 9]),
                release("a", **{HOSTILE: 1}, images={HOSTILE: " "}),
                release("{problem}", after=["{problem}"]),
            ],
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.data["mistakes"]) + 2
    assert all(line.isprintable() for line in lines)
    assert "\ud800" not in str(caught.value)
    assert "'{problem}' after '{problem}'" in str(caught.value)


def test_the_error_shows_a_screenful_and_keeps_all() -> None:
    with pytest.raises(PlanError) as caught:
        plan(*(release(f"r{n}", wave=0) for n in range(130)))
    error = caught.value
    assert len(error.data["mistakes"]) == 130
    assert str(error).startswith("the plan has 130 mistakes:\n  releases.0.wave: Input should be")
    assert str(error).endswith("  and 30 more\nCorrect the plan and start again; nothing was started.")
    assert error.diagnosis.category is Category.INVALID_INPUT
    assert error.to_dict()["message"] == "the plan has 130 mistakes"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_pydantic_tells_the_same_mistakes() -> None:
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate({"releases": [release("a", wave=0), release("b", after=["c"])]})
    assert [each["loc"] for each in caught.value.errors()] == [
        ("releases", 0, "wave"),
        ("releases", 1, "after", 0),
    ]


def test_targets_are_looked_up_by_others_and_refused_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "target: container-cloud/live\nreleases:\n  - {app_id: 1, deployment: a}\n"
        "  - {app_id: 1, deployment: b, target: container-cloud/lve}\n  - {app_id: 1, deployment: c}\n"
    )
    batch = load_plan(file)
    assert batch.targets == ["container-cloud/live", "container-cloud/lve"]
    batch.refuse_targets({})
    with pytest.raises(PlanError) as caught:
        batch.refuse_targets({"container-cloud/lve": "no such block", "container-cloud/live": "unusable"})
    assert caught.value.data["mistakes"] == [
        {"line": 1, "field": "target", "problem": "unusable"},
        {"line": 4, "field": "releases.1.target", "problem": "no such block"},
    ]


# ---- the order of a batch -----------------------------------------------------------------------


def names(releases: list[Release]) -> list[str]:
    return [each.name for each in releases]


def test_waves_ascend_and_predecessors_stand_first() -> None:
    batch = plan(
        release("late", wave=7),
        release("b", after=["a"]),
        release("a"),
        release("c", wave=2, after=["late2", "a"]),
        release("late2", wave=2),
    )
    assert [names(wave) for wave in batch.waves] == [["a", "b"], ["late2", "c"], ["late"]]


def test_a_wave_starts_when_all_of_the_one_before_has_ended() -> None:
    batch = plan(release("a"), release("b"), release("c", wave=2), failure_budget=1)
    first = batch.ready([], [], [])
    assert (names(first.start), first.wave) == (["a", "b"], 1)
    waiting = batch.ready(["a"], [], ["b"])
    assert (waiting.start, waiting.wave) == ([], 1)
    second = batch.ready(["a"], ["b"], [])
    assert (names(second.start), second.wave) == (["c"], 2)
    assert batch.ready(["a", "c"], ["b"], []) == plan_module.Ready()


def test_what_waits_for_a_failed_release_is_skipped_and_what_waits_for_that_as_well() -> None:
    batch = plan(
        release("a"),
        release("b", after=["a"]),
        release("c", wave=2, after=["b"]),
        release("d"),
        failure_budget=1,
    )
    ready = batch.ready([], ["a"], [])
    assert ready.skipped == {"b": "a failed", "c": "b was skipped"}
    assert names(ready.start) == ["d"]


def test_nothing_new_starts_once_more_have_failed_than_the_budget() -> None:
    batch = plan(*(release(name) for name in "abcde"), failure_budget=1, max_parallel=3)
    assert names(batch.ready([], ["a"], ["b"]).start) == ["c", "d"]
    ready = batch.ready([], ["a", "b"], ["c"])
    assert (ready.start, ready.wave) == ([], 1)
    assert ready.skipped == dict.fromkeys("de", "2 failed, more than the failure budget of 1")


@st.composite
def batches(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, 12))
    waves = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    shuffled = draw(st.permutations(range(count)))  # predecessors come anywhere in the file
    releases = []
    for number in range(count):
        wave, turn = waves[number], shuffled[number]
        able = [other for other in range(count) if shuffled[other] < turn and waves[other] <= wave]
        after = draw(st.lists(st.sampled_from(able), max_size=3)) if able else []
        releases.append(release(f"r{number}", wave=wave, after=[f"r{other}" for other in after]))
    budget = draw(st.integers(0, count) | st.integers(0, 100).map(lambda part: f"{part}%"))
    return plan(*releases, failure_budget=budget, max_parallel=draw(st.integers(1, 5)))


@settings(max_examples=150, deadline=None)
@given(batches(), st.randoms(use_true_random=False), st.floats(0, 1))
def test_whatever_ends_first_all_is_run_once_or_skipped_for_a_reason(
    batch: Plan, chance: random.Random, failing: float
) -> None:
    done: list[str] = []
    failed: list[str] = []
    running: list[str] = []
    started: list[str] = []
    skipped: dict[str, str] = {}
    of = {each.name: each for each in batch.releases}
    while True:
        ready = batch.ready(done, failed, running)
        assert skipped.keys() <= ready.skipped.keys(), "what is skipped stays so"
        skipped = ready.skipped
        if len(failed) > batch.budget:
            assert not ready.start
        for each in ready.start:
            assert set(each.after) <= set(done), "never before its predecessors"
            earlier = {name for name in of if of[name].wave < each.wave}
            assert earlier <= {*done, *failed, *skipped}, "never before an earlier wave has ended"
            assert each.wave == ready.wave
        started += names(ready.start)
        running += names(ready.start)
        assert len(running) <= batch.max_parallel
        if not running:
            break
        ended = running.pop(chance.randrange(len(running)))
        (failed if chance.random() < failing else done).append(ended)
    assert ready.wave is None
    assert len(set(started)) == len(started)
    assert set(started).isdisjoint(skipped)
    assert {*started, *skipped} == set(of)
    for name, reason in skipped.items():
        hindered = any(other in failed or other in skipped for other in of[name].after)
        assert reason
        assert hindered or len(failed) > batch.budget


# ---- the schema ---------------------------------------------------------------------------------


def test_the_committed_schema_is_the_models() -> None:
    script = [sys.executable, str(DOCS / "plan_schema.py")]
    printed = subprocess.run(script, capture_output=True, check=True, encoding="utf-8").stdout
    assert SCHEMA.read_text(encoding="utf-8") == printed, (
        "the schema is stale; renew it: .venv/bin/python docs/plan_schema.py > docs/plan.schema.json"
    )


def schema_mistakes(value: object) -> list[str]:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


@pytest.mark.parametrize(
    "value",
    [
        yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")),
        {"releases": [{"app_id": "3290", "deployment": "a"}]},
        {
            "releases": [release("a", template_id=None, clusters=[], images={"web": "r/web:1"})],
            "failure_budget": 3,
        },
        load_plan(EXAMPLE).model_dump(mode="json"),
    ],
)
def test_what_is_a_plan_is_one_by_the_schema(value: dict[str, Any]) -> None:
    assert schema_mistakes(value) == []
    Plan.of(**value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"releases": []},
        {"releases": [{"app_id": 1}]},
        {"releases": [release("a", wav=2)]},
        {"releases": [release("a", wave=0)]},
        {"releases": [release("a", images={"web": "a b"})]},
        {"releases": [release("a")], "failure_budget": "101%"},
        {"releases": [release("a")], "max_parallel": 501},
        {"releases": [release("a")], "defaults": {"poll_seconds": 0}},
    ],
)
def test_what_the_schema_refuses_is_no_plan(value: dict[str, Any]) -> None:
    assert schema_mistakes(value)
    with pytest.raises(PlanError):
        Plan.of(**value)


def fields(schema: Any) -> list[tuple[str, Any]]:
    if isinstance(schema, dict):
        own = list(schema.get("properties", {}).items())
        return own + [each for inner in schema.values() for each in fields(inner)]
    return [each for inner in schema for each in fields(inner)] if isinstance(schema, list) else []


def test_an_editor_finds_a_sentence_for_every_field() -> None:
    described = fields(json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert len(described) > 30
    for name, field in described:
        assert str(field.get("description", "")).endswith("."), name


def test_a_release_has_the_policy_of_the_defaults_or_its_own() -> None:
    own = {"by": "numerical", "pattern": "^([0-9]+)$"}
    made = plan(
        release("a"),
        release("b", newest=own, pin_digest=False, check_images="require"),
        defaults={"newest": {"range": "^1"}, "pin_digest": True, "check_images": "warn"},
    )
    first, second = (made.request(each) for each in made.releases)
    assert first.newest == NewestPolicy(range="^1")
    assert (first.pin_digest, first.check_images) == (True, "warn")
    assert second.newest == NewestPolicy.of(**own)
    assert (second.pin_digest, second.check_images) == (False, "require")


@pytest.mark.parametrize(
    ("policy", "where", "problem"),
    [
        ("{rnage: ^1}", "defaults.newest.rnage", "did you mean range?"),
        ("{range: latest}", "defaults.newest.range", "no range of versions"),
        ("{by: age}", "defaults.newest.by", "'semver', 'numerical' or 'alphabetical'"),
    ],
)
def test_a_policy_in_a_plan_file_is_checked(tmp_path: Path, policy: str, where: str, problem: str) -> None:
    text = f"releases: [{{app_id: 1, deployment: a}}]\ndefaults:\n  newest: {policy}\n"
    ((line, field, why),) = mistakes(text, tmp_path)
    assert (line, field) == (3, where)
    assert problem in why
