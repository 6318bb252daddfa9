from collections.abc import Iterator

import httpx
import pytest

from prefect_rollout.simulator import SimulatorServer
from simulator.caller import Caller, refusal


@pytest.fixture
def control(server: SimulatorServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/_control") as http:
        yield http


def test_the_record_holds_what_was_written(caller: Caller, control: httpx.Client) -> None:
    caller.upgrade(description="release=01JD", headers={"Idempotency-Key": "01JD:upgrade"})
    caller.publish(template=1343170)
    template, publish = control.get("/record").json()
    assert template == {
        "kind": "template",
        "app": 3290,
        "deployment": "qapm-home",
        "template": 1343170,
        "cluster": None,
        "replicas": None,
        "at": pytest.approx(0, abs=1e-3),
        "idempotency_key": "01JD:upgrade",
        "description": "release=01JD",
    }
    assert (publish["kind"], publish["cluster"], publish["replicas"]) == ("publish", "pub-bjwdt", 1)
    assert control.get("/record", params={"kind": "publish"}).json() == [publish]


def test_requests_are_kept_without_their_signature(caller: Caller, control: httpx.Client) -> None:
    caller.data("/apps/3290/deployments", filter="name__exact=qapm-home")
    caller.http.get("/apps/1")
    caller.upgrade()
    found = control.get("/requests").json()
    assert [(each["number"], each["call"], each["status"]) for each in found] == [
        (1, "deployments", 200),
        (2, "app", 404),
        (3, "upgrade", 200),
    ]
    assert found[0]["path"] == "/openapi/v1/apps/3290/deployments?filter=name__exact%3Dqapm-home"
    assert "authorization" not in found[0]["headers"]
    assert found[0]["headers"]["x-stark-env"] == "test"
    assert '"templateId":1343169' in found[2]["body"]
    assert [each["number"] for each in control.get("/requests", params={"call": "app"}).json()] == [2]


def test_the_truth_says_when_a_rollout_was_done(caller: Caller, control: httpx.Client) -> None:
    caller.publish()
    wish = {"app": "3290", "deployment": "qapm-home"}
    [running] = control.get("/truth", params=wish).json()
    assert (running["template"], running["wanted"], running["rolled_out"], running["at"]) == (
        1343169, 1, False, None,
    )  # fmt: skip
    assert control.post("/advance", json={"seconds": 60}).json()["now"] == pytest.approx(60, abs=1e-3)
    [done] = control.get("/truth", params=wish).json()
    assert done["rolled_out"]
    assert done["at"] == pytest.approx(9, abs=1e-3)
    assert [pod["state"] for pod in done["pods"]] == ["Running"]


def test_a_reset_begins_anew(caller: Caller, control: httpx.Client) -> None:
    caller.upgrade(headers={"Idempotency-Key": "k"})
    control.post("/advance", json={"seconds": 60})
    assert control.post("/reset").json()["now"] == pytest.approx(0, abs=1e-3)
    assert control.get("/record").json() == []
    assert control.get("/requests").json() == []
    assert caller.upgrade(headers={"Idempotency-Key": "k"}).json()["data"]["templateIds"] == [1343170]


def test_the_scenario_can_be_replaced(caller: Caller, control: httpx.Client) -> None:
    scenario = {"apps": [{"id": 5, "name": "shop"}]}
    assert control.put("/scenario", json=scenario).status_code == 200
    assert caller.data("/apps/5")["name"] == "shop"
    assert refusal(control.put("/scenario", json={"app": []})) == (400, 0)
    assert caller.data("/apps/5")["name"] == "shop"


def test_a_scenario_that_cannot_be_built_leaves_the_present_one(
    caller: Caller, control: httpx.Client
) -> None:
    home = {
        "id": 7,
        "name": "web",
        "clusters": {"c": 1},
        "templates": [{"id": 1, "template": "{"}],
        "online": {"c": 1},
    }
    scenario = {"apps": [{"id": 1, "name": "a", "deployments": [home]}]}
    assert refusal(control.put("/scenario", json=scenario)) == (400, 0)
    assert caller.data("/apps/3290")["name"] == "qapm"


def test_a_behaviour_can_be_replaced(caller: Caller, control: httpx.Client) -> None:
    path = "/apps/3290/deployments/qapm-home/behaviour"
    assert control.put(path, json={"kind": "never_ready"}).status_code == 200
    caller.publish()
    caller.cloud.advance(100)
    assert caller.states() == ["Running", "ContainersNotReady"]
    assert control.put(path, json=[]).status_code == 200
    caller.publish(template=1342977)
    caller.cloud.advance(100)
    assert caller.states() == ["Running"]
    assert refusal(control.put(path, json={"kind": "no_such"})) == (400, 0)
    assert refusal(control.put("/apps/3290/deployments/x/behaviour", json=[])) == (404, 0)


def test_the_root_says_what_this_is(server: SimulatorServer) -> None:
    answer = httpx.get(server.url)
    assert answer.status_code == 200
    assert "simulated" in answer.json()["what"]
