"""Invalid image references are refused on every entrance, before anything is asked of the cloud."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_rollout.batch.errors import PlanError
from prefect_rollout.batch.plan import load_plan
from prefect_rollout.errors import InputError
from prefect_rollout.release.images import Reference, is_reference, usable_image
from prefect_rollout.release.request import ReleaseRequest
from prefect_rollout.release.workload import Revision
from prefect_rollout.tasks.build_image_list import choose_images
from support import BIN

SHA = "a" * 64

REFERENCES: dict[str, tuple[str, str, str, str]] = {
    "r/web:2": ("docker.io", "r/web", "2", ""),
    "nginx:1.27": ("docker.io", "library/nginx", "1.27", ""),
    "docker.io/nginx:1.27": ("docker.io", "library/nginx", "1.27", ""),
    "index.docker.io/library/nginx:1": ("docker.io", "library/nginx", "1", ""),
    "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7": (
        "harbor.qihoo.net",
        "qdgc-qapm/qapm-web",
        "202407291835-ddc95a7",
        "",
    ),
    "Harbor.Example:443/team/web": ("harbor.example", "team/web", "", ""),
    "localhost/web": ("localhost", "web", "", ""),
    "registry:5000/team/a__b-c.d_e:V1.2_3-x": ("registry:5000", "team/a__b-c.d_e", "V1.2_3-x", ""),
    "[fd00::1]:5000/web:1": ("[fd00::1]:5000", "web", "1", ""),
    f"r/web@sha256:{SHA}": ("docker.io", "r/web", "", f"sha256:{SHA}"),
    f"r/web:1@sha256:{SHA}": ("docker.io", "r/web", "1", f"sha256:{SHA}"),
    f"r/web:{'x' * 128}": ("docker.io", "r/web", "x" * 128, ""),
}


@pytest.mark.parametrize(("text", "parts"), REFERENCES.items())
def test_a_reference_is_read_as_docker_and_the_kubelet_read_it(
    text: str, parts: tuple[str, str, str, str]
) -> None:
    assert Reference.parse(usable_image(text)) == parts


NONE = {
    "": "empty",
    "r/web:": "no tag follows the colon: perhaps a variable is empty",
    "r/web:${TAG}": "'$': perhaps a variable was not replaced",
    "r/web:$TAG": "perhaps a variable was not replaced",
    "r/web:$(TAG)": "perhaps a variable was not replaced",
    "r/web:{{tag}}": "'{': perhaps a variable was not replaced",
    "r/web:{{ tag }}": "holds a blank",
    "r/web:%TAG%": "perhaps a variable was not replaced",
    "r/web:<tag>": "perhaps a variable was not replaced",
    "${REGISTRY}/web:1": "perhaps a variable was not replaced",
    ":v1": "begins without a repository: perhaps a variable is empty",
    "/web:1": "begins without a repository: perhaps a variable is empty",
    "@sha256:" + SHA: "begins without a repository",
    "r//web:1": "a part of the repository is empty",
    "r/:1": "a part of the repository is empty",
    "r/web/": "a part of the repository is empty",
    "v9.9.9": "may be a tag without its repository",
    "latest": "may be a tag without its repository",
    "ddc95a7": "may be a tag without its repository",
    SHA: "the id of an image",
    "two words": "holds a blank",
    "r/web:1\n": "holds a blank",
    '"r/web:1"': "holds quotes",
    "'r/web:1'": "holds quotes",
    "https://r/web:1": "leave out the scheme",
    "docker://r/web:1": "leave out the scheme",
    "r/Web:1": "lower case",
    "Team/web:1": "lower case",
    "WEB:1": "lower case",
    "r/web-:1": "lower-case letters and digits, joined by",
    "r/-web:1": "lower-case letters and digits, joined by",
    "r/web.:1": "lower-case letters and digits, joined by",
    "r/we___b:1": "lower-case letters and digits, joined by",
    "registry.example./web:1": "lower-case letters and digits, joined by",
    "registry.example:/web:1": "lower-case letters and digits, joined by",
    "r/web:-rc1": "its tag may hold",
    "r/web:1:2": "its tag may hold",
    "r/web:版本": "its tag may hold",
    "r/网站:1": "lower-case letters and digits, joined by",
    f"r/web:{'x' * 129}": "more than 128 characters",
    f"r/{'x' * 254}:1": "more than 255 characters",
    "r/web@": "needs a digest",
    "r/web@sha256:": "needs a digest",
    "r/web@sha256:abc": "needs a digest",
    f"r/web@sha256:{SHA.upper()}": "needs a digest",
    f"r/web@md5:{SHA}": "needs a digest",
    "registry.example@evil": "needs a digest",
    "registry.example@evil.example/x:1": "a registry has no user name",
    "me:pass@registry.example/x:1": "a registry has no user name",
}


@pytest.mark.parametrize(("text", "cause"), NONE.items())
def test_what_is_none_is_refused_with_the_likely_cause(text: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        ReleaseRequest.of(app_id=1, deployment="web", images={"web": text})
    assert str(caught.value).startswith("images.web: ")
    assert cause in str(caught.value)
    assert "pass" not in str(caught.value)
    assert caught.value.data["field"] == "images"


@given(st.text("aB1.:/@-_ $", max_size=40))
def test_no_text_is_both_refused_and_taken(text: str) -> None:
    if is_reference(text):
        assert Reference.parse(text).repository.isascii()
    else:
        with pytest.raises(ValueError, match="not an image reference"):
            usable_image(text)


def test_a_long_text_is_refused_as_fast_as_a_short_one() -> None:
    for text in ("a" * 2000 + "!", "a." * 1000 + "!", "a-" * 1000, "a/" * 1000 + "!", "[" * 2000):
        assert not is_reference(text)


def test_a_plan_names_the_line_of_each_image(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "releases:\n"
        "  - app_id: 1\n"
        "    deployment: web\n"
        "    images:\n"
        "      web: 'r/web:'\n"
        "  - {app_id: 2, deployment: web, images: {web: v9.9.9}}\n",
        encoding="utf-8",
    )
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    first, second = caught.value.data["mistakes"]
    assert (first["line"], first["field"]) == (5, "releases.0.images.web")
    assert first["problem"] == (
        "'r/web:' is not an image reference: no tag follows the colon: perhaps a variable is empty"
    )
    assert (second["line"], second["field"]) == (6, "releases.1.images.web")


def test_the_step_that_lists_images_refuses_what_another_flow_gives_it() -> None:
    template = Revision(id=1, images={"web": "x", "odd": "${OLD}"})
    assert choose_images(template) == template.images  # what the cloud holds is what runs
    with pytest.raises(InputError, match=r"images\.web: 'r/web:' is not an image reference"):
        choose_images(template, {"web": "r/web:"})


def test_the_command_line_refuses_it_and_asks_nothing(tmp_path: Path) -> None:
    # No Prefect API and no cloud answers there.
    nobody = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "K8S_API_URL": "http://127.0.0.1:9"}
    ended = subprocess.run(
        [
            *(BIN / "prefect-rollout", "deploy", "--app-id", "3290", "--deployment", "qapm-home"),
            *("--image", "qapm-home=r/web:${TAG}", "--json"),
        ],
        env={**os.environ, **nobody, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    error: dict[str, Any] = json.loads(ended.stdout)["error"]
    assert (error["type"], error["field"]) == ("InputError", "images")
    assert ended.stderr == (
        "Failed: images.qapm-home: 'r/web:${TAG}' is not an image reference: it holds '$': perhaps a "
        "variable was not replaced. Correct the value and start again; nothing was written.\n"
    )
