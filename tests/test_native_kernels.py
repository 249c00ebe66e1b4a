"""The native kernels compute what the reference does, and the same bits whatever is around."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsv4
from dsv4 import kernels, quant
from dsv4.checkpoint import save_checkpoint
from dsv4.config import V4Config
from dsv4.errors import ConfigError
from dsv4.kernels import PagedRows, RowFormat, Span, Stored, reference
from dsv4.kernels.threads import pass_of
from dsv4.kernels.threads import threads as threads_for
from dsv4.synth import synthesize

native = pytest.importorskip("dsv4.kernels.native", exc_type=ImportError)
training = pytest.importorskip("dsv4.kernels.training", exc_type=ImportError)
BF16, F32 = torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
few = settings(max_examples=25, deadline=None)


# Tiles sum in an order of their own: amx is the same bits in itself, the others among themselves.
ALIKE = [[isa for isa in native.isas() if (isa == "amx") == tiles] for tiles in (True, False)]
using: list[str] = []


@pytest.fixture(autouse=True, params=[isas for isas in ALIKE if isas], ids=lambda isas: isas[0])
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    best, threads = native.isa(), torch.get_num_threads()
    using[:] = request.param
    native.use(using[0])
    with torch.inference_mode():
        yield
    native.use(best)
    torch.set_num_threads(threads)


def every_way(f: Callable[[], Any]) -> Any:
    """``f()``, which must be the same bits with every instruction set and number of threads."""
    results = []
    for isa in using:
        native.use(isa)
        for threads in (1, 2, 4) if isa == using[0] else (2,):
            torch.set_num_threads(threads)
            got = f()
            results.append(got if isinstance(got, tuple) else (got,))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return results[0] if isinstance(got, tuple) else results[0][0]


def close(got: Tensor, wanted: Tensor, ulps: float = 1.0) -> None:
    """Equal but for roundings: of the dtype, or of float32 sums."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    size = 2.0**-7 if got.dtype == BF16 else 2e-6
    largest = wanted.float().abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=ulps * size, atol=ulps * size * largest / 16)


