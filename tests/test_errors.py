import inspect
import pickle

import pytest

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
from prefect_rollout.models import ClusterStatus
from prefect_rollout.verdict import Expected, Look, judge

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RolloutError)]


@pytest.mark.parametrize("kind", TREE)
def test_every_error_says_what_to_do_next(kind: type[RolloutError]) -> None:
    assert kind.advice.endswith(".")
    assert str(kind("something is wrong")).endswith(kind.advice)


@pytest.mark.parametrize("kind", TREE)
def test_every_error_stands_in_the_tree_that_is_drawn(kind: type[RolloutError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", TREE)
def test_an_error_survives_the_way_to_another_process(kind: type[RolloutError]) -> None:
    error = kind("x", retryable=True, retry_after=3, status=503, request_id="r-1", cluster=None)
    error.step = "publish deployment"
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error)
    assert (back.data, back.retryable, back.retry_after) == ({"status": 503, "request_id": "r-1"}, True, 3)


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


@pytest.mark.parametrize("kind", TREE)
def test_every_error_carries_a_diagnosis(kind: type[RolloutError]) -> None:
    told = kind("something is wrong", cluster="pub-bjwdt").to_dict()["diagnosis"]
    assert told["category"] == kind.category
    assert (told["summary"], told["cluster"]) == ("something is wrong", "pub-bjwdt")
    assert told["resolution"] == kind.advice


@pytest.mark.parametrize("kind", [ReleaseFailedError, ReleaseTimedOutError])
def test_a_release_error_tells_its_verdicts_diagnosis(kind: type[ReleaseError]) -> None:
    pod = {"name": "web-1", "state": "InvalidImageName", "templateId": 2}
    status = ClusterStatus.model_validate({"cluster": "east", "pods": [pod]})
    error = kind("0 of 1 new pods ready in east", advice="Correct the image's name.")
    error.verdict = judge(
        [Expected(cluster="east", template_id=2, replicas=1)], Look(at=0, clusters={"east": status})
    )
    assert error.diagnosis is error.verdict.diagnosis
    assert error.to_dict()["diagnosis"]["pod"] == "web-1"
    assert str(error) == (
        "0 of 1 new pods ready in east. InvalidImageName: web-1 in east: InvalidImageName. "
        "Correct the image's name."
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
