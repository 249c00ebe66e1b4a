"""From one storage format to another, one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Progress, save_checkpoint
from .config import V4Config
from .errors import CheckpointError, DSV4Error
from .formats import MTP_COPIES, TORCH_DTYPES, inventory, with_format
from .quant import E8M0, dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8

_RELEASE_EVERY = 2**28  # bytes converted before the pages read for them are given back


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
    checkpoint = opened.remapped()  # its pages are ours to release
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
    for copy, original in MTP_COPIES.items():
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
            source.release()
        origin = name if name in source.specs else MTP_COPIES[name]
        scale_name = name.removesuffix("weight") + "scale"
        weight = source.tensor(origin)
        scale = source.tensor(scale_name) if scale_name in source.specs else None
        if scale is None and scale_name not in specs:
            yield name, weight
            continue
        scale_dtype = TORCH_DTYPES[specs[scale_name].dtype] if scale_name in specs else E8M0
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
    if scale is not None and weight.dtype == TORCH_DTYPES[dtype]:
        converted = scale.to(scale_dtype)
        if torch.equal(converted.float(), scale.float()):
            return weight, converted
    values = dequantize(weight, scale)
    return quantize_fp4(values) if dtype == "I8" else quantize_fp8(values, scale_dtype)
