"""``dsv4 bench context``: what a long context costs, measured by one session that grows.

It is filled with random tokens to each length in turn, of which the last STEPS are decoded one by
one. At each length:

    prefill       tokens a second since the length before
    decode        milliseconds of a single token (median), and how many times that at the first
                  length
    memory        bytes of attention state, and the planner's figure for them
    resident      what the process has grown by, working memory included

and at the last one: the timeline is written to disk and read back, beside as many bytes in one
plain file; and rewound by REWIND tokens, of which those after the last snapshot are computed again.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import __version__, kernels
from .api import Model, find_model, load
from .bench import commit, measure_machine
from .engine.disk import DiskTier
from .engine.session import Session
from .errors import ConfigError
from .planner.memory import extend_passes, kv_bytes, session_bytes
from .planner.plots import figure_of, save

Report = dict[str, Any]
LEAST, FACTOR, STEPS = 256, 4, 16
PIECE = 4096  # tokens between two words about progress
REWIND = 100_000
CHUNK = 4 << 20  # bytes of a plain file that are read or written at once


def lengths_up_to(most: int, first: int = 4096) -> list[int]:
    """``first``, 4 times, 16 times, ... as much, and ``most``."""
    lengths = [min(first, most)]
    while lengths[-1] < most:
        lengths.append(min(most, FACTOR * lengths[-1]))
    return lengths


def run(
    model: str | Path = "v4-nano",
    *,
    most: int = 1 << 20,
    first: int = 4096,
    threads: int | None = None,
    scratch: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure ``model`` (a name or a folder) up to ``most`` tokens.

    Files go to a folder in ``scratch``, which is removed. Returns the receipt: ``machine``,
    ``settings``, ``lengths``, ``disk`` and ``rewind``. Raises ConfigError when the model's context
    is shorter than ``most``.
    """
    loaded = load(find_model(model))
    limit = loaded.config.max_position_embeddings
    if not LEAST <= first <= most <= limit:
        raise ConfigError("--first and --max", expected=f"{LEAST} to {limit}, in this order",
                          got=f"{first} and {most}")  # fmt: skip
    before = torch.get_num_threads()
    threads = threads or before
    say("measuring the machine")
    machine = measure_machine(threads)
    torch.set_num_threads(threads)
    random = Random(0)
    ids = [random.randrange(loaded.config.vocab_size) for _ in range(most)]
    try:
        with tempfile.TemporaryDirectory(prefix="dsv4-bench-", dir=scratch) as folder:
            session = loaded.session()
            found = list(_grow(loaded, session, ids, lengths_up_to(most, first), say))
            disk = _disk(loaded, session, ids, Path(folder), say)
            rewind = _rewind(session, min(REWIND, most // 2), say)
    finally:
        torch.set_num_threads(before)
    return {
        "dsv4": __version__,
        "commit": commit(),
        "model": loaded.name,
        "kernels": kernels.NATIVE,
        "machine": machine,
        "settings": {"max": most, "steps": STEPS, "threads": threads},
        "lengths": found,
        "disk": disk,
        "rewind": rewind,
    }


def _grow(
    model: Model, session: Session, ids: Sequence[int], lengths: Sequence[int],
    say: Callable[[str], object],
) -> Iterator[Report]:  # fmt: skip
    session.extend(ids[:1], last=True)  # what is made once is made now
    session.rewind(0)
    resident, spent, passes = _resident(), 0.0, list[int]()
    decode_at_first: float | None = None
    for length in lengths:
        started = len(session)
        now = 0.0
        while len(session) < length - STEPS:
            at = len(session)
            piece = ids[at : min(at + PIECE, length - STEPS)]
            passes += extend_passes(at, len(piece))
            start = time.perf_counter()
            session.extend(piece, last=True)
            now += time.perf_counter() - start
            rate = (len(session) - started) / now
            say(f"{len(session):,} of {len(ids):,} tokens, {rate:,.0f} a second")
        spent += now
        steps = []
        for token in ids[length - STEPS : length]:
            start = time.perf_counter()
            session.extend([token], last=True)
            steps.append(1000 * (time.perf_counter() - start))
        passes += [1] * STEPS
        decode = statistics.median(steps)
        decode_at_first = decode if decode_at_first is None else decode_at_first
        yield {
            "length": length,
            "prefill_tokens_per_s": (length - STEPS - started) / now,
            "prefill_seconds": spent,
            "decode_ms": decode, "decode_low": min(steps), "decode_high": max(steps),
            "decode_ratio": decode / decode_at_first,
            "bytes": session.bytes(),
            "planned_bytes": session_bytes(model.config, passes, model.numerics),
            "published_bytes": kv_bytes(model.config, length),
            "resident_bytes": _resident() - resident,
        }  # fmt: skip


def _disk(
    model: Model, session: Session, ids: Sequence[int], folder: Path, say: Callable[[str], object]
) -> Report:
    """Seconds of writing and reading the timeline, and as many bytes in one file."""
    say("writing to disk")
    tier = DiskTier(folder, model.fingerprint(), 1 << 40)
    try:
        start = time.perf_counter()
        session.save(tier)
        tier.flush()
        os.sync()
        written = time.perf_counter() - start
        files = [p for p in tier.folder.iterdir() if p.suffix in (".rows", ".cut")]
        size = sum(p.stat().st_size for p in files)
        for path in files:
            _forget(path)
        say("reading from disk")
        other = model.session()
        start = time.perf_counter()
        restored = other.restore(tier, [*ids, 0])
        read = time.perf_counter() - start
    finally:
        tier.close()
    plain = folder / "plain"
    data = os.urandom(CHUNK)
    start = time.perf_counter()
    with plain.open("wb") as file:
        for done in range(0, size, CHUNK):
            file.write(data[: min(CHUNK, size - done)])
    os.sync()
    plain_written = time.perf_counter() - start
    _forget(plain)
    start = time.perf_counter()
    with plain.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass
    plain_read = time.perf_counter() - start
    return {
        "bytes": size, "files": len(files), "tokens": restored,
        "write_seconds": written, "plain_write_seconds": plain_written,
        "read_seconds": read, "plain_read_seconds": plain_read,
    }  # fmt: skip


def _rewind(session: Session, by: int, say: Callable[[str], object]) -> Report:
    say(f"rewinding {by:,} tokens")
    keep = len(session) - by
    start = time.perf_counter()
    session.rewind(keep)
    return {"tokens": by, "seconds": time.perf_counter() - start}


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _forget(path: Path) -> None:
    """Ask the system to keep nothing of a file in memory, so that reading it is reading a disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plot(path: str | Path, report: Report) -> None:
    """Speed of prefill, time of a decode step, and memory, over the length.

    The ending decides the format (png, svg, pdf)."""
    figure = figure_of(11, 3.6)
    rows = report["lengths"]
    lengths = [row["length"] for row in rows]
    speed, step, memory = figure.subplots(1, 3)
    speed.plot(lengths, [row["prefill_tokens_per_s"] for row in rows], "o-", color="#1f4e9c")
    speed.set_ylabel("prefill, tokens a second")
    step.plot(lengths, [row["decode_ms"] for row in rows], "o-", color="#e07b00")
    step.set_ylabel("a decoded token, ms")
    for key, label, style in (
        ("bytes", "attention state", "o-"), ("planned_bytes", "by plan", "x--"),
        ("published_bytes", "published formula", ":"),
    ):  # fmt: skip
        memory.plot(lengths, [row[key] / 1e6 for row in rows], style, label=label)
    memory.set_ylabel("MB")
    memory.legend(frameon=False)
    for axes in (speed, step, memory):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of context")
        axes.grid(alpha=0.3)
    figure.suptitle(report["model"])
    save(figure, path)
