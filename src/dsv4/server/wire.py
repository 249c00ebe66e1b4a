"""HTTP details every API of the server shares: errors, bodies, and answers made while one waits.

Errors have one shape, the hosted API's: ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..engine import EngineBusyError, EngineClosedError, EngineStuckError
from ..errors import EncodingError, RequestError
from .accounts import AccountError

MAX_BODY = 64 << 20  # bytes; a million tokens of text are about 4 MB
KEEP_ALIVE = 10.0  # seconds of silence after which a sign of life is sent
DONE = "data: [DONE]\n\n"
_UNREADABLE = "Failed to deserialize the JSON body into the target type: "

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)


class ApiError(Exception):
    """An answer other than 200, in the hosted API's shape."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        type: str = "",
        code: str | None = None,
        retry_after: int = 1,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after  # seconds; sent with 429 and 503
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else _INVALID)
        self.code = code or (self.type if status >= 500 else _INVALID)

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.type, "param": None, "code": self.code}
        return {"error": error}

    def response(self, envelope: Envelope | None = None) -> Response:
        """As a whole answer; ``envelope`` is for surfaces whose errors have another shape."""
        headers = {"Retry-After": str(self.retry_after)} if self.status in (429, 503) else None
        return JSONResponse((envelope or ApiError.body)(self), self.status, headers)

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """What a client is told about an exception. Surprises are not described to strangers."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, AccountError):
            return cls(str(error), error.status, retry_after=error.retry_after or 1)
        if isinstance(error, EngineBusyError):
            return cls(str(error), 429)
        if isinstance(error, EngineClosedError):
            return cls("The server is shutting down.", 503)
        if isinstance(error, EngineStuckError):
            return cls("The model does not answer: a step of its computation is stuck.", 503)
        if isinstance(error, RequestError | EncodingError):
            return cls(str(error))
        return cls("Internal error: the generation failed; the server's log has the details.", 500)


Envelope = Callable[[ApiError], dict[str, Any]]
_INVALID = "invalid_request_error"
_TYPES = {
    401: "authentication_error",
    402: "unknown_error",
    403: "permission_error",
    404: "not_found_error",
    413: _INVALID,
    429: "rate_limit_error",
    503: "overloaded_error",
}


def http_error(status: int, detail: str, path: str) -> ApiError:
    """The envelope for what the HTTP layer itself refuses (unknown path, wrong method)."""
    if status == 404:
        return ApiError(f"Not found: there is no {path} here; GET / lists what there is.", 404)
    return ApiError(detail or HTTPStatus(status).phrase, status)


def too_large() -> ApiError:
    return ApiError(f"The request body is too large: the limit is {MAX_BODY} bytes.", 413)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError 400 for anything else, 413 for too much.

    Half surrogate pairs, which JSON can spell and UTF-8 cannot, become U+FFFD.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise too_large()
    except ClientDisconnect as error:
        raise ApiError("The request body ended before it was complete.") from error
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"Failed to parse the request body as JSON: {error}") from error
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ApiError(f"{_UNREADABLE}expected an object, got {kind}")
    return _well_formed(data) if b"\\u" in body else data


class Loose(BaseModel):
    """Part of a request's body. Unknown fields are tolerated, as the hosted service does."""

    model_config = ConfigDict(extra="allow")


