"""``dsv4 bench peers``: a table that can be interrupted, with its failures and no inventions."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4 import bench_peers, bench_report, peers
from dsv4.bench import EngineProcess, Process
from dsv4.checkpoint import save_checkpoint
from dsv4.config import V4Config
from dsv4.errors import ConfigError, DSV4Error
from dsv4.synth import resize, shape, small_tokenizer, synthesize

TINY = V4Config(
    vocab_size=2048, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=3,
    num_hash_layers=1, num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2,
    q_lora_rank=128, o_groups=2, o_lora_rank=128, compress_ratios=(0, 4, 128, 0),
    index_n_heads=4, index_topk=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_and_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench_peers, "shape", lambda name: TINY)
    monkeypatch.setattr(peers, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(bench_peers, "NEW", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield


def measured(out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    report = bench_peers.run(out, repeats=2, threads=1, say=said.append, **options)
    assert report == json.loads(out.read_text())
    return report, said


def test_a_table_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("prefill-512", "decode-0", "users-4", "kl")
    monkeypatch.setattr(bench_peers, "PLAN", {"small": {"dsv4": rows}})
    out = tmp_path / "deep" / "receipt.json"
    first, _ = measured(out, rows=["decode", "kl"])
    assert list(first["parts"]["small"]["rows"]) == ["decode-0", "kl"]
    second, said = measured(out)
    found = second["parts"]["small"]["rows"]
    assert set(found) == set(rows) and not any("decode-0" in line for line in said)
    assert found["decode-0"] == first["parts"]["small"]["rows"]["decode-0"]
    for row in rows:
        figure = found[row]["engines"]["dsv4"]
        assert 0 < figure["low"] <= figure["median"] <= figure["high"]
        assert found[row]["machine"]["cpu"] and found[row]["repeats"] == 2
    own = found["kl"]["engines"]["dsv4"]
    assert own["official"]["kl_mean"] == 0 and own["float32"]["top1"] > 0.5
    _, said = measured(out)
    assert said == []
    again, _ = measured(out, rows=["decode"], again=True)
    assert again["parts"]["small"]["rows"]["decode-0"]["time"] > found["decode-0"]["time"]


def test_what_fails_is_in_the_table_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"small": {"flyweight": ("decode-0",), "dsv4": ("decode-0",)}}
    monkeypatch.setattr(bench_peers, "PLAN", plan)

    def no_network(name: str, say: object) -> Path:
        raise DSV4Error("installing flyweight failed", got="no network")

    monkeypatch.setattr(peers, "environment", no_network)
    out = tmp_path / "receipt.json"
    for _ in range(2):
        report, said = measured(out)
        engines = report["parts"]["small"]["rows"]["decode-0"]["engines"]
        assert "no network" in engines["flyweight"]["error"] and engines["dsv4"]["median"] > 0
        assert any("flyweight" in line for line in said)
    report, said = measured(out, against=["llama.cpp"])  # not asked for, not tried
    assert said == []


def test_experts_are_measured_alone(tmp_path: Path) -> None:
    layer = resize(TINY, num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
    save_checkpoint(tmp_path / "layer", layer, synthesize(layer))
    arguments = tmp_path / "layer", 1, "experts"
    process = Process("dsv4", "dsv4.bench_engines", arguments, 1, tmp_path)
    assert process.ask("time", 5, 2, 0) > 0
    assert 0 < process.ask("error", 8) < 0.1  # what rounding to eight bits costs, and no more
    process.close()


def test_a_paused_process_does_nothing_and_goes_on(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tiny", TINY, synthesize(TINY))
    with contextlib.closing(EngineProcess("dsv4", tmp_path / "tiny", 1, tmp_path)) as process:
        process.ask("load")
        process.pause()
        stat = Path(f"/proc/{process._process.pid}/stat")
        if sys.platform == "linux":
            deadline = time.monotonic() + 60
            while stat.read_text().rpartition(")")[2].split()[0] != "T":
                assert time.monotonic() < deadline
                time.sleep(0.01)  # a signal takes its time
        with process.alone():
            assert process.ask("prefill", [1, 2, 3]) > 0
        with process.alone():
            logits = [process.logits([1, 2, 3], numerics) for numerics in ("own", "float32")]
        assert logits[0].shape == logits[1].shape == (3, TINY.vocab_size)
    assert process._process.returncode == 0


def test_bytes_a_token_touches_are_those_of_the_measured_table() -> None:
    assert bench_peers.touched_bytes(shape("small")) == pytest.approx(64.8e6, rel=0.001)
    assert bench_peers.touched_bytes(shape("mid")) == pytest.approx(531e6, rel=0.001)


def test_recorded_figures_follow_the_machine() -> None:
    twice = {"bf16_tflop_per_s": 1.6, "stream_read_gb_per_s": 10.0}
    assert bench_peers.scaled("small", "prefill-512", twice) == pytest.approx(2 * 1488)
    assert bench_peers.scaled("mid", "users-4", twice) == pytest.approx(36.7 / 2)


def test_the_page_is_written_from_receipts(tmp_path: Path) -> None:
    machine = {
        "cpu": "a processor", "threads": 2, "torch": "2", "stream_read_gb_per_s": 20.0,
        "bf16_tflop_per_s": 0.8, "f32_tflop_per_s": 0.2,
    }  # fmt: skip
    case = {
        "name": "linear", "rows": 1, "ms": 2.0, "ms_low": 1.5, "ms_high": 2.5, "gb_per_s": 15.0,
        "tflop_per_s": 0.03, "limit": "memory", "of_limit": 0.75,
    }  # fmt: skip
    kernels = {"machine": machine, "commit": "abc", "shapes": "flash", "cases": [case]}
    speed = {"median": 90.4, "low": 80.0, "high": 95.0}
    row = {"machine": machine, "engines": {"dsv4": speed, "llama.cpp": {"error": "died"}}}
    beside = {"llama.cpp": {"seconds": 23.5, "computed": 8192}}
    again = {"name": "edited", "prompt": 8192, "computed": 4096, "seconds": 4.0, "sooner": 2.0}
    chat = {"name": "chat", "prompt": 90000, "computed": 8502, "seconds": 8.6, "sooner": None}
    cache = {"model": "small", "machine": machine, "settings": {"prompt": 8192},
             "cases": [again | {"peers": beside}, chat]}  # fmt: skip
    length = {"length": 4096, "prefill_tokens_per_s": 3274.0, "prefill_seconds": 1.25,
              "decode_ms": 1.35, "decode_ratio": 1.0, "bytes": 17_600_000,
              "planned_bytes": 17_600_000, "published_bytes": 1_700_000}  # fmt: skip
    disk = {"bytes": 352e6, "write_seconds": 1.49, "read_seconds": 0.42,
            "plain_write_seconds": 0.63, "plain_read_seconds": 0.2}  # fmt: skip
    context = {"model": "v4-nano", "machine": machine, "lengths": [length], "disk": disk,
               "rewind": {"tokens": 100000, "seconds": 0.78}}  # fmt: skip
    soak = {"model": "v4-nano", "settings": {"minutes": 30.0, "users": 12}, "total": None,
            "answers": {"known": 9, "hung up": 1}, "tokens": 99, "drift": [], "asked_again": 8,
            "failures": [], "running": 0, "problems": ["no books"], "warm_bytes": 200_000_000,
            "end_bytes": 202_000_000, "growth": 0.01}  # fmt: skip
    receipts = {
        "kernels": kernels, "peers": {"parts": {"small": {"rows": {"decode-0": row}}}},
        "cache": cache, "context": context, "soak": soak,
    }  # fmt: skip
    folder, page = tmp_path / "receipts", tmp_path / "page.md"
    folder.mkdir()
    for name, report in receipts.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    page.write_text(f"before\n{bench_report.BEGIN}\nstale\n{bench_report.END}\nafter\n")
    written = bench_report.update(page, folder)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| linear | 1 | 2.000 (1.500 to 2.500) | 15.0 | 0.030 | memory | 75% |" in text
    assert "| decode-0 | 90.4 (80.0 to 95.0) | failed |" in text and "Commit abc." in text
    assert "| edited | 8,192 | 4,096 | 4.000 | 2.0 | 23.500 (8,192) |" in text
    assert "| chat | 90,000 | 8,502 | 8.600 |  |  |" in text
    assert "| 4,096 | 3,274 | 1 | 1.35 | 1.00 | 17.6 | 17.6 |" in text and "0.780 s" in text
    assert "| failures, left running, problems in the books | 0, 0, 1 |" in text
    assert all(path.is_file() for path in written)
    bench_report.update(page, folder)
    assert page.read_text() == text
    with pytest.raises(ConfigError, match="no receipts"):
        bench_report.update(page, tmp_path)
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(ConfigError, match="place for tables"):
        bench_report.update(tmp_path / "bare.md", folder)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="small or mid or experts"):
        bench_peers.run(tmp_path / "x", only=["large"])
    with pytest.raises(ConfigError, match="flyweight"):
        bench_peers.run(tmp_path / "x", against=["another"])
    with pytest.raises(ConfigError, match="tokenizer"):
        save_checkpoint(tmp_path / "bare", TINY, synthesize(TINY))
        peers.weights("flyweight", tmp_path / "bare", tmp_path)


@pytest.mark.slow
def test_an_environment_lies_above_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both need is there once; a package without requirements stands for the peer."""
    package = tmp_path / "package"
    (package / "alone_v4").mkdir(parents=True)
    (package / "alone_v4" / "__init__.py").write_text("ANSWER = 42\n")
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (package / "backend.py").write_text(BACKEND)
    peer = peers.Peer((str(package),), "alone_v4", "official")
    monkeypatch.setitem(peers.PEERS, "alone", peer)
    python = peers.environment("alone", lambda text: None)
    asked = [str(python), "-c", "import alone_v4, torch, safetensors; print(alone_v4.ANSWER)"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr
    said: list[object] = []
    assert peers.environment("alone", said.append) == python and said == []
    monkeypatch.setitem(peers.PEERS, "alone", peer._replace(packages=(str(tmp_path / "none"),)))
    with pytest.raises(DSV4Error, match="installing alone failed"):
        peers.environment("alone", lambda text: None)


BACKEND = """
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "alone_v4-1-py3-none-any.whl"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.write("alone_v4/__init__.py")
        info = "alone_v4-1.dist-info/"
        about = "Metadata-Version: 2.1\\nName: alone-v4\\nVersion: 1\\n"
        wheel.writestr(info + "METADATA", about)
        about = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(info + "WHEEL", about)
        wheel.writestr(info + "RECORD", "")
    return name
"""


def test_a_random_model_has_a_tokenizer_for_those_who_need_one() -> None:
    files = small_tokenizer(shape("small"))
    assert set(files) >= {"tokenizer.json", "tokenizer_config.json"}
    assert small_tokenizer(shape("small"), wanted=False) == {}
