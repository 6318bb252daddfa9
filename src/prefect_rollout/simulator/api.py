"""The contract's calls as HTTP, and the application that puts everything together."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Literal, cast

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.control import control_routes
from prefect_rollout.simulator.exchange import error_content
from prefect_rollout.simulator.gate import Gate
from prefect_rollout.simulator.params import (
    Clusters,
    DeploymentId,
    IdempotencyKey,
    NameFilter,
    PageNo,
    PageSize,
    PathId,
    PathName,
    ResourceId,
    ResourceType,
)
from prefect_rollout.simulator.refusal import Refusal
from prefect_rollout.simulator.scenario import Scenario
from prefect_rollout.simulator.shapes import (
    AppShape,
    DeploymentShape,
    Envelope,
    ErrorBody,
    HistoryShape,
    OnlineShape,
    Page,
    PublishBody,
    ScaleBody,
    StatusShape,
    TemplateIds,
    TemplateShape,
    UpgradeBody,
)
from prefect_rollout.simulator.wire import Wire
from prefect_rollout.text import one_line

PREFIX = "/openapi/v1"

_READ_ERRORS = {
    400: "A bad parameter.",
    401: "Not signed, or not as it should be: subCode 401001 to 401005.",
    403: "The key or the app may not do this; subCode 403001: quota.",
    404: "No such app, deployment, template or cluster.",
    413: "The body is longer than 1 MiB.",
    429: "Overload; Retry-After.",
    500: "A server fault; a write may have taken effect.",
    503: "Overload; Retry-After.",
}
_WRITE_ERRORS = {
    **_READ_ERRORS,
    409: "409001: another publish is running. 409002: the Idempotency-Key was used for another request.",
}


def _responses(errors: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": text} for status, text in errors.items()}


_SIGNATURE = APIKeyHeader(
    name="Authorization",
    scheme_name="STARK-HMAC-SHA256",
    description="`STARK-HMAC-SHA256 KeyId=…, Signature=…`, with X-Stark-Date, X-Stark-Nonce and X-Stark-Env.",
    auto_error=False,  # for the document only: the gate has checked the signature before
)


class SimulatorApp:
    """The simulated cloud as an ASGI application.

    Args:
        cloud: what it serves.
    """

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        # Outermost, as it has to reach the connection.
        self._wire = Wire(Gate(_calls(), cloud, f"{PREFIX}/"), cloud, f"{PREFIX}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        _serving.set(self._cloud)
        await (self._wire if scope["type"] == "http" else _calls())(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        return _calls().openapi()


_serving: ContextVar[Cloud] = ContextVar("serving")


class _Serving:
    """The cloud of the application that answers: all share their routes, which take long to make."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_serving.get(), name)


