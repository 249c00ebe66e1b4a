"""``dsv4 bench train``: training steps beside the machine's matmul rate and another implementation.

Both train the same shape on the same tokens, each in a process of its own and in turns: ours with
our losses, Muon and AdamW in bfloat16, transformers as its users do it (autocast to bfloat16,
AdamW). What a step needs is the matrix products of the model alone (``planner.training_flops``);
what the optimizer's Newton-Schulz iterations add is told apart.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .bench import (
    PEERS,
    Process,
    Report,
    answer_questions,
    measure_machine,
)
from .config import V4Config
from .engine import memory
from .engine.memory import forget_peak, peak_bytes
from .errors import ConfigError
from .planner import training_bytes, training_flops, training_peak_bytes
from .synth import resize
from .train.initial import init_weights

# Small models of every part of V4, without MTP, which transformers does not train.
SHAPES: dict[str, dict[str, Any]] = {
    "25m": {"n_routed_experts": 32, "num_experts_per_tok": 4},
    "nano": {},
}


def shape(name: str) -> V4Config:
    """The configuration of a shape; ConfigError for an unknown name."""
    if name not in SHAPES:
        raise ConfigError("no such training shape", expected=", ".join(SHAPES), got=name)
    nano = V4Config.preset("nano")
    layers = nano.compress_ratios[: nano.num_hidden_layers]
    changes = SHAPES[name] | {"num_nextn_predict_layers": 0, "compress_ratios": layers}
    return replace(resize(nano, **changes), expert_dtype="bf16", quantization_config=None)


def run(
    name: str = "25m",
    *,
    against: str | None = None,
    samples: int = 2,
    length: int = 2048,
    repeats: int = 5,
    recompute: bool = False,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Time ``repeats`` training steps of ``samples`` sequences of ``length`` tokens.

    With ``recompute`` ours computes activations again for the gradient.

    Returns the receipt: ``model``, ``machine``, ``settings``, ``engines`` (median, lowest and
    highest ``tokens_per_s``, ``of_matmul``: the share of the BF16 matmul rate, ``peak_bytes``
    added), ``planned_peak_bytes`` of ours and, with ``against``, the ``ratio`` of speeds. Raises
    ConfigError for an unknown shape or peer and DSV4Error when a process that measures dies.
    """
    if against is not None and against not in PEERS:
        raise ConfigError("bench against", expected=" or ".join(PEERS), got=against)
    if against is not None and importlib.util.find_spec(against) is None:
        raise ConfigError(f"{against} is not installed", hint="pip install 'transformers>=5.16'")
    config = shape(name)
    threads = threads or torch.get_num_threads()
    say("measuring the machine")
    machine = measure_machine(threads)
    names = ["dsv4", *([against] if against else [])]
    seconds: dict[str, list[float]] = {engine: [] for engine in names}
    last: dict[str, Report] = {}
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        Path(scratch, "config.json").write_text(json.dumps(config.to_dict()))
        arguments = (scratch, samples, length, int(recompute))
        engines = [
            Process(e, "dsv4.bench_training", arguments, threads, Path(scratch)) for e in names
        ]
        try:
            for i in range(-1, repeats):  # the first step of each is not counted
                for engine in engines if i % 2 == 0 else engines[::-1]:
                    say(f"{engine.name}: step {i + 1} of {repeats}")
                    last[engine.name] = engine.ask("step")
                    if i >= 0:
                        seconds[engine.name].append(last[engine.name]["seconds"])
        finally:
            for engine in engines:
                engine.close()
    tokens, rate = samples * length, machine["bf16_tflop_per_s"] * 1e12
    flops = samples * training_flops(config, length, mtp=False).total
    counts = config.parameter_counts()
    report: Report = {
        "dsv4": __version__,
        "model": {"name": name, "parameters": counts.total, "active": counts.active},
        "machine": machine,
        "settings": {
            "samples": samples, "length": length, "repeats": repeats, "threads": threads,
            "recompute": recompute,
        },
        "flops": {"model": flops, "newton_schulz": newton_schulz_flops(config)},
        "planned_bytes": training_bytes(config).total,
        "planned_peak_bytes": training_peak_bytes(
            config, samples * length, recompute=recompute, mtp=False
        ),
        "engines": {},
    }  # fmt: skip
    for engine_name, times in seconds.items():
        median = statistics.median(times)
        more = newton_schulz_flops(config) if engine_name == "dsv4" else 0
        report["engines"][engine_name] = {
            "tokens_per_s": tokens / median,
            "low": tokens / max(times),
            "high": tokens / min(times),
            "of_matmul": flops / median / rate,
            "of_matmul_with_newton_schulz": (flops + more) / median / rate,
            "peak_bytes": last[engine_name]["peak_bytes"],
            "loss": last[engine_name]["loss"],
        }
    if against:
        ours, theirs = seconds["dsv4"], seconds[against]
        report["ratio"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return report


def newton_schulz_flops(config: V4Config) -> float:
    """Operations of Muon's iterations in one update: for a matrix ``[n, m]``, ``n <= m``, each of
    the ten makes ``X X'`` and its square and multiplies once more by ``X``."""
    from .model import Transformer
    from .train.optim import STEPS, uses_muon

    total = 0.0
    for name, p in Transformer(config).named_parameters():
        if uses_muon(name, p):
            n, m = sorted(p.shape)
            total += len(STEPS) * (4 * n * n * m + 2 * n**3)
    return total


# ---------------------------------------------------------------- a process that trains


def _ours(config: V4Config, ids: torch.Tensor, recompute: bool) -> Callable[[], float]:
    from .model import Transformer
    from .train.data import Batch
    from .train.loop import KEPT
    from .train.losses import Objective, losses
    from .train.optim import MuonAdamW, OptimSettings

    memory.reuse(KEPT)
    net = Transformer(config)
    init_weights(net, 0)
    objective = Objective(mtp_weight=0.0, recompute=recompute)
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad and objective.trains(n)}
    optim = MuonAdamW(trained.items(), OptimSettings())
    batch = Batch(ids.view(1, -1), torch.ones(1, ids.numel()), (ids.shape[1],) * ids.shape[0])

    def step() -> float:
        total, parts, _ = losses(net, *batch, objective)
        total.backward()
        for p in trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optim.step(1e-3)
        net.zero_grad()
        return float(parts["loss"])

    return step


def _transformers(folder: str, ids: torch.Tensor) -> Callable[[], float]:
    import transformers

    library: Any = transformers
    config = library.AutoConfig.from_pretrained(folder)
    net = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optim = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


class _Steps:
    """The questions a process answers: one."""

    def __init__(self) -> None:
        name, folder, samples, length, recompute = sys.argv[1:]
        config = V4Config.from_json(Path(folder, "config.json"))
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (int(samples), int(length)), generator=random)
        forget_peak()
        self._before = peak_bytes()
        if name == "dsv4":
            self._step = _ours(config, ids, recompute == "1")
        else:
            self._step = _transformers(folder, ids)

    def step(self) -> Report:
        begin = time.perf_counter()
        loss = self._step()
        took = time.perf_counter() - begin
        return {"seconds": took, "loss": loss, "peak_bytes": peak_bytes() - self._before}


if __name__ == "__main__":
    answer_questions(_Steps)
