"""A run can be watched: its log says what happened, and can be drawn."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.config import V4Config
from dsv4.model import Transformer
from dsv4.numerics import FLOAT32
from dsv4.train.data import Batch
from dsv4.train.initial import init_weights
from dsv4.train.plots import course, plot
from dsv4.train.recipes import REPORT, Recipe, changes
from dsv4.train.watch import Averages, group_of, probe

SHAPE = {
    "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "head_dim": 64, "qk_rope_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 1,
    "index_n_heads": 2, "compress_ratios": [4, 128, 0], "moe_intermediate_size": 128,
    "q_lora_rank": 64, "o_lora_rank": 64, "o_groups": 1,
}  # fmt: skip


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 5 / step, "mtp": 6 / step, "lr": 1e-3, "mtp_acceptance": 0.5,
        "load": {"layers.1": [1.0, 0.5, 1.5, 1.0]}, "mixing": [[1.0, 0.9, 0.8, 0.7]] * 4,
        "grad_rms": {"head": 1e-3, "experts": 1e-4}, "update_rms": {"head": 0.5, "experts": 0.18},
    } | more  # fmt: skip


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.mark.parametrize("count", [1, 40])
def test_a_log_becomes_five_pictures(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, [{"event": "start"}, *(line(n) for n in range(1, count + 1))])
    files = plot(tmp_path, tmp_path / "plots")
    assert [f.stem for f in files] == ["loss", "load", "rms", "mixing", "drafts"]
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        assert width > 700 and height > 200


def test_what_a_log_lacks_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, [{"step": n, "loss": 1.0, "lr": 1e-3} for n in range(1, 9)])
    assert [f.stem for f in plot(tmp_path, tmp_path / "plots")] == ["loss"]
    write(tmp_path, [{"event": "start"}])
    with pytest.raises(dsv4.TrainingError, match="nothing to draw"):
        plot(tmp_path, tmp_path / "plots")


def test_steps_that_a_run_took_back_are_not_part_of_its_course() -> None:
    back = {"event": "spike", "step": 5, "loss": "9", "back_to": 2}
    lines, spikes = course([line(n) for n in range(1, 6)] + [back] + [line(3, loss=7.0), line(4)])
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and lines[2]["loss"] == 7.0
    assert spikes == [5]


def test_averages_are_those_of_the_steps_even_over_a_stop() -> None:
    averages = Averages()
    averages.add({"loss": 1.0}, [torch.tensor([3, 1])])
    averages = Averages(json.loads(json.dumps(averages.state())))
    averages.add({"loss": 2.0, "index": 5.0}, [torch.tensor([2, 2])])
    assert averages.take() == ({"loss": 1.5, "index": 5.0}, [[1.25, 0.75]])
    assert averages.take() == ({}, [])


def test_every_parameter_is_in_a_group_a_plot_can_name() -> None:
    groups: dict[str, str] = {}
    for name, _ in Transformer(V4Config.preset("nano")).named_parameters():
        groups.setdefault(group_of(name), name)
    assert groups.keys() == {
        "mHC", "indexer", "compressor", "norms", "router", "experts", "shared experts",
        "MTP projections", "attention", "embedding", "head",
    }  # fmt: skip
    assert groups["head"] == "head.weight"


def test_the_probe_sees_mixing_and_drafts() -> None:
    recipe = Recipe(model=SHAPE)
    net = Transformer(recipe.config())
    init_weights(net)
    g = torch.Generator().manual_seed(0)
    lengths = (9, 30, 2, 700)
    n = sum(lengths)
    batch = Batch(torch.randint(64, (1, n), generator=g), torch.ones(1, n), lengths)
    seen = probe(net, batch, FLOAT32)
    assert len(seen["mixing"]) == 2 * recipe.config().num_hidden_layers
    for values in seen["mixing"]:
        assert values[0] == pytest.approx(1, abs=1e-3), "doubly stochastic"
        assert values == sorted(values, reverse=True) and values[-1] > 0.5
    # trunk and MTP block both have an empty head at first, and the same favourite token
    assert seen["mtp_acceptance"] == 1.0
    assert "mtp_acceptance" not in probe(net, batch._replace(weights=torch.zeros(1, n)), FLOAT32)


def test_the_reports_recipes_are_in_the_files_and_scaled_ones_say_what_they_changed() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    for size in ("flash", "pro"):
        assert Recipe.read(folder / f"v4-{size}.toml") == REPORT[size]
        assert changes(REPORT[size]) == []
    tokens = {}
    for size, r in REPORT.items():
        steps = range(0, r.steps, 50)
        tokens[size] = sum(50 * s.tokens_at(n) for s, n in map(r.at, steps)) / 1e12
    assert tokens["flash"] == pytest.approx(32, rel=0.01)
    assert tokens["pro"] == pytest.approx(33, rel=0.01)
    said = changes(Recipe.read(folder / "v4-nano.toml"))
    assert "learning rate: 0.00027 -> 0.005" in said
    assert "tokens per batch: 75,497,472 -> 4,096" in said
    assert not any(line.startswith(("momentum", "weight_decay")) for line in said)


@pytest.mark.slow
def test_the_command_trains_plots_and_writes_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = tmp_path / "r.toml"
    model = "".join(f"{k} = {json.dumps(v)}\n" for k, v in (SHAPE | {"vocab_size": 384}).items())
    recipe.write_text(
        "vocab_documents = 50\nlog_every = 1\ntokens_per_batch = 256\nlength = 64\n"
        f"shares = {{ number_facts = 1 }}\n[model]\n{model}[[stages]]\nsteps = 2\n"
    )
    run = str(tmp_path / "run")
    for words in (["train", str(recipe), "--out", run, "--tensorboard"], ["train", "plot", run]):
        done = subprocess.run(
            [sys.executable, "-m", "dsv4.cli", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("run/plots/*.png"))) == 5
    assert list(tmp_path.glob("run/tensorboard/events*"))
    assert "step 0 of 2" in subprocess.run(
        [sys.executable, "-m", "dsv4.train", str(recipe), "--out", f"{run}2"],
        capture_output=True, text=True,
    ).stderr  # fmt: skip
