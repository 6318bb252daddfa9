"""`prefect-rollout init`: the work pool, its queues, the deployments and the block types."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import forked
from support import BIN, prefect

ROOT = Path(__file__).parent.parent


def init(api: str, *options: str) -> Any:
    command = [BIN / "prefect-rollout", "init", "--json", *options]
    return forked.run(command, {**os.environ, "PREFECT_API_URL": api})


def changes(ended: Any) -> dict[str, str]:
    """Return what was created or updated, and the fields: `{"urgent": "updated priority"}`."""
    assert ended.returncode == 0, ended.stderr
    return {
        each["name"]: " ".join((each["change"], *each["fields"]))
        for each in json.loads(ended.stdout)["done"]
        if each["change"] != "unchanged"
    }


def empty(http: httpx.Client) -> None:
    http.delete("/work_pools/rollout")
    for each in http.post("/deployments/filter", json={}).json():
        http.delete(f"/deployments/{each['id']}")


@pytest.fixture
def http(prefect_server: str) -> Iterator[httpx.Client]:
    """A client of a server without deployments and the pool."""
    with httpx.Client(base_url=prefect_server, timeout=30) as client:
        empty(client)
        yield client
        empty(client)


def queues(http: httpx.Client) -> dict[str, tuple[int, int | None]]:
    found = http.post("/work_pools/rollout/queues/filter", json={}).json()
    return {each["name"]: (each["priority"], each["concurrency_limit"]) for each in found}


QUEUES = {"urgent": (1, None), "default": (2, None), "releases": (3, None), "batches": (4, 4)}


def test_init_makes_what_prefect_deploy_makes_and_changes_nothing_when_repeated(
    http: httpx.Client, prefect_server: str
) -> None:
    first = init(prefect_server)
    assert list(changes(first)) == [
        *("rollout", *QUEUES, "deploy-latest-image/deploy-latest-image", "deploy-batch/deploy-batch"),
        *("deploy-latest-image/batch-release", "rollback/rollback", "restart/restart", "scale/scale"),
    ]
    assert set(changes(first).values()) == {"created"}
    assert json.loads(first.stdout)["next"].endswith("prefect worker start --pool rollout")
    assert queues(http) == QUEUES
    made = schedules(http)
    assert [(each["slug"], each["active"]) for each in made] == [
        ("qapm-home-weekly", False),
        ("monthly", False),
    ]
    prefect(prefect_server, "--no-prompt", "deploy", "--all")
    assert changes(init(prefect_server)) == {}
    assert schedules(http) == made


def schedules(http: httpx.Client) -> list[dict[str, Any]]:
    found = http.post("/deployments/filter", json={"sort": "NAME_DESC"}).json()
    return [
        {key: each[key] for key in ("id", "slug", "active", "schedule", "parameters")}
        for deployment in found
        for each in deployment["schedules"]
    ]


def test_init_repairs_what_differs_and_keeps_schedules_and_limits_of_the_user(
    http: httpx.Client, prefect_server: str
) -> None:
    init(prefect_server)
    name = "deploy-latest-image/deploy-latest-image"
    found = http.get(f"/deployments/name/{name}").json()
    deployment = f"/deployments/{found['id']}"
    (schedule,) = found["schedules"]
    changed = {"active": True, "schedule": {"cron": "0 5 * * 3", "timezone": "UTC"}}
    http.patch(f"{deployment}/schedules/{schedule['id']}", json=changed).raise_for_status()
    http.post(f"{deployment}/schedules", json=[{"active": True, "schedule": {"interval": 3600}}])
    http.patch(deployment, json={"description": "mine", "concurrency_limit": 3, "paused": True})
    http.patch("/work_pools/rollout/queues/urgent", json={"priority": 4}).raise_for_status()
    http.patch("/work_pools/rollout/queues/batches", json={"concurrency_limit": 9}).raise_for_status()
    before = schedules(http)
    assert sum(each["active"] for each in before) == 2

    found = changes(init(prefect_server))
    assert found == {name: "updated description", "urgent": "updated priority", "batches": "updated priority"}
    assert queues(http) == {**QUEUES, "batches": (4, 9)}
    assert schedules(http) == before
    now = http.get(f"/deployments/name/{name}").json()
    assert now["global_concurrency_limit"]["limit"] == 3
    assert now["paused"] is True
    assert changes(init(prefect_server, "--batches", "2")) == {"batches": "updated concurrency_limit"}


def test_a_pool_of_another_type_and_an_unknown_type_are_errors_that_say_what_to_do(
    http: httpx.Client, prefect_server: str
) -> None:
    unknown = init(prefect_server, "--type", "proces")
    assert unknown.returncode == 2
    assert "There are: " in json.loads(unknown.stdout)["error"]["advice"]
    http.post("/work_pools/", json={"name": "rollout", "type": "process"}).raise_for_status()
    ended = init(prefect_server)
    assert ended.returncode == 2
    error = json.loads(ended.stdout)["error"]
    assert error["message"].startswith("the work pool rollout has the type process, not rollout")
    assert "`prefect work-pool delete rollout`" in error["advice"]
    assert "Traceback" not in ended.stderr
    assert http.post("/deployments/filter", json={}).json() == []


def test_write_makes_the_files_and_overwrites_none(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    ended = init("http://127.0.0.1:1/api", "--write", str(folder))
    assert ended.returncode == 0, ended.stderr
    sources = {"prefect.yaml": ROOT / "prefect.yaml"} | {
        f"automations/{file.name}": file for file in (ROOT / "docs/automations").glob("*.yaml")
    }
    written = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.yaml")}
    assert written == {name: file.read_text() for name, file in sources.items()}
    assert set(json.loads(ended.stdout)["files"]) == {str(folder / name) for name in sources}
    (folder / "prefect.yaml").write_text("mine")
    (folder / "automations/killed.yaml").unlink()
    again = init("http://127.0.0.1:1/api", "--write", str(folder))
    assert again.returncode == 2
    assert str(folder / "prefect.yaml") in json.loads(again.stdout)["error"]["message"]
    assert (folder / "prefect.yaml").read_text() == "mine"
    assert not (folder / "automations/killed.yaml").exists()
