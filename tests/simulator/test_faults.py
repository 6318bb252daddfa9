from collections.abc import Callable
from email.utils import parsedate_to_datetime

import httpx
import pytest

from prefect_rollout.simulator.fault import Fault, FaultPlan
from simulator.caller import Caller, Calling, refusal


def statuses(caller: Caller, count: int) -> list[int]:
    return [caller.http.get("/apps/3290").status_code for _ in range(count)]


def test_an_error_status_has_the_envelope_and_no_effect(calling: Calling) -> None:
    caller = calling(
        faults=[{"kind": "status", "call": "upgrade", "status": 503, "sub_code": 7, "retry_after": 2}]
    )
    answer = caller.upgrade()
    assert refusal(answer) == (503, 7)
    assert answer.headers["Retry-After"] == "2"
    assert caller.cloud.record() == []


def test_retry_after_can_be_an_http_date(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "status", "status": 429, "retry_after": "http-date:60"}])
    answer = caller.http.get("/apps/3290")
    until = parsedate_to_datetime(answer.headers["Retry-After"])
    now = parsedate_to_datetime(answer.headers["Date"])
    assert 50 < (until - now).total_seconds() < 70


def test_an_error_can_be_a_proxys_page(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "status", "status": 502, "html": True}])
    answer = caller.http.get("/apps/3290")
    assert (answer.status_code, answer.headers["Content-Type"]) == (502, "text/html; charset=utf-8")


def test_an_error_can_follow_the_effect(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "status", "status": 500, "takes_effect": True}])
    assert caller.upgrade().status_code == 500
    assert len(caller.cloud.record("template")) == 1


def test_a_reset_before_leaves_nothing_written(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "reset_before", "call": "upgrade"}])
    with pytest.raises(httpx.ReadError) as caught:
        caller.upgrade()
    assert "reset" in repr(caught.value).lower()
    assert caller.cloud.record() == []


def test_a_reset_after_leaves_the_write_in_the_record(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "reset_after", "call": "publish"}])
    with pytest.raises(httpx.ReadError) as caught:
        caller.publish()
    assert "reset" in repr(caught.value).lower()
    [written] = caller.cloud.record("publish")
    assert (written.template, written.cluster, written.replicas) == (1343169, "pub-bjwdt", 1)


def test_a_cut_answer_promises_more_than_it_sends(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "cut", "call": "upgrade"}])
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        caller.upgrade()
    assert len(caller.cloud.record()) == 1


def test_malformed_html_and_empty_answers_are_200(calling: Calling) -> None:
    caller = calling(
        faults=[
            {"kind": "malformed", "call": "app"},
            {"kind": "html", "call": "deployments"},
            {"kind": "empty", "call": "upgrade"},
        ]
    )
    malformed, page, empty = (
        caller.http.get("/apps/3290"),
        caller.http.get("/apps/3290/deployments"),
        caller.upgrade(),
    )
    assert {answer.status_code for answer in (malformed, page, empty)} == {200}
    with pytest.raises(ValueError, match="Unterminated string"):
        malformed.json()
    assert page.text.startswith("<!DOCTYPE html>")
    assert empty.content == b""
    assert len(caller.cloud.record()) == 1


def test_an_endless_answer_goes_on_until_the_client_hangs_up(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "endless", "call": "app", "times": 1}])
    read = 0
    with caller.http.stream("GET", "/apps/3290") as answer:
        for part in answer.iter_raw():
            read += len(part)
            if read > 2**23:
                break
    assert caller.data("/apps/3290")["id"] == 3290


def test_no_answer_leaves_the_client_waiting(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "never", "call": "upgrade"}])
    caller.http.timeout = httpx.Timeout(0.2)
    with pytest.raises(httpx.ReadTimeout):
        caller.upgrade()
    assert caller.cloud.record() == []
    assert caller.cloud.requests("upgrade")[0].status is None


def test_a_delayed_answer_is_the_true_one(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "delay", "seconds": 0.01}])
    assert caller.data("/apps/3290")["id"] == 3290
    assert caller.cloud.requests()[0].fault == "delay"


