"""The file commands of ``dsv4``: inspect, synth, convert, doctor, and pull against a local hub."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsv4 import cli
from dsv4.checkpoint import INDEX_FILE, Checkpoint, save_checkpoint, storage_format
from dsv4.config import V4Config
from dsv4.errors import CheckpointError, ConfigError
from dsv4.hub import pull
from dsv4.synth import resize, synthesize

TINY = resize(V4Config.preset("nano"), num_hidden_layers=3, n_routed_experts=2, vocab_size=300)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["dsv4", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = self.capsys.readouterr()
        return Ran(int(stopped.value.code or 0), out, err)


@pytest.fixture
def dsv4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


# ------------------------------------------------------------------ inspect


def test_inspect_presets(dsv4: Command) -> None:
    report = json.loads(dsv4("inspect", "--preset", "pro", "--json").out)
    assert report["tensors"] == 145_116
    assert report["stored_elements"] == 861_608_274_846
    assert round(report["bytes"] / 1e9, 2) == 864.70
    counts = V4Config.preset("pro").parameter_counts()
    assert report["parameters_total"] == counts.total
    assert report["parameters_active"] == counts.active
    assert report["layers"] == {"window": 0, "CSA": 30, "HCA": 31, "hash-routed": 3, "MTP": 1}
    for key in ("tensors", "stored_elements", "bytes"):
        assert sum(row[key] for row in report["components"]) == report[key]
    text = dsv4("inspect", "--preset", "flash").out
    for said in ("69,187", "159.61 GB", "routed experts", "13.27B active", "21 CSA", "--CHCH"):
        assert said in text


def test_inspect_a_folder_or_a_config(dsv4: Command, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", TINY, synthesize(TINY))
    report = json.loads(dsv4("inspect", tmp_path / "m", "--json").out)
    assert report["format"] == "instruct"
    assert report["bytes"] == Checkpoint.open(tmp_path / "m").bytes
    same = json.loads(dsv4("inspect", tmp_path / "m" / "config.json", "--json").out)
    assert same | {"name": ""} == report | {"name": ""}


def test_refusals_are_short_and_exit_with_2(dsv4: Command, tmp_path: Path) -> None:
    for arguments in (
        ("inspect", tmp_path / "nothing"),
        ("inspect", "--preset", "huge"),
        ("inspect",),
        ("synth", tmp_path / "x", "--set", "nonsense"),
        ("synth", tmp_path / "x", "--set", "no_such_key=1"),
        ("synth", tmp_path / "x", "--preset", "nano", "--heads", "0"),
        ("synth", tmp_path / "x", "--format", "int4"),
        ("synth", tmp_path / "x", "--shard-bytes", "many"),
        ("convert", tmp_path, tmp_path / "y", "--to", "fp8"),
        ("frobnicate",),
    ):
        ran = dsv4(*arguments)
        assert ran.code == 2, arguments
        assert ran.err and not ran.out and "Traceback" not in ran.err, arguments
    assert list(tmp_path.iterdir()) == []


def test_help_is_fast_and_teaches_by_example(dsv4: Command) -> None:
    program = "import sys, dsv4.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
    for command in ("inspect", "synth", "convert", "pull", "doctor"):
        shown = dsv4(command, "--help")
        assert shown.code == 0 and f"dsv4 {command}" in shown.out


# ------------------------------------------------------------------ synth and convert


def test_synth_writes_what_was_asked_for(dsv4: Command, tmp_path: Path) -> None:
    command = ("synth", tmp_path / "m", "--preset", "nano", "--layers", 3, "--experts", 4)
    ran = dsv4(*command, "--vocab", 1000, "--set", "index_topk=64", "--shard-bytes", "2MB")
    assert ran.code == 0 and "tensors" in ran.out
    checkpoint = Checkpoint.open(tmp_path / "m")
    before, config = checkpoint.fingerprint(), checkpoint.config
    assert (config.num_hidden_layers, config.n_routed_experts) == (3, 4)
    assert (config.vocab_size, config.index_topk) == (1000, 64)
    assert config.compress_ratios == (0, 0, 4, 0)
    assert (tmp_path / "m" / INDEX_FILE).exists()
    refused = dsv4(*command)
    assert refused.code == 2 and "--force" in refused.err
    assert dsv4(*command, "--force", "--seed", 1, "--no-tokenizer").code == 0
    assert Checkpoint.open(tmp_path / "m").fingerprint() != before


def test_synth_pattern_format_and_scale(dsv4: Command, tmp_path: Path) -> None:
    ratios = "compress_ratios=[0,4,128,0]"
    arguments = ("--preset", "flash", "--scale", 0.05, "--layers", 3, "--set", ratios)
    sizes = ("--vocab", 600, "--set", "head_dim=128", "--format", "base")
    assert dsv4("synth", tmp_path / "m", *arguments, *sizes).code == 0
    config = Checkpoint.open(tmp_path / "m").config
    assert config.compress_ratios == (0, 4, 128, 0) and config.is_base
    assert config.hidden_size == 256 and config.n_routed_experts == 16


def test_synth_knows_the_shapes_of_the_benchmarks(dsv4: Command, tmp_path: Path) -> None:
    dsv4("synth", tmp_path / "m", "--preset", "mid", "--layers", "3", "--experts", "8")
    config = V4Config.from_json(tmp_path / "m" / "config.json")
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (2048, 3, 8)
    assert config.compress_ratios == (0, 0, 4, 0)


def test_synth_adds_a_tokenizer_that_fits(dsv4: Command, tmp_path: Path) -> None:
    from dsv4.tokenizer import Tokenizer

    dsv4("synth", tmp_path / "m", "--preset", "nano", "--layers", 1)
    tokenizer = Tokenizer.load(tmp_path / "m")
    text = "any bytes: é 漢 \x00"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < V4Config.preset("nano").vocab_size
    dsv4("synth", tmp_path / "small", "--preset", "nano", "--layers", 1, "--vocab", 64)
    assert not (tmp_path / "small" / "tokenizer.json").exists()


def test_convert_carries_everything_over(dsv4: Command, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", TINY, synthesize(TINY), extra_files={"notes.txt": b"hello"})
    ran = dsv4("convert", tmp_path / "m", tmp_path / "fp8", "--to", "fp8")
    assert ran.code == 0, ran.err
    assert storage_format(Checkpoint.open(tmp_path / "fp8").config) == "fp8"
    assert (tmp_path / "fp8" / "notes.txt").read_bytes() == b"hello"
    assert dsv4("convert", tmp_path / "m", tmp_path / "fp8", "--to", "bf16").code == 2


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv4.cli", "synth", str(tmp_path / "m"), "--preset"]
    for _ in range(5):  # on a busy machine it may be done before it can be stopped
        running = subprocess.Popen(
            [*command, "flash", "--scale", "0.25", "--layers", "20", "--vocab", "1000"],
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job ignores it, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while running.poll() is None and not list(tmp_path.glob(".m.*.partial/*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
        if running.returncode != 0:
            break
        shutil.rmtree(tmp_path / "m")
    assert running.returncode == 130 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ doctor


def test_doctor(dsv4: Command) -> None:
    report = json.loads(dsv4("doctor", "--json").out)
    assert report["python"] == sys.version.split()[0]
    assert report["memory_bytes"] > 10**8 and report["threads"] >= 1
    assert set(report["cpu_features"]) <= {"AVX2", "AVX512", "BF16", "AMX", "NEON"}
    assert "kernels" in report and "v4_nano" in report
    assert "torch" in dsv4("doctor").out


# ------------------------------------------------------------------ pull, from a hub of our own

REPO = "lab/v4-tiny"


class Hub:
    """A server that speaks what ``huggingface_hub`` asks for when it downloads a model.

    ``cut`` breaks the next n transfers of a file in the middle, ``forbidden`` refuses files,
    ``damage`` flips the last byte on the way. ``served`` counts whole transfers, ``ranges`` keeps
    the Range headers that came.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cut: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.forbidden: set[str] = set()
        self.damage: set[str] = set()
        self.ranges: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def commit(self) -> str:
        return hashlib.sha1(REPO.encode()).hexdigest()

    def files(self) -> list[dict[str, Any]]:
        out = []
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            entry: dict[str, Any] = {"path": str(path.relative_to(self.folder))}
            entry |= {"type": "file", "size": len(data), "oid": blob}
            if path.suffix == ".safetensors":
                sha = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 134}
            out.append(entry)
        return out

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        if not (path.startswith((f"/api/models/{REPO}", f"/{REPO}/resolve/"))):
            return self.fail(request, 404, "RepoNotFound")
        revision = re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)
        if revision and revision[1] not in ("main", self.commit):
            return self.fail(request, 404, "RevisionNotFound")
        if path.startswith("/api/") and "/tree/" in path:
            return self.send(request, json.dumps(self.files()).encode(), {})
        if path.startswith("/api/"):
            siblings = [
                {"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]}
                | ({"lfs": f["lfs"]} if "lfs" in f else {})
                for f in self.files()
            ]
            info = {"id": REPO, "modelId": REPO, "sha": self.commit, "siblings": siblings}
            return self.send(request, json.dumps(info).encode(), {})
        name = path.split("/", 5)[5] if path.count("/") > 4 else path.rsplit("/", 1)[1]
        entry = next((f for f in self.files() if f["path"] == name), None)
        if entry is None:
            return self.fail(request, 404, "EntryNotFound")
        if name in self.forbidden and body:
            return self.fail(request, 403, "")
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        data = (self.folder / name).read_bytes()
        if name in self.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return self.send(request, data, headers, body, name)

    def fail(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def send(
        self,
        request: BaseHTTPRequestHandler,
        data: bytes,
        headers: dict[str, str],
        body: bool = True,
        name: str = "",
    ) -> None:
        start, total = 0, len(data)
        if wanted := re.match(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start = int(wanted[1])
            self.ranges.append(wanted[0])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(total - start))
        request.end_headers()
        if not body:
            return
        if self.cut[name]:
            self.cut[name] -= 1
            request.wfile.write(data[start : (start + total) // 2])
            request.close_connection = True
            return
        request.wfile.write(data[start:])
        self.served[name] += bool(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "hub"
    save_checkpoint(
        folder,
        TINY,
        synthesize(TINY),
        max_shard_bytes=3_000_000,
        extra_files={"tokenizer.json": b"{}", "setup.py": b"evil", "LICENSE": b"free"},
    )
    served = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    served.close()


def test_pull_fetches_and_verifies(hub: Hub, dsv4: Command, tmp_path: Path) -> None:
    ran = dsv4("pull", REPO, "--to", tmp_path / "got")
    assert ran.code == 0, ran.err
    names = {p.name for p in (tmp_path / "got").iterdir() if not p.name.startswith(".")}
    assert names == {p.name for p in hub.folder.iterdir()} - {"setup.py"}
    got, original = Checkpoint.open(tmp_path / "got"), Checkpoint.open(hub.folder)
    assert got.fingerprint() == original.fingerprint()
    assert dsv4("pull", REPO, "--to", tmp_path / "got", "--revision", hub.commit).code == 0
    assert max(hub.served.values()) == 1  # the second time nothing is fetched


def test_pull_continues_a_broken_transfer(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**16)  # from 10 MB
    shard = sorted(hub.folder.glob("*.safetensors"))[0]
    hub.cut[shard.name] = 1
    pull(REPO, tmp_path / "got")
    (resumed,) = (int(re.sub(r"\D", "", sent)) for sent in hub.ranges)
    half = shard.stat().st_size // 2
    assert half - 2**16 <= resumed <= half  # asked for the rest, not for all of it again
    assert (tmp_path / "got" / shard.name).read_bytes() == shard.read_bytes()


def test_pull_again_keeps_finished_files(hub: Hub, tmp_path: Path) -> None:
    shards = sorted(p.name for p in hub.folder.glob("*.safetensors"))
    hub.forbidden = {shards[-1]}
    with pytest.raises(CheckpointError, match="cannot fetch"):
        pull(REPO, tmp_path / "got")
    before = {name for name in shards if (tmp_path / "got" / name).is_file()}
    hub.forbidden, counted = set(), Counter(hub.served)
    pull(REPO, tmp_path / "got")
    assert all(hub.served[name] == counted[name] for name in before)
    assert hub.served[shards[-1]] == 1


def test_pull_detects_damage_and_heals(hub: Hub, tmp_path: Path) -> None:
    shard = sorted(p.name for p in hub.folder.glob("*.safetensors"))[1]
    hub.damage = {shard, "tokenizer.json"}
    for name in (shard, "tokenizer.json"):
        with pytest.raises(CheckpointError, match=f"{name} is not what the hub has"):
            pull(REPO, tmp_path / "got")
        assert not (tmp_path / "got" / name).exists()
        hub.damage.remove(name)
    pull(REPO, tmp_path / "got")
    with (tmp_path / "got" / shard).open("r+b") as f:  # the disk loses a byte later on
        f.seek(-5, 2)
        f.write(b"\x55")
    with pytest.raises(CheckpointError, match=f"{shard} is not what the hub has"):
        pull(REPO, tmp_path / "got")
    Checkpoint.open(pull(REPO, tmp_path / "got").path)


def test_pull_says_what_is_wrong(
    hub: Hub, dsv4: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = dsv4("pull", "lab/nothing", "--to", tmp_path / "x")
    assert ran.code == 2 and "lab/nothing" in ran.err and "does not exist" in ran.err
    ran = dsv4("pull", REPO, "--revision", "v9", "--to", tmp_path / "x")
    assert ran.code == 2 and "revision" in ran.err
    ran = dsv4("pull", "not a name", "--to", tmp_path / "x")
    assert ran.code == 2 and "OWNER/NAME" in ran.err
    assert not (tmp_path / "x").exists()
    config = json.loads((hub.folder / "config.json").read_text())
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    (hub.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="not a DeepSeek-V4"):
        pull(REPO, tmp_path / "v3")
    assert not list((tmp_path / "v3").glob("*.safetensors"))  # refused before the weights
    (hub.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        pull(REPO, tmp_path / "x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot fetch"):
        pull(REPO, tmp_path / "x")


def test_pull_asks_for_enough_disk_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="not enough space"):
        pull(REPO, tmp_path / "got")
    assert not +hub.served  # not even the config
