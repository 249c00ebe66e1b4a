"""What a fleet is asked to do: requests from a trace, or conversations from distributions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError


class Request(NamedTuple):
    """One request: ``arrival`` in seconds, tokens of prompt and answer, and whose it is.

    Requests of one ``session`` (0 and up) extend each other: a prompt begins with the session's
    prompt and answer before it. -1 stands alone. The first ``shared`` tokens of the prompt are
    the same in every request.
    """

    arrival: float
    prompt: int
    output: int
    session: int = -1
    shared: int = 0


@dataclass(frozen=True)
class Workload:
    """Conversations that begin at random (Poisson); lengths are log-normal around their medians.

    ``rate`` is in requests per second. A conversation has ``turns`` requests on average
    (geometric); each adds ``message`` tokens of the user to all that was said, after a pause of
    ``think`` seconds on average. ``system`` tokens open every prompt. ``spread`` is the sigma of
    the logarithms. Raises ConfigError for numbers that describe no traffic.
    """

    rate: float
    message: int = 1000
    output: int = 300
    turns: float = 4.0
    think: float = 20.0
    system: int = 0
    spread: float = 1.0

    def __post_init__(self) -> None:
        ok = self.rate > 0 and self.message >= 1 and self.output >= 1 and self.turns >= 1
        if not (ok and min(self.think, self.system, self.spread) >= 0):
            raise ConfigError(
                "workload",
                expected="rate > 0, message, output and turns >= 1, the others >= 0",
                got=self,
            )

    def requests(self, seconds: float, longest: int, seed: int = 0) -> list[Request]:
        """All requests that arrive within ``seconds``, in order; the same for the same seed.

        Conversations are already under way at the start. A prompt and its answer never exceed
        ``longest`` tokens: the conversation ends before.
        """
        random = np.random.default_rng(seed)
        warm = 8 * self.think * self.turns  # longer than all but a few conversations last
        begin, session, found = -warm, 0, list[Request]()
        while True:
            begin += random.exponential(self.turns / self.rate)
            if begin > seconds:
                return sorted(found)
            at, history = begin, self.system
            for _ in range(random.geometric(1 / self.turns)):
                message = self._length(random, self.message)
                output = self._length(random, self.output)
                if history + message + output > longest:
                    break
                if 0 <= at <= seconds:
                    found.append(Request(at, history + message, output, session, self.system))
                history += message + output
                at += random.exponential(self.think) if self.think else 0.0
            session += 1

    def _length(self, random: np.random.Generator, median: int) -> int:
        return max(1, round(median * math.exp(self.spread * random.standard_normal())))


def read_trace(path: str | Path) -> list[Request]:
    """A trace: one JSON object a line with ``arrival`` (s), ``prompt``, ``output`` (tokens) and
    perhaps ``session`` and ``shared``. Raises ConfigError that names the line."""
    found = list[Request]()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the trace {path}", expected="a JSONL file", got=e) from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            request = Request(
                float(entry["arrival"]), int(entry["prompt"]), int(entry["output"]),
                int(entry.get("session", -1)), int(entry.get("shared", 0)),
            )  # fmt: skip
            good = request.arrival >= 0 and request.prompt >= 1 and request.output >= 1
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise ConfigError(
                f"{path}, line {number}",
                expected='{"arrival": 0.0, "prompt": 100, "output": 20}',
                got=line[:100],
            )
        found.append(request)
    if not found:
        raise ConfigError(f"the trace {path} is empty", expected="at least one request")
    return sorted(found)


def percentiles(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The 50th, 95th and 99th percentile of weighted ``values``; NaN where there are none."""
    if not values:
        return [math.nan] * 3
    order = np.argsort(values)
    given = np.ones(len(values)) if weights is None else np.asarray(weights)
    below = np.cumsum(given[order])
    at = np.searchsorted(below, np.array([0.5, 0.95, 0.99]) * below[-1])
    return [float(np.asarray(values)[order][min(i, len(order) - 1)]) for i in at]
