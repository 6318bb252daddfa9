"""Which revisions count as released: what runs recorded, the choice among them, and real releases."""

import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import respx
from prefect import get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from prefect_rollout.batch import result as batch
from prefect_rollout.batch.plan import Plan
from prefect_rollout.blocks import ContainerCloud, ReleaseWindows
from prefect_rollout.cli.results import end
from prefect_rollout.errors import (
    ConfigurationError,
    NoPreviousTemplateError,
    NoTemplateError,
    ReleaseError,
    RollbackFailedError,
    RolloutError,
    WindowClosedError,
)
from prefect_rollout.flows import deploy_batch, deploy_latest_image, restart, rollback
from prefect_rollout.mcp import deployments, types
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.platforms.container_cloud.payloads import Template
from prefect_rollout.platforms.http import host_of
from prefect_rollout.release.plan_words import plan_lines, summary
from prefect_rollout.release.report import render
from prefect_rollout.release.request import ReleaseRequest
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.release.revisions import (
    Choice,
    Entry,
    Known,
    Past,
    Record,
    capped,
    choose,
    known_of,
    taken_anyway,
    unknown_words,
)
from prefect_rollout.release.workload import Baseline, Revision, Workload
from prefect_rollout.runs.approval import question
from prefect_rollout.runs.flow_runs import deployment_tags
from prefect_rollout.runs.records import RECORD, revision_tag
from prefect_rollout.tasks import choose_rollback, find_where_live, get_template
from support import Cloud

NOW = datetime(2026, 11, 26, 10, 12, tzinfo=UTC)
TARGET = "container-cloud/default"

# ---- pure: the last word about a revision --------------------------------------------------------

Seen = dict[str, dict[str, tuple[str, int]]]


def past(run_id: str, state: str, minute: int, seen: Seen | None = None, clusters: str = "c1 c2") -> Past:
    """A run in a state since a minute, and what it recorded: `{revision: {cluster: (event, minute)}}`."""
    record = Record(platform="cloud", deployment="1", clusters=clusters.split())
    for revision, in_clusters in (seen or {}).items():
        for cluster, (event, at) in in_clusters.items():
            record.seen.setdefault(revision, {})[cluster] = Entry.model_validate(
                {"event": event, "at": NOW + timedelta(minutes=at)}
            )
    return Past(run_id, f"web → {run_id}", state, NOW + timedelta(minutes=minute), record)


MADE = "r1"
GOOD = past(MADE, "COMPLETED", 0, {"7": {"c1": ("ready", 0), "c2": ("ready", 0)}})
HALF = past(MADE, "FAILED", 0, {"7": {"c1": ("ready", 0), "c2": ("failed", 0)}})
BACK = past("b", "COMPLETED", 5, {"7": {"c1": ("left", 5)}, "6": {"c1": ("ready", 6)}})


