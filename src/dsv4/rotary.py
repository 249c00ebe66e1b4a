"""The angles by which positions turn the last channels of queries, entries and keys."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .config import V4Config

PAGE = 128  # successive positions whose rotations are made together


@functools.lru_cache(maxsize=32)
def _frequencies(
    dim: int, theta: float, factor: float, original: int, fast: float, slow: float
) -> Tensor:
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if factor == 1:
        return freqs

    def channel(turns: float) -> float:  # the channel that turns so often in `original` positions
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(fast)), 0)
    high = min(math.ceil(channel(slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return freqs / factor * (1 - keep) + freqs * keep


def rotary_frequencies(config: V4Config, compressed: bool) -> Tensor:
    """Angles per position, ``[rope / 2]``: YaRN with its own theta where there is a compressor."""
    return _frequencies(*_kind(config, compressed))


def _kind(config: V4Config, compressed: bool) -> tuple[int, float, float, int, float, float]:
    if not compressed:
        return config.qk_rope_head_dim, config.rope_theta, 1.0, 0, 0.0, 0.0
    s = config.rope_scaling
    return (
        config.qk_rope_head_dim,
        config.compress_rope_theta,
        float(s.factor),
        s.original_max_position_embeddings,
        float(s.beta_fast),
        float(s.beta_slow),
    )


def rotation(config: V4Config, compressed: bool, start: int, count: int, step: int = 1) -> Tensor:
    """Cosines and sines ``[count, rope / 2, 2]`` for positions start, start + step, ..."""
    kind = _kind(config, compressed)
    if count == 1:
        page, inside = divmod(start, PAGE)
        return _page(kind, page)[inside : inside + 1]
    return _rotation(kind, start, count, step)


def _rotation(
    kind: tuple[int, float, float, int, float, float], start: int, count: int, step: int
) -> Tensor:
    positions = torch.arange(count) * step + start
    angles = torch.outer(positions.float(), _frequencies(*kind))
    return torch.stack((angles.cos(), angles.sin()), -1)


@functools.lru_cache(maxsize=64)
def _page(kind: tuple[int, float, float, int, float, float], page: int) -> Tensor:
    with torch.inference_mode(False):
        return _rotation(kind, page * PAGE, PAGE, 1)
