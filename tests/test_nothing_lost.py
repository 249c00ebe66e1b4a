"""Killed, cut off, out of disk, damaged: a run goes on, and becomes what it would have become."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
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
        "vocab_size": 384, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "head_dim": 64, "qk_rope_head_dim": 32, "n_routed_experts": 2, "num_experts_per_tok": 1,
        "index_n_heads": 2,
        "compress_ratios": [4, 128, 0], "moe_intermediate_size": 128, "q_lora_rank": 64,
        "o_lora_rank": 64, "o_groups": 1,
    },
    vocab_documents=50, log_every=1, checkpoint_every=4, keep=2,
    stages=(Stage(steps=100, tokens_per_batch=256, length=64, shares={"number_facts": 1}),),
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
        _train(folder, SHORT)
    except dsv4.TrainingError as e:
        (folder / "said").write_text(str(e))


def _start(target: Callable[..., None], *args: Any) -> Any:
    processes.set_forkserver_preload(["dsv4.train.loop"])
    process = processes.Process(target=target, args=args)
    process.start()
    return process


def _log(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_log(folder)]


def _weights(folder: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(folder.glob("*/*.safetensors"))]


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
    assert len(_weights(a)) == 2 and _weights(a) == _weights(b)


@pytest.mark.slow
def test_killed_twenty_times_at_random_it_becomes_the_same_model(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "tokenizer", tmp_path / "tokenizer")
    log, moments = tmp_path / "log.jsonl", random.Random(0)
    log.touch()
    reached = []
    for _ in range(20):
        wanted = log.read_bytes().count(b"\n") + moments.randrange(5)  # 0: while it starts
        process = _start(_train, tmp_path)
        while log.read_bytes().count(b"\n") < wanted:
            process.join(0.001)
            assert process.exitcode is None, "it ended before it was killed twenty times"
        process.join(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -9
        reached.append(max((int(p.name) for p in tmp_path.glob("checkpoints/0*")), default=0))
    assert len(set(reached)) > 5, reached  # it was killed under way, not at its start
    process = _start(_train, tmp_path)
    process.join()
    assert process.exitcode == 0
    _same(whole, tmp_path)


SHORT = replace(RECIPE, stages=(replace(RECIPE.stages[0], steps=10),))


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    _train(folder, SHORT)
    return folder


@pytest.fixture
def stopped(ten_steps: Path, tmp_path: Path) -> Path:
    """A run of ten steps, with checkpoints at 4, 8 and 10."""
    return shutil.copytree(ten_steps, tmp_path / "run")


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.suffix == "")


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    stopped: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, weights = _log(stopped), _weights(stopped)
    victim = stopped / "checkpoints" / "00000010" / file
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with Run(SHORT, stopped) as run:
        assert run.step == 8
        said = capsys.readouterr().err
        assert "00000010 is damaged" in said and "going on from step 8" in said
        run.train()
    assert _log(stopped) == before and _weights(stopped) == weights
    assert _steps(stopped) == [4, 8, 10]
    assert (stopped / "checkpoints" / "00000010.damaged" / file).read_bytes() == content


def test_without_a_whole_checkpoint_it_says_what_to_do(stopped: Path) -> None:
    for manifest in stopped.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(dsv4.TrainingError, match="delete that folder to start over"):
        Run(SHORT, stopped)


def test_lines_after_the_checkpoint_and_half_a_line_are_dropped(stopped: Path) -> None:
    log = stopped / "log.jsonl"
    whole = log.read_bytes()
    shutil.rmtree(stopped / "checkpoints" / "00000010")
    with log.open("ab") as f:
        f.write(b'{"step": 12, "lo')
    assert len(read_log(stopped)) == whole.count(b"\n")
    before = _log(stopped)
    with Run(SHORT, stopped) as run:
        assert run.step == 8
        run.train()
    assert _log(stopped) == before


def test_a_full_disk_stops_it_with_advice_and_keeps_the_last_state(stopped: Path) -> None:
    size = max(p.stat().st_size for p in stopped.glob("checkpoints/*/*"))
    shutil.rmtree(stopped / "checkpoints" / "00000010")
    process = _start(_limited, stopped, size // 2)
    process.join()
    said = (stopped / "said").read_text()
    assert "cannot write the checkpoint of step 10" in said and "free some space" in said
    assert "goes on from step 8" in said
    assert _steps(stopped) == [4, 8]
    with Run(SHORT, stopped) as run:
        run.train()
    assert _steps(stopped) == [4, 8, 10]


def test_two_processes_cannot_train_into_one_folder(stopped: Path) -> None:
    with Run(SHORT, stopped), pytest.raises(dsv4.TrainingError, match=f"process {os.getpid()}"):
        Run(SHORT, stopped)
    Run(SHORT, stopped).close()


def test_only_what_comes_after_may_change(stopped: Path) -> None:
    other = replace(SHORT, lr=1e-3)
    with pytest.raises(dsv4.TrainingError, match="others in lr"):
        Run(other, stopped)
    longer = replace(SHORT, log_every=1, stages=(*SHORT.stages, Stage(steps=5)))
    with Run(longer, stopped) as run:
        assert run.step == 10
    with pytest.raises(dsv4.TrainingError, match="another model"):
        Run(replace(SHORT, model=SHORT.model | {"n_routed_experts": 4}), stopped)


def test_old_checkpoints_go_but_those_kept_for_ever(tmp_path: Path) -> None:
    recipe = replace(SHORT, checkpoint_every=2, keep=1, keep_every=4)
    with Run(recipe, tmp_path) as run:
        run.train()
    assert _steps(tmp_path) == [0, 4, 8, 10]


def test_a_signal_saves_and_ends_the_program_well(tmp_path: Path) -> None:
    process = _start(_train, tmp_path, RECIPE)
    while not list(tmp_path.glob("checkpoints/00*")):
        process.join(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    assert not (tmp_path / "model").exists()
    with Run(RECIPE, tmp_path) as run:
        assert run.step == _steps(tmp_path)[-1] < RECIPE.steps
