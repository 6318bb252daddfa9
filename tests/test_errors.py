import pickle
import re

import pytest

import prefect_rollout.batch.errors
import prefect_rollout.release.image_errors  # noqa: F401 - parts of the tree
from prefect_rollout import errors
from prefect_rollout.errors import (
    ContainerNotFoundError,
    DeploymentNotFoundError,
    OverloadedError,
    PlatformError,
    ReleaseError,
    ReleaseFailedError,
    ReleaseTimedOutError,
    RolloutError,
)
from prefect_rollout.platforms.container_cloud.payloads import ClusterStatus
from prefect_rollout.verdict.expected import Expected
from prefect_rollout.verdict.judge import judge
from prefect_rollout.verdict.status import Observation
from support import kinds

TREE = list(kinds(RolloutError))


def test_the_tree_is_as_drawn() -> None:
    drawn: dict[str, str] = {}
    path = ["Exception"]
    for indent, name in re.findall(r"^([│├└─ ]*)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE):
        path[len(indent) // 4 + 1 :] = [name]
        drawn[name] = path[-2]
    assert drawn == {kind.__name__: kind.__base__ and kind.__base__.__name__ for kind in TREE}


def test_every_error_says_what_to_do_next_in_its_sentence_and_its_diagnosis() -> None:
    for kind in TREE:
        error = kind("something is wrong", cluster="pub-bjwdt")
        told = error.to_dict()["diagnosis"]
        assert kind.advice.endswith("."), kind
        assert str(error).endswith(kind.advice), kind
        assert (told["summary"], told["cluster"]) == ("something is wrong", "pub-bjwdt"), kind
        assert (told["category"], told["resolution"]) == (kind.category, kind.advice), kind


def test_every_error_survives_the_way_to_another_process() -> None:
    for kind in TREE:
        error = kind("x", retryable=True, retry_after=3, status=503, request_id="r-1", cluster=None)
        error.step = "publish deployment"
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind
        assert str(back) == str(error)
        told = (back.data, back.retryable, back.retry_after)
        assert told == ({"status": 503, "request_id": "r-1"}, True, 3), kind


def test_an_error_names_step_problem_circumstances_and_advice() -> None:
    error = PlatformError("the cloud refused publish: 配额不足", status=500, code=5, request_id="r-1")
    error.step = "publish deployment"
    assert str(error) == (
        "publish deployment: the cloud refused publish: 配额不足 (status 500, code 5, request id r-1). "
        "Give the request id to the cloud's operators."
    )


def test_retryable_belongs_to_the_class_unless_the_case_differs() -> None:
    assert OverloadedError("x").retryable
    assert not OverloadedError("x", retryable=False).retryable
    assert not PlatformError("x").retryable


def test_near_names_are_listed_and_kept() -> None:
    error = DeploymentNotFoundError.named("qapm-hom", ["qapm-home", "qapm-api"], "in app 3290")
    assert str(error) == "there is no deployment 'qapm-hom' in app 3290. There are: qapm-home, qapm-api."
    assert error.data["known"] == ["qapm-home", "qapm-api"]
    assert "There is: web." in str(ContainerNotFoundError.named("wob", ["web"]))


@pytest.mark.parametrize("kind", [ReleaseFailedError, ReleaseTimedOutError])
def test_a_release_error_tells_its_verdicts_diagnosis(kind: type[ReleaseError]) -> None:
    pod = {"name": "web-1", "state": "InvalidImageName", "templateId": 2}
    status = ClusterStatus.model_validate({"cluster": "east", "pods": [pod]}).status
    error = kind("0 of 1 new pods ready in east", advice="Correct the image's name.")
    error.verdict = judge(
        [Expected(cluster="east", revision=2, replicas=1)], Observation(at=0, clusters={"east": status})
    )
    assert error.diagnosis is error.verdict.diagnosis
    assert error.to_dict()["diagnosis"]["pod"] == "web-1"
    assert str(error) == (
        "0 of 1 new pods ready in east. InvalidImageName: web-1 in east: InvalidImageName. "
        "Correct the image's name."
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
