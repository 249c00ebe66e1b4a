"""A discrete-event simulation of serving: one replica, a few, or ten thousand.

A replica works as the engines do, in steps: every request that decodes gets a token, one that
prefills gets a chunk of its prompt. Steps in which nothing changes are taken together, so events
grow with requests and not with tokens.

Of a fleet at most SIMULATED replicas are simulated, each with its full share of the traffic; more
replicas than that are their mean-field limit: they are statistically alike, and as their number
grows the law of one of them stops depending on it (with any routing here, error of the order of
one over the number simulated). Sums are scaled; percentiles are those of the sample. What does
depend on the number, the chance that a request returns to the replica that knows its session, is
computed for the true number.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
import simpy

from ..config import V4Config
from ..errors import ConfigError
from .roofline import Placement, Speed
from .workload import Request, Workload, percentiles

SIMULATED = 16
ROUTINGS = ("sticky", "least", "random")
GRAIN = 128  # cached prefixes end at multiples of this


class Costs(Protocol):
    """Seconds that work takes on one replica, and the bytes of KV it has and needs."""

    def prefill(self, tokens: int, start: int) -> float:
        """``tokens`` of one prompt after ``start`` earlier ones."""

    def decode(self, users: int, context: float) -> float:
        """One token for each of ``users``, ``context`` tokens long on average."""

    def kv(self, tokens: int) -> float:
        """Bytes of one sequence."""

    @property
    def room(self) -> float:
        """Bytes for the KV of what runs and of what is kept for reuse."""

    @property
    def transfer(self) -> float:
        """Bytes a second from one replica to another."""


class RooflineCosts:
    """From ``roofline``: a model placed on a machine.

    Contexts are rounded up to powers of sqrt(2), so that a simulation asks for few different ones.
    Raises ConfigError when one sequence of ``longest`` tokens has no room beside the weights.
    """

    def __init__(
        self, speed: Speed, place: Placement, longest: int, *, skew: float = 0.0
    ) -> None:
        self._speed, self._place, self._skew = speed, place, skew
        need = speed.device_bytes(place.split, 1, 1, place.on_device)
        free = speed.machine.device.memory * 1e9 - need
        self.room = max(0.0, free) * max(place.split.expert, place.split.pipeline)
        self.transfer = (speed.machine.device.link or 10) * 1e9
        self._decode = lru_cache(maxsize=None)(self._decode_seconds)
        self._prefill = lru_cache(maxsize=None)(self._prefill_seconds)
        if self.room < self.kv(longest):
            raise ConfigError(
                "no room for KV beside the weights",
                expected=f"room for a sequence of {longest:,} tokens",
                got=f"{self.room / 1e9:.2f} GB on {speed.machine.name}",
                hint="more devices, or a smaller quantization",
            )

    def kv(self, tokens: int) -> float:
        return self._speed.kv_of(1, tokens)

    def decode(self, users: int, context: float) -> float:
        return self._decode(users, _rounded(context)) if users else 0.0

    def prefill(self, tokens: int, start: int) -> float:
        return self._prefill(tokens, _rounded(start) if start else 0)

    def _imbalance(self, tokens: int) -> float:
        devices = self._place.split.expert
        return expert_imbalance(self._speed.config, devices, min(tokens, 4096), self._skew)

    def _decode_seconds(self, users: int, context: int) -> float:
        imbalance = self._imbalance(users)
        return self._speed.decode(self._place, users, context, imbalance).total

    def _prefill_seconds(self, tokens: int, start: int) -> float:
        room = self._speed.config.max_position_embeddings - tokens
        start = min(start, room)
        return self._speed.prefill(self._place, tokens, start, self._imbalance(tokens)).total


def _rounded(context: float) -> int:
    return 1 << 20 if context > 1 << 20 else int(2 ** (math.ceil(2 * math.log2(context)) / 2))


@dataclass(frozen=True)
class MeasuredCosts:
    """From a running server: seconds per prompt token (and its growth with position), per
    decode step of one user (and its growth with context), per ``further`` user in it, and per
    prefill step. ``further`` is 0 where all share a step, ``token`` where none does."""

    prompt: float
    prompt_growth: float
    token: float
    token_growth: float
    overhead: float = 0.0  # of a prefill step, whatever its length
    further: float = 0.0
    room: float = math.inf
    transfer: float = math.inf

    def kv(self, tokens: int) -> float:
        return 0.0

    def prefill(self, tokens: int, start: int) -> float:
        growing = self.prompt + self.prompt_growth * (start + tokens / 2)
        return self.overhead + tokens * growing

    def decode(self, users: int, context: float) -> float:
        if not users:
            return 0.0
        return self.token + (users - 1) * self.further + users * self.token_growth * context


@cache
def _popularity(experts: int, skew: float) -> Any:
    weights = np.arange(1, experts + 1) ** -skew
    return np.random.default_rng(0).permutation(weights / weights.sum())


def expert_imbalance(config: V4Config, devices: int, tokens: int, skew: float = 0.0) -> float:
    """Load of the fullest of ``devices`` over the mean, for ``tokens`` routed at once.

    ``skew`` is the exponent of the experts' popularity by rank (0: balanced, as training's bias
    aims at). Mean of 32 random draws, the same ones each time.
    """
    if devices == 1:
        return 1.0
    return _imbalance(
        config.n_routed_experts, config.num_experts_per_tok, devices, tokens, skew
    )


@cache
def _imbalance(experts: int, chosen: int, devices: int, tokens: int, skew: float) -> float:
    random = np.random.default_rng(0)
    loads = random.multinomial(tokens * chosen, _popularity(experts, skew), size=32)
    per_device = loads.reshape(32, devices, -1).sum(-1)
    return float(per_device.max(1).mean() * devices / (tokens * chosen))


# ---------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Serving:
    """How replicas are run: requests computed at once, prompt tokens per step, how requests find
    a replica (ROUTINGS), and the share of replicas that only prefill (0: all do both)."""

    max_running: int = 256
    prefill_chunk: int = 2048
    routing: str = "sticky"
    prefill_share: float = 0.0

    def __post_init__(self) -> None:
        ok = self.max_running >= 1 and self.prefill_chunk >= 1 and 0 <= self.prefill_share < 1
        if not ok or self.routing not in ROUTINGS:
            raise ConfigError(
                "serving",
                expected=f"max_running and prefill_chunk >= 1, prefill_share in [0, 1), routing"
                f" {', '.join(ROUTINGS)}",
                got=self,
            )


@dataclass
class _Job:
    request: Request
    cached: int = 0
    prefilled: int = 0
    given: int = 0

    @property
    def context(self) -> int:
        return self.request.prompt + self.given

    @property
    def left(self) -> int:
        return self.request.output - self.given


@dataclass
class _Record:
    """What the replicas of one simulation have seen."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between tokens ...
    gap_counts: list[float] = field(default_factory=list)  # ... and how many like it
    output: int = 0
    prompt: int = 0
    cached: int = 0
    finished: int = 0
    last: float = 0.0


