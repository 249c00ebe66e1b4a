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

``transformers`` gets the same weights: converted to BF16, which is exact, and read as float32.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from . import __version__
from .api import find_model, load
from .checkpoint import Checkpoint, save_checkpoint
from .config import V4Config
from .convert import convert
from .engine.session import Session
from .errors import ConfigError, DSV4Error
from .synth import resize, synthesize

Report = dict[str, Any]
PEERS = ("transformers",)
# Shapes to compare implementations on; every part of V4 is in them.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512, "num_attention_heads": 8, "q_lora_rank": 256, "o_groups": 2,
        "o_lora_rank": 256, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 256, "index_n_heads": 8, "index_topk": 128,
    },
    "mid": {
        "hidden_size": 2048, "num_attention_heads": 32, "q_lora_rank": 512, "o_groups": 4,
        "o_lora_rank": 512, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1024, "index_n_heads": 32, "index_topk": 512,
    },
}  # fmt: skip
LAYERS = (0, 0, 4, 128, 4, 128, 4, 128, 0)
SPEEDS = ("prefill", "decode_start", "decode_prompt")
AGREEMENT_TOKENS = 256


def shape(name: str) -> V4Config:
    """The configuration of a synthetic shape; ConfigError for an unknown name."""
    if name not in SHAPES:
        raise ConfigError("no such synthetic shape", expected=", ".join(SHAPES), got=name)
    layers = {"num_hidden_layers": len(LAYERS) - 1, "compress_ratios": LAYERS}
    changes: dict[str, Any] = {"vocab_size": 16384, "num_hash_layers": 2} | layers | SHAPES[name]
    return resize(V4Config.preset("flash"), **changes)


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
    if against is not None and importlib.util.find_spec(against) is None:
        raise ConfigError(
            f"{against} is not installed", hint="pip install 'transformers>=5.16'"
        )
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        if synth is None:
            folder = find_model(model)
        else:
            folder = Path(scratch, synth)
            say(f"writing a random model of shape {synth}")
            config = shape(synth)
            save_checkpoint(folder, config, synthesize(config))
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
            "commit": _commit(),
            "command": " ".join(["dsv4", *sys.argv[1:]]),
            "model": {
                "name": synth or folder.resolve().name,
                "file_bytes": checkpoint.bytes,
                "parameters": config.parameter_counts().total,
            },
            "machine": measure_machine(threads),
            "settings": {"prompt": prompt, "new": new, "repeats": repeats, "threads": threads},
        }
        engines = [_Process("dsv4", folder, threads, Path(scratch))]
        if against is not None:
            say(f"converting the weights for {against}")
            convert(checkpoint, Path(scratch, "bf16"), "bf16")
            engines.append(_Process(against, Path(scratch, "bf16"), threads, Path(scratch)))
        try:
            report |= _compare(engines, ids, prompt, repeats, checkpoint.bytes, say)
        finally:
            for engine in engines:
                engine.close()
    return report


