"""Gradients agree with finite differences in double precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scripted_models import one_torch_thread  # noqa: F401
from test_losses import DOUBLE, batch, network
from torch import Tensor
from torch.autograd import gradcheck

from dsv4 import kernels
from dsv4.kernels import Stored, reference
from dsv4.packing import Packing
from dsv4.train.losses import losses

Random = Callable[..., Tensor]


@pytest.fixture
def random(monkeypatch: pytest.MonkeyPatch) -> Random:
    """Normal float64 tensors that want a gradient; blocks of queries are short."""
    generator = torch.Generator().manual_seed(7)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 5)

    def make(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    return make


@pytest.mark.parametrize("overlap", [False, True])
def test_compressor_pool(random: Random, overlap: bool) -> None:
    kv, gate = (random(2, 3 * 4, 6) for _ in range(2))

    def pool(kv: Tensor, gate: Tensor) -> Tensor:
        before = torch.full_like(gate[:, :4], -torch.inf)  # no block before the first
        return kernels.pool(kv, torch.cat((before, gate[:, 4:]), 1), 4, True)

    assert gradcheck(pool if overlap else lambda *x: kernels.pool(*x, 4, False), (kv, gate))


def test_hyper_connections(random: Random) -> None:
    h, d, mixes = 4, 3, 24
    streams, out = random(2, 3, h, d), random(2, 3, d)
    fn, scale, base = random(mixes, h * d), random(3), random(mixes)

    def site(streams: Tensor, out: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        x, post, comb = kernels.hc_read(streams, fn, scale, base, 1e-6, 1e-6, torch.float64)
        comb = kernels.sinkhorn(comb, 20, 1e-6)
        return kernels.hc_expand(x * out, streams, post, comb)

    assert gradcheck(site, (streams, out, fn, scale, base))


def test_sinkhorn_of_one_matrix(random: Random) -> None:
    comb = random(1, 1, 4, 4).detach().softmax(-1).requires_grad_()
    assert gradcheck(lambda m: kernels.sinkhorn(m, 20, 1e-6), (comb,))


def test_routed_experts(random: Random) -> None:
    experts, d, width, n = 4, 3, 5, 6
    matrices = [random(*shape) for shape in [(width, d), (d, width), (width, d)] * experts]
    ids = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 1], [1, 0], [3, 1]])  # none to expert 2

    def moe(x: Tensor, weights: Tensor, *m: Tensor) -> Tensor:
        w1, w2, w3 = ([Stored(w, None) for w in m[i::3]] for i in range(3))
        return kernels.routed_experts(x, ids, weights, w1, w2, w3, 0.8, False, torch.float64)

    assert gradcheck(moe, (random(n, d), random(n, 2), *matrices))


@pytest.mark.parametrize("choice", ["window", "all", "chosen"])
def test_attention_with_a_sink(random: Random, choice: str) -> None:
    t, heads, d, ratio = 14, 2, 4, 2
    count = 0 if choice == "window" else t // ratio
    chosen = None
    if choice == "chosen":  # the last two that are visible; -1 where none is
        seen = reference.visible_rows(0, t, ratio, torch.device("cpu"))
        chosen = torch.stack([(seen - i).clamp_min(-1) for i in (2, 1)], -1)[None]

    def attend(q: Tensor, window: Tensor, sink: Tensor, *rows: Tensor) -> Tensor:
        return kernels.attention(
            q, window, rows[0] if rows else None, chosen, sink,
            start=0, ratio=ratio if rows else 0, width=3, scale=0.5, dtype=torch.float64,
        )

    rows = [random(1, count, d)] if count else []
    assert gradcheck(attend, (random(1, t, heads, d), random(1, t, d), random(heads), *rows))


@pytest.mark.parametrize("sparse", [False, True])
def test_index_loss(random: Random, sparse: bool) -> None:
    t, ratio = 13, 2
    q, keys, weights = random(2, t, 3, 4), random(2, t // ratio, 4), random(2, t, 3)
    with torch.no_grad():
        chosen = kernels.index_topk(q, keys, weights, 0, ratio, 2) if sparse else None
        attention = random(2, t, 2, 8), random(2, t, 8), random(2, t // ratio, 8)
        sink = random(2)

    def divergence(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        return kernels.index_loss(
            q, keys, weights, *attention, chosen, sink, ratio=ratio, width=3, scale=0.5
        )

    assert gradcheck(divergence, (q, keys, weights))


def test_samples_apart_and_together(random: Random) -> None:
    packing = Packing([3, 1, 20, 17, 2])
    row = random(1, 43, 2)
    assert gradcheck(lambda x: packing.join([b.cumsum(1).sin() for b in packing.split(x)]), row)
    shapes = [random(*shape, 2) for shape in packing.shapes]
    assert gradcheck(lambda *x: packing.join(x), shapes)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_whole_loss_along_a_direction(attention: str) -> None:
    """Every parameter at once, through packing, recomputation, MTP and balance."""
    net, lengths = network(), [1, 70, 2, 41, 130]
    ids, weights = batch(lengths)
    objective = replace(
        DOUBLE, attention=attention, balance_weight=0.1, index_weight=0.0, recompute=True
    )
    trained = [p for n, p in net.named_parameters() if p.requires_grad and objective.trains(n)]
    generator = torch.Generator().manual_seed(1)
    step = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]

    def loss(by: float) -> Tensor:
        with torch.no_grad():
            for p, s in zip(trained, step, strict=True):
                p.add_(s, alpha=by)
        return losses(net, ids, weights, lengths, objective)[0]

    loss(0.0).backward()
    slope = sum(float((p.grad * s).sum()) for p, s in zip(trained, step, strict=True)
                if p.grad is not None)
    eps = 1e-6
    up, down = loss(eps).item(), loss(-2 * eps).item()
    assert slope == pytest.approx((up - down) / (2 * eps), rel=1e-5)
