"""The HTTP application: keys, errors, and the routes of every surface."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import DSV4Error
from . import anthropic, fields, openai, responses
from .backend import Backend
from .conversations import Conversations
from .database import LOCAL, MEMORY, Database
from .models import Models, Service
from .page import add_page
from .wire import KEEP_ALIVE, ApiError, Envelope, http_error


def create_app(
    backend: Backend,
    *,
    pro: Backend | None = None,
    api_key: str | None = None,
    strict_model: bool = False,
    retired_names: bool = False,
    official_sampling: bool = False,
    keep_alive: float = KEEP_ALIVE,
    database: Database | None = None,
) -> FastAPI:
    """The ASGI application that serves ``backend``.

    ``pro``                answers to deepseek-v4-pro; default: ``backend`` answers to every name
    ``api_key``            if set, callers must send it (Authorization: Bearer, or x-api-key)
    ``strict_model``       refuse unknown model names with 400; otherwise any name is accepted and
                           the answer's ``model`` says which model really answered
    ``retired_names``      accept deepseek-chat and deepseek-reasoner
    ``official_sampling``  ignore temperature and top_p in thinking mode, as the hosted API does
    ``keep_alive``         seconds of silence before a sign of life is sent
    ``database``           where the page's conversations are kept; without one they last as long
                           as the application

    The caller closes the backends and ``database``.
    """
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=None)
    model = backend.model

    def authorize(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode(), api_key.encode()):
            raise ApiError(f"Authentication Fails, Your api key: ****{given[-4:]} is invalid", 401)

    api = APIRouter(dependencies=[Depends(authorize)])

    models = Models(backend, pro, strict=strict_model, retired_names=retired_names)
    service = Service(models, official_sampling, keep_alive)
    for surface in (openai, anthropic, responses):
        api.include_router(surface.router(service))

    @app.get("/openapi.json", include_in_schema=False)
    def openapi_document() -> dict[str, Any]:
        return fields.document(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": model.id, **backend.load()}

    def owner(request: Request) -> str:
        authorize(request)
        return LOCAL

    app.include_router(api)
    stored = Conversations(database or Database(MEMORY))
    add_page(app, models, stored, owner, keys=api_key is not None)

    @app.exception_handler(ApiError)
    @app.exception_handler(DSV4Error)
    async def refused(request: Request, error: Exception) -> Response:
        return ApiError.of(error).response(_envelope(request))

    @app.exception_handler(HTTPException)
    async def http_refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = http_error(error.status_code, error.detail, request.url.path)
        return JSONResponse(_envelope(request)(answer), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return ApiError.of(error).response(_envelope(request))

    return app


def _envelope(request: Request) -> Envelope:
    return anthropic.envelope if anthropic.speaks(request.url.path) else ApiError.body
