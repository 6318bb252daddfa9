import re

import pytest
from markdown_it import MarkdownIt

from prefect_rollout.errors import ReleaseTimedOutError
from prefect_rollout.release.report import render
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.tasks.report_release import artifact_key
from prefect_rollout.verdict.status import Pod

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
                template=1343170,
                online=1343170,
                online_known=True,
                running=1,
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


def test_a_glass_that_was_broken_is_told_with_its_reason() -> None:
    page = html(render(result(break_glass="<b>线上故障</b>")))
    assert "<strong>Break glass:</strong> &lt;b&gt;线上故障&lt;/b&gt;" in page
    assert "Break glass" not in render(result())


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
        "unknown",
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
    cluster = ClusterResult(
        cluster="c", replicas=1, template=6, template_before=5, online=5, online_known=True, running=1
    )
    page = html(render(result(outcome=Outcome.FAILED, clusters=[cluster])))
    row = ["c", "5", "6", "no", "0 / 1", "5, 1 Running"]
    assert "\n".join(f"<td>{cell}</td>" for cell in row) in page


def test_a_rollback_that_failed_is_said_first() -> None:
    clusters = [
        ClusterResult(
            cluster="a", replicas=1, template=6, published=True, rolled_back=True, online=5, online_known=True
        ),
        ClusterResult(cluster="b", replicas=1, template=6, published=None, rolled_back=False),
    ]
    page = html(render(result(outcome=Outcome.FAILED, clusters=clusters)))
    assert page.startswith("<h1>🚨 ROLLBACK FAILED: qapm-home</h1>")
    assert "<td>yes, rolled back</td>" in page
    assert "<td>unknown, rollback failed</td>\n<td>0 / 1</td>\n<td>unknown</td>" in page


@pytest.mark.parametrize(
    ("action", "outcome", "title"),
    [
        (Action.ROLLBACK, Outcome.RELEASED, "✅ qapm-home is rolled back"),
        (Action.RESTART, Outcome.TIMED_OUT, "❌ qapm-home timed out: not restarted"),
        (Action.DEPLOY, Outcome.CANCELLED, "⏹ qapm-home was cancelled: not released"),
    ],
)
def test_the_title_says_what_was_done_and_how_it_ended(action: Action, outcome: Outcome, title: str) -> None:
    assert f"<h1>{title}</h1>" in html(render(result(action=action, outcome=outcome)))


def test_what_others_wrote_is_shown_as_words() -> None:
    pod = Pod(name="<script>alert(1)</script>|x", state="[a](javascript:b)\n# head")
    cluster = ClusterResult(cluster="**c**", replicas=1, pods=[pod])
    page = html(render(result(clusters=[cluster], reason="<img src=x>", app="`a`")))
    assert "<script" not in page
    assert "<img" not in page
    assert "javascript:b" not in [part.split('"')[0] for part in page.split('href="')[1:]]
    assert "<td>**c**</td>" in page


def test_addresses_of_a_block_cannot_become_anything_else_than_links() -> None:
    links = {"A": "https://a.b/c d)<b>x</b>", "B": "javascript://a%0aalert(1)", "C": "http://[::1]:4200/runs"}
    page = html(render(result(links=links))).split("<p>")[-1]
    assert page.count("<a ") == 2
    assert '<a href="https://a.b/c%20d%29%3Cb%3Ex%3C/b%3E">A</a>' in page
    assert "B: <code>javascript://a%0aalert(1)</code>" in page
    assert ">C</a>" in page
    assert "<b>" not in page


def test_hundreds_of_pods_are_counted_not_listed() -> None:
    pods = [Pod(name=f"p{i}", state="Running") for i in range(250)]
    assert "… and 150 more." in render(result(clusters=[ClusterResult(cluster="c", replicas=250, pods=pods)]))


def test_the_artifacts_key_is_the_deployments() -> None:
    assert artifact_key(result()) == "release-3290-qapm-home"
    assert re.fullmatch(
        r"release-3290-weird-x--[0-9a-f]{16}", artifact_key(result(deployment="Weird_名字 X"))
    )


def test_no_two_deployments_share_a_key() -> None:
    names = [
        *(
            (3290, name)
            for name in ("web-api", "web_api", "web--api", "Web-api", "web.api", "-web-api", "名字")
        ),
        *(("a-b", "c"), ("a", "b-c"), ("a_b", "c"), ("A-b", "c"), (1, "x" * 253), (1, "x" * 252 + "_")),
        *((1, "x" * 252 + "."), ("y" * 253, "x")),
    ]
    keys = {artifact_key(result(app_id=app_id, deployment=name), "changes") for app_id, name in names}
    assert len(keys) == len(names)
    # Nor can anybody give a deployment the key of another for a name.
    hashed = artifact_key(result(deployment="web_api")).removeprefix("release-3290-")
    assert artifact_key(result(deployment=hashed)) != f"release-3290-{hashed}"
    for key in keys:
        assert re.fullmatch(r"changes-[a-z0-9-]{1,247}", key)


def test_the_objects_of_the_platform_and_commands_to_copy_are_shown() -> None:
    cluster = ClusterResult(
        cluster="bj",
        replicas=None,
        template="k3vq7a2mzt",
        object="ReplicaSet web-5d8f",
        template_before="aaaa",
        object_before="ReplicaSet web-77c",
        commands=["kubectl -n shop describe deployment/web", "kubectl -n `shop`"],
    )
    page = html(render(result(clusters=[cluster])))
    assert "<td>aaaa, ReplicaSet web-77c</td>" in page
    assert "<td>k3vq7a2mzt, ReplicaSet web-5d8f</td>" in page
    assert "<code>kubectl -n shop describe deployment/web</code>" in page
    assert "<code>kubectl -n shop</code>" in page
