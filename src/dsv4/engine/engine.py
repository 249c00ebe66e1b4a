"""The engine: many requests, one model, one worker thread. A step = schedule, run, commit.

    schedule   who gets or gives up a place, and whose tokens the next pass feeds (``scheduler``)
    run        one pass: a token of each request that decodes, guesses of the ones after them
               (``speculate``), and chunks of prompts
    commit     sample, hand the tokens out, keep what others may go on from (``prefix``), retire;
               guess again

A long prompt is fed in chunks beside other requests' tokens, so it delays each of them by at most
one chunk. A request's tokens depend on its prompt and parameters and never on its neighbours:
timelines are separate, and randomness is counted by position (see ``sample``).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch

from ..config import V4Config
from ..errors import ConfigError, ContextLengthError, DSV4Error, RequestError
from ..protocols import Continued
from . import memory
from .disk import DiskTier
from .kvstate import GRAIN
from .prefix import Lease, PrefixCache, Reuse
from .sample import MAX_OUTPUT, Allowed, Guide, Logprob, SamplingParams, logprob, sample
from .scheduler import Job, Scheduler
from .session import Part
from .speculate import Judge, Odds, Weights
from .watchdog import Watchdog

_STUCK = "the model's step does not return"
_STUCK_HINT = "restart the server; its log says since when"
AUDIT = 256  # blocks that are looked at when there is nothing else to do
SAVE_EVERY = 16 * GRAIN  # tokens after which what was computed is saved, if no message ends before
log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "cancelled", "error"]


class EngineBusyError(DSV4Error):
    """Too many requests are waiting; the same request may work later."""


class EngineClosedError(DSV4Error):
    """The engine was closed and takes no more requests."""


class EngineStuckError(DSV4Error):
    """A step does not return, and nothing can be computed until it does."""


class EngineModel(Protocol):
    """What the engine needs of a model; ``dsv4.api.Model`` has it."""

    @property
    def config(self) -> V4Config: ...

    def runner(self) -> Runs: ...


class Runs(Protocol):
    """Runs timelines; ``session.Runner`` has it. A timeline is as ``kvstate.KVState``."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def overhead_bytes(self) -> int: ...

    def resume(self, blocks: Any, cut: Any) -> Any: ...

    def run(self, parts: Sequence[Part]) -> Sequence[torch.Tensor]: ...

    def trail(self) -> Any: ...

    def guess(self, timelines: Sequence[Continued], trails: Sequence[Any]) -> torch.Tensor: ...


class Token(NamedTuple):
    """One generated token. ``logprob`` is None unless the request asked for it."""

    id: int
    logprob: Logprob | None


@dataclass(frozen=True)
class Usage:
    """What a request cost; times in seconds, by the engine's clock.

    ``prompt_tokens`` includes ``cached_tokens``, those that were not computed again; ``reuse``
    says why the others were. ``completion_tokens`` counts every token sampled, the stop token
    included. ``guessed_tokens`` were checked ahead of their turn; ``accepted_tokens`` of them were
    right and are among the completion's.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_time: float = 0.0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    reuse: Reuse = field(default_factory=Reuse)


class EngineStats(NamedTuple):
    """A glance at the engine: requests running and waiting, places of past timelines from which
    one can go on, and the bytes that these and their rows occupy; tokens guessed by speculation
    since the start, and how many of them were right; whether a step does not return."""

    running: int
    waiting: int
    cuts: int
    cache_bytes: int
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    stuck: bool = False


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
        self.prompt_done = 0  # tokens of the prompt that are computed, or were before
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
            if self.done:  # given up: the step took too long
                return
            self.tokens.append(token.id)
            self._unread.append(token)
            self._notify()

    def _end(self, reason: FinishReason, usage: Usage, error: BaseException | None) -> None:
        with self._changed:
            if not self.done:
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


class _Request:
    """A generation on its way: its job, its timeline while it has a place, and what is known of it.
    """

    def __init__(self, generation: Generation, job: Job, submitted: float) -> None:
        self.generation, self.job, self.submitted = generation, job, submitted
        self.tokens = list(generation.prompt)  # and what was sampled
        self.state: Any = None
        self.lease: Lease | None = None
        self.unsaved: list[Any] = []  # cuts that are not on their way to the disk yet
        self.reuse: Reuse | None = None  # once it was looked for
        self.suspect = False  # was part of a pass that failed
        self.started: float | None = None
        self.first_token: float | None = None
        self.sampled = 0
        self.trail: Any = None  # for guesses; begins anew with the timeline
        self.guess: list[int] = []  # of the token after the last one: none or one
        self.odds: Odds | None = None
        self.asked: tuple[Allowed | None] | None = None  # the guide, about the next token

    def allowed(self) -> Allowed | None:
        """What the guide says of the next token; it is asked once."""
        if self.asked is None:
            guide = self.generation.guide
            self.asked = (guide.allowed() if guide else None,)
        return self.asked[0]

    def accept(self, token: int) -> None:
        """The next token is chosen."""
        self.asked = None
        if self.generation.guide:
            self.generation.guide.accept(token)


_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that comes back from native code to an interpreter that has ended aborts."""
    for engine in list(_open):
        engine.close()


