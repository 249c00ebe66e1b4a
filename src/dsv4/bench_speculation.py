"""``dsv4 bench speculation``: what guesses of the MTP block gain or cost.

Two engines in this process, one that may guess and one that may not, answer the same requests in
turns, first the one, then the other, and the other way round in the next round. Prompts are new in
each round. Workloads:

    dialogue     held-out talk, turn by turn, greedy    v4-nano
    sampled      the same at temperature 1              v4-nano
    arithmetic   held-out sums with their reasoning     v4-nano
    recall       a fact out of 500 tokens               v4-nano
    random       a checkpoint of random weights         shape small: guesses are hardly ever right

each for one user, who asks one thing after the other, and for eight at once. ``ratio`` is the
median over the rounds of tokens per second with guesses by those without, and ``low`` and ``high``
its extremes. A round before the first is not timed; the engine that guesses learns in it what
passes take, as it does once in the life of a server. ``expert_bytes`` are those of the different
experts that passes read, per token of the answers, counted in a round of its own. Answers have to
be the same, token by token and bit by bit, or the bench fails.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from . import __version__, kernels
from .api import Model, load
from .bench import measure_machine
from .checkpoint import save_checkpoint
from .encoding import encode_segments
from .engine import Engine, Generation, SamplingParams, Token
from .engine.speculate import Weights
from .errors import DSV4Error
from .evals.tasks import instance
from .model import Gate
from .synth import shape, synthesize
from .train.generators.document import rng_for
from .train.generators.talk import dialogue

Report = dict[str, Any]
Request = tuple[list[int], SamplingParams]
REQUESTS = 16  # of a round, and half of them for one user
USERS = (1, 8)


class Workload(NamedTuple):
    """Its name, and by a round's number the requests of that round, as many as wanted."""

    name: str
    requests: Callable[[int, int], list[Request]]


def run(
    *,
    rounds: int = 7,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure all workloads. Returns the receipt: ``machine``, ``settings`` and ``cases``.

    DSV4Error when an answer changes.
    """
    before = torch.get_num_threads()
    threads = threads or before
    cases: list[Report] = []
    say("measuring the machine")
    machine = measure_machine(threads)
    torch.set_num_threads(threads)
    try:
        nano = load("v4-nano")
        for workload in _talk(nano):
            cases += _measure(nano, workload, rounds, say)
        with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
            folder = Path(scratch, "small")
            say("writing a random model of shape small")
            save_checkpoint(folder, shape("small"), synthesize(shape("small")))
            small = load(folder)
            cases += _measure(small, _random(small), rounds, say)
    finally:
        torch.set_num_threads(before)
    return {
        "dsv4": __version__,
        "kernels": kernels.NATIVE,
        "machine": machine,
        "settings": {"rounds": rounds, "requests": REQUESTS, "threads": threads},
        "cases": cases,
    }


def _talk(model: Model) -> list[Workload]:
    def encode(messages: list[dict[str, Any]], mode: str) -> list[int]:
        assert model.tokenizer is not None
        return model.tokenizer.encode_segments(encode_segments(messages, mode))

    def task(name: str, limit: int) -> Callable[[int, int], list[Request]]:
        def requests(number: int, count: int) -> list[Request]:
            asked = [instance(name, number, i) for i in range(count)]
            return [
                (encode(a.messages, "chat" if a.thinking == "off" else "thinking"),
                 SamplingParams(limit, 0))
                for a in asked
            ]  # fmt: skip

        return requests

    def talk(temperature: float) -> Callable[[int, int], list[Request]]:
        def requests(number: int, count: int) -> list[Request]:
            out: list[Request] = []
            while len(out) < count:
                said = dialogue(rng_for("bench", number, len(out)), "heldout").messages
                ends = [i for i, message in enumerate(said) if message["role"] == "assistant"]
                out += [
                    (encode(said[:end], "chat"), SamplingParams(80, temperature, seed=end))
                    for end in ends
                ]
            return out[:count]

        return requests

    return [
        Workload("dialogue", talk(0)),
        Workload("sampled", talk(1)),
        Workload("arithmetic", task("addition_subtraction", 100)),
        Workload("recall", task("recall_500", 40)),
    ]


def _random(model: Model) -> Workload:
    def requests(number: int, count: int) -> list[Request]:
        random, vocab = Random(number), model.config.vocab_size
        params = SamplingParams(48, 0, stop_token_ids=())
        return [([random.randrange(vocab) for _ in range(32)], params) for _ in range(count)]

    return Workload("random", requests)


def _measure(
    model: Model, workload: Workload, rounds: int, say: Callable[[str], object]
) -> list[Report]:
    cases = []
    for users in USERS:
        modes = {"off": False, "on": True}
        engines = {mode: Engine(model, speculate=on) for mode, on in modes.items()}
        speeds: dict[str, list[float]] = {mode: [] for mode in modes}
        expert_bytes: dict[str, float] = {}
        tokens = 0
        try:
            for number in range(rounds + 2):
                say(f"{workload.name}, {users} at once, round {number} of {rounds}")
                count = REQUESTS if users > 1 else REQUESTS // 2
                requests = workload.requests(number, count)
                counted = number == rounds + 1
                answers = {}
                for mode in modes if number % 2 else reversed(modes):
                    with _experts_counted(model, counted) as read:
                        start = time.perf_counter()
                        answers[mode] = _ask(engines[mode], requests, users)
                        seconds = time.perf_counter() - start
                    made = sum(map(len, answers[mode]))
                    if counted:
                        expert_bytes[mode] = read[0] / made
                    elif number:
                        speeds[mode].append(made / seconds)
                        tokens += made * (mode == "on")
                if kernels.NATIVE and answers["on"] != answers["off"]:
                    raise DSV4Error(
                        f"{workload.name}: an answer changed with speculation",
                        expected="the same tokens and logprobs, bit for bit",
                    )
            stats = engines["on"].stats()
        finally:
            for engine in engines.values():
                engine.close()
        ratios = [on / off for on, off in zip(speeds["on"], speeds["off"], strict=True)]
        cases.append({
            "workload": workload.name,
            "users": users,
            "tokens": tokens,
            "tokens_per_s": {mode: statistics.median(s) for mode, s in speeds.items()},
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "guessed": stats.guessed_tokens,
            "accepted": stats.accepted_tokens,
            "expert_bytes": expert_bytes,
        })  # fmt: skip
    return cases


def _ask(engine: Engine, requests: Sequence[Request], users: int) -> list[list[Token]]:
    """The answers; a user asks again when answered."""
    waiting, running, answers = list(requests), list[Generation](), []
    while waiting or running:
        while waiting and len(running) < users:
            prompt, params = waiting.pop(0)
            running.append(engine.submit(prompt, replace(params, logprobs=0)))
        answers.append(list(running.pop(0)))
    return answers


@contextmanager
def _experts_counted(model: Model, wanted: bool) -> Iterator[list[float]]:
    """Bytes of the different experts that each layer reads in each pass, if that is wanted."""
    read = [0.0]
    each = Weights(model.config).expert_bytes(1) / (
        model.config.num_hidden_layers * model.config.num_experts_per_tok
    )

    def count(gate: torch.nn.Module, inputs: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        read[0] += out[0].unique().numel() * each

    gates = [m for m in model.net.modules() if isinstance(m, Gate)] if wanted else []
    hooks = [gate.register_forward_hook(count) for gate in gates]
    model.net.tapes.off = wanted  # what is on a tape passes no hook
    try:
        yield read
    finally:
        model.net.tapes.off = False
        for hook in hooks:
            hook.remove()
