import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_rollout.simulator.engine import Bounds, Rollout, Spec
from prefect_rollout.simulator.events import events_of
from prefect_rollout.simulator.pod import Fate, Revision
from prefect_rollout.simulator.scenario import BehaviourKind


def spec(
    template: int, content: str | None = None, wanted: int = 1, image: str = "good", **more: object
) -> Spec:
    revision = Revision.of(content or f"content {template}", {"web": image})
    return Spec(template_id=template, revision=revision, wanted=wanted, **more)  # type: ignore[arg-type]


def rollout(kind: BehaviourKind = "normal", online: Spec | None = None) -> Rollout:
    """Observes after 1 s, pulls for 2 s, starts for 3 s, terminates for 3 s; `bad` images have `kind`."""

    def fate(images: Mapping[str, str]) -> Fate:
        return Fate(2, 3, kind if "bad" in images.values() else "normal")

    made = Rollout("qapm-home", "pub-bjwdt", observe=1, terminate=3, fate=fate)
    if online:
        made.start_online(online, since=-100)
    return made


def is_rolled_out(engine: Rollout, now: float) -> bool:
    engine.advance(now)
    return engine.rolled_out


def states(engine: Rollout, now: float) -> list[str]:
    engine.advance(now)
    return [pod.state(now) for pod in engine.pods]


@pytest.mark.parametrize(
    ("surge", "unavailable", "wanted", "expected"),
    [
        ("25%", "25%", 1, Bounds(1, 0)),
        ("25%", "25%", 10, Bounds(3, 2)),
        (0, 0, 5, Bounds(0, 1)),
        ("0%", "10%", 5, Bounds(0, 1)),
        (2, 1, 5, Bounds(2, 1)),
        (None, "nonsense", 4, Bounds(1, 1)),
        ("100%", True, 3, Bounds(3, 0)),
    ],
)
def test_bounds_round_as_kubernetes_does(
    surge: object, unavailable: object, wanted: int, expected: Bounds
) -> None:
    assert Bounds.of(surge, unavailable, wanted) == expected


def test_old_pods_read_running_until_the_write_is_observed() -> None:
    engine = rollout(online=spec(1))
    engine.publish(0, spec(2))
    assert states(engine, 0.9) == ["Running"]
    assert (engine.generation, engine.observed_generation, engine.updated) == (2, 1, 1)
    assert not engine.rolled_out
    assert states(engine, 1) == ["Running", "Pending"]
    assert engine.observed_generation == 2


def test_a_release_passes_through_every_state_and_ends_after_9_seconds() -> None:
    engine = rollout(online=spec(1))
    engine.publish(0, spec(2))
    assert states(engine, 2.9) == ["Running", "Pending"]
    assert states(engine, 3) == ["Running", "ContainersNotReady"]
    assert states(engine, 6) == ["Terminating", "Running"]
    assert not is_rolled_out(engine, 6)
    assert states(engine, 9) == ["Running"]
    assert is_rolled_out(engine, 9)
    assert engine.done_at == 9


def test_one_jump_ends_where_many_steps_end() -> None:
    jumped, stepped = rollout(online=spec(1, wanted=5)), rollout(online=spec(1, wanted=5))
    for engine in (jumped, stepped):
        engine.publish(0, spec(2, wanted=5))
    for second in range(100):
        stepped.advance(second)
    jumped.advance(1e9)
    assert jumped.done_at == stepped.done_at is not None
    assert [pod.name for pod in jumped.pods] == [pod.name for pod in stepped.pods]


BOUND = st.one_of(st.integers(0, 4), st.integers(0, 100).map(lambda percent: f"{percent}%"))


@given(
    wanted=st.integers(0, 8),
    surge=BOUND,
    unavailable=BOUND,
    in_place=st.booleans(),
    writes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=5),
)
def test_pods_stay_within_the_bounds_and_the_last_write_wins(
    wanted: int, surge: object, unavailable: object, in_place: bool, writes: list[tuple[int, int]]
) -> None:
    bounds = Bounds.of(surge, unavailable, wanted)
    least = wanted - (max(1, bounds.unavailable) if in_place else bounds.unavailable)
    most = wanted if in_place else wanted + bounds.surge

    def wish(template: int) -> Spec:
        return spec(template, wanted=wanted, max_surge=surge, max_unavailable=unavailable, in_place=in_place)

    engine = rollout(online=wish(0))
    now = 0
    for wait, template in writes:
        for _ in range(wait):
            now += 1
            engine.advance(now)
            alive = [pod for pod in engine.pods if pod.deleted is None]
            assert len(alive) <= most
            assert engine.ready >= least
        if template:
            engine.publish(now, wish(template))
        else:
            engine.restart(now)
    engine.advance(now + 1000)
    assert engine.rolled_out


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(0, 9), st.booleans()), min_size=1
    )
)
def test_whatever_is_asked_for_last_is_what_comes(
    writes: list[tuple[int, int, int, bool]],
) -> None:
    engine = rollout()
    now = 0
    for wait, template, wanted, in_place in writes:
        now += wait
        engine.publish(now, spec(template, wanted=wanted, in_place=in_place))
    engine.advance(now + 1000)
    assert engine.rolled_out
    assert engine.spec is not None
    assert len(engine.pods) == engine.spec.wanted


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("image_cannot_be_pulled", "Pending"),
        ("invalid_image", "Pending"),
        ("unschedulable", "Pending"),
        ("config_error", "Pending"),
        ("never_ready", "ContainersNotReady"),
    ],
)
def test_a_hopeless_pod_keeps_its_state_and_the_old_one_keeps_running(
    kind: BehaviourKind, state: str
) -> None:
    engine = rollout(kind, online=spec(1))
    engine.publish(0, spec(2, image="bad"))
    for now in (10, 100, 1e6):
        assert states(engine, now) == ["Running", state]
        assert not engine.rolled_out
    assert engine.pods[1].restart_count(1e6) == 0


