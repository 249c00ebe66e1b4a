"""``dsv4 bench cache``: how much of a prompt is computed again, and how soon the answer begins.

One engine in this process; each case is a request after the ones before it:

    cold         a prompt nobody has seen
    regenerated  the same prompt again
    appended     the prompt, its answer and 50 tokens more
    edited       the prompt with one token changed in its middle
    restarted    the same prompt in a new engine that has nothing but the disk
    chat         twenty turns, each of which drops the reasoning of the one before

``computed`` are the prompt's tokens that went through the model, ``seconds`` the time to the first
token, ``sooner`` how many times sooner than cold. Where another program's seconds were recorded on
another machine, they stand beside ours (``recorded``).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import __version__, kernels
from .api import Model, find_model, load
from .bench import measure_machine
from .checkpoint import save_checkpoint
from .engine import Engine, Generation, SamplingParams
from .engine.disk import DiskTier
from .errors import ConfigError
from .synth import shape, synthesize

Report = dict[str, Any]
# Seconds to the first token of llama-server b11434 on the shape and prompt for which they were
# measured: two Xeon cores, the best of its runs.
RECORDED_SHAPE, RECORDED_PROMPT = "small", 8192
RECORDED = {
    "cold": 30.0, "regenerated": 0.06, "appended": 0.08, "edited": 33.7, "restarted": 34.0
}  # fmt: skip
ANSWER, APPENDED, TURNS = 32, 50, 20
DISK = 8 << 30  # bytes


def run(
    model: str | Path = "v4-nano",
    *,
    synth: str | None = None,
    prompt: int = 8192,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure ``model`` (a name or a folder), or a random one of the shape ``synth``.

    Returns the receipt: ``machine``, ``settings`` and ``cases``. Raises ConfigError when the
    context does not hold the prompt and what follows it.
    """
    before = torch.get_num_threads()
    threads = threads or before
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        folder = find_model(model) if synth is None else Path(scratch, synth)
        if synth is not None:
            say(f"writing a random model of shape {synth}")
            save_checkpoint(folder, shape(synth), synthesize(shape(synth)))
        loaded = load(folder)
        room = loaded.config.max_position_embeddings - 2 * ANSWER - APPENDED
        if not 4 <= prompt <= room:
            raise ConfigError("--prompt", expected=f"4 to {room}", got=prompt)
        say("measuring the machine")
        machine = measure_machine(threads)
        torch.set_num_threads(threads)
        try:
            cases = _cases(loaded, Path(scratch, "cache"), prompt, say)
            if (synth, prompt) == (RECORDED_SHAPE, RECORDED_PROMPT):
                for case in cases:
                    case["recorded"] = RECORDED.get(case["name"])
        finally:
            torch.set_num_threads(before)
    return {
        "dsv4": __version__,
        "model": synth or folder.resolve().name,
        "kernels": kernels.NATIVE,
        "machine": machine,
        "settings": {"prompt": prompt, "answer": ANSWER, "turns": TURNS, "threads": threads},
        "cases": cases,
    }


def _cases(
    model: Model, folder: Path, length: int, say: Callable[[str], object]
) -> list[Report]:
    random, vocab = Random(0), model.config.vocab_size
    prompt = [random.randrange(vocab) for _ in range(length)]
    middle = length // 2
    edited = [*prompt[:middle], (prompt[middle] + 1) % vocab, *prompt[middle + 1 :]]
    cases: list[Report] = []

    def case(name: str, ids: list[int]) -> list[int]:
        say(name)
        generation, seconds = _ask(engine, ids)
        cached = generation.usage.cached_tokens
        found = {"name": name, "prompt": len(ids), "computed": len(ids) - cached}
        cases.append(found | {"seconds": seconds, "sooner": cases[0]["seconds"] / seconds
                              if cases else 1.0})  # fmt: skip
        return generation.tokens

    with _engine(model, folder) as engine:
        answer = case("cold", prompt)
        case("regenerated", prompt)
        case("appended", [*prompt, *answer, *(random.randrange(vocab) for _ in range(APPENDED))])
        case("edited", edited)
    with _engine(model, folder) as engine:
        case("restarted", prompt)
        cases.append(_chat(engine, Random(1), vocab, max(2, length // TURNS), say))
    return cases


def _chat(
    engine: Engine, random: Random, vocab: int, turn: int, say: Callable[[str], object]
) -> Report:
    """Each turn has ``turn`` tokens of the user; half of each answer is reasoning."""
    history: list[int] = []
    computed = total = 0
    seconds = 0.0
    for i in range(TURNS):
        say(f"chat, turn {i + 1} of {TURNS}")
        history += [random.randrange(vocab) for _ in range(turn)]
        generation, first = _ask(engine, history)
        total += len(history)
        computed += len(history) - generation.usage.cached_tokens
        seconds += first
        history += generation.tokens[ANSWER // 2 :]
    return {"name": "chat", "prompt": total, "computed": computed, "seconds": seconds,
            "sooner": None}  # fmt: skip


def _engine(model: Model, folder: Path) -> Engine:
    return Engine(model, disk=DiskTier(folder, model.fingerprint(), DISK))


def _ask(engine: Engine, ids: list[int]) -> tuple[Generation, float]:
    """The finished answer, and the seconds until its first token."""
    params = SamplingParams(max_tokens=ANSWER, temperature=0, stop_token_ids=())
    start = time.perf_counter()
    generation = engine.submit(ids, params)
    next(iter(generation))
    seconds = time.perf_counter() - start
    generation.result()
    return generation, seconds
