"""The chat completions API as DeepSeek hosts it: what comes in, what goes out, word for word.

Where the hosted service refuses requests that agents send every day, this server is kinder: a
``developer`` message, missing ``reasoning_content``, an orphan tool result, a forced
``tool_choice`` while thinking or an unknown field are no errors. Ranges, broken JSON and context
overflow are, with the hosted texts, because clients match on them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..engine import SamplingParams
from .backend import (
    ChatRequest,
    ContentDelta,
    Event,
    Finish,
    ModelInfo,
    ReasoningDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)
from .wire import ApiError, dumps

MAX_STOPS = 16
MAX_TOOLS = 128
DONE = "data: [DONE]\n\n"
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


class _Loose(BaseModel):
    """Unknown fields are tolerated, as the hosted service does."""

    model_config = ConfigDict(extra="allow")


class Message(_Loose):
    role: Literal["system", "user", "assistant", "tool", "developer", "latest_reminder"]
    content: str | list[Any] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    prefix: bool | None = None


class Function(_Loose):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.:-]{1,128}$")]


class Tool(_Loose):
    type: Literal["function"]
    function: Function


class NamedFunction(_Loose):
    name: str


class NamedChoice(_Loose):
    type: Literal["function"] = "function"
    function: NamedFunction


class Thinking(_Loose):
    type: Literal["enabled", "disabled", "adaptive"] = "enabled"


class TemplateKwargs(_Loose):
    """How vLLM and SGLang spell the thinking switch."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class ResponseFormat(_Loose):
    type: str


class StreamOptions(_Loose):
    include_usage: bool | None = None


class ChatCompletionRequest(_Loose):
    """The body of POST /chat/completions."""

    model: str = ""
    messages: list[Message]
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None

    @property
    def effort(self) -> str:
        """The asked effort, "none" for no thinking. An explicit switch wins over all hints."""
        kwargs = self.chat_template_kwargs or TemplateKwargs()
        effort = self.reasoning_effort or kwargs.reasoning_effort
        switch = kwargs.thinking if kwargs.thinking is not None else kwargs.enable_thinking
        if self.thinking is not None:
            switch = self.thinking.type != "disabled"
        if switch is None and effort is None and self.model == "deepseek-chat":
            switch = False  # the old name of the mode without thinking
        if switch is False or (effort == "none" and switch is None):
            return "none"
        return "high" if effort in (None, "none") else str(effort)


def parse(body: dict[str, Any]) -> ChatCompletionRequest:
    """Validate a body. Raises ApiError 400 with the hosted API's texts."""
    try:
        request = ChatCompletionRequest.model_validate(body)
    except ValidationError as error:
        raise ApiError(
            f"Failed to deserialize the JSON body into the target type: {_serde(error, body)}"
        ) from error
    if not request.messages:
        raise ApiError("Empty input messages")
    if request.n not in (None, 1):
        raise ApiError("Invalid n value (currently only n = 1 is supported)")
    if isinstance(request.stop, list) and len(request.stop) > MAX_STOPS:
        raise ApiError(f"Stop string array too long: {len(request.stop)}")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            "Invalid top_logprobs and logprobs value, logprobs must be set to true if "
            "top_logprobs is used."
        )
    if request.tools and len(request.tools) > MAX_TOOLS:
        raise ApiError(f"Too many tools: at most {MAX_TOOLS}, got {len(request.tools)}")
    kind = request.response_format.type if request.response_format else "text"
    if kind not in ("text", "json_object"):
        raise ApiError("This response_format type is unavailable now")
    return request


