"""``dsv4 bench`` measures what it says, and its receipt can be read by a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4 import (
    bench,
    bench_cache,
    bench_context,
    bench_layers,
    bench_speculation,
    kernels,
    synth,
)
from dsv4.bench_layers import KINDS
from dsv4.checkpoint import save_checkpoint
from dsv4.config import V4Config
from dsv4.errors import ConfigError, DSV4Error
from dsv4.synth import synthesize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = V4Config(
        vocab_size=512, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_hash_layers=1, num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2,
        q_lora_rank=128, o_groups=2, o_lora_rank=128, compress_ratios=(0, 4, 128, 0),
        index_n_heads=4, index_topk=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bench") / "tiny"
    save_checkpoint(path, config, synthesize(config))
    return path


def receipt(*arguments: str) -> dict[str, Any]:
    options = ["--repeats", "2", "--threads", "1", "--json"]
    if arguments[0] != "kernels":
        options += ["--prompt", "24", "--new", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", "bench", *arguments, *options],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_engine(engine: dict[str, Any]) -> None:
    assert engine["load_seconds"] > 0
    for key in bench.SPEEDS:
        assert 0 < engine[key]["low"] <= engine[key]["median"] <= engine[key]["high"]
    assert engine["memory"]["peak_bytes"] > 0
    assert 0 <= engine["agreement"]["top1"] <= 1
    assert 0 <= engine["agreement"]["kl_median"] < 1


def test_the_receipt(folder: Path) -> None:
    report = receipt(str(folder))
    assert report["settings"] == {"prompt": 24, "new": 4, "repeats": 2, "threads": 1}
    assert report["model"]["name"] == "tiny" and report["model"]["file_bytes"] > 10**6
    assert report["command"].startswith("dsv4 bench ") and report["dsv4"]
    machine = report["machine"]
    assert machine["cpu"] and machine["threads"] == 1 and machine["torch"]
    for rate in ("stream_read_gb_per_s", "bf16_tflop_per_s", "f32_tflop_per_s"):
        assert machine[rate] > 0
    assert list(report["engines"]) == ["dsv4"] and "ratios" not in report
    check_engine(report["engines"]["dsv4"])
    assert report["engines"]["dsv4"]["memory"]["kv_bytes"] > 0


@pytest.mark.slow
def test_next_to_transformers(folder: Path) -> None:
    pytest.importorskip("transformers")
    report = receipt(str(folder), "--against", "transformers")
    ours, theirs = report["engines"]["dsv4"], report["engines"]["transformers"]
    check_engine(ours)
    check_engine(theirs)
    assert theirs["agreement"]["top1"] == 1 and theirs["agreement"]["kl_mean"] < 1e-6
    assert set(report["ratios"]) == {*bench.SPEEDS, "memory"}
    assert all(ratio > 0 for ratio in report["ratios"].values())


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="transformers"):
        bench.run(folder, against="another")
    with pytest.raises(ConfigError, match="small"):
        bench.run(synth="huge")
    with pytest.raises(ConfigError, match="--prompt and --new"):
        bench.run(folder, prompt=2**30)


def test_a_process_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    process = bench.EngineProcess("dsv4", tmp_path / "nothing", 1, tmp_path)
    with pytest.raises(DSV4Error, match="no model"):
        process.ask("load")
    process._process.kill()
    with pytest.raises(DSV4Error, match="ended during 'load'"):
        process.ask("load")
    process.close()


def test_the_shapes_to_compare_on() -> None:
    for name, total in {"small": 0.14e9, "mid": 4.33e9}.items():
        from dsv4.formats import inventory

        config = synth.shape(name)
        assert config.compress_ratios == synth.LAYERS
        size = sum(spec.bytes for spec in inventory(config).values())
        assert abs(size / total - 1) < 0.02


def test_each_kernel_is_measured_beside_the_machine() -> None:
    report = receipt("kernels", "--shapes", "nano")
    assert report["machine"]["stream_read_gb_per_s"] > 0 and "kernels" in report
    assert {case["name"].split(",")[0].split()[0] for case in report["cases"]} == {
        "linear", "routed", "attention", "indexer", "mHC",
    }  # fmt: skip
    for case in report["cases"]:
        assert 0 < case["ms_low"] <= case["ms"] <= case["ms_high"]
        assert case["limit"] in ("memory", "matmul") and case["of_limit"] > 0


def test_kernels_are_measured_at_known_shapes() -> None:
    from dsv4 import bench_kernels

    with pytest.raises(ConfigError, match="flash or pro or nano"):
        bench_kernels.run("small")


@pytest.mark.slow
def test_training_steps_are_timed() -> None:
    what = ["train", "nano", "--against", "transformers"]
    options = ["--samples", "1", "--length", "64", "--repeats", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", "bench", *what, *options],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["engines"]) == {"dsv4", "transformers"} and report["ratio"] > 0
    for engine in report["engines"].values():
        assert engine["tokens_per_s"] > 0 and engine["peak_bytes"] > 0
        assert 0 < engine["of_matmul"] < 1 and 5 < engine["loss"] < 10
    assert report["flops"]["newton_schulz"] > 0 and report["planned_bytes"] > 10**8


def test_layers_stand_for_all_of_their_kind() -> None:
    report = receipt("layers", "v4-nano", "--of", "nano")
    ratios = V4Config.preset("nano").compress_ratios
    for phase in (report["prefill"], report["decode"]):
        kinds = [layer["kind"] for layer in phase["layers"]]
        assert kinds == [KINDS[ratio] for ratio in ratios[:5]]
        assert all(0 < layer["low"] <= layer["ms"] <= layer["high"] for layer in phase["layers"])
        added = phase["rest_ms"] + sum(layer["ms"] for layer in phase["layers"])
        assert phase["whole"]["ms"] == pytest.approx(added)  # nano has all its layers
        assert phase["whole"]["tokens_per_s"] == pytest.approx(1e3 / added)
        assert 0 < phase["small_kernels"] < 0.9
        assert 0.3 < sum(phase["kernels"].values()) < 1 and phase["kernels"]["linear"] > 0.02


def test_layers_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="width of flash"):
        bench_layers.run("v4-nano")


@pytest.mark.slow
@pytest.mark.skipif(kernels.NATIVE is None, reason="the plan is that of the native kernels")
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_training_takes_the_memory_that_was_planned(recompute: bool) -> None:
    options = "--samples 1 --length 1024 --repeats 2 --threads 1 --json".split()
    done = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", "bench", "train", "25m", *options,
         *(["--recompute"] if recompute else [])],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    real = report["engines"]["dsv4"]["peak_bytes"]
    assert report["planned_peak_bytes"] == pytest.approx(real, rel=0.15)


@pytest.mark.slow
def test_bench_speculation_shows_where_guesses_are_right() -> None:
    report = bench_speculation.run(rounds=1, threads=1)
    cases = {(case["workload"], case["users"]): case for case in report["cases"]}
    assert len(cases) == 10
    for (workload, _), case in cases.items():
        assert case["tokens"] > 0 and case["low"] <= case["ratio"] <= case["high"]
        assert case["accepted"] <= case["guessed"]
        if workload == "random":
            assert case["guessed"] < 0.3 * case["tokens"], "it goes on guessing in vain"
    alone = cases["arithmetic", 1]
    assert alone["accepted"] > 0.7 * alone["guessed"] > 50


def test_bench_cache_knows_one_peer(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        bench_cache.run(folder, prompt=700, against="another")


def test_bench_cache_computes_only_what_is_new(folder: Path) -> None:
    report = bench_cache.run(folder, prompt=700, threads=1)
    cases = {case["name"]: case for case in report["cases"]}
    computed = {name: case["computed"] for name, case in cases.items()}
    assert computed["cold"] == 700 and computed["regenerated"] == 1
    assert computed["appended"] <= bench_cache.APPENDED + 1
    assert 350 <= computed["edited"] <= 350 + 127
    assert computed["restarted"] == 1
    # each turn: what the user says, and what is left of the answer before it
    assert computed["chat"] <= bench_cache.TURNS * (700 // 20 + bench_cache.ANSWER)
    assert cases["chat"]["prompt"] > 5 * computed["chat"]
    assert all(case["seconds"] > 0 for case in cases.values())


def test_bench_context_grows_one_session(folder: Path, tmp_path: Path) -> None:
    report = bench_context.run(folder, most=2048, first=300, threads=1, scratch=tmp_path)
    rows = report["lengths"]
    assert [row["length"] for row in rows] == [300, 1200, 2048]
    for row in rows:
        assert row["bytes"] == row["planned_bytes"] > 0
        assert row["prefill_tokens_per_s"] > 0
        assert 0 < row["decode_low"] <= row["decode_ms"] <= row["decode_high"]
    assert report["rewind"]["tokens"] == 1024 and report["rewind"]["seconds"] > 0
    disk = report["disk"]
    assert disk["tokens"] == 2048  # all of it was found again
    assert disk["files"] == 2  # rows and a cut
    assert min(disk["write_seconds"], disk["plain_read_seconds"], disk["read_seconds"]) > 0
    assert not list(tmp_path.iterdir())
    bench_context.plot(tmp_path / "context.png", report)
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--max"):
        bench_context.run(folder, most=1 << 30)


def test_lengths_are_powers_of_four() -> None:
    assert bench_context.lengths_up_to(1 << 20) == [4096, 16384, 65536, 262144, 1048576]
    assert bench_context.lengths_up_to(5000) == [4096, 5000]
    assert bench_context.lengths_up_to(1000) == [1000]
