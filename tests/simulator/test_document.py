"""The published OpenAPI document against the answers, with requests that schemathesis makes up."""

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from prefect_rollout.simulator import Scenario, SimulatorServer, create_app
from simulator.caller import signed_headers

DOCUMENT = create_app().openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])

# What exists, in place of every other made-up id: otherwise all answers would be 404.
IN_PATH: dict[str, Any] = {
    "app_id": 3290,
    "deployment_id": 20771,
    "template_id": 1343169,
    "cluster": "pub-bjwdt",
}
IN_QUERY: dict[str, Any] = {"deploymentId": 20771, "resourceId": 20771, "cluster": "pub-bjwdt"}
IN_BODY: dict[str, Any] = {"templateId": 1343169, "clusters": ["pub-bjwdt"], "images": {"qapm-home": "web:1"}}


class RequestsSigner(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        body = request.body or b""
        if isinstance(body, str):
            body = body.encode()
        assert isinstance(body, bytes)
        request.headers.update(signed_headers(request.method or "", request.path_url, body))
        return request


@pytest.fixture(scope="module")
def own_server() -> Any:
    with SimulatorServer() as running:
        yield running


# Not for the two that change what the others are answered; test_control has those.
@SCHEMA.exclude(path_regex="/_control/(scenario|faults)").parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_answers_are_as_the_document_says(case: schemathesis.Case[Any], own_server: SimulatorServer) -> None:
    replacements: tuple[tuple[Any, dict[str, Any]], ...] = (
        (case.path_parameters, IN_PATH),
        (case.query, IN_QUERY),
        (case.body, IN_BODY),
    )
    for made_up, existing in replacements:
        if isinstance(made_up, dict) and len(str(made_up)) % 2:
            made_up.update({name: value for name, value in existing.items() if name in made_up})
    case.call_and_validate(
        base_url=own_server.url,
        auth=RequestsSigner(),
        checks=[
            not_a_server_error,
            status_code_conformance,
            response_schema_conformance,
            content_type_conformance,
        ],
    )


def test_every_call_of_the_contract_is_in_the_document() -> None:
    operations = {
        f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods
    }
    base = "/openapi/v1/apps/{app_id}"
    deployment = f"{base}/deployments/{{deployment_id}}"
    assert operations == {
        f"GET {base}",
        f"GET {base}/deployments",
        f"GET {base}/deployments/tpls",
        f"GET {base}/deployments/tpls/{{template_id}}",
        f"POST {deployment}/upgrade",
        f"POST {deployment}/tpls/{{template_id}}/clusters/{{cluster}}",
        f"GET {deployment}/status",
        "GET /openapi/v1/publishstatus",
        "GET /openapi/v1/publish/histories",
        f"POST {deployment}/clusters/{{cluster}}/restart",
        f"POST {deployment}/clusters/{{cluster}}/scale",
        "GET /_control/record",
        "GET /_control/requests",
        "GET /_control/truth",
        "PUT /_control/scenario",
        "PUT /_control/faults",
        "PUT /_control/apps/{app_id}/deployments/{name}/behaviour",
        "POST /_control/reset",
        "POST /_control/advance",
    }


def test_the_document_describes_the_scenario_too() -> None:
    described = DOCUMENT["components"]["schemas"]["Scenario"]["properties"]
    assert set(described) == set(Scenario.model_fields)
