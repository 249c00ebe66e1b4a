"""After a loss spike a run goes back a little and routes ahead of time for a while."""

from __future__ import annotations

import shutil
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import dsv4
from dsv4.train import loop
from dsv4.train.loop import Run
from dsv4.train.recipes import Recipe, Stage
from dsv4.train.runfiles import read_log
from dsv4.train.spikes import SpikeWatch

SPIKE = 13
RECIPE = Recipe(
    model={
        "vocab_size": 384, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "head_dim": 64, "qk_rope_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 1,
        "index_n_heads": 2, "compress_ratios": [4, 128, 0], "moe_intermediate_size": 128,
        "q_lora_rank": 64, "o_lora_rank": 64, "o_groups": 1,
    },
    vocab_documents=50, log_every=1, checkpoint_every=4, lr=1e-3,
    spike_window=6, rollback=3, anticipate_delay=2, anticipate_steps=5,
    stages=(Stage(steps=22, tokens_per_batch=256, length=64, shares={"number_facts": 1}),),
)  # fmt: skip


class Injected:
    """Losses that spike at one step while routing is not anticipatory, and what was seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spike: float) -> None:
        self.losses, self.routes, self.spike = loop.losses, loop.routes, spike
        self.run: Run
        self.stop_at = -1
        self.used: dict[int, list[Tensor] | None] = {}  # at each step, the last time
        self.made: list[tuple[int, list[Tensor]]] = []
        monkeypatch.setattr(loop, "losses", self._losses)
        monkeypatch.setattr(loop, "routes", self._routes)

    def _losses(self, *args: Any) -> tuple[Tensor, dict[str, float], list[Tensor]]:
        step, given = self.run.step, args[5]
        if step == self.stop_at:
            raise KeyboardInterrupt
        total, parts, loads = self.losses(*args)
        self.used[step] = given
        # two in a row, unless the first is not finite
        if given is None and (step == SPIKE or (step == SPIKE - 1 and isfinite(self.spike))):
            parts["loss"] = self.spike
        return total, parts, loads

    def _routes(self, *args: Any) -> list[Tensor]:
        made = self.routes(*args)
        self.made.append((self.run.step, made))
        return made

    def train(self, folder: Path, recipe: Recipe = RECIPE) -> None:
        with Run(recipe, folder) as self.run:
            self.run.train()


def _state(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    clock = ("seconds", "tokens_per_s")
    lines = [{k: v for k, v in x.items() if k not in clock} for x in read_log(folder)]
    return lines, (folder / "parent" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spike", [50.0, float("nan")])
def test_it_goes_back_and_routes_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spike: float
) -> None:
    injected = Injected(monkeypatch, spike)
    injected.train(tmp_path)
    lines = read_log(tmp_path)
    (event,) = [line for line in lines if line.get("event") == "spike"]
    assert (event["step"], event["back_to"], event["anticipate_until"]) == (SPIKE, 8, SPIKE + 5)
    at = lines.index(event)
    assert lines[at - 1]["step"] == SPIKE and lines[at + 1]["step"] == 9
    assert lines[-1]["step"] == 22
    anticipated = [step for step, routes in injected.used.items() if routes is not None]
    assert anticipated == list(range(8, SPIKE + 5))
    # a step's routes were made two steps before it, the first three where it began
    assert [step for step, _ in injected.made] == [8, 8, 8, 9, 10, 11, 12, 13, 14, 15]
    for step, (_, made) in zip(anticipated, injected.made, strict=True):
        assert injected.used[step] is made


@pytest.mark.slow
def test_a_run_stopped_before_amid_or_after_becomes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected = Injected(monkeypatch, 50.0)
    injected.train(tmp_path / "whole")
    for stop_at in (11, 15, 18):
        folder = tmp_path / f"stopped at {stop_at}"
        shutil.copytree(tmp_path / "whole" / "tokenizer", folder / "tokenizer")
        injected.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            injected.train(folder)
        injected.stop_at = -1
        injected.train(folder)
        assert _state(folder) == _state(tmp_path / "whole"), stop_at


def test_a_loss_that_stays_nan_ends_the_run_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.losses

    def always(*args: Any) -> tuple[Tensor, dict[str, float], list[Tensor]]:
        total, parts, loads = real(*args)
        return total, parts | ({"loss": float("nan")} if run.step == 10 else {}), loads

    monkeypatch.setattr(loop, "losses", always)
    with Run(RECIPE, tmp_path) as run:
        with pytest.raises(dsv4.TrainingError, match=r"(?s)again after going back.*lower lr"):
            run.train()
    assert not (tmp_path / "model").exists()
    with Run(RECIPE, tmp_path) as run:
        assert run.step == 8  # where it went back to, without what made it fail
        assert all(p.isfinite().all() for p in run.net.parameters())


def test_the_rule() -> None:
    watch = SpikeWatch(window=5, factor=4.0)
    for loss in (1.0, 1.1, 0.9, 1.0):
        watch.add(loss)
        assert not watch.is_spike(100.0), "too little is known yet"
    assert watch.is_spike(float("inf")) and watch.is_spike(float("nan"))
    watch.add(1.2)
    assert watch.limit() == pytest.approx(1.0 + 4 * 0.1)
    assert not watch.is_spike(1.41), "one alone is a hard batch"
    watch.add(1.45)
    assert watch.limit() == pytest.approx(1.1 + 4 * 0.1)
    watch.add(1.6)
    assert watch.limit() == pytest.approx(1.2 + 4 * 0.25)
    watch = SpikeWatch(window=5, factor=4.0)
    for loss in (1.0, 1.1, 0.9, 1.0, 1.9):
        watch.add(loss)
    assert watch.limit() == pytest.approx(1.0 + 4 * 0.1)
    assert watch.is_spike(1.41) and not watch.is_spike(1.39) and not watch.is_spike(0.1)
    constant = SpikeWatch(window=2, factor=4.0)
    constant.add(2.0)
    constant.add(2.0)
    assert constant.limit() == pytest.approx(2.0 + 4 * 0.02)
    assert SpikeWatch(window=0, factor=4.0).is_spike(1e9) is False
