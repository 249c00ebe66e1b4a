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
from pydantic import Field
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
from .models import Route, Service, notes
from .openai import namespace, sampled, stops, thinking_budget
from .wire import ApiError, Closing, LiveResponse, Loose, deserialize, dumps, read_json, sse

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
    content: str | list[dict[str, Any]]


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


class Thinking(Loose):
    type: Literal["enabled", "adaptive", "disabled"] = "enabled"


class OutputFormat(Loose):
    type: str
    # not called ``schema``: pydantic has a method of that name
    wanted: dict[str, Any] | None = Field(None, alias="schema")


class OutputConfig(Loose):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = (
        None
    )
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


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: int
    max_thinking_tokens: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
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

    @routes.post("/v1/messages")
    @routes.post("/anthropic/v1/messages")
    @routes.post("/anthropic/messages")
    async def messages(request: Request) -> Response:
        asked = deserialize(MessagesRequest, await read_json(request))
        route = service.models.route(asked.model)
        order = to_backend(asked, route, official_sampling=service.official_sampling)
        events = await route.backend.chat(order)
        headers = notes(route.backend.model, order.effort)
        answer = Answer(route.backend.model)
        if asked.stream:
            return LiveResponse(
                Closing(answer.stream(events), events.aclose),
                media_type="text/event-stream",
                idle=sse({"type": "ping"}, "ping"),
                failure=lambda error: sse(envelope(error), "error"),
                interval=service.keep_alive,
                envelope=envelope,
                headers=headers,
            )
        return LiveResponse(
            Closing(answer.whole(events), events.aclose),
            media_type="application/json",
            idle="\n",
            failure=lambda error: dumps(envelope(error)),
            interval=service.keep_alive,
            envelope=envelope,
            headers=headers,
        )

    @routes.post("/v1/messages/count_tokens")
    @routes.post("/anthropic/v1/messages/count_tokens")
    @routes.post("/anthropic/messages/count_tokens")
    async def count_tokens(request: Request) -> dict[str, int]:
        asked = deserialize(CountRequest, await read_json(request))
        route = service.models.route(asked.model)
        order = _order(asked, route)
        return {"input_tokens": await route.backend.count_tokens(order)}

    return routes


# ---------------------------------------------------------------------- body -> backend


def to_backend(
    request: MessagesRequest, route: Route, *, official_sampling: bool = False
) -> ChatRequest:
    """What the backend is asked to do. Raises ApiError or RequestError for values out of range."""
    return _order(
        request,
        route,
        sampling=sampled(
            request.max_tokens,
            request.temperature,
            request.top_p,
            ignored=official_sampling and _effort(request, route) != "none",
        ),
        stop=stops(request.stop_sequences),
        max_thinking_tokens=thinking_budget(request.max_thinking_tokens),
        namespace=namespace(request.metadata.user_id if request.metadata else None),
    )


def _order(request: CountRequest, route: Route, **more: Any) -> ChatRequest:
    if not request.messages:
        raise ApiError("Empty input messages")
    choice = request.tool_choice
    kinds: dict[str | None, Literal["none", "auto", "required"]] = {
        "none": "none", "auto": "auto", "any": "required", "tool": "required",
    }  # fmt: skip
    wanted = request.output_config.format if request.output_config else None
    schema = wanted.wanted if wanted and wanted.type == "json_schema" else None
    if wanted and wanted.type == "json_schema" and schema is None:
        raise ApiError("Invalid output_config.format: json_schema needs a schema")
    return ChatRequest(
        messages=list(_messages(request)),
        effort=_effort(request, route),
        tools=[_tool(t) for t in request.tools or [] if t.input_schema is not None],
        tool_choice=kinds[choice.type] if choice else "auto" if request.tools else "none",
        tool_name=choice.name if choice and choice.type == "tool" else None,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        schema=schema,
        **more,
    )


def _effort(request: CountRequest, route: Route) -> str:
    switch = request.thinking.type != "disabled" if request.thinking else None
    effort = request.output_config.effort if request.output_config else None
    if switch is None and effort is None:
        switch = route.thinks
    if switch is False or (effort == "none" and switch is None):
        return "none"
    return "high" if effort in (None, "none") else str(effort)


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
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
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

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
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
