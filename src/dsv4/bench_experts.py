"""``dsv4 bench experts``: a model that is larger than the memory it is given.

A process under a limit on its memory reads a prompt and then decodes token by token, with the
routed experts on disk (``engine.experts``). What it reads is compared with what the policy predicts
from the choices of the routers alone, and its speed with what the disk gives in the same process,
before, after and now and then in between, as the disks of virtual machines change their minds. A
second process under the same limit runs the same tokens with all weights mapped from the file, as
those of a model that fits: its logits must be the same, bit for bit.

The limit is that of a control group, page cache and all. Where none can be made it is RLIMIT_DATA,
raised by the size of the mapped files, which count: then no page cache is in it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from . import __version__, kernels
from .api import Model
from .bench import Process, Report, answer_questions, measure_machine
from .checkpoint import Checkpoint
from .engine.experts import expert_bytes
from .engine.memory import control_groups, peak_bytes
from .engine.residency import Counts, replay
from .errors import ConfigError

SAMPLE = 16  # reads that tell what the disk gives
EVERY = 8  # tokens between two samples
PAGE = mmap.PAGESIZE
PHASES = ("prefill", "decode")
# What sets a control group's limit, in the two versions of such groups.
LIMITS = ("memory.max", "memory.limit_in_bytes")
_OURS = "dsv4-bench-"


@contextmanager
def memory_limit(size: int, groups: Sequence[Path] | None = None) -> Iterator[str]:
    """A way to hold a process to ``size`` bytes: a control group's folder below one of ``groups``
    (those of this process), or "" for RLIMIT_DATA. ConfigError where there is neither."""
    tried = []
    for group in control_groups() if groups is None else groups:
        folder = group / f"{_OURS}{os.getpid()}"
        try:
            for old in group.glob(f"{_OURS}*"):  # of a bench that was killed
                if not Path("/proc", old.name.removeprefix(_OURS)).exists():
                    old.rmdir()
            folder.mkdir()
        except OSError as error:
            tried.append(f"{group}: {error.strerror}")
            continue
        try:
            limit = next((folder / name for name in LIMITS if (folder / name).exists()), None)
            if limit is None:
                tried.append(f"{folder}: no memory controller")
                continue
            limit.write_text(str(size))
            yield str(folder)
            return
        except PermissionError as error:
            tried.append(f"{error.filename}: {error.strerror}")
        finally:
            folder.rmdir()
    if sys.platform != "linux":
        raise ConfigError(
            "no way to limit memory", expected="Linux, for a control group or RLIMIT_DATA",
            got="; ".join(tried) or sys.platform,
        )  # fmt: skip
    yield ""


def run(
    model: str | Path,
    *,
    limit: int = 10 * 10**9,
    expert_memory: int | None = None,
    prompt: int = 512,
    new: int = 32,
    threads: int | None = None,
    check: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Run ``model``, a folder, in ``limit`` bytes of memory, of which ``expert_memory`` are for
    routed experts (None: what the other weights and 1.5 GB leave).

    The receipt's ``prefill`` and ``decode`` have tokens a second, uses of experts and the part that
    found them in memory, bytes predicted and read, and the share of the disk's rate, which says
    little when that changed (``disk_low_high``; then ``reading``, the part of the time in which a
    read was under way, says more). ``same_logits`` is None without ``check``. Raises ConfigError
    when the limit leaves nothing for experts, or holds them all.
    """
    checkpoint = Checkpoint.open(model)
    threads = threads or torch.get_num_threads()
    config, routed = checkpoint.config, expert_bytes(checkpoint)
    if expert_memory is None:
        expert_memory = limit - (checkpoint.bytes - routed) - 1_500_000_000
    if not 0 < expert_memory < routed:
        raise ConfigError(
            "this limit does not make experts come and go",
            expected=f"0 to {routed:,} bytes for routed experts", got=f"{expert_memory:,}",
            hint="another --limit, --expert-memory or model",
        )  # fmt: skip
    draw = random.Random(0)
    ids = [draw.randrange(config.vocab_size) for _ in range(prompt + new)]
    say("measuring the machine")
    report: Report = {
        "dsv4": __version__,
        "kernels": kernels.NATIVE,
        "machine": measure_machine(threads),
        "model": {
            "file_bytes": checkpoint.bytes, "expert_bytes": routed,
            "layers": config.num_hidden_layers, "experts": config.n_routed_experts,
        },
        "settings": {"limit": limit, "prompt": prompt, "new": new, "threads": threads},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        with memory_limit(limit) as group:
            forget_files(checkpoint)
            report["limit_by"] = "control group" if group else "RLIMIT_DATA"
            where = checkpoint.path, threads, limit, group
            process = Process("limited", "dsv4.bench_experts", where, threads, Path(scratch))
            try:
                say("reading what is always in memory")
                report["memory"] = process.ask("load", expert_memory)
                for phase, part in zip(PHASES, (ids[:prompt], ids[prompt:]), strict=True):
                    say(phase)
                    report[phase] = process.ask(phase, part)
                report["memory"]["peak_bytes"] = process.ask("peak")
            finally:
                process.close()
        report["same_logits"] = None
        if check:
            say("the same with all weights mapped")
            logits = [report[phase]["logits"] for phase in PHASES]
            with memory_limit(limit) as group:
                report["same_logits"] = logits == _mapped(
                    (checkpoint.path, threads, limit, group), ids, prompt, threads, Path(scratch)
                )
    return report


def _mapped(
    where: Sequence[object], ids: list[int], prompt: int, threads: int, scratch: Path
) -> list[str]:
    """Digests of the logits of both phases, of a model with all its weights mapped."""
    process = Process("mapped", "dsv4.bench_experts", where, threads, scratch)
    try:
        process.ask("load", 1 << 60)
        return [process.ask("digest", ids[:prompt], True), process.ask("digest", ids[prompt:])]
    finally:
        process.close()


def forget_files(checkpoint: Checkpoint) -> None:
    """Ask the system to drop the model's files from its page cache, so that they are read again,
    and on the account of who reads them."""
    if hasattr(os, "posix_fadvise"):
        for path in {checkpoint.place(name)[0] for name in checkpoint.specs}:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Limited:
    """The questions that the limited process answers."""

    def __init__(self) -> None:
        _, folder, threads, limit, group = sys.argv[1:]
        self._group = Path(group) if group else None
        self._checkpoint = Checkpoint.open(folder, check_values=False)
        if self._group is not None:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            most = int(limit) + self._checkpoint.bytes
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        torch.set_num_threads(int(threads))
        self._model: Model | None = None
        self._predicted = Counts(0, 0)
        self._draw = random.Random(0)
        names = [n for n in self._checkpoint.specs if ".experts." in n and n.endswith(".w1.weight")]
        self._each = -(-3 * self._checkpoint.specs[names[0]].bytes // PAGE) * PAGE
        flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
        self._files = [  # with their sizes
            (os.open(path, flags), path.stat().st_size)
            for path in sorted({self._checkpoint.place(name)[0] for name in names})
        ]

    def disk(self, count: int = SAMPLE) -> Report:
        """What the disk gives past the page cache, in reads as large as an expert's matrices: at
        random places, and one after the other. Bytes of each, and seconds."""
        files, each = self._files, self._each
        ordered = [(files[0], i * each) for i in range(files[0][1] // each)][:count]
        places = [
            (file, self._draw.randrange(file[1] - each) // PAGE * PAGE if file[1] > each else 0)
            for file in self._draw.choices(files, [size for _, size in files], k=count)
        ]
        return {"random": self._timed(places), "ordered": self._timed(ordered)}

    def _timed(self, places: Sequence[tuple[tuple[int, int], int]]) -> list[float]:
        """Bytes and seconds of reads at offsets in files."""
        with mmap.mmap(-1, self._each) as buffer, memoryview(buffer) as view:
            buffer[::PAGE] = bytes(len(buffer) // PAGE)  # to have its pages
            begin = time.perf_counter()
            total = sum(os.preadv(file, [view], offset) for (file, _), offset in places)
            return [total, time.perf_counter() - begin]

    def load(self, expert_memory: int) -> Report:
        self._model = model = Model.from_checkpoint(
            self._checkpoint, expert_memory=expert_memory
        )
        if model.experts is None:
            return {}
        for parameter in model.net.parameters():
            if parameter.is_cpu:
                parameter.view(-1).view(torch.uint8)[::PAGE].sum()
        model.experts.trace = []
        self._session = model.session()
        stats = model.experts.stats()
        return {
            "experts": model.experts.slots, "expert_bytes": stats.memory_bytes,
            "other_bytes": self._checkpoint.bytes - expert_bytes(self._checkpoint),
        }  # fmt: skip

    def prefill(self, ids: list[int]) -> Report:
        return self._phase([ids])

    def decode(self, ids: list[int]) -> Report:
        return self._phase([[token] for token in ids])

    def _phase(self, parts: list[list[int]]) -> Report:
        assert self._model is not None and self._model.experts is not None
        experts, config = self._model.experts, self._model.config
        before, digest = experts.stats(), hashlib.sha256()
        seconds, system, samples = 0.0, 0, [self.disk()]
        for i, ids in enumerate(parts):
            begin, reads = time.perf_counter(), disk_reads()
            digest.update(self._session.extend(ids, last=True).numpy().tobytes())
            seconds += time.perf_counter() - begin
            system += disk_reads() - reads
            if i % EVERY == EVERY - 1:
                samples.append(self.disk(SAMPLE // 2))
        samples.append(self.disk())
        after, disk = experts.stats(), [_gb_per_s([sample], "random") for sample in samples]
        used = after.counts.used - before.counts.used
        read = after.counts.read - before.counts.read
        assert experts.trace is not None
        layers = config.num_hidden_layers + config.mtp_layers
        predicted, self._predicted = self._predicted, replay(
            experts.trace, experts.slots, layers, config.n_routed_experts,
            config.num_experts_per_tok,
        )  # fmt: skip
        each = expert_bytes(self._checkpoint) // (layers * config.n_routed_experts)
        tokens = sum(map(len, parts))
        wanted = (self._predicted.read - predicted.read) * each
        own = after.bytes_read - before.bytes_read
        most = max(own, system)  # what the system saw, if it can say
        return {
            "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
            "experts_used": used, "experts_read": read, "hit_rate": Counts(used, read).hit_rate,
            "predicted_bytes": wanted, "read_bytes": most, "own_bytes": own,
            "of_predicted": most / wanted if wanted else 1.0, "bytes_per_token": most / tokens,
            "gb_per_s": most / seconds / 1e9,
            "disk_gb_per_s": _gb_per_s(samples, "random"),
            "disk_ordered_gb_per_s": _gb_per_s(samples, "ordered"),
            "disk_low_high": [min(disk), max(disk)],
            "of_disk": most / seconds / 1e9 / _gb_per_s(samples, "random"),
            "reading": (after.seconds_reading - before.seconds_reading) / seconds,
            "waiting": (after.seconds_waiting - before.seconds_waiting) / seconds,
            "logits": digest.hexdigest(),
        }  # fmt: skip

    def digest(self, ids: list[int], prompt: bool = False) -> str:
        """Of the logits that ``prefill`` or ``decode`` would compute."""
        assert self._model is not None
        digest = hashlib.sha256()
        if prompt:
            self._session = self._model.session()
        for part in [ids] if prompt else [[token] for token in ids]:
            digest.update(self._session.extend(part, last=True).numpy().tobytes())
        return digest.hexdigest()

    def peak(self) -> int:
        """Most memory of the control group, page cache and all; else of the process."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if self._group is not None and (self._group / name).exists():
                return int((self._group / name).read_text())
        return peak_bytes()


def _gb_per_s(samples: Sequence[Report], kind: str) -> float:
    size = sum(int(sample[kind][0]) for sample in samples)
    return size / sum(float(sample[kind][1]) for sample in samples) / 1e9


def disk_reads() -> int:
    """Bytes that this process has had read from disks; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    answer_questions(_Limited)
