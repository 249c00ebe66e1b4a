"""The native kernels with a gradient compute what the reference does, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.kernels import reference, training
from dsv4.packing import Packing

pytestmark = pytest.mark.skipif(kernels.NATIVE is None, reason="the native kernels are not built")
LOOSE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.04, 0.02)}


def outputs_and_gradients(
    f: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], *rest: object
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = f(*leaves, *rest)
    outs = [out] if isinstance(out, Tensor) else list(out)
    torch.manual_seed(5)
    loss = sum(((x.float() * torch.randn(x.shape)).sum() for x in outs), torch.zeros(()))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*outs, *(torch.zeros(()) if g is None else g for g in found)]


def compare(name: str, dtype: torch.dtype, inputs: list[Tensor], *rest: object) -> None:
    ours = outputs_and_gradients(getattr(kernels, name), inputs, *rest)
    truth = outputs_and_gradients(getattr(reference, name), inputs, *rest)
    absolute, relative = LOOSE[dtype]
    for a, b in zip(ours, truth, strict=True):
        a, b = a.detach(), b.detach()
        assert a.dtype == b.dtype and a.shape == b.shape
        size = float(b.float().abs().mean()) + 1e-6
        close = {"atol": 20 * absolute, "rtol": relative}
        torch.testing.assert_close(a.float() / size, b.float() / size, **close)


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("rows", [1, 31, 97])
def test_mhc(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    streams = torch.randn(1, rows, 4, 48, dtype=dtype)
    fn, scale, base = torch.randn(24, 192) * 0.1, torch.tensor([0.7, 0.3, 0.5]), torch.randn(24)
    compare("hc_read", dtype, [streams, fn, scale, base], 1e-6, 1e-6, dtype)
    post, comb = torch.rand(1, rows, 4), torch.rand(1, rows, 4, 4)
    compare("hc_expand", dtype, [torch.randn(1, rows, 48, dtype=dtype), streams, post, comb])


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (128, False)])
@pytest.mark.parametrize("length", [4, 130, 257])
def test_compressors(dtype: torch.dtype, ratio: int, overlap: bool, length: int) -> None:
    torch.manual_seed(length)
    wide = 32 * (1 + overlap)
    kv, gate = (torch.randn(2, length, wide, dtype=dtype) for _ in range(2))
    compare("compress", dtype, [kv, gate, torch.randn(ratio, wide)], ratio, overlap)


@pytest.mark.parametrize("count", [1, 16, 45])
def test_sinkhorn(count: int) -> None:
    torch.manual_seed(count)
    compare("sinkhorn", torch.float32, [torch.rand(count, 4, 4).softmax(-1)], 20, 1e-6)


@pytest.mark.parametrize("dtype", LOOSE)
def test_rotations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = torch.randn(7, 8)
    turn = torch.stack((angles.cos(), angles.sin()), -1)
    q, kv = torch.randn(2, 7, 3, 48, dtype=dtype), torch.randn(2, 7, 48, dtype=dtype)
    compare("norm_rope", dtype, [q], turn, 1e-6)
    compare("rope", dtype, [kv], turn)
    compare("rope", dtype, [q], turn.unsqueeze(-3), True)


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize(("rows", "used"), [(1, 5), (50, 5), (50, 1), (200, 5)])
def test_experts(dtype: torch.dtype, rows: int, used: int) -> None:
    torch.manual_seed(rows)
    x, ids = torch.randn(rows, 64, dtype=dtype), torch.rand(rows, 5).argsort(1)[:, :2] % used
    gates, ups = ([torch.randn(32, 64) * 0.3 for _ in range(5)] for _ in range(2))
    downs = [torch.randn(64, 32) * 0.3 for _ in range(5)]

    def run(module: object, x: Tensor, weights: Tensor, *matrices: Tensor) -> Tensor:
        w1, w3, w2 = (
            [kernels.Stored(m, None) for m in matrices[i : i + 5]] for i in (0, 5, 10)
        )
        f: Callable[..., Tensor] = module.routed_experts  # type: ignore[attr-defined]
        return f(x, ids, weights, w1, w2, w3, 1.0, False, dtype)

    inputs = [x, torch.rand(rows, 2), *gates, *ups, *downs]
    ours = outputs_and_gradients(lambda *a: run(kernels, *a), inputs)
    truth = outputs_and_gradients(lambda *a: run(reference, *a), inputs)
    for a, b in zip(ours, truth, strict=True):
        a, b = a.detach().float(), b.detach().float()
        scale = 1e-5 if dtype == torch.float32 else 0.03
        assert (a - b).norm() <= scale * b.norm() + 1e-6


def test_threads_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 300, 4, 64), torch.randn(24, 256) * 0.1]
    inputs += [torch.rand(3), torch.randn(24)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            x = inputs[0].clone().requires_grad_()
            out = kernels.hc_read(x, *inputs[1:], 1e-6, 1e-6, torch.float32)[0]
            found.append([out, *torch.autograd.grad(out.square().sum(), x)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("rows", [1, 31, 97])
def test_norms_and_the_end_of_the_streams(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    compare("rms_norm", dtype, [torch.randn(1, rows, 48, dtype=dtype), torch.randn(48)], 1e-6)
    streams = torch.randn(1, rows, 4, 48, dtype=dtype)
    fn, scale, base = torch.randn(4, 192) * 0.1, torch.tensor([0.7]), torch.randn(4)
    compare("hc_head", dtype, [streams, fn, scale, base], 1e-6, 1e-6, dtype)


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_swiglu(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(37, 48, dtype=dtype), torch.randn(37, 48, dtype=dtype)
    compare("swiglu", dtype, [gate, up], limit, dtype)


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("length", [1, 17, 150, 300])
@pytest.mark.parametrize("kind", ["window", "rows", "chosen"])
def test_attention(dtype: torch.dtype, length: int, kind: str) -> None:
    torch.manual_seed(length)
    q = torch.randn(2, length, 3, 32, dtype=dtype)
    window, rows = (torch.randn(2, n, 32, dtype=dtype) for n in (length, max(1, length // 4)))
    sink, chosen = torch.randn(3), None
    if kind == "chosen":
        seen = (torch.arange(length) + 1) // 4
        chosen = torch.rand(2, length, rows.shape[1]).topk(min(5, rows.shape[1])).indices
        chosen = chosen.masked_fill(chosen >= seen[:, None], -1)

    def run(table: object, q: Tensor, window: Tensor, sink: Tensor, *rows: Tensor) -> Tensor:
        found: Tensor = table.attention(  # type: ignore[attr-defined]
            q, window, rows[0] if rows else None, chosen, sink, start=0, ratio=4, width=128,
            scale=0.2, dtype=dtype,
        )
        return found

    inputs = [q, window, sink] + ([] if kind == "window" else [rows])
    ours = outputs_and_gradients(lambda *x: run(kernels, *x), inputs)
    truth = outputs_and_gradients(lambda *x: run(reference, *x), inputs)
    absolute, relative = LOOSE[dtype]
    for a, b in zip(ours, truth, strict=True):
        size = float(b.detach().float().abs().mean()) + 1e-3
        a, b = a.detach().float() / size, b.detach().float() / size
        torch.testing.assert_close(a, b, atol=20 * absolute, rtol=relative)


# Sample lengths, heads, their width, and how many rows each token chooses (0: all before it).
PACKED = {
    "one token": ([1], 4, 32, 0),
    "long and short": ([5, 1, 33, 300, 17], 4, 64, 0),
    "chosen": ([5, 1, 33, 300, 700], 4, 64, 16),
    "one head": ([129, 257], 1, 64, 5),
    "two heads": ([70, 31], 2, 96, 4),
    "many heads": ([70, 31], 64, 32, 4),
    "as many as can be": ([40, 3], 128, 32, 0),
    "an odd number": ([40, 30], 3, 32, 4),
}


def packed_attention(
    table: object, lengths: list[int], heads: int, dim: int, k: int, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(len(lengths))
    packing = Packing(lengths)
    q, kv = torch.randn(1, packing.tokens, heads, dim), torch.randn(1, packing.tokens, dim)
    rows = [torch.randn(b, t // 4, dim) for b, t in packing.shapes]
    chosen: list[Tensor | None] = []
    for (b, t), some in zip(packing.shapes, rows, strict=True):
        seen = (torch.arange(t) + 1) // 4
        picks = torch.rand(b, t, some.shape[1]).topk(min(k, some.shape[1])).indices
        few = 0 < k < some.shape[1]
        chosen.append(picks.masked_fill(picks >= seen[:, None], -1) if few else None)

    def run(q: Tensor, kv: Tensor, sink: Tensor, *rows: Tensor) -> Tensor:
        found: Tensor = table.packed_attention(  # type: ignore[attr-defined]
            q, kv, rows, chosen, sink, packing, ratio=4, width=40, scale=0.2, dtype=dtype
        )
        return found

    inputs = [x.to(dtype) for x in (q, kv)] + [torch.randn(heads)] + [r.to(dtype) for r in rows]
    return [x.detach() for x in outputs_and_gradients(run, inputs)]


@pytest.mark.parametrize("case", PACKED)
def test_attention_in_a_packed_row(case: str) -> None:
    for ours, exact in zip(
        packed_attention(kernels, *PACKED[case], torch.bfloat16),
        packed_attention(reference, *PACKED[case], torch.float32),
        strict=True,
    ):
        assert ours.shape == exact.shape
        assert (ours.float() - exact).norm() <= 0.02 * exact.norm() + 1e-3


def test_threads_do_not_change_a_bit_of_attention() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(packed_attention(kernels, [700, 40], 4, 64, 16, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    """A part at a time gives what whole logits give."""
    monkeypatch.setattr(training, "LOGITS_AT_ONCE", 16 * 90)
    torch.manual_seed(rows)
    inputs = [torch.randn(rows, 24, dtype=dtype), torch.randn(90, 24, dtype=dtype)]
    targets = torch.randint(90, (rows,))
    if rows:
        compare("cross_entropy", dtype, inputs, targets)
    if dtype == torch.float32:
        ours = outputs_and_gradients(kernels.cross_entropy, inputs, targets)
        truth = outputs_and_gradients(reference.cross_entropy, inputs, targets)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
