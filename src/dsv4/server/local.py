"""The backend that answers with a model in this process.

It renders the prompt, runs the engine, decodes and parses what comes: the only place of the server
that knows both text and tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import encoding
from ..engine import Engine, Generation, Token
from ..engine.sample import MAX_OUTPUT
from ..engine.session import READING_CHUNK
from ..errors import ConfigError, ContextLengthError, EncodingError, RequestError
from .backend import (
    Answer,
    Begin,
    ChatRequest,
    ContentDelta,
    Event,
    FillRequest,
    Finish,
    FinishReason,
    ModelInfo,
    ReasoningDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)
from .efforts import efforts_of
from .guide import GuideMaker
from .replay import Replay, Turn, digest, read_arguments

if TYPE_CHECKING:
    from ..api import Model
    from ..engine.sample import Guide
    from ..tokenizer import StreamingDecoder, Tokenizer


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
        self.tokenizer = model.tokenizer
        if model.experts is not None:  # as long prompts cost reads by the pass, not by the token
            engine_options.setdefault("step_tokens", READING_CHUNK)
        self.engine = Engine(model, **engine_options)
        self.model = describe(model, self.engine.context_length)
        self.guides = GuideMaker(model.tokenizer)
        self.efforts = efforts_of(model.folder)
        self.replay = Replay()
        self.counters = Counters()
        self._experts = model.experts

    async def chat(self, request: ChatRequest | FillRequest) -> Answer:
        # a long prompt takes a while to tokenize, so not on the event loop
        if isinstance(request, FillRequest):
            fill = await asyncio.to_thread(_Fill, request, self)
            fill.submit()
            return Answer(fill.events(), fill.cancel, fill.usage, fill.prefilled)
        answer = await asyncio.to_thread(_Answer, request, self)
        answer.submit()
        return Answer(answer.events(), answer.cancel, answer.usage, answer.prefilled)

    async def count_tokens(self, request: ChatRequest) -> int:
        answer = await asyncio.to_thread(_Answer, request, self)
        return len(answer.prompt)

    def load(self) -> dict[str, Any]:
        stats = self.engine.stats()
        return {
            "requests_running": stats.running,
            "requests_waiting": stats.waiting,
            "cached_places": stats.cuts,
            "cache_bytes": stats.cache_bytes,
            "speculation_guessed_tokens": stats.guessed_tokens,
            "speculation_accepted_tokens": stats.accepted_tokens,
            "empty_answers_retried": self.counters.empty_answers,
            "stuck": int(stats.stuck),
            **self._reads(),
        }

    def _reads(self) -> dict[str, int]:
        """Routed experts that passes used, and had to read from disk; none if all are in memory."""
        if self._experts is None:
            return {}
        counts, size, *_ = self._experts.stats()
        return {
            "experts_used": counts.used,
            "experts_read": counts.read,
            "expert_bytes_read": size,
        }

    def close(self) -> None:
        self.engine.close()


class Counters:
    """What happened since the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.empty_answers = 0

    def count_empty_answer(self) -> None:
        with self._lock:
            self.empty_answers += 1


