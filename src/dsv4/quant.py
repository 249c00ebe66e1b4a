"""FP8, FP4 and E8M0: the number formats of V4 checkpoints and activations.

Formats (report section 2; OCP microscaling): FP8 is E4M3 with one scale per 128 x 128 block of a
weight or per 128 (64 in the KV cache) channels of an activation; FP4 is E2M1 with one scale per 32
consecutive inputs, two codes a byte, the even input in the low nibble. Scales are powers of two:
E8M0 (value ``2 ** (byte - 127)``) in instruct files, F32 in Base files.

Rounding is to nearest, ties to even. Everything here is exact unless its name says ``round``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import FP4_BLOCK as FP4_BLOCK
from .config import FP8_BLOCK as FP8_BLOCK
from .errors import CheckpointError

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; bit 3 is the sign
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


@functools.cache
def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A constant without dimensions. An operation with it takes half as long as one with a Python
    number, which torch converts each time; in the loop over single tokens that is worth its name.
    """
    with torch.inference_mode(False):  # one that was made in inference cannot be trained with
        return torch.tensor(value, dtype=dtype)


def wide(x: Tensor) -> Tensor:
    """``x`` in the type of sums and of element-wise work: float32, but float64 stays (in which
    gradients are checked)."""
    return x if x.dtype == torch.float64 else x.float()


_MANTISSA, _EXPONENT = number(0x007FFFFF, torch.int32), number(0x7F800000, torch.int32)


# ---------------------------------------------------------------- scales


def ceil_pow2(x: Tensor) -> Tensor:
    """The smallest power of two >= x, and at least 2^-126, for positive finite float32 ``x``."""
    bits = (x.view(torch.int32) + _MANTISSA) & _EXPONENT  # any mantissa carries upwards
    return bits.view(torch.float32)


def _scale_for(amax: Tensor, largest: float, floor: float) -> Tensor:
    return ceil_pow2(amax.clamp_min(floor) / number(largest))


# ---------------------------------------------------------------- activations


def fp8_act(x: Tensor, block: int = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise activations ``[..., K]`` to FP8 per ``block`` channels.

    Returns codes (float8_e4m3fn, ``[..., K]``) and scales (float32, ``[..., K / block]``):
    ``2 ** ceil(log2(amax / 448))`` with amax floored at 1e-4 (reference: act_quant).
    """
    blocks = x.float().unflatten(-1, (-1, block))
    scale = _scale_for(blocks.abs().amax(-1), FP8_MAX, 1e-4)
    codes = (blocks / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(E4M3)
    return codes.flatten(-2), scale


def fp8_round(x: Tensor, block: int = FP8_BLOCK) -> Tensor:
    """``x`` as it looks after FP8 quantisation per ``block`` channels; the dtype stays."""
    blocks = x.float().unflatten(-1, (-1, block))
    scale = _scale_for(blocks.abs().amax(-1, keepdim=True), FP8_MAX, 1e-4)
    return round_e4m3(blocks, scale).flatten(-2).to(x.dtype)


def fp4_round(x: Tensor, block: int = FP4_BLOCK) -> Tensor:
    """``x`` as it looks after FP4 quantisation per ``block`` channels; the dtype stays."""
    blocks = x.float().unflatten(-1, (-1, block))
    scale = _scale_for(blocks.abs().amax(-1, keepdim=True), FP4_MAX, FP4_MAX * 2.0**-126)
    return (_round_e2m1(blocks / scale) * scale).flatten(-2).to(x.dtype)


def round_e4m3(y: Tensor, scale: Tensor) -> Tensor:
    """The nearest E4M3 values times ``scale`` (powers of two) to float32 ``|y| <= 448 scale``.

    Adding and taking away ``1.5 * 2^23`` units in the last place rounds to nearest even in plain
    float32 arithmetic, several times faster than a cast to float8 and back.
    """
    bits = y.view(torch.int32) & _EXPONENT  # 2 ** floor(log2 |y|)
    ulp_magic = bits.view(torch.float32).maximum(scale * number(2.0**-6))
    ulp_magic = ulp_magic.mul_(number(1.5 * 2.0**20))  # 3 mantissa bits
    return (y + ulp_magic).sub_(ulp_magic)


def _round_e2m1(y: Tensor) -> Tensor:
    y = y.clamp(-FP4_MAX, FP4_MAX)
    magnitude = y.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.round(y / step) * step


def hadamard(x: Tensor) -> Tensor:
    """Normalised Walsh-Hadamard transform of the last axis (a power of two); the dtype stays."""
    n = x.shape[-1]
    return F.linear(x.float(), _hadamard_matrix(n)).to(x.dtype)


@functools.cache
def _hadamard_matrix(n: int) -> Tensor:
    with torch.inference_mode(False):  # one that was made in inference cannot be trained with
        h = torch.ones(1, 1)
        while h.shape[0] < n:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
        return h / math.sqrt(n)


# ---------------------------------------------------------------- weights


def quantize_fp8(weight: Tensor, scale_dtype: torch.dtype = E8M0) -> tuple[Tensor, Tensor]:
    """``[N, K]`` float -> FP8 codes ``[N, K]`` and scales ``[ceil(N / 128), ceil(K / 128)]``."""
    n, k = weight.shape
    padded = F.pad(weight.float(), (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    scale = _scale_for(blocks.abs().amax((1, 3), keepdim=True), FP8_MAX, FP8_MAX * 2.0**-126)
    codes = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).flatten(2).flatten(0, 1)[:n, :k]
    return codes.to(E4M3), scale.squeeze(3).squeeze(1).to(scale_dtype)


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, K]`` float -> FP4 pairs ``[N, K / 2]`` (int8) and E8M0 scales ``[N, K / 32]``."""
    blocks = weight.float().unflatten(-1, (-1, FP4_BLOCK))
    scale = _scale_for(blocks.abs().amax(-1), FP4_MAX, FP4_MAX * 2.0**-126)
    values = _round_e2m1(blocks / scale.unsqueeze(-1)).flatten(-2)
    codes = torch.bucketize(values.abs(), torch.tensor(FP4_VALUES, device=values.device))
    codes = codes.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8), scale.to(E8M0)


