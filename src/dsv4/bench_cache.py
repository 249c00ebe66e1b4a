"""``dsv4 bench cache``: how much of a prompt is computed again, and how soon the answer begins.

One engine in this process; each case is a request after the ones before it:

    cold         a prompt nobody has seen
    regenerated  the same prompt again
    appended     the prompt, its answer and 50 tokens more
    edited       the prompt with one token changed in its middle
    restarted    the same prompt in a new engine that has nothing but the disk
    chat         twenty turns, each of which drops the reasoning of the one before

``computed`` are the prompt's tokens that went through the model, ``seconds`` the time to the first
token, ``sooner`` how many times sooner than cold. Beside ours stand ``peers`` where asked for:
llama-server on the same weights in the same run, asked the same but for the chat.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import __version__, kernels
from .api import Model, find_model, load
from .bench import commit, measure_machine
from .checkpoint import save_checkpoint
from .engine import Engine, Generation, SamplingParams
from .engine.disk import DiskTier
from .errors import ConfigError
from .synth import shape, small_tokenizer, synthesize

Report = dict[str, Any]
ANSWER, APPENDED, TURNS = 32, 50, 20
DISK = 8 << 30  # bytes


def run(
    model: str | Path = "v4-nano",
    *,
    synth: str | None = None,
    prompt: int = 8192,
    threads: int | None = None,
    against: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure ``model`` (a name or a folder), or a random one of the shape ``synth``; ``against``
    "llama.cpp" too, which is built the first time.

    Returns the receipt: ``machine``, ``settings`` and ``cases``. Raises ConfigError when the
    context does not hold the prompt and what follows it, and for another peer.
    """
    if against not in (None, "llama.cpp"):
        raise ConfigError("--against", expected="llama.cpp", got=against)
    before = torch.get_num_threads()
    threads = threads or before
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        folder = find_model(model) if synth is None else Path(scratch, synth)
        if synth is not None:
            say(f"writing a random model of shape {synth}")
            config = shape(synth)
            save_checkpoint(
                folder, config, synthesize(config), extra_files=small_tokenizer(config)
            )
        loaded = load(folder)
        room = loaded.config.max_position_embeddings - 2 * ANSWER - APPENDED
        if not 4 <= prompt <= room:
            raise ConfigError("--prompt", expected=f"4 to {room}", got=prompt)
        say("measuring the machine")
        machine = measure_machine(threads)
        torch.set_num_threads(threads)
        try:
            cases, asked = _cases(loaded, Path(scratch, "cache"), prompt, say)
            if against is not None:
                _llama(folder, Path(scratch), threads, cases, asked, say)
        finally:
            torch.set_num_threads(before)
    return {
        "dsv4": __version__,
        "commit": commit(),
        "model": synth or folder.resolve().name,
        "kernels": kernels.NATIVE,
        "machine": machine,
        "settings": {"prompt": prompt, "answer": ANSWER, "turns": TURNS, "threads": threads},
        "cases": cases,
    }


def _cases(
    model: Model, folder: Path, length: int, say: Callable[[str], object]
) -> tuple[list[Report], dict[str, list[int]]]:
    """The cases, and what was asked in each but the chat."""
    random, vocab = Random(0), model.config.vocab_size
    prompt = [random.randrange(vocab) for _ in range(length)]
    middle = length // 2
    edited = [*prompt[:middle], (prompt[middle] + 1) % vocab, *prompt[middle + 1 :]]
    cases, asked = list[Report](), dict[str, list[int]]()

    def case(name: str, ids: list[int]) -> list[int]:
        say(name)
        asked[name] = ids
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
    return cases, asked


def _llama(
    folder: Path, scratch: Path, threads: int, cases: Sequence[Report],
    asked: Mapping[str, Sequence[int]], say: Callable[[str], object],
) -> None:  # fmt: skip
    """llama-server's seconds to the first token of what was asked, by its own clock."""
    from . import peers
    from .bench_engines import LlamaCpp

    peers.llama_server(say)
    server = LlamaCpp(peers.weights("llama.cpp", folder, scratch, say), threads)
    answer: list[int] = []
    try:
        for case in cases:
            name = case["name"]
            if name not in asked:
                continue
            say(f"{name}: llama.cpp")
            ids = list(asked[name])
            if name == "appended":  # to an answer of its own
                ids = [*asked["cold"], *answer, *ids[-APPENDED:]]
            if name == "restarted":
                server.close()
            answer, computed, seconds = server.first_token(ids, ANSWER)
            case["peers"] = {"llama.cpp": {"computed": computed, "seconds": seconds}}
    finally:
        server.close()


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
