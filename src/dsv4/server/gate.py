"""What every request passes, whatever it asks: an id, limits of size and patience, the log.

Nothing that a client does makes the server hold without bound: bodies are limited one by one and
together, open requests are counted, and a client that sends or reads too slowly is let go.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import wire
from .logs import event as log_event
from .metering import VISIT, Visit
from .metrics import Metrics
from .wire import ApiError

MAX_HELD = 8  # times MAX_BODY: all bodies in memory at one time
MAX_OPEN = 1024  # requests at one time
SEND_PAUSE = 30.0  # seconds that a client may pause while it sends its body
READ_PAUSE = 120.0  # seconds that a client may let an answer wait
ALWAYS = ("/health", "/ready", "/metrics")  # answered while the server drains


class StalledError(Exception):
    """The client does not read its answer."""


class Gate:
    """ASGI middleware, the outermost. ``failed`` writes an error as the route's clients expect it.

    ``draining`` set to True refuses new requests with 503; ``open`` counts those being answered.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, failed: Callable[[Scope, ApiError], Response]
    ) -> None:
        self._app, self._metrics, self._failed = app, metrics, failed
        self.draining = False
        self.open = 0
        self._held = 0
        self.send_pause, self.read_pause = SEND_PAUSE, READ_PAUSE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = Visit(_request_id(headers))
        token = VISIT.set(asked)
        self.open += 1
        self._metrics.open.inc()
        status = 0
        held = 0
        complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def heard() -> Message:
            nonlocal held, complete
            if complete:
                return await receive()  # which waits for the end of the connection
            try:
                with anyio.fail_after(self.send_pause):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    f"The request body did not come: nothing for {self.send_pause:g} seconds.", 408
                ) from error
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                held += size
                self._hold(size)
                complete = not message.get("more_body", False)
                if self._held > MAX_HELD * wire.MAX_BODY:
                    raise ApiError("Too many large requests are being answered.", 503)
            return message

        async def said(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = asked.id
                answer["x-content-type-options"] = "nosniff"
                if not complete:  # what is still coming of the body is not read
                    answer["connection"] = "close"
            try:
                with anyio.fail_after(self.read_pause):
                    await send(message)
            except TimeoutError as error:
                raise StalledError from error

        error: BaseException | None = None
        try:
            refused = self._refusal(scope, headers)
            if refused is not None:
                await self._failed(scope, refused)(scope, receive, said)
            else:
                await self._app(scope, heard, said)
        except StalledError:
            asked.facts["outcome"] = "stalled"
        except Exception as failure:
            error = failure
            if not status:
                told = ApiError.of(failure)
                await self._failed(scope, told)(scope, receive, said)
        finally:
            VISIT.reset(token)
            self._hold(-held)
            self.open -= 1
            self._metrics.open.dec()
            self._log(scope, asked, status, error)

    def _hold(self, size: int) -> None:
        self._held += size
        self._metrics.held.set(self._held)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why a request is not even looked at."""
        if scope["path"] in ALWAYS:
            return None
        if self.draining:
            return ApiError("The server is shutting down.", 503)
        if self.open > MAX_OPEN:
            return ApiError("Too many requests are being answered.", 503)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > wire.MAX_BODY:
            return wire.too_large()
        return None

    def _log(self, scope: Scope, asked: Visit, status: int, error: BaseException | None) -> None:
        seconds = time.monotonic() - asked.started
        route = getattr(scope.get("route"), "path", None) or "none"
        self._metrics.requests.labels(route, scope["method"], status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        client = scope.get("client")
        log_event(
            "request", logging.ERROR if error else logging.INFO, exc_info=error,
            request_id=asked.id, method=scope["method"], route=route, status=status,
            seconds=round(seconds, 4), caller=asked.caller.id,
            client=client[0] if client else None, **asked.facts,
        )  # fmt: skip


def _request_id(headers: Headers) -> str:
    """The caller's own ``x-request-id`` if it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.-]{8,64}", given, re.ASCII) else secrets.token_hex(16)