def deserialize(kind: type[Body], body: dict[str, Any]) -> Body:
    """Validate a body. Raises ApiError 400 with the first problem in the hosted API's words."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise ApiError(_UNREADABLE + _serde(error, body)) from error


def missing(where: str, field: str) -> ApiError:
    """That a part of the body lacks a field, in the same words."""
    return ApiError(f"{_UNREADABLE}{where}: missing field `{field}`")


def _serde(error: ValidationError, body: dict[str, Any]) -> str:
    problem = error.errors()[0]
    where = ""
    value: Any = body
    for part in problem["loc"]:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            where += f"[{part}]"
            value = value[part]
        elif isinstance(value, dict) and (part in value or problem["type"] == "missing"):
            where += f".{part}" if where else str(part)
            value = value.get(part)
        else:
            break  # the name of a union's branch, not of a field
    expected = str(problem.get("ctx", {}).get("expected", ""))
    if problem["type"] == "missing":
        parent, _, name = where.rpartition(".")
        return f"{parent + ': ' if parent else ''}missing field `{name}`"
    if problem["type"] == "literal_error" and isinstance(value, str):
        options = expected.replace(" or ", ", ").replace("'", "`")
        return f"{where}: unknown variant `{value}`, expected one of {options}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def sse(data: Mapping[str, Any], event: str = "") -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {dumps(data)}\n\n"


def dumps(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def waiting(done: tuple[int, int] | None) -> str:
    """A sign of life in a stream of events: a comment, which says how much of the prompt has been
    read. It ends with one newline: two of them end an event for some clients."""
    said = "" if done is None else f", prefill {done[0]}/{done[1]} tokens"
    return f": keep-alive{said}\n"


class LiveResponse(Response):
    """A response whose ``chunks`` are made while the client waits.

    Until the first chunk (or the first sign of life) nothing is sent, so an early failure still
    has its own status; a later one is sent in-band, as ``failure`` spells it. After ``interval``
    silent seconds ``idle`` (or what it gives then) is sent. When the client goes away, or the
    server cancels the request, ``chunks`` is closed before this returns: closing must stop the work
    behind it (``Closing``).
    """

    def __init__(
        self,
        chunks: AsyncGenerator[str, None],
        *,
        media_type: str,
        idle: str | Callable[[], str],
        failure: Callable[[ApiError], str],
        interval: float = KEEP_ALIVE,
        envelope: Envelope | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={**_UNBUFFERED, **(headers or {})})
        del self.headers["content-length"]
        self._chunks, self._idle, self._failure = chunks, idle, failure
        self._envelope = envelope
        self._interval = interval

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(text: str, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            await send(body)

        gone = asyncio.create_task(_disconnected(receive))
        coming: asyncio.Task[str | None] | None = None
        try:
            while not gone.done():
                coming = coming or asyncio.create_task(_next(self._chunks))
                await asyncio.wait(
                    {coming, gone}, timeout=self._interval, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done():
                    break
                if not coming.done():
                    await write(self._idle if isinstance(self._idle, str) else self._idle())
                    continue
                try:
                    chunk = coming.result()
                except Exception as error:
                    told = ApiError.of(error)
                    if started:
                        await write(self._failure(told), more=False)
                    else:
                        await told.response(self._envelope)(scope, receive, send)
                    if told.status == 500:
                        raise  # the server logs it
                    break
                coming = None
                if chunk is None:
                    await write("", more=False)
                    break
                await write(chunk)
        finally:
            gone.cancel()
            if coming is not None and not coming.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming
            await self._chunks.aclose()


class Closing(AsyncGenerator[T, None]):
    """``chunks``, with a promise: when it is closed, ``behind`` is called, even if none was asked
    for. (A generator that never began runs no ``finally``.)"""

    def __init__(self, chunks: AsyncGenerator[T, None], behind: Callable[[], object]) -> None:
        self._chunks, self._behind = chunks, behind

    async def asend(self, value: None) -> T:
        return await self._chunks.asend(value)

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> T:
        error = typ if isinstance(typ, BaseException) else typ()
        return await self._chunks.athrow(error)

    async def aclose(self) -> None:
        try:
            await self._chunks.aclose()
        finally:
            closing = self._behind()
            if inspect.isawaitable(closing):
                await closing


# nginx holds a response back unless told not to
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _next(chunks: AsyncGenerator[str, None]) -> str | None:
    return await anext(chunks, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_well_formed(v) for v in value]
    if isinstance(value, dict):
        return {_well_formed(k): _well_formed(v) for k, v in value.items()}
    return value
