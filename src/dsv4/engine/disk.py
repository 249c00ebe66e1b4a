"""The disk tier: what was computed survives the process, and is never trusted blindly.

Two kinds of files in a folder named by a fingerprint of everything the numbers depend on (weights,
numerics, format):

    .rows   the blocks of some successive 128 tokens of a timeline; a block is found by a digest of
            all tokens up to its end
    .cut    a cut, named by a digest of all tokens before it; .between where it is one of many

A file is written beside its place and renamed, so it is there as a whole or not at all. It begins
with a digest of its table of contents, which has the file's name, the fingerprint and a checksum of
each part; all are compared when it is read, and so are the tokens. So whatever happens to files,
the worst is a miss.

Several processes may share a folder. Files never change; who deletes takes a lock, and a file that
is gone is a miss like any other. Reading happens in the caller's thread; writing in one of its own,
which drops what comes faster than the disk takes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import queue
import re
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import kernels
from .kvstate import GRAIN, Block, Cut

log = logging.getLogger(__name__)
FORMAT = b"dsv4 attention state 2"
DIGEST = 16  # bytes
PENDING = 64 << 20  # bytes of cuts that may wait to be written
PACK = 4 << 20  # bytes of blocks in a file; read at once, they are freed when the last of them is
READERS = 2  # threads: one checks what it has read while another waits for the disk
AT_ONCE = 512  # buffers that are read or written by one call; systems take 1,024
COARSE = 50_000_000  # nanoseconds within which two changes of a folder may have one time
ROOT = bytes(DIGEST)
DTYPES = {str(t).removeprefix("torch."): t for t in (
    torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16
)}  # fmt: skip
CUT = re.compile(r"([0-9a-f]{32})-(\d{1,3})-[0-9a-f]{16}\.(?:cut|between)")
T = TypeVar("T")
Write = Callable[[Path, Sequence[memoryview]], object]


class Found(NamedTuple):
    """A timeline on disk: its whole blocks, and the cut at its end."""

    blocks: list[Block]
    cut: Cut


class _Part(NamedTuple):
    """A tensor in a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int
    offset: int


class _Place(NamedTuple):
    """Where a block is: part ``number`` of a file."""

    file: str
    number: int


class _Listing(NamedTuple):
    """What is in the folder: contents of files with rows, by name; where blocks are, by digest;
    cuts by the digest of their whole blocks: how many tokens after these, and names."""

    packs: dict[str, list[_Part]]
    blocks: dict[bytes, _Place]
    cuts: dict[bytes, list[tuple[int, str]]]

    def add(self, name: str, parts: list[_Part]) -> None:
        """A file with rows."""
        self.packs[name] = parts
        for i, part in enumerate(parts[1:], 1):
            self.blocks[bytes.fromhex(part.key)] = _Place(name, i)


