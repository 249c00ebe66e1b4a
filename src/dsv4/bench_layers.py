"""``dsv4 bench layers``: what each layer of a large model costs, and what a whole model would.

A model of full width and few layers is run as any other: a prompt, then single tokens. Each block
is timed, and each kernel within them, and the times of blocks of one kind (window, CSA, HCA) stand
for all blocks of that kind in the whole model. Weights come from memory if they fit there: the
prompt touches them first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, kernels
from .api import find_model, load
from .bench import Report, commit, measure_machine
from .checkpoint import Checkpoint
from .config import V4Config
from .errors import ConfigError
from .kernels import looking

# What a token pays besides products, attention and the indexer.
SMALL = ("hc_read", "hc_head", "hc_expand", "sinkhorn", "rms_norm", "route")
KINDS = {0: "window", 4: "CSA", 128: "HCA"}


class Clock:
    """Seconds of each block of a pass, and each kernel's own, those it calls not counted."""

    def __init__(self) -> None:
        self.blocks: dict[int, float] = {}
        self.kernels: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def on(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Time the blocks and the kernel table until the end."""
        begun: dict[int, float] = {}

        def start(i: int) -> Callable[..., None]:
            return lambda *_: begun.__setitem__(i, time.perf_counter())

        def stop(i: int) -> Callable[..., None]:
            def add(*_: object) -> None:
                seconds = time.perf_counter() - begun[i]
                self.blocks[i] = self.blocks.get(i, 0.0) + seconds

            return add

        hooks = [b.register_forward_pre_hook(start(i)) for i, b in enumerate(blocks)]
        hooks += [b.register_forward_hook(stop(i)) for i, b in enumerate(blocks)]
        table = {k: f for k in kernels.__all__ if callable(f := getattr(kernels, k))}
        functions = {k: f for k, f in table.items() if not isinstance(f, type)}
        for name, function in functions.items():
            setattr(kernels, name, self._timed(name, function))
        look_each = looking.look_each
        looking.look_each = self._timed("attention", look_each)
        try:
            yield
        finally:
            looking.look_each = look_each
            for name, function in functions.items():
                setattr(kernels, name, function)
            for hook in hooks:
                hook.remove()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - begin
                own = seconds - self._inner.pop()
                self.kernels[name] = self.kernels.get(name, 0.0) + own
                if self._inner:
                    self._inner[-1] += seconds

        return call


def run(
    model: str | Path,
    *,
    of: str = "flash",
    prompt: int = 512,
    new: int = 16,
    repeats: int = 3,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure the blocks of ``model`` and extrapolate to all blocks of the preset ``of``.

    ``prompt`` tokens are read in one go, then ``new`` single ones. The receipt's ``prefill`` and
    ``decode`` have milliseconds a token: ``layers`` (each with kind and spread), ``rest``
    (embedding and head), ``kernels`` (shares of the time), ``small_kernels`` (of the blocks' time,
    what mHC, norms and routing take), and ``whole`` with its tokens a second.
    Raises ConfigError when the widths are not those of the preset.
    """
    whole = V4Config.preset(of)
    checkpoint = Checkpoint.open(find_model(model))
    for key in ("hidden_size", "n_routed_experts", "moe_intermediate_size", "num_attention_heads"):
        if getattr(checkpoint.config, key) != getattr(whole, key):
            raise ConfigError(
                f"{model} has not the width of {of}", expected=f"{key} {getattr(whole, key)}",
                got=getattr(checkpoint.config, key), hint="dsv4 synth OUT --layers 4",
            )  # fmt: skip
    before = torch.get_num_threads()
    threads = threads or before
    say("measuring the machine")
    machine = measure_machine(threads)
    torch.set_num_threads(threads)
    try:
        say("opening the model")
        loaded = load(model, expert_memory=checkpoint.bytes)  # mapped, as what fits is
        loaded.net.tapes.off = True  # they call kernels where no clock sees it
        random = torch.Generator().manual_seed(0)
        vocab = checkpoint.config.vocab_size
        ids = torch.randint(vocab, (prompt + new,), generator=random).tolist()
        passes: dict[str, list[tuple[float, Clock]]] = {"prefill": [], "decode": []}
        for n in range(repeats + 1):  # the first one brings the weights into memory
            say(f"run {n} of {repeats}" if n else "reading the weights")
            session = loaded.session()
            fed = {"prefill": [ids[:prompt]], "decode": [[i] for i in ids[prompt:]]}
            for phase, parts in fed.items():
                clock = Clock()
                with clock.on(list(loaded.net.layers)):
                    begin = time.perf_counter()
                    for part in parts:
                        session.extend(part, last=True)
                    passes[phase].append((time.perf_counter() - begin, clock))
    finally:
        torch.set_num_threads(before)
    tokens = {"prefill": prompt, "decode": new}
    return {
        "dsv4": __version__,
        "commit": commit(),
        "kernels": kernels.NATIVE,
        "machine": machine,
        "model": {"file_bytes": checkpoint.bytes, "layers": checkpoint.config.num_hidden_layers},
        "of": of,
        "settings": {"prompt": prompt, "new": new, "repeats": repeats, "threads": threads},
    } | {
        phase: _summary(passes[phase][1:], tokens[phase], checkpoint.config, whole)
        for phase in passes
    }


def _summary(
    passes: Sequence[tuple[float, Clock]], tokens: int, config: V4Config, whole: V4Config
) -> Report:
    ratios = config.compress_ratios[: config.num_hidden_layers]
    layers: list[Report] = []
    for i, ratio in enumerate(ratios):
        ms = sorted(1e3 * clock.blocks[i] / tokens for _, clock in passes)
        layers.append(
            {"kind": KINDS[ratio], "ms": statistics.median(ms), "low": ms[0], "high": ms[-1]}
        )
    rest = statistics.median(
        1e3 * (seconds - sum(clock.blocks.values())) / tokens for seconds, clock in passes
    )
    total = sum(seconds for seconds, _ in passes)
    names = sorted({name for _, clock in passes for name in clock.kernels})
    shares = {n: sum(c.kernels.get(n, 0.0) for _, c in passes) / total for n in names}
    blocks = sum(sum(clock.blocks.values()) for _, clock in passes)
    small = sum(clock.kernels.get(name, 0.0) for _, clock in passes for name in SMALL)
    everyone = statistics.mean(layer["ms"] for layer in layers)
    of_kind = {
        kind: statistics.mean([e["ms"] for e in layers if e["kind"] == kind] or [everyone])
        for kind in KINDS.values()
    }
    ratios = whole.compress_ratios[: whole.num_hidden_layers]
    ms = rest + sum(of_kind[KINDS[ratio]] for ratio in ratios)
    return {
        "layers": layers,
        "rest_ms": rest,
        "kernels": dict(sorted(shares.items(), key=lambda item: -item[1])),
        "small_kernels": small / blocks,
        "whole": {"layers": len(ratios), "ms": ms, "tokens_per_s": 1e3 / ms},
    }