def dequantize(
    weight: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of a stored weight ``[..., N, K]``, chosen by its dtype.

    int8 is FP4 pairs with scales ``[..., N, K / 32]``; float8_e4m3fn has scales
    ``[..., ceil(N / 128), ceil(K / 128)]``; floats pass through. Exact in float32, and in bfloat16
    too (four significant bits times a power of two, the exponent range is the same), for scales
    below 2^112.
    """
    if scale is not None and weight.dim() == 2 and weight.shape[0] > _rows_at_once(weight):
        blocks = row_blocks(weight, scale)
        return torch.cat([dequantize(w, s, dtype) for w, s in blocks])
    if weight.dtype in (torch.int8, torch.uint8):
        assert scale is not None
        values = _fp4_as_half(weight).float()
        blocks = values.unflatten(-1, (-1, FP4_BLOCK))
        blocks.mul_((scale.float() * number(2.0**14)).unsqueeze(-1))
        return values.to(dtype)
    if weight.dtype == E4M3:
        assert scale is not None
        n, k = weight.shape[-2:]
        values = _fp8_as_half(weight).float()
        factor = (scale.float() * number(2.0**8)).repeat_interleave(FP8_BLOCK, -2)
        if n % FP8_BLOCK:
            factor = factor[..., :n, :]
        if k % FP8_BLOCK:
            return values.mul_(factor.repeat_interleave(FP8_BLOCK, -1)[..., :k]).to(dtype)
        values.unflatten(-1, (-1, FP8_BLOCK)).mul_(factor.unsqueeze(-1))
        return values.to(dtype)
    return weight.to(dtype)


def times_row(weight: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """``weight [N, K]`` as stored times ``x [K]``: float32 ``[N]``.

    Long rows of FP8 are not scaled: ``x`` is, once for each row of blocks, with the same sums.
    """
    x = x.float()
    parts = []
    for w, s in row_blocks(weight, scale):
        n, k = w.shape
        if s is None or w.dtype != E4M3 or n % FP8_BLOCK or k % FP8_BLOCK or k < 512:
            parts.append(torch.mv(dequantize(w, s), x))
        else:
            factor = (s.float() * number(2.0**8)).unsqueeze(-1)
            scaled = (x.view(-1, FP8_BLOCK) * factor).flatten(1).unbind()
            values = _fp8_as_half(w).float().view(-1, FP8_BLOCK, k).unbind()
            parts += [torch.mv(v, row) for v, row in zip(values, scaled, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_blocks(weight: Tensor, scale: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``weight [N, K]`` with its scales in pieces whose float32 values take at most about 2 MB:
    the allocator reuses such blocks, while larger ones cost a page fault every 4 KB."""
    rows = _rows_at_once(weight)
    if weight.shape[0] <= rows:
        return iter([(weight, scale)])
    pieces = weight.split(rows)
    if scale is None:
        return zip(pieces, [None] * len(pieces), strict=True)
    per_scale = FP8_BLOCK if weight.dtype == E4M3 else 1
    return zip(pieces, scale.split(rows // per_scale), strict=True)


def _rows_at_once(weight: Tensor) -> int:
    per_row = weight.shape[1] * (2 if weight.dtype in (torch.int8, torch.uint8) else 1)
    return max(FP8_BLOCK, (1 << 19) // per_row // FP8_BLOCK * FP8_BLOCK)


# Both formats fit in float16 but for the exponent's bias, so their bits are moved into place with
# integer arithmetic: several times faster than a table or a cast, and unlike in bfloat16 the small
# ones stay normal when widened, where CPUs are slow otherwise.


def _fp4_as_half(pairs: Tensor) -> Tensor:
    """FP4 pairs ``[..., K / 2]`` -> float16 ``[..., K]``, times 2^-14."""
    wide = pairs.contiguous().view(torch.uint8).to(torch.int32)
    both = wide.mul_(number(0x0100_1000, torch.int32)).view(torch.int16)
    # now each half has its code in the upper four bits
    both.bitwise_right_shift_(number(3, torch.int16))
    return both.bitwise_and_(number(-0x7200, torch.int16)).view(torch.float16)


def _fp8_as_half(codes: Tensor) -> Tensor:
    """E4M3 codes -> float16 of the same shape, times 2^-8."""
    wide = codes.contiguous().view(torch.int8).to(torch.int16)  # the sign fills the upper bits
    wide.bitwise_left_shift_(number(7, torch.int16))
    return wide.bitwise_and_(number(-0x4080, torch.int16)).view(torch.float16)


def fp4_to_fp8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 pairs with scales per 32 -> FP8 codes with E8M0 scales per 128 x 128, the same values.

    The new scale is the block's largest sub-scale / 2^6, so the largest code is 6 * 64 = 384.
    Exact while the sub-scales of a block differ by at most 2^14 (report section 2.2); otherwise
    CheckpointError.
    """
    values = dequantize(weight, scale)
    n, k = values.shape
    sub = scale.float()
    # zero codes need no precision, so only sub-scales that carry a value bind
    used = (values.unflatten(-1, (-1, FP4_BLOCK)) != 0).any(-1)
    per = FP8_BLOCK // FP4_BLOCK
    live = F.pad(torch.where(used, sub, 0.0), (0, -sub.shape[1] % per, 0, -n % FP8_BLOCK))
    top = live.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, per)).amax((1, 3))
    new = torch.where(top > 0, (top / 64.0).clamp_min(2.0**-127), 1.0)
    full = new.repeat_interleave(FP8_BLOCK, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :k]
    codes = (values / full).to(E4M3)
    if not torch.equal(codes.float() * full, values):
        raise CheckpointError(
            "these FP4 weights have no exact FP8 form",
            expected="sub-scales within 2^14 of each other in every 128 x 128 block",
            got=f"largest / smallest = 2^{int((top.max() / sub[used].min()).log2())}",
            hint="convert to bf16 instead",
        )
    return codes, new.to(E8M0)


# ---------------------------------------------------------------- quantisation-aware training


def fake_quant_weight(weight: Tensor, fmt: str) -> Tensor:
    """``weight [..., N, K]`` as it will be stored (``fmt`` "fp4" or "fp8"), straight-through.

    The gradient passes to the float master unchanged (report section 4).
    """
    with torch.no_grad():
        if fmt == "fp4":
            stored = fp4_round(weight)
        else:
            n, k = weight.shape[-2:]
            whole = F.pad(weight.float(), (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
            blocks = whole.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
            amax = blocks.abs().amax((-3, -1), keepdim=True)
            scale = _scale_for(amax, FP8_MAX, FP8_MAX * 2.0**-126)
            stored = round_e4m3(blocks, scale).flatten(-4, -3).flatten(-2)
            stored = stored.view(whole.shape)[..., :n, :k].to(weight.dtype)
        delta = stored - weight
    return weight + delta
