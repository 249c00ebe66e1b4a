"""The seam between the APIs and whatever answers: a request goes in, events come out.

Every surface (OpenAI, Anthropic, Responses, fill-in-the-middle, the chat page) translates into the
requests of this module and out of its events; none knows another. ``local`` has the backend that
answers with a model in this process, ``ScriptedBackend`` plays back events for tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..engine import Reuse, SamplingParams
from .wire import Closing

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
    small: bool = False  # of the architecture, but neither Flash nor Pro
    knows_titles: bool = False  # was trained on the ``title`` task


@dataclass(frozen=True)
class ChatRequest:
    """One chat turn to answer; messages and tools in the OpenAI shape.

    ``effort``               "none" (no thinking), "minimal" ... "max"; its meaning is the weights'
    ``tool_name``            with ``tool_choice`` "required": the tool to call, None = any
    ``parallel_tool_calls``  False: the answer ends with its first call
    ``stop``                 the answer ends before any of these; reasoning is not searched
    ``schema``               a JSON schema that the answer fits (calls may come in its place)
    ``max_thinking_tokens``  a longer thought is closed; None = no limit
    ``namespace``            whose conversation it is: nothing remembered crosses over
    """

    messages: list[dict[str, Any]]
    effort: str = "high"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    stop: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    max_thinking_tokens: int | None = None
    namespace: str = ""


@dataclass(frozen=True)
class FillRequest:
    """Text to continue, or, with a ``suffix``, a gap to fill; no chat, no thinking, no tools."""

    prompt: str
    suffix: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens; ``cached_tokens`` are part of the prompt's, ``reasoning_tokens`` of the answer's.

    ``reuse`` says what became of the prompt's tokens, where the backend knows.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    reuse: Reuse | None = None

    def whence(self) -> dict[str, int]:
        """Where the prompt's tokens came from, by number: from "memory" or "disk", or computed,
        because there was no cut close behind the last known one ("between"), because they had been
        "dropped", or because they are "new". Empty if the backend does not know."""
        reuse = self.reuse
        if reuse is None:
            return {}
        return {
            "memory": reuse.hit - reuse.disk, "disk": reuse.disk, "between": reuse.between,
            "dropped": reuse.dropped, "new": reuse.new,
        }  # fmt: skip


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text and as bytes (half a character has bytes only), and its logprob."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    def body(self) -> dict[str, Any]:
        """As OpenAI's APIs spell it."""
        first, *top = (
            {"token": each.text, "logprob": each.logprob, "bytes": list(each.raw)}
            for each in (self, *self.top)
        )
        return {**first, "top_logprobs": top}


@dataclass(frozen=True)
class Begin:
    """The prompt has been read: its tokens, and how many of them were in the cache."""

    prompt_tokens: int
    cached_tokens: int


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


Event = Begin | ReasoningDelta | ContentDelta | ToolCall | Finish


class Answer(Closing[Event]):
    """The events of an answer, and ``usage``: the tokens so far, all zero before the first token;
    ``prefilled``: while the prompt is read, how many of its tokens have been, and all of them.

    Closing it calls ``stop``, which ends the work behind it.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        stop: Callable[[], object],
        usage: Callable[[], Usage],
        prefilled: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        super().__init__(events, stop)
        self._usage, self._prefilled = usage, prefilled

    @property
    def usage(self) -> Usage:
        return self._usage()

    @property
    def prefilled(self) -> tuple[int, int] | None:
        return self._prefilled()


class Backend(Protocol):
    """Answers requests with one model."""

    @property
    def model(self) -> ModelInfo: ...

    async def chat(self, request: ChatRequest | FillRequest) -> Answer:
        """Begin an answer. What can be refused is refused here (RequestError,
        EngineBusyError, EngineClosedError).

        The events may start with a ``Begin``. They end with one ``Finish``, or with an exception.
        Closing the answer stops the work behind it.
        """
        ...

    async def count_tokens(self, request: ChatRequest) -> int:
        """The ``prompt_tokens`` that ``chat`` would report; nothing is generated."""
        ...

    def load(self) -> dict[str, Any]:
        """How busy the backend is, for /health."""
        ...

    def close(self) -> None:
        """Stop; unfinished answers finish with "insufficient_system_resource"."""
        ...


class ScriptedBackend:
    """Plays back events, for tests of the HTTP layer. A number waits, an exception is raised."""

    def __init__(self, script: Sequence[Event | Exception | float], name: str = "scripted") -> None:
        self.model = ModelInfo(name, "a script, not a model", 1024, 1024, 0, f"fp_{name}")
        self.closed_early = False
        self.requests: list[ChatRequest | FillRequest] = []
        self.script = script

    async def chat(self, request: ChatRequest | FillRequest) -> Answer:
        self.requests.append(request)
        return Answer(self._play(), lambda: None, Usage)

    async def _play(self) -> AsyncGenerator[Event, None]:
        self.closed_early = True
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, int | float):
                await asyncio.sleep(step)
            else:
                yield step
        self.closed_early = False

    async def count_tokens(self, request: ChatRequest) -> int:
        last = self.script[-1] if self.script else None
        return last.usage.prompt_tokens if isinstance(last, Finish) else 0

    def load(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
