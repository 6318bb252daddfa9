"""The command line with real processes, a real Prefect server and real sockets.

Processes are forked from one that has imported Prefect, unless the start itself is tested.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from oci_server import Registry

import forked
from servers import FROM_TEMPLATE, new_prefect_home
from support import BIN, Cloud, lives, shop
from tiny_images import NEW

COMMAND = BIN / "prefect-rollout"
Ended = subprocess.CompletedProcess[str]


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_HOME", "PREFECT_LOGGING", "K8S_"))
    }
    return {**kept, "HOME": str(home), **variables}


def executed(*arguments: str, home: Path, **variables: str) -> Ended:
    return subprocess.run(
        [COMMAND, *arguments],
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def call(*arguments: str, home: Path, **variables: str) -> Ended:
    return forked.run([COMMAND, *arguments], environment(home, **variables))


def deploy(cloud: Cloud, server: str, home: Path, *arguments: str, **variables: str) -> Ended:
    variables = {**cloud.environment, "PREFECT_API_URL": server, **variables}
    return call("deploy", *arguments, "--poll-seconds", "0.1", home=home, **variables)


HOME_APP = ["--app-id", "3290", "--deployment", "qapm-home"]


def test_help_names_the_commands(tmp_path: Path) -> None:
    shown = executed("--help", home=tmp_path)
    assert shown.returncode == 0
    for command in (
        *("demo", "simulate", "configure", "init"),
        *("deploy", "batch", "rollback", "restart", "scale", "retry"),
        "history",
    ):
        assert f" {command} " in shown.stdout


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("deploy", ["What", "--app-id", "--deployment", "--image", "--template-id", "--dry-run", "--reason"]),
        ("batch", ["What", " PLAN ", "--dry-run", "--only-failed"]),
        ("rollback", ["What", "--app-id", "--deployment", "--to-template", "--dry-run", "--reason"]),
        ("restart", ["What", "--app-id", "--deployment", "--dry-run", "--reason"]),
        ("scale", ["What", "--app-id", "--deployment", "--replicas", "--dry-run", "--reason"]),
    ],
)
def test_help_shows_the_options_in_groups_and_the_most_used_first(
    tmp_path: Path, command: str, shown: list[str]
) -> None:
    ended = call(command, "--help", home=tmp_path, COLUMNS="80")
    assert ended.returncode == 0
    _, panels = ended.stdout.split("\n\n╭", 1)
    watch = [] if command == "batch" else ["─ Watch ─", "--poll-seconds"]
    for text in (*shown, "─ How ─", *watch, "─ Safety ─", "--expect-plan", "─ Output ─", "--json"):
        assert text in panels
        panels = panels[panels.index(text) :]
    assert "--late-minutes" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) == 80


def test_a_missing_image_is_refused_with_similar_tags(
    make_cloud: Any, registry: Registry, prefect_server: str, tmp_path: Path
) -> None:
    cloud: Cloud = make_cloud(**shop(1, image=f"{registry.host}/shop/web:1.1.0"))
    options = ["--app-id", "1", "--deployment", "web", "--check-images", "auto"]
    image = f"web={registry.host}/shop/web:1.22.0"
    ended = deploy(cloud, prefect_server, tmp_path, *options, "--image", image)
    assert ended.returncode == 1, ended.stderr
    assert "has no tag '1.22.0'" in ended.stderr
    assert "Similar tags: 1.2.0" in ended.stderr
    wrong = deploy(cloud, prefect_server, tmp_path, *options, "--newest.range", "latest")
    assert wrong.returncode == 2
    assert "--newest.range: Value error, it is no range of versions" in " ".join(wrong.stderr.split())
    shown = deploy(cloud, prefect_server, tmp_path, *options, "--newest.by", "semver", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert f"in the registry: web is {NEW.digest[:19]}, built 2026-11-25" in shown.stderr
    assert cloud.record == []


@pytest.mark.promise("A failure says why")
def test_a_release_prints_one_json_object_and_nothing_else(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    ended = executed(
        *("deploy", *HOME_APP, "--poll-seconds", "0.1", "--json", "--reason", "测试"),
        home=tmp_path,
        PREFECT_API_URL=prefect_server,
        **cloud.environment,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["outcome"], result["deployment"], result["template_id"]) == (
        "released",
        "qapm-home",
        1343170,
    )
    assert result["images"] == {"qapm-home": "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7"}
    assert [(c["cluster"], c["replicas"], c["ready"]) for c in result["clusters"]] == [("pub-bjwdt", 1, 1)]
    assert "8/8 report release done" in ended.stderr
    assert "Released: qapm-home runs template 1343170" in ended.stderr
    assert len(cloud.record) == 2


def test_app_deployment_and_template_default_to_the_articles_variables(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    variables = {"K8S_APP_ID": "3290", "K8S_DEPLOY_NAME": "qapm-home", "K8S_TEMPLATE_ID": "1342977"}
    ended = deploy(cloud, prefect_server, tmp_path, "--json", **variables)
    assert json.loads(ended.stdout)["base_template_id"] == 1342977
    variables["K8S_TEMPLATE_ID"] = ""
    ended = deploy(cloud, prefect_server, tmp_path, "--dry-run", "--json", **variables)
    assert json.loads(ended.stdout)["base_template_id"] == 1343170


@pytest.mark.parametrize(
    ("deployment", "code", "outcome", "says"),
    [
        ("bad-image", 3, "timed-out", "ErrImagePull"),
        ("no-pods", 3, "timed-out", "no pod is listed"),
        ("no-quota", 1, "failed", "配额不足"),
        ("cluster-down", 1, "failed", "pub-bjyt"),
        ("qapm-hom", 1, "failed", "qapm-home"),
    ],
)
def test_a_release_that_does_not_end_well_says_why(
    cloud: Cloud, prefect_server: str, tmp_path: Path, deployment: str, code: int, outcome: str, says: str
) -> None:
    ended = deploy(
        cloud,
        prefect_server,
        tmp_path,
        *("--app-id", "3290", "--deployment", deployment, "--json", "--poll-attempts", "15"),
    )
    assert ended.returncode == code, ended.stderr
    result = json.loads(ended.stdout)
    assert result["outcome"] == outcome
    assert says in result["error"]["message"] + result["error"]["advice"]
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_was_released_is_rolled_back_restarted_and_scaled(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    def ended(command: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
        process = call(
            *(command, *HOME_APP, *arguments, "--poll-seconds", "0.1", "--json"),
            home=tmp_path,
            PREFECT_API_URL=prefect_server,
            **cloud.environment,
        )
        return process.returncode, json.loads(process.stdout), process.stderr

    assert ended("deploy")[0] == 0
    code, result, said = ended("rollback", "--reason", "wrong")
    assert (code, result["action"], result["template_id"]) == (0, "rollback", 1343102)
    assert "3/6 choose rollback done: pub-bjwdt to template 1343102" in said
    assert "Rolled back: qapm-home runs template 1343102" in said
    code, result, said = ended("restart")
    assert (code, result["action"]) == (0, "restart")
    assert "Restarted: qapm-home" in said
    code, result, said = ended("scale", "--replicas", "2")
    assert (code, result["clusters"][0]["ready"]) == (0, 2)
    assert "Scaled: qapm-home" in said
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish", "publish", "restart", "scale"]
    code, result, said = ended("rollback", "--to-template", "99")
    assert (code, result["error"]["type"]) == (1, "TemplateNotFoundError")


def test_a_release_that_fails_is_rolled_back_and_the_diagnosis_shown(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    ended = deploy(
        *(cloud, prefect_server, tmp_path),
        *("--app-id", "3290", "--deployment", "bad-image", "--json"),
        *("--on-failure", "rollback", "--grace-seconds", "1"),
    )
    assert ended.returncode == 1
    result = json.loads(ended.stdout)
    diagnosis = result["error"]["diagnosis"]
    assert (diagnosis["category"], diagnosis["cluster"]) == ("ImagePullError", "pub-bjwdt")
    assert diagnosis["pod"].startswith("bad-image-")
    assert [cluster["rolled_back"] for cluster in result["clusters"]] == [True]
    for text in ("ImagePullError", "rolled back", " UTC: pub-bjwdt has template 1343120 online"):
        assert text in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--app-id", "3290"], "--deployment"),
        ([*HOME_APP, "--image", "web"], "container=image"),
        ([*HOME_APP, "--image", "a=b", "--image", "a=c"], "twice"),
        ([*HOME_APP, "--poll-attempts", "0"], "poll_attempts"),
        ([*HOME_APP, "--poll-attempts", "many"], "many"),
        ([*HOME_APP, "--cluster", "a,b"], "clusters"),
        ([*HOME_APP, "--target", "nonsense"], "target"),
        ([*HOME_APP, "--target", "nothing/default"], "container-cloud"),
        ([*HOME_APP, "--nonsense"], "--nonsense"),
        ([*HOME_APP, "--order", "backwards"], "one-by-one"),
        ([*HOME_APP, "--grace-seconds", "-1"], "grace_seconds"),
        (["--app-id", "..", "--deployment", "qapm-home"], "app_id"),
    ],
)
def test_wrong_use_ends_2_and_names_what_is_wrong(
    cloud: Cloud, prefect_server: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    ended = deploy(cloud, prefect_server, tmp_path, *arguments, "--json")
    assert ended.returncode == 2, ended.stderr
    assert json.loads(ended.stdout)["outcome"] == "failed"
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert cloud.record == []


def test_a_prefect_api_that_does_not_answer_is_a_configuration_error(cloud: Cloud, tmp_path: Path) -> None:
    ended = deploy(cloud, "http://127.0.0.1:9/api", tmp_path, *HOME_APP, "--json")
    assert ended.returncode == 2
    assert json.loads(ended.stdout)["outcome"] == "failed"
    assert "PREFECT_API_URL" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_setting_that_cannot_be_used_is_named(cloud: Cloud, prefect_server: str, tmp_path: Path) -> None:
    ended = executed(
        *("deploy", *HOME_APP),
        home=tmp_path,
        PREFECT_API_URL=prefect_server,
        PREFECT_ROLLOUT_RETRIES="many",
        **cloud.environment,
    )
    assert ended.returncode == 2
    assert "retries" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_configure_saves_a_block_that_deploy_then_uses(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    saved = call(
        *("configure", "--name", "spare", "--app-id", "3290"),
        home=tmp_path,
        PREFECT_API_URL=prefect_server,
        **cloud.environment,
    )
    assert saved.returncode == 0, saved.stderr
    assert "app 3290 is qapm" in saved.stderr
    assert "demo-secret" not in saved.stdout + saved.stderr
    ended = call(
        *("deploy", *HOME_APP, "--target", "container-cloud/spare", "--poll-seconds", "0.1"),
        home=tmp_path,
        PREFECT_API_URL=prefect_server,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("variables", "code", "says"),
    [
        ({"K8S_SECRET_KEY": ""}, 2, "K8S_SECRET_KEY"),
        ({"K8S_API_URL": "http://example.com"}, 2, "http://"),
        ({"K8S_SECRET_KEY": "wrong-secret-7"}, 1, "configure"),
    ],
)
def test_configure_says_what_does_not_work(
    cloud: Cloud, prefect_server: str, tmp_path: Path, variables: dict[str, str], code: int, says: str
) -> None:
    ended = call(
        *("configure", "--name", "broken", "--app-id", "3290"),
        home=tmp_path,
        **{**cloud.environment, "PREFECT_API_URL": prefect_server, **variables},
    )
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "wrong-secret-7" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.server
@pytest.mark.xdist_group("ephemeral API")
def test_the_demo_releases_on_its_own_and_leaves_the_users_prefect_alone(tmp_path: Path) -> None:
    home = new_prefect_home(tmp_path / ".prefect-rollout" / "demo")
    # The demo ignores Prefect's environment variables.
    (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in FROM_TEMPLATE.items()))
    before = {
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "K8S_API_URL": "http://127.0.0.1:9",
        "PREFECT_ROLLOUT_LINGER_SECONDS": "0",
    }
    ended = call("demo", home=tmp_path, **before)
    assert ended.returncode == 0, ended.stderr
    for number in range(1, 9):
        assert f"{number}/8 " in ended.stderr
    assert "Released: qapm-home runs template 1343170" in ended.stderr
    assert "simulate" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".prefect-rollout"]


def killed_after_its_publish(cloud: Cloud, home: Path, **variables: str) -> None:
    """Start a release and kill its process when the publish has taken effect."""
    cloud.faults({"kind": "never", "call": "publish", "takes_effect": True, "nth": 1})
    process = forked.Process(
        [COMMAND, "deploy", *HOME_APP, "--poll-seconds", "0.1"],
        environment(home, **cloud.environment, **variables),
    )
    until = time.monotonic() + 120
    while not any(seen["fault"] for seen in cloud.requests):
        assert lives(process.pid)
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def test_a_killed_release_is_refused_while_it_counts_as_running_and_continued_once(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    api = {"PREFECT_API_URL": prefect_server}
    killed_after_its_publish(cloud, tmp_path, **api)
    (template, _) = cloud.record
    run_id = template["idempotency_key"].partition(":")[0]

    def retry() -> Ended:
        return call("retry", run_id, "--json", home=tmp_path, **cloud.environment, **api)

    early = retry()
    assert early.returncode == 2
    assert "has not ended: it is Running" in early.stderr
    assert json.loads(early.stdout)["error"]["field"] == "run_id"

    crashed = {"state": {"type": "CRASHED"}}
    assert httpx.post(f"{prefect_server}/flow_runs/{run_id}/set_state", json=crashed).is_success
    ended = retry()
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["outcome"], result["release_id"]) == ("released", run_id)
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]

    again = retry()
    assert again.returncode == 2
    assert "has succeeded already" in again.stderr
    assert "Traceback" not in early.stderr + ended.stderr + again.stderr


def test_a_release_cancelled_in_prefect_says_so_and_can_be_continued(
    make_cloud: Any, prefect_server: str, tmp_path: Path
) -> None:
    cloud = make_cloud(speed=5)  # slow-start takes longer than a cancel
    variables = {**cloud.environment, "PREFECT_API_URL": prefect_server}
    process = forked.Process(
        [
            *(COMMAND, "deploy", "--app-id", "3290", "--deployment", "slow-start"),
            *("--poll-seconds", "0.5", "--poll-attempts", "200"),
        ],
        environment(tmp_path, **variables),
    )
    said = ""
    while "wait for pods running" not in said:
        said += (line := process.stderr.readline())
        assert line, said
    run_id = cloud.record[0]["idempotency_key"].partition(":")[0]
    cancelling = {"state": {"type": "CANCELLING"}}
    assert httpx.post(f"{prefect_server}/flow_runs/{run_id}/set_state", json=cancelling).is_success
    said = process.stderr.read()
    assert process.wait(60) == 130
    assert "Cancelled: " in said
    assert "pub-bjwdt has template 1343170" in said
    assert "Traceback" not in said

    ended = call("retry", run_id, home=tmp_path, **variables)
    assert ended.returncode == 0, ended.stderr
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]


def test_runs_are_listed_and_named_by_the_first_characters_of_their_id(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    variables = {**cloud.environment, "PREFECT_API_URL": prefect_server}

    def answer(*arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        ended = call(*arguments, "--json", home=tmp_path, **variables)
        assert ended.returncode == code, ended.stderr
        return json.loads(ended.stdout), ended.stderr

    released, said = answer("deploy", *HOME_APP, "--poll-seconds", "0.1")
    run_id = released["release_id"]
    assert f"/runs/flow-run/{run_id}" in said
    runs = answer("list", "--deployment", "qapm-home", "--limit", "1")[0]["runs"]
    assert [(each["flow_run_id"], each["state"]) for each in runs] == [(run_id, "Completed")]
    assert answer("cancel", run_id[:13])[0]["flow_run_id"] == run_id
    refused, said = answer("retry", runs[0]["link"], code=2)
    assert "has succeeded already" in refused["error"]["message"]
    (cluster,) = answer("status", *HOME_APP)[0]["clusters"]
    assert (cluster["online_template"], cluster["replicas"]) == (1343170, 1)
    newest = answer("templates", *HOME_APP)[0]["templates"][0]
    assert (newest["template_id"], newest["online_in"]) == (1343170, ["pub-bjwdt"])


@pytest.mark.parametrize(
    ("flow", "says"),
    [
        ("", "is not the id of a flow run"),
        ("unknown", "has no flow run"),
        ("nightly", "is a run of the flow 'nightly'"),
        ("restart", "is a run of the flow 'restart'"),  # same name, but not our flow
    ],
)
def test_a_run_that_cannot_be_continued_is_named(
    cloud: Cloud, prefect_server: str, tmp_path: Path, flow: str, says: str
) -> None:
    run_id = {"": "qapm-home", "unknown": "00000000-0000-4000-8000-000000000000"}.get(flow)
    if run_id is None:
        with httpx.Client(base_url=prefect_server, timeout=30) as api:
            flow_id = api.post("/flows/", json={"name": flow}).json()["id"]
            run_id = api.post(
                "/flow_runs/", json={"flow_id": flow_id, "state": {"type": "FAILED", "name": "Failed"}}
            ).json()["id"]
    ended = call("retry", run_id, home=tmp_path, PREFECT_API_URL=prefect_server, **cloud.environment)
    assert ended.returncode == 2, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert cloud.requests == []


def test_the_simulator_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    process = forked.Process([COMMAND, "simulate", "--port", "0"], environment(tmp_path))
    exports = {}
    for line in process.stderr:
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").strip().partition("=")
            exports[name] = value
        if "K8S_DEPLOY_NAME" in line:
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(20) == 0
    assert "Traceback" not in said
    assert exports["K8S_APP_ID"] == "3290"
    assert exports["K8S_API_URL"].startswith("http://127.0.0.1:")


def test_a_scenario_with_a_mistake_is_refused_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text("apps: [{id: 1, nam: x}]\n")
    assert call("simulate", "--port", "99999", home=tmp_path).returncode == 2
    ended = call("simulate", "--scenario", str(tmp_path / "scenario.yaml"), home=tmp_path)
    assert ended.returncode == 2
    assert "apps.0" in ended.stderr
    assert "Traceback" not in ended.stderr


PLAN = """
defaults: {poll_seconds: 0.2, poll_attempts: 100, grace_seconds: 2}
failure_budget: 1
releases:
  - {app_id: 3290, deployment: qapm-home}
  - {app_id: 3290, deployment: bad-image}
  - {app_id: 3290, deployment: qapm-api, wave: 2, clusters: [pub-bjwdt]}