def test_faults_strike_the_calls_named_by_number(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "status", "call": "app", "nth": [1, 3], "status": 503}])
    assert statuses(caller, 4) == [503, 200, 503, 200]


def test_faults_strike_so_many_times(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "status", "status": 503, "times": 2}])
    assert statuses(caller, 3) == [503, 503, 200]


def test_faults_strike_by_chance_the_same_way_each_time(calling: Calling) -> None:
    fault = {"kind": "status", "status": 503, "probability": 0.5, "seed": 4}
    runs = [statuses(calling(faults=[fault]), 20) for _ in range(2)]
    assert runs[0] == runs[1]
    assert set(runs[0]) == {200, 503}


def test_faults_keep_to_their_cluster_and_deployment(calling: Calling) -> None:
    caller = calling(
        faults=[
            {"kind": "status", "status": 500, "cluster": "pub-bjyt"},
            {"kind": "status", "status": 502, "deployment": "qapm-home"},
        ]
    )
    path = "/apps/3290/deployments"
    answered = {
        query: caller.http.get(f"{path}{query}").status_code
        for query in (
            "/20772/status?cluster=pub-bjwdt",
            "/20772/status?cluster=pub-bjwdt,pub-bjyt",
            "/20771/status?cluster=pub-bjwdt",
            "?filter=name__exact=qapm-home",
            "?filter=name__exact=qapm-api",
            "/tpls?deploymentId=20771",
            "/tpls/1343169",
            "/tpls/1343161",
        )
    }
    assert list(answered.values()) == [200, 500, 502, 502, 200, 502, 502, 200]
    assert caller.http.get("/publishstatus?resourceId=20771").status_code == 502


def test_the_control_api_is_never_struck(calling: Calling) -> None:
    caller = calling(faults=[{"kind": "reset_before"}])
    host = f"http://{caller.http.base_url.netloc.decode()}"
    assert httpx.get(f"{host}/_control/record").json() == []
    assert httpx.put(f"{host}/_control/faults", json=[]).status_code == 200
    assert statuses(caller, 1) == [200]


CALLS: list[tuple[str, Callable[[Caller], object]]] = [
    ("app", lambda caller: caller.http.get("/apps/3290")),
    ("deployments", lambda caller: caller.http.get("/apps/3290/deployments")),
    ("templates", lambda caller: caller.http.get("/apps/3290/deployments/tpls")),
    ("template", lambda caller: caller.http.get("/apps/3290/deployments/tpls/1343169")),
    ("upgrade", lambda caller: caller.upgrade()),
    ("publish", lambda caller: caller.publish()),
    ("status", lambda caller: caller.status()),
    ("online", lambda caller: caller.http.get("/publishstatus?resourceId=20771")),
    ("history", lambda caller: caller.http.get("/publish/histories?resourceId=20771")),
    ("restart", lambda caller: caller.http.post("/apps/3290/deployments/20771/clusters/pub-bjwdt/restart")),
    (
        "scale",
        lambda caller: caller.http.post(
            "/apps/3290/deployments/20771/clusters/pub-bjwdt/scale", json={"replicas": 1}
        ),
    ),
]


@pytest.mark.parametrize(("call", "ask"), CALLS, ids=[call for call, _ in CALLS])
def test_every_call_is_known_by_its_name(caller: Caller, call: str, ask: Callable[[Caller], object]) -> None:
    ask(caller)
    [seen] = caller.cloud.requests()
    assert (seen.call, seen.status, seen.fault) == (call, 200, None)


def test_an_earlier_fault_goes_first_and_both_count() -> None:
    plan = FaultPlan(
        [
            Fault(kind="status", status=500, nth=[1]),
            Fault(kind="status", status=503, nth=[2]),
        ]
    )
    struck = [plan.strike("app", [], None) for _ in range(3)]
    assert [fault and fault.status for fault in struck] == [500, 503, None]
