"""Checkpoints in the official format: what they hold, reading, writing, converting, fetching.

All knowledge of names, shapes, dtypes and file layout is here. A checkpoint is a folder with
``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` and shards.
Four storage formats share the tensor names:

    instruct   FP4 experts, FP8 dense, E8M0 scales     (DeepSeek-V4-Flash, -Pro; v4-nano)
    fp8        FP8 experts, FP8 dense, E8M0 scales
    base       the same with F32 scales, and an embedding and head of its own in the MTP block
    bf16       no quantisation, no scales

Nothing is trusted: names, shapes, dtypes, offsets and scales are checked against the config
before a tensor is handed out. Files are memory-mapped: a tensor costs the pages that are read.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import hashlib
import json
import math
import mmap
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .config import FP4_BLOCK, FP8_BLOCK, RopeScaling, V4Config
from .errors import CheckpointError, ConfigError, DSV4Error
from .quant import E4M3, E8M0, FP4_VALUES, dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8

FORMATS = ("instruct", "fp8", "base", "bf16")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Progress = Callable[[int], None]  # called with the number of bytes just done

# In the order in which safetensors lays tensors out in a file (then by name).
_TORCH = {
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_TENSORS = 10_000_000  # V4-Pro has 145,116
_ONE_FILE = 4 * 10**9  # bytes; above this the published layout, one layer per file, is used
_CHECK_AT_OPEN = 2**30  # bytes of scales; above this they are checked when first taken
_RELEASE_EVERY = 2**28  # bytes converted before the pages read for them are given back
_MTP_COPIES = {
    "mtp.0.emb.tok_emb.weight": "embed.weight",
    "mtp.0.head.weight": "head.weight",
}


class TensorSpec(NamedTuple):
    """What a file stores under one name: the safetensors dtype and the stored shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * _ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


# ------------------------------------------------------------------ what a config implies


def storage_format(config: V4Config) -> str:
    """Which of FORMATS ``config`` describes; raises ConfigError when it describes none."""
    quantized = config.quantization_config
    if config.expert_dtype == "bf16" and quantized is None:
        return "bf16"
    if (
        config.expert_dtype == "bf16"
        or not isinstance(quantized, Mapping)
        or quantized.get("quant_method", "fp8") != "fp8"
    ):
        raise ConfigError(
            "expert_dtype and quantization_config contradict each other",
            expected="fp4 or fp8 experts with quant_method fp8, or bf16 with no quantization",
            got=f"expert_dtype {config.expert_dtype}, quantization_config {quantized}",
        )
    block = quantized.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    if block not in ([FP8_BLOCK, FP8_BLOCK], (FP8_BLOCK, FP8_BLOCK)):
        raise ConfigError(
            "weight_block_size", expected=[FP8_BLOCK, FP8_BLOCK], got=block, hint="V4 has no other"
        )
    if config.expert_dtype == "fp4":
        return "instruct"
    return "base" if config.is_base else "fp8"


def with_format(config: V4Config, to: str) -> V4Config:
    """The same model stored in another of FORMATS."""
    if to not in FORMATS:
        raise ConfigError("no such storage format", expected=", ".join(FORMATS), got=to)
    if to == "bf16":
        return replace(config, expert_dtype="bf16", quantization_config=None)
    quantization = dict(config.quantization_config or V4Config().quantization_config or {})
    quantization["scale_fmt"] = "ue8m0"
    if to == "base":
        del quantization["scale_fmt"]
    expert_dtype = "fp4" if to == "instruct" else "fp8"
    return replace(config, expert_dtype=expert_dtype, quantization_config=quantization)


