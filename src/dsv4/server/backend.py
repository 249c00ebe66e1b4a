"""The seam between the APIs and whatever answers: a request goes in, events come out.

``LocalBackend`` answers with a model in this process: it renders the prompt, runs the engine,
decodes and parses what comes. It is the only place of the server that knows both text and tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .. import encoding
from ..engine import Engine, Generation, SamplingParams, Token
from ..engine.sample import MAX_OUTPUT
from ..errors import ConfigError, EncodingError, RequestError

if TYPE_CHECKING:
    from ..api import Model
    from ..tokenizer import StreamingDecoder, Tokenizer

FinishReason = Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


@dataclass(frozen=True)
class ModelInfo:
    """What the served model is. ``id`` is its own name, whatever name a request used."""

    id: str
    description: str
    context_length: int
    max_output_tokens: int
    created: int
    fingerprint: str


@dataclass(frozen=True)
class ChatRequest:
    """One chat turn to answer; messages and tools in the OpenAI shape.

    ``effort``     "none" (no thinking), "minimal" ... "max"; the backend maps it to its weights
    ``tool_name``  with ``tool_choice`` "required": the tool that must be called, None = any
    ``stop``       the answer ends before any of these strings; reasoning is not searched
    """

    messages: list[dict[str, Any]]
    effort: str = "high"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] = "auto"
    tool_name: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens; ``cached_tokens`` are part of the prompt's, ``reasoning_tokens`` of the answer's."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text and as bytes (half a character has bytes only), and its logprob."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ReasoningDelta:
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ContentDelta:
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A complete call; ``arguments`` is the JSON text of an object."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Finish:
    """The last event."""

    reason: FinishReason
    usage: Usage
    stop_string: str | None = None


Event = ReasoningDelta | ContentDelta | ToolCall | Finish


class Backend(Protocol):
    """Answers chat requests."""

    @property
    def model(self) -> ModelInfo: ...

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Begin an answer. What can be refused is refused here (RequestError,
        EngineBusyError, EngineClosedError).

        The events end with one ``Finish``, or with an exception. Closing the generator stops the
        work behind it.
        """
        ...

    def load(self) -> dict[str, Any]:
        """How busy the backend is, for /health."""
        ...

    def close(self) -> None:
        """Stop; unfinished answers finish with "insufficient_system_resource"."""
        ...


# What an asked effort means to the April 2026 weights (the table belongs to the weights).
_EFFORTS = {"none": "off", "xhigh": "max", "max": "max", "ultra": "max"}


class LocalBackend:
    """Answers with a model in this process. ``engine_options`` are those of ``Engine``.

    Raises ConfigError for a model without a tokenizer, which cannot read messages.
    """

    def __init__(self, model: Model, **engine_options: Any) -> None:
        if model.tokenizer is None:
            raise ConfigError(
                f"{model.name} has no tokenizer, so it cannot be served",
                expected="tokenizer.json in the model's folder",
                got="no such file",
                hint="copy the official tokenizer.json there",
            )
        self._tokenizer = model.tokenizer
        self._engine = Engine(model, **engine_options)
        self.model = describe(model, self._engine.context_length)

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        # a long prompt takes a while to tokenize, so not on the event loop
        answer = await asyncio.to_thread(_Answer, request, self._tokenizer)
        answer.generation = self._engine.submit(answer.prompt, request.sampling)
        return answer.events()

    def load(self) -> dict[str, Any]:
        stats = self._engine.stats()
        return {
            "requests_running": stats.running,
            "requests_waiting": stats.waiting,
            "sessions_kept": stats.pooled,
            "sessions_kept_bytes": stats.pooled_bytes,
        }

    def close(self) -> None:
        self._engine.close()


