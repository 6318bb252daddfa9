import json
from pathlib import Path

import pytest

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.simulator import Scenario, load_scenario
from prefect_rollout.simulator.cloud import Cloud
from simulator.caller import Calling

EXAMPLE = """
key_id: k
secret_key: s
extra_keys:
  - {key_id: reader, secret_key: r, read_only: true}
timings: {observe: 0.5}
publish_lock: 3
apps:
  - id: 1
    name: shop
    deployments:
      - id: 10
        name: web
        clusters: {east: 2, west: {replica: 3, hostGroup: gpu}}
        templates:
          - {id: 100, image: "registry/web:1"}
          - {id: 101, images: {web: "registry/web:2", proxy: "registry/proxy:1"}}
        online: {east: 100}
        behaviour: {kind: crash_loop, images: "web:2"}
faults:
  - {call: publish, nth: 1, kind: status, status: 503, retry_after: 2}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, EXAMPLE))
    [deployment] = scenario.apps[0].deployments
    assert json.loads(deployment.meta_text())["clusters"]["west"]["hostGroup"] == "gpu"
    assert deployment.behaviour[0].kind == "crash_loop"
    assert scenario.faults[0].retry_after == "2"
    assert set(scenario.keys()) == {"k", "reader"}


def test_a_json_file_is_read(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, '{"optional_fields": false}'))
    assert not scenario.optional_fields
    assert scenario.apps[0].id == 3290


def test_an_empty_file_is_the_articles_cloud(tmp_path: Path) -> None:
    assert load_scenario(written(tmp_path, "")) == Scenario()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optional_field: true", "optional_field: Extra inputs"),
        ("page_size_limit: 101", "page_size_limit: Input should be less"),
        ("[1, 2]", "valid dictionary"),
        ("apps: [{id: 1}]", "apps.0.name: Field required"),
        ("apps: [{id: 1, name: a}, {id: 1, name: b}]", "app id 1 stands twice"),
        ("apps: [{id: 1, name: a, copies: 2}, {id: 2, name: b}]", "app id 2 stands twice"),
        ("faults: [{kind: status}]", "faults.0: Value error, kind status needs a status"),
        ("faults: [{kind: delay}]", "faults.0: Value error, kind delay needs seconds"),
        ("faults: [{kind: cut, call: upgrades}]", "faults.0.call: Input should be"),
        ("faults: [{kind: cut, takes_effect: false}]", "leaves takes_effect no choice"),
        ("faults: [{kind: status, status: 503, retry_after: soon}]", "faults.0.retry_after"),
        ("extra_keys: [{key_id: demo-key, secret_key: x}]", "a key_id stands twice"),
        (EXAMPLE.replace("crash_loop", "slow_start"), "behaviour.0: Value error, slow_start needs seconds"),
        (EXAMPLE.replace("online: {east: 100}", "online: {east: 5}"), "has no template 5"),
        (EXAMPLE.replace("online: {east: 100}", "online: {north: 100}"), "online.north"),
        (EXAMPLE.replace('id: 100, image: "registry/web:1"', "id: 100"), "exactly one of image"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_scenario(path)
    assert named in str(caught.value)
    assert "scenario.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml cannot be read"):
        load_scenario(tmp_path / "nowhere.yaml")


def test_an_unreadable_template_cannot_be_online() -> None:
    home = {
        "id": 7,
        "name": "web",
        "clusters": {"c": 1},
        "templates": [{"id": 1, "template": "{"}],
        "online": {"c": 1},
    }
    scenario = Scenario.model_validate({"apps": [{"id": 1, "name": "a", "deployments": [home]}]})
    with pytest.raises(ConfigurationError, match="template 1 is online and unreadable"):
        Cloud(scenario)


@pytest.mark.parametrize("meta", ["{not json", "[]", "", '{"clusters": {"c": {}}}'])
def test_metadata_is_served_as_it_stands(calling: Calling, meta: str) -> None:
    home = {"id": 7, "name": "web", "metaData": meta, "clusters": {"c": 1}}
    caller = calling(apps=[{"id": 3290, "name": "a", "deployments": [home]}])
    assert caller.data("/apps/3290/deployments")["list"][0]["metaData"] == meta


def test_a_thousand_copies_answer_each_for_itself(calling: Calling) -> None:
    app = Scenario().apps[0].model_dump(by_alias=True)
    app["deployments"] = app["deployments"][:2]
    caller = calling(apps=[{**app, "copies": 1000}])
    assert caller.data("/apps/3290")["name"] == "qapm"
    assert caller.data("/apps/4289")["name"] == "qapm-1000"
    found = caller.data("/apps/4289/deployments", filter="name__exact=qapm-home")["list"]
    [online] = caller.data("/publishstatus", resourceId=found[0]["id"])
    template = caller.data(f"/apps/4289/deployments/tpls/{online['templateId']}")
    assert template["deploymentId"] == found[0]["id"]
    assert caller.cloud.rolled_out("qapm-home", "pub-bjwdt", app_id=4289)
    ids = {row.template for row in caller.cloud.truth(deployment="qapm-home")}
    assert len(ids) == 1000
