"""The simulation beside a real server: calibrate on single requests, replay a trace, compare.

The calibration sends one request at a time and fits what a prompt token and a generated token
cost. It knows nothing of several requests at once: their queueing and interference is what the
simulation predicts and the replay tests.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from ..errors import ConfigError, DSV4Error
from .fleet import MeasuredCosts, Serving, simulate
from .workload import Request, percentiles

LENGTHS = (16, 128, 512, 1024)  # prompt tokens of the calibration
ANSWER = 24
WORDS = "time year people way day man thing woman life child world school state family".split()


@dataclass
class Served:
    """One answered request, as its client saw it; times in seconds from the trace's start."""

    request: Request  # with the token counts that the server reports
    sent: float = 0.0
    times: list[float] = field(default_factory=list)  # when pieces of the answer came

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def ask(
    client: httpx.AsyncClient, request: Request, begin: float, seed: int, per_word: float
) -> Served:
    """Send a prompt of about ``request.prompt`` tokens and read the stream to its end.

    Raises DSV4Error when the server refuses or says nothing.
    """
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(max(1, round(request.prompt / per_word)))]
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"{seed} {' '.join(words)}"}],
        "max_tokens": request.output,
        "thinking": {"type": "disabled"},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    served, usage = Served(request, time.perf_counter() - begin), dict[str, Any]()
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode(errors="replace")
            raise DSV4Error("the server refused", expected="status 200", got=text[:300])
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            deltas = [choice["delta"] for choice in chunk["choices"]]
            if any(d.get("content") or d.get("reasoning_content") for d in deltas):
                served.times.append(time.perf_counter() - begin)
    if not served.times or not usage:
        raise DSV4Error("the server sent no answer", expected="tokens and usage", got=usage)
    served.request = Request(
        served.sent, usage["prompt_tokens"], max(1, usage["completion_tokens"])
    )
    return served


async def calibrate(client: httpx.AsyncClient, repeats: int = 2) -> tuple[MeasuredCosts, float]:
    """What single requests cost, and the tokens per word of our prompts."""
    begin, per_word, seen = time.perf_counter(), 1.0, list[Served]()
    first = await ask(client, Request(0, 200, 2), begin, 10**6, 1.0)
    per_word = first.request.prompt / 200
    for repeat in range(repeats):
        for i, length in enumerate(LENGTHS):
            seed = 10**6 + 100 * repeat + i + 1
            seen.append(await ask(client, Request(0, length, ANSWER), begin, seed, per_word))
    n = np.array([s.request.prompt for s in seen], dtype=float)
    ttft = np.array([s.ttft for s in seen])
    # seconds = latency + tokens * prompt; growth with length is below the noise at such lengths
    slope, latency = np.polyfit(n, ttft, 1)
    token = statistics.median(
        (s.times[-1] - s.times[0]) / (s.request.output - 1) for s in seen if s.request.output > 4
    )
    return MeasuredCosts(
        prompt=max(0.0, float(slope)),
        prompt_growth=0.0,
        token=token,
        token_growth=0.0,
        latency=max(0.0, float(latency)),
    ), per_word


async def _replay(url: str, trace: Sequence[Request]) -> tuple[MeasuredCosts, list[Served]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        costs, per_word = await calibrate(client)
        begin = time.perf_counter()

        async def one(number: int, request: Request) -> Served:
            await asyncio.sleep(max(0.0, begin + request.arrival - time.perf_counter()))
            return await ask(client, request, begin, number, per_word)

        served = await asyncio.gather(*(one(i, r) for i, r in enumerate(trace)))
    return costs, served


def measure(url: str, trace: Sequence[Request], serving: Serving) -> dict[str, Any]:
    """Replay ``trace`` on the server at ``url`` in real time, and simulate what it was asked.

    Lengths are those the server reports, so that both sides did the same work. Raises DSV4Error
    when there is no such server or it refuses.
    """
    try:
        costs, served = asyncio.run(_replay(url, trace))
    except httpx.HTTPError as e:
        raise ConfigError(
            f"no answer from {url}", expected="a server", got=repr(e), hint="dsv4 serve"
        ) from e
    requests = sorted(s.request for s in served)
    predicted = simulate(requests, costs, serving)
    latency = costs.latency
    ttft = {key: value + latency for key, value in predicted["ttft"].items()}
    tokens = sum(r.output for r in requests)
    names = ("p50", "p95", "p99")
    found: dict[str, Any] = {
        "ttft": dict(zip(names, percentiles([s.ttft for s in served]), strict=True)),
        "inter_token": dict(
            zip(names, percentiles([g for s in served for g in s.gaps]), strict=True)
        ),
        "output_tokens_per_second": tokens / max(s.times[-1] for s in served),
    }
    expected = {
        "ttft": ttft,
        "inter_token": predicted["inter_token"],
        "output_tokens_per_second": predicted["output_tokens_per_second"],
    }
    error = {
        "ttft_p50": ttft["p50"] / found["ttft"]["p50"] - 1,
        "output_tokens_per_second": expected["output_tokens_per_second"]
        / found["output_tokens_per_second"]
        - 1,
    }
    return {
        "requests": len(requests),
        "calibration": {
            key: getattr(costs, key) for key in ("prompt", "token", "latency")
        },
        "measured": found,
        "predicted": expected,
        "error": error,
    }
