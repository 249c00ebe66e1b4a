"""The disk tier: what was computed survives the process, and is never trusted blindly.

One file for the rows of each block of 128 tokens and one for each cut, named by digests of all
tokens up to their end, in a folder named by a fingerprint of everything the numbers depend on
(weights, numerics, format). A file is written beside its place and renamed, so it is there as a
whole or not at all; it begins with a digest of its bytes and holds its own name, tokens and
fingerprint, which are compared when it is read. So whatever happens to files, the worst is a miss.

Several processes may share a folder. Files never change; who deletes takes a lock, and a file that
is gone is a miss like any other. Reading happens in the caller's thread; writing in one of its own,
which drops what comes faster than the disk takes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .kvstate import GRAIN, Block, Cut

log = logging.getLogger(__name__)
FORMAT = b"dsv4 attention state 1"
DIGEST = 16  # bytes
PENDING = 64  # saves that may wait to be written
ROOT = "0" * 2 * DIGEST


class Found(NamedTuple):
    """A timeline on disk: its whole blocks, and the cut at its end."""

    blocks: list[Block]
    cut: Cut


class DiskTier:
    """Blocks and cuts in ``folder``, about ``budget`` bytes of them at most.

    ``fingerprint``: engines that have the same one compute the same bits. ``write(file, data)``
    makes a file; injected so that tests can fill a disk.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        budget: int,
        *,
        write: Callable[[Path, bytes], object] = Path.write_bytes,
    ) -> None:
        self._mark = hashlib.sha256(FORMAT + fingerprint.encode()).digest()
        self.folder = folder / self._mark.hex()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.budget, self._write = budget, write
        self.failures = 0  # files that could not be written, or were not what they should be
        self._cuts: dict[str, list[str]] = {}  # names of cuts by the digest of their whole blocks
        self._seen = -1  # when the folder was last changed, in nanoseconds
        self._size = 0
        self._trim()
        self._queue: queue.Queue[tuple[array[int], list[Block], list[Cut]] | None]
        self._queue = queue.Queue(PENDING)
        self._thread = threading.Thread(target=self._save_all, name="dsv4-disk", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ finding

    def find(self, tokens: Sequence[int], beyond: int, blocks: Sequence[Any]) -> Found | None:
        """The longest beginning of ``tokens`` on disk that is longer than ``beyond`` and leaves a
        token to compute. ``blocks``: those that are known already of its first whole ones."""
        wanted, listed = array("i", tokens), self._listed()
        digests, candidates = [ROOT], list[tuple[int, str]]()
        for start in range(0, len(tokens), GRAIN):
            for name in listed.get(digests[-1], ()):
                end = start + int(name.split("-")[1])
                fits = beyond < end < len(tokens)
                if fits and name == _cut_name(digests[-1], wanted[start:end]):
                    candidates.append((end, name))
            if start + GRAIN > len(tokens):
                break
            digests.append(_digest(digests[-1], wanted[start : start + GRAIN]))
            if start // GRAIN >= len(blocks) and not self._rows(digests[-1]).exists():
                break
        for end, name in sorted(candidates, reverse=True):
            cut = self._read_cut(self.folder / name, wanted[:end])
            known = list(blocks[: end // GRAIN])
            while cut is not None and len(known) < end // GRAIN:
                at = len(known) * GRAIN
                block = self._read_rows(digests[len(known) + 1], wanted[at : at + GRAIN])
                if block is None:
                    break
                known.append(block)
            else:
                if cut is not None:
                    return Found(known, cut)
        return None

    def _listed(self) -> dict[str, list[str]]:
        with contextlib.suppress(OSError):
            changed = self.folder.stat().st_mtime_ns
            if changed != self._seen:
                self._cuts = {}
                for entry in os.scandir(self.folder):
                    if entry.name.endswith(".cut"):
                        self._cuts.setdefault(entry.name.split("-")[0], []).append(entry.name)
                self._seen = changed
        return self._cuts

    def _rows(self, digest: str) -> Path:
        return self.folder / f"{digest}.rows"

    def _read_rows(self, digest: str, tokens: array[int]) -> Block | None:
        tensors = self._read(self._rows(digest), tokens)
        if tensors is None:
            return None
        return _block(tensors["rows"], GRAIN)

    def _read_cut(self, path: Path, tokens: array[int]) -> Cut | None:
        end = len(tokens)
        tensors = self._read(path, tokens[end // GRAIN * GRAIN :])
        if tensors is None:
            return None
        layers: list[dict[str, Tensor]] = [{} for _ in range(int(tensors.pop("layers")))]
        partial = tensors.pop("partial", None)
        for key, tensor in tensors.items():
            layer, _, part = key.partition(".")
            if part:
                layers[int(layer)][part] = tensor
        return Cut(end, layers, None if partial is None else _block(partial, end % GRAIN))

    def _read(self, path: Path, tokens: array[int]) -> dict[str, Tensor] | None:
        """The tensors of a file that is whole, of this fingerprint and of these tokens."""
        try:
            data = path.read_bytes()
            if hashlib.blake2b(data[DIGEST:], digest_size=DIGEST).digest() != data[:DIGEST]:
                raise ValueError("it was changed or cut short")
            tensors = load(data[DIGEST:])
            if bytes(tensors.pop("mark").numpy()) != self._mark:
                raise ValueError("it is of another model")
            name = bytes(tensors.pop("name").numpy()).decode()
            if name != path.name or tensors.pop("tokens").tolist() != tokens.tolist():
                raise ValueError("it is of other tokens")
            os.utime(path)
            return tensors
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("%s is not used: %s", path.name, error)
            self.failures += 1
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    # ------------------------------------------------------------------ keeping

    def save(self, tokens: Sequence[int], blocks: Sequence[Block], cuts: Sequence[Cut]) -> None:
        """Write these cuts of a timeline, and the blocks before them, when there is time; ``flush``
        waits for it. Dropped when too much waits already."""
        if cuts:
            last = max(cut.position for cut in cuts)
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(
                    (array("i", tokens[:last]), list(blocks[: last // GRAIN]), list(cuts))
                )

    def flush(self) -> None:
        """Wait until all that was saved is written or has failed."""
        self._queue.join()

    def close(self) -> None:
        """Write what waits, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _save_all(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                self._save(*item)
            except Exception:  # a cache must not take anything down with it
                log.exception("a timeline was not written")
                self.failures += 1
            finally:
                self._queue.task_done()

    def _save(self, tokens: array[int], blocks: list[Block], cuts: list[Cut]) -> None:
        digests = [ROOT]
        for i, block in enumerate(blocks):
            part = tokens[i * GRAIN : (i + 1) * GRAIN]
            digests.append(_digest(digests[-1], part))
            self._put(self._rows(digests[-1]), part, {"rows": block.data})
        for cut in cuts:
            whole = cut.position // GRAIN
            part = tokens[whole * GRAIN : cut.position]
            tensors = {
                f"{i}.{name}": tensor.contiguous()
                for i, layer in enumerate(cut.layers) for name, tensor in layer.items()
            }
            tensors["layers"] = torch.tensor(len(cut.layers))
            if cut.partial is not None:
                tensors["partial"] = cut.partial.data.clone()  # others may be writing behind it
            self._put(self.folder / _cut_name(digests[whole], part), part, tensors)
        if self._size > self.budget:
            self._trim()

    def _put(self, path: Path, tokens: array[int], tensors: dict[str, Tensor]) -> None:
        with contextlib.suppress(OSError):
            os.utime(path)  # used, and there already
            return
        tensors["mark"] = torch.frombuffer(bytearray(self._mark), dtype=torch.uint8)
        tensors["name"] = torch.frombuffer(bytearray(path.name.encode()), dtype=torch.uint8)
        tensors["tokens"] = torch.tensor(tokens, dtype=torch.int32)
        data = save(tensors)
        data = hashlib.blake2b(data, digest_size=DIGEST).digest() + data
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            self._write(beside, data)
            os.replace(beside, path)
            self._size += len(data)
        except OSError as error:  # a full disk, for one
            log.warning("%s is not written: %s", path.name, error)
            self.failures += 1
            with contextlib.suppress(OSError):
                beside.unlink()

    def _trim(self) -> None:
        """Count, delete what dead processes left and, while there is too much, what was used least
        recently. One process at a time."""
        with open(self.folder / "lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return  # another process is at it
            files = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if entry.name.endswith(".tmp") and not _lives(int(entry.name.split(".")[-2])):
                        os.unlink(entry.path)
                    elif entry.name.endswith((".rows", ".cut")):
                        stat = entry.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
            self._size = sum(size for _, size, _ in files)
            if self._size <= self.budget:
                return
            for _, size, path in sorted(files):
                if self._size <= 0.9 * self.budget:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                self._size -= size


def _digest(before: str, tokens: array[int]) -> str:
    return hashlib.blake2b(bytes.fromhex(before) + tokens.tobytes(), digest_size=DIGEST).hexdigest()


def _cut_name(whole: str, tail: array[int]) -> str:
    return f"{whole}-{len(tail)}-{_digest(whole, tail)[:16]}.cut"


def _block(data: Tensor, tokens: int) -> Block:
    block = Block(0)
    block.data, block.claimed = data.clone(), tokens
    return block


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
