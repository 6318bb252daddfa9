import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_rollout.errors import InputError, UnreadableTemplateError, WorkloadError
from prefect_rollout.ids import by_age
from prefect_rollout.platforms.container_cloud.payloads import (
    App,
    ClusterStatus,
    Deployment,
    Template,
    placement_of,
)
from prefect_rollout.release.request import ReleaseRequest, RollbackRequest, ScaleRequest
from prefect_rollout.release.workload import Placement, Revision, RollingUpdate, Strategy, Workload

ARTICLE = Path(__file__).parent / "data" / "article"


def article(name: str) -> str:
    return (ARTICLE / f"{name}.json").read_text(encoding="utf-8")


def placed(meta_data: str | None) -> Placement:
    """Return the placement that the metaData of a deployment says."""
    return placement_of(Workload(app_id=3290, app="qapm", id=7, name="qapm-home", handle=meta_data), None)


def test_the_articles_app_is_read() -> None:
    assert App.model_validate_json(article("app")) == App(id=3290, name="qapm")


def test_the_articles_metadata_is_read_in_its_words() -> None:
    assert placed(article("metadata")) == Placement(
        replicas={"pub-bjwdt": 1},
        scalable=(1, 32),
        in_place=False,
        strategy=Strategy(
            type="RollingUpdate", rolling_update=RollingUpdate(max_unavailable="25%", max_surge="25%")
        ),
    )


def test_the_articles_template_names_its_image() -> None:
    template = Template(id=1343169, template=article("template"))
    images, pods = template.read()
    assert images == {"qapm-home": "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7"}
    assert "image" not in pods["spec"]["containers"][0]


def test_unknown_keys_are_ignored_at_every_depth_and_so_never_kept_with_a_result() -> None:
    payload = {"cluster": "c", "pods": [{"name": "p", "state": "Running", "env": {"a": [1]}}], "zone": 7}
    dumped = ClusterStatus.model_validate(payload).status.model_dump(by_alias=True, exclude_defaults=True)
    assert dumped == {"pods": [{"name": "p", "state": "Running"}]}


def test_what_a_release_keeps_of_a_template_is_its_images_and_a_digest_of_the_rest() -> None:
    def revision(text: str) -> Revision:
        return Template(id=7, template=text).revision

    one = revision(article("template"))
    assert one.images == {"qapm-home": "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7"}
    other_image = revision(article("template").replace("202407291835-ddc95a7", "other"))
    assert other_image.images != one.images
    assert other_image.digest == one.digest
    assert revision(article("template").replace("330m", "500m")).digest != one.digest
    assert "330m" not in one.model_dump_json()


@pytest.mark.parametrize("count", [True, "1", -1, 1.5, [], {}])
def test_what_is_no_restart_count_is_absent(count: object) -> None:
    payload = {"pods": [{"name": "p", "containerStatus": [{"name": "web", "restartCount": count}, None]}]}
    [pod] = ClusterStatus.model_validate(payload).status.pods or []
    assert pod.container_status is not None
    assert [each and each.restart_count for each in pod.container_status] == [None, None]


def test_fields_that_a_poll_can_do_without_may_be_of_any_type() -> None:
    odd = {"podIp": 7, "startTime": [], "nodeName": {}, "namespace": 1, "reason": 2, "containerStatus": "x"}
    status = ClusterStatus.model_validate(
        {"pods": [{"name": "p", "state": "Running", **odd}], "deployment": {"podState": "none"}}
    ).status
    assert status.pods is not None
    assert (status.pods[0].pod_ip, status.pods[0].node_name, status.pods[0].reason) == (None, None, None)
    assert (status.desired, status.events) == (None, None)