def test_a_crashing_pod_restarts_and_looks_running_for_moments() -> None:
    engine = rollout("crash_loop", online=spec(1))
    engine.publish(0, spec(2, image="bad"))
    seen = [states(engine, now)[1] for now in range(1, 60)]
    assert set(seen) == {"Pending", "ContainersNotReady", "Running"}
    assert not engine.rolled_out
    pod = engine.pods[1]
    assert [pod.restart_count(now) for now in (1, 10, 17, 24)] == [0, 1, 2, 3]
    assert pod.state(10) == "Running"
    assert not pod.is_ready(10)


def test_a_crashing_pod_updated_in_place_is_never_taken_for_released() -> None:
    engine = rollout("crash_loop", online=spec(1, in_place=True))
    engine.publish(0, spec(2, image="bad", in_place=True))
    for tenth in range(10, 600):
        engine.advance(tenth / 10)
        assert not engine.rolled_out


def test_pods_are_withheld_for_as_long_as_the_cluster_makes_none() -> None:
    engine = rollout()
    engine.publish(0, spec(1, no_pods_for=30))
    assert states(engine, 29) == []
    assert engine.lists_no_pods
    assert states(engine, 30) == ["Pending"]
    assert states(engine, 35) == ["Running"]
    assert engine.rolled_out


def test_a_cluster_that_makes_no_pods_ever_is_never_released() -> None:
    engine = rollout()
    engine.publish(0, spec(1, no_pods_for=math.inf))
    assert states(engine, 1e9) == []
    assert not engine.rolled_out


def test_unchanged_content_keeps_its_pods_under_a_new_label() -> None:
    engine = rollout(online=spec(1, "same"))
    before = engine.pods[0].name
    engine.publish(0, spec(2, "same"))
    engine.advance(0.5)
    assert engine.pods[0].template_id == 1
    assert not engine.rolled_out
    engine.advance(1)
    assert [(pod.name, pod.template_id) for pod in engine.pods] == [(before, 2)]
    assert engine.done_at == 1


def test_publishing_what_runs_already_is_not_done_before_it_is_observed() -> None:
    engine = rollout(online=spec(1))
    engine.publish(0, spec(1))
    assert not is_rolled_out(engine, 0.9)
    assert is_rolled_out(engine, 1)


def test_in_place_keeps_names_and_restarts_containers() -> None:
    engine = rollout(online=spec(1, wanted=2, in_place=True))
    names = [pod.name for pod in engine.pods]
    engine.publish(0, spec(2, wanted=2, in_place=True))
    assert sorted(states(engine, 1)) == ["ContainersNotReady", "Running"]
    engine.advance(100)
    assert [pod.name for pod in engine.pods] == names
    assert [pod.restart_count(100) for pod in engine.pods] == [1, 1]
    assert engine.rolled_out


def test_a_restart_replaces_all_pods() -> None:
    engine = rollout(online=spec(1, wanted=3))
    names = {pod.name for pod in engine.pods}
    engine.restart(0)
    engine.advance(100)
    assert engine.rolled_out
    assert names.isdisjoint(pod.name for pod in engine.pods)


def test_scaling_changes_the_number_and_keeps_the_rest() -> None:
    engine = rollout(online=spec(1, wanted=2))
    kept = {pod.name for pod in engine.pods}
    engine.scale(0, 4)
    engine.advance(100)
    assert len(engine.pods) == 4
    assert kept < {pod.name for pod in engine.pods}
    engine.scale(100, 1)
    engine.advance(200)
    assert len(engine.pods) == 1
    assert engine.rolled_out


def test_a_rollback_in_mid_rollout_ends_with_the_old_template() -> None:
    engine = rollout("image_cannot_be_pulled", online=spec(1, wanted=4))
    kept = {pod.name for pod in engine.pods}
    engine.publish(0, spec(2, image="bad", wanted=4))
    assert not is_rolled_out(engine, 50)
    assert engine.ready == 3
    engine.publish(50, spec(1, wanted=4))
    assert is_rolled_out(engine, 100)
    assert len(kept & {pod.name for pod in engine.pods}) == 3


def test_pod_names_are_the_same_in_every_run() -> None:
    assert rollout(online=spec(1)).pods[0].name == rollout(online=spec(1)).pods[0].name


def test_a_slow_pull_ends_and_all_goes_on_normally() -> None:
    engine = Rollout("web", "c", observe=1, terminate=3, fate=lambda _: Fate(12, 3, "slow_pull", failing=10))
    engine.publish(0, spec(1))
    assert events(engine, 10.9) == ["Failed", "Failed", "BackOff"]
    assert events(engine, 11) == []
    assert states(engine, 12.9) == ["Pending"]
    assert states(engine, 16) == ["Running"]


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("normal", []),
        ("image_cannot_be_pulled", ["Failed", "Failed", "BackOff"]),
        ("invalid_image", ["InspectFailed"]),
        ("unschedulable", ["FailedScheduling"]),
        ("config_error", ["Failed"]),
        ("crash_loop", ["BackOff"]),
        ("never_ready", ["Unhealthy"]),
    ],
)
def test_a_pod_that_is_not_ready_has_events_that_say_why(kind: BehaviourKind, reasons: list[str]) -> None:
    engine = rollout(kind, online=spec(1))
    engine.publish(0, spec(2, image="bad"))
    assert events(engine, 12) == reasons
    engine.publish(20, spec(1))
    assert events(engine, 21) == []


def events(engine: Rollout, now: float) -> list[str]:
    engine.advance(now)
    return [event.reason for pod in engine.pods for event in events_of(pod, now, str)]
