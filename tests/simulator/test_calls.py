import json

import httpx
import pytest

from prefect_rollout.simulator import article
from simulator.caller import Caller, Calling, refusal


def test_the_app_is_the_articles(caller: Caller) -> None:
    expected = {"id": 3290, "name": "qapm", "namespace": "qdgc", "kubeNamespace": "qdgc"}
    assert caller.data("/apps/3290") == expected


def test_a_deployment_is_found_by_its_exact_name(caller: Caller) -> None:
    page = caller.data("/apps/3290/deployments", filter="name__exact=qapm-home")
    assert {name: page[name] for name in ("pageNo", "pageSize", "totalPage", "totalCount")} == {
        "pageNo": 1,
        "pageSize": 10,
        "totalPage": 1,
        "totalCount": 1,
    }
    [found] = page["list"]
    assert set(found) == {"id", "name", "metaData", "appId"}
    meta = json.loads(found["metaData"])
    assert meta["clusters"]["pub-bjwdt"] == {
        "name": "pub-bjwdt",
        "replica": 1,
        "logTopic": {"name": "k8s_deployment_qdgc_qapm-home", "host": "xxx"},
        "hostGroup": "default",
    }
    assert meta["strategy"]["rollingUpdate"] == {"maxUnavailable": "25%", "maxSurge": "25%"}


def test_an_empty_page_has_a_null_list(caller: Caller) -> None:
    page = caller.data("/apps/3290/deployments", filter="name__exact=qapm")
    assert page["list"] is None
    assert page["totalCount"] == 0
    assert caller.data("/apps/3290/deployments", filter="name=qapm")["totalCount"] == 2


def test_templates_come_newest_first_when_asked(caller: Caller) -> None:
    path, home = "/apps/3290/deployments/tpls", 20771
    newest = caller.data(path, deploymentId=home, sortby="-id")["list"]
    assert [template["id"] for template in newest] == [1343169, 1343102, 1342977]
    oldest = caller.data(path, deploymentId=home)["list"]
    assert oldest == newest[::-1]
    assert set(newest[0]) == {
        "id", "name", "template", "deploymentId", "description", "createTime", "user",
    }  # fmt: skip
    assert json.loads(newest[0]["template"]) == article.template(
        "qapm-home", "qapm", "qdgc", {"qapm-home": article.IMAGE}
    )
    assert caller.data(f"{path}/1343169") == newest[0]


def test_pages_join_to_the_whole(calling: Calling) -> None:
    caller = calling(page_size_limit=2)
    path = "/apps/3290/deployments/tpls"
    pages = [caller.data(path, pageNo=number, pageSize=100, deploymentId=20771) for number in (1, 2, 3)]
    assert [len(page["list"] or []) for page in pages] == [2, 1, 0]
    assert {(page["pageSize"], page["totalPage"], page["totalCount"]) for page in pages} == {(2, 2, 3)}


def test_an_installation_may_not_sort_templates(calling: Calling) -> None:
    caller = calling(sort_templates=False)
    found = caller.data("/apps/3290/deployments/tpls", deploymentId=20771, sortby="-id")["list"]
    assert [template["id"] for template in found] == [1342977, 1343102, 1343169]


def test_the_first_upgrade_creates_the_articles_template(caller: Caller) -> None:
    answer = caller.upgrade(images={"qapm-home": "harbor.qihoo.net/x:1"}, description="发布 release=01JD")
    assert answer.json() == {"data": {"templateIds": [1343170]}}
    created = caller.data("/apps/3290/deployments/tpls/1343170")
    assert created["description"] == "发布 release=01JD"
    assert "harbor.qihoo.net/x:1" in created["template"]
    [written] = caller.cloud.record()
    assert (written.kind, written.template, written.description) == ("template", 1343170, "发布 release=01JD")


def test_an_upgrade_sent_twice_creates_two(caller: Caller) -> None:
    assert [caller.upgrade().json()["data"]["templateIds"] for _ in range(2)] == [[1343170], [1343171]]


