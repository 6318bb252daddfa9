"""A password in an address is shown nowhere: output, result, report, link, answer, error."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution import prefect_api
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.mcp.connection import opened
from prefect_rollout.release.report import render
from prefect_rollout.runs.lifecycle import run_link
from prefect_rollout.runs.prefect_errors import translate_errors
from support import BIN, Cloud

SECRET = "hunter2"


@pytest.fixture
def api(prefect_server: str) -> Iterator[str]:
    """The tests' Prefect API, by an address with a password, which it does not ask for."""
    url = prefect_server.replace("://", f"://me:{SECRET}@")
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


@pytest.mark.promise("Addresses are shown without passwords")
async def test_a_release_shows_its_links_without_it(api: str, cloud: Cloud) -> None:
    result = await deploy_latest_image(3290, "qapm-home", dry_run=True)
    assert SECRET in api
    assert result.links["Flow run"].startswith("http://127.0.0.1:")
    assert SECRET not in result.model_dump_json() + render(result)
    assert cloud.record == []


async def test_an_assistant_gets_its_links_without_it(api: str) -> None:
    async with opened(Path("unused")) as found:
        assert SECRET in str(found.client.api_url)
        assert found.link(uuid4()).startswith("http://127.0.0.1:")
        assert SECRET not in found.link(uuid4()) + found.ui


@pytest.mark.promise("Addresses are shown without passwords")
async def test_an_assistant_is_told_without_it_that_the_api_is_away() -> None:
    away = {PREFECT_API_URL: f"http://me:{SECRET}@127.0.0.1:9/api"}
    with temporary_settings(away), pytest.raises(ConfigurationError) as caught:
        async with opened(Path("unused")):
            pass
    assert "http://127.0.0.1:9/api does not answer" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("ui", ["javascript:alert(1)", "ftp://me:hunter2@x", "me:hunter2@x"])
def test_what_is_no_web_address_is_no_link(ui: str) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_UI_URL: ui}):
        assert run_link(uuid4()) == ""
    with temporary_settings({PREFECT_API_URL: ui}):
        assert SECRET not in prefect_api.api_in_use()


def test_an_error_that_quotes_an_address_is_told_without_it() -> None:
    request = httpx.Request("GET", f"http://me:{SECRET}@127.0.0.1:9/api/flows")
    with (
        pytest.raises(ConfigurationError, match=r"http://127\.0\.0\.1:9/api/flows") as caught,
        translate_errors(),
    ):
        httpx.Response(500, request=request).raise_for_status()
    assert SECRET not in str(caught.value) + json.dumps(caught.value.to_dict())


@pytest.mark.promise("Addresses are shown without passwords")
def test_the_command_line_shows_none_of_it(cloud: Cloud, tmp_path: Path) -> None:
    address = f"http://me:{SECRET}@127.0.0.1:9/api?token={SECRET}"
    ended = subprocess.run(
        [BIN / "prefect-rollout", "deploy", "--app-id", "3290", "--deployment", "qapm-home", "--json"],
        env={
            **os.environ,
            **cloud.environment,
            "HOME": str(tmp_path),
            "PREFECT_API_URL": address,
            "PREFECT_CLIENT_MAX_RETRIES": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "the Prefect API http://127.0.0.1:9/api does not answer" in ended.stderr
    assert json.loads(ended.stdout)["error"]["type"] == "ConfigurationError"
    assert SECRET not in ended.stderr + ended.stdout
