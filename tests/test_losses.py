"""Each loss is what its definition says, and trains what it should train."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scripted_models import one_torch_thread  # noqa: F401
from test_packing import CONFIG
from torch import Tensor

import dsv4
from dsv4 import kernels, quant
from dsv4.config import V4Config
from dsv4.kernels import reference
from dsv4.model import Noted, Transformer
from dsv4.numerics import FLOAT64, TRAIN_QAT, fp4_rotated
from dsv4.train.initial import init_weights
from dsv4.train.losses import Objective, learned_gates, losses, routes

LENGTHS = [1, 70, 2, 41, 3]
DOUBLE = Objective(dtype=torch.float64)


def network(seed: int = 0) -> Transformer:
    net = Transformer(CONFIG)
    init_weights(net, seed, std=0.2)
    return net.double()


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (1, sum(lengths)), generator=g)
    return ids, torch.rand(ids.shape, generator=g) * (torch.rand(ids.shape, generator=g) < 0.7)


def by_hand(net: Transformer, ids: Tensor, weights: Tensor) -> defaultdict[str, Tensor]:
    """Sums over one sample, from all its logits and from the definitions."""
    run = net.start(ids, FLOAT64)
    run.noted, run.dense = Noted(), True
    streams = net.trunk(run)
    log_p = net.logits(streams, run)[0].log_softmax(-1).detach()
    sums = defaultdict[str, Tensor](lambda: weights.new_zeros(()))
    for t in range(1, ids.shape[1]):
        sums["loss"] -= weights[0, t] * log_p[t - 1, ids[0, t]]
    if ids.shape[1] > 1:
        ahead = net.mtp_logits(net.mtp_streams(streams, run), run)[0].log_softmax(-1).detach()
        for t in range(2, ids.shape[1]):
            sums["mtp"] -= weights[0, t] * ahead[t - 2, ids[0, t]]
    for gate, (scores, chosen) in enumerate(run.noted.balance):
        n, experts = scores.shape
        for e in range(experts):
            share = (chosen == e).double().mean() * experts
            mean = (scores[:, e] / scores.sum(-1)).mean()
            sums[f"gate {gate}"] += n * share * mean
    return defaultdict(sums.default_factory, {k: v.detach() for k, v in sums.items()})


def test_parts_are_those_of_the_samples_alone() -> None:
    net, (ids, weights) = network(), batch(LENGTHS)
    total, parts, loads = losses(net, ids, weights, LENGTHS, DOUBLE)
    weights = weights.double()
    samples = zip(ids.split(LENGTHS, 1), weights.split(LENGTHS, 1), strict=True)
    alone = [by_hand(net, *sample) for sample in samples]
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    for name, first in (("loss", 1), ("mtp", 2)):
        wanted = sum(x[name] for x in alone) / weights[0][place >= first].sum()
        assert parts[name] == pytest.approx(wanted.item(), rel=1e-9)
    tokens = [sum(LENGTHS)] * 3 + [sum(LENGTHS) - len(LENGTHS)]  # the MTP block's gate comes last
    balance = sum(sum(x[f"gate {i}"] for x in alone) / n for i, n in enumerate(tokens))
    assert parts["balance"] == pytest.approx(float(balance), rel=1e-9)
    assert [int(load.sum()) for load in loads] == [2 * n for n in tokens]
    wanted = parts["loss"] + 0.3 * parts["mtp"] + 1e-4 * parts["balance"]
    assert total.item() == pytest.approx(wanted, rel=1e-12)


def test_rows_of_a_rectangle_are_samples_too() -> None:
    net, (ids, weights) = network(), batch([40, 40, 40])
    packed = losses(net, ids, weights, [40, 40, 40], DOUBLE)
    square = losses(net, ids.view(3, 40), weights.view(3, 40), None, DOUBLE)
    assert packed[1].keys() == square[1].keys()
    assert packed[1] == pytest.approx(square[1], rel=1e-9)
    assert all(map(torch.equal, packed[2], square[2]))


@pytest.mark.parametrize("attention", ["warmup", "sparse"])
def test_samples_too_short_for_some_loss(attention: str) -> None:
    net = network()
    for ids, lengths in ((torch.ones(1, 6), [2, 3, 1]), (torch.ones(2, 2), None)):
        ids, weights = ids.long(), ids
        objective = replace(DOUBLE, attention=attention)
        total, parts, _ = losses(net, ids, weights, lengths, objective)
        assert parts["index"] == 0 and (parts["mtp"] > 0) == (lengths is not None)
        assert all(g.isfinite().all() for g in grads(net, total).values())


def grads(net: Transformer, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["dense", "warmup", "sparse"])
@pytest.mark.parametrize("qat", [False, True])
def test_each_stage_trains_what_it_should(attention: str, qat: bool) -> None:
    if qat:  # which takes whole blocks
        net = Transformer(replace(V4Config.preset("nano"), vocab_size=64, index_topk=8))
    else:
        net = Transformer(CONFIG)
    init_weights(net, std=0.2)
    objective = Objective(attention=attention, qat=qat)
    lengths = [*LENGTHS, 130]
    total, parts, _ = losses(net, *batch(lengths), lengths, objective)
    got = grads(net, total)
    assert ("index" in parts) == (attention != "dense")
    assert all(objective.trains(n) for n in got)
    trained = {n for n, p in net.named_parameters() if p.requires_grad and objective.trains(n)}
    # experts that saw no token apart, everything has a gradient
    assert {n for n in trained if ".experts." not in n} <= set(got)
    assert all(p.requires_grad for n, p in net.named_parameters() if "wq_a" in n)  # as before


def test_the_indexers_loss_does_not_touch_the_rest() -> None:
    net, (ids, weights) = network(), batch(LENGTHS)
    sparse = replace(DOUBLE, attention="sparse")
    with_loss = grads(net, losses(net, ids, weights, LENGTHS, sparse)[0])
    without = grads(net, losses(net, ids, weights, LENGTHS, replace(sparse, index_weight=0.0))[0])
    assert {n for n in with_loss if ".indexer." not in n} == set(without)
    assert all(torch.equal(with_loss[n], without[n]) for n in without)
    assert all(with_loss[n].any() for n in with_loss if ".indexer." in n)


def test_index_loss_by_its_definition() -> None:
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    t, ratio, width = 300, 4, 20
    q, keys, w = random(1, t, 3, 8), random(1, t // ratio, 8), random(1, t, 3)
    queries, window, rows = random(1, t, 2, 16), random(1, t, 16), random(1, t // ratio, 16)
    sink = random(2)
    chosen = kernels.index_topk(q, keys, w, 0, ratio, 6)
    for picks in (None, chosen):
        got = kernels.index_loss(
            q, keys, w, queries, window, rows, picks, sink, ratio=ratio, width=width, scale=0.25
        )[0]
        assert not got[: ratio - 1].any()
        for i in (3, 17, 127, 128, 299):
            seen = torch.arange((i + 1) // ratio)
            if picks is not None:
                seen = picks[0, i][picks[0, i] >= 0]
            near = window[0, max(0, i - width + 1) : i + 1]
            logits = queries[0, i] @ torch.cat((near, rows[0, seen])).T * 0.25
            p = torch.cat((logits, sink[:, None]), 1).softmax(-1)[:, len(near) : -1].sum(0)
            p = p / p.sum()
            scores = (w[0, i, :, None] * F.relu(q[0, i] @ keys[0, seen].T)).sum(0)
            wanted = (p * (p.log() - scores.log_softmax(-1))).sum()
            torch.testing.assert_close(got[i], wanted, rtol=1e-9, atol=1e-12)


def recall(q: Tensor, keys: Tensor, weights: Tensor, *attention: Tensor) -> float:
    """Share of the best possible: how much attention on compressed rows falls on the indexer's
    8 best, divided by how much the 8 best can hold; for queries that see more than 16 rows."""
    queries, window, rows, _, sink = attention
    count, t = keys.shape[1], q.shape[1]
    seen = reference.visible_rows(0, t, 4, q.device)
    hidden = seen[:, None] <= torch.arange(count)
    p = reference._row_attention(queries, window, rows, hidden, sink, 128, 16**-0.5)
    best = kernels.index_topk(q, keys, weights, 0, 4, 8)
    held = p.gather(-1, best.clamp_min(0)).sum(-1) / p.topk(8, -1).values.sum(-1)
    return float(held[:, seen > 16].mean())


def test_warmup_teaches_the_indexer_where_attention_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Transformer(replace(CONFIG, num_hidden_layers=1, compress_ratios=(4, 0), index_n_heads=4))
    init_weights(net, 1)
    attention = net.layers[0].attn
    with torch.no_grad():  # attention that is sharp
        for norm in (attention.q_norm, attention.kv_norm, attention.compressor.norm):
            norm.weight.mul_(3)
    seen: list[Tensor] = []

    def spy(*arguments: Tensor, **options: float) -> Tensor:
        seen[:] = [x if x is None else x.detach() for x in arguments]
        return reference.index_loss(*arguments, **options)

    monkeypatch.setattr(kernels, "index_loss", spy)
    objective = Objective(attention="warmup", mtp_weight=0.0, dtype=torch.float32)
    before = {n: p.clone() for n, p in net.named_parameters()}
    adam = torch.optim.Adam([p for n, p in net.named_parameters() if objective.trains(n)], lr=0.02)
    recalls, divergences = [], []
    for step in range(200):
        ids, weights = batch([256], seed=step)
        total, parts, _ = losses(net, ids, weights, [256], objective)
        divergences.append(parts["index"])
        recalls.append(recall(*seen))
        grads(net, total)
        adam.step()
    chance = recalls[0]
    assert chance < 0.35 and sum(recalls[-5:]) / 5 > 0.7
    assert divergences[-1] < divergences[0] / 3
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) or objective.trains(name)


def test_queries_and_keys_of_the_indexer_are_fp4_in_qat() -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    y = fp4_rotated(x, TRAIN_QAT)
    assert torch.equal(y, quant.fp4_round(quant.hadamard(x.detach())))
    seed = torch.randn(3, 64).bfloat16()
    (grad,) = torch.autograd.grad(y, x, seed)
    torch.testing.assert_close(grad, quant.hadamard(seed))  # its own inverse


def test_routes_of_the_same_weights_change_nothing() -> None:
    net, (ids, weights) = network(), batch(LENGTHS)
    own = losses(net, ids, weights, LENGTHS, DOUBLE)
    given = losses(net, ids, weights, LENGTHS, DOUBLE, routes(net, ids, LENGTHS, DOUBLE))
    assert given[1] == own[1] and torch.equal(given[0], own[0])


def test_routes_of_older_weights_decide_the_experts_and_not_their_weights() -> None:
    net, older, (ids, weights) = network(0), network(1), batch(LENGTHS)
    ahead = routes(older, ids, LENGTHS, DOUBLE)
    assert len(ahead) == len(learned_gates(net)) == 4
    total, _, loads = losses(net, ids, weights, LENGTHS, DOUBLE, ahead)
    for load, chosen in zip(loads, ahead, strict=True):
        assert torch.equal(load, torch.bincount(chosen.flatten(), minlength=4))
    assert grads(net, total)["layers.1.ffn.gate.weight"].any()
    with pytest.raises(dsv4.TrainingError, match="4 gates"):
        losses(net, ids, weights, LENGTHS, DOUBLE, ahead[:2])


@pytest.mark.parametrize(
    ("attention", "index_weight"), [("dense", 1.0), ("sparse", 1.0), ("sparse", 0.0)]
)
def test_recomputed_blocks_give_the_same_gradients_from_less_memory(
    attention: str, index_weight: float
) -> None:
    net, (ids, weights) = network(), batch(LENGTHS)
    held = []

    def run(recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        kept = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.nbytes
            return x

        objective = Objective(
            attention=attention, index_weight=index_weight, recompute=recompute, dtype=torch.float64
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            total = losses(net, ids, weights, LENGTHS, objective)[0]
        held.append(kept)
        return total, grads(net, total)

    (once, expected), (twice, got) = run(False), run(True)
    assert torch.equal(once, twice) and got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in got)
    assert held[1] < held[0] / 4


def test_another_attention_is_refused() -> None:
    with pytest.raises(dsv4.TrainingError, match="warmup"):
        Objective(attention="sparce")
