"""The chat completions API as DeepSeek hosts it: what comes in, what goes out, word for word.

Where the hosted service refuses requests that agents send every day, this server is kinder: a
``developer`` message, missing ``reasoning_content``, an orphan tool result, a forced
``tool_choice`` while thinking or an unknown field are no errors. Ranges, broken JSON and context
overflow are, with the hosted texts, because clients match on them.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from .backend import (
    Answer,
    Backend,
    ChatRequest,
    ContentDelta,
    Event,
    FillRequest,
    Finish,
    ModelInfo,
    ReasoningDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)
from .models import Route, Service
from .surface import (
    BASES,
    Asked,
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
from .wire import (
    DONE,
    ApiError,
    Closing,
    Loose,
    deserialize,
    dumps,
    missing,
    read_json,
    sse,
    waiting,
)

MAX_TOOLS = 128
MAX_CHOICES = 32


class Message(Loose):
    role: Literal["system", "user", "assistant", "tool", "developer", "latest_reminder"]
    content: str | list[Any] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    prefix: bool | None = None


class Function(Loose):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Loose):
    """``function`` if that is its type; tools of other types are left out."""

    type: str
    function: Function | None = None


class NamedFunction(Loose):
    name: str


class NamedChoice(Loose):
    type: Literal["function"] = "function"
    function: NamedFunction


class TemplateKwargs(Loose):
    """How vLLM and SGLang spell the thinking switch."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class StreamOptions(Loose):
    include_usage: bool | None = None


class Counted(Loose):
    """What both bodies call the same: how many answers, how long, and how they come."""

    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None

    @property
    def answers(self) -> int:
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise ApiError(f"Invalid n value, the valid range of n is [1, {MAX_CHOICES}]")
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(AskedChat, Counted):
    """The body of POST /chat/completions."""

    messages: list[Message]
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    max_completion_tokens: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    user_id: str | None = None
    user: str | None = None

    def effort(self, route: Route) -> str:
        """The asked effort, "none" for no thinking. An explicit switch wins over all hints."""
        kwargs = self.chat_template_kwargs or TemplateKwargs()
        switch = kwargs.thinking if kwargs.thinking is not None else kwargs.enable_thinking
        if self.thinking is not None:
            switch = self.thinking.on
        return effort(switch, self.reasoning_effort or kwargs.reasoning_effort, route)


