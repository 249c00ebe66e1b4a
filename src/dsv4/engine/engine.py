"""The engine: many requests, one model, one worker thread. A step = schedule, run, commit.

    schedule   admit waiting requests, then pick every request that decodes and one that prefills
    run        one token for each of the first, one chunk of the prompt for the second
    commit     hand the tokens out, retire what is finished, keep its session for reuse

A long prompt is fed in chunks between other requests' tokens, so it delays each of them by at most
one chunk. A request's tokens depend on its prompt and parameters and never on its neighbours:
sessions are separate timelines, and randomness is counted by position (see ``sample``).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch

from ..config import V4Config
from ..errors import ContextLengthError, DSV4Error, RequestError
from .sample import MAX_OUTPUT, Guide, Logprob, SamplingParams, logprob, sample

if TYPE_CHECKING:
    from .session import Session

FinishReason = Literal["stop", "length", "cancelled", "error"]


class EngineBusyError(DSV4Error):
    """Too many requests are waiting; the same request may work later."""


class EngineClosedError(DSV4Error):
    """The engine was closed and takes no more requests."""


class EngineModel(Protocol):
    """What the engine needs of a model; ``dsv4.api.Model`` has it."""

    @property
    def config(self) -> V4Config: ...

    def session(self) -> Session: ...


class Token(NamedTuple):
    """One generated token. ``logprob`` is None unless the request asked for it."""

    id: int
    logprob: Logprob | None


@dataclass(frozen=True)
class Usage:
    """What a request cost; times in seconds, by the engine's clock.

    ``prompt_tokens`` includes ``cached_tokens``, those found in a kept session.
    ``completion_tokens`` counts every token sampled, the stop token included.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_time: float = 0.0
    prefill_time: float = 0.0
    decode_time: float = 0.0


class EngineStats(NamedTuple):
    """A glance at the engine: requests running and waiting, sessions kept, and what they occupy."""

    running: int
    waiting: int
    pooled: int
    pooled_bytes: int


class Generation:
    """One request's answer while it is made. One consumer reads it, in a thread or in asyncio.

    Iterating gives a ``Token`` as soon as it exists and stops when ``finish_reason`` is set; the
    stop token is counted in ``usage`` but not given. If the step failed, iterating raises what it
    raised and ``finish_reason`` is "error". Leaving the loop does not stop the work: ``cancel()``.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        cancelled: Callable[[], None],
        guide: Guide | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.params = params
        self.guide = guide
        self.tokens: list[int] = []  # given or about to be given
        self.usage = Usage(prompt_tokens=len(self.prompt))
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.cancel_requested = False
        self._cancelled = cancelled
        self._changed = threading.Condition()
        self._unread: deque[Token] = deque()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Stop after the current step, with finish reason "cancelled". Safe from any thread."""
        self.cancel_requested = True
        self._cancelled()

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def result(self) -> list[int]:
        """Wait for the end and give all tokens; raises what the step raised."""
        for _ in self:
            pass
        return self.tokens

    def __iter__(self) -> Iterator[Token]:
        while True:
            with self._changed:
                while not self._unread and not self.done:
                    self._changed.wait()
            if not self._unread:
                break
            yield self._unread.popleft()
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Token]:
        ready = asyncio.Event()
        with self._changed:
            self._reader = asyncio.get_running_loop(), ready
        while True:
            ready.clear()  # before looking, so that what comes after the look sets it again
            done = self.done
            while self._unread:
                yield self._unread.popleft()
            if done:
                break
            await ready.wait()
        if self.error is not None:
            raise self.error

    def _give(self, token: Token) -> None:
        with self._changed:
            self.tokens.append(token.id)
            self._unread.append(token)
            self._notify()

    def _end(self, reason: FinishReason, usage: Usage, error: BaseException | None) -> None:
        with self._changed:
            self.usage, self.error, self.finish_reason = usage, error, reason
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._reader is not None:
            loop, ready = self._reader
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the reader's loop is closed: nobody listens any more
                self._reader = None


class _Running:
    """A request that has a session: first its prompt is fed, then one token a step."""

    def __init__(self, generation: Generation, session: Session, cached: int):
        self.generation = generation
        self.session = session
        self.cached = cached
        self.pending = generation.prompt[cached:]  # tokens the session has not seen yet
        self.started = 0.0
        self.first_token: float | None = None
        self.sampled = 0

    @property
    def decodes(self) -> bool:
        return self.first_token is not None


