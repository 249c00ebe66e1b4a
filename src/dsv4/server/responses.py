"""The Responses API, as Codex and the OpenAI clients speak it; nothing is stored.

Items become messages and events become items. What a client may send and this server has no use
for (stored conversations, hosted tools, encrypted reasoning) is taken and ignored, never refused.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from .backend import (
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
from .surface import BASES, AskedChat, Choice, Effort, Schema, effort, live, namespace, note, schema
from .wire import ApiError, Loose, deserialize, dumps, read_json, sse, waiting

LOGPROBS = "message.output_text.logprobs"  # in ``include``
PATCH = "apply_patch"  # the one tool whose input is free text
_PATCH_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The entire patch."}},
    "required": ["input"],
}
_COMPACT = (
    "Summarise this conversation so that the work can go on from the summary alone: the task, "
    "decisions, state of the files, what was tried, what comes next. Write nothing else."
)


class Reasoning(Loose):
    effort: Effort | None = None


class TextFormat(Schema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Loose):
    format: TextFormat | None = None


class ResponsesRequest(AskedChat):
    """The body of POST /responses."""

    input: str | list[Any] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: Any = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    user: str | None = None

    @property
    def logprobs(self) -> int | None:
        """How many alternatives to report beside each token of the answer; None: no logprobs."""
        asked = isinstance(self.include, list) and LOGPROBS in self.include
        return 0 if asked and self.top_logprobs is None else self.top_logprobs


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter()

    async def responses(request: Request) -> Response:
        asked = deserialize(ResponsesRequest, await read_json(request))
        route = service.models.route(asked.model)
        wants = _read(asked)
        order = to_backend(asked, wants, route, official_sampling=service.official_sampling)
        events = await route.backend.chat(order)
        said = note(route.backend.model, order.effort)
        answer = Answer(route.backend.model, asked, wants, said)
        return live(
            service,
            answer.stream(events) if asked.stream else answer.whole(events),
            events,
            stream=asked.stream,
            idle=lambda: waiting(events.prefilled),
            failure=answer.failure,
            said=said,
        )

    for base in BASES:
        routes.post(f"{base}/responses")(responses)
    return routes


# ---------------------------------------------------------------------- body -> backend


@dataclass(frozen=True)
class _Wants:
    """The body's items, read: messages, tools, and where the tools' names come from."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    origin: dict[str, tuple[str, str]]  # flat name -> (namespace, name)
    custom: set[str]
    compacts: bool


def to_backend(
    request: ResponsesRequest, wants: _Wants, route: Route, *, official_sampling: bool = False
) -> ChatRequest:
    """What the backend is asked to do. Raises ApiError or RequestError for values out of range."""
    asked = effort(None, request.reasoning.effort if request.reasoning else None, route)
    choice, name = _choice(request.tool_choice, wants)
    wanted = (request.text.format if request.text else None) or TextFormat()
    return ChatRequest(
        messages=wants.messages,
        effort=asked,
        sampling=request.sampled(
            request.max_output_tokens,
            logprobs=request.logprobs,
            ignored=official_sampling and asked != "none",
        ),
        tools=[] if wants.compacts else wants.tools,
        tool_choice=choice,
        tool_name=name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        schema=schema(wanted.type, wanted, "text.format"),
        max_thinking_tokens=request.budget,
        namespace=namespace(request.user),
    )


def _choice(choice: str | dict[str, Any] | None, wants: _Wants) -> tuple[Choice, str | None]:
    if not wants.tools or wants.compacts or choice == "none":
        return "none", None
    if choice == "required":
        return "required", None
    if isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        return "required", str(choice.get("name"))
    return "auto", None


