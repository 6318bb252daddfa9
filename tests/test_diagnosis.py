import pytest
from pydantic import ValidationError

from prefect_rollout.verdict.diagnosis import Category, Diagnosis
from prefect_rollout.verdict.expected import Expected, Grace
from prefect_rollout.verdict.judge import judge
from prefect_rollout.verdict.status import ContainerStatus, Observation, Pod, Status

STABLE = """
    InvalidImageName ImagePullError CrashLoopBackOff OOMKilled ContainerConfigError Unschedulable
    QuotaExceeded ContainerNotReady Settling PodPending UnknownState NoPods OldPodsLeft NotObserved NoStatus
    Unconfirmed ReplicasDiffer BaselineUnknown PodCreationFailed ProgressDeadlineExceeded Superseded
    InvalidInput Configuration NotFound Workload Template
    Unauthenticated AccessDenied Rejected Conflict Overloaded ServerFault Unreachable UnusableAnswer
    Cancelled Locked Batch WindowClosed Internal
"""


def test_the_categories_are_the_ones_that_programs_know() -> None:
    assert [str(category) for category in Category] == STABLE.split()


def test_every_category_has_a_clause_and_something_to_do() -> None:
    for category in Category:
        diagnosis = Diagnosis.of(category)
        assert diagnosis.summary, category
        assert not diagnosis.summary.endswith("."), category
        assert diagnosis.resolution.endswith((".", "?")), category


@pytest.mark.parametrize(
    ("diagnosis", "line"),
    [
        (
            Diagnosis.of(
                Category.IMAGE_PULL_ERROR,
                cluster="pub-bjwdt",
                pod="qapm-home-6d4cf56db6-x2x7q",
                reported='Failed to pull image "qapm-web:1": not found',
                seconds=35.2,
            ),
            (
                "ImagePullError: qapm-home-6d4cf56db6-x2x7q in pub-bjwdt for 35 s: "
                'Failed to pull image "qapm-web:1": not found'
            ),
        ),
        (
            Diagnosis.of(Category.CONTAINER_NOT_READY, cluster="a", pod="p", container="web", seconds=0),
            "ContainerNotReady: p (web) in a: the container runs and is not ready",
        ),
        (
            Diagnosis.of(Category.NO_PODS, cluster="a", seconds=95),
            "NoPods: no pod is listed in a for 95 s",
        ),
        (Diagnosis.of(Category.CANCELLED), "Cancelled: the run was cancelled"),
    ],
    ids=["pod, report and seconds", "container without a report", "no pod", "nothing but a category"],
)
def test_a_diagnosis_is_one_line(diagnosis: Diagnosis, line: str) -> None:
    assert str(diagnosis) == line


def test_what_the_cloud_says_cannot_steer_a_terminal_or_break_the_line() -> None:
    line = str(Diagnosis.of(Category.NO_PODS, cluster="a\nb", pod="p\x1b[31m", reported="x\r\n\x07y"))
    assert line.isprintable()
    assert Diagnosis.of(Category.NO_PODS, reported="x" * 10_000).reported == "x" * 299 + "…"


def test_a_diagnosis_does_not_change_and_survives_json() -> None:
    diagnosis = Diagnosis.of(Category.OOM_KILLED, pod="p", seconds=1.5, events=("OOMKilling: web",))
    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis
    with pytest.raises(ValidationError):
        diagnosis.pod = "q"  # type: ignore[misc]


def crashing(*lines: str) -> Diagnosis:
    """The diagnosis of a container that crashes at once; `lines` are its output."""
    container = ContainerStatus(
        name="web", restart_count=4, reason="CrashLoopBackOff", log_lines=list(lines) or None
    )
    sidecar = ContainerStatus(name="proxy", restart_count=0, log_lines=["proxy is up"])
    pod = Pod(name="web-1", state="ContainersNotReady", template_id=2, container_status=[sidecar, container])
    look = Observation(at=0, clusters={"c": Status(pods=[pod])})
    grace = Grace(seconds=0)
    found = judge([Expected(cluster="c", revision=2, replicas=1)], look, grace=grace).diagnosis
    assert found is not None
    return found


def test_a_diagnosis_has_the_last_output_of_the_container_if_the_platform_delivers_it() -> None:
    found = crashing(*(f"line {number}" for number in range(20)), "panic: \x1b[31mno such file")
    assert found.log_lines == (*(f"line {number}" for number in range(11, 20)), "panic: �[31mno such file")
    assert "last lines say why" in found.resolution


def test_a_diagnosis_does_not_advise_to_read_output_that_is_not_available() -> None:
    found = crashing()
    assert found.log_lines == ()
    assert found.resolution.startswith("Its output is not available here")


def test_the_line_of_a_release_that_waits_says_what_its_pods_wait_for() -> None:
    pods = [Pod(name=f"web-{each}", state="ErrImagePull", template_id=2) for each in range(2)]
    look = Observation(at=0, clusters={"c": Status(pods=pods)})
    verdict = judge([Expected(cluster="c", revision=2, replicas=2)], look, grace=Grace(seconds=30))
    assert verdict.progress == "c 0/2, ErrImagePull"