class _Answer:
    """One request on its way: its prompt, and the events that its tokens become."""

    generation: Generation

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stops = StopStrings(request.stop)
        tools = request.tools if request.tool_choice != "none" else []
        messages = encoding.normalize_messages(request.messages, tools)
        tools = messages[0].get("tools", [])
        lead = _forced_call(request, tools)
        # A forced call cannot be forced into the middle of reasoning, so there is none then.
        level = "off" if lead else _EFFORTS.get(request.effort, "high")
        mode, effort = encoding.EFFORTS[level]
        segments = encoding.encode_segments(
            messages,
            mode,
            # as the hosted service: reasoning that led to a tool call stays in view
            drop_thinking=not any(m.get("tool_calls") for m in messages),
            reasoning_effort=effort,
        )
        self.prompt = tokenizer.encode_segments([*segments, (lead, True)])
        inside = encoding.generation_mode("".join(text for text, _ in segments))
        self._reasons = inside == "thinking"
        self._parser = encoding.StreamingParser(inside, tools)
        self._parser.feed(lead)
        self._special = frozenset(tokenizer.special_ids.values())
        self._calls = 0
        self._scores: list[TokenLogprob] = []
        self._completion_tokens = self._reasoning_tokens = 0

    async def events(self) -> AsyncGenerator[Event, None]:
        decoder = self._tokenizer.stream()
        end_of_thinking = self._tokenizer.special_id(encoding.END_THINK)
        generation = self.generation
        try:
            async for token in generation:
                self._completion_tokens += 1
                self._reasoning_tokens += self._reasons
                self._reasons &= token.id != end_of_thinking
                self._score(token)
                for event in self._shown(self._parser.feed(self._text(decoder, token.id))):
                    yield event
                if self._stops.found is not None:
                    yield self._finish("stop")
                    return
            ended = generation.finish_reason
            self._completion_tokens = generation.usage.completion_tokens
            rest = self._parser.feed(decoder.flush())
            completion = self._parser.finish("stop" if ended == "stop" else "length")
            for event in self._shown([*rest, *completion.events], last=True):
                yield event
            if self._stops.found is not None or ended == "stop":
                yield self._finish("tool_calls" if self._calls else "stop")
            else:
                yield self._finish(
                    "length" if ended == "length" else "insufficient_system_resource"
                )
        finally:
            generation.cancel()

    def _shown(self, events: Sequence[encoding.Event], last: bool = False) -> list[Event]:
        """The parser's events as the caller sees them: up to a stop string, with logprobs."""
        out: list[Event] = []
        for event in events:
            if self._stops.found is not None:
                break
            if isinstance(event, encoding.ReasoningDelta):
                out.append(ReasoningDelta(event.text, self._take_scores()))
                continue
            self._reasons = False
            if isinstance(event, encoding.ContentDelta):
                self._answer(out, self._stops.push(event.text))
            else:
                self._answer(out, self._stops.flush())
                self._scores.clear()  # of the call's markup
                self._calls += 1
                out.append(ToolCall(event.index, event.id, event.name, event.arguments))
        if last and self._stops.found is None:
            self._answer(out, self._stops.flush())
        return out

    def _answer(self, out: list[Event], text: str) -> None:
        if text:
            out.append(ContentDelta(text, self._take_scores()))

    def _finish(self, reason: FinishReason) -> Finish:
        usage = self.generation.usage
        return Finish(
            reason,
            Usage(
                usage.prompt_tokens,
                self._completion_tokens,
                usage.cached_tokens,
                self._reasoning_tokens,
            ),
            self._stops.found,
        )

    def _score(self, token: Token) -> None:
        """Keep the token's logprob for the text it becomes; a special token becomes none."""
        if token.logprob is None or token.id in self._special:
            return
        scored = [(token.id, token.logprob.logprob), *token.logprob.top]
        this, *top = [self._named(i, value) for i, value in scored]
        self._scores.append(replace(this, top=tuple(top)))

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        try:
            raw = self._tokenizer.token_bytes(token_id)
        except EncodingError:
            raw = b""
        return TokenLogprob(raw.decode("utf-8", "replace"), raw, logprob)

    def _take_scores(self) -> tuple[TokenLogprob, ...]:
        scores, self._scores = tuple(self._scores), []
        return scores

    def _text(self, decoder: StreamingDecoder, token_id: int) -> str:
        try:
            return decoder.push(token_id)
        except EncodingError:  # a row of the embedding that no token uses
            return ""


def _forced_call(request: ChatRequest, tools: Sequence[dict[str, Any]]) -> str:
    """The beginning of a call that ``tool_choice`` demands, written in the model's place."""
    if request.tool_choice != "required" or not tools:
        return ""
    names = [str(tool["function"].get("name")) for tool in tools]
    if request.tool_name is not None and request.tool_name not in names:
        raise RequestError(
            "tool_choice names a function that is not in tools",
            expected=", ".join(names),
            got=request.tool_name,
        )
    name = request.tool_name or (names[0] if len(names) == 1 else None)
    start = f'\n\n<{encoding.DSML}tool_calls>\n<{encoding.DSML}invoke name="'
    return start if name is None else f'{start}{name}">\n'


class StopStrings:
    """Ends a text before the first of some strings, however the text is cut into pieces.

    Text that may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string; "" once one was found."""
        if self.found is not None:
            return ""
        self._held += text
        at = {s: self._held.find(s) for s in self._stops}
        hits = [(i, -len(s), s) for s, i in at.items() if i >= 0]
        if hits:
            end, _, self.found = min(hits)
            shown, self._held = self._held[:end], ""
            return shown
        longest = max((len(s) for s in self._stops), default=1) - 1
        keep = next(
            (
                n
                for n in range(min(longest, len(self._held)), 0, -1)
                if any(s.startswith(self._held[-n:]) for s in self._stops)
            ),
            0,
        )
        shown, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


class ScriptedBackend:
    """Plays back events, for tests of the HTTP layer. A number waits, an exception is raised."""

    def __init__(self, script: Sequence[Event | Exception | float]) -> None:
        self.model = ModelInfo("scripted", "a script, not a model", 1024, 1024, 0, "fp_scripted")
        self.closed_early = False
        self._script = script

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        return self._play()

    async def _play(self) -> AsyncGenerator[Event, None]:
        self.closed_early = True
        for step in self._script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, int | float):
                await asyncio.sleep(step)
            else:
                yield step
        self.closed_early = False

    def load(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def describe(model: Model, context_length: int) -> ModelInfo:
    """An honest card: a small model of the architecture is not one of the published models."""
    counts = model.config.parameter_counts()
    text = f"DeepSeek-V4 architecture, {_count(counts.total)} parameters"
    text += f" ({_count(counts.active)} active per token)."
    text += f" Numerics: {model.numerics}."
    if counts.total < 100e9:
        text += " A small model: not DeepSeek-V4-Flash and not DeepSeek-V4-Pro."
    identity = json.dumps([model.name, model.numerics, model.config.to_dict()], default=str)
    return ModelInfo(
        id=model.name,
        description=text,
        context_length=context_length,
        max_output_tokens=min(context_length, MAX_OUTPUT),
        created=int(time.time()),
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10],
    )


def _count(n: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