class _Answer:
    """One chat request on its way: its prompt, and the events that its tokens become."""

    generation: Generation

    def __init__(self, request: ChatRequest, backend: LocalBackend) -> None:
        self._request, self._backend = request, backend
        tokenizer = backend.tokenizer
        tools = request.tools if request.tool_choice != "none" else []
        messages = encoding.normalize_messages(request.messages, tools)
        self._tools = messages[0].get("tools", [])
        _check_choice(request, self._tools)
        self._continues = bool(messages[-1].get("wo_eos"))
        self._history = digest(messages)
        backend.replay.restore(request.namespace, messages, tokenizer)
        mode, effort_text = backend.efforts.of(request.effort)
        rest = encoding.encode_segments(
            messages,
            mode,
            # as the hosted service: reasoning that led to a tool call stays in view
            drop_thinking=not any(m.get("tool_calls") for m in messages),
            add_default_bos_token=False,
        )
        segments = [(encoding.BOS + effort_text, True), *rest]
        self.prompt = tokenizer.encode_segments(segments)
        self._inside = encoding.generation_mode("".join(text for text, _ in segments))
        self._reasons = self._inside == "thinking"
        self._end_think = tokenizer.special_id(encoding.END_THINK)
        self._guide: Guide | None = backend.guides.make(request, self._tools, self._reasons)
        self._held = self._guide is not None and (
            request.schema is not None or request.tool_choice == "required"
        )
        choice = "auto" if request.tool_choice == "none" else request.tool_choice
        self._parser = encoding.StreamingParser(self._inside, self._tools, choice)
        self._decoder = tokenizer.stream()
        self._stops = StopStrings(request.stop)
        self._scores = _Scores(tokenizer)
        self._thought = array("I")  # tokens of the reasoning, and of what came after it
        self._said = array("I")
        self._reasoning_tokens = 0
        self._retried = False
        self._calls: list[ToolCall] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._before = Usage()  # of a first try

    def submit(self) -> None:
        engine = self._backend.engine
        self.generation = engine.submit(self.prompt, self._request.sampling, self._guide)

    def cancel(self) -> None:
        self.generation.cancel()

    def prefilled(self) -> tuple[int, int] | None:
        return _prefilled(self.generation)

    async def events(self) -> AsyncGenerator[Event, None]:
        begun = False
        try:
            while True:
                async for token in self.generation:
                    if not begun:
                        begun = True
                        yield Begin(len(self.prompt), self.generation.usage.cached_tokens)
                    self._take(token)
                    for event in self._shown(self._parser.feed(self._text(token.id))):
                        yield event
                    if self._stops.found is not None:
                        yield self._finish("stop")
                        return
                    if self._calls and not self._request.parallel_tool_calls:
                        yield self._finish("tool_calls")
                        return
                if not self._is_empty():
                    break
                self._try_again()
            ended = self.generation.finish_reason
            rest = self._parser.feed(self._decoder.flush())
            completion = self._parser.finish("stop" if ended == "stop" else "length")
            for event in self._shown([*rest, *completion.events], last=True):
                yield event
            if self._stops.found is not None:
                yield self._finish("stop")
            elif ended == "stop":
                self._remember()
                yield self._finish("tool_calls" if self._calls else "stop")
            else:
                yield self._finish(
                    "length" if ended == "length" else "insufficient_system_resource"
                )
        finally:
            self.cancel()

    def _take(self, token: Token) -> None:
        if self._reasons:
            self._reasoning_tokens += 1
            self._reasons = token.id != self._end_think
            if self._reasons:
                self._thought.append(token.id)
        else:
            self._said.append(token.id)
        self._scores.add(token)

    def _is_empty(self) -> bool:
        """Whether the model ended without a word where a word was due."""
        if self._retried or self._held or self._continues or self._calls:
            return False
        if any(map(str.strip, self._content)):
            return False
        if self.generation.finish_reason != "stop":
            return False
        text = self._backend.tokenizer.decode(self.generation.tokens)
        message = encoding.parse_completion(
            text, self._inside, tools=self._tools, tool_choice=self._request.tool_choice
        )
        return not (message["tool_calls"] or message["content"].strip())

    def _try_again(self) -> None:
        """Answer once more from where the reasoning ended; the first token is to be seen."""
        self._retried = True
        self._backend.counters.count_empty_answer()
        first = self.generation
        tokens = [*self.prompt, *first.tokens]
        if self._reasons:  # it ended in the middle of a thought
            self._reasons = False
            tokens.append(self._end_think)
            self._parser.feed(encoding.END_THINK)
        usage = first.usage
        self._before = Usage(
            0, usage.completion_tokens, usage.cached_tokens, reuse=usage.reuse
        )
        sampling = self._request.sampling
        limit = sampling.max_tokens
        if limit is not None:
            sampling = replace(sampling, max_tokens=max(1, limit - usage.completion_tokens))
        guide = self._backend.guides.speaking(self._request, self._tools)
        try:
            self.generation = self._backend.engine.submit(tokens, sampling, guide)
        except ContextLengthError:  # there is no room left to say anything
            self._before = Usage()

    def _shown(self, events: Sequence[encoding.Event], last: bool = False) -> list[Event]:
        """The parser's events as the caller sees them: up to a stop string, with logprobs."""
        out: list[Event] = []
        for event in events:
            if self._stops.found is not None:
                break
            if isinstance(event, encoding.ReasoningDelta):
                self._reasoning.append(event.text)
                out.append(ReasoningDelta(event.text, self._scores.take()))
                continue
            if isinstance(event, encoding.ContentDelta):
                self._answer(out, self._stops.push(event.text))
            elif not self._calls or self._request.parallel_tool_calls:
                self._answer(out, self._stops.flush())
                self._scores.clear()  # of the call's markup
                call = ToolCall(event.index, event.id, event.name, event.arguments)
                self._calls.append(call)
                out.append(call)
        if last and self._stops.found is None:
            self._answer(out, self._stops.flush())
        return out

    def _answer(self, out: list[Event], text: str) -> None:
        if text:
            self._content.append(text)
            out.append(ContentDelta(text, self._scores.take()))

    def _remember(self) -> None:
        """For ``replay``: the turn as it was written, when it was seen whole."""
        if self._continues or self._reasons or not (self._calls or self._content):
            return
        turn = Turn(
            self._thought,
            self._said,
            "".join(self._content),
            "".join(self._reasoning),
            tuple((c.name, read_arguments(c.arguments)) for c in self._calls),
            whole=not self._parser.dropped,
        )
        ids = [call.id for call in self._calls]
        self._backend.replay.keep(self._request.namespace, self._history, ids, turn)

    def _finish(self, reason: FinishReason) -> Finish:
        return Finish(reason, self.usage(), self._stops.found)

    def usage(self) -> Usage:
        """What was computed so far; nothing before the first token."""
        usage, sampled = self.generation.usage, _sampled(self.generation)
        if not sampled + self._before.completion_tokens:
            return Usage()
        return Usage(
            len(self.prompt),
            self._before.completion_tokens + sampled,
            self._before.cached_tokens if self._retried else usage.cached_tokens,
            self._reasoning_tokens,
            self._before.reuse if self._retried else usage.reuse,
        )

    def _text(self, token_id: int) -> str:
        return decoded(self._decoder, token_id)