class Engine:
    """Runs requests on one model; every method may be called from any thread.

    ``max_running``     requests that are computed at once; the others wait their turn
    ``max_waiting``     longer lines are refused with EngineBusyError
    ``prefill_chunk``   prompt tokens fed per step
    ``session_pool``    finished timelines kept for reuse, the least recently used dropped first
    ``pool_bytes``      the same in bytes; the latest one is kept whatever its size
    ``context_length``  tokens of prompt and answer together; None = what the config promises
    ``clock``           seconds, monotonic; injected so that tests need no waiting

    Close it (or use ``with``): the worker ends and unfinished requests are "cancelled".
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        max_running: int = 8,
        max_waiting: int = 256,
        prefill_chunk: int = 512,
        session_pool: int = 8,
        pool_bytes: int = 4 << 30,
        context_length: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.context_length = context_length or model.config.max_position_embeddings
        self._model = model
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._prefill_chunk = prefill_chunk
        self._clock = clock
        self._pool = _SessionPool(session_pool, pool_bytes)
        self._wake = threading.Condition()
        self._waiting: deque[tuple[Generation, float]] = deque()
        self._running: deque[_Running] = deque()
        self._closing = False
        self._worker = threading.Thread(target=self._run, name="dsv4-engine", daemon=True)
        self._worker.start()

    # ------------------------------------------------------------------ for callers

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        guide: Guide | None = None,
    ) -> Generation:
        """Queue a prompt (token ids) and return at once.

        A ``guide`` belongs to this generation alone: it remembers what was chosen.
        Raises ContextLengthError when the prompt leaves no room for an answer (an answer that
        would be too long is cut instead), RequestError for ids outside the vocabulary or an empty
        prompt, EngineBusyError when the line is full, EngineClosedError after ``close``.
        """
        params = params or SamplingParams()
        vocab, limit = self._model.config.vocab_size, self.context_length
        if not prompt:
            raise RequestError("empty prompt", expected="at least one token", got="none")
        bad = next((t for t in prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError("no such token id", expected=f"0..{vocab - 1}", got=bad)
        room = limit - len(prompt)
        if room < 1:
            asked = params.max_tokens or 1
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + asked} tokens ({len(prompt)} in the messages, {asked} in the "
                "completion). Please reduce the length of the messages or completion."
            )
        params = replace(
            params,
            max_tokens=min(room, params.max_tokens or MAX_OUTPUT),
            stop_token_ids=(self._model.config.eos_token_id,)
            if params.stop_token_ids is None
            else params.stop_token_ids,
        )
        generation = Generation(prompt, params, self._nudge, guide)
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closed")
            if len(self._waiting) >= self._max_waiting:
                raise EngineBusyError(
                    "too many requests are waiting",
                    expected=f"at most {self._max_waiting}",
                    hint="send it again later, or serve with a larger --max-waiting",
                )
            self._waiting.append((generation, self._clock()))
            self._wake.notify()
        return generation

    def stats(self) -> EngineStats:
        with self._wake:
            return EngineStats(len(self._running), len(self._waiting), *self._pool.occupied)

    def close(self) -> None:
        """End the current step, cancel what is unfinished, stop the worker. May be repeated."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the worker

    def _run(self) -> None:
        try:
            with torch.no_grad():  # grad mode belongs to a thread
                while self._sleep_until_work():
                    for request in self._schedule():
                        self._step(request)
        finally:  # whatever ended the loop, nobody waits for ever
            with self._wake:
                self._closing = True
                waiting, self._waiting = self._waiting, deque()
            for request in list(self._running):
                self._retire(request, "cancelled")
            for generation, _ in waiting:
                generation._end("cancelled", generation.usage, None)

    def _sleep_until_work(self) -> bool:
        """Block while there is nothing to do; False when the engine closes."""
        with self._wake:
            while not (self._running or self._waiting or self._closing):
                self._wake.wait()
            return not self._closing

    def _nudge(self) -> None:
        with self._wake:
            self._wake.notify()

    def _schedule(self) -> list[_Running]:
        """All requests that decode and the next one that prefills, after admitting new ones."""
        with self._wake:
            gone = [g for g, _ in self._waiting if g.cancel_requested]
            self._waiting = deque(w for w in self._waiting if not w[0].cancel_requested)
            room = self._max_running - len(self._running)
            admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for generation in gone:
            generation._end("cancelled", generation.usage, None)
        for generation, submitted in admitted:
            self._admit(generation, submitted)
        for request in [r for r in self._running if r.generation.cancel_requested]:
            self._retire(request, "cancelled")
        batch = [r for r in self._running if r.decodes]
        prefilling = next((r for r in self._running if not r.decodes), None)
        if prefilling is not None:
            batch.append(prefilling)
            # to the end of the line, so that prompts take turns and a short one is soon done
            self._running.remove(prefilling)
            self._running.append(prefilling)
        return batch

    def _admit(self, generation: Generation, submitted: float) -> None:
        now = self._clock()
        generation.usage = replace(generation.usage, queue_time=now - submitted)
        try:
            busy = [r.session for r in self._running]
            found = self._pool.take(generation.prompt, busy)
            session, cached = found or (self._model.session(), 0)
        except Exception as error:
            generation._end("error", generation.usage, error)
            return
        generation.usage = replace(generation.usage, cached_tokens=cached)
        request = _Running(generation, session, cached)
        request.started = now
        self._running.append(request)

    def _step(self, request: _Running) -> None:
        """Run one request's part of the step and commit it; a failure ends that request only."""
        generation, session = request.generation, request.session
        try:
            chunk = request.pending[: self._prefill_chunk]
            del request.pending[: self._prefill_chunk]
            logits = session.extend(chunk, last=True)[-1]
            if request.pending:
                return
            params, position = generation.params, len(session)
            guide = generation.guide
            token = sample(logits, params, position, guide.allowed() if guide else None)
            if guide:
                guide.accept(token)
            wanted = params.logprobs
            scores = None if wanted is None else logprob(logits, token, wanted)
        except Exception as error:
            self._retire(request, "error", error)
            return
        if request.first_token is None:
            request.first_token = self._clock()
        request.sampled += 1
        request.pending = [token]
        if token in (params.stop_token_ids or ()):
            self._retire(request, "stop")
            return
        last = request.sampled == params.max_tokens
        generation._give(Token(token, scores))
        if last:
            self._retire(request, "length")

    def _retire(
        self, request: _Running, reason: FinishReason, error: BaseException | None = None
    ) -> None:
        self._running.remove(request)
        now = self._clock()
        first = request.first_token
        usage = replace(
            request.generation.usage,
            completion_tokens=request.sampled,
            prefill_time=(now if first is None else first) - request.started,
            decode_time=0.0 if first is None else now - first,
        )
        if error is None:  # after a failure the session's state is not trusted
            self._pool.give(request.session)
        request.generation._end(reason, usage, error)


