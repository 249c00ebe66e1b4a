"""The HTTP application: keys, errors, and the routes of every surface.

A request passes the gate (``gate``), is recognised by its key (``accounts``), and what it asks of
a backend goes through the books (``metering``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from ..errors import DSV4Error
from . import anthropic, fields, metrics, openai, responses, usage_page
from .accounts import AccountError, Caller, Keys, open_to
from .backend import Backend
from .conversations import Conversations
from .database import MEMORY, Database
from .gate import Gate
from .ledger import Ledger
from .metering import Metered, visit
from .models import FLASH, PRO, Models, Service
from .page import add_page
from .prices import PriceList
from .wire import KEEP_ALIVE, ApiError, Envelope, http_error


@dataclass(frozen=True)
class Operations:
    """What runs an application from outside: ``app.state.operations``."""

    gate: Gate
    ledger: Ledger
    database: Database


def create_app(
    backend: Backend,
    *,
    pro: Backend | None = None,
    database: Database | None = None,
    prices: PriceList | None = None,
    api_key: str | None = None,
    keyless: bool = True,
    origins: Sequence[str] = (),
    log_prompts: bool = False,
    strict_model: bool = False,
    retired_names: bool = False,
    official_sampling: bool = False,
    keep_alive: float = KEEP_ALIVE,
) -> FastAPI:
    """The ASGI application that serves ``backend``.

    ``pro``                answers to deepseek-v4-pro; default: ``backend`` answers to every name
    ``database``           where keys, the books and the page's conversations are; default: in
                           memory, for this application
    ``prices``             what tokens cost; default: V4's prices at its launch
    ``api_key``            a key beside those of the database, for the server's owner
    ``keyless``            while there is no key at all, callers need none: for loopback only
    ``origins``            web sites whose pages may use the server from a browser; "*" is any
    ``log_prompts``        log what is asked, too
    ``strict_model``       refuse unknown model names with 400; otherwise any name is accepted and
                           the answer's ``model`` says which model really answered
    ``retired_names``      accept deepseek-chat and deepseek-reasoner
    ``official_sampling``  ignore temperature and top_p in thinking mode, as the hosted API does
    ``keep_alive``         seconds of silence before a sign of life is sent

    The caller closes the backends and ``database``. ``app.state.operations`` is an ``Operations``.
    """
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=None)
    model = backend.model
    database = database or Database(MEMORY)
    price_list = prices or PriceList()
    keys, ledger = Keys(database), Ledger(database, price_list)
    counters = metrics.Metrics([backend, pro] if pro else [backend])
    instant = Metered(backend, FLASH, ledger, counters, log_prompts)
    expert = Metered(pro or backend, PRO, ledger, counters, log_prompts)

    def recognise(request: Request, headers: Mapping[str, str]) -> Caller:
        asked = visit()
        caller = keys.recognise(headers, also=api_key, keyless=keyless, request_id=asked.id)
        if caller is None:
            open_to(headers, tuple(origins))
            caller = Caller()
        request.state.caller = asked.caller = caller
        return caller

    def authorize(request: Request) -> Caller:
        """Who asks. Raises AccountError."""
        return recognise(request, request.headers)

    api = APIRouter(dependencies=[Depends(authorize)])

    models = Models(instant, expert, strict=strict_model, retired_names=retired_names)
    service = Service(models, official_sampling, keep_alive)
    for surface in (openai, anthropic, responses):
        api.include_router(surface.router(service))
    api.include_router(usage_page.balance_routes(ledger))

    @app.get("/openapi.json", include_in_schema=False)
    def openapi_document() -> dict[str, Any]:
        return fields.document(app)

    @api.get("/usage.json")
    def usage_json(request: Request) -> dict[str, Any]:
        return usage_page.as_json(*usage_page.read(database, request.state.caller))

    @app.get("/usage", include_in_schema=False)
    def usage(request: Request) -> Response:
        try:
            caller = recognise(request, usage_page.credentials(request))
        except AccountError as error:
            return usage_page.login(error)
        return usage_page.page(caller, *usage_page.read(database, caller))

    @api.get("/metrics", include_in_schema=False)
    def prometheus() -> Response:
        return Response(counters.text(), media_type=metrics.CONTENT_TYPE)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": model.id, **backend.load()}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        if gate.draining:
            raise ApiError("The server is shutting down.", 503)
        if any(each.load().get("stuck") for each in (instant, expert)):
            raise ApiError("A step of the model's computation does not return.", 503)
        database.ping()
        return {"status": "ready"}

    app.include_router(api)
    add_page(
        app,
        models,
        Conversations(database),
        owner=lambda request: authorize(request).id,
        keys=lambda: api_key is not None or not keyless or keys.exist(),
        prices=price_list,
    )

    def failed(scope: Scope, error: ApiError) -> Response:
        return error.response(_envelope(scope["path"]))

    @app.exception_handler(ApiError)
    @app.exception_handler(DSV4Error)
    async def refused(request: Request, error: Exception) -> Response:
        return failed(request.scope, ApiError.of(error))

    @app.exception_handler(HTTPException)
    async def http_refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = http_error(error.status_code, error.detail, request.url.path)
        return JSONResponse(_envelope(request.url.path)(answer), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return failed(request.scope, ApiError.of(error))

    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    gate = Gate(app.build_middleware_stack(), counters, failed)
    app.middleware_stack = gate
    app.state.operations = Operations(gate, ledger, database)
    return app


def _envelope(path: str) -> Envelope:
    return anthropic.envelope if anthropic.speaks(path) else ApiError.body