def to_backend(request: ChatCompletionRequest, *, official_sampling: bool = False) -> ChatRequest:
    """What the backend is asked to do. Raises RequestError for values out of range.

    ``official_sampling`` ignores temperature and top_p in thinking mode, as the hosted API does.
    """
    effort = request.effort
    asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    sampling = SamplingParams(
        max_tokens=asked,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    if official_sampling and effort != "none":
        sampling = SamplingParams(max_tokens=asked, seed=request.seed, logprobs=sampling.logprobs)
    choice = request.tool_choice or ("auto" if request.tools else "none")
    named = choice.function.name if isinstance(choice, NamedChoice) else None
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return ChatRequest(
        messages=[m.model_dump(exclude_unset=True) for m in request.messages],
        effort=effort,
        sampling=sampling,
        tools=[t.model_dump(exclude_unset=True) for t in request.tools or []],
        tool_choice=choice if isinstance(choice, str) else "required",
        tool_name=named,
        stop=tuple(s for s in stop if s),
    )


class Completion:
    """Writes one answer, whole or in chunks; both have the same id, time and model."""

    def __init__(self, model: ModelInfo, request: ChatCompletionRequest) -> None:
        self._thinking = request.effort != "none"
        self._logprobs = bool(request.logprobs)
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._head = {
            "id": str(uuid.uuid4()),
            "created": int(time.time()),
            "model": model.id,
            "system_fingerprint": model.fingerprint,
        }

    async def whole(self, events: AsyncIterator[Event]) -> AsyncGenerator[str, None]:
        """The ``chat.completion`` object, as the only chunk."""
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[dict[str, Any]] = []
        scores: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
        finish = Finish("stop", Usage())
        async for event in events:
            if isinstance(event, ReasoningDelta):
                reasoning.append(event.text)
                scores["reasoning_content"] += map(_logprob, event.logprobs)
            elif isinstance(event, ContentDelta):
                content.append(event.text)
                scores["content"] += map(_logprob, event.logprobs)
            elif isinstance(event, ToolCall):
                calls.append(_call(event, event.arguments) | {"index": event.index})
            else:
                finish = event
        message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
        if self._thinking:
            message["reasoning_content"] = "".join(reasoning)
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": scores if self._logprobs else None,
            "finish_reason": finish.reason,
        }
        answer = {"object": "chat.completion", "choices": [choice], "usage": _usage(finish.usage)}
        yield dumps(self._head | answer)

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncGenerator[str, None]:
        """Server-sent events of ``chat.completion.chunk`` objects, then ``[DONE]``.

        Usage comes once: on the chunk that has the finish reason, or, if the caller set
        ``stream_options.include_usage``, on one of its own with no choices, as OpenAI does it.
        """
        first: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._thinking:
            first |= {"content": None, "reasoning_content": ""}
        opened = False
        async for event in events:
            if not opened:
                opened = True
                yield self._chunk(first)
            if isinstance(event, ReasoningDelta):
                delta = {"content": None, "reasoning_content": event.text}
                yield self._chunk(delta, "reasoning_content", event.logprobs)
            elif isinstance(event, ContentDelta):
                delta = {"content": event.text}
                if self._thinking:
                    delta["reasoning_content"] = None
                yield self._chunk(delta, "content", event.logprobs)
            elif isinstance(event, ToolCall):
                start = _call(event, "") | {"index": event.index}
                rest = {"index": event.index, "function": {"arguments": event.arguments}}
                yield self._chunk({"tool_calls": [start]})
                yield self._chunk({"tool_calls": [rest]})
            else:
                usage = _usage(event.usage)
                if not self._include_usage:
                    yield self._chunk({}, finish=event.reason, usage=usage)
                    continue
                yield self._chunk({}, finish=event.reason)
                yield _sse(self._head | {**_CHUNK, "choices": [], "usage": usage})
        yield DONE

    def _chunk(
        self,
        delta: dict[str, Any],
        scored: str = "",
        scores: tuple[TokenLogprob, ...] = (),
        finish: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> str:
        logprobs = {scored: [_logprob(s) for s in scores]} if scores else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._head | {**_CHUNK, "choices": [choice]}
        if usage is not None or self._include_usage:
            chunk["usage"] = usage
        return _sse(chunk)


_CHUNK: dict[str, Any] = {"object": "chat.completion.chunk"}


def sse_failure(error: ApiError) -> str:
    """An error after the stream began: one more event, then the end without ``[DONE]``."""
    return _sse(error.body())


def _sse(data: dict[str, Any]) -> str:
    return f"data: {dumps(data)}\n\n"


def _call(call: ToolCall, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    def one(text: str, raw: bytes, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(raw)}

    top = [one(t.text, t.raw, t.logprob) for t in entry.top]
    return one(entry.text, entry.raw, entry.logprob) | {"top_logprobs": top}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _serde(error: ValidationError, body: dict[str, Any]) -> str:
    """The first problem in the words of the hosted API's deserialiser."""
    problem = error.errors()[0]
    where = ""
    value: Any = body
    for part in problem["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        elif isinstance(value, dict) and (part in value or problem["type"] == "missing"):
            where += f".{part}" if where else part
        else:
            break  # the name of a union's branch, not of a field
        value = value.get(part) if isinstance(value, dict) else value[part]
    expected = str(problem.get("ctx", {}).get("expected", ""))
    if problem["type"] == "missing":
        parent, _, name = where.rpartition(".")
        return f"{parent + ': ' if parent else ''}missing field `{name}`"
    if problem["type"] == "literal_error" and isinstance(value, str):
        options = expected.replace(" or ", ", ").replace("'", "`")
        return f"{where}: unknown variant `{value}`, expected one of {options}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