@pytest.mark.parametrize(
    ("pasts", "why"),
    [
        ([], {}),
        ([GOOD], {"c1": "", "c2": ""}),
        # Its label could not be written, or a person vouches for it.
        ([past(MADE, "COMPLETED", 0)], {"c1": "", "c2": ""}),
        (
            [past(MADE, "FAILED", 0)],
            dict.fromkeys(("c1", "c2"), "its release failed on 2026-11-26 10:12 UTC"),
        ),
        ([past(MADE, "CRASHED", 1, clusters="c1")], {"c1": "its release crashed on 2026-11-26 10:13 UTC"}),
        (
            [past(MADE, "CANCELLED", 1, clusters="c1")],
            {"c1": "its release was cancelled on 2026-11-26 10:13 UTC"},
        ),
        # It was cancelled when all was done.
        ([past(MADE, "CANCELLED", 9, {"7": {"c1": ("ready", 1)}}, "c1")], {"c1": ""}),
        ([HALF], {"c1": "", "c2": "its release failed on 2026-11-26 10:12 UTC"}),
        *(
            ([past(MADE, state, 1, clusters="c1")], {"c1": "its release, web → r1, is still under way"})
            for state in ("RUNNING", "SCHEDULED", "PENDING", "PAUSED", "CANCELLING")
        ),
        # A canary is ready, and the run goes on.
        (
            [past(MADE, "RUNNING", 1, {"7": {"c1": ("ready", 1)}})],
            {"c1": "", "c2": "its release, web → r1, is still under way"},
        ),
        # It failed, a rollback left it, a retry of it is under way.
        (
            [past(MADE, "RUNNING", 9, clusters="c1"), BACK],
            {"c1": "its release, web → r1, is still under way"},
        ),
        ([GOOD, BACK], {"c1": "it was rolled back on 2026-11-26 10:17 UTC", "c2": ""}),
        # The failure says more than the rollback after it.
        (
            [past(MADE, "FAILED", 0, clusters="c1"), BACK],
            {"c1": "its release failed on 2026-11-26 10:12 UTC"},
        ),
        # Published again on purpose.
        ([GOOD, BACK, past("b2", "COMPLETED", 9, {"7": {"c1": ("ready", 8)}})], {"c1": "", "c2": ""}),
        ([HALF, past("b2", "COMPLETED", 9, {"7": {"c2": ("ready", 8)}})], {"c1": "", "c2": ""}),
        # A retry of a run whose canary was ready finds that a rollback followed.
        (
            [past(MADE, "FAILED", 9, {"7": {"c1": ("ready", 0)}}, "c1"), BACK],
            {"c1": "it was rolled back on 2026-11-26 10:17 UTC"},
        ),
        (
            [GOOD, past("b", "FAILED", 5, {"7": {"c1": ("failed", 5)}})],
            {"c1": "a rollback to it failed on 2026-11-26 10:17 UTC", "c2": ""},
        ),
        # Its own rollback.
        (
            [past(MADE, "FAILED", 2, {"7": {"c1": ("left", 1)}}, "c1")],
            {"c1": "its release failed on 2026-11-26 10:14 UTC"},
        ),
        # Nobody knows who made it, and a rollback left it.
        ([BACK], {"c1": "it was rolled back on 2026-11-26 10:17 UTC"}),
    ],
)
def test_the_last_word_about_a_revision_wins(pasts: list[Past], why: dict[str, str]) -> None:
    for order in (pasts, pasts[::-1]):
        known = known_of(Revision(id=7, made_by=MADE), order, {})
        assert {cluster: each.why for cluster, each in known.items()} == why
        assert all(each.released is not bool(each.why) for each in known.values())


def test_what_a_rollback_left_and_what_is_online_again_was_published_past_this_tool() -> None:
    assert not known_of(Revision(id=7, made_by=MADE), [GOOD, BACK], {"c1": 6})["c1"].released
    assert known_of(Revision(id=7, made_by=MADE), [GOOD, BACK], {"c1": "7"})["c1"].released
    # It still counts as failed.
    failed = past(MADE, "FAILED", 0, clusters="c1")
    assert not known_of(Revision(id=7, made_by=MADE), [failed, BACK], {"c1": 7})["c1"].released


@pytest.mark.parametrize(
    ("pasts", "was_live"),
    [
        ([GOOD], True),
        ([GOOD, BACK], True),
        ([BACK], True),
        ([past(MADE, "FAILED", 0)], False),
        ([past(MADE, "FAILED", 0), BACK], False),
        ([past(MADE, "RUNNING", 0)], False),
        ([HALF], True),
        ([past(MADE, "FAILED", 0), past("b", "COMPLETED", 9, {"7": {"c1": ("ready", 8)}})], True),
    ],
)
def test_whether_it_was_ever_live_in_a_cluster(pasts: list[Past], was_live: bool) -> None:
    assert known_of(Revision(id=7, made_by=MADE), pasts, {})["c1"].was_live is was_live


GONE = Known(released=False, was_live=False, why="its release failed on 2026-11-26 10:12 UTC")
THERE = Known(released=True, was_live=True)


def test_the_newest_that_failed_nowhere_is_chosen_and_what_is_skipped_is_told() -> None:
    revisions = [Revision(id=163), Revision(id=162), Revision(id=161), Revision(id=160)]
    known = {"163": {"c1": GONE, "c2": GONE}, "162": {"c1": THERE, "c2": GONE}, "161": {"c1": THERE}}
    chosen = choose(revisions, known, option="--template-id")
    assert chosen.revision == Revision(id=161)
    assert chosen.notes == [
        "163 is skipped: its release failed on 2026-11-26 10:12 UTC; --template-id 163 takes it anyway",
        "162 is skipped: its release failed on 2026-11-26 10:12 UTC; --template-id 162 takes it anyway",
    ]
    assert not chosen.unknown