class CompletionRequest(Asked, Counted):
    """The body of POST /completions: fill in the middle, or plain continuation."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter()

    async def chat_completions(request: Request) -> Response:
        asked = deserialize(ChatCompletionRequest, await read_json(request))
        route = service.models.route(asked.model)
        order = to_backend(asked, route, official_sampling=service.official_sampling)
        events = await answers(route.backend, order, asked.answers)
        answer = ChatCompletion(route.backend.model, asked, order)
        return send(answer, events, asked.stream, note(route.backend.model, order.effort))

    async def completions(request: Request) -> Response:
        asked = deserialize(CompletionRequest, await read_json(request))
        route = service.models.route(asked.model)
        events = await answers(route.backend, fill_order(asked), asked.answers)
        return send(TextCompletion(route.backend.model, asked), events, asked.stream)

    def send(
        answer: ChatCompletion | TextCompletion,
        events: Answers,
        stream: bool | None,
        said: dict[str, str] | None = None,
    ) -> Response:
        return live(
            service,
            answer.stream(events) if stream else answer.whole(events),
            events,
            stream=stream,
            idle=lambda: waiting(events.prefilled),
            failure=lambda error: sse(error.body()),
            said=said,
        )

    async def models() -> dict[str, Any]:
        cards = service.models.cards()
        first, last = cards[0]["id"], cards[-1]["id"]
        return {
            "object": "list", "data": cards, "has_more": False, "first_id": first, "last_id": last
        }  # fmt: skip

    async def one_model(name: str) -> dict[str, Any]:
        for card in service.models.cards():
            if card["id"] == name:
                return card
        served = ", ".join(card["id"] for card in service.models.cards())
        raise ApiError(f"The model {name} is not served here; these are: {served}.", 404)

    for base in BASES:
        routes.post(f"{base}/chat/completions")(chat_completions)
        routes.post(f"{base}/completions")(completions)
    for base in (*BASES, "/anthropic", "/anthropic/v1"):
        routes.get(f"{base}/models")(models)
        routes.get(f"{base}/models/{{name:path}}")(one_model)
    return routes


# ---------------------------------------------------------------------- body -> backend


def to_backend(
    request: ChatCompletionRequest, route: Route, *, official_sampling: bool = False
) -> ChatRequest:
    """What the backend is asked to do. Raises ApiError or RequestError for values out of range.

    ``official_sampling`` ignores temperature and top_p in thinking mode, as the hosted API does.
    """
    if not request.messages:
        raise ApiError("Empty input messages")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            "Invalid top_logprobs and logprobs value, logprobs must be set to true if "
            "top_logprobs is used."
        )
    if request.tools and len(request.tools) > MAX_TOOLS:
        raise ApiError(f"Too many tools: at most {MAX_TOOLS}, got {len(request.tools)}")
    for i, tool in enumerate(request.tools or ()):
        if tool.type == "function" and tool.function is None:
            raise missing(f"tools[{i}]", "function")
    functions = [t for t in request.tools or () if t.type == "function"]
    asked = request.effort(route)
    choice = request.tool_choice or ("auto" if functions else "none")
    wanted = request.response_format or ResponseFormat(type="text")
    return ChatRequest(
        messages=[m.model_dump(exclude_unset=True) for m in request.messages],
        effort=asked,
        sampling=request.sampled(
            request.max_completion_tokens if request.max_tokens is None else request.max_tokens,
            request.seed,
            (request.top_logprobs or 0) if request.logprobs else None,
            ignored=official_sampling and asked != "none",
        ),
        tools=[t.model_dump(exclude_unset=True) for t in functions],
        tool_choice=choice if isinstance(choice, str) else "required",
        tool_name=choice.function.name if isinstance(choice, NamedChoice) else None,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        stop=stops(request.stop),
        schema=schema(wanted.type, wanted.json_schema, "response_format"),
        max_thinking_tokens=request.budget,
        namespace=namespace(request.user_id or request.user),
    )


def fill_order(request: CompletionRequest) -> FillRequest:
    """What the backend is asked to do. Raises ApiError or RequestError."""
    return FillRequest(
        request.text,
        request.suffix,
        request.sampled(request.max_tokens, request.seed, request.logprobs),
        stops(request.stop),
    )


# ---------------------------------------------------------------------- events -> answer

Numbered = tuple[int, Event]


class Answers(Closing[Numbered]):
    """The events of several answers to one prompt as they come, each with its number."""

    def __init__(self, begun: list[Answer], close: Callable[[], object]) -> None:
        super().__init__(_merged([*begun]), close)
        self._begun = begun

    @property
    def prefilled(self) -> tuple[int, int] | None:
        """Of the first; see ``Answer``."""
        return self._begun[0].prefilled


async def answers(backend: Backend, order: ChatRequest | FillRequest, n: int) -> Answers:
    """``n`` answers to one order at once, each event with its answer's number.

    With a seed the answers still differ: each has the next one. Raises what ``chat`` raises.
    """
    begun: list[Answer] = []
    try:
        for i in range(n):
            seed = order.sampling.seed
            params = replace(order.sampling, seed=None if seed is None else seed + i)
            begun.append(await backend.chat(replace(order, sampling=params)))
    except BaseException:
        for events in begun:
            await events.aclose()
        raise

    async def close() -> None:
        for events in begun:
            await events.aclose()

    return Answers(begun, close)


async def _merged(sources: list[AsyncGenerator[Event, None]]) -> AsyncGenerator[Numbered, None]:
    if len(sources) == 1:
        async with aclosing(sources[0]) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(maxsize=16)

    async def pump(number: int, source: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(source) as events:
                async for event in events:
                    await queue.put((number, event))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    async with AsyncExitStack() as stack:
        for task in [asyncio.create_task(pump(i, s)) for i, s in enumerate(sources)]:
            stack.push_async_callback(_cancelled, task)
        open_ones = len(sources)
        while open_ones:
            number, item = await queue.get()
            if item is None:
                open_ones -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def total(usages: Sequence[Usage]) -> Usage:
    """Of several answers to one prompt, which is counted once: as the first of them found it."""
    return replace(
        usages[0],
        completion_tokens=sum(u.completion_tokens for u in usages),
        reasoning_tokens=sum(u.reasoning_tokens for u in usages),
    )


class _Message:
    """One choice of a whole answer, while it comes."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.scores: dict[str, list[TokenLogprob]] = {"content": [], "reasoning_content": []}
        self.finish = Finish("stop", Usage())

    def take(self, event: Event) -> None:
        if isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
            self.scores["reasoning_content"] += event.logprobs
        elif isinstance(event, ContentDelta):
            self.content.append(event.text)
            self.scores["content"] += event.logprobs
        elif isinstance(event, ToolCall):
            self.calls.append(_call(event, event.arguments) | {"index": event.index})
        elif isinstance(event, Finish):
            self.finish = event


