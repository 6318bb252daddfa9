"""Parameters of the flows, made from the request models."""

import inspect
from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import get_call_parameters
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from prefect_rollout import flows
from prefect_rollout.batch.plan import BatchRequest
from prefect_rollout.release.parameters import parameters_of, takes
from prefect_rollout.release.request import ReleaseRequest, Request, RollbackRequest, ScaleRequest

REQUESTS: list[tuple[Flow[..., Any], type[BaseModel]]] = [
    (flows.deploy_latest_image, ReleaseRequest),
    (flows.deploy_batch, BatchRequest),
    (flows.rollback, RollbackRequest),
    (flows.restart, Request),
    (flows.scale, ScaleRequest),
]


@pytest.mark.parametrize(("flow", "model"), REQUESTS, ids=[flow.name for flow, _ in REQUESTS])
def test_a_form_has_the_fields_of_the_request(flow: Flow[..., Any], model: type[BaseModel]) -> None:
    form = flow.parameters.properties
    assert set(form) == set(model.model_fields)
    for name, field in model.model_fields.items():
        assert field.description
        assert field.description.endswith(".")
        assert (form[name]["title"], form[name]["description"]) == (name, field.description)
        assert form[name].get("default", PydanticUndefined) == field.default
    assert [form[name]["position"] for name in form] == list(range(len(form)))
    assert set(flow.parameters.required) == {
        name for name, field in model.model_fields.items() if field.is_required()
    }


def test_required_parameters_may_be_given_by_position() -> None:
    given = get_call_parameters(flows.deploy_latest_image.fn, (3290, "qapm-home"), {"reason": "nightly"})
    assert given == ReleaseRequest.of(app_id=3290, deployment="qapm-home", reason="nightly").model_dump()


def test_a_field_without_a_place_in_the_groups_is_an_error() -> None:
    class Other(BaseModel):
        colour: str

    with pytest.raises(ValueError, match="colour"):
        parameters_of(Other)


def test_the_docstring_keeps_its_text_and_gets_the_descriptions() -> None:
    @takes(ScaleRequest)
    def scaled(**options: Any) -> None:
        """Scale.

        Raises:
            ValueError: never.
        """

    text = inspect.getdoc(scaled) or ""
    assert text.startswith("Scale.\n\nRaises:\n    ValueError: never.\n\nArgs:\n    app_id: ID of the app")
    assert "    replicas: Number of pods in each cluster." in text
