from markdown_it import MarkdownIt

from prefect_rollout.errors import ReleaseTimedOutError
from prefect_rollout.models import ClusterResult, Outcome, Pod, ReleaseResult
from prefect_rollout.report import render
from prefect_rollout.tasks.report_release import artifact_key

IMAGE = "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7"


def result(**changes: object) -> ReleaseResult:
    fields: dict[str, object] = {
        "outcome": Outcome.RELEASED,
        "app_id": 3290,
        "app": "qapm",
        "deployment": "qapm-home",
        "release_id": "0191",
        "template_id": 1343170,
        "base_template_id": 1343169,
        "images": {"qapm-home": IMAGE},
        "clusters": [
            ClusterResult(
                cluster="pub-bjwdt",
                replicas=1,
                ready=1,
                published=True,
                template_before=1343100,
                images_before={"qapm-home": "old:1"},
                pods=[Pod(name="qapm-home-x", state="Running", node_name="n17")],
            )
        ],
        "evidence": "strong",
        "seconds": {"wait for pods": 12.34},
        "links": {"Flow run": "http://127.0.0.1/runs/flow-run/0191"},
    }
    return ReleaseResult.model_validate({**fields, **changes})


def html(markdown: str) -> str:
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def test_a_release_is_told_with_what_changed_where() -> None:
    page = html(render(result()))
    for cell in ["pub-bjwdt", "1343100", "1343170", "1 / 1", "old:1", IMAGE, "qapm-home-x", "n17", "12.3"]:
        assert f"<td>{cell}</td>" in page, cell
    assert "<h1>✅ qapm-home is released</h1>" in page
    assert '<a href="http://127.0.0.1/runs/flow-run/0191">Flow run</a>' in page


def test_a_publish_whose_answer_was_lost_is_told_as_unknown() -> None:
    lost = ClusterResult(cluster="pub-bjyt", replicas=1, published=None, template_before=1343100)
    page = html(render(result(outcome=Outcome.FAILED, clusters=[lost])))
    row = page[page.index("<td>pub-bjyt</td>") :].split("</tr>")[0]
    assert [cell.split("</td>")[0] for cell in row.split("<td>")[1:]] == [
        "pub-bjyt",
        "1343100",
        "none or unknown",
        "unknown",
        "0 / 1",
    ]


def test_a_failure_says_first_what_went_wrong_and_what_to_do() -> None:
    error = ReleaseTimedOutError("after 95 s 1 pod is not ready")
    error.step = "wait for pods"
    page = html(render(result(outcome=Outcome.TIMED_OUT, error=error.to_dict())))
    quote = page.split("<blockquote>")[1].split("</blockquote>")[0]
    assert "<strong>wait for pods:</strong> after 95 s 1 pod is not ready" in quote
    assert "What to do:" in quote
    assert page.index("<blockquote>") < page.index("<ul>")


def test_a_cluster_that_was_not_published_keeps_its_template_in_the_report() -> None:
    cluster = ClusterResult(cluster="c", replicas=1, template_before=5)
    page = html(render(result(outcome=Outcome.FAILED, clusters=[cluster])))
    assert "<td>c</td>\n<td>5</td>\n<td>5</td>\n<td>no</td>" in page


def test_what_others_wrote_is_shown_as_words() -> None:
    pod = Pod(name="<script>alert(1)</script>|x", state="[a](javascript:b)\n# head")
    cluster = ClusterResult(cluster="**c**", replicas=1, pods=[pod])
    page = html(render(result(clusters=[cluster], reason="<img src=x>", app="`a`")))
    assert "<script" not in page
    assert "<img" not in page
    assert "javascript:b" not in [part.split('"')[0] for part in page.split('href="')[1:]]
    assert "<td>**c**</td>" in page


def test_hundreds_of_pods_are_counted_not_listed() -> None:
    pods = [Pod(name=f"p{i}", state="Running") for i in range(250)]
    assert "… and 150 more." in render(result(clusters=[ClusterResult(cluster="c", replicas=250, pods=pods)]))


def test_the_artifacts_key_is_the_deployments() -> None:
    assert artifact_key(result()) == "release-3290-qapm-home"
    assert artifact_key(result(deployment="Weird_名字 X")) == "release-3290-weird-x"