class ChatCompletion:
    """Writes the answer, whole or in chunks; both have the same id, time and model."""

    def __init__(
        self, model: ModelInfo, request: ChatCompletionRequest, order: ChatRequest
    ) -> None:
        self._thinking = order.effort != "none"
        self._logprobs = bool(request.logprobs)
        self._n = request.answers
        self._include_usage = request.includes_usage
        self._head = _head(model)
        self._note = note(model, order.effort)

    async def whole(self, events: AsyncIterator[Numbered]) -> AsyncGenerator[str, None]:
        """The ``chat.completion`` object, as the only chunk."""
        messages = [_Message() for _ in range(self._n)]
        async for number, event in events:
            messages[number].take(event)
        choices = [self._choice(i, m) for i, m in enumerate(messages)]
        usage = usage_body(total([m.finish.usage for m in messages]))
        whole = {"object": "chat.completion", "choices": choices, "usage": usage}
        yield dumps(self._head | whole | self._note)

    def _choice(self, index: int, said: _Message) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(said.content)}
        if self._thinking:
            message["reasoning_content"] = "".join(said.reasoning)
        if said.calls:
            message["tool_calls"] = said.calls
        scores = {k: [s.body() for s in v] for k, v in said.scores.items()}
        return {
            "index": index,
            "message": message,
            "logprobs": scores if self._logprobs else None,
            "finish_reason": said.finish.reason,
        }

    async def stream(self, events: AsyncIterator[Numbered]) -> AsyncGenerator[str, None]:
        """Server-sent events of ``chat.completion.chunk`` objects, then ``[DONE]``.

        Usage comes once, on the last chunk that has a finish reason. With
        ``stream_options.include_usage`` every other chunk says ``"usage": null``.
        """
        first: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._thinking:
            first |= {"content": None, "reasoning_content": ""}
        opened: set[int] = set()
        usages: dict[int, Usage] = {}
        async for number, event in events:
            if number not in opened:
                opened.add(number)
                yield self._chunk(number, first)
            if isinstance(event, ReasoningDelta):
                delta = {"content": None, "reasoning_content": event.text}
                yield self._chunk(number, delta, "reasoning_content", event.logprobs)
            elif isinstance(event, ContentDelta):
                delta = {"content": event.text}
                if self._thinking:
                    delta["reasoning_content"] = None
                yield self._chunk(number, delta, "content", event.logprobs)
            elif isinstance(event, ToolCall):
                start = _call(event, "") | {"index": event.index}
                rest = {"index": event.index, "function": {"arguments": event.arguments}}
                yield self._chunk(number, {"tool_calls": [start]})
                yield self._chunk(number, {"tool_calls": [rest]})
            elif isinstance(event, Finish):
                usages[number] = event.usage
                last = _last(usages) if len(usages) == self._n else None
                yield self._chunk(number, {}, finish=event.reason, usage=last)
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        scored: str = "",
        scores: tuple[TokenLogprob, ...] = (),
        finish: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> str:
        logprobs = {scored: [s.body() for s in scores]} if scores else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        if usage is not None or self._include_usage:
            chunk["usage"] = usage
        return sse(chunk if usage is None else chunk | self._note)


class TextCompletion:
    """Writes the answer to a fill-in-the-middle request."""

    def __init__(self, model: ModelInfo, request: CompletionRequest) -> None:
        self._scored = request.logprobs is not None
        self._n = request.answers
        self._echo = request.text if request.echo else ""
        self._include_usage = request.includes_usage
        self._head = _head(model) | {"object": "text_completion"}

    async def whole(self, events: AsyncIterator[Numbered]) -> AsyncGenerator[str, None]:
        """The ``text_completion`` object, as the only chunk."""
        said = [_Message() for _ in range(self._n)]
        async for number, event in events:
            said[number].take(event)
        choices = [
            self._choice(
                i, self._echo + "".join(m.content), m.scores["content"], len(self._echo),
                m.finish.reason,
            )
            for i, m in enumerate(said)
        ]  # fmt: skip
        usage = usage_body(total([m.finish.usage for m in said]))
        yield dumps(self._head | {"choices": choices, "usage": usage})

    async def stream(self, events: AsyncIterator[Numbered]) -> AsyncGenerator[str, None]:
        """Server-sent events of ``text_completion`` objects, then ``[DONE]``."""
        lengths = [0] * self._n
        usages: dict[int, Usage] = {}
        for number in range(self._n) if self._echo else ():
            lengths[number] = len(self._echo)
            yield self._chunk(self._choice(number, self._echo, (), 0, None))
        async for number, event in events:
            if isinstance(event, ContentDelta):
                choice = self._choice(number, event.text, event.logprobs, lengths[number], None)
                lengths[number] += len(event.text)
                yield self._chunk(choice)
            elif isinstance(event, Finish):
                usages[number] = event.usage
                last = _last(usages) if len(usages) == self._n else None
                yield self._chunk(self._choice(number, "", (), lengths[number], event.reason), last)
        yield DONE

    def _chunk(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> str:
        chunk = self._head | {"choices": [choice]}
        if usage is not None or self._include_usage:
            chunk["usage"] = usage
        return sse(chunk)

    def _choice(
        self,
        index: int,
        text: str,
        scores: Sequence[TokenLogprob],
        offset: int,
        finish: str | None,
    ) -> dict[str, Any]:
        logprobs = None
        if self._scored:
            offsets = [offset]
            for score in scores:
                offsets.append(offsets[-1] + len(score.text))
            logprobs = {
                "tokens": [s.text for s in scores],
                "token_logprobs": [s.logprob for s in scores],
                "top_logprobs": [{t.text: t.logprob for t in s.top} for s in scores],
                "text_offset": offsets[: len(scores)],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _head(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
    }


def _call(call: ToolCall, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _last(usages: Mapping[int, Usage]) -> dict[str, Any]:
    return usage_body(total([usages[number] for number in sorted(usages)]))


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        **({"prompt_cache_details": whence} if (whence := usage.whence()) else {}),
    }