def stored(fmt: str, outputs: int, inputs: int, seed: int = 0) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    w[:: max(1, outputs // 3)] *= 2.0**-9  # codes below the smallest normal one
    if fmt == "fp4":
        return Stored(*quant.quantize_fp4(w))
    if fmt.startswith("fp8"):
        return Stored(*quant.quantize_fp8(w, F32 if fmt == "fp8-f32" else quant.E8M0))
    return Stored(w.to(BF16 if fmt == "bf16" else F32), None)


def activations(rows: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator).to(dtype)


# ---------------------------------------------------------------- products


@few
@given(
    fmt=st.sampled_from(["fp4", "fp8", "fp8-f32", "bf16", "f32"]),
    dtype=st.sampled_from([BF16, F32]),
    rows=st.sampled_from([1, 2, 3, 5, 17]),
    outputs=st.sampled_from([1, 7, 48, 131]),
    inputs=st.sampled_from([32, 96, 127, 128, 1056]),
)
def test_linear(fmt: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    inputs = inputs // 32 * 32 if fmt == "fp4" else inputs
    weight, x = stored(fmt, outputs, inputs), activations(rows, inputs, dtype)
    with torch.inference_mode():
        got = every_way(lambda: native.linear(x, *weight, F32))
        exact = x.double() @ quant.dequantize(*weight).double().T
        close(got, exact.float(), 4)
        if dtype == BF16 and fmt != "f32":  # rounded once, at the end
            assert torch.equal(native.linear(x, *weight, BF16), got.to(BF16))


def test_tiles_sum_in_their_order() -> None:
    """Per 32 inputs, those at even places and those at odd ones from zero; their sum is added."""
    if native.isa() != "amx":
        pytest.skip("for amx")
    outputs, inputs = 19, 32 * 9
    w, x = stored("bf16", outputs, inputs).weight, activations(3, inputs, BF16)
    x[:, ::7] *= 2.0**-30  # sums that are rounded away
    wanted = torch.zeros(3, outputs)
    for tile in range(0, inputs, 32):
        chains = []
        for first in (tile, tile + 1):
            chain = torch.zeros(3, outputs)
            for i in range(first, tile + 32, 2):
                product = x[:, i, None].double() * w[:, i].double()  # exact, and so is the sum
                chain = (chain.double() + product).float()
            chains.append(chain)
        wanted = wanted + (chains[0] + chains[1])
    assert torch.equal(native.linear(x, w, None, F32), wanted)


@pytest.mark.parametrize("fmt", ["fp4", "fp8", "bf16"])
def test_a_row_does_not_depend_on_the_others(fmt: str) -> None:
    weight, x = stored(fmt, 40, 1184), activations(300, 1184, BF16)
    together = every_way(lambda: native.linear(x, *weight, F32))
    for count in (1, 2, 3, 4, 37, 299):
        for first in (0, 300 - count):
            some = x[first : first + count]
            assert torch.equal(native.linear(some, *weight, F32), together[first : first + count])


@pytest.mark.parametrize("fmt", ["fp4", "fp8", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_in_its_row(fmt: str, bad: float) -> None:
    weight, x = stored(fmt, 24, 256), activations(6, 256, BF16)
    clean = native.linear(x, *weight, F32)
    x[4, 100] = bad
    got = every_way(lambda: native.linear(x, *weight, F32))
    assert not got[4].isfinite().any() and got.isfinite()[[0, 1, 2, 3, 5]].all()
    assert torch.equal(got[:4], clean[:4])


def test_subnormal_numbers_count_as_zero_everywhere() -> None:
    weight, x = stored("bf16", 8, 128), activations(4, 128, BF16) * 2.0**-120
    x[1] = 1e-39
    got = every_way(lambda: native.linear(x, *weight, F32))
    assert torch.equal(got[1], torch.zeros(8))
    assert torch.equal(got[2:3], native.linear(x[2:3], *weight, F32))


@pytest.mark.parametrize("fmt", ["fp4", "fp8"])
def test_every_code_has_its_value(fmt: str) -> None:
    """A row of ones against weights that hold each code once, in each place of a step."""
    codes = torch.arange(256, dtype=torch.uint8)
    if fmt == "fp8":
        codes[[0x7F, 0xFF]] = 0  # not numbers
    for shift in (0, 37, 200):
        if fmt == "fp4":
            weight = Stored(codes.roll(shift)[:, None].repeat(1, 16).view(torch.int8), None)
            scale = torch.full((256, 1), 2.0**-3).to(quant.E8M0)
        else:
            weight = Stored(codes.roll(shift)[:, None].repeat(1, 128).view(quant.E4M3), None)
            scale = torch.full((2, 1), 2.0**-3).to(quant.E8M0)
        values = quant.dequantize(weight.weight, scale)
        for place in range(0, values.shape[1], 5):
            x = torch.zeros(1, values.shape[1], dtype=BF16)
            x[0, place] = 1
            for rows in (1, 4):
                got = native.linear(x.expand(rows, -1), weight.weight, scale, F32)
                assert torch.equal(got, values[:, place].expand(rows, -1))


def test_groups_and_head() -> None:
    x, weight = activations(5, 3 * 128, BF16).view(5, 3, 128), stored("fp8", 3 * 128, 128)
    close(
        every_way(lambda: native.grouped_linear(x, *weight, BF16)),
        reference.grouped_linear(x, *weight, BF16),
    )
    table = stored("bf16", 515, 128).weight
    close(every_way(lambda: native.head(x[:, 0], table)), reference.head(x[:, 0], table), 4)


# ---------------------------------------------------------------- experts


def experts(fmt: str, count: int, d: int, width: int) -> tuple[list[Stored], ...]:
    shapes = ((width, d), (d, width), (width, d))
    return tuple([stored(fmt, *s, seed=7 * e + i) for e in range(count)]
                 for i, s in enumerate(shapes))  # fmt: skip


@few
@given(
    fmt=st.sampled_from(["fp4", "fp8"]),
    dtype=st.sampled_from([BF16, F32]),
    rows=st.integers(1, 23),
    routing=st.sampled_from(["random", "all to one", "two of them"]),
    limit=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_routed_experts(
    fmt: str, dtype: torch.dtype, rows: int, routing: str, limit: float
) -> None:
    tables = experts(fmt, 5, 160, 128)
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, 5, generator=generator).topk(2).indices
    if routing != "random":
        ids = torch.tensor([[3, 1]]).expand(rows, -1) if routing == "two of them" else ids * 0 + 2
        ids = ids[:, :1] if routing == "all to one" else ids
    weights = torch.rand(ids.shape, generator=generator)
    x, rounded = activations(rows, 160, dtype) * 4, dtype == BF16
    with torch.inference_mode():
        args = (*tables, limit, rounded, dtype)
        got = every_way(lambda: native.routed_experts(x, ids, weights, *args))
        close(got.to(dtype), reference.routed_experts(x, ids, weights, *args).to(dtype), 6)
        for i in range(rows):
            one = slice(i, i + 1)
            alone = native.routed_experts(x[one], ids[one], weights[one], *args)
            assert torch.equal(alone, got[one])


def test_an_expert_that_does_not_exist_is_refused() -> None:
    tables, x = experts("fp4", 2, 128, 128), activations(1, 128, BF16)
    for bad in (-1, 2):
        with pytest.raises(IndexError, match="expert"):
            native.routed_experts(
                x, torch.tensor([[bad]]), torch.ones(1, 1), *tables, 10.0, True, BF16
            )
        with pytest.raises(IndexError, match="expert"):
            native.route(torch.zeros(1, 2), None, torch.tensor([[bad]]), 1, True, 1.0)


def test_route() -> None:
    logits, bias = activations(9, 21, F32) * 8, activations(1, 21, F32)[0]
    logits[0] = 0  # all alike: the bias decides
    got = every_way(lambda: native.route(logits, bias, None, 4, True, 2.5))
    for ours, theirs in zip(got, reference.route(logits, bias, None, 4, True, 2.5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    tied = native.route(torch.zeros(1, 6), torch.zeros(6), None, 3, True, 1.0)
    assert tied[1].tolist() == [[0, 1, 2]]
    given_ids = torch.randint(21, (9, 4), generator=torch.Generator().manual_seed(0))
    ours = native.route(logits, None, given_ids, 4, False, 1.5)[2]
    torch.testing.assert_close(ours, reference.route(logits, None, given_ids, 4, False, 1.5)[2])


# ---------------------------------------------------------------- row by row


@BOTH
@pytest.mark.parametrize("rows", [1, 37])
def test_what_is_computed_row_by_row(dtype: torch.dtype, rows: int) -> None:
    x = activations(rows * 3, 512, dtype).view(1, rows, 3, 512) * 3
    flat = x.view(1, -1, 512)
    turn = torch.randn(rows, 32, 2, generator=torch.Generator().manual_seed(2))
    index = activations(rows, 128, dtype)
    streams = activations(rows * 4, 256, dtype).view(1, rows, 4, 256)
    fn, base, scale = activations(24, 1024, F32) * 0.1, activations(1, 24, F32)[0], torch.ones(3)
    read = (streams, fn, scale, base, 1e-6, 1e-6, dtype)
    end = (streams, fn[:4].contiguous(), scale[:1], base[:4].contiguous(), 1e-6, 1e-6, dtype)
    out, post, comb = reference.hc_read(*read)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (flat, activations(1, 512, BF16)[0], 1e-6)),
        ("rms_norm", (flat, None, 1e-6)),
        ("rope", (x, turn.unsqueeze(1))),
        ("rope", (x[:, :, 1], turn, True)),
        ("fp8_round", (x,)),
        ("fp8_round", (x, 64, 64)),
        ("hadamard_fp4", (index,)),
        ("hc_read", read),
        ("hc_head", end),
        ("sinkhorn", (comb, 20, 1e-6)),
        ("hc_expand", (out, streams, post, comb)),
        ("swiglu", (flat * 9, flat.flip(0) * 9, 10.0, dtype)),
    ]
    for name, args in cases:
        got = every_way(lambda name=name, args=args: getattr(native, name)(*args))  # type: ignore
        wanted = getattr(reference, name)(*args)
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        for ours, theirs in pairs:
            # FP4 steps are large: what lies between two may fall to either side
            close(ours, theirs, 64 if name == "hadamard_fp4" else 4)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (128, False)])
def test_pool(ratio: int, overlap: bool) -> None:
    raw = activations(3 * ratio, 4 * 64, F32)[None]
    raw[:, :ratio, 128:] = -torch.inf if overlap else 0  # no block before
    kv, gate = raw.chunk(2, -1)
    got = every_way(lambda: native.pool(kv, gate, ratio, overlap))
    close(got, reference.pool(kv, gate, ratio, overlap), 4)


# ---------------------------------------------------------------- attention


@BOTH
@pytest.mark.parametrize("heads", [1, 3, 9, 39])
@pytest.mark.parametrize(
    ("ratio", "k"), [(0, 0), (4, 0), (4, 11), (128, 0)], ids=["window", "all", "chosen", "hca"]
)
def test_attention(dtype: torch.dtype, heads: int, ratio: int, k: int) -> None:
    start, queries, earlier, width, dim = 130, 9, 31, 32, 96
    q = activations(queries * heads, dim, dtype).view(1, queries, heads, dim)
    window = activations(earlier + queries, dim, dtype, 2)[None]
    rows = activations(40, dim, dtype, 3)[None] if ratio else None
    chosen = None
    if k:
        generator = torch.Generator().manual_seed(0)
        picks = [torch.randperm((start + t + 1) // 4, generator=generator) for t in range(queries)]
        chosen = torch.stack([p[:k].sort().values for p in picks])[None]
    sink = activations(1, heads, F32)[0]

    def attend(a: int, b: int) -> Tensor:
        part = None if chosen is None else chosen[:, a:b]
        near = window[:, max(0, earlier + a - width + 1) : earlier + b]
        out: Tensor = native.attention(
            q[:, a:b], near, rows, part, sink, start=start + a, ratio=ratio, width=width,
            scale=dim**-0.5, dtype=dtype,
        )  # fmt: skip
        return out

    got = every_way(lambda: attend(0, queries))
    wanted = reference.attention(
        q, window, rows, chosen, sink, start=start, ratio=ratio, width=width, scale=dim**-0.5,
        dtype=dtype,
    )  # fmt: skip
    close(got, wanted, 4)
    assert torch.equal(torch.cat([attend(0, 1), attend(1, 4), attend(4, queries)], 1), got)


def paged(rows: Tensor, each: int, form: RowFormat) -> PagedRows:
    """The same rows in pieces that lie at an odd place of blocks."""
    stored, offset = form.pack(rows[0]), 24
    blocks = []
    for part in stored.split(each):
        block = torch.full((offset + each * form.bytes + 8,), 255, dtype=torch.uint8)
        block[offset : offset + part.numel()] = part.flatten()
        blocks.append(block)
    addresses = torch.tensor([b.data_ptr() for b in blocks])
    return PagedRows(blocks, addresses, offset, each, len(stored), form)


FORMATS = {
    "entry": RowFormat(512, BF16, "entry", 64), "narrow entry": RowFormat(96, BF16, "entry", 32),
    "key": RowFormat(128, BF16, "key"), "bf16": RowFormat(96, BF16), "f32": RowFormat(96, F32),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_stored_as_the_format_says(name: str) -> None:
    """Byte for byte, in whatever pieces they come, and nothing beside them is touched."""
    form, each, first, count = FORMATS[name], 8, 3, 40
    rows = activations(count, form.width, form.dtype)
    rows[1] = 0.0
    rows[2] *= 1e-30  # below the smallest scale
    rows[3] *= 1e20
    rows[4] = torch.tensor([0.25, -0.75, 1.25, 2.5, -3.5, 5.0, 6.0, -0.0]).repeat(form.width // 8)
    rows[5, ::2] = -rows[5, ::2]

    def empty() -> PagedRows:
        size = 24 + each * form.bytes + 8
        blocks = [torch.full((size,), 77, dtype=torch.uint8) for _ in range(6)]
        addresses = torch.tensor([b.data_ptr() for b in blocks])
        return PagedRows(blocks, addresses, 24, each, first + count, form)

    expected, got, apart = empty(), empty(), empty()
    reference.store(rows, expected, first)
    native.store(rows, got, first)
    for a, b in [(0, 1), (1, 18), (18, count)]:
        native.store(rows[a:b], apart, first + a)
    for table in (got, apart):
        assert all(torch.equal(a, b) for a, b in zip(expected.blocks, table.blocks, strict=True))


@pytest.mark.parametrize("name", ["entry", "key"])
def test_what_is_no_number_is_stored_as_none(name: str) -> None:
    form = FORMATS[name]
    rows = activations(2, form.width, BF16)
    rows[0, 40] = torch.nan
    rows[1, 70] = torch.inf
    block = torch.zeros(2 * form.bytes, dtype=torch.uint8)
    table = PagedRows([block], torch.tensor([block.data_ptr()]), 0, 2, 2, form)
    native.store(rows, table, 0)
    values = table.dense()[0]
    assert values[0, 40].isnan() and values[1, 70].isnan()
    assert values[0, 64:].isfinite().all() and values[1, :64].isfinite().all()


@pytest.mark.parametrize("start", [0, 5, 127])
@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("ratio", [4, 128])
def test_raw_rows(ratio: int, count: int, start: int) -> None:
    kv, gate = activations(count, 96, F32)[None], activations(count, 96, F32, 2)[None]
    bias = activations(ratio, 96, F32, 3)
    expected, got = torch.zeros(2, 1, count + 9, 192)
    for module, room in ((reference, expected), (native, got)):
        module.raw_rows(Span(room, 3, count), start, kv, gate, bias)
    assert torch.equal(got, expected)
    assert torch.equal(got[:, 3 : count + 3, :96], kv) and not got[:, :3].any()


@pytest.mark.parametrize("types", [(BF16, BF16, BF16), (F32, BF16, BF16), (BF16, F32, F32)])
@pytest.mark.parametrize("rows", [1, 5])
def test_add(types: tuple[torch.dtype, torch.dtype, torch.dtype], rows: int) -> None:
    """Row to row, or one row to several."""
    x = activations(3 * rows, 48, types[0]).view(3, rows, 48)
    for y in (activations(3 * rows, 48, types[1], 2).view(3, rows, 48),
              activations(3, 48, types[1], 3).view(3, 1, 48)):  # fmt: skip
        assert torch.equal(native.add(x, y, types[2]), reference.add(x, y, types[2]))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_scaled(dtype: torch.dtype) -> None:
    x = activations(7, 33, dtype)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    got = native.scaled(x, 0.0441941738)
    assert torch.equal(got.nan_to_num(7), reference.scaled(x, 0.0441941738).nan_to_num(7))


@pytest.mark.parametrize("each", [1, 4, 32])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_over_rows_in_pieces(each: int, packed: bool) -> None:
    """Where rows lie and how they are packed changes no bit."""
    start, queries, earlier, dim = 130, 5, 31, 192
    q = activations(queries * 9, dim, BF16).view(1, queries, 9, dim)
    window = activations(earlier + queries, dim, BF16, 2)[None]
    rows = reference.fp8_round(activations(40, dim, BF16, 3), 64, 64)[None]
    rows[0, 3], rows[0, 5, :64] = 0, 1e-7
    rows = reference.fp8_round(rows, 64, 64)
    form = RowFormat(dim, BF16, "entry" if packed else None, 64 if packed else 0)
    there = paged(rows, each, form)
    assert torch.equal(there.dense(), rows)
    chosen = torch.tensor([[[1, 3, 5, 7, 30], [0, 1, 2, 3, -1], *[[2, 8, 9, 31, 32]] * 3]])
    for ratio, picked in ((4, None), (4, chosen), (128, None)):
        def attend(table: Tensor | PagedRows, ratio: int = ratio, picked: Any = picked) -> Tensor:
            return native.attention(
                q, window, table, picked, activations(1, 9, F32)[0], start=start, ratio=ratio,
                width=32, scale=dim**-0.5, dtype=BF16,
            )  # fmt: skip

        assert torch.equal(every_way(lambda: attend(there)), attend(rows))


def test_attention_from_the_first_token_on() -> None:
    """Fewer keys than are taken at once; rows are packed, the window's entries are not."""
    queries, dim = 45, 192
    q = activations(queries * 3, dim, BF16).view(1, queries, 3, dim)
    window = activations(queries, dim, BF16, 2)[None]
    window.view(torch.int16)[..., [0, 128]] = 0x3FFF  # as a packed row it would be infinite
    rows = reference.fp8_round(activations(12, dim, BF16, 3), 64, 64)[None]
    there = paged(rows, 4, RowFormat(dim, BF16, "entry", 64))

    def attend(table: Tensor | PagedRows) -> Tensor:
        out: Tensor = native.attention(
            q, window, table, None, torch.zeros(3), start=0, ratio=4, width=32, scale=dim**-0.5,
            dtype=BF16,
        )  # fmt: skip
        return out

    got = every_way(lambda: attend(there))
    assert got.isfinite().all() and torch.equal(got, attend(rows))


@pytest.mark.parametrize("each", [1, 32])
@pytest.mark.parametrize("packed", [True, False])
def test_top_k_over_keys_in_pieces(each: int, packed: bool) -> None:
    q = reference.hadamard_fp4(activations(12, 128, BF16)).view(1, 4, 3, 128)
    keys = reference.hadamard_fp4(activations(43, 128, BF16, 2))[None]
    keys[:, 7] = 0
    there = paged(keys, each, RowFormat(128, BF16, "key" if packed else None))
    assert torch.equal(there.dense(), keys)
    weights = activations(4, 3, BF16).view(1, 4, 3)
    for k in (1, 7, 39):
        got = every_way(lambda k=k: native.index_topk(q, there, weights, 154, 4, k))  # type: ignore
        assert torch.equal(got, reference.index_topk(q, keys, weights, 154, 4, k))


@pytest.mark.parametrize("rounded", [True, False], ids=["as bytes", "as numbers"])
def test_top_k_of_many(rounded: bool) -> None:
    """Thousands of keys, which are scored in parts and whose lists overflow; queries that are FP4
    are multiplied as bytes, to the same bits."""
    queries, count, k = 70, 9000, 32
    q = activations(queries * 5, 128, BF16)
    q = (reference.hadamard_fp4(q) if rounded else q).view(1, queries, 5, 128)
    keys = reference.hadamard_fp4(activations(count, 128, BF16, 2))
    best = q[0, :, 0].float().mean(0)
    keys[:6000] = keys[:6000][(keys[:6000].float() @ best).argsort()]  # ever better ones
    keys[7000:7400] = keys[5999]  # and many alike
    weights = activations(queries, 5, BF16).abs().view(1, queries, 5)
    weights[0, 3] = 0
    start = 4 * count - queries
    there = paged(keys[None], 32, RowFormat(128, BF16, "key"))
    got = every_way(lambda: native.index_topk(q, there, weights, start, 4, k))
    assert torch.equal(got, native.index_topk(q, keys[None], weights, start, 4, k))
    alone = [
        native.index_topk(q[:, i : i + 1], there, weights[:, i : i + 1], start + i, 4, k)
        for i in range(queries)
    ]
    assert torch.equal(got, torch.cat(alone, 1))
    scores = reference.index_scores(q, keys[None], weights)[0]
    scores[:, -1].masked_fill_(torch.arange(queries) + 1 < queries, -torch.inf)
    least = scores.gather(1, got[0]).amin(1)
    tolerance = 2.0**-6 * scores[:, :-1].abs().amax(1)
    assert bool((least >= scores.topk(k, -1).values[:, -1] - tolerance).all())


@pytest.mark.parametrize(("start", "ratio"), [(3000, 28), (19000, 28), (100, 128)])
@pytest.mark.parametrize("heads", [3, 4, 9])
def test_attention_of_queries_that_see_the_same_rows(heads: int, start: int, ratio: int) -> None:
    """Rows that are unpacked for several queries at once give each the same bits as alone."""
    queries, earlier, width, dim = 39, 31, 32, 192
    q = activations(queries * heads, dim, BF16).view(1, queries, heads, dim)
    window = activations(earlier + queries, dim, BF16, 2)[None]
    rows = reference.fp8_round(activations(start // ratio + 3, dim, BF16, 3), 64, 64)[None]
    there = paged(rows, 1, RowFormat(dim, BF16, "entry", 64))
    sink = activations(1, heads, F32)[0]

    def attend(table: Tensor | PagedRows, some: slice = slice(None)) -> Tensor:
        first = some.start or 0
        near = window[:, first:] if some.start is None else window[:, first : some.stop + earlier]
        return native.attention(
            q[:, some], near, table, None, sink, start=start + first, ratio=ratio, width=width,
            scale=dim**-0.5, dtype=BF16,
        )  # fmt: skip

    got = every_way(lambda: attend(there))
    assert torch.equal(got, attend(rows))
    alone = [attend(there, slice(i, i + 1)) for i in range(queries)]
    assert torch.equal(got, torch.cat(alone, 1))
    wanted = reference.attention(
        q, window, rows, None, sink, start=start, ratio=ratio, width=width, scale=dim**-0.5,
        dtype=BF16,
    )
    close(got, wanted, 4)


def test_threads_of_a_pass_over_few_tokens() -> None:
    """Torch has one, the kernels all, to the same bits; none stays awake afterwards."""
    heads, count, k = 4, 20_000, 32
    q = reference.hadamard_fp4(activations(heads, 128, BF16)).view(1, 1, heads, 128)
    keys = reference.hadamard_fp4(activations(count, 128, BF16, 2))[None]
    keys[:, 5000:9000] = keys[:, 5000:5001].clone()
    weights = activations(1, heads, BF16).abs().view(1, 1, heads)
    here = torch.get_num_threads()
    found = []
    for most in (1, 2, 5):
        torch.set_num_threads(most)
        try:
            with pass_of(1, parameters=10):
                assert (torch.get_num_threads(), threads_for()) == (1, most)
                found.append(native.index_topk(q, keys, weights, 4 * count - 1, 4, k))
            assert threads_for() == torch.get_num_threads() == most
            with pass_of(100, parameters=10):
                assert torch.get_num_threads() == most
        finally:
            torch.set_num_threads(here)
    assert all(torch.equal(found[0], other) for other in found[1:])
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.02


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, BF16])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 64, 1000, 21_157])
def test_checksum(count: int, dtype: torch.dtype) -> None:
    data = (1000 * torch.randn(count, generator=torch.Generator().manual_seed(count))).to(dtype)
    whole = native.checksum(data)
    assert whole == reference.checksum(data)
    stored = data.view(torch.uint8)
    for place in range(0, len(stored), max(1, len(stored) // 50)):
        stored[place] ^= 1 << place % 8
        assert native.checksum(data) != whole
        other = (place + 64) % len(stored)  # and two changes whose sum is none
        stored[other] ^= 1 << place % 8
        assert other == place or native.checksum(data) != whole
        stored[other] ^= 1 << place % 8
        stored[place] ^= 1 << place % 8
    assert native.checksum(data) == whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_to_what_is_not_a_number(bad: float, packed: bool) -> None:
    """It is in the results of those who see it and of no others."""
    queries, earlier, width, dim, heads = 40, 31, 32, 192, 4
    q = activations(queries * heads, dim, BF16).view(1, queries, heads, dim)
    window = activations(earlier + queries, dim, BF16, 2)[None]
    rows = reference.fp8_round(activations(12, dim, BF16, 3), 64, 64)[None]
    form = RowFormat(dim, BF16, "entry" if packed else None, 64 if packed else 0)

    def attend() -> Tensor:
        out: Tensor = native.attention(
            q, window, paged(rows, 4, form), None, torch.zeros(heads), start=280, ratio=28,
            width=width, scale=dim**-0.5, dtype=BF16,
        )  # fmt: skip
        return out[0].flatten(1)

    clean = attend()
    q[0, 9, 2, 7] = bad
    window[0, earlier + 3, 150] = bad
    rows[0, 11, 180] = bad  # seen from position 28 * 12 - 1 on, after the last query
    rows[0, 10, 180] = bad  # from 28 * 11 - 1 = 280 + 27 on
    got = every_way(attend)
    touched = torch.zeros(queries, dtype=torch.bool)
    touched[3 : 3 + width], touched[27:], touched[9] = True, True, True
    assert torch.equal(got[~touched], clean[~touched])
    assert not got[touched].isfinite().all(1).any()
    q[0, 9, 2, 7] = 0
    rows[0, 10:], window[0, earlier + 3] = 0, 0
    assert attend().isfinite().all()


@pytest.mark.parametrize("k", [0, 700])
def test_attention_over_many_rows(k: int) -> None:
    """More keys than are taken at once; scores that grow, so that the largest one is a late one."""
    queries, start, earlier, width, dim, heads = 3, 3997, 31, 32, 64, 20
    q = activations(queries * heads, dim, BF16).abs().view(1, queries, heads, dim)
    window = activations(earlier + queries, dim, BF16, 2)[None]
    rows = activations(1000, dim, BF16, 3) * torch.linspace(0.1, 8, 1000)[:, None].to(BF16)
    rows = rows[None]
    chosen = None
    if k:
        generator = torch.Generator().manual_seed(0)
        picks = [torch.randperm(1000, generator=generator)[:k] for _ in range(queries)]
        chosen = torch.stack(picks).sort(1).values[None]
        chosen[0, 1, 400:] = -1
    sink = activations(1, heads, F32)[0]

    def attend(a: int, b: int) -> Tensor:
        out: Tensor = native.attention(
            q[:, a:b], window[:, a : earlier + b], rows, None if chosen is None else chosen[:, a:b],
            sink, start=start + a, ratio=4, width=width, scale=dim**-0.5, dtype=BF16,
        )  # fmt: skip
        return out

    got = every_way(lambda: attend(0, queries))
    assert torch.equal(torch.cat([attend(i, i + 1) for i in range(queries)], 1), got)
    wanted = reference.attention(
        q, window, rows, chosen, sink, start=start, ratio=4, width=width, scale=dim**-0.5,
        dtype=BF16,
    )  # fmt: skip
    close(got, wanted, 4)


@BOTH
def test_top_k_with_ties(dtype: torch.dtype) -> None:
    q = reference.hadamard_fp4(activations(12, 128, dtype)).view(1, 4, 3, 128)
    keys = reference.hadamard_fp4(activations(40, 128, dtype, 2))[None]
    keys[:, [5, 9, 30]] = keys[:, :1].clone()
    keys[:, 20:28] = 0
    weights = activations(4, 3, dtype).view(1, 4, 3)
    for k in (1, 7, 16, 36, 39, 60):
        got = every_way(lambda k=k: native.index_topk(q, keys, weights, 154, 4, k))  # type: ignore
        if k <= 40:
            assert torch.equal(got, reference.index_topk(q, keys, weights, 154, 4, k))
        else:
            assert got[0, -1].tolist() == [*range(39), *[-1] * 21]


# ---------------------------------------------------------------- the whole


@pytest.mark.skipif(kernels.NATIVE is None, reason="native kernels are switched off")
@pytest.mark.parametrize("ratios", [(0, 4, 128, 4, 0), (128, 4, 128, 0)], ids=["flash", "pro"])
@pytest.mark.parametrize("numerics", ["official", "float32"])
def test_logits_are_the_same_bits_in_one_pass_or_many(
    tmp_path: Path, ratios: tuple[int, ...], numerics: str
) -> None:
    config = V4Config(
        vocab_size=256, hidden_size=256, moe_intermediate_size=128,
        num_hidden_layers=len(ratios) - 1, num_hash_layers=1, num_attention_heads=3,
        n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=128, head_dim=128, o_groups=1,
        o_lora_rank=128, compress_ratios=ratios, index_n_heads=2, index_topk=24,
    )  # fmt: skip
    save_checkpoint(tmp_path / "m", config, synthesize(config, seed=1))
    model = dsv4.load(tmp_path / "m", numerics=numerics)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(256, (290,), generator=generator).tolist()
    torch.set_num_threads(1)
    whole = model.logits(ids)
    torch.set_num_threads(3)
    session = model.session()
    parts = [session.extend(ids[:3]), session.extend(ids[3:130])]
    parts += [session.extend([i]) for i in ids[130:270]]
    parts += [session.extend(ids[270:])]
    assert torch.equal(torch.cat(parts), whole)


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(2, 48, requires_grad=True)
        weight = torch.randn(5, 48)
        assert native.linear(x, weight, None, F32).requires_grad
        assert native.rms_norm(x, None, 1e-6).requires_grad
    x = torch.randn(2, 10)
    assert torch.equal(native.rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6))
    weight = torch.randn(5, 10)  # to be rounded to BF16 first
    wanted = reference.linear(x, weight, None, BF16)
    assert torch.equal(native.linear(x, weight, None, BF16), wanted)
    codes, scale = quant.quantize_fp8(torch.randn(4, 128), F32)
    odd = scale * 1.5  # not a power of two
    x = torch.randn(3, 128)
    assert torch.equal(native.linear(x, codes, odd, F32), reference.linear(x, codes, odd, F32))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="avx9"):
        native.use("avx9")
    assert native.isa() in native.isas()


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"DSV4_KERNELS": "reference"}, "None"),
        ({"DSV4_KERNELS": "native", "DSV4_ISA": "portable"}, "portable"),
        ({"DSV4_KERNELS": "fast"}, "native or reference"),
        ({"DSV4_ISA": "avx9"}, "no such instruction set"),
    ],
)
def test_the_environment_chooses(env: dict[str, str], says: str) -> None:
    code = "from dsv4 import kernels; print(kernels.NATIVE)"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | env
    )
    assert says in done.stdout + done.stderr


@pytest.mark.skipif(kernels.NATIVE is None, reason="native kernels are switched off")
def test_the_table_holds_them() -> None:
    for name in native.KERNELS:
        module = training if name in training.KERNELS else native
        assert getattr(kernels, name) is getattr(module, name)
        assert getattr(native, name) is not getattr(reference, name)