def test_a_publish_is_accepted_before_anything_runs(caller: Caller) -> None:
    assert caller.publish().json() == {"data": "ok"}
    assert caller.data("/publishstatus", type=0, resourceId=20771)[0]["templateId"] == 1343169
    [status] = caller.status()
    assert [pod["templateId"] for pod in status["pods"]] == [1343102]
    assert status["healthz"] is True
    assert (status["generation"], status["observedGeneration"]) == (2, 1)
    assert not caller.cloud.rolled_out("qapm-home", "pub-bjwdt")
    caller.cloud.advance(9)
    [status] = caller.status()
    assert [(pod["state"], pod["templateId"]) for pod in status["pods"]] == [("Running", 1343169)]
    assert status["deployment"]["podState"] == {"current": 1, "desired": 1, "warnings": []}
    assert caller.cloud.rolled_out("qapm-home", "pub-bjwdt")


def test_a_status_has_the_contracts_fields(caller: Caller) -> None:
    [status] = caller.status()
    assert set(status) == {
        "cluster", "pods", "deployment", "healthz", "templateId", "generation", "observedGeneration",
        "updatedReplicas",
    }  # fmt: skip
    assert set(status["pods"][0]) == {
        "name", "namespace", "state", "podIp", "nodeName", "startTime", "containerStatus", "templateId",
    }  # fmt: skip
    assert status["pods"][0]["containerStatus"] == [{"name": "qapm-home", "restartCount": 0}]


def test_several_clusters_are_answered_in_the_order_asked(caller: Caller) -> None:
    api = caller.deployment("qapm-api")
    found = caller.status(api, "pub-bjyt,pub-bjwdt")
    assert [(status["cluster"], len(status["pods"])) for status in found] == [
        ("pub-bjyt", 3),
        ("pub-bjwdt", 2),
    ]


def test_the_history_is_newest_first_and_tells_refusals(caller: Caller) -> None:
    (first,) = caller.data("/publish/histories", type=0, resourceId=20771)["list"]
    assert (first["templateId"], first["cluster"]) == (1343102, "pub-bjwdt")
    caller.publish(template=1342977)
    caller.publish(replicas=5000)
    found = caller.data("/publish/histories", type=0, resourceId=20771)["list"]
    assert [(each["templateId"], each["status"]) for each in found] == [
        (1343169, 0),
        (1342977, 1),
        (1343102, 1),
    ]
    assert "配额" in found[0]["message"]
    assert found[1]["user"] == "demo-key"


def test_restart_and_scale_are_accepted_and_recorded(caller: Caller) -> None:
    path = "/apps/3290/deployments/20771/clusters/pub-bjwdt"
    assert caller.http.post(f"{path}/restart").json() == {"data": "ok"}
    assert caller.http.post(f"{path}/scale", json={"replicas": 3}).json() == {"data": "ok"}
    assert [(each.kind, each.replicas) for each in caller.cloud.record()] == [("restart", None), ("scale", 3)]
    caller.cloud.advance(100)
    assert caller.states() == ["Running"] * 3


@pytest.mark.parametrize("replicas", [0, 33, "1", True, None, 1.5])
def test_scale_takes_1_to_32(caller: Caller, replicas: object) -> None:
    path = "/apps/3290/deployments/20771/clusters/pub-bjwdt/scale"
    assert refusal(caller.http.post(path, json={"replicas": replicas})) == (400, 0)


@pytest.mark.parametrize("replicas", [-1, "1", True, None, 2.5])
def test_replicas_of_a_publish_are_a_number_from_0(caller: Caller, replicas: object) -> None:
    assert refusal(caller.publish(replicas=replicas)) == (400, 0)
    assert caller.publish(replicas=0).status_code == 200
    caller.cloud.advance(60)
    assert caller.states() == []


def test_what_does_not_exist_is_404(caller: Caller) -> None:
    for path in (
        "/apps/1",
        "/apps/1/deployments",
        "/apps/3290/deployments/tpls?deploymentId=1",
        "/apps/3290/deployments/tpls/1",
        "/apps/3290/deployments/1/status?cluster=pub-bjwdt",
        "/apps/3290/deployments/20771/status?cluster=nowhere",
        "/publishstatus?resourceId=1",
        "/no/such/path",
    ):
        assert refusal(caller.http.get(path)) == (404, 0)
    assert refusal(caller.publish(template=1)) == (404, 0)
    assert refusal(caller.publish(cluster="nowhere")) == (404, 0)
    assert refusal(caller.upgrade(template=1)) == (404, 0)