def inventory(config: V4Config) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this config, in reading order, from the config alone.

    Shapes are the stored ones: an FP4 matrix ``[N, K]`` is I8 ``[N, K / 2]`` with scales
    ``[N, K / 32]``, an FP8 one has scales ``[ceil(N / 128), ceil(K / 128)]``.
    Raises ConfigError for a storage format V4 does not have.
    """
    fmt = storage_format(config)
    c, d, heads, hc = config, config.hidden_size, config.num_attention_heads, config.hc_mult
    rows = (2 + hc) * hc
    blocks = c.num_hidden_layers + c.mtp_layers
    if blocks * (6 * c.n_routed_experts + 60) > _MAX_TENSORS:
        raise ConfigError(
            "the config asks for more tensors than any V4 checkpoint has",
            expected=f"at most {_MAX_TENSORS:,}",
            got=f"{blocks} layers of {c.n_routed_experts} experts",
        )
    fp4 = fmt == "instruct"
    if fp4 and (d % FP4_BLOCK or c.moe_intermediate_size % FP4_BLOCK):
        raise ConfigError(
            "FP4 experts need sizes that are multiples of 32",
            expected="hidden_size % 32 == 0 and moe_intermediate_size % 32 == 0",
            got=f"{d} and {c.moe_intermediate_size}",
        )
    out: dict[str, TensorSpec] = {}

    def add(name: str, dtype: str, *shape: int) -> None:
        out[name] = TensorSpec(dtype, shape)

    def linear(name: str, n: int, k: int, fp4: bool = False) -> None:
        if fmt == "bf16":
            add(f"{name}.weight", "BF16", n, k)
        elif fp4:
            add(f"{name}.weight", "I8", n, k // 2)
            add(f"{name}.scale", "F8_E8M0", n, k // FP4_BLOCK)
        else:
            add(f"{name}.weight", "F8_E4M3", n, k)
            scale = "F32" if fmt == "base" else "F8_E8M0"
            add(f"{name}.scale", scale, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK))

    def mlp(name: str, width: int, fp4: bool = False) -> None:
        linear(f"{name}.w1", width, d, fp4)
        linear(f"{name}.w2", d, width, fp4)
        linear(f"{name}.w3", width, d, fp4)

    def compressor(name: str, ratio: int, dim: int) -> None:
        width = dim * (2 if ratio == 4 else 1)
        add(f"{name}.ape", "F32", ratio, width)
        add(f"{name}.wkv.weight", "BF16", width, d)
        add(f"{name}.wgate.weight", "BF16", width, d)
        add(f"{name}.norm.weight", "BF16", dim)

    def hc_head(name: str) -> None:
        add(f"{name}hc_head_fn", "F32", hc, hc * d)
        add(f"{name}hc_head_base", "F32", hc)
        add(f"{name}hc_head_scale", "F32", 1)

    def block(name: str, ratio: int, hashed: bool) -> None:
        attn, ffn = f"{name}.attn", f"{name}.ffn"
        add(f"{name}.attn_norm.weight", "BF16", d)
        linear(f"{attn}.wq_a", c.q_lora_rank, d)
        add(f"{attn}.q_norm.weight", "BF16", c.q_lora_rank)
        linear(f"{attn}.wq_b", heads * c.head_dim, c.q_lora_rank)
        linear(f"{attn}.wkv", c.head_dim, d)
        add(f"{attn}.kv_norm.weight", "BF16", c.head_dim)
        add(f"{attn}.attn_sink", "F32", heads)
        linear(f"{attn}.wo_a", c.o_groups * c.o_lora_rank, heads * c.head_dim // c.o_groups)
        linear(f"{attn}.wo_b", d, c.o_groups * c.o_lora_rank)
        if ratio:
            compressor(f"{attn}.compressor", ratio, c.head_dim)
        if ratio == 4:
            linear(f"{attn}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            add(f"{attn}.indexer.weights_proj.weight", "BF16", c.index_n_heads, d)
            compressor(f"{attn}.indexer.compressor", ratio, c.index_head_dim)
        add(f"{name}.ffn_norm.weight", "BF16", d)
        add(f"{ffn}.gate.weight", "BF16", c.n_routed_experts, d)
        if hashed:
            add(f"{ffn}.gate.tid2eid", "I64", c.vocab_size, c.num_experts_per_tok)
        else:
            add(f"{ffn}.gate.bias", "F32", c.n_routed_experts)
        for expert in range(c.n_routed_experts):
            mlp(f"{ffn}.experts.{expert}", c.moe_intermediate_size, fp4)
        mlp(f"{ffn}.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
        for site in ("attn", "ffn"):
            add(f"{name}.hc_{site}_fn", "F32", rows, hc * d)
            add(f"{name}.hc_{site}_base", "F32", rows)
            add(f"{name}.hc_{site}_scale", "F32", 3)

    add("embed.weight", "BF16", c.vocab_size, d)
    for i in range(c.num_hidden_layers):
        block(f"layers.{i}", c.compress_ratios[i], i < c.num_hash_layers)
    hc_head("")
    add("norm.weight", "BF16", d)
    add("head.weight", "BF16", c.vocab_size, d)
    for i in range(c.mtp_layers):
        mtp = f"mtp.{i}"
        if fmt == "base":
            add(f"{mtp}.emb.tok_emb.weight", "BF16", c.vocab_size, d)
        add(f"{mtp}.enorm.weight", "BF16", d)
        add(f"{mtp}.hnorm.weight", "BF16", d)
        linear(f"{mtp}.e_proj", d, d)
        linear(f"{mtp}.h_proj", d, d)
        block(mtp, 0, False)
        hc_head(f"{mtp}.")
        add(f"{mtp}.norm.weight", "BF16", d)
        if fmt == "base":
            add(f"{mtp}.head.weight", "BF16", c.vocab_size, d)
    return out


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
        dtype = _TORCH[spec.dtype]
        if offset % dtype.itemsize:  # legal in the format, but not for every CPU
            data = bytearray(self.mapped[offset : offset + spec.bytes])
            return torch.frombuffer(data, dtype=dtype).view(spec.shape)
        flat = torch.frombuffer(self.mapped, dtype=dtype, count=spec.elements, offset=offset)
        return flat.view(spec.shape)

    def reopen(self) -> BinaryIO:
        """The same file again; raises CheckpointError if another has taken its name."""
        f = self.path.open("rb")
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
        if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _ITEM_BYTES:
            raise CheckpointError(
                f"{path.name}: {name} has an unknown dtype",
                expected=", ".join(_TORCH),
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
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as e:
            raise CheckpointError(
                f"{folder}: config.json holds a value of a wrong kind",
                expected="values like those of a published config.json",
                got=f"{type(e).__name__}: {e}",
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
            if not p.name.startswith(".") and not _is_weights(p.name) and p.name != "config.json"
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


def _is_weights(name: str) -> bool:
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
    rank = {dtype: i for i, dtype in enumerate(_TORCH)}
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
        old and not any(p.name == "config.json" or _is_weights(p.name) for p in old)
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
        _check_space(path.parent, size)
        staging = Path(tempfile.mkdtemp(".partial", f".{path.name}.", path.parent))
        os.umask(mask := os.umask(0o022))
        staging.chmod(0o777 & ~mask)
        yield staging
        for item in old:
            if item.name != "config.json" and not _is_weights(item.name):
                if not (staging / item.name).exists():
                    _copy_files({item.name: item}, staging)
        for root, _, files in os.walk(staging):
            for name in [*files, "."]:
                descriptor = os.open(Path(root) / name, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        _publish(staging, path)
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


def _check_space(folder: Path, size: int) -> None:
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


# ------------------------------------------------------------------ converting


def convert(
    source: str | Path | Checkpoint,
    target: str | Path,
    to: str,
    *,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``source`` at ``target`` in another of FORMATS, one matrix in memory at a time.

    From instruct, fp8 and base to fp8, base and bf16 every value stays the same (fp4_to_fp8
    raises CheckpointError if it cannot); to instruct, experts are rounded to FP4 where they were
    not FP4 before. Side files are copied. Base's own MTP embedding and head are dropped when they
    equal the trunk's, and refused otherwise.
    """
    opened = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    shards = [shard.remapped() for shard in opened._shards]  # ours to release
    checkpoint = Checkpoint(opened.path, opened.config, shards)
    config = with_format(checkpoint.config, to)
    save_checkpoint(
        target,
        config,
        _converted(checkpoint, config),
        max_shard_bytes=max_shard_bytes,
        extra_files=checkpoint.side_files(),
        progress=progress,
    )