def test_in_a_cluster_what_happened_elsewhere_does_not_count() -> None:
    known = {"163": {"c1": GONE}, "162": {"c1": THERE, "c2": GONE}}
    chosen = choose([Revision(id=163), Revision(id=162)], known, option="--to-template", cluster="c1")
    assert chosen == Choice(
        Revision(id=162),
        [
            f"163 is skipped in c1: {GONE.why}; --to-template 163 takes it anyway",
        ],
    )
    assert choose([Revision(id=163)], known, option="--to-template", cluster="c2").revision == Revision(
        id=163
    )


def test_of_what_is_not_on_record_the_plan_says_so() -> None:
    assert choose([Revision(id=5)], {}, option="-") == Choice(Revision(id=5), [], unknown=True)
    assert choose([], {}, option="-") == Choice(None, [])
    assert unknown_words([]) == ""
    assert unknown_words([5]) == (
        "No release of template 5 is on record in this Prefect: it counts as released."
    )
    assert unknown_words([5, 6]).startswith(
        "No release of templates 5, 6 is on record in this Prefect: they "
    )


def test_what_is_named_is_taken_and_its_failure_told() -> None:
    assert taken_anyway(161, {"c1": GONE}) == [
        "161 is taken because it was named, although its release failed on 2026-11-26 10:12 UTC"
    ]
    assert taken_anyway(161, {"c1": THERE}) == taken_anyway(161, {}) == []
    assert taken_anyway(161, {"c1": GONE}, "c2") == []


def test_many_notes_are_counted() -> None:
    notes = [f"{number} is skipped" for number in range(30)]
    assert capped(notes[:11]) == notes[:11]
    assert capped(notes) == [*notes[:10], "20 older ones are skipped, too"]


@pytest.mark.parametrize("label", ["", None, "{}", "[1]", '{"platform": 1}', "\x00", 7])
def test_a_label_that_is_none_of_ours_is_no_record(label: object) -> None:
    assert Record.read(label) is None


def test_a_record_reads_back_and_keeps_the_first_time_at_which_a_cluster_left() -> None:
    record = Record(platform="p", deployment="1", clusters=["c1"])
    record.note("left", 7, "c1", NOW)
    record.note("left", 7, "c1", NOW + timedelta(hours=1))
    assert Record.read(record.model_dump_json()) == record
    assert record.seen["7"]["c1"].at == NOW
    record.note("ready", 7, "c1", NOW + timedelta(hours=2))
    assert record.seen["7"]["c1"].event == "ready"


@pytest.mark.parametrize(
    ("description", "made_by"),
    [
        (f"weekly release={UUID(int=1)}", str(UUID(int=1))),
        (f"release={UUID(int=1)} ", None),
        (f"release={UUID(int=1)}\n", None),
        ("release=1", "1"),
        ("release=", None),
        (None, None),
    ],
)
def test_the_description_names_the_run_that_made_a_template(
    description: str | None, made_by: str | None
) -> None:
    assert Template(id=1, description=description).revision.made_by == made_by


NOTE = "161 is skipped: its release failed on 2026-11-26 10:12 UTC; --template-id 161 takes it anyway"


def test_every_place_says_what_was_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    result = ReleaseResult(
        outcome=Outcome.RELEASED,
        app_id=1,
        deployment="web",
        release_id=str(UUID(int=1)),
        notes=[NOTE],
        clusters=[ClusterResult(cluster="c1", replicas=1, template=162, template_before=160)],
    )
    assert "161 is skipped: its release failed on 2026-11-26 10:12 UTC" in render(result)
    assert end(result).code == 0
    assert NOTE in capfd.readouterr().err
    record = result.model_dump(mode="json")
    assert NOTE in types.result_fields(record)["notes"][0]
    row = batch.Row(name="web", app_id=1, deployment="web", wave=1, stage=batch.Stage.RELEASED)
    row.note(result)
    whole = batch.BatchResult(
        batch_id="b", plan_digest="d", waves=1, releases=[row], outcome=Outcome.RELEASED
    )
    assert "161 is skipped: its release failed on 2026-11-26 10:12 UTC" in batch.render(whole)
    assert end(whole).code == 0
    assert f"web: {NOTE}." in capfd.readouterr().err
    (listed,) = types.rows_of([row.model_dump(mode="json")])["releases"]
    assert NOTE in listed.notes[0]