class DiskTier:
    """Blocks and cuts in ``folder``, about ``budget`` bytes of them at most.

    ``fingerprint``: engines that have the same one compute the same bits. ``write(file, parts)``
    makes a file; injected so that tests can fill a disk.
    """

    def __init__(
        self, folder: Path, fingerprint: str, budget: int, *, write: Write | None = None
    ) -> None:
        self._mark = hashlib.sha256(FORMAT + fingerprint.encode()).hexdigest()
        self.folder = folder / self._mark[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.budget, self._write = budget, write or _write
        self.failures = 0  # files that could not be written, or were not what they should be
        self._listing = _Listing({}, {}, {})
        self._seen = -1  # when the folder was last changed, in nanoseconds
        self._missed = False  # a file that is listed was not there
        self._looking = threading.Lock()
        self._size = 0
        self._trim()
        self._listed()
        self._taken = self._done = 0  # bytes of cuts that went into the queue, and came out
        self._queue: queue.Queue[tuple[array[int], list[Block], list[Cut], set[int]] | None]
        self._queue = queue.Queue()
        self._thread = threading.Thread(target=self._save_all, name="dsv4-disk", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ finding

    def find(self, tokens: Sequence[int], beyond: int, blocks: Sequence[Any]) -> Found | None:
        """The longest beginning of ``tokens`` on disk that is longer than ``beyond`` and leaves a
        token to compute. ``blocks``: those that are known already of its first whole ones."""
        wanted, listing = array("i", tokens), self._listed()
        digests, candidates = [ROOT], list[tuple[int, str]]()
        for start, digest in zip(range(0, len(tokens) + 1, GRAIN), _digests(wanted), strict=False):
            if start > 0:
                digests.append(digest)
            if start // GRAIN > len(blocks) and digest not in listing.blocks:
                break
            for more, name in listing.cuts.get(digest, ()):
                end = start + more
                fits = beyond < end < len(tokens)
                if fits and name.startswith(_cut_name(digest, wanted[start:end])):
                    candidates.append((end, name))
        known, most = list(blocks), len(digests)
        for end, name in sorted(candidates, reverse=True):
            if end // GRAIN > most:
                continue
            cut = self._read_cut(name, wanted[:end])
            if cut is None:
                continue
            known += self._read_rows(listing, digests[: end // GRAIN + 1], wanted, len(known))
            if len(known) >= end // GRAIN:
                return Found(known[: end // GRAIN], cut)
            most = len(known)
        return None

    def _listed(self) -> _Listing:
        """What is in the folder now."""
        with self._looking, contextlib.suppress(OSError):
            changed = self.folder.stat().st_mtime_ns
            if changed != self._seen:
                before, now = self._listing, _Listing({}, {}, {})
                for name in os.listdir(self.folder):
                    if found := CUT.fullmatch(name):
                        whole = bytes.fromhex(found[1])
                        now.cuts.setdefault(whole, []).append((int(found[2]), name))
                    elif name.endswith(".rows"):
                        read = partial(self._contents, name=name)
                        parts = before.packs.get(name) or self._read(name, read)
                        if parts is not None:
                            now.add(name, parts)
                # the clock of files is coarse: what changed just now may change again unseen
                settled = time.time_ns() - changed > COARSE
                self._listing, self._seen = now, changed if settled else -1
                self._missed = False
        return self._listing

    def _read(self, name: str, how: Callable[[int], T]) -> T | None:
        """What ``how`` reads of an open file, which counts as used then; a file that is not what it
        should be is deleted."""
        path = self.folder / name
        try:
            with path.open("rb", buffering=0) as file:
                found = how(file.fileno())
            os.utime(path)
            return found
        except FileNotFoundError:
            self._missed = True
            return None
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is not used: %s", name, error)
            self.failures += 1
            self._missed = True
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _contents(self, file: int, name: str) -> list[_Part]:
        """A file's table of contents; ValueError if it is not what it should be."""
        start = os.pread(file, DIGEST + 8, 0)
        size, most = int.from_bytes(start[DIGEST:], "little"), os.fstat(file).st_size
        if size > most:
            raise ValueError("it was cut short")
        table = os.pread(file, size, len(start))
        if hashlib.blake2b(table, digest_size=DIGEST).digest() != start[:DIGEST]:
            raise ValueError("it was changed or cut short")
        contents = json.loads(table)
        if contents["mark"] != self._mark or contents["name"] != _stem(name):
            raise ValueError("it is of another model or of other tokens")
        parts = _located(contents["parts"], len(start) + size)
        end = parts[-1].offset + math.prod(parts[-1].shape) * parts[-1].dtype.itemsize
        if end != most:
            raise ValueError("it is too short or too long")
        return parts

    def _read_cut(self, name: str, tokens: array[int]) -> Cut | None:
        end = len(tokens)

        def read(file: int) -> Cut:
            contents = self._contents(file, name)
            tensors = {part.key: torch.empty(part.shape, dtype=part.dtype) for part in contents}
            _fill(file, contents, list(tensors.values()))
            if _bytes(tensors.pop("tokens")) != tokens[end // GRAIN * GRAIN :].tobytes():
                raise ValueError("it is of other tokens")
            layers: list[dict[str, Tensor]] = [{} for _ in range(int(tensors.pop("layers")))]
            rows = tensors.pop("partial", None)
            for key, tensor in tensors.items():
                layer, part = key.split(".")
                layers[int(layer)][part] = tensor
            return Cut(end, layers, None if rows is None else Block.of(rows, end % GRAIN))

        return self._read(name, read)

    def _read_rows(
        self, listing: _Listing, digests: Sequence[bytes], tokens: array[int], at: int
    ) -> list[Block]:
        """The blocks from number ``at`` on, which end at ``digests[at + 1], ...``, as far as they
        are there."""
        files, reads, start = list[str](), list[Callable[[int], list[Block]]](), at * GRAIN
        for run in _runs([listing.blocks.get(digest) for digest in digests[at + 1 :]]):
            file, part = run[0].file, tokens[start : start + len(run) * GRAIN]
            files.append(file)
            reads.append(partial(_read_run, pack=listing.packs[file], run=run, tokens=part))
            start += len(part)
        found = list[Block]()
        with ThreadPoolExecutor(READERS) as pool:
            for some in pool.map(self._read, files, reads):
                if some is None:
                    break
                found += some
        return found

    # ------------------------------------------------------------------ keeping

    def save(
        self, tokens: Sequence[int], blocks: Sequence[Block], cuts: Sequence[Cut],
        lasting: Collection[int] | None = None,
    ) -> None:  # fmt: skip
        """Write these cuts of a timeline, and the blocks before them, when there is time; ``flush``
        waits for it. Dropped when too much waits already. Cuts at positions that are not
        ``lasting`` (None: all are) may have half of the budget, and go first."""
        size = sum(cut.bytes for cut in cuts)
        waiting = self._taken - self._done
        if not cuts or (waiting and waiting + size > PENDING):
            return
        last = max(cut.position for cut in cuts)
        kept = {cut.position for cut in cuts} if lasting is None else set(lasting)
        self._taken += size
        whole = list(blocks[: last // GRAIN])
        self._queue.put((array("i", tokens[:last]), whole, list(cuts), kept))

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
                if item is not None:
                    self._done += sum(cut.bytes for cut in item[2])
                self._queue.task_done()

    def _save(
        self, tokens: array[int], blocks: list[Block], cuts: list[Cut], lasting: Collection[int]
    ) -> None:
        digests = [ROOT, *_digests(tokens)][1:]
        self._save_rows(tokens, blocks, digests)
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
            name = _cut_name(digests[whole], part)
            long, short = f"{name}.cut", f"{name}.between"
            if cut.position not in lasting and not (self.folder / long).exists():
                self._put(short, part, tensors)
                continue
            with contextlib.suppress(OSError):
                os.rename(self.folder / short, self.folder / long)
            self._put(long, part, tensors)
        if self._size > self.budget:
            self._trim()

    def _save_rows(
        self, tokens: array[int], blocks: Sequence[Block], digests: Sequence[bytes]
    ) -> None:
        """Write those blocks that are not there, several to a file."""
        listing, at = self._listed() if self._missed else self._listing, 0
        for file in {place.file for digest in digests[1:] if (place := listing.blocks.get(digest))}:
            with contextlib.suppress(OSError):
                os.utime(self.folder / file)
        while at < len(blocks):
            end, size = at, 0
            while end < len(blocks) and digests[end + 1] not in listing.blocks and size < PACK:
                size += blocks[end].data.nbytes
                end += 1
            if end > at:
                tensors = {digests[i + 1].hex(): blocks[i].data for i in range(at, end)}
                name = f"{digests[at + 1].hex()}-{end - at}-{digests[end].hex()}.rows"
                self._put(name, tokens[at * GRAIN : end * GRAIN], tensors)
            at = max(end, at + 1)

    def _put(self, name: str, tokens: array[int], tensors: dict[str, Tensor]) -> None:
        path = self.folder / name
        with contextlib.suppress(OSError):
            os.utime(path)  # used, and there already
            return
        tensors = {"tokens": _ids(tokens), **tensors}
        parts = [(key, str(t.dtype).removeprefix("torch."), tuple(t.shape), kernels.checksum(t))
                 for key, t in tensors.items()]
        table = json.dumps({"mark": self._mark, "name": _stem(name), "parts": parts}).encode()
        start = hashlib.blake2b(table, digest_size=DIGEST).digest()
        start += len(table).to_bytes(8, "little")
        data = [memoryview(start + table), *map(_bytes, tensors.values())]
        beside = path.with_name(f"{name}.{os.getpid()}.tmp")
        try:
            self._write(beside, data)
            os.replace(beside, path)
            self._size += sum(part.nbytes for part in data)
            if name.endswith(".rows"):
                self._listing.add(name, _located(parts, len(start) + len(table)))
        except OSError as error:  # a full disk, for one
            log.warning("%s is not written: %s", name, error)
            self.failures += 1
            with contextlib.suppress(OSError):
                beside.unlink()

    def _trim(self) -> None:
        """Count, delete what dead processes left and, while there is too much, what was used least
        recently: of cuts between others while these have more than half, then of all. One process
        at a time."""
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
                    elif entry.name.endswith((".rows", ".cut", ".between")):
                        stat = entry.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
            self._size = sum(size for _, size, _ in files)
            if self._size <= self.budget:
                return
            files.sort()
            between = [file for file in files if file[2].endswith(".between")]
            rest = sum(size for _, size, _ in between)
            self._missed = True
            for some, least in ((between, rest - self.budget // 2), (files, self._size)):
                for _, size, path in some:
                    if self._size <= 0.9 * self.budget or least <= 0:
                        break
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                        self._size -= size
                        least -= size


def _digests(tokens: array[int]) -> Iterator[bytes]:
    """ROOT, and digests of the first 128, 256, ... tokens."""
    digest = ROOT
    yield digest
    stored, grain = tokens.tobytes(), GRAIN * tokens.itemsize
    for at in range(grain, len(stored) + 1, grain):
        digest = hashlib.blake2b(digest + stored[at - grain : at], digest_size=DIGEST).digest()
        yield digest


def _cut_name(whole: bytes, tail: array[int]) -> str:
    digest = hashlib.blake2b(whole + tail.tobytes(), digest_size=DIGEST).hexdigest()
    return f"{whole.hex()}-{len(tail)}-{digest[:16]}"


def _stem(name: str) -> str:
    """A file's name but for its kind."""
    return name.rpartition(".")[0]


def _located(parts: Iterable[Sequence[Any]], offset: int) -> list[_Part]:
    """Parts as a table of contents has them, of which the first begins at ``offset``."""
    found = []
    for key, dtype, shape, checksum in parts:
        found.append(_Part(key, DTYPES[dtype], tuple(shape), checksum, offset))
        offset += math.prod(shape) * DTYPES[dtype].itemsize
    return found


def _runs(places: Sequence[_Place | None]) -> Iterator[list[_Place]]:
    """Places that lie one after the other in a file, up to the first that is None."""
    run = list[_Place]()
    for place in places:
        if run and place != (run[-1].file, run[-1].number + 1):
            yield run
            run = []
        if place is None:
            return
        run.append(place)
    if run:
        yield run


def _read_run(
    file: int, pack: Sequence[_Part], run: Sequence[_Place], tokens: array[int]
) -> list[Block]:
    """Neighbouring blocks of a file; ValueError if they are not those of ``tokens``."""
    first, last = run[0].number, run[-1].number
    named = torch.empty(pack[0].shape, dtype=torch.int32)
    _fill(file, pack[:1], [named])
    if _bytes(named[(first - 1) * GRAIN : last * GRAIN]) != tokens.tobytes():
        raise ValueError("it is of other tokens")
    rows = torch.empty(len(run), *pack[first].shape, dtype=torch.uint8).unbind()
    _fill(file, pack[first : last + 1], rows)
    return [Block.of(data, GRAIN) for data in rows]


def _ids(tokens: array[int]) -> Tensor:
    """Tokens as they are in memory."""
    if not tokens:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer(tokens, dtype=torch.int32)


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        tensor = tensor.reshape(-1).view(torch.uint8)
    return tensor.numpy().data


def _write(path: Path, parts: Sequence[memoryview]) -> None:
    """Make a file of ``parts``."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for some in _batches(parts):
            while some:
                some = _after(some, os.writev(file, some))
    finally:
        os.close(file)


def _fill(file: int, parts: Sequence[_Part], tensors: Sequence[Tensor]) -> None:
    """Fill ``tensors`` with neighbouring parts; ValueError if they are not what they were."""
    offset = parts[0].offset
    for some in _batches([_bytes(tensor) for tensor in tensors]):
        while some:
            n = os.preadv(file, some, offset)
            if n == 0:
                raise ValueError("it was cut short")
            some, offset = _after(some, n), offset + n
    for part, tensor in zip(parts, tensors, strict=True):
        if kernels.checksum(tensor) != part.checksum:
            raise ValueError("it was changed")


def _batches(parts: Sequence[memoryview]) -> Iterable[list[memoryview]]:
    for at in range(0, len(parts), AT_ONCE):
        yield [part for part in parts[at : at + AT_ONCE] if part.nbytes]


def _after(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``parts`` after so many bytes."""
    for i, part in enumerate(parts):
        if done < part.nbytes:
            return [part[done:], *parts[i + 1 :]]
        done -= part.nbytes
    return []


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
