"""The Anthropic messages API: its requests become the server's own, its events come back.

Fields of the hosted route that change nothing there change nothing here. What it refuses and
agents send is taken: system messages anywhere, thinking blocks without or with foreign signatures,
forced tool choices while thinking, blocks of unknown types.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from .backend import (
    Begin,
    ChatRequest,
    ContentDelta,
    Event,
    Finish,
    ModelInfo,
    ReasoningDelta,
    ToolCall,
    Usage,
)
from .models import Route, Service
from .surface import (
    AskedChat,
    Choice,
    Effort,
    Schema,
    Thinking,
    effort,
    live,
    namespace,
    note,
    schema,
    stops,
)
from .wire import ApiError, Loose, deserialize, dumps, read_json, sse

_ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
# Clients add a line about themselves that changes with every request; it would end every cache.
_VOLATILE = "x-anthropic-billing-header:"


class Message(Loose):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]] | None


class Tool(Loose):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Loose):
    type: Literal["none", "auto", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Schema):
    type: str


class OutputConfig(Loose):
    effort: Effort | None = None
    format: OutputFormat | None = None


class Metadata(Loose):
    user_id: Any = None


class CountRequest(Loose):
    """The body of POST /v1/messages/count_tokens."""

    model: str = ""
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, AskedChat):
    """The body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    metadata: Metadata | None = None


def speaks(path: str) -> bool:
    """Whether errors at ``path`` have this API's shape."""
    return "/messages" in path or path.startswith("/anthropic")


def envelope(error: ApiError) -> dict[str, Any]:
    kind = _ERRORS.get(
        error.status, "api_error" if error.status >= 500 else "invalid_request_error"
    )
    body = {"type": kind, "message": str(error)}
    return {"type": "error", "error": body, "request_id": f"req_{uuid.uuid4().hex}"}


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter()

    async def messages(request: Request) -> Response:
        asked = deserialize(MessagesRequest, await read_json(request))
        route = service.models.route(asked.model)
        order = to_backend(asked, route, official_sampling=service.official_sampling)
        events = await route.backend.chat(order)
        said = note(route.backend.model, order.effort)
        answer = Answer(route.backend.model, said)
        return live(
            service,
            answer.stream(events) if asked.stream else answer.whole(events),
            events,
            stream=asked.stream,
            idle=sse({"type": "ping"}, "ping"),
            failure=lambda error: sse(envelope(error), "error"),
            envelope=envelope,
            said=said,
        )

    async def count_tokens(request: Request) -> dict[str, int]:
        asked = deserialize(CountRequest, await read_json(request))
        route = service.models.route(asked.model)
        order = _order(asked, route)
        return {"input_tokens": await route.backend.count_tokens(order)}

    for base in ("/v1", "/anthropic/v1", "/anthropic"):
        routes.post(f"{base}/messages")(messages)
        routes.post(f"{base}/messages/count_tokens")(count_tokens)
    return routes


# ---------------------------------------------------------------------- body -> backend


def to_backend(
    request: MessagesRequest, route: Route, *, official_sampling: bool = False
) -> ChatRequest:
    """What the backend is asked to do. Raises ApiError or RequestError for values out of range."""
    return _order(
        request,
        route,
        sampling=request.sampled(
            request.max_tokens, ignored=official_sampling and _effort(request, route) != "none"
        ),
        stop=stops(request.stop_sequences),
        max_thinking_tokens=request.budget,
        namespace=namespace(request.metadata.user_id if request.metadata else None),
    )


def _order(request: CountRequest, route: Route, **more: Any) -> ChatRequest:
    if not request.messages:
        raise ApiError("Empty input messages")
    choice = request.tool_choice
    demand, name = _choice(request)
    wanted = request.output_config.format if request.output_config else None
    kind = wanted.type if wanted and wanted.type == "json_schema" else ""
    return ChatRequest(
        messages=list(_messages(request)),
        effort=_effort(request, route),
        tools=[_tool(t) for t in request.tools or [] if t.input_schema is not None],
        tool_choice=demand,
        tool_name=name,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        schema=schema(kind, wanted, "output_config.format"),
        **more,
    )


def _choice(request: CountRequest) -> tuple[Choice, str | None]:
    """Whether a call is demanded, and of which tool. A tool that only the hosted service has
    cannot be called: whoever demands it gets an answer without it."""
    asked, tools = request.tool_choice, request.tools or []
    if asked is None:
        return ("auto" if tools else "none"), None
    if asked.type in ("none", "auto"):
        return asked.type, None
    if any(t.name == asked.name and t.input_schema is None for t in tools):
        return "auto", None
    return "required", asked.name if asked.type == "tool" else None


def _effort(request: CountRequest, route: Route) -> str:
    switch = request.thinking.on if request.thinking else None
    asked = request.output_config.effort if request.output_config else None
    return effort(switch, asked, route)


