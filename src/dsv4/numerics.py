"""In which arithmetic a pass is computed; docs/numerics.md has the whole story."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels, quant
from .errors import ConfigError

KV_BLOCK = 64  # channels of a KV entry that share an FP8 scale


@dataclass(frozen=True)
class Numerics:
    """A named choice of arithmetic.

    ``dtype``: activations and matmuls. ``official``: the roundings of the published code (FP8
    before quantised matmuls, FP8 KV entries, Hadamard + FP4 in the indexer, float32 compressor).
    ``qat``: weights pass through their stored format with a straight-through gradient.
    ``placed``: the norm of the query heads rounds as torch's operations do, which depends on
    where a row lies in its pass (docs/numerics.md); for receipts against the published code.
    """

    name: str
    dtype: torch.dtype
    official: bool = False
    qat: bool = False
    placed: bool = False


OFFICIAL = Numerics("official", torch.bfloat16, official=True)
FLOAT32 = Numerics("float32", torch.float32)
FLOAT64 = Numerics("float64", torch.float64)  # to check gradients; weights in float64 too
TRAIN = Numerics("train", torch.bfloat16)
TRAIN_QAT = Numerics("train-qat", torch.bfloat16, qat=True)
NUMERICS = {n.name: n for n in (OFFICIAL, FLOAT32)}


def numerics(name: str) -> Numerics:
    """``"official"`` or ``"float32"``; ConfigError for anything else."""
    if name not in NUMERICS:
        raise ConfigError("no such numerics", expected=" or ".join(NUMERICS), got=name)
    return NUMERICS[name]


def kv_rounded(entries: Tensor, nx: Numerics, kept: int) -> Tensor:
    """A KV entry as the cache holds it: FP8 per 64 channels, the last ``kept`` in BF16."""
    return kernels.fp8_round(entries, KV_BLOCK, kept) if nx.official else entries


def fp4_rotated(x: Tensor, nx: Numerics) -> Tensor:
    """Indexer queries and keys: Hadamard rotation, then FP4. It leaves dot products alone but
    for the rounding, so float32 numerics skip it. With ``qat`` the gradient passes the rounding
    unchanged."""
    if nx.official:
        return kernels.hadamard_fp4(x)
    if not nx.qat:
        return x
    turned = quant.hadamard(x)
    rounded = quant.fp4_round(turned.detach())
    return turned + (rounded - turned).detach()
