"""A run resumes bit for bit, exports what it trained, and its optimizer does what it says."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dsv4
from dsv4 import quant
from dsv4.errors import TrainingError
from dsv4.model import Transformer
from dsv4.numerics import TRAIN_QAT
from dsv4.train.initial import init_weights
from dsv4.train.loop import Run
from dsv4.train.optim import FAST, MuonAdamW, OptimSettings, orthogonalize, uses_muon
from dsv4.train.recipes import Recipe, Stage
from dsv4.train.runfiles import RunLog, read_log

TINY = Recipe(
    model={
        "vocab_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 128,
        "n_routed_experts": 4, "compress_ratios": [0, 4, 128, 0], "index_n_heads": 2,
    },
    vocab_documents=300, log_every=1,
    stages=(
        Stage(
            steps=2, tokens_per_batch=1024, length=160, warmup=2,
            shares={"arithmetic": 3, "recall": 1},
        ),
        Stage(steps=4, tokens_per_batch=1024, length=160, final_lr=0.1, qat_steps=2),
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with Run(TINY, tmp_path_factory.mktemp("run")) as run:
        run.train()
        yield run


def test_the_loss_falls_and_is_logged(finished: Run) -> None:
    lines = [x for x in read_log(finished.folder) if "loss" in x]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"mtp", "grad_norm", "lr", "tokens_per_s", "worst_load"} <= set(lines[-1])


def test_the_exported_files_are_the_trained_model(finished: Run) -> None:
    ids = finished.tokenizer.encode("What is 12 + 30?")
    parent = dsv4.load(finished.folder / "parent", numerics="float32")
    stored = dsv4.load(finished.folder / "model", numerics="float32")
    assert parent.config.expert_dtype == "bf16" and stored.config.expert_dtype == "fp4"
    assert parent.tokenizer is not None and stored.tokenizer is not None
    with torch.no_grad():
        run = finished.net.start(torch.tensor([ids]), TRAIN_QAT)
        qat = finished.net.logits(finished.net.trunk(run), run)[0]
    p, q = stored.logits(ids).log_softmax(-1), qat.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-2
    gap = (stored.logits(ids) - parent.logits(ids)).abs().max()
    assert 0 < gap < 1


def test_a_run_can_start_from_a_checkpoint(finished: Run, tmp_path: Path) -> None:
    """What it starts from is what was stored, in either format, and its tokenizer."""
    for format in ("parent", "model"):
        source = finished.folder / format
        with Run(replace(TINY, weights=str(source)), tmp_path / format) as run:
            ids = run.tokenizer.encode("What is 12 + 30?")
            assert ids == finished.tokenizer.encode("What is 12 + 30?")
            with torch.no_grad():
                logits = run.net(torch.tensor([ids]))[0]
            stored = dsv4.load(source, numerics="float32").logits(ids)
            torch.testing.assert_close(logits, stored, atol=1e-4, rtol=1e-4)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    mine = replace(TINY, weights=str(moved))
    with Run(mine, tmp_path / "mine") as run:
        log = RunLog(run.folder, 0, run.ranks)
        run.train_step(log)
        run.save(log)
        log.close()
    shutil.rmtree(moved)  # it is needed but once
    with Run(mine, tmp_path / "mine") as run:
        assert run.resumed and run.step == 1
    other = replace(TINY, weights=str(source), model=TINY.model | {"n_routed_experts": 8})
    with pytest.raises(TrainingError, match="n_routed_experts 8"):
        Run(other, tmp_path / "other")


@pytest.mark.parametrize(("rows", "inputs"), [(256, 384), (192, 320)])  # not all whole blocks
def test_fake_quantised_weights_are_the_stored_ones(rows: int, inputs: int) -> None:
    torch.manual_seed(0)
    w = (torch.randn(256, 384) * 0.05)[:rows, :inputs].clone().requires_grad_()
    for fmt, make in (("fp4", quant.quantize_fp4), ("fp8", quant.quantize_fp8)):
        fake = quant.fake_quant_weight(w, fmt)
        torch.testing.assert_close(fake, quant.dequantize(*make(w.detach())), rtol=0, atol=1e-8)
        (grad,) = torch.autograd.grad((fake * 3).sum(), w)
        assert torch.equal(grad, torch.full_like(grad, 3.0))


@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (512, 128)])
@pytest.mark.parametrize(("smallest", "within"), [(1.0, 1e-3), (1e-3, 1e-3), (1e-4, 3e-3)])
def test_orthogonalized_singular_values_are_one(
    shape: tuple[int, int], smallest: float, within: float
) -> None:
    g = torch.Generator().manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    s = torch.logspace(0, math.log10(smallest), len(s)) if smallest < 1 else s
    values = torch.linalg.svdvals(orthogonalize((u @ torch.diag(s) @ v)[None], torch.float32))
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=within)


def test_muon_is_torchs_where_the_settings_coincide() -> None:
    g = torch.Generator().manual_seed(0)
    mine = {f"w{i}": nn.Parameter(torch.randn(n, 64, generator=g)) for i, n in enumerate((32, 96))}
    theirs = [nn.Parameter(p.detach().clone()) for p in mine.values()]
    a = MuonAdamW(mine.items(), OptimSettings(update_rms=0.2, newton_schulz=(FAST,) * 5))
    b = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, ns_coefficients=FAST, ns_steps=5,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for _ in range(4):
        before = [p.detach().clone() for p in theirs]
        for p, q in zip(mine.values(), theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step(0.02)
        b.step()
        for p, q, old in zip(mine.values(), theirs, before, strict=True):
            assert (p - q).norm() < 0.02 * (q - old).norm()  # both compute in bfloat16
            with torch.no_grad():
                p.copy_(q)


def test_adamw_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(20, 8, generator=g))
    copy = nn.Parameter(table.detach().clone())
    a = MuonAdamW([("embed.weight", table)], OptimSettings(eps=1e-8))
    b = torch.optim.AdamW([copy], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        table.grad = torch.randn(table.shape, generator=g)
        copy.grad = table.grad.clone()
        a.step(0.01)
        b.step()
    torch.testing.assert_close(table, copy)


def test_what_has_no_gradient_is_left_alone() -> None:
    a, b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    optim = MuonAdamW([("x.weight", a), ("norm.weight", b)], OptimSettings())
    before = a.detach().clone(), b.detach().clone()
    optim.step(1.0)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_every_parameter_has_one_optimizer() -> None:
    net = Transformer(TINY.config())
    init_weights(net)
    optim = MuonAdamW(net.named_parameters(), OptimSettings())
    for name, p in net.named_parameters():
        assert (name + ".v" in optim.state) == (p.requires_grad and not uses_muon(name, p)), name
    muon = {n for n, p in net.named_parameters() if uses_muon(n, p) and p.requires_grad}
    assert "layers.0.attn.wq_a.weight" in muon and "layers.1.ffn.experts.0.w1.weight" in muon
    assert not muon & {"embed.weight", "head.weight", "norm.weight", "layers.1.attn.attn_sink"}


def test_stages_train_the_indexer_when_they_say(tmp_path: Path) -> None:
    """Dense attention leaves it alone, its warm-up changes nothing else, then all is trained."""
    base = TINY.stages[1]
    stages = tuple(replace(base, steps=1, attention=a) for a in ("dense", "warmup", "sparse"))
    recipe = replace(TINY, model=TINY.model | {"index_topk": 8}, stages=stages, checkpoint_every=1)
    with Run(recipe, tmp_path) as run:
        run.train()
        states = []
        for step in run.checkpoints.steps():
            state = {f"model.{n}": torch.empty_like(p) for n, p in run.net.named_parameters()}
            run.checkpoints.load(step, state)
            states.append(state)
    assert len(states) == 3  # after each of them
    for before, after, stage in zip(states, states[1:], stages[1:], strict=False):
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        indexer = {n for n in before if ".indexer." in n}
        assert indexer & changed
        assert (changed <= indexer) == (stage.attention == "warmup"), stage.attention


@pytest.mark.slow
def test_passes_and_recomputation_change_nothing_but_memory(tmp_path: Path) -> None:
    losses = []
    for name, more in {
        "at once": {}, "in passes": {"tokens_per_pass": 300}, "again": {"recompute": True},
    }.items():  # fmt: skip
        recipe = replace(TINY, dtype="float32", stages=(replace(TINY.stages[0], steps=3),), **more)
        with Run(recipe, tmp_path / name) as run:
            run.train()
        losses.append([line["loss"] for line in read_log(tmp_path / name) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_a_recipe_is_made_of_stages() -> None:
    assert TINY.steps == 6
    assert TINY.at(1) == (TINY.stages[0], 1) and TINY.at(2) == (TINY.stages[1], 0)
    assert TINY.at(6) == (TINY.stages[1], 4)  # after the end
    factors = [stage.lr_factor(n) for stage, n in map(TINY.at, range(7))]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[6] == pytest.approx(0.1)
    assert factors[2:] == sorted(factors[2:], reverse=True)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("stepz = 3", "stepz"),
        ('seed = "many"', "seed"),
        ('[[stages]]\nsteps = "many"', "stages: steps"),
        ("[[stages]]\nshares = { chess = 3 }", "chess"),
        ("stages = 3", "stages"),
        ("[[stages]]\nattention = 'some'", "attention"),
        ("[[stages]]\nsteps = 9\n[[stages]]\nlength = 8192", "length at step 16"),
        ("dtype = 'int8'", "dtype"),
        ("keep = 0", "keep"),
        ('preset = "huge"', "huge"),
        ("=", "TOML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, names: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(dsv4.TrainingError, match=names):
        Recipe.read(tmp_path / "r.toml")


def test_shipped_recipes_can_be_read() -> None:
    files = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
    assert files and all(Recipe.read(f).config() for f in files)