def _read(request: ResponsesRequest) -> _Wants:
    items = request.input
    if items is None and not request.instructions:
        raise ApiError("One of input or instructions must be given")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    items = [i for i in items or [] if isinstance(i, dict)]
    declared = list(request.tools or [])
    for item in items:
        if item.get("type") == "additional_tools" and isinstance(item.get("tools"), list):
            declared += [t for t in item["tools"] if isinstance(t, dict)]
    origin: dict[str, tuple[str, str]] = {}
    custom: set[str] = set()
    tools = list(_tools(declared, origin, custom))
    messages = list(_messages(request.instructions, items, {v: k for k, v in origin.items()}))
    compacts = any(i.get("type") == "compaction_trigger" for i in items)
    if compacts:
        messages.append({"role": "user", "content": _COMPACT})
    return _Wants(messages, tools, origin, custom, compacts)


def _tools(
    declared: Iterable[dict[str, Any]], origin: dict[str, tuple[str, str]], custom: set[str]
) -> Iterable[dict[str, Any]]:
    """In the chat shape. Groups are flattened; tools that only OpenAI can run are left out."""
    for tool in declared:
        kind, name = tool.get("type"), str(tool.get("name") or "")
        if kind == "function" and name:
            yield _function(tool, name)
        elif kind == "custom" and name == PATCH:
            custom.add(name)
            about = str(tool.get("description") or "Apply a patch to files.")
            grammar = tool.get("format")
            if isinstance(grammar, dict) and grammar.get("definition"):
                about += f"\n\nThe input has this grammar:\n{grammar['definition']}"
            yield _function({"description": about, "parameters": _PATCH_SCHEMA}, name)
        elif kind == "namespace" and isinstance(tool.get("tools"), list):
            for inner in tool["tools"]:
                if isinstance(inner, dict) and inner.get("type") == "function" and name:
                    flat = f"{name}__{inner.get('name')}"
                    origin[flat] = (name, str(inner.get("name")))
                    yield _function(inner, flat)


