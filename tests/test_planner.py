"""The planner's numbers are the published ones, and what the engine really allocates and does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv4 import kernels
from dsv4.checkpoint import Checkpoint, save_checkpoint
from dsv4.config import V4Config
from dsv4.engine.kvstate import Layout
from dsv4.engine.session import Session
from dsv4.errors import ConfigError
from dsv4.kernels import reference
from dsv4.model import Transformer
from dsv4.numerics import FLOAT32, OFFICIAL, Numerics
from dsv4.planner import (
    activation_bytes,
    block_bytes,
    efficiency,
    extend_passes,
    forward_flops,
    kv_bytes,
    kv_bytes_per_token,
    ratios_over_context,
    session_bytes,
    token_flops,
    training_bytes,
    training_flops,
    weight_bytes,
)
from dsv4.synth import synthesize
from dsv4.train.initial import init_weights
from dsv4.train.losses import Objective, losses
from dsv4.train.optim import MuonAdamW, OptimSettings

TINY = V4Config(
    vocab_size=512, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=5,
    num_hash_layers=1, num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2,
    q_lora_rank=128, o_groups=2, o_lora_rank=128, compress_ratios=(0, 4, 128, 4, 128, 0),
    index_n_heads=4, index_topk=16, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> Transformer:
    net = Transformer(TINY)
    init_weights(net, seed=0)
    return net


# ---------------------------------------------------------------- the published numbers


def test_the_report_s_claims_at_one_million_tokens() -> None:
    models = efficiency(1 << 20)["models"]
    assert [models[m]["kv_bytes_per_token"] for m in ("v3.2", "pro", "flash")] == [
        48068, 5031, 3514,
    ]  # fmt: skip
    assert round(models["v3.2"]["kv_bytes"] / 1e9, 2) == 50.40
    for name, kv, kv_times, flops, flops_times in (
        ("pro", "10.48%", "9.545", "27.3%", "3.67"),
        ("flash", "7.32%", "13.67", "10.3%", "9.75"),
    ):
        row = models[name]
        assert f"{row['kv_ratio']:.2%}" == kv and f"{1 / row['kv_ratio']:.4g}" == kv_times
        assert f"{row['flops_ratio']:.1%}" == flops and f"{1 / row['flops_ratio']:.2f}" == (
            flops_times
        )
        assert sum(row["parts"].values()) == pytest.approx(row["flops"])


def test_the_ratios_over_context() -> None:
    found = [
        [f"{row[m][key]:.0%}" for key in ("kv_ratio", "flops_ratio") for m in ("pro", "flash")]
        for row in ratios_over_context()
    ]
    assert found == [
        ["12%", "8%", "84%", "23%"], ["11%", "8%", "75%", "21%"], ["11%", "7%", "55%", "16%"],
        ["11%", "7%", "43%", "14%"], ["10%", "7%", "34%", "12%"], ["10%", "7%", "27%", "10%"],
    ]  # fmt: skip


def test_weights_change_the_claim() -> None:
    raw = dict.fromkeys(("fp8", "fp4", "bf16", "head", "core", "index_fp4", "index_fp8"), 1.0)
    models = efficiency(1 << 20, raw)["models"]
    assert f"{models['pro']['flops_ratio']:.1%} {models['flash']['flops_ratio']:.1%}" == (
        "26.2% 12.1%"
    )
    with pytest.raises(ConfigError, match="fp16"):
        efficiency(1024, {"fp16": 1.0})
    with pytest.raises(ConfigError, match="1,048,576"):
        efficiency((1 << 20) + 1)
    with pytest.raises(ConfigError, match="4,096"):
        efficiency(8192, models={"tiny": TINY})


@pytest.mark.parametrize(("name", "size"), [("flash", 159.61e9), ("pro", 864.70e9)])
def test_published_file_sizes(name: str, size: float) -> None:
    assert weight_bytes(V4Config.preset(name)) == pytest.approx(size, abs=5e6)


def test_active_parameters_are_the_linear_flops() -> None:
    """Two operations for each active parameter but the vectors; the MTP block apart."""
    for name in ("flash", "pro"):
        config = V4Config.preset(name)
        flops = token_flops(config, 1 << 20)
        linear = flops.fp8 + flops.fp4 + flops.bf16 + flops.head
        assert linear == pytest.approx(2 * config.parameter_counts().active, rel=0.01)


# ---------------------------------------------------------------- what the engine allocates


@pytest.mark.parametrize("nx", [FLOAT32, OFFICIAL], ids=lambda nx: nx.name)
def test_kv_bytes_are_those_of_the_session(net: Transformer, nx: Numerics) -> None:
    session, passes = Session(net, nx), list[int]()
    for tokens in (1, 3, 62, 62, 1, 700, 5, 122, 300, 1, 1):
        passes += extend_passes(len(session), tokens)
        session.extend([1] * tokens, last=True)
        assert session_bytes(TINY, passes, nx.name) == session.bytes(), passes


@pytest.mark.parametrize("name", ["nano", "flash", "pro"])
def test_a_block_has_the_published_bytes_of_its_tokens(name: str) -> None:
    config = V4Config.preset(name)
    assert Layout(config, OFFICIAL).bytes == block_bytes(config) == 128 * kv_bytes_per_token(config)
    assert Layout(config, FLOAT32).bytes == block_bytes(config, "float32")


def test_old_snapshots_are_thinned_in_the_prediction_too(
    net: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in ("planner.memory", "engine.session"):
        monkeypatch.setattr(f"dsv4.{where}.DENSE_BYTES", 0)  # so that there are few
    session = Session(net, FLOAT32)
    session.extend([1] * 4000, last=True)
    assert session_bytes(TINY, extend_passes(0, 4000), "float32") == session.bytes()


def test_published_kv_bytes_count_whole_blocks() -> None:
    entry, key = 584, 68
    assert kv_bytes(TINY, 127) == 5 * 127 * entry + 2 * 31 * (entry + key)
    assert kv_bytes(TINY, 128) == 5 * 128 * entry + 2 * 32 * (entry + key) + 2 * entry


def test_weight_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tiny", TINY, synthesize(TINY))
    file = tmp_path / "tiny" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert weight_bytes(TINY) == file.stat().st_size - header
    assert weight_bytes(TINY) == Checkpoint.open(tmp_path / "tiny").bytes


def test_training_bytes_are_those_of_the_optimizer(net: Transformer) -> None:
    predicted = training_bytes(TINY)
    optimizer = MuonAdamW(net.named_parameters(), OptimSettings())
    assert predicted.optimizer == sum(t.nbytes for t in optimizer.state.values())
    assert predicted.masters == sum(p.nbytes for p in net.parameters())
    assert predicted.gradients == sum(p.nbytes for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("mtp", [0.0, 0.3])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.skipif(kernels.NATIVE is None, reason="what torch's own kernels keep is not planned")
def test_activation_bytes_are_what_the_backward_pass_is_left(
    net: Transformer, attention: str, mtp: float
) -> None:
    tokens = 256
    ids = torch.randint(TINY.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    objective = Objective(mtp_weight=mtp, attention=attention)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses(net, ids, torch.ones(1, tokens), None, objective)
    real = sum(x.untyped_storage().nbytes() for x in kept.values())
    plan = activation_bytes(TINY, tokens, mtp=mtp > 0, sparse=attention == "sparse")
    assert sum(plan.blocks) + sum(plan.copies) + plan.ends == pytest.approx(real, rel=0.05)


# ---------------------------------------------------------------- what the model does


def mv_flops(a: Any, x: Any, out_val: Any = None, **_: Any) -> int:
    return 2 * a[0] * a[1]


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that torch sees: nothing in C++."""
    for name in kernels.__all__:
        if hasattr(reference, name):
            monkeypatch.setattr(kernels, name, getattr(reference, name))
    monkeypatch.setattr(kernels, "NATIVE", None)