class _Calls(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return FastAPI's document without the 422 that is never answered."""
        if self.openapi_schema is None:
            document = super().openapi()
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for unused in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(unused, None)
        return super().openapi()


def create_app(cloud: Cloud | Scenario | None = None) -> SimulatorApp:
    """The application that serves a cloud; without one, the article's."""
    return SimulatorApp(cloud if isinstance(cloud, Cloud) else Cloud(cloud or Scenario()))


@cache
def _calls() -> FastAPI:
    cloud = cast(Cloud, _Serving())
    app = _Calls(
        title="Simulated container cloud",
        summary="The container cloud's Open API, and a control API for tests.",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(_open_api(cloud))
    app.include_router(control_routes(cloud, _responses({400: "A bad value.", 404: "No such thing."})))

    @app.get("/", include_in_schema=False)
    async def root() -> dict[str, str]:
        return {
            "what": "a simulated container cloud",
            "calls": f"{PREFIX}/apps/{{appId}} and the rest of the Open API, signed",
            "control": "/_control/truth, /_control/record, /_control/requests",
            "document": "/openapi.json",
        }

    _answer_errors(app, cloud)
    return app


def _answer_errors(app: FastAPI, cloud: Cloud) -> None:
    """Gives every error the contract's shape."""

    def answer(refusal: Refusal, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(error_content(refusal, cloud.request_id()), refusal.status, headers=headers)

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        mistake = error.errors()[0]
        field = ".".join(str(part) for part in mistake["loc"])
        return answer(Refusal(400, f"参数错误 {one_line(field)}: {one_line(mistake['msg'])}"))

    @app.exception_handler(HTTPException)
    async def missed(_: Request, error: HTTPException) -> JSONResponse:
        return answer(Refusal(error.status_code, str(error.detail)), dict(error.headers or {}))


def _open_api(cloud: Cloud) -> APIRouter:
    router = APIRouter(prefix=PREFIX, tags=["Open API"], dependencies=[Security(_SIGNATURE)])
    read = partial(router.get, response_model_exclude_unset=True, responses=_responses(_READ_ERRORS))
    write = partial(router.post, response_model_exclude_unset=True, responses=_responses(_WRITE_ERRORS))
    _reads(cloud, read)
    _writes(cloud, write)
    return router


Route = Callable[[str], Callable[[Callable[..., Awaitable[Any]]], Any]]


def _reads(cloud: Cloud, read: Route) -> None:
    @read("/apps/{app_id}")
    async def get_app(app_id: PathId) -> Envelope[AppShape]:
        """An app."""
        return Envelope(data=cloud.app(app_id))

    @read("/apps/{app_id}/deployments")
    async def list_deployments(
        app_id: PathId,
        wish: NameFilter = None,
        page_no: PageNo = 1,
        page_size: PageSize = 10,
    ) -> Envelope[Page[DeploymentShape]]:
        """The deployments of an app."""
        how, _, name = (wish or "").partition("=")
        found = cloud.deployments(
            app_id,
            exact=name if how == "name__exact" else None,
            containing=name if how == "name" else None,
            page=page_no,
            size=page_size,
        )
        return Envelope(data=found)

    # Before /tpls/{template_id} and the deployments' own paths, of which it looks like one.
    @read("/apps/{app_id}/deployments/tpls")
    async def list_templates(
        app_id: PathId,
        deployment_id: DeploymentId = None,
        sortby: Literal["id", "-id"] = "id",
        page_no: PageNo = 1,
        page_size: PageSize = 10,
    ) -> Envelope[Page[TemplateShape]]:
        """The templates of a deployment; `sortby=-id` has the newest first."""
        found = cloud.templates(
            app_id,
            deployment_id=deployment_id,
            newest_first=sortby == "-id",
            page=page_no,
            size=page_size,
        )
        return Envelope(data=found)

    @read("/apps/{app_id}/deployments/tpls/{template_id}")
    async def get_template(app_id: PathId, template_id: PathId) -> Envelope[TemplateShape]:
        """One template."""
        return Envelope(data=cloud.template(app_id, template_id))

    @read("/apps/{app_id}/deployments/{deployment_id}/status")
    async def get_status(
        app_id: PathId,
        deployment_id: PathId,
        cluster: Clusters,
    ) -> Envelope[list[StatusShape]]:
        """A deployment's pods in some clusters."""
        return Envelope(data=cloud.status(app_id, deployment_id, list(dict.fromkeys(cluster.split(",")))))

    @read("/publishstatus")
    async def list_online(
        resource_id: ResourceId,
        kind: ResourceType = 0,
    ) -> Envelope[list[OnlineShape]]:
        """Which template is online in which cluster."""
        return Envelope(data=cloud.online(resource_id))

    @read("/publish/histories")
    async def list_history(
        resource_id: ResourceId,
        kind: ResourceType = 0,
        page_no: PageNo = 1,
        page_size: PageSize = 10,
    ) -> Envelope[Page[HistoryShape]]:
        """The publishes of a deployment, newest first."""
        return Envelope(data=cloud.history(resource_id, page=page_no, size=page_size))


def _writes(cloud: Cloud, write: Route) -> None:
    @write("/apps/{app_id}/deployments/{deployment_id}/upgrade")
    async def upgrade(
        request: Request,
        app_id: PathId,
        deployment_id: PathId,
        body: UpgradeBody,
        idempotency_key: IdempotencyKey = None,
    ) -> Envelope[TemplateIds]:
        """Creates a template like another one, with other images."""
        user = request.scope["simulator.key_id"]
        created = cloud.upgrade(app_id, deployment_id, body, user=user, key=idempotency_key)
        return Envelope(data=TemplateIds(template_ids=[created]))

    @write("/apps/{app_id}/deployments/{deployment_id}/tpls/{template_id}/clusters/{cluster}")
    async def publish(
        request: Request,
        app_id: PathId,
        deployment_id: PathId,
        template_id: PathId,
        cluster: PathName,
        body: PublishBody,
        idempotency_key: IdempotencyKey = None,
    ) -> Envelope[Literal["ok"]]:
        """Puts a template online in a cluster. `ok` means that the write was accepted, no more."""
        cloud.publish(
            app_id,
            deployment_id,
            template_id,
            cluster,
            body.replicas,
            user=request.scope["simulator.key_id"],
            key=idempotency_key,
        )
        return Envelope(data="ok")

    @write("/apps/{app_id}/deployments/{deployment_id}/clusters/{cluster}/restart")
    async def restart(
        app_id: PathId, deployment_id: PathId, cluster: PathName, idempotency_key: IdempotencyKey = None
    ) -> Envelope[Literal["ok"]]:
        """Replaces all pods by alike ones."""
        cloud.restart(app_id, deployment_id, cluster, key=idempotency_key)
        return Envelope(data="ok")

    @write("/apps/{app_id}/deployments/{deployment_id}/clusters/{cluster}/scale")
    async def scale(
        app_id: PathId,
        deployment_id: PathId,
        cluster: PathName,
        body: ScaleBody,
        idempotency_key: IdempotencyKey = None,
    ) -> Envelope[Literal["ok"]]:
        """Changes the number of pods."""
        cloud.scale(app_id, deployment_id, cluster, body.replicas, key=idempotency_key)
        return Envelope(data="ok")