def _compare(
    engines: Sequence[_Process],
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
        | {key: _spread(values) for key, values in speeds[engine.name].items()}
        | {
            "memory": memory[engine.name],
            "agreement": _agreement(engine.logits(some, "own"), truth),
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


def _spread(values: Sequence[float]) -> Report:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _agreement(logits: Tensor, truth: Tensor) -> Report:
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


def _commit() -> str | None:
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
        self, name: str, module: str, arguments: Sequence[object], threads: int, scratch: Path
    ) -> None:
        self.name = name
        self._log: IO[str] = (scratch / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, name, *map(str, arguments)],
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

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class _Process(Process):
    """A process of this module, which answers with files of logits too."""

    def __init__(self, name: str, folder: Path, threads: int, scratch: Path) -> None:
        super().__init__(name, "dsv4.bench", (folder, threads), threads, scratch)
        self._logits = scratch / f"{name}.logits"

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        """Logits ``[T, vocab]`` in "float32" or its "own" numerics."""
        self.ask("logits", ids, numerics, str(self._logits))
        logits: Tensor = torch.load(self._logits, weights_only=True)
        return logits


class _Runner(Protocol):
    """What a measured implementation can do; it holds one timeline at a time."""

    def load(self) -> None: ...

    def prefill(self, ids: list[int]) -> None: ...

    def step(self, token: int) -> None: ...

    def kv_bytes(self) -> int | None: ...

    def logits(self, ids: list[int], numerics: str) -> Tensor: ...


class _Ours:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._session: Session | None = None

    def load(self) -> None:
        self._model = load(self._folder)

    def prefill(self, ids: list[int]) -> None:
        self._session = self._model.session()
        self._session.extend(ids, last=True)

    def step(self, token: int) -> None:
        assert self._session is not None
        self._session.extend([token], last=True)

    def kv_bytes(self) -> int | None:
        return self._session.bytes() if self._session is not None else 0

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        model = self._model if numerics == "own" else load(self._folder, numerics=numerics)
        return model.logits(ids)


class _Transformers:
    def __init__(self, folder: Path) -> None:
        import transformers

        self._library, self._folder = transformers, folder
        self._model: Any = None
        self._cache: Any = None

    def load(self) -> None:
        library: Any = self._library
        model = library.AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        self._model = model.eval()

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> None:
        out = self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values

    @torch.no_grad()
    def step(self, token: int) -> None:
        self._model(torch.tensor([[token]]), use_cache=True, past_key_values=self._cache)

    def kv_bytes(self) -> int | None:
        return None

    @torch.no_grad()
    def logits(self, ids: list[int], numerics: str) -> Tensor:
        logits: Tensor = self._model(torch.tensor([ids])).logits[0]
        return logits


class _Measured:
    """The questions a ``_Process`` answers."""

    def __init__(self, runner: _Runner, folder: Path) -> None:
        self._runner, self._folder = runner, str(folder.resolve())
        self._before = self._peak_before = 0

    def load(self) -> Report:
        for dtype in (torch.float32, torch.bfloat16):  # the libraries' own pages are not the model
            x = torch.ones(64, 256, dtype=dtype)
            (x @ x.T).softmax(-1).sort()
        forget_peak()
        self._before, self._peak_before = _resident(self._folder), peak_bytes()
        begin = time.perf_counter()
        self._runner.load()
        return {"load_seconds": time.perf_counter() - begin}

    def speeds(self, ids: list[int], prompt: int) -> Report:
        runner, new = self._runner, ids[prompt:]
        runner.prefill(ids[:1])
        decode_start = _rate(new, runner.step)
        begin = time.perf_counter()
        runner.prefill(ids[:prompt])
        prefill = prompt / (time.perf_counter() - begin)
        decode = _rate(new, runner.step)
        return dict(zip(SPEEDS, (prefill, decode_start, decode), strict=True))

    def memory(self, file_bytes: int) -> Report:
        resident, kv = _resident(self._folder) - self._before, self._runner.kv_bytes()
        report = {"resident_bytes": resident, "peak_bytes": peak_bytes() - self._peak_before}
        of_file = (resident - (kv or 0)) / file_bytes
        return report | {"kv_bytes": kv, "resident_without_kv_of_file": of_file}

    def logits(self, ids: list[int], numerics: str, file: str) -> None:
        torch.save(self._runner.logits(ids, numerics).clone(), file)


def _rate(tokens: Sequence[int], step: Callable[[int], None]) -> float:
    begin = time.perf_counter()
    for token in tokens:
        step(token)
    return len(tokens) / (time.perf_counter() - begin)


def _resident(folder: str) -> int:
    """Bytes in memory now that are this process's own or of mapped files in ``folder``."""
    maps = Path("/proc/self/smaps")
    if not maps.is_file():  # no way to tell code from the rest
        asked = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) * 1024
    total, ours = 0, False
    for line in maps.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            ours = len(rest) > 4 and rest[4].startswith(folder)
        elif first == ("Rss:" if ours else "Anonymous:"):
            total += int(rest[0]) * 1024
    return total


def peak_bytes() -> int:
    """The most bytes of this process in memory, code included, since ``forget_peak`` (or its
    start, where the system cannot forget)."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


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


def _measured() -> _Measured:
    name, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    runner: _Runner = (_Ours if name == "dsv4" else _Transformers)(Path(folder))
    return _Measured(runner, Path(folder))


if __name__ == "__main__":
    answer_questions(_measured)