def _tool(tool: Tool) -> dict[str, Any]:
    """In the OpenAI shape; what only this API knows (cache marks, examples) stays out."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _messages(request: CountRequest) -> Iterable[dict[str, Any]]:
    """In the OpenAI shape, each in its place; a turn of results and text becomes several."""
    system = request.system
    texts = [system] if isinstance(system, str) else [_text(b) for b in system or ()]
    head = [t for t in texts if t and not t.startswith(_VOLATILE)]
    if head:
        yield {"role": "system", "content": "\n\n".join(head)}
    for message in request.messages:
        if not isinstance(message.content, list):
            yield {"role": message.role, "content": message.content or ""}
        elif message.role == "assistant":
            yield _assistant(message.content)
        else:
            yield from _user(message.role, message.content)


def _user(role: str, blocks: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    texts: list[str] = []
    for block in blocks:
        if block.get("type") in ("tool_result", "web_search_tool_result"):
            if texts:
                yield {"role": role, "content": "\n\n".join(texts)}
                texts = []
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": _content(block.get("content")),
            }
        else:
            texts.append(_text(block))
    if texts:
        yield {"role": role, "content": "\n\n".join(texts)}


def _assistant(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, list[str]] = {"text": [], "thinking": []}
    calls = []
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            kinds["thinking"].append(str(block.get("thinking") or ""))
        elif kind in ("tool_use", "server_tool_use"):
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            kinds["text"].append(_text(block))
    message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(kinds["text"])}
    if kinds["thinking"]:
        message["reasoning_content"] = "\n\n".join(kinds["thinking"])
    if calls:
        message["tool_calls"] = calls
    return message


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "\n\n".join(_text(b) if isinstance(b, dict) else str(b) for b in content)
    return "" if content is None else str(content)


def _text(block: dict[str, Any]) -> str:
    """The text of a block; other kinds leave a mark of what was there."""
    kind = block.get("type")
    if kind == "text":
        return str(block.get("text") or "")
    if kind == "document" and isinstance(source := block.get("source"), dict):
        if source.get("type") == "text":
            return str(source.get("data") or "")
    return f"[Unsupported {str(kind).capitalize()}]"


# ---------------------------------------------------------------------- events -> answer


class Answer:
    """Writes one message, whole or as a stream of events."""

    def __init__(self, model: ModelInfo, said: dict[str, str]) -> None:
        self._model, self._note = model, said
        self._name = str(uuid.uuid4())

    async def whole(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
        """The message object, as the only chunk."""
        blocks: list[dict[str, Any]] = []
        finish = Finish("stop", Usage())
        async for event in events:
            if isinstance(event, Finish):
                finish = event
            if isinstance(event, Begin | Finish):
                continue
            start, delta = self._block(event)
            if isinstance(event, ToolCall):
                blocks.append({**start, "input": json.loads(event.arguments)})
                continue
            (key, text), = ((k, v) for k, v in delta.items() if k != "type")  # fmt: skip
            if not blocks or blocks[-1]["type"] != start["type"]:
                blocks.append({**start, "signature": self._name} if key == "thinking" else start)
            blocks[-1][key] += text
        if finish.reason == "insufficient_system_resource":
            raise ApiError("The server is shutting down.", 503)
        reason, sequence = _stop(finish)
        yield dumps(
            self._message(blocks, usage_body(finish.usage))
            | {"stop_reason": reason, "stop_sequence": sequence}
        )

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
        """Events from message_start to message_stop; one open block at a time."""
        index, opened = -1, ""
        begun = False
        finish = Finish("stop", Usage())

        def close() -> str:
            text = ""
            if opened == "thinking":
                text = self._delta(index, {"type": "signature_delta", "signature": self._name})
            stop = {"type": "content_block_stop", "index": index}
            return text + sse(stop, "content_block_stop")

        async for event in events:
            if not begun:
                begun = True
                usage = usage_body(_prompt_usage(event))
                start = {"type": "message_start", "message": self._message([], usage)}
                yield sse(start, "message_start")
            if isinstance(event, Finish):
                finish = event
            if isinstance(event, Begin | Finish):
                continue
            block, delta = self._block(event)
            if block["type"] != opened or isinstance(event, ToolCall):
                if opened:
                    yield close()
                index, opened = index + 1, block["type"]
                yield sse(
                    {"type": "content_block_start", "index": index, "content_block": block},
                    "content_block_start",
                )
            yield self._delta(index, delta)
        if opened:
            yield close()
        if finish.reason == "insufficient_system_resource":
            raise ApiError("The server is shutting down.", 503)
        reason, sequence = _stop(finish)
        end = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": usage_body(finish.usage),
        }
        yield sse(end, "message_delta") + sse({"type": "message_stop"}, "message_stop")

    def _message(self, blocks: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._name,
            "type": "message",
            "role": "assistant",
            "model": self._model.id,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
            **self._note,
        }

    @staticmethod
    def _block(event: Event) -> tuple[dict[str, Any], dict[str, Any]]:
        """An event as the block it opens and the delta it brings."""
        if isinstance(event, ReasoningDelta):
            thought = {"type": "thinking", "thinking": "", "signature": ""}
            return thought, {"type": "thinking_delta", "thinking": event.text}
        if isinstance(event, ContentDelta):
            return {"type": "text", "text": ""}, {"type": "text_delta", "text": event.text}
        assert isinstance(event, ToolCall)
        block: dict[str, Any] = {
            "type": "tool_use", "id": event.id, "name": event.name, "input": {}
        }  # fmt: skip
        return block, {"type": "input_json_delta", "partial_json": event.arguments}

    @staticmethod
    def _delta(index: int, delta: dict[str, Any]) -> str:
        return sse(
            {"type": "content_block_delta", "index": index, "delta": delta}, "content_block_delta"
        )


def _prompt_usage(event: Event) -> Usage:
    if isinstance(event, Begin):
        return Usage(event.prompt_tokens, 0, event.cached_tokens)
    if isinstance(event, Finish):
        return Usage(event.usage.prompt_tokens, 0, event.usage.cached_tokens)
    return Usage()


def _stop(finish: Finish) -> tuple[str, str | None]:
    if finish.stop_string is not None:
        return "stop_sequence", finish.stop_string
    reasons = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
    return reasons[finish.reason], None


def usage_body(usage: Usage) -> dict[str, Any]:
    """This API's counts are disjoint: what came from the cache is not in ``input_tokens``."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        **({"prompt_cache_details": whence} if (whence := usage.whence()) else {}),
    }