def test_a_template_of_another_deployment_is_404(caller: Caller) -> None:
    assert refusal(caller.publish(template=1343110)) == (404, 0)
    assert refusal(caller.upgrade(template=1343110)) == (404, 0)
    assert caller.cloud.record() == []


def test_a_cluster_of_others_is_403(caller: Caller) -> None:
    assert refusal(caller.publish(cluster="pub-bjyt")) == (403, 0)
    assert refusal(caller.upgrade(clusters=["pub-bjyt"])) == (403, 0)


def test_an_upgrade_with_a_mistake_is_400_and_creates_nothing(caller: Caller) -> None:
    for answer in (
        caller.upgrade(images={"sidecar": "x"}),
        caller.upgrade(images=None),
        caller.upgrade(clusters=[]),
        caller.upgrade(description=5),
        caller.upgrade(template="1343169"),
    ):
        assert refusal(answer) == (400, 0)
    assert caller.cloud.record() == []


def test_parameters_out_of_bounds_are_400(caller: Caller) -> None:
    for path in (
        "/apps/qapm",
        "/apps/3290/deployments?pageSize=101",
        "/apps/3290/deployments?pageNo=0",
        "/apps/3290/deployments?filter=id=1",
        "/apps/3290/deployments/tpls?sortby=name",
        "/apps/3290/deployments/20771/status",
        "/publishstatus",
    ):
        assert refusal(caller.http.get(path)) == (400, 0)


def test_a_body_that_is_no_json_is_400(caller: Caller) -> None:
    path = "/apps/3290/deployments/20771/upgrade"
    headers = {"Content-Type": "application/json"}
    assert refusal(caller.http.post(path, content=b"{", headers=headers)) == (400, 0)
    assert refusal(caller.http.post(path)) == (400, 0)


def test_a_body_over_a_mebibyte_is_413(caller: Caller) -> None:
    assert refusal(caller.upgrade(description="x" * 2**21)) == (413, 0)
    assert caller.data("/apps/3290")["id"] == 3290


def test_another_method_is_405(caller: Caller) -> None:
    assert refusal(caller.http.delete("/apps/3290")) == (405, 0)


def test_a_changed_selector_is_400(calling: Calling) -> None:
    other = article.template("other", "qapm", "qdgc", {"web": "x"})
    templates = [{"id": 1, "image": "x"}, {"id": 2, "template": other}, {"id": 3, "template": "{broken"}]
    home = {"id": 7, "name": "web", "clusters": {"c": 1}, "templates": templates, "online": {"c": 1}}
    caller = calling(apps=[{"id": 3290, "name": "a", "deployments": [home]}])
    assert refusal(caller.publish(7, 2, "c")) == (400, 0)
    assert refusal(caller.publish(7, 3, "c")) == (400, 0)
    assert caller.data("/apps/3290/deployments/tpls/3")["template"] == "{broken"
    assert caller.cloud.record() == []


def test_an_encoded_slash_stays_within_its_segment(calling: Calling) -> None:
    home = {"id": 7, "name": "web", "clusters": {"pub/bj wdt": 1}, "templates": [{"id": 1, "image": "x"}]}
    caller = calling(apps=[{"id": 3290, "name": "a", "deployments": [home]}])
    answer = caller.publish(7, 1, "pub/bj wdt")
    assert answer.request.url.raw_path.endswith(b"/clusters/pub%2Fbj%20wdt")
    assert answer.json() == {"data": "ok"}
    assert caller.cloud.record()[0].cluster == "pub/bj wdt"
    caller.cloud.advance(60)
    assert caller.states(7, "pub/bj wdt") == ["Running"]


def test_without_optional_fields_only_the_articles_payload_is_left(calling: Calling) -> None:
    caller = calling(optional_fields=False)
    [status] = caller.status()
    assert set(status) == {"pods"}
    assert set(status["pods"][0]) == {"name", "state"}
    assert set(caller.http.get("/apps/1").json()) == {"code", "subCode", "msg"}
    assert set(caller.http.get("/nowhere").json()) == {"code", "subCode", "msg"}
    unsigned = httpx.get(f"{str(caller.http.base_url).removesuffix('/')}/apps/1")
    assert set(unsigned.json()) == {"code", "subCode", "msg"}