class _SessionPool:
    """Finished timelines, the most recently used last. Only the worker calls it."""

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        self._capacity, self._capacity_bytes = capacity, capacity_bytes
        self._sessions: list[Session] = []
        self.occupied = (0, 0)  # sessions and their bytes, for other threads to read

    def take(self, prompt: list[int], busy: list[Session]) -> tuple[Session, int] | None:
        """A session that holds the longest known prefix of ``prompt``, and that prefix's length.

        ``busy`` sessions belong to running requests. At least the prompt's last token is left to
        feed, because its logits are wanted. A kept timeline that the prompt continues is taken;
        one that branches off is forked, so a system prompt shared by many conversations stays
        with all of them.
        """
        usable, best = 0, None
        for session in [*busy, *self._sessions]:
            common = min(common_prefix(session.tokens, prompt), len(prompt) - 1)
            if common >= usable:  # on a tie a kept one, and of those the one used last
                usable, best = common, session
        if best is None or usable == 0:
            return None
        kept = any(s is best for s in self._sessions)
        if kept:
            self._remove(best)
        if not kept or usable < len(best):
            if kept:
                self._sessions.append(best)
            best = best.fork()
            best.rewind(usable)
        self._count()
        return best, usable

    def give(self, session: Session) -> None:
        """Keep a session, in place of those whose whole timeline it contains."""
        tokens = session.tokens
        for other in list(self._sessions):
            if common_prefix(other.tokens, tokens) == len(other):
                self._remove(other)
        if tokens:
            self._sessions.append(session)
        del self._sessions[: max(0, len(self._sessions) - self._capacity)]
        self._count()
        while len(self._sessions) > 1 and self.occupied[1] > self._capacity_bytes:
            del self._sessions[0]
            self._count()

    def _remove(self, session: Session) -> None:
        self._sessions = [s for s in self._sessions if s is not session]

    def _count(self) -> None:
        self.occupied = len(self._sessions), sum(s.bytes() for s in self._sessions)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items are equal. Compares slices, so a million tokens take milliseconds."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # a[:low] == b[:low] always holds
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