def _function(tool: dict[str, Any], name: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if tool.get("description"):
        function["description"] = str(tool["description"])
    if isinstance(tool.get("parameters"), dict):
        function["parameters"] = tool["parameters"]
    if tool.get("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _messages(
    instructions: str | None, items: list[dict[str, Any]], flat: dict[tuple[str, str], str]
) -> Iterable[dict[str, Any]]:
    """In the chat shape; the items of one assistant turn become one message.

    A thought that led to nothing is left out.
    """
    if instructions:
        yield {"role": "system", "content": instructions}
    turn: dict[str, Any] | None = None
    for item in items:
        kind = item.get("type", "message")
        mine = _assistant_part(item, kind, flat)
        if mine is None:
            said = _other(item, kind)
            if said is None:
                continue
            if turn is not None and _says_something(turn):
                yield turn
            turn = None
            yield said
        else:
            if turn is not None and turn.get("tool_calls") and not mine.get("tool_calls"):
                yield turn
                turn = None
            turn = _joined(turn, mine)
    if turn is not None and _says_something(turn):
        yield turn


def _says_something(turn: dict[str, Any]) -> bool:
    return bool(turn["content"] or turn.get("tool_calls"))


def _assistant_part(
    item: dict[str, Any], kind: str, flat: dict[tuple[str, str], str]
) -> dict[str, Any] | None:
    """What an item adds to an assistant's turn, None for an item that ends one."""
    if kind == "reasoning":
        content = item.get("content")
        texts = [str(c.get("text") or "") for c in content or () if isinstance(c, dict)]
        return {"reasoning_content": "".join(texts)}
    if kind == "function_call":
        name = str(item.get("name"))
        name = flat.get((str(item.get("namespace")), name), name)
        arguments = item.get("arguments")
        return {"tool_calls": [_call(item, name, arguments if arguments else "{}")]}
    if kind == "custom_tool_call":
        text = json.dumps({"input": str(item.get("input") or "")}, ensure_ascii=False)
        return {"tool_calls": [_call(item, str(item.get("name")), text)]}
    if kind == "message" and item.get("role") == "assistant":
        return {"content": _text(item.get("content"))}
    return None


def _other(item: dict[str, Any], kind: str) -> dict[str, Any] | None:
    if kind == "message":
        return {"role": str(item.get("role") or "user"), "content": _text(item.get("content"))}
    if kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output")
        return {
            "role": "tool",
            "tool_call_id": item.get("call_id"),
            "content": output if isinstance(output, str) else _text(output),
        }
    if kind == "compaction":
        return {"role": "user", "content": _unpacked(str(item.get("encrypted_content") or ""))}
    return None  # web searches, item references and whatever comes next


def _joined(turn: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    turn = turn or {"role": "assistant", "content": ""}
    for key in ("content", "reasoning_content"):
        if key in part:
            turn[key] = "\n\n".join(t for t in (turn.get(key), part[key]) if t)
    if "tool_calls" in part:
        turn["tool_calls"] = [*turn.get("tool_calls", []), *part["tool_calls"]]
    return turn


def _call(item: dict[str, Any], name: str, arguments: Any) -> dict[str, Any]:
    call_id = item.get("call_id") or item.get("id")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(content: Any) -> str:
    if not isinstance(content, list):
        return "" if content is None else str(content)
    texts = []
    for part in content:
        if isinstance(part, dict):
            known = part.get("text", part.get("refusal"))
            kind = str(part.get("type"))
            texts.append(str(known) if known is not None else f"[Unsupported {kind}]")
        else:
            texts.append(str(part))
    return "\n\n".join(texts)


# A compaction is handed to the client and comes back as it was; it holds its text, packed.
def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpacked(data: str) -> str:
    try:
        engine = zlib.decompressobj()
        text = engine.decompress(base64.b64decode(data, validate=True), 1 << 22).decode()
    except (ValueError, zlib.error):
        return "[An earlier part of the conversation, summarised elsewhere, cannot be read.]"
    return f"Summary of the conversation so far:\n\n{text}"


# ---------------------------------------------------------------------- events -> answer


class Answer:
    """Writes one response, whole or as a stream of events."""

    def __init__(
        self, model: ModelInfo, request: ResponsesRequest, wants: _Wants, said: dict[str, str]
    ) -> None:
        self._wants = wants
        self._number = -1
        self._output: list[dict[str, Any]] = []
        thinks = request.reasoning.effort if request.reasoning else None
        text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
        self._object: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": model.id,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": thinks, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
            "metadata": {},
            "system_fingerprint": model.fingerprint,
            **said,
        }

    async def whole(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
        """The response object, as the only chunk."""
        async for _ in self._steps(events):
            pass
        yield dumps(self._object)

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
        """Events from response.created to response.completed, incomplete or failed."""
        yield self._event("response.created", response=self._object)
        yield self._event("response.in_progress", response=self._object)
        async for kind, data in self._steps(events):
            yield self._event(kind, **data)
        yield self._event(f"response.{self._object['status']}", response=self._object)

    def failure(self, error: ApiError) -> str:
        code = "rate_limit_exceeded" if error.status == 429 else error.code
        if "maximum context length" in str(error):
            code = "context_length_exceeded"
        told = {"code": code, "message": str(error)}
        failed = {**self._object, "status": "failed", "error": told, "output": self._output}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **data: Any) -> str:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number, **data}, kind)

    async def _steps(
        self, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Names and data of all events between in_progress and the last; fills the object."""
        item: dict[str, Any] | None = None
        finish = Finish("stop", Usage())
        summary: list[str] = []
        async for event in events:
            if isinstance(event, Finish):
                finish = event
            elif self._wants.compacts and not isinstance(event, ReasoningDelta):
                summary += [event.text] if isinstance(event, ContentDelta) else []
            elif isinstance(event, ReasoningDelta | ContentDelta):
                kind = "reasoning" if isinstance(event, ReasoningDelta) else "message"
                if item is None or item["type"] != kind:
                    for step in self._closed(item):
                        yield step
                    item = self._opened(kind)
                    for step in self._opening(item):
                        yield step
                part = item["content"][0]
                part["text"] += event.text
                name = "reasoning_text" if kind == "reasoning" else "output_text"
                place = {"item_id": item["id"], **self._place, "content_index": 0}
                if kind == "message":
                    place["logprobs"] = [s.body() for s in event.logprobs]
                    part["logprobs"] += place["logprobs"]
                yield f"response.{name}.delta", {**place, "delta": event.text}
            elif isinstance(event, ToolCall):
                for step in self._closed(item):
                    yield step
                item = None
                for step in self._called(event):
                    yield step
        for step in self._closed(item, whole=finish.reason != "length"):
            yield step
        if self._wants.compacts:
            packed = _packed("".join(summary))
            done = {"id": _id("cmp"), "type": "compaction", "encrypted_content": packed}
            self._output.append(done)
            yield "response.output_item.added", {**self._place, "item": done}
            yield "response.output_item.done", {**self._place, "item": done}
        self._finish(finish)

    @property
    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._output) - 1}

    def _opened(self, kind: str) -> dict[str, Any]:
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item: dict[str, Any] = {
                "id": _id("rs"), "type": "reasoning", "summary": [], "content": [part],
                "encrypted_content": None, "status": "in_progress",
            }  # fmt: skip
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {
                "id": _id("msg"), "type": "message", "role": "assistant", "content": [part],
                "status": "in_progress",
            }  # fmt: skip
        self._output.append(item)
        return item

    def _opening(self, item: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
        yield "response.output_item.added", {**self._place, "item": {**item, "content": []}}
        place = {"item_id": item["id"], **self._place, "content_index": 0}
        yield "response.content_part.added", {**place, "part": item["content"][0]}

    def _closed(
        self, item: dict[str, Any] | None, whole: bool = True
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        if item is None:
            return
        item["status"] = "completed" if whole else "incomplete"
        part = item["content"][0]
        place = {"item_id": item["id"], **self._place, "content_index": 0}
        if item["type"] == "reasoning":
            yield "response.reasoning_text.done", {**place, "text": part["text"]}
        else:
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            yield "response.output_text.done", {**place, **said}
        yield "response.content_part.done", {**place, "part": part}
        yield "response.output_item.done", {**self._place, "item": item}

    def _called(self, call: ToolCall) -> Iterable[tuple[str, dict[str, Any]]]:
        space, name = self._wants.origin.get(call.name, ("", call.name))
        custom = call.name in self._wants.custom
        item: dict[str, Any] = {
            "id": _id("ctc" if custom else "fc"),
            "type": "custom_tool_call" if custom else "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": name,
        }
        if space:
            item["namespace"] = space
        key, kind = ("input", "custom_tool_call_input") if custom else (
            "arguments", "function_call_arguments",
        )  # fmt: skip
        text = call.arguments
        if custom:
            text = str(json.loads(text).get("input", ""))
        item[key] = text
        self._output.append(item)
        begun = {**item, key: "", "status": "in_progress"}
        yield "response.output_item.added", {**self._place, "item": begun}
        place = {"item_id": item["id"], **self._place}
        yield f"response.{kind}.delta", {**place, "delta": text}
        yield f"response.{kind}.done", {**place, key: text, "name": name}
        yield "response.output_item.done", {**self._place, "item": item}

    def _finish(self, finish: Finish) -> None:
        usage = finish.usage
        self._object["output"] = self._output
        self._object["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            **({"prompt_cache_details": whence} if (whence := usage.whence()) else {}),
        }
        self._object["status"] = "completed"
        if finish.reason == "length":
            self._object["status"] = "incomplete"
            self._object["incomplete_details"] = {"reason": "max_output_tokens"}
        elif finish.reason == "insufficient_system_resource":
            self._object["status"] = "failed"
            self._object["error"] = {
                "code": "server_error", "message": "The server is shutting down."
            }  # fmt: skip


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
