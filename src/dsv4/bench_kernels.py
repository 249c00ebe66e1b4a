"""``dsv4 bench kernels``: each kernel beside what the machine allows in the same run.

The limit of a call is the longer of two times: reading its weights and tables once at the rate at
which all threads together read memory, and doing its multiplications at the rate of torch's BF16
matmul. Weights rotate among copies that together do not fit in the caches. A time is the median
of the repeats, with the lowest and highest.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import __version__, kernels, quant
from .bench import Report, commit, measure_machine
from .config import V4Config
from .errors import ConfigError
from .kernels import Stored
from .kernels.threads import pass_of

SHAPES = ("flash", "pro", "nano")
BEYOND_CACHES = 128 << 20  # bytes of weights that a case goes through
ROWS = (1, 128, 512)
ENTRIES = 65536  # tokens of context for the indexer


class Case(NamedTuple):
    """One kernel at one shape: ``read`` bytes and ``flops`` are those that cannot be avoided."""

    name: str
    rows: int
    read: int
    flops: int
    call: Callable[[], object]


def run(
    shapes: str = "flash",
    *,
    repeats: int = 7,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure the kernels in use (native ones, or the reference) at the shapes of a preset.

    Returns the receipt: ``machine``, ``kernels`` (their instruction set or None) and ``cases``,
    each with its times in milliseconds, its rates, and ``of_limit`` (1: as fast as the machine).
    Raises ConfigError for an unknown preset.
    """
    if shapes not in SHAPES:
        raise ConfigError("--shapes", expected=" or ".join(SHAPES), got=shapes)
    threads = threads or torch.get_num_threads()
    say("measuring the machine")
    machine = measure_machine(threads)
    stream, rate = machine["stream_read_gb_per_s"] * 1e9, machine["bf16_tflop_per_s"] * 1e12
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for case in _cases(V4Config.preset(shapes)):
                say(f"{case.name}, {case.rows} rows")
                with pass_of(case.rows, 0):  # as in a model
                    seconds = _times(case.call, repeats)
                median = statistics.median(seconds)
                found.append(
                    {
                        "name": case.name,
                        "rows": case.rows,
                        "ms": 1e3 * median,
                        "ms_low": 1e3 * min(seconds),
                        "ms_high": 1e3 * max(seconds),
                        "gb_per_s": case.read / median / 1e9,
                        "tflop_per_s": case.flops / median / 1e12,
                        "limit": "memory" if case.read / stream > case.flops / rate else "matmul",
                        "of_limit": max(case.read / stream, case.flops / rate) / median,
                    }
                )
    finally:
        torch.set_num_threads(before)
    return {
        "dsv4": __version__,
        "commit": commit(),
        "shapes": shapes,
        "kernels": kernels.NATIVE,
        "machine": machine,
        "settings": {"repeats": repeats, "threads": threads},
        "cases": found,
    }


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of one call; short ones are measured several at a time."""
    call()
    begin = time.perf_counter()
    call()
    at_once = max(1, int(2e-3 / max(time.perf_counter() - begin, 1e-7)))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(at_once):
            call()
        times.append((time.perf_counter() - begin) / at_once)
    return times


# ---------------------------------------------------------------- cases


def _cases(c: V4Config) -> Iterator[Case]:
    d, heads, width = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size
    matrices = {
        "linear FP8 wq_b": ("fp8", heads * c.head_dim, c.q_lora_rank),
        "linear FP8 wo_b": ("fp8", d, c.o_groups * c.o_lora_rank),
        "linear FP4 w1": ("fp4", width, d),
        "linear FP4 w2": ("fp4", d, width),
        "linear BF16 compressor": ("bf16", 2 * c.head_dim, d),
    }
    for name, (fmt, outputs, inputs) in matrices.items():
        weights = list(_copies(fmt, outputs, inputs))
        for rows in ROWS:
            yield _linear(name, weights, rows, outputs, inputs)
    experts = [_random("fp4", *s) for s in ((width, d), (d, width), (width, d)) for _ in range(32)]
    for rows in ROWS:
        yield _experts(c, [experts[i : i + 32] for i in (0, 32, 64)], rows)
    yield from (_attention(c, rows) for rows in (1, 128))
    yield from (_indexer(c, rows) for rows in (1, 16))
    yield _streams(c)


def _random(fmt: str, outputs: int, inputs: int) -> Stored:
    """A weight of random codes, none of which is not a number."""
    if fmt == "bf16":
        return Stored(torch.randn(outputs, inputs).to(torch.bfloat16), None)
    if fmt == "fp4":
        codes = torch.randint(-128, 128, (outputs, inputs // 2), dtype=torch.int8)
        return Stored(codes, torch.full((outputs, inputs // 32), 2.0**-5).to(quant.E8M0))
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8) & 0xF7
    blocks = -(-outputs // 128), -(-inputs // 128)
    return Stored(codes.view(quant.E4M3), torch.full(blocks, 2.0**-8).to(quant.E8M0))


def _bytes(stored: Stored) -> int:
    return sum(t.nbytes for t in stored if t is not None)


def _copies(fmt: str, outputs: int, inputs: int) -> Iterator[Stored]:
    first = _random(fmt, outputs, inputs)
    for _ in range(max(1, BEYOND_CACHES // _bytes(first))):
        yield Stored(first.weight.clone(), None if first.scale is None else first.scale.clone())


def _x(*shape: int) -> Tensor:
    return kernels.fp8_round(torch.randn(*shape).to(torch.bfloat16))


def _linear(name: str, weights: list[Stored], rows: int, outputs: int, inputs: int) -> Case:
    turn, x = itertools.cycle(weights), _x(rows, inputs)
    return Case(
        name, rows, _bytes(weights[0]), 2 * rows * outputs * inputs,
        lambda: kernels.linear(x, *next(turn), torch.bfloat16),
    )  # fmt: skip


def _experts(c: V4Config, tables: list[list[Stored]], rows: int) -> Case:
    count, k = len(tables[0]), c.num_experts_per_tok
    generator = torch.Generator().manual_seed(0)
    routes = itertools.cycle(
        [torch.rand(rows, count, generator=generator).topk(k).indices for _ in range(8)]
    )
    x, weights, used = _x(rows, c.hidden_size), torch.full((rows, k), 1 / k), min(count, rows * k)
    w1, w2, w3 = (_Owner(table) for table in tables)
    each = sum(_bytes(table[0]) for table in tables)
    flops = 6 * rows * k * c.hidden_size * c.moe_intermediate_size

    def call() -> Tensor:
        return kernels.routed_experts(
            x, next(routes), weights, w1, w2, w3, c.swiglu_limit, True, torch.bfloat16
        )

    return Case(f"routed experts, {count} held", rows, used * each, flops, call)


class _Owner:
    """One matrix of each expert, as a model holds them: an object that can be remembered."""

    def __init__(self, table: list[Stored]) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, expert: int, /) -> Stored:
        return self._table[expert]


def _attention(c: V4Config, rows: int) -> Case:
    heads, dim, start = c.num_attention_heads, c.head_dim, ENTRIES
    q, window = _x(1, rows, heads, dim), _x(1, c.sliding_window - 1 + rows, dim)
    table = _x(1, (start + rows) // 4, dim)
    chosen = torch.stack([torch.randperm(start // 4)[: c.index_topk].sort().values] * rows)[None]
    keys = c.sliding_window + c.index_topk
    return Case(
        f"attention, {keys} entries", rows, keys * dim * 2, 4 * rows * heads * keys * dim,
        lambda: kernels.attention(
            q, window, table, chosen, torch.zeros(heads), start=start, ratio=4,
            width=c.sliding_window, scale=dim**-0.5, dtype=torch.bfloat16,
        ),
    )  # fmt: skip


def _indexer(c: V4Config, rows: int) -> Case:
    heads, dim, keys = c.index_n_heads, c.index_head_dim, ENTRIES // 4
    q, table = _x(1, rows, heads, dim), _x(1, keys, dim)
    weights = torch.rand(1, rows, heads).to(torch.bfloat16)
    return Case(
        f"indexer, {keys:,} keys", rows, table.nbytes, 2 * rows * heads * keys * dim,
        lambda: kernels.index_topk(q, table, weights, ENTRIES - rows, 4, c.index_topk),
    )


def _streams(c: V4Config) -> Case:
    """What one token pays for a block's mHC and norm: read, Sinkhorn, norm, expand."""
    h, d = c.hc_mult, c.hidden_size
    mixes = (2 + h) * h
    streams, fn = torch.randn(1, 1, h, d).to(torch.bfloat16), torch.randn(mixes, h * d)
    scale, base, norm = torch.ones(3), torch.zeros(mixes), torch.ones(d).to(torch.bfloat16)

    def call() -> Tensor:
        x, post, comb = kernels.hc_read(streams, fn, scale, base, 1e-6, 1e-6, torch.bfloat16)
        comb = kernels.sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)
        return kernels.hc_expand(kernels.rms_norm(x, norm, 1e-6), streams, post, comb)

    return Case("mHC and norm", 1, fn.nbytes, 2 * fn.numel(), call)