# ---- what Prefect has on record ------------------------------------------------------------------


async def run_of(
    cloud: Cloud | None, state: State[None], clusters: Iterable[str] = ("c1",), seen: Seen | None = None
) -> UUID:
    """A flow run with the record of a release to `web`; without a cloud, it recorded nothing."""
    async with get_client() as client:
        run = await client.create_flow_run(
            deploy_latest_image,
            parameters={"app_id": 1, "deployment": "web"},
            tags=[*deployment_tags(1, "web"), *(revision_tag(each) for each in seen or {})],
        )
        await client.set_flow_run_state(run.id, state, force=True)
        if cloud:
            await record(cloud, run.id, clusters, seen)
    return run.id


async def record(
    cloud: Cloud, run_id: UUID, clusters: Iterable[str] = ("c1",), seen: Seen | None = None
) -> None:
    """Gives the run its record, once the cloud's address is known."""
    made = past("", "", 0, seen, " ".join(clusters)).record
    made.platform = host_of(cloud.url)
    async with get_client() as client:
        await client.update_flow_run_labels(run_id, {RECORD: made.model_dump_json()})


def web(*clusters: str, marks: dict[int, UUID | str | None], **more: Any) -> dict[str, Any]:
    """A scenario of `web`, whose templates were made by those runs and whose first one is online."""
    templates = [
        {"id": number, "image": f"r/web:{number}", "description": f"release={run_id}" if run_id else ""}
        for number, run_id in marks.items()
    ]
    deployment = {
        "id": 1,
        "name": "web",
        "clusters": dict.fromkeys(clusters, 1),
        "templates": templates,
        "online": dict.fromkeys(clusters, min(marks)),
        "behaviour": [{"kind": "image_cannot_be_pulled", "images": "bad"}],
        **more,
    }
    return {"apps": [{"id": 1, "name": "shop", "deployments": [deployment]}]}


WEB = Workload(app_id=1, app="shop", id=1, name="web")