class _Replica:
    """One engine: a line, what runs, and the sessions it remembers."""

    def __init__(
        self, env: Any, costs: Costs, serving: Serving, record: _Record, keeps: float
    ) -> None:
        self.env, self.costs, self.serving, self.record = env, costs, serving, record
        self.waiting: list[_Job] = []
        self.prefilling: list[_Job] = []
        self.decoding: list[_Job] = []
        self.sessions: OrderedDict[int, int] = OrderedDict()  # session -> tokens remembered
        self.kept = self.used = self.busy = 0.0
        self.shared = 0  # tokens that begin every prompt, once one was computed
        self.keeps = keeps  # the chance that what a session left is here and not elsewhere
        self.random = np.random.default_rng(0)
        self.wake = env.event()
        self.decoders: Sequence[_Replica] = ()  # who decodes what this one prefills, if not itself
        env.process(self.run())

    @property
    def load(self) -> int:
        """Tokens still to be computed here."""
        jobs = (*self.waiting, *self.prefilling, *self.decoding)
        return sum(j.request.prompt - j.prefilled + j.left for j in jobs)

    def submit(self, job: _Job) -> None:
        self.waiting.append(job)
        if not self.wake.triggered:
            self.wake.succeed()

    def run(self) -> Generator[Any, Any, None]:
        while True:
            self._admit()
            if not (self.prefilling or self.decoding):
                self.wake = self.env.event()
                yield self.wake
                continue
            begin = self.env.now
            users = len(self.decoding)
            context = sum(j.context for j in self.decoding) / users if users else 0.0
            step = self.costs.decode(users, context)
            if self.prefilling:
                yield from self._mixed_step(step)
            else:
                yield from self._decode_steps(step)
            self.busy += self.env.now - begin

    def _admit(self) -> None:
        while self.waiting and len(self.prefilling) + len(self.decoding) < self.serving.max_running:
            job = self.waiting[0]
            need = self.costs.kv(job.request.prompt + job.request.output)
            alone = not (self.prefilling or self.decoding)
            if self.used + need > self.costs.room and not alone:
                return
            self.used += need
            del self.waiting[0]
            if job.prefilled < job.request.prompt:
                job.cached = job.prefilled = self._remembered(job.request)
                self.prefilling.append(job)
            else:
                self.decoding.append(job)
            self._forget(self.costs.room - self.used)

    def _mixed_step(self, step: float) -> Generator[Any, Any, None]:
        """A chunk of the first prompt, and a token for each that decodes."""
        job = self.prefilling[0]
        chunk = min(job.request.prompt - job.prefilled, self.serving.prefill_chunk)
        seconds = step + self.costs.prefill(chunk, job.prefilled)
        yield self.env.timeout(seconds)
        self._give(1, seconds)
        job.prefilled += chunk
        if job.prefilled == job.request.prompt:
            del self.prefilling[0]
            job.given = 1
            self.record.ttft.append(self.env.now - job.request.arrival)
            self.record.output += 1
            self.record.prompt += job.request.prompt
            self.record.cached += job.cached
            if job.left == 0:
                self._finish(job)
            elif not self.decoders:
                self.decoding.append(job)
            else:
                self._release(job)
                self.env.process(self._hand_over(job))

    def _decode_steps(self, step: float) -> Generator[Any, Any, None]:
        """As many equal steps as nothing interrupts: an arrival does, at the next step's end."""
        most = min(64, min(job.left for job in self.decoding))
        begin = self.env.now
        self.wake = self.env.event()
        yield self.env.timeout(most * step) | self.wake
        steps = min(most, max(1, math.ceil((self.env.now - begin) / step - 1e-9)))
        if (rest := begin + steps * step - self.env.now) > 0:
            yield self.env.timeout(rest)
        self._give(steps, step)

    def _give(self, steps: int, seconds: float) -> None:
        if not self.decoding:
            return
        self.record.gaps.append(seconds)
        self.record.gap_counts.append(steps * len(self.decoding))
        self.record.output += steps * len(self.decoding)
        for job in self.decoding:
            job.given += steps
        for job in [job for job in self.decoding if job.left == 0]:
            self.decoding.remove(job)
            self._finish(job)

    def _hand_over(self, job: _Job) -> Generator[Any, Any, None]:
        yield self.env.timeout(self.costs.kv(job.context) / self.costs.transfer)
        min(self.decoders, key=lambda replica: replica.load).submit(job)

    def _finish(self, job: _Job) -> None:
        self.record.finished += 1
        self.record.last = self.env.now
        self._release(job)

    def _release(self, job: _Job) -> None:
        """Its KV is no longer needed; it is kept for the session while there is room."""
        self.used -= self.costs.kv(job.request.prompt + job.request.output)
        if job.request.session >= 0:
            known = self.sessions.pop(job.request.session, 0)
            self.kept -= self.costs.kv(known) if known else 0.0
            self.sessions[job.request.session] = job.context
            self.kept += self.costs.kv(job.context)
            self._forget(self.costs.room - self.used)

    def _forget(self, room: float) -> None:
        while self.sessions and self.kept > room:
            _, tokens = self.sessions.popitem(last=False)
            self.kept -= self.costs.kv(tokens)

    def _remembered(self, request: Request) -> int:
        known = self.sessions.get(request.session, 0)
        if known and self.random.random() > self.keeps:
            known = 0
        known, self.shared = max(known, self.shared), max(self.shared, request.shared)
        return min(known, request.prompt - 1) // GRAIN * GRAIN