def counter() -> FlopCounterMode:
    """Counts matrix products, those with a single row included."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: mv_flops})


@contextmanager
def without_masked_work(mode: FlopCounterMode) -> Iterator[list[int]]:
    """Attention and index scores counted by what their arguments let a query see.

    Prefill handles queries together and masks what some of them may not see; these products are
    thrown away. In the list: operations to put in place of what ``mode`` counted.
    """
    corrections = list[int]()
    before = {name: getattr(kernels, name) for name in ("attention", "index_topk")}

    def attention(q: Any, window: Any, rows: Any, chosen: Any, sink: Any, **kw: Any) -> Any:
        counted = mode.get_total_flops()
        out = before["attention"](q, window, rows, chosen, sink, **kw)
        pairs = 0
        for i in range(q.shape[1]):
            position = kw["start"] + i
            pairs += min(position + 1, kw["width"])
            visible = (position + 1) // kw["ratio"] if kw["ratio"] else 0
            pairs += visible if chosen is None else int((chosen[0, i] >= 0).sum())
        useful = 4 * q.shape[2] * q.shape[3] * pairs
        corrections.append(useful - (mode.get_total_flops() - counted))
        return out

    def index_topk(q: Any, keys: Any, weights: Any, start: int, ratio: int, k: int) -> Any:
        counted = mode.get_total_flops()
        out = before["index_topk"](q, keys, weights, start, ratio, k)
        visible = sum((start + i + 1) // ratio for i in range(q.shape[1]))
        useful = 2 * q.shape[2] * q.shape[3] * visible
        corrections.append(useful - (mode.get_total_flops() - counted))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attention", attention)
        patch.setattr(kernels, "index_topk", index_topk)
        yield corrections


@pytest.mark.parametrize("length", [1, 30, 200, 513, 1100])
@pytest.mark.usefixtures("reference_kernels")
def test_flops_of_a_prefill(net: Transformer, length: int) -> None:
    mode = counter()
    with mode, without_masked_work(mode) as corrections, torch.no_grad():
        net(torch.ones(1, length, dtype=torch.int64))
    counted = mode.get_total_flops() + sum(corrections)
    assert forward_flops(TINY, length).total == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("context", [2, 70, 300, 1500])
@pytest.mark.usefixtures("reference_kernels")
def test_flops_of_one_token_need_no_correction(net: Transformer, context: int) -> None:
    session = Session(net, FLOAT32)
    session.extend([1] * (context - 1), last=True)
    with (mode := counter()):
        session.extend([1])
    assert token_flops(TINY, context).total == pytest.approx(mode.get_total_flops(), rel=0.03)


@pytest.mark.usefixtures("reference_kernels")
def test_flops_of_the_mtp_block(net: Transformer) -> None:
    with torch.no_grad():
        run = net.start(torch.ones(1, 101, dtype=torch.int64), FLOAT32)
        streams = net.trunk(run)
        mode = counter()
        with mode, without_masked_work(mode) as corrections:
            net.mtp_logits(net.mtp_streams(streams, run), run)
    counted = mode.get_total_flops() + sum(corrections)
    with_mtp, without = forward_flops(TINY, 100, mtp=True), forward_flops(TINY, 100)
    assert with_mtp.total - without.total == pytest.approx(counted, rel=0.03)


def test_training_is_three_forward_passes() -> None:
    assert training_flops(TINY, 64).total == 3 * forward_flops(TINY, 64, mtp=True).total
    with pytest.raises(ConfigError, match="4096"):
        forward_flops(TINY, 4097)
    with pytest.raises(ConfigError, match="official"):
        session_bytes(TINY, [1], "fp16")