class _Fill:
    """A fill-in-the-middle request on its way."""

    generation: Generation

    def __init__(self, request: FillRequest, backend: LocalBackend) -> None:
        tokenizer = backend.tokenizer
        self._backend, self._request = backend, request
        prompt, suffix = tokenizer.encode(request.prompt), request.suffix
        if suffix is not None:
            begin, hole, end = (
                tokenizer.special_id(t)
                for t in (encoding.FIM_BEGIN, encoding.FIM_HOLE, encoding.FIM_END)
            )
            prompt = [begin, *prompt, hole, *tokenizer.encode(suffix), end]
        self.prompt = [tokenizer.bos_id, *prompt]
        self._scores = _Scores(tokenizer)
        self._stops = StopStrings(request.stop)

    def submit(self) -> None:
        self.generation = self._backend.engine.submit(self.prompt, self._request.sampling)

    def cancel(self) -> None:
        self.generation.cancel()

    def prefilled(self) -> tuple[int, int] | None:
        return _prefilled(self.generation)

    async def events(self) -> AsyncGenerator[Event, None]:
        decoder = self._backend.tokenizer.stream(skip_special=True)
        generation, stops = self.generation, self._stops
        try:
            async for token in generation:
                self._scores.add(token)
                text = stops.push(decoded(decoder, token.id))
                if text:
                    yield ContentDelta(text, self._scores.take())
                if stops.found is not None:
                    yield self._finish("stop")
                    return
            text = stops.push(decoder.flush()) + stops.flush()
            if text or self._scores:
                yield ContentDelta(text, self._scores.take())
            ended = generation.finish_reason
            reason: FinishReason = "insufficient_system_resource"
            if ended == "stop" or stops.found is not None:
                reason = "stop"
            elif ended == "length":
                reason = "length"
            yield self._finish(reason)
        finally:
            self.cancel()

    def _finish(self, reason: FinishReason) -> Finish:
        return Finish(reason, self.usage(), self._stops.found)

    def usage(self) -> Usage:
        """What was computed so far; nothing before the first token."""
        sampled = _sampled(self.generation)
        usage = self.generation.usage
        if not sampled:
            return Usage()
        return Usage(len(self.prompt), sampled, usage.cached_tokens, reuse=usage.reuse)


