"""Ablations: equal tokens, nothing trained twice, the page says what the receipts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dsv4
from dsv4 import kernels
from dsv4.model import Transformer
from dsv4.numerics import FLOAT32
from dsv4.train import ablations
from dsv4.train.ablations import questions
from dsv4.train.initial import init_weights
from dsv4.train.launch import train_app

SHIPPED = Path(__file__).parents[1] / "recipes" / "ablations"
BASE = """
vocab_documents = 60
tokens_per_batch = 384
length = 160
mtp_weight = 0.0
log_every = 1
steps = 2
attention = "sparse"
shares = { recall = 1, arithmetic = 1 }
[model]
vocab_size = 384
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 2
head_dim = 128
n_routed_experts = 4
index_n_heads = 2
index_topk = 8
compress_ratios = [4, 128]
num_nextn_predict_layers = 0
num_hash_layers = 0
moe_intermediate_size = 128
q_lora_rank = 128
o_lora_rank = 128
o_groups = 1
"""
MIXING = """
title = "Constraint or none?"
about = "Two layers."
shows = ["loss", "growth", "recall"]
[variants.mHC]
[variants.unconstrained]
mixing = "unconstrained"
[variants.plain]
frozen = ["hc_"]
model = { hc_mult = 1 }
"""
REST = """
title = "The rest?"
shows = ["loss", "load", "stored"]
[variants.usual]
[variants.AdamW]
optimizer = "adamw"
[variants.full]
model = { compress_ratios = [0, 0], sliding_window = 1024 }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablations, "RECALL", (64,))
    monkeypatch.setattr("dsv4.train.findings.RECALL", (64,))
    monkeypatch.setattr(ablations, "HELD_OUT_TOKENS", 500)
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "base.toml").write_text(BASE)
    (folder / "mixing.toml").write_text(MIXING)
    (folder / "rest.toml").write_text(REST)
    return folder


@pytest.mark.slow
def test_a_grid_is_trained_measured_and_written_down(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = ["ablations", str(folder), "--out", str(out), "--seeds", "1"]
    done = CliRunner().invoke(train_app, command, catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.strip() == str(out / "ablations.md")
    receipts = {r["key"]: r for r in json.loads((out / "ablations.json").read_text())}
    names = {v.name: v.seeded(0).key for q in questions(folder) for v in q.variants}
    assert names["usual"] == names["mHC"] and len(receipts) == 5  # the same run, made once
    assert {r["tokens"] for r in receipts.values()} == {768}
    usual, free, plain, adamw, full = (
        receipts[names[n]] for n in ("mHC", "unconstrained", "plain", "AdamW", "full")
    )
    assert len(usual["streams"]) == 3 and len(usual["gain"]) == 2 and len(usual["curve"]) == 2
    # a plain residual adds up; doubly stochastic matrices gain nothing, others a little by now
    assert plain["gain"] == pytest.approx([1, 1], abs=1e-4)
    assert usual["gain"] == pytest.approx([1, 1], abs=1e-3) and max(free["gain"]) > 1.001
    # all begin alike, and no two go on alike
    assert usual["curve"][0][1] == pytest.approx(free["curve"][0][1], abs=0.02)
    assert adamw["curve"][0][1] == usual["curve"][0][1]
    assert len({r["loss"] for r in receipts.values()}) == 5
    assert full["parameters"] < usual["parameters"] and usual["stored_loss"] != usual["loss"]
    page = (out / "ablations.md").read_text()
    for name, receipt in zip(names, map(receipts.get, names.values()), strict=True):
        assert receipt and any(
            line.startswith(f"| {name} | {receipt['loss']:.4f} |") for line in page.splitlines()
        ), name
    for picture in ("ablations-mixing.png", "ablations-rest.png"):
        assert (out / picture).stat().st_size > 10_000 and f"({picture})" in page
    # again: nothing is trained, the same page comes out
    times = {f: f.stat().st_mtime_ns for f in out.glob("*/result.json")}
    again = CliRunner().invoke(train_app, command, catch_exceptions=False)
    assert again.exit_code == 0 and (out / "ablations.md").read_text() == page
    assert times == {f: f.stat().st_mtime_ns for f in out.glob("*/result.json")}


def test_without_the_constraint_a_new_model_is_what_it_was() -> None:
    """Only what is learned differs: the mixing starts as the identity in both."""
    config = next(q for q in questions(SHIPPED) if q.name == "residual").variants[0].recipe.config()
    net = Transformer(config)
    init_weights(net, 0, 0.02)
    ids = torch.randint(config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    tables = kernels.hc_read, kernels.sinkhorn
    with torch.no_grad():
        usual = net(ids, FLOAT32)
        with ablations._unconstrained():
            free = net(ids, FLOAT32)
    assert tables == (kernels.hc_read, kernels.sinkhorn)
    assert not torch.equal(usual, free)
    assert (usual - free).norm() < 0.1 * usual.norm()


def test_the_shipped_questions_compare_equal_tokens() -> None:
    found = questions(SHIPPED)
    assert {q.name for q in found} == {"attention", "balance", "optimizer", "qat", "residual"}
    for question in found:
        tokens = {
            sum(v.recipe.tokens_at(k) for k in range(v.recipe.steps)) for v in question.variants
        }
        assert len(tokens) == 1 and len({v.key for v in question.variants}) > 1, question.name
    first = {q.name: q.variants[0].key for q in found}
    assert first["balance"] == first["optimizer"] == first["qat"]  # trained once


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('[variants.a]\nmixing = "wild"', "mixing"),
        ('title = "?"', "variants"),
        ('shows = ["beauty"]\n[variants.a]', "shows"),
        ("wants = 3\n[variants.a]", "wants"),
        ("[variants.a]\nlearning = 3", "learning"),
        ('[variants.a]\noptimizer = "sgd"', "optimizer"),
    ],
)
def test_what_is_no_question_is_refused(folder: Path, text: str, names: str) -> None:
    (folder / "wrong.toml").write_text(text)
    with pytest.raises(dsv4.TrainingError, match=names):
        questions(folder)