@pytest.mark.parametrize("field", ["generation", "observedGeneration", "updatedReplicas"])
@pytest.mark.parametrize("value", [True, "1", -1])
def test_a_revision_that_cannot_be_read_is_never_taken_for_agreement(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        ClusterStatus.model_validate({"pods": [], field: value})


def test_the_clusters_own_replica_goes_before_the_older_place() -> None:
    meta = '{"replicas": {"a": 1, "b": 2}, "clusters": {"a": {"replica": 5}, "b": {}}}'
    assert placed(meta).replicas == {"a": 5, "b": 2}


@pytest.mark.parametrize("unknown", ["{}", "null", '{"replica": null}'])
def test_zero_replicas_are_not_unknown_replicas(unknown: str) -> None:
    assert placed('{"clusters": {"a": {"replica": 0}}}').replicas == {"a": 0}
    with pytest.raises(WorkloadError, match="has no replicas for b") as caught:
        placed(f'{{"clusters": {{"a": {{"replica": 0}}, "b": {unknown}}}}}')
    assert caught.value.data["clusters"] == ["b"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "   ",
        "{",
        "nonsense",
        "[]",
        "null",
        '"text"',
        '{"clusters": []}',
        '{"clusters": {"a": {"replica": "1"}}}',
        '{"clusters": {"a": {"replica": true}}}',
        '{"clusters": {"a": {"replica": -1}}}',
        '{"replicas": {"a": 1.5}}',
        '{"inPlace": {}}',
        "[" * 10_000 + "]" * 10_000,
        '{"a":' * 10_000 + "1" + "}" * 10_000,
    ],
)
def test_metadata_that_cannot_be_used_is_an_error_of_ours(text: str | None) -> None:
    with pytest.raises(WorkloadError) as caught:
        placed(text)
    assert len(str(caught.value)) < 1000


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_metadata_raises_anything_but_our_error(text: str) -> None:
    with contextlib.suppress(WorkloadError):
        placed(text)


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", '{"kind": "Deployment"}', '{"kind": "Deployment", "spec": {"template": {}}}'],
)
def test_a_template_that_is_no_workload_is_unreadable(text: str | None) -> None:
    with pytest.raises(UnreadableTemplateError, match="template 7"):
        Template(id=7, template=text).read()


def test_a_template_of_another_kind_is_named_in_the_error() -> None:
    text = '{"kind": "StatefulSet", "spec": {"template": {"spec": {"containers": []}}}}'
    with pytest.raises(UnreadableTemplateError, match="'StatefulSet', not a Deployment"):
        Template(id=7, template=text).read()


def test_containers_without_a_name_or_an_image_are_passed_over() -> None:
    containers = [{"name": "a", "image": "x:1"}, {"name": "b"}, {"image": "y:1"}, None]
    workload = {"kind": "Deployment", "spec": {"template": {"spec": {"containers": containers}}}}
    assert Template(id=1, template=json.dumps(workload)).revision.images == {"a": "x:1"}


def test_ids_sort_by_number_and_not_by_letter() -> None:
    ids: list[int | str] = [9, "10", 8]
    assert sorted(ids, key=by_age) == [8, 9, "10"]
    assert Deployment(id="7", name="x").id == "7"


GOOD = {"app_id": 3290, "deployment": "qapm-home"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("app_id", ""),
        ("app_id", -1),
        ("app_id", True),
        ("app_id", ".."),
        ("app_id", "."),
        ("app_id", "x" * 10_000),
        ("app_id", "a\nb"),
        ("deployment", ""),
        ("deployment", "x" * 254),
        ("deployment", "a\x1b[31m"),
        ("app_id", []),
        ("template_id", ".."),
        ("template_id", " 7"),
        ("order", "backwards"),
        ("template_id", 1.5),
        ("target", "container"),
        ("target", "a/b/c"),
        ("target", "../../etc"),
        ("clusters", ["a,b"]),
        ("clusters", ["a", "a"]),
        ("clusters", [""]),
        ("clusters", "pub-bjwdt"),
        ("images", ["x"]),
        ("images", {"a": ""}),
        ("images", {"a": "two words"}),
        ("reason", "x" * 1001),
        ("poll_seconds", 0),
        ("poll_seconds", float("nan")),
        ("poll_attempts", 0),
        ("poll_attempts", "x"),
        ("surprise", 1),
    ],
)
def test_a_bad_value_is_refused_by_the_fields_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field) as caught:
        ReleaseRequest.of(**{**GOOD, field: value})
    assert caught.value.data["field"] == field
    assert len(str(caught.value)) < 500


def test_replicas_that_no_platform_has_are_refused() -> None:
    for replicas in (-1, 10_001, "3", 1.5, True):
        with pytest.raises(InputError, match="replicas"):
            ScaleRequest.of(**GOOD, replicas=replicas)
    assert [ScaleRequest.of(**GOOD, replicas=replicas).replicas for replicas in (0, 32)] == [0, 32]


def test_a_template_to_go_back_to_is_an_id() -> None:
    with pytest.raises(InputError, match="to_template"):
        RollbackRequest.of(**GOOD, to_template="..")


@pytest.mark.parametrize("app_id", [3290, "3290", "a/b", "../..", "%2e", "3290?x=1", "🚀"])
def test_an_odd_id_is_passed_on_for_the_platform_to_judge(app_id: int | str) -> None:
    assert ReleaseRequest.of(**{**GOOD, "app_id": app_id}).app_id == app_id


def test_empty_text_asks_for_the_newest_template() -> None:
    assert ReleaseRequest.of(**GOOD, template_id="").template_id == ""
    assert ReleaseRequest.of(**GOOD).template_id is None
