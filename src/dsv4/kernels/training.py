"""mHC and compressors with a gradient, in C++: the same as the reference and its backward, fused.

Each operation reads its tensors once, keeps only what it was given, and computes the rest again
backwards. Results are those of the reference up to rounding; gates and sums are float32. What the
library does not take (another dtype, device or number of streams) goes to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, reference

STREAMS = 4
KERNELS = ("hc_read", "hc_expand", "compress")  # what is here and in the table
TYPES = (torch.bfloat16, torch.float32)


def _native_takes(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.dtype in TYPES and first.shape[-1] % 16 == 0 and first.device.type == "cpu"


def hc_read(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.hc_read``."""
    trained = streams.requires_grad and dtype == streams.dtype and streams.shape[-2] == STREAMS
    if not trained or not _native_takes(streams):
        return reference.hc_read(streams, fn, scale, base, eps, norm_eps, dtype)
    x, logits = _Read.apply(  # type: ignore[no-untyped-call]
        streams, fn, scale[0], base[:STREAMS], eps, norm_eps
    )
    _, post, comb = reference.hc_gates(logits, scale, base, eps)
    return x, post, comb


def hc_expand(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ``reference.hc_expand``."""
    trained = streams.requires_grad and out.dtype == streams.dtype and post.shape[-1] == STREAMS
    if not trained or not _native_takes(streams, out):
        return reference.hc_expand(out, streams, post, comb)
    fresh: Tensor = _Expand.apply(out, streams, post, comb)  # type: ignore[no-untyped-call]
    return fresh


def compress(kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool) -> Tensor:
    """See ``reference.compress``."""
    if not kv.requires_grad or kv.shape[1] < ratio or not _native_takes(kv, gate):
        return reference.compress(kv, gate, bias, ratio, overlap)
    entries: Tensor = _Compress.apply(  # type: ignore[no-untyped-call]
        kv, gate, bias, ratio, overlap
    )
    return entries


class _Read(torch.autograd.Function):
    """Streams -> the site's input and all mixing logits; only ``pre`` is applied here."""

    @staticmethod
    def forward(ctx: Any, streams, fn, scale, base, eps, norm_eps):  # type: ignore[no-untyped-def]
        streams = streams.contiguous()
        rows, d = streams.shape[:-2].numel(), streams.shape[-1]
        flat, threads = streams.view(rows, -1), torch.get_num_threads()
        products = F.linear(flat, fn.to(flat.dtype)).float()
        squares = torch.empty(rows)
        _native.hc_squares(*_at(streams), rows, d, squares.data_ptr(), threads)
        root = squares.div_(flat.shape[1]).add_(norm_eps).rsqrt_().unsqueeze(1)
        logits = products * root
        pre = torch.sigmoid(logits[:, :STREAMS] * scale + base).add_(eps)
        x = streams.new_empty(rows, d)
        _native.hc_collapse(*_at(streams), rows, d, pre.data_ptr(), x.data_ptr(), threads)
        ctx.save_for_backward(streams, fn, scale, products, root, pre)
        ctx.eps = eps
        lead = streams.shape[:-2]
        return x.view(*lead, d), logits.view(*lead, -1)

    @staticmethod
    def backward(ctx: Any, dx, dlogits):  # type: ignore[no-untyped-def]
        streams, fn, scale, products, root, pre = ctx.saved_tensors
        rows, d = streams.shape[:-2].numel(), streams.shape[-1]
        flat, threads = streams.view(rows, -1), torch.get_num_threads()
        dx, dlogits = dx.contiguous(), dlogits.reshape(rows, -1).float()
        dpre = torch.empty(rows, STREAMS)
        _native.hc_dots(
            streams.data_ptr(), dx.data_ptr(), _bf16(streams), rows, d, dpre.data_ptr(), threads
        )
        share = pre - ctx.eps
        dpre.mul_(share).mul_(1 - share)  # of the logits, scaled
        read = products[:, :STREAMS] * root
        dscale, dbase = (dpre * read).sum(), dpre.sum(0)
        dlogits = torch.cat((dlogits[:, :STREAMS] + dpre * scale, dlogits[:, STREAMS:]), 1)
        dproducts = (dlogits * root).to(flat.dtype)
        factor = (dlogits * products).sum(1, keepdim=True).mul_(root**3).div_(-flat.shape[1])
        dstreams = dproducts @ fn.to(flat.dtype)
        _native.hc_collapse_back(
            streams.data_ptr(), dx.data_ptr(), _bf16(streams), rows, d, pre.data_ptr(),
            factor.data_ptr(), dstreams.data_ptr(), threads,
        )  # fmt: skip
        dfn = (dproducts.T @ flat).to(fn.dtype)
        return dstreams.view_as(streams), dfn, dscale, dbase, None, None


class _Expand(torch.autograd.Function):
    """The new streams of a site."""

    @staticmethod
    def forward(ctx: Any, out, streams, post, comb):  # type: ignore[no-untyped-def]
        out, streams = out.contiguous(), streams.contiguous()
        post, comb = post.float().contiguous(), comb.float().contiguous()
        fresh = torch.empty_like(streams)
        _native.hc_expand(
            out.data_ptr(), *_at(streams), *_rows(out), post.data_ptr(), comb.data_ptr(),
            fresh.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(out, streams, post, comb)
        return fresh

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        out, streams, post, comb = ctx.saved_tensors
        grad = grad.contiguous()
        made = [torch.empty_like(x) for x in (out, streams, post, comb)]
        _native.hc_expand_back(
            grad.data_ptr(), out.data_ptr(), *_at(streams), *_rows(out), post.data_ptr(),
            comb.data_ptr(), *(x.data_ptr() for x in made), torch.get_num_threads(),
        )  # fmt: skip
        return tuple(made)


class _Compress(torch.autograd.Function):
    """The entries of whole sequences."""

    @staticmethod
    def forward(ctx: Any, kv, gate, bias, ratio, overlap):  # type: ignore[no-untyped-def]
        kv, gate, bias = kv.contiguous(), gate.contiguous(), bias.float().contiguous()
        dim = kv.shape[2] // (1 + overlap)
        ctx.shape = (_bf16(kv), overlap, ratio, dim, kv.shape[0], kv.shape[1])
        entries = kv.new_empty(kv.shape[0], kv.shape[1] // ratio, dim)
        _native.pool(
            kv.data_ptr(), gate.data_ptr(), bias.data_ptr(), *ctx.shape, entries.data_ptr(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(kv, gate, bias)
        return entries

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        kv, gate, bias = ctx.saved_tensors
        ratio = ctx.shape[2]
        dkv, dgate = torch.zeros_like(kv), torch.zeros_like(gate)
        _native.pool_back(
            kv.data_ptr(), gate.data_ptr(), bias.data_ptr(), *ctx.shape,
            grad.contiguous().data_ptr(), dkv.data_ptr(), dgate.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        whole = dgate[:, : kv.shape[1] // ratio * ratio]
        dbias = whole.unflatten(1, (-1, ratio)).sum((0, 1), dtype=torch.float32)
        return dkv, dgate, dbias, None, None


def _bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _at(x: Tensor) -> tuple[int, bool]:
    return x.data_ptr(), _bf16(x)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]
