"""The files of a run: its lock, its log and its checkpoints, none of which a kill can spoil.

A checkpoint is a folder ``checkpoints/00000150``: the tensors as ``torch.distributed.checkpoint``
writes them (by name, so that any number of processes can read them) and ``manifest.json`` with the
SHA-256 of every file and what else the run has to know. It is made beside its place, written
through to the disk and renamed, so a folder of that name is whole; it is verified before use all
the same. ``log.jsonl`` is cut back on resume to what it was when the checkpoint was made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import TrainingError
from .distributed import Ranks
from .recipes import fingerprint

MANIFEST = "manifest.json"


def lock(folder: Path) -> IO[str]:
    """Keep other processes from training into ``folder`` until the file returned is closed.

    The lock goes with the process that holds it, however it ends. TrainingError when another
    process has it.
    """
    f = (folder / "lock").open("a+")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        with f:
            f.seek(0)
            holder = f.read().strip() or "unknown"
        raise TrainingError(
            f"another process trains into {folder}",
            expected="one process for each run",
            got=f"process {holder}",
            hint="wait for it, stop it, or give another --out folder",
        ) from e
    f.truncate(0)
    f.write(f"{os.getpid()}\n")
    f.flush()
    return f


class RunLog:
    """``log.jsonl``: one JSON object a line."""

    def __init__(self, folder: Path, position: int, ranks: Ranks) -> None:
        """Open for appending; what stands behind byte ``position`` is dropped. Only the first
        rank writes."""
        self._kept = ranks.first
        self._file = (folder / "log.jsonl" if self._kept else Path(os.devnull)).open("ab")
        whole = self._file.tell()
        if position < whole:
            self._file.truncate(position)
            self._file.seek(position)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; it survives the process."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes so far; they survive the machine."""
        if self._kept:
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without a last one that is still being written.

    TrainingError when there is no log, or a line in its midst is not JSON.
    """
    file = folder / "log.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]
    except OSError as e:
        raise TrainingError(
            "no such run", expected="a folder with log.jsonl", got=folder, hint="dsv4 train RECIPE"
        ) from e
    except ValueError as e:
        raise TrainingError(f"{file} is damaged", expected="a JSON object a line", got=e) from e


class Checkpoints:
    """The checkpoints of a run; all ranks call the same methods in the same order.

    Regular ones are those of steps that are a multiple of ``every``. The last ``keep`` of them are
    kept, those of multiples of ``keep_every`` (unless it is 0) for ever, and the newest of all.
    """

    def __init__(self, run: Path, every: int, keep: int, keep_every: int, ranks: Ranks) -> None:
        self.folder = run / "checkpoints"
        self.every, self.keep, self.keep_every, self.ranks = every, keep, keep_every, ranks

    def steps(self) -> list[int]:
        """Steps with a checkpoint, in order."""
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(p.name) for p in names if p.name.isdigit())

    def regular(self) -> list[int]:
        """Those of them that depend on the recipe alone, not on when a run was stopped."""
        return [step for step in self.steps() if step % self.every == 0]

    def save(self, step: int, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint whole or not at all, then drop those the policy does not keep.

        ``tensors``: what this rank holds; the same name means the same tensor on every rank.
        ``facts``: what else to remember, as JSON. TrainingError when the disk does not take it.
        """
        final, fresh = self._path(step), self.folder / ".new"
        try:
            if self.ranks.first:
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(parents=True)
            self.ranks.wait()
            with warnings.catch_warnings():  # that a single process is alone
                warnings.simplefilter("ignore")
                alone = self.ranks.size == 1
                save(tensors, storage_writer=FileSystemWriter(fresh), no_dist=alone)
            if self.ranks.first:
                body = {"step": step, "files": _sums(fresh), "facts": dict(facts)}
                _write(fresh / MANIFEST, body | {"sha256": fingerprint(body)})
                _sync(fresh)
                shutil.rmtree(final, ignore_errors=True)
                fresh.rename(final)
                _sync(self.folder)
                self._prune()
            self.ranks.wait()
        except (OSError, RuntimeError, CheckpointException) as e:
            shutil.rmtree(fresh, ignore_errors=True)
            free = shutil.disk_usage(self.folder if self.folder.is_dir() else ".").free
            last = self.steps()
            raise TrainingError(
                f"cannot write the checkpoint of step {step} into {self.folder}",
                expected=f"a writable disk ({free / 1e9:.2f} GB are free)",
                got=_cause(e),
                hint="free some space and give the same command again; "
                + (f"it goes on from step {last[-1]}" if last else "it starts from the beginning"),
            ) from e

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint remembers beside its tensors; TrainingError if a byte of it changed."""
        path = self._path(step)
        try:
            body = json.loads((path / MANIFEST).read_bytes())
            if body.pop("sha256") != fingerprint(body) or body["step"] != step:
                raise ValueError(f"{MANIFEST} was changed")
            sums = _sums(path)
            changed = [name for name, s in body["files"].items() if sums.get(name) != s]
            if changed:
                raise ValueError(f"changed or missing: {', '.join(changed)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise TrainingError(
                f"the checkpoint {path} is damaged",
                expected="the files that its manifest lists, unchanged",
                got=e,
                hint="delete it; the run goes on from the one before",
            ) from e
        facts: dict[str, Any] = body["facts"]
        return facts

    def load(self, step: int, tensors: dict[str, Tensor], alone: bool = False) -> None:
        """Fill ``tensors`` from a checkpoint that ``facts`` has verified; each rank its own, or
        this one ``alone``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = FileSystemReader(self._path(step))
            load(tensors, storage_reader=reader, no_dist=alone or self.ranks.size == 1)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run has gone back and takes another course."""
        if self.ranks.first:
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self._path(later))
        self.ranks.wait()

    def put_aside(self, step: int) -> None:
        """Take a damaged checkpoint out of the way, for whoever wants to look at it."""
        if self.ranks.first:
            aside = self._path(step).with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            self._path(step).rename(aside)
        self.ranks.wait()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*self.regular()[-self.keep :], steps[-1]}
        for step in steps:
            if step not in kept and (not self.keep_every or step % self.keep_every):
                shutil.rmtree(self._path(step))


def _write(file: Path, content: Mapping[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as f:
        json.dump(content, f)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest."""
    sums = {}
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST:
            digest = hashlib.sha256()
            with file.open("rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
            sums[file.name] = digest.hexdigest()
    return sums


def _cause(e: BaseException) -> BaseException:
    """The error of the first rank that failed."""
    if isinstance(e, CheckpointException):
        return next((each[0] for each in e.failures.values()), e)
    return e
