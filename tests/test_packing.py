"""A sample in a packed row gives the logits and gradients that it gives alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_models import one_torch_thread  # noqa: F401
from torch import Tensor

import dsv4
from dsv4.config import V4Config
from dsv4.model import Transformer
from dsv4.numerics import FLOAT32, FLOAT64, Numerics
from dsv4.packing import Packing, padded_length
from dsv4.train.initial import init_weights

CONFIG = V4Config(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=4,
    num_hash_layers=1, num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2,
    q_lora_rank=16, head_dim=16, qk_rope_head_dim=8, o_groups=2, o_lora_rank=8,
    compress_ratios=(0, 4, 128, 4, 0), index_n_heads=2, index_head_dim=16, index_topk=8,
)


def outputs(
    net: Transformer, ids: Tensor, lengths: list[int] | None, nx: Numerics
) -> tuple[Tensor, Tensor]:
    """Logits of the next token and of the one after it."""
    run = net.start(ids, nx, lengths=lengths)
    streams = net.trunk(run)
    logits = net.logits(streams, run)[0]
    if ids.shape[1] == 1:
        return logits, logits[:0]
    return logits, net.mtp_logits(net.mtp_streams(streams, run), run)[0]


def gradients(net: Transformer, logits: Tensor, ahead: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every logit differently."""
    net.zero_grad()
    both = torch.cat((logits, ahead)).flatten()
    (both * torch.arange(1.0, len(both) + 1).sin()).sum().backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def check(lengths: list[int], seed: int = 0) -> None:
    net = Transformer(CONFIG)
    init_weights(net, seed, std=0.2)
    ids = torch.randint(64, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))

    def both(nx: Numerics) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        alone = [outputs(net, part, None, nx) for part in ids.split(lengths, 1)]
        apart = torch.cat([x for x, _ in alone]), torch.cat([x for _, x in alone])
        return outputs(net, ids, lengths, nx), apart

    for got, wanted in zip(*both(FLOAT32), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    net.double()
    packed, apart = both(FLOAT64)
    for got, wanted in zip(packed, apart, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    got_grads, wanted_grads = gradients(net, *packed), gradients(net, *apart)
    assert got_grads.keys() >= wanted_grads.keys()
    for name, got in got_grads.items():  # samples too short to be compressed leave no gradient
        wanted = wanted_grads.get(name, torch.zeros_like(got))
        error = (got - wanted).abs().max()
        assert error <= 1e-10 * (1 + wanted.abs().max()), name


def test_every_branch_at_every_boundary() -> None:
    check([3, 128, 1, 600, 4, 127, 5, 129])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 150), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_random_lengths(lengths: list[int], seed: int) -> None:
    check(lengths, seed)


@pytest.mark.parametrize("lengths", [[], [0, 8], [3, 4]])
def test_lengths_that_are_not_those_of_the_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(dsv4.TrainingError):
        Transformer(CONFIG).start(torch.zeros(1, 8, dtype=torch.int64), FLOAT32, lengths=lengths)


def test_few_shapes_and_little_padding() -> None:
    widths = [padded_length(n) for n in range(1, 5000)]
    assert all(n <= width <= max(16, 1.5 * n) for n, width in enumerate(widths, 1))
    assert len(set(widths)) < 20
    row = torch.randn(1, 300, 2)
    packing = Packing([100, 1, 180, 19])
    batches = packing.split(row)
    assert [tuple(x.shape) for x in batches] == [(1, 16, 2), (1, 24, 2), (1, 128, 2), (1, 192, 2)]
    assert torch.equal(batches[3][0, :180], row[0, 101:281])
    assert torch.equal(packing.join(batches), row)