def test_while_one_publish_is_running_another_is_409001(calling: Calling) -> None:
    caller = calling(publish_lock=5)
    assert caller.publish().status_code == 200
    assert refusal(caller.publish()) == (409, 409001)
    assert caller.publish(caller.deployment("qapm-api"), 1343161).status_code == 200
    caller.cloud.advance(5)
    assert caller.publish().status_code == 200


def test_each_failing_deployment_of_the_default_scenario_fails_in_its_way(caller: Caller) -> None:
    def release(name: str) -> list[str]:
        deployment = caller.deployment(name)
        assert caller.publish(deployment, caller.newest(deployment), replicas=2).status_code == 200
        caller.cloud.advance(30)
        assert not caller.cloud.rolled_out(name, "pub-bjwdt")
        return caller.states(deployment) if name != "no-pods" else []

    assert release("bad-image") == ["Running", "Running", "Pending"]
    assert release("invalid-image") == ["Running", "Running", "Pending"]
    assert release("unschedulable") == ["Running", "Running", "Pending"]
    assert release("crash-loop") == ["Running", "Running", "ContainersNotReady"]
    assert release("never-ready") == ["Running", "Running", "ContainersNotReady"]
    assert release("slow-start") == ["Running", "Running", "ContainersNotReady"]
    caller.cloud.advance(100)
    assert caller.cloud.rolled_out("slow-start", "pub-bjwdt")
    release("no-pods")
    assert caller.status(caller.deployment("no-pods"))[0]["pods"] is None
    quota = caller.deployment("no-quota")
    assert refusal(caller.publish(quota, caller.newest(quota))) == (403, 403001)
    down = caller.deployment("cluster-down")
    assert refusal(caller.publish(down, caller.newest(down), "pub-bjyt")) == (500, 0)
    assert caller.status(down, "pub-bjyt") == [{"cluster": "pub-bjyt", "pods": None}]
    assert caller.publish(down, caller.newest(down)).status_code == 200


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad-image", "BackOff"),
        ("invalid-image", "InspectFailed"),
        ("unschedulable", "FailedScheduling"),
        ("crash-loop", "BackOff"),
        ("never-ready", "Unhealthy"),
    ],
)
def test_the_clusters_warnings_say_why_unless_the_optional_fields_are_left_out(
    calling: Calling, name: str, reason: str
) -> None:
    caller = calling()
    deployment = caller.deployment(name)
    caller.publish(deployment, caller.newest(deployment), replicas=2)
    caller.cloud.advance(30)
    [status] = caller.status(deployment)
    told = status["deployment"]["podState"]["warnings"]
    assert reason in {event["reason"] for event in told}
    assert {event["name"] for event in told} <= {pod["name"] for pod in status["pods"]}
    bare = calling(optional_fields=False)
    bare.publish(deployment, bare.newest(deployment), replicas=2)
    bare.cloud.advance(30)
    [status] = bare.status(deployment)
    assert set(status) == {"pods"}


def test_the_older_template_of_a_failing_deployment_can_be_released_again(caller: Caller) -> None:
    deployment = caller.deployment("crash-loop")
    newest = caller.newest(deployment)
    caller.publish(deployment, newest, replicas=2)
    caller.cloud.advance(30)
    caller.publish(deployment, newest - 1, replicas=2)
    caller.cloud.advance(30)
    assert caller.cloud.rolled_out("crash-loop", "pub-bjwdt")


@pytest.mark.parametrize("image", ["r/web:", "r/web:${TAG}"])
def test_no_pod_starts_whose_image_is_no_reference(caller: Caller, image: str) -> None:
    [template] = caller.upgrade(images={"qapm-home": image}).json()["data"]["templateIds"]
    assert caller.publish(template=template).json() == {"data": "ok"}
    caller.cloud.advance(60)
    [status] = caller.status()
    (pending,) = [pod for pod in status["pods"] if pod["state"] != "Running"]
    assert pending["state"] == "Pending"
    (warning,) = status["deployment"]["podState"]["warnings"]
    assert (warning["reason"], warning["name"]) == ("InspectFailed", pending["name"])
    assert f'couldn\'t parse image name "{image}"' in warning["message"]