def _converted(source: Checkpoint, config: V4Config) -> Iterator[tuple[str, Tensor]]:
    specs = inventory(config)
    for copy, original in _MTP_COPIES.items():
        if copy in source.specs and copy not in specs:
            if not torch.equal(source.tensor(copy), source.tensor(original)):
                raise CheckpointError(
                    f"{copy} differs from {original}",
                    expected="equal, as only Base files have room for both",
                    got="different values",
                    hint="keep the base format, or copy the trunk's over it",
                )
    read = 0
    for name, spec in specs.items():
        if name.endswith(".scale"):
            continue  # comes with its weight
        read += spec.bytes
        if read > _RELEASE_EVERY:
            read = 0
            for shard in source._shards:
                shard.mapped.madvise(mmap.MADV_DONTNEED)
        origin = name if name in source.specs else _MTP_COPIES[name]
        scale_name = name.removesuffix("weight") + "scale"
        weight = source.tensor(origin)
        scale = source.tensor(scale_name) if scale_name in source.specs else None
        if scale is None and scale_name not in specs:
            yield name, weight
            continue
        scale_dtype = _TORCH[specs[scale_name].dtype] if scale_name in specs else E8M0
        try:
            weight, scale = _recode(weight, scale, spec.dtype, scale_dtype)
        except DSV4Error as e:
            raise CheckpointError(f"{name}: {e}") from e
        yield name, weight
        if scale is not None:
            yield scale_name, scale