@pytest.mark.promise("A version that failed does not come back")
@pytest.mark.usefixtures("prefect_api")
async def test_the_newest_is_the_newest_that_was_released(
    make_cloud: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[State[None]] = [Failed(), Completed(), Failed(), Running(), Crashed()]
    runs = [await run_of(None, state) for state in states]
    lost = uuid4()
    cloud = make_cloud(
        **web("c1", marks={10: None, 11: runs[0], 12: runs[1], 13: runs[2], 14: runs[3], 15: runs[4]})
    )
    for run_id in runs:
        await record(cloud, run_id)
    monkeypatch.setattr(sys.modules["prefect_rollout.tasks.get_template"], "_AT_ONCE", 2)
    with caplog.at_level(logging.WARNING):
        chosen = await get_template.fn(WEB, target=TARGET)
    assert (chosen.id, chosen.unknown) == (12, False)
    assert [note.partition(";")[0].partition(" on ")[0] for note in chosen.notes] == [
        "15 is skipped: its release crashed",
        f"14 is skipped: its release, {await name_of(runs[3])}, is still under way",
        "13 is skipped: its release failed",
    ]
    assert chosen.notes[0] in caplog.text
    named = await get_template.fn(WEB, 13, target=TARGET)
    assert named.id == 13
    assert named.notes[0].startswith("13 is taken because it was named, although its release failed on ")
    # A run that Prefect does not have, and one of another cloud with the same names, say nothing.
    other = await run_of(cloud, Failed())
    make_cloud(**web("c1", marks={10: None, 11: runs[0], 13: lost}))
    chosen = await get_template.fn(WEB, target=TARGET)
    assert (chosen.id, chosen.unknown, chosen.notes) == (13, True, [])
    make_cloud(**web("c1", marks={10: None, 14: other}))
    assert (await get_template.fn(WEB, target=TARGET)).unknown
    # Another tool marks its templates, too.
    make_cloud(**web("c1", marks={10: None, 11: "weekly"}))
    chosen = await get_template.fn(WEB, target=TARGET)
    assert (chosen.id, chosen.unknown) == (11, True)


async def name_of(run_id: UUID) -> str:
    async with get_client() as client:
        return (await client.read_flow_run(run_id)).name


@pytest.mark.usefixtures("prefect_api")
async def test_where_nothing_but_failed_ones_is_left_the_error_says_how_to_take_one(make_cloud: Any) -> None:
    runs = [await run_of(None, Failed()), await run_of(None, Cancelled())]
    cloud = make_cloud(**web("c1", marks={11: runs[0], 12: runs[1]}))
    for run_id in runs:
        await record(cloud, run_id)
    with pytest.raises(NoTemplateError) as caught:
        await get_template.fn(WEB, target=TARGET)
    said = str(caught.value)
    assert said.startswith(
        "get template: no template of web was released: 12 is skipped: its release was cancelled on "
    )
    assert "--template-id 12 takes it anyway; 11 is skipped: its release failed on " in said
    assert said.endswith("Name the template to release with template_id.")


@pytest.mark.usefixtures("prefect_api")
async def test_without_an_answer_of_prefect_nothing_counts_as_released(make_cloud: Any) -> None:
    make_cloud(**web("c1", marks={10: None}))
    with respx.mock(assert_all_called=False) as router:
        router.post(path__regex="flow_runs/filter").respond(500)
        router.route().pass_through()
        with pytest.raises(ConfigurationError, match="the Prefect API did not answer") as caught:
            await get_template.fn(WEB, target=TARGET)
    assert caught.value.retryable


@pytest.mark.promise("A version that failed does not come back")
@pytest.mark.usefixtures("prefect_api")
async def test_a_rollback_goes_to_what_was_released_in_each_cluster(make_cloud: Any) -> None:
    half, bad, good = (
        await run_of(None, Failed()),
        await run_of(None, Failed()),
        await run_of(None, Completed()),
    )
    cloud = make_cloud(**web("c1", "c2", marks={10: None, 11: good, 12: half, 13: bad, 14: None}))
    await record(cloud, good, ("c1", "c2"))
    await record(cloud, half, ("c1", "c2"), {"12": {"c1": ("ready", 0), "c2": ("failed", 0)}})
    await record(cloud, bad, ("c1", "c2"))
    for template_id in (11, 12, 13, 14):
        for cluster in ("c1", "c2"):
            cloud.inside.publish(1, 1, template_id, cluster, 1, user="lisi", key=None)
    before = {name: Baseline(online=14) for name in ("c1", "c2")}

    async def chosen(**more: Any) -> dict[str, Any]:
        found = await choose_rollback.fn(WEB, before, target=TARGET, **more)
        return {cluster: revision.id for cluster, revision in found.items()}

    assert await chosen() == {"c1": 12, "c2": 11}
    assert await chosen(over={"c1": 15, "c2": 15}) == {"c1": 14, "c2": 14}
    before = {name: Baseline(online=13) for name in ("c1", "c2")}
    assert await chosen(over={"c1": 15, "c2": 15}) == {"c1": 14, "c2": 14}
    assert await chosen(to_template="13") == {"c1": 13, "c2": 13}
    # What the cloud has no more cannot come back.
    before = {name: Baseline(online=14) for name in ("c1", "c2")}
    del cloud.inside._deployments[1].templates[12]
    del cloud.inside._deployments[1].templates[11]
    found = await choose_rollback.fn(WEB, before, target=TARGET)
    assert {cluster: revision.id for cluster, revision in found.items()} == {"c1": 10, "c2": 10}
    assert found["c1"].notes[1:] == [
        "12 is skipped in c1: it was deleted",
        "11 is skipped in c1: it was deleted",
    ]
    del cloud.inside._deployments[1].templates[10]
    with pytest.raises(NoPreviousTemplateError) as caught:
        await choose_rollback.fn(WEB, before, target=TARGET)
    assert "has no earlier template for c1, c2 that was released there: 13 is skipped in c1: its" in str(
        caught.value
    )
    assert await choose_rollback.fn(WEB, before, over={"c1": 14, "c2": 14}, target=TARGET) == {}


@pytest.mark.usefixtures("prefect_api")
async def test_only_what_was_released_in_a_cluster_was_live_there(make_cloud: Any) -> None:
    bad, good = await run_of(None, Failed()), await run_of(None, Completed())
    cloud = make_cloud(**web("c1", "c2", marks={10: None, 11: good, 12: bad, 13: None, 14: None}))
    await record(cloud, good, ("c1", "c2"))
    await record(cloud, bad, ("c1", "c2"))
    await run_of(cloud, Completed(), ("c1",), {"13": {"c1": ("left", 1)}})
    for template_id in (11, 12, 13):
        cloud.inside.publish(1, 1, template_id, "c1", 1, user="lisi", key=None)

    async def where(template_id: int) -> list[str]:
        return await find_where_live.fn(WEB, ["c1", "c2"], template_id, target=TARGET)

    found = {number: await where(number) for number in (10, 11, 12, 13, 14, 99)}
    assert found == {10: ["c1", "c2"], 11: ["c1"], 12: [], 13: ["c1"], 14: [], 99: []}


@pytest.mark.usefixtures("prefect_api")
async def test_an_assistant_sees_which_templates_are_skipped(make_cloud: Any) -> None:
    bad = await run_of(None, Failed())
    cloud = make_cloud(**web("c1", marks={10: None, 11: bad}))
    await record(cloud, bad)
    async with get_client() as client:
        api = Api(client, TARGET, {}, None)
        found = await deployments.templates(api, Policy(), TARGET, 1, "web", 9)
    assert [(each.template_id, each.not_released.partition(" on ")[0]) for each in found.templates] == [
        (11, "<data>its release failed"),
        (10, ""),
    ]


# ---- real releases -------------------------------------------------------------------------------

FAST: dict[str, Any] = {
    "app_id": 1,
    "deployment": "web",
    "poll_seconds": 0.1,
    "poll_attempts": 200,
    "grace_seconds": 0.3,
    "lock_wait_seconds": 0,
}


async def deploy(tag: str = "", **more: Any) -> ReleaseResult:
    images = {"web": f"r/web:{tag}"} if tag else None
    result = await deploy_latest_image(**{**FAST, "images": images, **more})
    assert isinstance(result, ReleaseResult)
    return result


async def fails(release: Any, kind: type[RolloutError] = ReleaseError) -> ReleaseResult:
    with pytest.raises(kind) as caught:
        await release
    assert not isinstance(caught.value, RollbackFailedError), caught.value
    result = caught.value.result
    assert isinstance(result, ReleaseResult)
    return result


@pytest.mark.promise("A version that failed does not come back")
@pytest.mark.usefixtures("prefect_api")
async def test_a_version_that_failed_does_not_come_back(make_cloud: Any) -> None:
    cloud = make_cloud(**web("c1", marks={10: None}))
    assert (await fails(deploy("bad"))).template_id == 11
    assert (await rollback(**FAST)).template_id == 10
    plan = (await deploy(dry_run=True)).plan
    assert plan is not None
    assert (plan.base_template_id, plan.unknown) == (10, [])
    (note,) = plan.notes
    assert note.startswith("11 is skipped: its release failed on 20")
    assert note.endswith(" UTC; --template-id 11 takes it anyway")
    assert f"{note}." in plan_lines(plan)
    assert note in summary(plan)
    request = ReleaseRequest.of(app_id=1, deployment="web")
    empty = ReleaseResult(outcome=Outcome.FAILED, app_id=1, deployment="web", release_id="")
    assert "11 is skipped: its release failed on 20" in question(request, empty, plan)
    assert note in types.plan_of(plan.model_dump(mode="json")).lines[-2]
    # A batch, as a schedule, names no template either.
    done = await deploy_batch(Plan.of(releases=[FAST]))
    (row,) = done.releases
    assert (row.template, row.notes) == ("12", [note])
    assert cloud.writes[-2:] == ["template 12", "publish 12 to c1"]
    anyway = (await deploy(template_id=11, dry_run=True)).plan
    assert anyway is not None
    assert anyway.base_template_id == 11
    assert anyway.notes[0].startswith("11 is taken because it was named, although its release failed on ")
    assert anyway.plan_hash != plan.plan_hash


@pytest.mark.usefixtures("prefect_api")
async def test_after_failures_in_a_row_a_release_goes_back_to_the_last_that_was_released(
    make_cloud: Any,
) -> None:
    # By names alone, which is harder: nothing says which pods belong to which template.
    cloud = make_cloud(optional_fields=False, **web("c1", marks={10: None}))
    for number in (1, 2):
        await fails(deploy(f"bad{number}", poll_attempts=25))
    third = await fails(deploy("bad3", on_failure="rollback", poll_attempts=25))
    assert [(each.rolled_back, each.online) for each in third.clusters] == [(True, 10)]
    assert [note.partition(": ")[0] for note in third.notes] == [
        "12 is skipped",
        "11 is skipped",
        "12 is skipped in c1",
        "11 is skipped in c1",
    ]
    assert cloud.writes[-1] == "publish 10 to c1"
    assert all(truth["rolled_out"] and truth["template"] == 10 for truth in cloud.truth("web"))


@pytest.mark.usefixtures("prefect_api")
async def test_two_failures_a_rollback_and_what_is_published_again(make_cloud: Any) -> None:
    cloud = make_cloud(**web("c1", marks={10: None}))
    await fails(deploy("bad1"))
    await fails(deploy("bad2"))
    back = await rollback(**FAST)
    assert back.template_id == 10
    assert [note.partition(":")[0] for note in back.notes] == ["11 is skipped in c1"]
    cloud.inside.set_behaviour(1, "web", [])  # the image was pushed meanwhile
    assert (await get_template.fn(WEB, target=TARGET)).id == 10
    # On purpose, it is released and counts.
    again = await rollback(**FAST, to_template=12)
    assert again.notes[0].startswith(
        "12 is taken in c1 because it was named, although its release failed on "
    )
    newest = await get_template.fn(WEB, target=TARGET)
    assert (newest.id, newest.notes, newest.unknown) == (12, [], False)


@pytest.mark.usefixtures("prefect_api")
async def test_a_release_that_failed_and_became_ready_by_a_restart_counts(make_cloud: Any) -> None:
    cloud = make_cloud(**web("c1", marks={10: None}))
    failed = await fails(deploy("bad"))
    assert (await get_template.fn(WEB, target=TARGET)).id == 10
    cloud.inside.set_behaviour(1, "web", [])
    await restart(**FAST)
    assert (await get_template.fn(WEB, target=TARGET)).id == failed.template_id


@pytest.mark.usefixtures("prefect_api")
async def test_a_cluster_in_which_it_runs_well_keeps_it_and_the_newest_is_another(make_cloud: Any) -> None:
    bad = [{"kind": "image_cannot_be_pulled", "images": "bad", "clusters": ["c2"]}]
    cloud = make_cloud(**web("c1", "c2", marks={10: None}, behaviour=bad))
    await fails(deploy("bad", order="one-by-one"))
    assert [truth["template"] for truth in cloud.truth("web")] == [11, 11]
    await deploy("3")
    found = await choose_rollback.fn(WEB, {name: Baseline(online=12) for name in ("c1", "c2")}, target=TARGET)
    assert {cluster: revision.id for cluster, revision in found.items()} == {"c1": 11, "c2": 10}


# ---- closed windows ------------------------------------------------------------------------------


async def closed_target() -> str:
    """A saved target of the cloud in the environment, whose release window is closed."""
    name = f"r-{uuid4().hex[:8]}"
    rule = {"name": "freeze", "start": "2020-01-01", "end": "2199-12-31"}
    await ReleaseWindows.model_validate({"rules": [rule]}).asave(name)
    block = ContainerCloud.from_environment()
    assert block is not None
    block.windows = name
    await block.asave(name)
    return f"container-cloud/{name}"


@pytest.mark.usefixtures("prefect_api")
async def test_a_rollback_passes_a_closed_window_only_to_what_was_live_there(make_cloud: Any) -> None:
    bad = await run_of(None, Failed())
    cloud = make_cloud(**web("c1", "c2", marks={10: None, 11: None, 12: None, 13: bad}))
    await record(cloud, bad, ("c1", "c2"))
    cloud.inside.publish(1, 1, 13, "c1", 1, user="lisi", key=None)
    cloud.inside.publish(1, 1, 11, "c1", 1, user="lisi", key=None)
    written = len(cloud.writes)
    frozen = {**FAST, "target": await closed_target()}
    # Never published; published and never ready; live in one cluster of two.
    for template_id, clusters in ((12, "c1, c2"), (13, "c1, c2"), (11, "c2")):
        with pytest.raises(WindowClosedError) as caught:
            await rollback(**frozen, to_template=template_id)
        assert (
            f"is closed for {clusters} and does not reopen within a year; this rollback is not exempt: "
            in str(caught.value)
        )
        assert f"template {template_id} was never released there. " in str(caught.value)
    assert len(cloud.writes) == written
    assert (await rollback(**frozen, to_template=11, clusters=["c1"])).outcome is Outcome.RELEASED
    assert (await rollback(**frozen, clusters=["c1"])).template_id == 10
