"""Killed, cut off, out of disk, damaged: a run goes on, and becomes what it would have become."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.train.loop import Run
from dsv4.train.recipes import Recipe, Stage
from dsv4.train.runfiles import read_log

RECIPE = Recipe(
    model={
        "vocab_size": 384, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
        "head_dim": 128, "n_routed_experts": 4, "compress_ratios": [0, 4, 128, 0],
        "index_n_heads": 2, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_lora_rank": 128,
        "o_groups": 1,
    },
    vocab_documents=50, log_every=3, checkpoint_every=4, keep=2,
    stages=(Stage(steps=120, tokens_per_batch=256, length=64, shares={"number_facts": 1}),),
)  # fmt: skip
CLOCK = ("seconds", "tokens_per_s")
processes = multiprocessing.get_context("forkserver")  # imports once, then forks


def _train(folder: Path, recipe: Recipe = RECIPE) -> None:
    torch.set_num_threads(1)
    with Run(recipe, folder) as run:
        run.train()


def _limited(folder: Path, size: int) -> None:
    """Train with a disk on which no file can be larger than ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        _train(folder)
    except dsv4.TrainingError as e:
        (folder / "said").write_text(str(e))


def _start(target: Callable[..., None], *args: Any) -> Any:
    processes.set_forkserver_preload(["dsv4.train.loop"])
    process = processes.Process(target=target, args=args)
    process.start()
    return process


def _log(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_log(folder)]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    model = dsv4.load(folder / "parent", numerics="float32")
    return dict(model.net.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    process = _start(_train, folder)
    process.join()
    assert process.exitcode == 0
    return folder


def _same(a: Path, b: Path) -> None:
    assert _log(a) == _log(b)
    mine, yours = _weights(a), _weights(b)
    assert mine.keys() == yours.keys()
    assert [name for name in mine if not torch.equal(mine[name], yours[name])] == []


@pytest.mark.slow
def test_killed_twenty_times_at_random_it_becomes_the_same_model(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "tokenizer", tmp_path / "tokenizer")
    moments = random.Random(0)
    reached = []
    for _ in range(20):
        process = _start(_train, tmp_path)
        process.join(moments.uniform(0.1, 1.6))
        assert process.exitcode is None, "it ended before it was killed twenty times"
        process.kill()
        process.join()
        assert process.exitcode == -9
        folder = tmp_path / "checkpoints"
        reached.append(max((int(p.name) for p in folder.glob("0*")), default=0))
    assert len(set(reached)) > 5, reached  # it was killed under way, not at its start
    process = _start(_train, tmp_path)
    process.join()
    assert process.exitcode == 0
    _same(whole, tmp_path)
