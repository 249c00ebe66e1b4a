"""Every answer goes through the books: what each surface asks of a backend is metered here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .accounts import AccountError, Caller
from .backend import Answer, Backend, ChatRequest, Event, FillRequest, Finish, Usage
from .database import LOCAL
from .ledger import Ledger, Reservation
from .logs import event as log_event
from .metrics import Metrics
from .prices import dollars

T = TypeVar("T")


@dataclass
class Visit:
    """One HTTP request on its way through the server: whose it is, and what it came to."""

    id: str = ""
    caller: Caller = field(default_factory=Caller)
    started: float = field(default_factory=time.monotonic)
    answers: int = 0  # begun: several choices are several answers to one prompt
    cost: int = 0  # picodollars, of those that have ended
    facts: dict[str, Any] = field(default_factory=dict)  # for the log's line


VISIT: ContextVar[Visit | None] = ContextVar("VISIT", default=None)


def visit() -> Visit:
    """The HTTP request that is being answered."""
    return VISIT.get() or Visit()


class Metered:
    """A backend whose answers are paid for as ``model``.

    An answer is reserved before work begins (AccountError when the caller's limits are reached)
    and settled before its ``Finish`` is passed on. One that ends early, because the client left
    or something failed, costs what was computed until then; nothing before its first token.
    Of the answers that one HTTP request asks for the first one pays for the prompt.
    """

    def __init__(
        self,
        backend: Backend,
        model: str,
        ledger: Ledger,
        metrics: Metrics,
        log_prompts: bool = False,
    ) -> None:
        self._backend, self._model = backend, model
        self._ledger, self._metrics = ledger, metrics
        self._log_prompts = log_prompts
        self.model = backend.model
        self.load, self.close = backend.load, backend.close
        self.count_tokens = backend.count_tokens

    async def chat(self, request: ChatRequest | FillRequest) -> Answer:
        asked = visit()
        pays_prompt = not asked.answers
        asked.answers += 1
        if self._log_prompts and pays_prompt:
            log_event("prompt", request_id=asked.id, request=request)
        most = request.sampling.max_tokens or self.model.max_output_tokens
        prompt = await self._longest(request) if asked.caller.limited and pays_prompt else 0
        try:
            reservation = await _finished(
                lambda: self._ledger.reserve(
                    asked.caller,
                    request=asked.id,
                    model=self._model,
                    served=self.model.id,
                    prompt_tokens=prompt,
                    max_tokens=min(most, self.model.max_output_tokens),
                )
            )
        except AccountError as error:
            self._metrics.refused.labels(error.status).inc()
            raise
        bill = _Bill(self, asked, reservation, pays_prompt)
        try:
            if asked.caller.limited:
                sampling = replace(request.sampling, max_tokens=reservation.max_tokens)
                request = replace(request, sampling=sampling)
            if isinstance(request, ChatRequest) and asked.caller.id != LOCAL:
                # nothing remembered crosses from one key to another
                request = replace(request, namespace=f"{asked.caller.id} {request.namespace}")
            answer = await self._backend.chat(request)
        except BaseException:
            await bill.settle(Usage(), "refused")
            raise
        return Answer(
            bill.events(answer),
            lambda: bill.close(answer),
            lambda: answer.usage,
            lambda: answer.prefilled,
        )

    async def _longest(self, request: ChatRequest | FillRequest) -> int:
        """The prompt's tokens, or more."""
        if isinstance(request, ChatRequest):
            return await self.count_tokens(request)
        return len(f"{request.prompt}{request.suffix or ''}".encode()) + 8  # a token has a byte

    async def write(self, charge: int, asked: Visit, usage: Usage, outcome: str) -> None:
        """Settle a charge, and say so in the metrics and the log's line."""
        miss = usage.prompt_tokens - usage.cached_tokens
        tokens = {
            "hit_tokens": usage.cached_tokens, "miss_tokens": miss,
            "output_tokens": usage.completion_tokens,
        }  # fmt: skip
        facts = {"model": self._model, "served": self.model.id, "outcome": outcome}
        try:
            cost = await _finished(
                lambda: self._ledger.settle(
                    charge,
                    hit=usage.cached_tokens,
                    miss=miss,
                    output=usage.completion_tokens,
                    outcome=outcome,
                )
            )
        except Exception as error:  # the answer is there: it is not taken away for this
            self._metrics.ledger_failures.inc()
            log_event(
                "not in the books", logging.ERROR, exc_info=error, charge=charge,
                request_id=asked.id, caller=asked.caller.id, **facts, **tokens,
            )  # fmt: skip
            return
        self._metrics.answered(self._model, usage, cost, outcome)
        asked.cost += cost
        sums = {name: asked.facts.get(name, 0) + count for name, count in tokens.items()}
        asked.facts |= facts | sums | {"cost_usd": dollars(asked.cost)}

    def first(self, asked: Visit) -> None:
        self._metrics.first.labels(self._model).observe(time.monotonic() - asked.started)


class _Bill:
    """Settles one charge, once, however its answer ends."""

    def __init__(
        self, metered: Metered, asked: Visit, reservation: Reservation, pays_prompt: bool
    ) -> None:
        self._metered, self._asked, self._reservation = metered, asked, reservation
        self._pays_prompt, self._settled = pays_prompt, False

    async def events(self, answer: Answer) -> AsyncGenerator[Event, None]:
        begun = False
        try:
            async for event in answer:
                if isinstance(event, Finish):
                    await self.settle(event.usage, event.reason)
                elif not begun:
                    begun = True
                    self._metered.first(self._asked)
                yield event
        except Exception:
            await self.settle(answer.usage, "error")
            raise

    async def close(self, answer: Answer) -> None:
        try:
            await answer.aclose()
        finally:
            await self.settle(answer.usage, "cancelled")

    async def settle(self, usage: Usage, outcome: str) -> None:
        if not self._settled:
            self._settled = True
            if not self._pays_prompt:
                usage = replace(usage, prompt_tokens=0, cached_tokens=0)
            await self._metered.write(self._reservation.charge, self._asked, usage, outcome)


async def _finished(work: Callable[[], T]) -> T:
    """``work`` in a thread; once begun it is finished, even if the caller is cancelled."""
    return await asyncio.shield(asyncio.to_thread(work))