def _recode(
    weight: Tensor, scale: Tensor | None, dtype: str, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """One matrix from any stored form to another; exact wherever the target can hold it."""
    if dtype == "BF16":
        return dequantize(weight, scale, torch.bfloat16), None
    if scale is not None and weight.dtype == torch.int8 and dtype == "F8_E4M3":
        weight, scale = fp4_to_fp8(weight, scale)
    if scale is not None and weight.dtype == _TORCH[dtype]:
        converted = scale.to(scale_dtype)
        if torch.equal(converted.float(), scale.float()):
            return weight, converted
    values = dequantize(weight, scale)
    return quantize_fp4(values) if dtype == "I8" else quantize_fp8(values, scale_dtype)


# ------------------------------------------------------------------ synthetic checkpoints


def resize(config: V4Config, scale: float = 1.0, **changes: Any) -> V4Config:
    """Another shape of the same architecture, for tests and benchmarks.

    ``scale`` multiplies hidden size, expert width, ranks, experts, heads and output groups and
    rounds them to legal multiples. ``changes`` are config keys; what depends on them follows:
    fewer layers keep the first of the pattern and the MTP entry, experts per token and hash
    layers never exceed what there is, output groups divide the heads. Raises ConfigError.
    """

    def near(value: int, multiple: int) -> int:
        return max(multiple, round(value * scale / multiple) * multiple)

    known = {f.name for f in fields(V4Config)} - {"extra"}
    if unknown := sorted(set(changes) - known):
        raise ConfigError("no such config key", expected=", ".join(sorted(known)), got=unknown[0])
    if not scale > 0:
        raise ConfigError("scale", expected="a number above 0", got=scale)
    new = config.to_dict()
    if scale != 1:
        new["hidden_size"] = near(config.hidden_size, 256)
        for key in ("moe_intermediate_size", "q_lora_rank", "o_lora_rank"):
            new[key] = near(getattr(config, key), FP8_BLOCK)
        new["n_routed_experts"] = near(config.n_routed_experts, 8)
        new["o_groups"] = near(config.o_groups, 1)
        new["num_attention_heads"] = new["o_groups"] * config.num_attention_heads // config.o_groups
    if isinstance(changes.get("rope_scaling"), RopeScaling):
        changes["rope_scaling"] = vars(changes["rope_scaling"])
    new.update(changes)
    follows: dict[str, Any] = {}
    try:
        layers, heads = int(new["num_hidden_layers"]), int(new["num_attention_heads"])
        pattern = list(config.compress_ratios[: config.num_hidden_layers])
        while len(pattern) < min(layers, _MAX_TENSORS):
            pattern.append(pattern[-2] if len(pattern) > 1 else pattern[-1])
        mtp = [0] * int(new["num_nextn_predict_layers"])
        follows["compress_ratios"] = pattern[:layers] + mtp
        follows["num_hash_layers"] = min(config.num_hash_layers, layers)
        follows["o_groups"] = math.gcd(heads, int(new["o_groups"]))
        follows["num_experts_per_tok"] = min(
            config.num_experts_per_tok, int(new["n_routed_experts"])
        )
    except (TypeError, ValueError) as e:
        raise ConfigError("a size must be a whole number", got=e) from e
    new.update((key, value) for key, value in follows.items() if key not in changes)
    return V4Config.from_dict(new)


def synthesize(config: V4Config, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random, finite weights for ``config``, one tensor at a time, for ``save_checkpoint``.

    Matrices have a standard deviation near ``1 / sqrt(fan_in)``, norms are near 1, so activations
    and logits stay of order one at any shape. Each tensor depends on ``seed`` and its name alone
    (counter-based Philox), so a run is repeatable and the order does not matter.
    """
    specs = inventory(config)
    for name, spec in specs.items():
        if name.endswith(".scale"):
            continue  # comes with its weight
        scale_spec = specs.get(name.removesuffix("weight") + "scale")
        random = _random(seed, _MTP_COPIES.get(name, name))
        if scale_spec is not None and name.endswith(".weight"):
            fp4 = spec.dtype == "I8"
            table, rms = _fp4_table() if fp4 else _fp8_table()
            codes = _draw(random, spec.elements, np.uint8, table, _TORCH[spec.dtype])
            fan_in = spec.shape[1] * (2 if fp4 else 1)
            # exponents e and e - 1 in equal parts: root mean square 0.79 * 2^e
            exponent = round(math.log2(1 / (0.79 * rms * math.sqrt(fan_in))))
            bits = torch.from_numpy(_bytes(random, scale_spec.elements) & 1)
            scale = (127 + exponent - bits).to(torch.uint8).view(E8M0)
            yield name, codes.view(spec.shape)
            yield (
                name.removesuffix("weight") + "scale",
                scale.to(_TORCH[scale_spec.dtype]).view(scale_spec.shape),
            )
        elif spec.dtype == "I64":
            yield name, _distinct_ids(random, spec.shape, config.n_routed_experts)
        else:
            mean, std = _statistics(name, spec.shape)
            table = torch.from_numpy(_quantiles(65536)) * std + mean
            values = _draw(random, spec.elements, np.uint16, table, _TORCH[spec.dtype])
            yield name, values.view(spec.shape)


def _statistics(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of an unquantised tensor."""
    last = name.rsplit(".", 1)[-1]
    if "norm.weight" in name:
        return 1.0, 0.1
    if last.startswith("hc_") and last.endswith("_scale"):
        return 0.2, 0.03
    fixed = {"attn_sink": 0.1, "bias": 0.01, "ape": 0.3}
    if last in fixed or last.endswith("_base"):
        return 0.0, fixed.get(last, 0.5)
    if name in ("embed.weight", "mtp.0.emb.tok_emb.weight"):
        return 0.0, 1.0
    return 0.0, 1 / math.sqrt(shape[-1])


def _random(seed: int, name: str) -> np.random.Philox:
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little"))


def _bytes(random: np.random.Philox, count: int) -> npt.NDArray[np.uint8]:
    words = random.random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def _draw(
    random: np.random.Philox, count: int, index: type[Any], table: Tensor, dtype: torch.dtype
) -> Tensor:
    """``count`` entries of ``table`` (one per value of the unsigned ``index`` type) at random."""
    table = table.to(dtype)
    width = table.element_size()
    as_bytes = table.view(torch.uint8).numpy().reshape(-1, width)
    lookup = as_bytes.copy().view(f"u{width}").reshape(-1)
    out = np.empty(count, dtype=lookup.dtype)
    step = 2**23
    for begin in range(0, count, step):
        n = min(step, count - begin)
        picks = _bytes(random, n * np.dtype(index).itemsize).view(index)
        np.take(lookup, picks, out=out[begin : begin + n], mode="clip")  # in range; unbuffered
    return torch.from_numpy(out.view(np.uint8)).view(dtype)


def _distinct_ids(random: np.random.Philox, shape: tuple[int, ...], experts: int) -> Tensor:
    """``[rows, k]`` expert ids, distinct within a row and evenly used: start + j * step."""
    rows, k = shape
    steps = np.array([s for s in range(1, experts + 1) if math.gcd(s, experts) == 1])
    start = random.random_raw(rows) % experts
    step = steps[random.random_raw(rows) % len(steps)]
    ids = (start[:, None].astype(np.int64) + step[:, None] * np.arange(k)) % experts
    return torch.from_numpy(ids.astype(np.int64))


@functools.cache
def _quantiles(n: int) -> npt.NDArray[np.float32]:
    """``n`` equally likely values of the standard normal distribution, symmetric about 0."""
    normal = statistics.NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (i + 0.5) / n) for i in range(n // 2)])
    return np.concatenate((-upper[::-1], upper)).astype(np.float32)


@functools.cache
def _fp8_table() -> tuple[Tensor, float]:
    values = (torch.from_numpy(_quantiles(256)) * 128).to(E4M3)
    return values, float(values.float().square().mean().sqrt())


@functools.cache
def _fp4_table() -> tuple[Tensor, float]:
    """Every pair of 16 equally likely FP4 values as one byte, and their root mean square."""
    target = torch.from_numpy(_quantiles(16)) * (6 / 1.863)
    levels = torch.tensor(FP4_VALUES)
    code = (target.abs()[:, None] - levels).abs().argmin(1)
    nibble = code + 8 * (target < 0)
    pairs = (nibble[:, None] + 16 * nibble[None, :]).reshape(-1)
    return pairs.to(torch.uint8).view(torch.int8), float(levels[code].square().mean().sqrt())


# ------------------------------------------------------------------ fetching

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "encoding/*")


def pull(
    repo: str,
    to: str | Path | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Fetch a checkpoint from a Hugging Face hub into ``to`` (default: its name), and verify it.

    Config, tokenizer, encoding and safetensors files, never code. The config is read before any
    weight is fetched. A dropped connection continues where it broke; after a kill, finished files
    are kept. Every file is compared with the hub's size and SHA-256, a damaged one is deleted so
    that the next call fetches it again, and the checkpoint is opened and checked. ``progress``
    counts verified bytes. The environment variable HF_ENDPOINT names another hub, HF_TOKEN logs
    in. Raises CheckpointError when the repo, network, disk or content is not as it must be.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    folder = Path(to) if to is not None else Path(repo.rsplit("/", 1)[-1])
    what = f"{repo}{'@' + revision if revision else ''} at {api.endpoint}"
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {
            f.rfilename: f
            for f in info.siblings or []
            if any(fnmatch.fnmatchcase(f.rfilename, pattern) for pattern in _WANTED)
        }
        if "config.json" not in files or not any(_is_weights(name) for name in files):
            raise CheckpointError(
                f"{what} is not a checkpoint",
                expected="config.json and safetensors files",
                got=", ".join(list(files)[:5]) or "neither",
            )
        folder.mkdir(parents=True, exist_ok=True)
        missing = {n: f.size or 0 for n, f in files.items() if not (folder / n).is_file()}
        _check_space(folder, sum(missing.values()))
        api.hf_hub_download(repo, "config.json", revision=info.sha, local_dir=folder)
        V4Config.from_json(folder)
        api.snapshot_download(
            repo, revision=info.sha, local_dir=folder, allow_patterns=list(files), max_workers=4
        )
    except DSV4Error:
        raise
    except hub.GatedRepoError as e:
        raise CheckpointError(
            what, expected="access", got="a gated repo", hint="accept its terms and set HF_TOKEN"
        ) from e
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as e:
        missing_revision = isinstance(e, hub.RevisionNotFoundError)
        raise CheckpointError(
            f"{what} does not exist",
            expected="an existing revision" if missing_revision else "OWNER/NAME of a model repo",
            got=str(e).splitlines()[0],
            hint="check the spelling; private repos need HF_TOKEN",
        ) from e
    except Exception as e:  # the client raises whatever its HTTP library does
        full = isinstance(e, OSError) and e.errno == errno.ENOSPC
        hint = "free some space" if full else "check the network (HF_ENDPOINT, proxies), run again"
        raise CheckpointError(
            f"cannot fetch {what}",
            expected="a reachable hub and a writable disk",
            got=f"{type(e).__name__}: {e}",
            hint=hint,
        ) from e
    for name, remote in files.items():
        sha256 = remote.lfs.sha256 if remote.lfs else None
        _verify(folder / name, remote.size, sha256, remote.blob_id, progress)
    return Checkpoint.open(folder, check_values=True)


def _verify(
    file: Path,
    size: int | None,
    sha256: str | None,
    blob: str | None,
    progress: Progress | None,
) -> None:
    """Compare a file with the hub's metadata: SHA-256 for large files, the git id for others."""
    actual = file.stat().st_size if file.is_file() else -1
    got, expected = f"{actual:,} bytes", f"{size:,} bytes" if size is not None else "the file"
    good = actual >= 0 and size in (None, actual)
    if good and (sha256 or blob):
        digest = hashlib.sha256() if sha256 else hashlib.sha1(f"blob {actual}\0".encode())
        with file.open("rb") as f:
            while chunk := f.read(2**22):
                digest.update(chunk)
                if progress:
                    progress(len(chunk))
        got, expected = digest.hexdigest(), str(sha256 or blob)
        good = got == expected
    if not good:
        file.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} is not what the hub has; the damaged copy was deleted",
            expected=expected,
            got=got,
            hint="run the same command again: only this file is fetched anew",
        )