class Engine:
    """Runs requests on one model; every method may be called from any thread.

    ``max_running``     requests that are computed at once; the others wait their turn
    ``max_waiting``     longer lines are refused with EngineBusyError
    ``step_tokens``     rows of one pass: a token of each request that decodes, the rest is prompts
    ``memory_bytes``    for attention state: of running requests, and what they leave of it for the
                        prefix cache
    ``context_length``  tokens of prompt and answer together; None = what the config promises, and
                        what fits into the memory
    ``disk``            keeps what is computed for later processes too; closed with the engine
    ``speculate``       guess with the MTP block where that is faster; no answer depends on it
    ``stuck_after``     seconds after which a step counts as stuck, beside ten times the slowest
                        one so far: all requests fail with EngineStuckError until it returns
    ``clock``           seconds, monotonic; injected so that tests need no waiting

    Close it (or use ``with``): the worker ends and unfinished requests are "cancelled". What is
    open when the interpreter ends is closed then.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        max_running: int = 8,
        max_waiting: int = 256,
        step_tokens: int = 512,
        memory_bytes: int = 4 << 30,
        context_length: int | None = None,
        disk: DiskTier | None = None,
        speculate: bool = True,
        stuck_after: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._runner = model, model.runner()
        self._block_bytes = max(1, self._runner.block_bytes)
        self._memory = memory_bytes
        self._scheduler = Scheduler(
            max_running=max_running,
            step_tokens=max(step_tokens, max_running),
            blocks=memory_bytes // self._block_bytes,
            overhead=-(-self._runner.overhead_bytes // self._block_bytes),
        )
        room = self._scheduler.room()
        if room < GRAIN:
            raise ConfigError(
                "no request fits into the engine's memory",
                expected="memory for at least 128 tokens", got=f"{memory_bytes} bytes",
            )  # fmt: skip
        limit = context_length or model.config.max_position_embeddings
        self.context_length = min(limit, room)
        self._max_waiting = max_waiting
        self._clock, self._disk = clock, disk
        self._cache = PrefixCache(memory_bytes, self._runner.block_bytes)
        self._judge: Judge | None = None
        if speculate and self._runner.trail() is not None:
            self._judge = Judge(Weights(model.config))
        self._guessed = self._accepted = 0
        self._wake = threading.Condition()
        self._arrived: deque[_Request] = deque()
        self._requests: dict[Job, _Request] = {}  # waiting or running
        self._closing = False
        self._watchdog = Watchdog(stuck_after, self._give_up)
        self._worker = threading.Thread(target=self._work, name="dsv4-engine", daemon=True)
        self._worker.start()
        _open.add(self)

    # ------------------------------------------------------------------ for callers

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        guide: Guide | None = None,
        *,
        priority: int = 0,
    ) -> Generation:
        """Queue a prompt (token ids) and return at once.

        A ``guide`` belongs to this generation alone: it remembers what was chosen. A higher
        ``priority`` goes first.
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
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_token_ids=(self._model.config.eos_token_id,)
            if params.stop_token_ids is None
            else params.stop_token_ids,
        )
        assert params.max_tokens is not None
        generation = Generation(prompt, params, self._nudge, guide)
        now = self._clock()
        job = Job(len(prompt), len(prompt) + params.max_tokens, priority, now)
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closed")
            if self._watchdog.late:
                raise EngineStuckError(_STUCK, hint=_STUCK_HINT)
            if len(self._arrived) + len(self._scheduler.waiting) >= self._max_waiting:
                raise EngineBusyError(
                    "too many requests are waiting",
                    expected=f"at most {self._max_waiting}",
                    hint="send it again later, or serve with a larger --max-waiting",
                )
            self._arrived.append(_Request(generation, job, now))
            self._wake.notify()
        return generation

    def stats(self) -> EngineStats:
        waiting = len(self._arrived) + len(self._scheduler.waiting)
        return EngineStats(
            len(self._scheduler.running), waiting, self._cache.cuts, self._cache.bytes,
            self._guessed, self._accepted, self._watchdog.late,
        )  # fmt: skip

    def close(self) -> None:
        """End the current step, cancel what is unfinished, stop the worker. May be repeated.
        A step that is stuck is left alone."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        while threading.current_thread() is not self._worker and self._worker.is_alive():
            if self._watchdog.late:
                break
            self._worker.join(1.0)
        self._watchdog.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the worker

    def _work(self) -> None:
        try:
            with torch.no_grad():  # grad mode belongs to a thread
                while self._sleep_until_work():
                    self._schedule()
                    self._run()
        finally:  # whatever ended the loop, nobody waits for ever
            with self._wake:
                self._closing = True
                arrived, self._arrived = self._arrived, deque()
            for request in [*self._requests.values(), *arrived]:
                self._requests.setdefault(request.job, request)
                self._let_go(request)
                self._retire(request, "cancelled")
            if self._disk is not None:
                self._disk.close()

    def _give_up(self, seconds: float) -> None:
        """The step does not return: nobody is to wait for it. In the watchdog's thread."""
        with self._wake:
            requests = [*self._requests.values(), *self._arrived]
        log.critical("a step has not returned for %.0f s; %d requests fail", seconds, len(requests))
        for request in requests:
            request.generation.cancel_requested = True  # should the step return after all
            error = EngineStuckError(_STUCK, got=f"{seconds:.0f} s so far", hint=_STUCK_HINT)
            request.generation._end("error", request.generation.usage, error)

    def _sleep_until_work(self) -> bool:
        """Block while there is nothing to do; False when the engine closes."""
        idle = not (self._requests or self._arrived or self._closing)
        if idle:
            try:
                self._cache.audit(AUDIT)
            except DSV4Error as error:  # memory that somebody wrote into: nothing is to be trusted
                log.error("the prefix cache is emptied: %s", error)
                self._cache.clear()
        with self._wake:
            while not (self._requests or self._arrived or self._closing):
                self._wake.wait()
            return not self._closing

    def _nudge(self) -> None:
        with self._wake:
            self._wake.notify()

    # ------------------------------------------------------------------ schedule

    def _schedule(self) -> None:
        with self._wake:  # so that submit sees them in one of the two lines
            for request in self._arrived:
                self._requests[request.job] = request
                self._scheduler.add(request.job)
            self._arrived.clear()
        for request in list(self._requests.values()):
            if request.generation.cancel_requested:
                self._retire(request, "cancelled")
        preempted, admitted = self._scheduler.step()
        for job in preempted:
            self._set_aside(self._requests[job])
        self._cache.shrink(max(0, self._memory - self._scheduler.used * self._block_bytes))
        for job in admitted:
            request = self._requests[job]
            if request.started is None:
                request.started = self._clock()
            self._find(request)

    def _find(self, request: _Request) -> None:
        """Go on from the furthest place that is known, if that is further than where it is."""
        lease, blocks, cut, reuse = self._cache.find(request.tokens)
        if request.state is not None and reuse.hit <= request.state.length:
            self._cache.release(lease)
            return
        if self._disk is not None and reuse.hit < len(request.tokens) - 1:
            found = self._disk.find(request.tokens, reuse.hit, blocks)
            if found is not None:
                self._cache.keep(lease, request.tokens, found.blocks, [found.cut])
                self._cache.release(lease)
                before = reuse.hit
                lease, blocks, cut, reuse = self._cache.find(request.tokens)
                reuse = replace(reuse, disk=reuse.hit - before)
        known = request.reuse
        if known is None:
            request.reuse = reuse
        elif request.state is not None:  # another request has computed some of it meanwhile
            request.reuse = known.more(reuse.hit - request.state.length)
        self._let_go(request)
        request.lease, request.state = lease, self._runner.resume(blocks, cut)
        self._scheduler.resumed(request.job, reuse.hit)
        generation, known = request.generation, request.reuse
        assert known is not None
        generation.usage = replace(generation.usage, cached_tokens=known.hit, reuse=known)
        generation.prompt_done = min(reuse.hit, len(generation.prompt))

    def _let_go(self, request: _Request) -> None:
        if request.lease is not None:
            self._cache.release(request.lease)
        request.lease = request.state = request.trail = None
        request.unsaved = []
        request.guess, request.job.guesses = [], 0

    def _set_aside(self, request: _Request) -> None:
        """Take a request's timeline away, in such a way that it can be found again."""
        if request.state is not None:
            self._keep(request, request.state.length)
        self._let_go(request)

    def _keep(self, request: _Request, start: int) -> None:
        """Keep the state at all multiples of 128 since ``start``, before the prompt's last token
        and, if ``start`` is the end, there."""
        state, last = request.state, len(request.generation.prompt) - 1
        here = set(range((start // GRAIN + 1) * GRAIN, state.length + 1, GRAIN))
        ends = {at for at in (last, start) if start <= at <= state.length and at > 0}
        if start != state.length:
            ends.discard(start)
        here |= ends
        if here and request.lease is not None:
            cuts = [state.cut(at) for at in sorted(here)]
            self._cache.keep(request.lease, request.tokens, state.blocks, cuts, ends)
            if self._disk is None:
                return
            request.unsaved += cuts
            lasting = ends | {at for at in here if at % SAVE_EVERY == 0}
            if lasting:
                self._disk.save(request.tokens, state.blocks, request.unsaved, lasting)
                request.unsaved = []

    # ------------------------------------------------------------------ run and commit

    def _run(self) -> None:
        """Feed what the scheduler says, and commit what comes of it."""
        work: list[tuple[_Request, int]] = []
        several = sum(job.left > 1 for job in self._scheduler.running) > 1
        for job, n in self._scheduler.feed():
            request = self._requests[job]
            start = job.fed - n
            if several and n > 1:  # another of these prompts may have come further by now
                self._scheduler.resumed(job, start)
                self._find(request)
                n = min(n, job.left)
                self._scheduler.resumed(job, job.fed + n)
            work.append((request, n))
        for group in self._groups(work):
            parts = [self._part(request, n) for request, n in group]
            timed = self._judge if all(n == 1 for _, n in group) else None
            began = self._clock() if timed else 0.0
            try:
                with self._watchdog.step():
                    done = self._runner.run(parts)
            except Exception as error:
                self._failed(group, error)
                continue
            if timed is not None:
                guesses = sum(len(request.guess) for request, _ in group)
                timed.took(len(group) + guesses, self._clock() - began, guesses)
            for (request, n), logits in zip(group, done, strict=True):
                self._commit(request, n, logits)
        if self._judge is not None:
            self._guess(self._judge)

    def _part(self, request: _Request, n: int) -> Part:
        """A request's next ``n`` tokens and its guess, as they go into a pass."""
        job = request.job
        if self._judge is not None and request.trail is None and not job.left:
            request.trail = self._runner.trail()
        request.guess = request.guess[: job.guesses]
        ids = request.tokens[job.fed - n : job.fed] + request.guess
        wanted = 0 if job.left else 1 + len(request.guess)
        return Part(request.state, ids, wanted, request.trail)

    def _groups(self, work: list[tuple[_Request, int]]) -> list[list[tuple[_Request, int]]]:
        """All in one pass, but each of those alone that were part of one that failed."""
        alone = [[w] for w in work if w[0].suspect]
        together = [w for w in work if not w[0].suspect]
        return [*alone, *([together] if together else [])]

    def _failed(self, group: list[tuple[_Request, int]], error: Exception) -> None:
        """Who is to blame is seen when each is run alone, from where it was last known good."""
        for request, _ in group:
            if len(group) == 1:
                self._let_go(request)
                self._retire(request, "error", error)
                continue
            request.suspect = True
            self._let_go(request)
            self._find(request)

    def _commit(self, request: _Request, fed: int, logits: torch.Tensor) -> None:
        """Take one part's result; a failure ends that request only."""
        generation, state, job = request.generation, request.state, request.job
        request.suspect = False
        generation.prompt_done = min(job.fed, len(generation.prompt))
        try:
            chosen = self._sample(request, logits)
            self._keep(request, state.length - fed - max(0, len(chosen) - 1))
            state.settle()
            memory.after(fed)
        except Exception as error:
            self._let_go(request)
            self._retire(request, "error", error)
            return
        if job.left:
            return
        if request.first_token is None:
            request.first_token = self._clock()
            reuse = request.reuse or Reuse(new=len(generation.prompt))
            generation.usage = replace(generation.usage, cached_tokens=reuse.hit, reuse=reuse)
        request.sampled += len(chosen)
        stops = generation.params.stop_token_ids or ()
        for token in chosen:
            if token.id in stops:
                self._retire(request, "stop")
                return
            generation._give(token)
        if request.sampled == generation.params.max_tokens:
            self._retire(request, "length")
        else:
            job.fed, job.tokens = job.fed + len(chosen) - 1, job.tokens + len(chosen)

    def _sample(self, request: _Request, logits: torch.Tensor) -> list[Token]:
        """The tokens that a part's logits give: one, and one more for each right guess. What was
        fed for wrong ones is taken back; the others are the timeline's tokens from now on."""
        generation, state, guess = request.generation, request.state, request.guess
        params, chosen = generation.params, list[Token]()
        stops = params.stop_token_ids or ()
        position = state.length - len(guess)
        for row, guessed in zip(logits, [*guess, None], strict=False):
            token = sample(row, params, position + len(chosen), request.allowed())
            request.accept(token)
            scores = None if params.logprobs is None else logprob(row, token, params.logprobs)
            chosen.append(Token(token, scores))
            if guessed is not None and request.odds is not None:
                request.odds.seen(token == guessed)
            if token != guessed:  # a guess is never a stop token
                break
        if guess:
            right = len(chosen) - 1
            self._guessed, self._accepted = self._guessed + len(guess), self._accepted + right
            state.take_back(len(guess) - right)
            request.trail.take_back(len(guess) - right)
            request.guess, request.job.guesses = [], 0
        request.tokens += [token.id for token in chosen if token.id not in stops]
        return chosen

    def _guess(self, judge: Judge) -> None:
        """Guess the token after the next one of those for whom it is worth it."""
        decoding = [self._requests[job] for job in self._scheduler.running if job.left == 1]
        decoding = [request for request in decoding if request.sampled]
        able = [r for r in decoding if r.trail is not None and r.trail.unseen]
        able = [r for r in able if r.sampled + 1 < (r.generation.params.max_tokens or 0)]
        for request in able:
            request.odds = request.odds or Odds(judge.everyone)
        odds = [request.odds for request in able if request.odds is not None]
        some = [able[i] for i in judge.choose(odds, len(decoding))] if able else []
        if not some:
            return
        start = self._clock()
        try:
            fed = [len(r.tokens) - 1 - r.trail.unseen for r in some]
            timelines = [Continued(r.tokens[at + 1 :], at, [r.trail])
                         for r, at in zip(some, fed, strict=True)]
            logits = self._runner.guess(timelines, [r.trail for r in some])
        except Exception:  # no answer needs it
            log.exception("speculation is off from now on")
            self._judge = None
            for request in decoding:
                request.trail, request.guess, request.job.guesses = None, [], 0
        else:
            for request, row in zip(some, logits, strict=True):
                self._guess_one(request, row)
            judge.drafting_took(len(some), self._clock() - start)

    def _guess_one(self, request: _Request, logits: torch.Tensor) -> None:
        params = request.generation.params
        try:
            token = sample(logits, params, len(request.tokens), request.allowed())
        except Exception as error:  # if the guide failed, it will again where it counts
            log.warning("no guess: %s", error)
            return
        if token not in (params.stop_token_ids or ()):
            request.guess, request.job.guesses = [token], 1

    def _retire(
        self, request: _Request, reason: FinishReason, error: BaseException | None = None
    ) -> None:
        if request.job.running or request.job in self._scheduler.waiting:
            self._scheduler.remove(request.job)
        del self._requests[request.job]
        now = self._clock()
        first = request.first_token
        started = now if request.started is None else request.started
        reuse = request.reuse or Reuse(new=len(request.generation.prompt))
        usage = replace(
            request.generation.usage,
            cached_tokens=reuse.hit,
            reuse=reuse,
            completion_tokens=request.sampled,
            queue_time=started - request.submitted,
            prefill_time=(now if first is None else first) - started,
            decode_time=0.0 if first is None else now - first,
            guessed_tokens=request.odds.guesses if request.odds else 0,
            accepted_tokens=request.odds.hits if request.odds else 0,
        )
        self._set_aside(request)
        request.generation._end(reason, usage, error)