def _prefilled(generation: Generation) -> tuple[int, int] | None:
    if generation.tokens or generation.done:
        return None
    return generation.prompt_done, len(generation.prompt)


def _sampled(generation: Generation) -> int:
    # while it still runs, the engine has not counted yet
    return generation.usage.completion_tokens if generation.done else len(generation.tokens)


class _Scores:
    """Logprobs of tokens, kept for the text they become; a special token becomes none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.special_ids.values())
        self._scores: list[TokenLogprob] = []

    def __bool__(self) -> bool:
        return bool(self._scores)

    def add(self, token: Token) -> None:
        if token.logprob is None or token.id in self.special:
            return
        scored = [(token.id, token.logprob.logprob), *token.logprob.top]
        this, *top = [self._named(i, value) for i, value in scored]
        self._scores.append(replace(this, top=tuple(top)))

    def take(self) -> tuple[TokenLogprob, ...]:
        scores, self._scores = tuple(self._scores), []
        return scores

    def clear(self) -> None:
        self._scores.clear()

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        try:
            raw = self._tokenizer.token_bytes(token_id)
        except EncodingError:
            raw = b""
        return TokenLogprob(raw.decode("utf-8", "replace"), raw, logprob)


def decoded(decoder: StreamingDecoder, token_id: int) -> str:
    try:
        return decoder.push(token_id)
    except EncodingError:  # a row of the embedding that no token uses
        return ""


def _check_choice(request: ChatRequest, tools: Sequence[dict[str, Any]]) -> None:
    if request.tool_choice != "required":
        return
    names = [str(tool["function"].get("name")) for tool in tools]
    if request.tool_name is not None and request.tool_name not in names:
        raise RequestError(
            "tool_choice names a function that is not in tools",
            expected=", ".join(names) or "tools, when a call is required",
            got=request.tool_name,
        )


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


def describe(model: Model, context_length: int) -> ModelInfo:
    """An honest card: a small model of the architecture is not one of the published models."""
    counts = model.config.parameter_counts()
    text = f"DeepSeek-V4 architecture, {_count(counts.total)} parameters"
    text += f" ({_count(counts.active)} active per token)."
    text += f" Numerics: {model.numerics}."
    if model.experts is not None:
        held, total = model.experts.slots, model.experts.total
        text += f" Memory holds {held:,} of {total:,} routed experts; others are read from disk."
    small = counts.total < 100e9
    if small:
        text += " A small model: not DeepSeek-V4-Flash and not DeepSeek-V4-Pro."
    identity = json.dumps([model.name, model.numerics, model.config.to_dict()], default=str)
    return ModelInfo(
        id=model.name,
        description=text,
        context_length=context_length,
        max_output_tokens=min(context_length, MAX_OUTPUT),
        created=int(time.time()),
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10],
        small=small,
        knows_titles=not small,
    )


def _count(n: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
