"""The HTTP application: routes, keys, and errors. What the routes speak is in ``openai``."""

from __future__ import annotations

import hmac
import html
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from ..errors import DSV4Error
from . import openai
from .backend import Backend, Event, ModelInfo
from .wire import KEEP_ALIVE, ApiError, LiveResponse, http_error, read_json


def create_app(
    backend: Backend,
    *,
    api_key: str | None = None,
    strict_model: bool = False,
    official_sampling: bool = False,
    keep_alive: float = KEEP_ALIVE,
) -> FastAPI:
    """The ASGI application that serves ``backend``.

    ``api_key``            if set, callers must send it (Authorization: Bearer, or x-api-key)
    ``strict_model``       refuse other model names with 400; otherwise any name is accepted and
                           the answer's ``model`` says which model really answered
    ``official_sampling``  ignore temperature and top_p in thinking mode, as the hosted API does
    ``keep_alive``         seconds of silence before a sign of life is sent

    The caller closes ``backend``.
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

    @api.post("/v1/chat/completions")
    @api.post("/chat/completions")
    @api.post("/beta/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = openai.parse(await read_json(request))
        if strict_model and asked.model != model.id:
            raise ApiError(
                f"The supported API model names are {model.id}, but you passed {asked.model}."
            )
        order = openai.to_backend(asked, official_sampling=official_sampling)
        events = await backend.chat(order)
        answer = openai.Completion(model, asked)
        if asked.stream:
            return LiveResponse(
                _closing(answer.chunks(events), events),
                media_type="text/event-stream",
                idle=": keep-alive\n",
                failure=openai.sse_failure,
                interval=keep_alive,
            )
        return LiveResponse(
            _closing(answer.whole(events), events),
            media_type="application/json",
            idle="\n",
            failure=lambda error: json.dumps(error.body()),
            interval=keep_alive,
        )

    @api.get("/v1/models")
    @api.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model)]}

    @api.get("/v1/models/{name:path}")
    @api.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.id:
            raise ApiError(f"The model {name} is not served here; {model.id} is.", 404)
        return _model_card(model)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": model.id, **backend.load()}

    @app.get("/", response_class=HTMLResponse)
    async def index(request: Request) -> str:
        return _page(model, str(request.base_url))

    app.include_router(api)

    @app.exception_handler(ApiError)
    @app.exception_handler(DSV4Error)
    async def refused(_: Request, error: Exception) -> Response:
        return ApiError.of(error).response()

    @app.exception_handler(HTTPException)
    async def http_refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = http_error(error.status_code, error.detail, request.url.path)
        return JSONResponse(answer.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return ApiError.of(error).response()

    return app


async def _closing(
    chunks: AsyncGenerator[str, None], events: AsyncGenerator[Event, None]
) -> AsyncGenerator[str, None]:
    """``chunks``, with a promise: when it is closed, so is the work behind it."""
    async with aclosing(events), aclosing(chunks):
        async for chunk in chunks:
            yield chunk


def _model_card(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "type": "model",
        "created": model.created,
        "owned_by": "dsv4",
        "display_name": model.id,
        "description": model.description,
        "context_length": model.context_length,
        "max_output_tokens": model.max_output_tokens,
    }


def _page(model: ModelInfo, base: str) -> str:
    hello = [{"role": "user", "content": "Hello"}]
    body = json.dumps({"model": model.id, "messages": hello})
    command = (
        f"curl {base}v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )
    python = f"""from openai import OpenAI
client = OpenAI(base_url="{base}v1", api_key="none")
answer = client.chat.completions.create(
    model="{model.id}", messages=[{{"role": "user", "content": "Hello"}}])
print(answer.choices[0].message.content)"""
    name, about = html.escape(model.id), html.escape(model.description)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name} on dsv4</title>
<style>body{{font:16px/1.5 system-ui;max-width:46rem;margin:3rem auto;padding:0 1rem}}
pre{{background:#f4f4f4;padding:1rem;overflow:auto}}</style>
<h1>{name}</h1><p>{about}</p>
<p>Context: {model.context_length:,} tokens.
The API is that of DeepSeek and OpenAI: chat completions.</p>
<h2>From a terminal</h2><pre>{html.escape(command)}</pre>
<h2>From Python</h2><pre>{html.escape(python)}</pre>
<h2>Routes</h2><pre>POST /v1/chat/completions   stream or not; thinking, tools, logprobs
GET  /v1/models             which model answers
GET  /health                requests running and waiting</pre></html>
"""
