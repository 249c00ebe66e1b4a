"""Checkpoints in the official format: reading, validating and writing them.

A checkpoint is a folder with ``config.json`` and either ``model.safetensors`` or
``model.safetensors.index.json`` and shards. What tensors it has is in ``formats``.

Nothing is trusted: names, shapes, dtypes, offsets and scales are checked against the config
before a tensor is handed out. Files are memory-mapped: a tensor costs the pages that are read.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from .config import V4Config
from .errors import CheckpointError, ConfigError
from .formats import (
    FORMATS,
    ITEM_BYTES,
    TORCH_DTYPES,
    TensorSpec,
    inventory,
    storage_format,
    with_format,
)
from .quant import E8M0

__all__ = [
    "FORMATS",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "Progress",
    "TensorSpec",
    "check_space",
    "inventory",
    "is_weights",
    "save_checkpoint",
    "storage_format",
    "with_format",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Progress = Callable[[int], None]  # called with the number of bytes just done

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_ONE_FILE = 4 * 10**9  # bytes; above this the published layout, one layer per file, is used
_CHECK_AT_OPEN = 2**30  # bytes of scales; above this they are checked when first taken
_STALE = 3600  # seconds without a write after which a staging folder belongs to a killed save


def _check_values(name: str, tensor: Tensor, config: V4Config) -> None:
    """Refuse scales that are not numbers and expert ids that no expert has."""
    if name.endswith(".scale"):
        if tensor.dtype == E8M0:
            bad = tensor.view(torch.uint8) == 255
        else:
            bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise CheckpointError(
                f"{name} holds scales that are not numbers",
                expected="finite block scales",
                got=f"{int(bad.sum())} NaN or infinite of {bad.numel()}",
                hint="the file is damaged, or the run that wrote it diverged",
            )
    elif name.endswith(".tid2eid"):
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= config.n_routed_experts:
            raise CheckpointError(
                f"{name} routes to experts that do not exist",
                expected=f"ids in 0..{config.n_routed_experts - 1}",
                got=f"ids in {low}..{high}",
            )


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Shard:
    path: Path
    identity: tuple[int, int, int]  # size, inode, time of change: what was validated
    header: bytes
    entries: dict[str, tuple[TensorSpec, int]]  # name -> spec, offset in the file
    mapped: mmap.mmap

    @property
    def size(self) -> int:
        return self.identity[0]

    def tensor(self, name: str) -> Tensor:
        spec, offset = self.entries[name]
        dtype = TORCH_DTYPES[spec.dtype]
        if offset % dtype.itemsize:  # legal in the format, but not for every CPU
            data = bytearray(self.mapped[offset : offset + spec.bytes])
            return torch.frombuffer(data, dtype=dtype).view(spec.shape)
        flat = torch.frombuffer(self.mapped, dtype=dtype, count=spec.elements, offset=offset)
        return flat.view(spec.shape)

    def reopen(self, flags: int = 0) -> BinaryIO:
        """The same file again; raises CheckpointError if another has taken its name.

        With ``flags`` of ``os.open`` it is not buffered."""
        f: BinaryIO = open(
            self.path, "rb", buffering=0 if flags else -1,
            opener=lambda path, mode: os.open(path, mode | flags),
        )  # fmt: skip
        if _identity(f) != self.identity:
            f.close()
            raise CheckpointError(
                f"{self.path} changed since it was opened",
                expected=f"the file of {self.size:,} bytes that was validated",
                got="another one under its name",
                hint="open the checkpoint again",
            )
        return f

    def remapped(self) -> _Shard:
        """A shard with a mapping of its own, so that its pages can be given back."""
        with self.reopen() as f:
            return replace(self, mapped=_map(f))


def _identity(f: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(f.fileno())
    return status.st_size, status.st_ino, status.st_mtime_ns


def _map(f: BinaryIO) -> mmap.mmap:
    """A private mapping without reserved swap: tensors are writable without touching the file
    (so torch does not warn), and a shard larger than memory can still be mapped."""
    flags = mmap.MAP_PRIVATE
    if sys.platform == "linux":
        flags |= getattr(mmap, "MAP_NORESERVE", 0x4000)  # in the module since Python 3.13
    return mmap.mmap(f.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise CheckpointError(f"duplicate entry {twice}", expected="every name once", got="twice")
    return out


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except CheckpointError as e:
        raise CheckpointError(f"{what}: {e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{what} cannot be read", expected="JSON", got=e, hint="download the file again"
        ) from e
    if not isinstance(data, dict):
        raise CheckpointError(what, expected="a JSON object", got=type(data).__name__)
    return data


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_shard(path: Path) -> _Shard:
    """Read and check the header of one safetensors file; the data is not touched."""
    again = "the file is damaged or half downloaded: fetch it again"
    try:
        with path.open("rb") as f:
            identity = _identity(f)
            size = identity[0]
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path.name} is not a safetensors file, or is truncated",
                    expected=f"a header of {length:,} bytes" if size >= 8 else "8 bytes or more",
                    got=f"a file of {size:,} bytes",
                    hint=again,
                )
            header = f.read(length)
            mapped = _map(f)
    except OSError as e:
        raise CheckpointError(
            f"cannot read {path}", expected="a safetensors file", got=e, hint="check the path"
        ) from e
    start = 8 + length
    data = _parse_json(header, f"the header of {path.name}")
    data.pop("__metadata__", None)
    entries: dict[str, tuple[TensorSpec, int]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in data.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (
            isinstance(shape, list)
            and all(map(_natural, shape))
            and isinstance(span, list)
            and len(span) == 2
            and all(map(_natural, span))
        ):
            raise CheckpointError(
                f"{path.name}: the header entry of {name} is malformed",
                expected='{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}',
                got=str(entry)[:200],
                hint=again,
            )
        if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(
                f"{path.name}: {name} has an unknown dtype",
                expected=", ".join(TORCH_DTYPES),
                got=str(entry.get("dtype"))[:80],
            )
        spec = TensorSpec(entry["dtype"], tuple(shape))
        begin, end = span
        if end - begin != spec.bytes:
            raise CheckpointError(
                f"{path.name}: {name} does not fill its place in the file",
                expected=f"{spec.bytes:,} bytes for {spec}",
                got=f"data_offsets {span}, {end - begin:,} bytes",
                hint=again,
            )
        entries[name] = (spec, start + begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"{path.name}: {name} {'overlaps' if begin < position else 'leaves a hole after'}"
                " the tensor before it",
                expected=f"data_offsets that begin at {position:,}",
                got=f"{begin:,}",
                hint=again,
            )
        position = end
    if start + position != size:
        last = max(spans)[2] if spans else "its header"
        problem = "is truncated" if size < start + position else "has bytes after the last tensor"
        raise CheckpointError(
            f"{path.name} {problem} ({last})",
            expected=f"{start + position:,} bytes",
            got=f"{size:,} bytes",
            hint=again,
        )
    return _Shard(path, identity, header, entries, mapped)


def _read_shards(folder: Path) -> list[_Shard]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds two checkpoints",
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            got="both",
            hint="remove the one that is not meant",
        )
    if single.is_file():
        return [_read_shard(single)]
    if not index.is_file():
        found = sorted(p.name for p in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"{folder} holds no weights",
            expected=f"{SINGLE_FILE}, or {INDEX_FILE} and its shards",
            got=", ".join(found[:3]) or "neither",
            hint="dsv4 pull fetches a whole checkpoint",
        )
    where = _parse_json(index.read_bytes(), INDEX_FILE).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(
            f"{INDEX_FILE} has no weight_map",
            expected='{"weight_map": {tensor: file}}',
            got=type(where).__name__,
        )
    shards: dict[str, _Shard] = {}
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{INDEX_FILE}: {name} is in no file of this folder",
                expected="a plain file name",
                got=repr(file)[:200],
            )
        if file not in shards:
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"{INDEX_FILE} names a file that is missing (for {name})",
                    expected=folder / file,
                    got="no such file",
                    hint="fetch the missing shard; dsv4 pull resumes",
                )
            shards[file] = _read_shard(folder / file)
        if name not in shards[file].entries:
            raise CheckpointError(
                f"{name} is not in the shard that {INDEX_FILE} names",
                expected=f"{name} in {file}",
                got="absent from its header",
            )
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.entries:
            if name in seen:
                raise CheckpointError(
                    f"duplicate tensor {name}", expected="one file", got=f"{seen[name]} and {file}"
                )
            if name not in where:
                raise CheckpointError(
                    f"{name} is in {file} but not in {INDEX_FILE}",
                    expected="every tensor in the index",
                    got="an extra tensor",
                )
            seen[name] = file
    return [shards[file] for file in sorted(shards)]


def _stored_format(specs: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """The format that the first expert's dtypes show, and that expert's name."""
    for name, spec in specs.items():
        if ".ffn.experts." in name and name.endswith(".weight"):
            scale = specs.get(name.removesuffix("weight") + "scale")
            fp8 = "base" if scale and scale.dtype == "F32" else "fp8"
            fmt = {"I8": "instruct", "F8_E4M3": fp8, "BF16": "bf16"}.get(spec.dtype)
            return (fmt, name) if fmt else None
    return None


def _compare(expected: Mapping[str, TensorSpec], got: Mapping[str, TensorSpec], fmt: str) -> None:
    def listed(names: list[str]) -> str:
        more = f" (and {len(names) - 3:,} more)" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more

    hint = "config.json and the tensors must belong together: dsv4 inspect shows what it implies"
    stored = _stored_format(got)
    if stored and stored[0] != fmt and stored[1] in expected:
        name = stored[1]
        raise CheckpointError(
            f"config.json describes the {fmt} format, the tensors are {stored[0]}: {name}",
            expected=expected[name],
            got=got[name],
            hint="correct expert_dtype and quantization_config in config.json",
        )
    if missing := [n for n in expected if n not in got]:
        raise CheckpointError(
            f"missing tensors: {listed(missing)}",
            expected=f"{missing[0]} {expected[missing[0]]}",
            got=f"absent; {len(got):,} of {len(expected):,} tensors are there",
            hint=hint,
        )
    if extra := [n for n in got if n not in expected]:
        raise CheckpointError(
            f"tensors that this config does not have: {listed(extra)}",
            expected=f"{len(expected):,} tensors",
            got=f"{len(got):,}, with {extra[0]} {got[extra[0]]}",
            hint=hint,
        )
    for name, spec in expected.items():
        if got[name] != spec:
            what = "shape" if got[name].dtype == spec.dtype else "dtype"
            raise CheckpointError(
                f"{name} has a wrong {what}", expected=spec, got=got[name], hint=hint
            )


class Checkpoint:
    """An opened checkpoint folder. Make one with ``Checkpoint.open``.

    ``config`` is the V4Config, ``specs`` maps every tensor name to its TensorSpec. Tensors are
    views of the mapped files: as long as one lives, its file stays mapped.
    """

    def __init__(self, path: Path, config: V4Config, shards: list[_Shard]) -> None:
        self.path, self.config = path, config
        self._shards = shards
        self._where = {name: shard for shard in shards for name in shard.entries}
        self.specs = {
            name: self._where[name].entries[name][0]
            for name in inventory(config)
            if name in self._where
        }
        self._checked = False

    @classmethod
    def open(cls, path: str | Path, *, check_values: bool | None = None) -> Checkpoint:
        """Open and validate a folder; reads headers, scales and hash-routing tables only.

        ``check_values`` None checks scales and tables now when they are under 1 GiB, else each
        when it is first taken; True and False force now and later. Raises CheckpointError that
        names the tensor, what the config expects and what the file has.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(
                f"no checkpoint at {folder}",
                expected="a folder with config.json and safetensors files",
                got="a file" if folder.exists() else "nothing",
                hint="give the folder, or fetch one: dsv4 pull deepseek-ai/DeepSeek-V4-Flash",
            )
        try:
            config = V4Config.from_json(folder)
            fmt = storage_format(config)
            inventory(config)
        except ConfigError as e:
            raise CheckpointError(
                f"{folder}: {str(e).splitlines()[0]}", expected=e.expected, got=e.got, hint=e.hint
            ) from e
        shards = _read_shards(folder)
        got = {name: spec for s in shards for name, (spec, _) in s.entries.items()}
        stored = _stored_format(got)
        if fmt == "fp8" and stored and stored[0] == "base":
            # Base files differ from FP8-only ones by their F32 scales; the published Base configs
            # may still say scale_fmt ue8m0, so here the tensors decide.
            config, fmt = with_format(config, "base"), "base"
        _compare(inventory(config), got, fmt)
        self = cls(folder, config, shards)
        small = sum(s.bytes for n, s in self.specs.items() if n.endswith(".scale"))
        if check_values or (check_values is None and small <= _CHECK_AT_OPEN):
            self.check_values()
        return self

    def names(self) -> list[str]:
        """All tensor names in reading order: embed, layers, head, mtp."""
        return list(self.specs)

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors, headers not counted."""
        return sum(spec.bytes for spec in self.specs.values())

    def tensor(self, name: str) -> Tensor:
        """The stored tensor, memory-mapped: no copy, and writing to it leaves the file alone."""
        shard = self._where.get(name)
        if shard is None:
            raise CheckpointError(
                f"no tensor {name}",
                expected="a name of Checkpoint.names()",
                got=name,
            )
        tensor = shard.tensor(name)
        if not self._checked:
            _check_values(name, tensor, self.config)
        return tensor

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and where in it the tensor begins."""
        shard = self._where[name]
        return shard.path, shard.entries[name][1]

    def reopen(self, name: str, flags: int = 0) -> BinaryIO:
        """The file of a tensor, to be read without the mapping; ``flags`` of ``os.open`` make it
        unbuffered. Raises CheckpointError when it is no longer the file that was validated."""
        return self._where[name].reopen(flags)

    def check(self, name: str, tensor: Tensor) -> None:
        """Refuse a tensor read with ``reopen`` whose values cannot be, as ``tensor`` does."""
        if not self._checked:
            _check_values(name, tensor, self.config)

    def remapped(self) -> Checkpoint:
        """The same files, mapped once more, so that ``release`` takes no page from anyone else."""
        return Checkpoint(self.path, self.config, [shard.remapped() for shard in self._shards])

    def release(self) -> None:
        """Give back the memory of all pages read so far; what was written to a tensor is lost."""
        for shard in self._shards:
            shard.mapped.madvise(mmap.MADV_DONTNEED)

    def check_values(self, progress: Progress | None = None) -> None:
        """Refuse NaN scales and impossible expert ids, one tensor at a time."""
        for shard in self._shards:
            private = shard.remapped()  # unmapped when done, so the pages go too
            for name, (spec, _) in shard.entries.items():
                if name.endswith((".scale", ".tid2eid")):
                    _check_values(name, private.tensor(name), self.config)
                    if progress:
                        progress(spec.bytes)
        self._checked = True

    def fingerprint(self) -> str:
        """64 hex digits that change with the config, the layout and (almost surely) the weights.

        Hashes config, headers, and of every file all bytes up to 64 MiB or else 256 pages spread
        evenly, so it costs a moment even for 865 GB. It identifies; it does not prove integrity.
        """
        page, whole = 4096, 64 * 2**20
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for shard in self._shards:
            digest.update(shard.header)
            with shard.reopen() as f:
                if shard.size <= whole:
                    digest.update(f.read())
                else:
                    for i in range(256):
                        f.seek((shard.size - page) * i // 255)
                        digest.update(f.read(page))
        return digest.hexdigest()

    def side_files(self) -> dict[str, Path]:
        """What else is in the folder (tokenizer, encoding, licence), hidden files left out."""
        return {
            p.name: p
            for p in sorted(self.path.iterdir())
            if not p.name.startswith(".") and not is_weights(p.name) and p.name != "config.json"
        }

    def save(
        self,
        path: str | Path,
        changed: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write this checkpoint to ``path``, byte for byte: headers, shards, config, side files.

        ``changed`` tensors (same dtype and shape) replace the stored ones in place. Atomic, like
        ``save_checkpoint``. Raises CheckpointError for a tensor that does not fit.
        """
        changed = changed or {}
        for name, tensor in changed.items():
            if name not in self.specs:
                raise CheckpointError(f"no tensor {name}", expected="a stored name", got=name)
            _check_fits(name, tensor, self.specs[name], self.config)
        with _staged(Path(path), sum(s.size for s in self._shards)) as folder:
            for shard in self._shards:
                with shard.reopen() as old, (folder / shard.path.name).open("wb") as new:
                    shutil.copyfileobj(old, new, 2**22)
                if progress:
                    progress(shard.size)
            for name, tensor in changed.items():
                shard = self._where[name]
                _write_at(folder / shard.path.name, shard.entries[name][1], tensor)
            if (index := self.path / INDEX_FILE).is_file():
                shutil.copyfile(index, folder / INDEX_FILE)
            shutil.copyfile(self.path / "config.json", folder / "config.json")
            _copy_files(self.side_files(), folder)


# ------------------------------------------------------------------ writing


def save_checkpoint(
    path: str | Path,
    config: V4Config,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint folder; all of it appears at ``path``, or nothing changes there.

    ``tensors`` must hold exactly ``inventory(config)``, in any order; a generator is consumed one
    tensor at a time. The bytes depend on the values alone (and equal those of the safetensors
    library). Without ``max_shard_bytes`` up to 4 GB make one file, more make one file per layer
    as published. ``extra_files`` maps a file name to its content or to a file or folder to copy.
    An existing checkpoint at ``path`` is replaced; its side files (tokenizer, ...) stay.
    Raises CheckpointError for a missing, unknown or misfit tensor, a NaN scale, a full disk.
    """
    specs = inventory(config)
    plan = _plan_shards(specs, max_shard_bytes)
    total = sum(spec.bytes for spec in specs.values())
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    with _staged(Path(path), total) as folder:
        where: dict[str, tuple[Path, int]] = {}
        for i, names in enumerate(plan):
            file = SINGLE_FILE
            if len(plan) > 1:
                file = f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors"
            header, offsets, size = _layout({n: specs[n] for n in names}, metadata)
            with (folder / file).open("wb") as f:
                f.write(header)
                f.truncate(size)
            where.update((n, (folder / file, offset)) for n, offset in offsets.items())
        left = set(specs)
        for name, tensor in items:
            if name not in left:
                raise CheckpointError(
                    f"cannot save {name}",
                    expected="each tensor of inventory(config) once",
                    got="it twice" if name in specs else "a name that this config does not have",
                )
            _check_fits(name, tensor, specs[name], config)
            _write_at(*where[name], tensor)
            left.discard(name)
            if progress:
                progress(specs[name].bytes)
        if left:
            first = next(n for n in specs if n in left)
            raise CheckpointError(
                f"cannot save: {len(left):,} tensors were not given",
                expected=f"{first} {specs[first]}",
                got="absent",
            )
        if len(plan) > 1:
            files = {name: file.name for name, (file, _) in sorted(where.items())}
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config.to_json(folder / "config.json")
        _copy_files(extra_files or {}, folder)


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _plan_shards(specs: Mapping[str, TensorSpec], limit: int | None) -> list[list[str]]:
    if limit is not None and limit <= 0:
        raise CheckpointError("max_shard_bytes", expected="a positive number", got=limit)
    total = sum(spec.bytes for spec in specs.values())
    if total <= (limit or _ONE_FILE):
        return [list(specs)]
    shards: list[list[str]] = []
    part, size = "", 0
    for name, spec in specs.items():
        dots = name.split(".")
        layer = ".".join(dots[:2]) if dots[0] in ("layers", "mtp") else "end"
        layer = "start" if dots[0] == "embed" else layer
        if not shards or (size + spec.bytes > limit if limit else layer != part):
            shards.append([])
            size = 0
        shards[-1].append(name)
        part, size = layer, size + spec.bytes
    return shards


def _layout(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """Length field and header, the offset of every tensor, and the size of the file."""
    rank = {dtype: i for i, dtype in enumerate(TORCH_DTYPES)}
    meta = {"format": "pt"} if metadata is None else dict(sorted(metadata.items()))
    header: dict[str, Any] = {"__metadata__": meta} if meta else {}
    begin, offsets = 0, {}
    for name in sorted(specs, key=lambda n: (rank[specs[n].dtype], n)):
        spec = specs[name]
        end = begin + spec.bytes
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        offsets[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    absolute = {name: start + offset for name, offset in offsets.items()}
    return len(text).to_bytes(8, "little") + text, absolute, start + begin


def _check_fits(name: str, tensor: Tensor, spec: TensorSpec, config: V4Config) -> None:
    got = TensorSpec(_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
    if got != spec:
        raise CheckpointError(f"{name} does not fit the config", expected=spec, got=got)
    _check_values(name, tensor, config)


def _write_at(file: Path, offset: int, tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    with file.open("r+b") as f:
        f.seek(offset)
        f.write(data.data)


def _copy_files(files: Mapping[str, bytes | Path], folder: Path) -> None:
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
        elif source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


@contextmanager
def _staged(path: Path, size: int) -> Iterator[Path]:
    """A hidden folder beside ``path`` that takes its place if the block ends well."""
    path = path.resolve()
    old = sorted(path.iterdir()) if path.is_dir() else []
    if (path.exists() and not path.is_dir()) or (
        old and not any(p.name == "config.json" or is_weights(p.name) for p in old)
    ):
        raise CheckpointError(
            f"will not write over {path}",
            expected="a new name, an empty folder or a checkpoint to replace",
            got="a folder of other files" if old else "a file",
            hint="choose another folder",
        )
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path.parent, size)
        staging = Path(tempfile.mkdtemp(".partial", f".{path.name}.", path.parent))
        os.umask(mask := os.umask(0o022))
        staging.chmod(0o777 & ~mask)
        yield staging
        for item in old:
            if item.name != "config.json" and not is_weights(item.name):
                if not (staging / item.name).exists():
                    _copy_files({item.name: item}, staging)
        for root, _, files in os.walk(staging):
            for name in [*files, "."]:
                descriptor = os.open(Path(root) / name, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        _publish(staging, path)
        _sweep(path)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CheckpointError(
            f"cannot write {path}",
            expected=f"a writable disk with {size / 1e9:.2f} GB free",
            got=e,
            hint="free some space" if full else "check the folder and its permissions",
        ) from e
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove the hidden folders that saves to ``path`` left when they were killed long ago."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]+\.partial")
    for folder in path.parent.iterdir():
        if ours.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            try:
                written = max(p.stat().st_mtime for p in (folder, *folder.rglob("*")))
                if time.time() - written > _STALE:
                    shutil.rmtree(folder)
            except OSError:
                pass  # another process got there first, or it is not ours to remove


def check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"not enough space on the disk of {folder}",
            expected=f"{size / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            hint="choose another disk, or fewer layers or experts",
        )


def _publish(new: Path, path: Path) -> None:
    """Put ``new`` at ``path`` in one step; what was there ends up at ``new``."""
    if not path.exists() or not any(path.iterdir()):
        os.rename(new, path)
    elif not _exchange(new, path):  # two steps where the system cannot swap names
        aside = new.with_suffix(".old")
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    swap = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            return cast(int, libc.renamex_np(os.fsencode(a), os.fsencode(b), swap)) == 0
        here = -100  # AT_FDCWD
        return cast(int, libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), swap)) == 0
    except AttributeError:
        return False