"""


def test_a_batch_shows_each_release_and_each_failure_and_is_continued(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN, encoding="utf-8")
    variables = {**cloud.environment, "PREFECT_API_URL": prefect_server}
    ended = call("batch", str(plan), "--json", home=tmp_path, **variables)
    assert ended.returncode == 1, ended.stderr
    lines = ended.stderr.splitlines()
    assert "wave 1: 2 releases" in lines
    assert "wave 2: 1 release" in lines
    assert any(re.match(r"3290/qapm-home released \(template \d+ → \d+\) in \d+ s", line) for line in lines)
    assert any(line.startswith("3290/bad-image failed in ") and "ImagePullError" in line for line in lines)
    result = json.loads(ended.stdout)
    assert {row["name"]: row["stage"] for row in result["releases"]} == {
        "3290/qapm-home": "released",
        "3290/bad-image": "failed",
        "3290/qapm-api": "released",
    }
    assert result["error"]["message"].startswith("1 failed, 2 released: 3290/bad-image: ")
    assert f"retry {result['batch_id']}" in ended.stderr
    written = len(cloud.record)

    cloud.control("PUT", "apps/3290/deployments/bad-image/behaviour", json=[])
    again = call("retry", result["batch_id"], "--json", home=tmp_path, **variables)
    assert again.returncode == 1, again.stderr  # its pods keep the missing image
    assert {row["name"] for row in json.loads(again.stdout)["releases"] if row["stage"] == "failed"} == {
        "3290/bad-image"
    }
    assert len(cloud.record) == written


def test_all_mistakes_of_a_plan_are_listed_with_their_lines(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("wave: 2", "wawe: 2").replace("qapm-home", "bad-image"), encoding="utf-8")
    ended = call("batch", str(plan), home=tmp_path)
    assert ended.returncode == 2
    assert "line 6" in ended.stderr
    assert "line 7" in ended.stderr
    assert "did you mean wave?" in ended.stderr
    missing = call("batch", str(tmp_path / "nowhere.yaml"), home=tmp_path)
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr
