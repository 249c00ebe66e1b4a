"""``dsv4 bench``: speed and memory of a model, alone or next to another implementation of V4.

Each implementation runs in a process of its own, so that its memory is its own, and takes turns
with the other, so that what else the machine does falls on both. A figure is the median over the
repeats, with the lowest and highest; a ratio is the median of the ratios within each repeat.

    prefill          tokens of the prompt per second: one pass, key-value cache kept, last logits
    decode_start     tokens per second one at a time, after a single token
    decode_prompt    the same after the whole prompt
    memory           what loading and running added (resident): memory of the process's own and
                     touched pages of the model's files, but not of program code; the most the
                     whole process ever added (peak); the attention state in it (kv); and
                     (resident - kv) / file
    agreement        of the logits with our float32 numerics: same most likely token, and KL

Another implementation gets the same weights (``peers``): transformers in BF16, which is exact, read
as float32; llama.cpp and flyweight as the GGUF that llama.cpp's script makes of the official files.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import __version__, peers
from .api import find_model
from .checkpoint import Checkpoint, save_checkpoint
from .errors import ConfigError, DSV4Error
from .synth import shape, small_tokenizer, synthesize

Report = dict[str, Any]
PEERS = ("transformers", "llama.cpp", "flyweight")  # of whole models
SPEEDS = ("prefill", "decode_start", "decode_prompt")
AGREEMENT_TOKENS = 256


def run(
    model: str | Path = "v4-nano",
    *,
    against: str | None = None,
    synth: str | None = None,
    prompt: int = 512,
    new: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure ``model`` (a name or a folder), or a random one of the shape ``synth``.

    ``against`` names another implementation (PEERS). Returns the receipt: ``model``, ``machine``,
    ``settings``, ``engines`` and, with ``against``, ``ratios`` (above 1: we are faster, or
    smaller). ``say`` hears what happens. Raises ConfigError, CheckpointError, and DSV4Error when
    a process that measures dies.
    """
    if against is not None and against not in PEERS:
        raise ConfigError("bench against", expected=" or ".join(PEERS), got=against)
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        if synth is None:
            folder = find_model(model)
        else:
            folder = Path(scratch, synth)
            say(f"writing a random model of shape {synth}")
            config = shape(synth)
            save_checkpoint(folder, config, synthesize(config), extra_files=small_tokenizer(config))
        checkpoint = Checkpoint.open(folder)
        config, room = checkpoint.config, checkpoint.config.max_position_embeddings
        if prompt + new > room:
            raise ConfigError("--prompt and --new", expected=f"at most {room}", got=prompt + new)
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (prompt + new,), generator=random).tolist()
        threads = threads or torch.get_num_threads()
        say("measuring the machine")
        report: Report = {
            "dsv4": __version__,
            "commit": commit(),
            "command": " ".join(["dsv4", *sys.argv[1:]]),
            "model": {
                "name": synth or folder.resolve().name,
                "file_bytes": checkpoint.bytes,
                "parameters": config.parameter_counts().total,
            },
            "machine": measure_machine(threads),
            "settings": {"prompt": prompt, "new": new, "repeats": repeats, "threads": threads},
        }
        engines = [EngineProcess("dsv4", folder, threads, Path(scratch))]
        if against is not None:
            python = peers.environment(against, say)
            weights = peers.weights(against, folder, Path(scratch), say)
            engines.append(EngineProcess(against, weights, threads, Path(scratch), python))
        try:
            report |= _compare(engines, ids, prompt, repeats, checkpoint.bytes, say)
        finally:
            for engine in engines:
                engine.close()
    return report


def _compare(
    engines: Sequence[EngineProcess],
    ids: list[int],
    prompt: int,
    repeats: int,
    file_bytes: int,
    say: Callable[[str], object],
) -> Report:
    names = [engine.name for engine in engines]
    loads: dict[str, Report] = {}
    speeds: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in SPEEDS} for name in names
    }
    for engine in engines:
        say(f"{engine.name}: loading")
        loads[engine.name] = engine.ask("load")
        engine.ask("speeds", ids[: prompt // 2 + 2], prompt // 2 + 1)  # nothing is first any more
    for i in range(repeats):
        for engine in engines if i % 2 == 0 else engines[::-1]:
            say(f"{engine.name}: run {i + 1} of {repeats}")
            for key, value in engine.ask("speeds", ids, prompt).items():
                speeds[engine.name][key].append(value)
    memory = {engine.name: engine.ask("memory", file_bytes) for engine in engines}
    say("comparing logits")
    some = ids[: min(prompt, AGREEMENT_TOKENS)]
    truth = engines[0].logits(some, "float32")
    found: Report = {
        engine.name: loads[engine.name]
        | {key: spread(values) for key, values in speeds[engine.name].items()}
        | {
            "memory": memory[engine.name],
            "agreement": agreement(engine.logits(some, "own"), truth),
        }
        for engine in engines
    }
    if len(names) == 1:
        return {"engines": found}
    ours, theirs = names
    ratios = {
        key: statistics.median(
            a / b for a, b in zip(speeds[ours][key], speeds[theirs][key], strict=True)
        )
        for key in SPEEDS
    }
    ratios["memory"] = memory[theirs]["resident_bytes"] / max(1, memory[ours]["resident_bytes"])
    return {"engines": found, "ratios": ratios}


def spread(values: Sequence[float]) -> Report:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def agreement(logits: Tensor, truth: Tensor) -> Report:
    """How far logits ``[T, vocab]`` are from true ones: same first choice, and KL."""
    p, q = truth.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return {
        "top1": (logits.argmax(-1) == truth.argmax(-1)).double().mean().item(),
        "kl_mean": kl.mean().item(),
        "kl_median": kl.median().item(),
    }


# ---------------------------------------------------------------- the machine


def measure_machine(threads: int) -> Report:
    """What kind of machine this is, and how fast its memory and its matrix products are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = torch.ones(1 << 26)  # 256 MB: larger than caches
        stream = block.nbytes / _best(block.sum)
        rates = {}
        for dtype in (torch.bfloat16, torch.float32):
            a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
            rates[dtype] = 2 * 1024**3 / _best(functools.partial(torch.matmul, a, b))
    finally:
        torch.set_num_threads(before)
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "stream_read_gb_per_s": stream / 1e9,
        "bf16_tflop_per_s": rates[torch.bfloat16] / 1e12,
        "f32_tflop_per_s": rates[torch.float32] / 1e12,
    }


def _best(f: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return min(times)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of a source checkout; None where this is an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


# ---------------------------------------------------------------- a process that measures


class Process:
    """``python -m module arguments`` for one implementation: questions are lines of JSON for
    ``answer_questions`` there, and so are the answers."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[object],
        threads: int,
        scratch: Path,
        python: str | Path = sys.executable,
    ) -> None:
        self.name = name
        self._log: IO[str] = (scratch / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [str(python), "-m", module, name, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, what: str, *arguments: Any) -> Any:
        """The answer; DSV4Error with the reason if there is none."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([what, *arguments]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise DSV4Error(
                f"the process that runs {self.name} ended during {what!r}",
                got=f"exit code {process.wait()}: " + (said[-1] if said else "it said nothing"),
            )
        answer = json.loads(line)
        if "error" in answer:
            raise DSV4Error(f"{self.name}, {what}: {answer['error']}")
        return answer["value"]

    def pause(self) -> None:
        """Stop it, so that nothing of it runs while another is measured."""
        if hasattr(signal, "SIGSTOP"):
            self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let a paused process run until the end."""
        if hasattr(signal, "SIGCONT"):
            self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def close(self) -> None:
        if hasattr(signal, "SIGCONT"):
            self._process.send_signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # a question that it did not live to read
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class EngineProcess(Process):
    """An implementation with a model's weights, as ``bench_engines.Measured`` drives it."""

    def __init__(
        self,
        name: str,
        weights: Path,
        threads: int,
        scratch: Path,
        python: str | Path = sys.executable,
    ) -> None:
        module, arguments = "dsv4.bench_engines", (weights, threads)
        super().__init__(name, module, arguments, threads, scratch, python)
        self._logits = scratch / f"{name}.logits"

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        """Logits ``[T, vocab]`` in its "own" numerics, or in "float32" where it has them."""
        self.ask("logits", ids, numerics, str(self._logits))
        logits: Tensor = torch.load(self._logits, weights_only=True)
        return logits


def resident_bytes(weights: str, pid: int | None = None) -> int:
    """Bytes in memory now that are a process's own or of its mapped files in ``weights``."""
    maps = Path(f"/proc/{pid or 'self'}/smaps")
    if not maps.is_file():  # no way to tell code from the rest
        asked = ["ps", "-o", "rss=", "-p", str(pid or os.getpid())]
        return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) * 1024
    total, ours = 0, False
    for line in maps.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            ours = len(rest) > 4 and rest[4].startswith(weights)
        elif first == ("Rss:" if ours else "Anonymous:"):
            total += int(rest[0]) * 1024
    return total


def answer_questions(prepare: Callable[[], object]) -> None:
    """Answer on standard output, by methods of what ``prepare`` gives, until the questions end."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    target = prepare()
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(target, what)(*arguments)}
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
