"""Path and query parameters that the calls share."""

from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Header, Query
from pydantic import BeforeValidator, Field


def _decoded(segment: Any) -> Any:
    return unquote(segment) if isinstance(segment, str) else segment


# Paths are routed percent-encoded, so each segment is decoded here.
PathId = Annotated[int, BeforeValidator(_decoded), Field(ge=1, le=2**53)]
PathName = Annotated[str, BeforeValidator(_decoded), Field(min_length=1, max_length=253)]

DeploymentId = Annotated[int | None, Query(alias="deploymentId", ge=1, le=2**53)]
ResourceId = Annotated[int, Query(alias="resourceId", ge=1, le=2**53, description="A deployment's id.")]
ResourceType = Annotated[int, Query(alias="type", ge=0, le=0, description="0: deployments.")]
NameFilter = Annotated[
    str | None,
    Query(
        alias="filter",
        pattern="^name(__exact)?=",
        description="`name__exact=…`, or `name=…` for a part of it.",
    ),
]
Clusters = Annotated[
    str, Query(min_length=1, max_length=8192, description="One cluster, or several joined by commas.")
]
PageNo = Annotated[int, Query(alias="pageNo", ge=1, le=10**6)]
PageSize = Annotated[int, Query(alias="pageSize", ge=1, le=100)]
IdempotencyKey = Annotated[
    str | None,
    Header(description="`<release id>:<step>[:<cluster>]`; a repeat is answered with the first answer."),
]