def simulate(
    requests: Sequence[Request],
    costs: Costs,
    serving: Serving | None = None,
    *,
    replicas: int = 1,
    true_replicas: int | None = None,
    month: float | None = None,
    window: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Serve ``requests`` on ``replicas``, which stand for ``true_replicas`` if that is given.

    Returns throughput of the true number, TTFT and inter-token percentiles in seconds, the shares
    of prompt tokens found in caches and of time spent computing, and, with ``month`` (US$ of one
    replica), the cost per million output tokens. ``window``: count from the first second to the
    second one only, in a system that is under way; otherwise all, until the last answer.
    ``waiting`` is the line at the end: where it is long, the fleet is too small.
    """
    serving = serving or Serving()
    true = true_replicas or replicas
    env, record = simpy.Environment(), _Record()
    random = np.random.default_rng(1)
    prefillers = round(replicas * serving.prefill_share)
    if serving.prefill_share and not 1 <= prefillers < replicas:
        raise ConfigError(
            "replicas that only prefill",
            expected="at least one of them, and one that decodes",
            got=f"{prefillers} of {replicas}",
            hint="more replicas, or --prefill-share 0",
        )
    keeps = 1.0 if serving.routing == "sticky" else replicas / true
    everyone = [_Replica(env, costs, serving, record, keeps) for _ in range(replicas)]
    front = everyone[:prefillers] or everyone
    for replica in everyone[:prefillers]:
        replica.decoders = everyone[prefillers:]

    def route(request: Request) -> _Replica:
        if serving.routing == "sticky" and request.session >= 0:
            return front[request.session % len(front)]
        if serving.routing == "least":
            return min(front, key=lambda replica: replica.load)
        return front[int(random.integers(len(front)))]

    def arrive() -> Generator[Any, Any, None]:
        for request in requests:
            yield env.timeout(request.arrival - env.now)
            route(request).submit(_Job(request))

    env.process(arrive())
    begin = 0.0
    if window is not None:
        begin, end = window
        env.run(until=begin)
        vars(record).update(vars(_Record()))
        for replica in everyone:
            replica.busy = 0.0
        env.run(until=end)
    else:
        env.run()
        end = max(record.last, 1e-9)
    if not record.ttft:
        raise ConfigError(
            "nothing was answered in the time simulated",
            expected="at least one request",
            got=f"{len(requests)} requests, {end - begin:g} s",
            hint="simulate for longer: --seconds 600",
        )
    span = end - begin
    scale = true / replicas
    throughput = record.output / span * scale
    report: dict[str, Any] = {
        "replicas": true,
        "simulated_replicas": replicas,
        "finished": record.finished,
        "waiting": sum(len(replica.waiting) for replica in everyone),
        "requests_per_second": record.finished / span * scale,
        "output_tokens_per_second": throughput,
        "prompt_tokens_per_second": record.prompt / span * scale,
        "cache_hit_rate": record.cached / max(1, record.prompt),
        "busy": sum(replica.busy for replica in everyone) / replicas / span,
        "ttft": named(percentiles(record.ttft)),
        "inter_token": named(percentiles(record.gaps, record.gap_counts)),
    }
    if month is not None and throughput:
        seconds = 730 * 3600
        report["cost_per_million_output"] = month * true / (throughput * seconds) * 1e6
    return report


def grow(
    workload: Workload,
    costs: Costs,
    longest: int,
    nodes: Sequence[int],
    serving: Serving | None = None,
    *,
    seconds: float = 120.0,
    month: float | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``simulate`` for fleets of so many replicas, each with ``workload.rate`` requests a second.

    Counts ``seconds`` after as long a start. At most SIMULATED replicas are simulated; fewer are
    watched for longer, so that every fleet is judged by as many requests.
    """
    if not nodes or min(nodes) < 1 or seconds <= 0:
        raise ConfigError(
            "a fleet", expected="at least one node and some seconds", got=f"{nodes}, {seconds}"
        )
    reports = []
    for true in nodes:
        few = min(true, SIMULATED)
        traffic = replace(workload, rate=workload.rate * few)
        end = seconds + seconds * SIMULATED / few
        requests = traffic.requests(end, longest, seed)
        window = (seconds, end)
        reports.append(
            simulate(
                requests, costs, serving, replicas=few, true_replicas=true, month=month,
                window=window,
            )
        )  # fmt: skip
    return reports


def named(values: Iterable[float]) -> dict[str, float | None]:
    """Percentiles by name; None where nothing happened (an answer of one token has no gaps)."""
    numbers = (None if math.isnan(value) else value for value in values)
    return dict(zip(("p50", "p95", "p99"), numbers, strict=True))
