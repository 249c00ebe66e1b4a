"""The torch reference of every kernel: what a faster version must compute.

Pure functions of tensors and numbers; none sees a configuration or a model. All are
differentiable where training needs a gradient. ``dtype`` is the matmul and activation type:
bfloat16 in official numerics and in training, float32 for the structural truth.

Letters in shapes: B sequences, T new tokens, H heads, D channels of a head, d hidden size,
N rows (B * T flattened), S keys, R compressed rows, E experts, K experts per token, h streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import quant
from ..packing import Packing
from ..quant import FP8_BLOCK, dequantize, number, times_row, wide
from .rows import PagedRows, Rows, dense

QUERY_BLOCK = 128  # queries handled together in attention and index scores


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to multiply in so that products of ``dtype`` values are exact and fast here.

    Products of bfloat16 values are exact in float32, so a CPU without bfloat16 instructions
    multiplies in float32 and rounds once at the end. (A single row does so on any CPU: preparing
    a product in bfloat16 takes longer than the product.)
    """
    return torch.float32 if dtype == torch.bfloat16 and not has_fast_bf16() else dtype


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., K] @ weight[N, K].T``, both of one dtype.

    In bfloat16 the rows are filled up to a multiple of 16, because oneDNN compiles a program for
    each shape it meets (about a millisecond) and keeps it (up to 1024 of them): prompts and what
    goes to an expert have all lengths.
    """
    rows = x.numel() // x.shape[-1]
    if x.dtype != torch.bfloat16 or rows % 16 == 0:
        return F.linear(x, weight)
    filled = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % 16))
    return F.linear(filled, weight)[:rows].view(*x.shape[:-1], -1)


# ---------------------------------------------------------------- linear, norm, rope


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x [..., K] @ weight[N, K].T`` with the weight as stored (FP4, FP8, BF16, F32).

    Accumulates in float32 and rounds once to ``dtype``. ``x`` is taken as it is: rounding of
    activations is ``quant.fp8_round``, done once for all the matrices that read ``x``.
    """
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled():
        return times_row(weight, scale, x.flatten()).to(dtype).view(*x.shape[:-1], -1)
    mm = matmul_dtype(dtype)
    return matmul(x.to(mm), dequantize(weight, scale, mm)).to(dtype)


def grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x [..., G, K]`` times the G slices of ``weight [G * R, K]``: ``[..., G, R]``."""
    groups, one_row = x.shape[-2], x.shape[:-2].numel() == 1
    if one_row and not torch.is_grad_enabled() and weight.shape[0] % (groups * FP8_BLOCK) == 0:
        scales = [None] * groups if scale is None else scale.chunk(groups)
        rows = zip(weight.chunk(groups), scales, x.reshape(groups, -1), strict=True)
        return torch.stack([times_row(*each) for each in rows]).to(dtype).view(*x.shape[:-1], -1)
    mm = matmul_dtype(dtype)
    w = dequantize(weight, scale, mm).chunk(groups)
    parts = [matmul(part, w[g]) for g, part in enumerate(x.to(mm).unbind(-2))]
    return torch.stack(parts, -2).to(dtype)


def head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits ``[..., V]`` in float32; the weight is widened a slice at a time."""
    if x.requires_grad:
        return wide(F.linear(x, weight.to(x.dtype)))
    if x.numel() == x.shape[-1]:
        return times_row(weight, None, x.flatten()).view(*x.shape[:-1], -1)
    slices = weight.split(max(1, (1 << 18) // weight.shape[1]))  # 1 MB in float32: in the cache
    x = wide(x)
    return torch.cat([F.linear(x, w.to(x.dtype)) for w in slices], -1)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``-log softmax(head(x))`` at ``targets [N]``, in nats, float32 ``[N]``, for ``x [N, d]``."""
    return F.cross_entropy(head(x, weight), targets, reduction="none")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis, rounded to ``x``'s dtype.

    With a weight it is computed in float32; without one every step rounds to ``x``'s dtype, as
    the reference does for the heads of a query.
    """
    if weight is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + number(eps))
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + number(eps))
    return (y * wide(weight)).to(x.dtype)


def rope(x: Tensor, rotation: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last ``2 * W`` channels of ``x``; interleaved pairs; float32 inside.

    ``rotation [..., W, 2]`` holds cosines and sines and broadcasts against the pairs;
    ``inverse`` turns the other way.
    """
    width = 2 * rotation.shape[-2]
    plain, turned = x.split_with_sizes((x.shape[-1] - width, width), -1)
    pairs = torch.view_as_complex(wide(turned).unflatten(-1, (-1, 2)))
    turn = torch.view_as_complex(rotation)
    pairs = pairs * (turn.conj() if inverse else turn)
    return torch.cat((plain, torch.view_as_real(pairs).flatten(-2).to(x.dtype)), -1)


def norm_rope(x: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """The heads of queries ``[B, T, H, D]``: RMSNorm without a weight, then turned as their token
    by ``rotation [T, W, 2]``."""
    return rope(rms_norm(x, None, eps), rotation.unsqueeze(-3))


def fp8_round(x: Tensor, block: int = FP8_BLOCK, keep: int = 0) -> Tensor:
    """``x`` as it looks after FP8 quantisation per ``block`` channels (``quant.fp8_round``), but
    for the last ``keep`` channels, which stay as they are."""
    if keep == 0:
        return quant.fp8_round(x, block)
    first, last = x.split_with_sizes((x.shape[-1] - keep, keep), -1)
    return torch.cat((quant.fp8_round(first, block), last), -1)


def hadamard_fp4(x: Tensor) -> Tensor:
    """``x`` after a Hadamard rotation of its last axis and FP4 quantisation per 32 channels."""
    return quant.fp4_round(quant.hadamard(x))


# ---------------------------------------------------------------- hyper-connections (mHC)


class Mix(NamedTuple):
    """What one mHC site decides for each token: ``pre [..., h]``, ``post [..., h]``,
    ``comb [..., h, h]`` (doubly stochastic; old stream i goes into new stream j by ``[i, j]``)."""

    pre: Tensor
    post: Tensor
    comb: Tensor


def hc_logits(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Mixing logits ``[..., M]`` of ``streams [..., h, d]``: RMS-normalised, times ``fn``."""
    flat = streams.flatten(-2)
    high = torch.promote_types(flat.dtype, torch.float32)
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=high)
    scale = torch.rsqrt(norm.square() / number(flat.shape[-1]) + number(eps))
    mm = flat.dtype if flat.requires_grad else high
    return wide(F.linear(flat.to(mm), fn.to(mm))) * scale


def hc_split(logits: Tensor, scale: Tensor, base: Tensor, iters: int, eps: float) -> Mix:
    """Mixing logits ``[..., (2 + h) h]`` -> Mix; ``comb`` by ``iters`` Sinkhorn rounds.

    Source: report section 2.3 (the code's matrix is the report's, transposed): row softmax,
    columns, then ``iters - 1`` times rows and columns.
    """
    pre, post, comb = hc_gates(logits, scale, base, eps)
    return Mix(pre, post, sinkhorn(comb, iters, eps))


def hc_gates(
    logits: Tensor, scale: Tensor, base: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What mixing logits ``[..., (2 + h) h]`` decide, before Sinkhorn: pre, post and comb."""
    h = int((1 + logits.shape[-1]) ** 0.5) - 1
    pre, post, comb = logits.split_with_sizes((h, h, h * h), -1)
    pre_base, post_base, comb_base = base.split_with_sizes((h, h, h * h))
    comb = (comb * scale[2] + comb_base).unflatten(-1, (h, h))
    pre = torch.sigmoid(pre * scale[0] + pre_base) + number(eps)
    post = number(2.0) * torch.sigmoid(post * scale[1] + post_base)
    return pre, post, torch.softmax(comb, -1) + number(eps)


def hc_read(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """A site's input ``[..., d]`` and its post and comb gates (comb before Sinkhorn)."""
    pre, post, comb = hc_gates(hc_logits(streams, fn, norm_eps), scale, base, eps)
    return hc_collapse(streams, pre, dtype), post, comb


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The streams' end ``[..., d]``: a sum with weights that have logits as the gates do."""
    pre = torch.sigmoid(hc_logits(streams, fn, norm_eps) * scale + base) + eps
    return hc_collapse(streams, pre, dtype)


def sinkhorn(comb: Tensor, iters: int, eps: float) -> Tensor:
    """Normalise columns, then ``iters - 1`` times rows and columns, of ``comb [..., h, h]``."""
    if comb.requires_grad:
        out: Tensor = _Sinkhorn.apply(comb, iters, eps)  # type: ignore[no-untyped-call]
        return out
    if comb.numel() == 16:  # one 4 x 4 matrix
        return comb.new_tensor(_sinkhorn_4x4(comb.view(4, 4).tolist(), iters, eps)).view_as(comb)
    m = comb.flatten(0, -3).permute(1, 2, 0).contiguous()  # [h, h, N]: long rows vectorise
    for axis in _sinkhorn_axes(iters):
        m /= m.sum(axis, keepdim=True).add_(eps)
    return m.permute(2, 0, 1).contiguous().view(comb.shape)


def _sinkhorn_4x4(rows: Iterable[Sequence[float]], iters: int, eps: float) -> list[float]:
    """The same for one matrix, flattened: twice as fast as a hundred operations on tensors."""
    for _ in _sinkhorn_axes(iters):  # normalise the columns and transpose
        rows = [
            (a / (t := a + b + c + d + eps), b / t, c / t, d / t)
            for a, b, c, d in zip(*rows, strict=True)
        ]
    return [x for column in zip(*rows, strict=True) for x in column]


def _sinkhorn_axes(iters: int) -> list[int]:
    return [0, *(1, 0) * (iters - 1)]


class _Sinkhorn(torch.autograd.Function):
    """Sinkhorn with its exact backward: y = x / (s + eps) has dx = (dy - sum(dy y)) / (s + eps)."""

    @staticmethod
    def forward(ctx, comb, iters, eps):  # type: ignore[no-untyped-def]
        m = comb.flatten(0, -3).permute(1, 2, 0).contiguous()
        saved = []
        for axis in _sinkhorn_axes(iters):
            total = m.sum(axis, keepdim=True).add_(eps)
            m = m / total
            saved += [m, total]
        ctx.save_for_backward(*saved)
        ctx.iters, ctx.shape = iters, comb.shape
        # contiguous: batched products of strided 4 x 4 matrices are a hundred times slower
        return m.permute(2, 0, 1).contiguous().view(comb.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        g = grad.flatten(0, -3).permute(1, 2, 0).contiguous()
        saved = ctx.saved_tensors
        for i, axis in reversed(list(enumerate(_sinkhorn_axes(ctx.iters)))):
            m, total = saved[2 * i], saved[2 * i + 1]
            g = (g - (g * m).sum(axis, keepdim=True)).div_(total)
        return g.permute(2, 0, 1).contiguous().view(ctx.shape), None, None


def hc_collapse(streams: Tensor, pre: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum of the streams: ``[..., h, d]`` and ``[..., h]`` -> ``[..., d]``."""
    rows = torch.bmm(pre.flatten(0, -2).unsqueeze(1), wide(streams.flatten(0, -3)))
    return rows.view(*streams.shape[:-2], streams.shape[-1]).to(dtype)


def hc_expand(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams: ``post_j * out + sum_i comb[i, j] * streams_i``; ``streams``' dtype."""
    new = torch.baddbmm(
        post.flatten(0, -2).unsqueeze(-1) * wide(out).flatten(0, -2).unsqueeze(-2),
        comb.flatten(0, -3).transpose(1, 2),
        wide(streams).flatten(0, -3),
    )
    return new.view(streams.shape).to(streams.dtype)


# ---------------------------------------------------------------- compressor and indexer


class Span(NamedTuple):
    """Rows ``first .. first + length - 1`` of ``room [1, rows, width]``."""

    room: Tensor
    first: int
    length: int

    @property
    def rows(self) -> Tensor:
        return self.room[:, self.first : self.first + self.length]


def raw_rows(span: Span, start: int, kv: Tensor, gate: Tensor, bias: Tensor) -> None:
    """Write raw compressor rows, float32, to the span; ``start`` is the first one's position.

    A row is ``kv [1, T, W]`` beside the logits ``gate [1, T, W]``, to which the ``bias
    [ratio, W]`` of its position in its block is added.
    """
    ratio = bias.shape[0]
    added = wide(bias).roll(-start % ratio, 0).repeat(-(-span.length // ratio), 1)
    span.rows.copy_(torch.cat((wide(kv), wide(gate) + added[: span.length]), -1))


def store(rows: Tensor, table: PagedRows, first: int) -> None:
    """Write ``rows [n, width]`` into the table as it stores them, from number ``first`` on."""
    stored, at, end, size = table.format.pack(rows), first, first + len(rows), table.format.bytes
    while at < end:
        block, inside = divmod(at, table.each)
        n = min(end - at, table.each - inside)
        piece = table.blocks[block][table.offset : table.offset + table.each * size]
        piece.view(table.each, -1)[inside : inside + n] = stored[at - first : at - first + n]
        at += n


def pool(kv: Tensor, gate: Tensor, ratio: int, overlap: bool) -> Tensor:
    """Pool raw compressor rows to one entry per block of ``ratio`` rows.

    ``kv`` and ``gate``: float32 ``[B, n * ratio, D]``, or, with ``overlap``,
    ``[B, (1 + n) * ratio, 2 D]`` whose first block is the one before (gate -inf where there is
    none): its first D channels join the second D channels of the block itself.
    Returns ``[B, n, D]``: per channel, a softmax over the rows weighs them.
    """
    kv, gate = kv.unflatten(1, (-1, ratio)), gate.unflatten(1, (-1, ratio))
    if overlap:
        dim = kv.shape[-1] // 2
        kv = torch.cat((kv[:, :-1, :, :dim], kv[:, 1:, :, dim:]), 2)
        gate = torch.cat((gate[:, :-1, :, :dim], gate[:, 1:, :, dim:]), 2)
    return (kv * gate.softmax(2)).sum(2)


def compress(kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool) -> Tensor:
    """All entries ``[B, T // ratio, D]`` of whole sequences.

    ``kv, gate [B, T, W]`` and the positional ``bias [ratio, W]`` of the gate's logits, W being
    D, or 2 D with ``overlap``; see ``pool``. A tail shorter than ``ratio`` is left out. Rounded
    to ``kv``'s dtype once.
    """
    whole = whole_blocks(kv, gate, bias, ratio, overlap)
    return pool(*whole, ratio, overlap).to(kv.dtype)


def whole_blocks(
    kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool
) -> tuple[Tensor, Tensor]:
    """What ``pool`` takes of the sequences that ``compress`` is given."""
    count = kv.shape[1] // ratio
    kv, gate = wide(kv[:, : count * ratio]), wide(gate[:, : count * ratio])
    # repeated, not indexed: the gradient of a repetition is summed in a fixed order
    gate = gate + wide(bias).repeat(count, 1)
    if overlap:
        kv = F.pad(kv, (0, 0, ratio, 0))
        gate = F.pad(gate, (0, 0, ratio, 0), value=-torch.inf)
    return kv, gate


def visible_rows(start: int, count: int, ratio: int, device: torch.device) -> Tensor:
    """``[count]``: how many compressed rows the query at position ``start + i`` may see."""
    return torch.arange(start + 1, start + count + 1, device=device) // ratio


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Lightning indexer: ``sum_h w_h * relu(q_h . k)``; ``[B, T, S]`` in ``q``'s dtype.

    ``q [B, T, H, D]``, ``keys [B, S, D]``, ``weights [B, T, H]``. In bfloat16 every step rounds
    as the reference does (dot product, weighting, sum).
    """
    b, t, h, d = q.shape
    dots = (wide(q.reshape(b, t * h, d)) @ wide(keys).transpose(1, 2)).to(q.dtype)
    return (dots.view(b, t, h, -1).relu_() * weights.unsqueeze(-1)).sum(2)


def index_topk(
    q: Tensor, keys: Rows, weights: Tensor, start: int, ratio: int, k: int
) -> Tensor:
    """The ``k`` best rows for each query, ascending: int64 ``[B, T, k]``, -1 where fewer are
    visible. Of equal scores the earlier row wins, so the choice does not depend on ``S``."""
    keys, picked = dense(keys), []
    for a in range(0, q.shape[1], QUERY_BLOCK):
        block = slice(a, a + QUERY_BLOCK)
        scores = index_scores(q[:, block], keys, weights[:, block])
        seen = visible_rows(start + a, scores.shape[1], ratio, q.device)[:, None]
        scores.masked_fill_(torch.arange(keys.shape[1], device=q.device) >= seen, -torch.inf)
        least = scores.topk(k, -1).values[..., -1:]
        better, equal = scores > least, scores == least
        room = k - better.sum(-1, keepdim=True)
        best = better | (equal & (equal.cumsum(-1) <= room))  # exactly k in each row
        rows = best.nonzero()[:, -1].view(*scores.shape[:2], k)
        picked.append(rows.masked_fill_(rows >= seen, -1))
    return torch.cat(picked, 1)


def index_loss(
    q: Tensor,
    keys: Tensor,
    weights: Tensor,
    queries: Tensor,
    window: Tensor,
    rows: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    *,
    ratio: int,
    width: int,
    scale: float,
) -> Tensor:
    """How far the indexer is from the attention it chooses for, in nats of each query ``[B, T]``.

    KL(p || softmax(index scores)), where p is the attention of all heads on each visible
    compressed row, summed and normalised to 1; where ``chosen`` is given, both over the chosen
    rows. 0 for a query that sees no row. ``q``, ``keys``, ``weights`` are the indexer's, as for
    ``index_scores``, and get a gradient; the rest is as in ``attention`` from position 0, and
    gets none. Source: the V3.2 report's warm-up and sparse training of its indexer.
    """
    losses = []
    blocks = zip(q.split(QUERY_BLOCK, 1), weights.split(QUERY_BLOCK, 1), strict=True)
    for a, (qs, ws) in zip(range(0, q.shape[1], QUERY_BLOCK), blocks, strict=True):
        n = qs.shape[1]
        block, count = slice(a, a + n), (a + n) // ratio
        hidden = _hidden_rows(None if chosen is None else chosen[:, block], a, n, ratio, count, q)
        with torch.no_grad():
            p = _row_attention(
                queries[:, block], window[:, max(0, a - width + 1) : a + n], rows[:, :count],
                hidden, sink, width, scale,
            )
        losses.append(
            _IndexLoss.apply(qs, keys[:, :count], ws, p, hidden)  # type: ignore[no-untyped-call]
        )
    return torch.cat(losses, 1)


class _IndexLoss(torch.autograd.Function):
    """KL ``[B, n]`` of ``softmax(index_scores(q, keys, weights))`` to the distributions
    ``p [B, n, S]``, 0 where ``hidden``; memory of one matrix ``[B, n, H, S]`` at a time."""

    @staticmethod
    def forward(ctx, q, keys, weights, p, hidden):  # type: ignore[no-untyped-def]
        scores = _IndexLoss._hits(q, keys).mul_(wide(weights).unsqueeze(-1)).sum(2)
        log_q = scores.masked_fill_(hidden, -1e30).log_softmax(-1)
        ctx.save_for_backward(q, keys, weights, p, log_q)
        return (torch.xlogy(p, p) - p * log_q).sum(-1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, keys, weights, p, log_q = ctx.saved_tensors
        by_score = ((log_q.exp() * p.sum(-1, keepdim=True) - p) * grad.unsqueeze(-1)).unsqueeze(2)
        hits = _IndexLoss._hits(q, keys)
        by_weight = (hits * by_score).sum(-1)
        by_dot = ((hits > 0) * by_score * wide(weights).unsqueeze(-1)).to(q.dtype).flatten(1, 2)
        by_q = (by_dot @ keys).view(q.shape)
        by_key = by_dot.transpose(1, 2) @ q.flatten(1, 2)
        return by_q, by_key, by_weight.to(weights.dtype), None, None

    @staticmethod
    def _hits(q: Tensor, keys: Tensor) -> Tensor:
        """``relu(q_h . k)``: ``[B, n, H, S]``."""
        dots = q.flatten(1, 2) @ keys.transpose(1, 2)
        return wide(dots.view(*q.shape[:3], -1)).relu_()


def _row_attention(
    q: Tensor,
    near: Tensor,
    rows: Tensor,
    hidden: Tensor,
    sink: Tensor,
    width: int,
    scale: float,
) -> Tensor:
    """The attention ``[B, n, R]`` of all heads on each of ``rows``, summed, then normalised to 1.

    ``near [B, S, D]`` ends with the entries of the queries themselves; ``hidden`` as for ``rows``.
    """
    b, n, heads, _ = q.shape
    keys = torch.cat((near, rows), 1).to(q.dtype)
    outside = _outside_window(n, near.shape[1], near.shape[1] - n, width, q.device)
    outside = outside.expand(*hidden.shape[:-1], -1)
    scores = wide((q.flatten(1, 2) @ keys.transpose(1, 2)).view(b, n, heads, -1)) * scale
    scores = scores.masked_fill_(torch.cat((outside, hidden), -1).unsqueeze(-2), -torch.inf)
    logits = wide(sink).unsqueeze(1).expand(b, n, -1, 1)
    p = torch.cat((scores, logits), -1).softmax(-1)[..., near.shape[1] : -1].sum(2)
    return p / p.sum(-1, keepdim=True).clamp_min(1e-30)


# ---------------------------------------------------------------- attention


def attention(
    q: Tensor,
    window: Tensor,
    rows: Rows | None,
    chosen: Tensor | None,
    sink: Tensor,
    *,
    start: int,
    ratio: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Attention of ``q [B, T, H, D]`` (positions ``start``...) over window and compressed rows.

    ``window [B, P + T, D]``: the entries of the last P <= width - 1 earlier tokens and of the
    new ones; a query sees the last ``width`` up to itself. ``rows [B, R, D]``: compressed
    entries; a query at position t sees those ``< (t + 1) // ratio``, or, where ``chosen
    [B, T, k]`` is given, the ones listed (-1: none). Keys are the values. One softmax over both,
    with ``sink [H]`` (one logit per head) in the denominator only. Returns ``[B, T, H, D]``.
    """
    rows = None if rows is None else dense(rows)
    blocks = query_blocks(q, window, rows, chosen, start, ratio, width)
    if q.requires_grad:
        trained: Tensor = TrainedAttention.apply(  # type: ignore[no-untyped-call]
            q, window, rows, sink, list(blocks), scale, dtype, attention_weights, score_gradient
        )
        return trained
    out = []
    for block in blocks:
        qs, near = q[:, block.queries], window[:, block.near]
        if block.sparse:
            assert rows is not None and chosen is not None
            out.append(_gathered(qs, near, rows, chosen[:, block.queries], sink,
                                 block.first, width, scale, dtype))
        else:
            keys = near if rows is None else torch.cat((near, rows[:, block.far]), 1)
            out.append(_softmax_attention(qs, keys, block.hidden, sink, scale, dtype))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


class _Block(NamedTuple):
    """Some successive queries and the keys among which they find all that they may see."""

    queries: slice
    near: slice  # of the window
    first: int  # place in it of the first query's own entry
    far: slice | Tensor  # of the compressed rows
    hidden: Tensor | None  # [n, S] or [B, n, S]: what a query may not see of near and far
    sparse: bool  # each query sees few of the rows, other ones


def query_blocks(
    q: Tensor, window: Tensor, rows: Tensor | None, chosen: Tensor | None,
    start: int, ratio: int, width: int,
) -> Iterator[_Block]:
    earlier, device = window.shape[1] - q.shape[1], q.device
    few = chosen is not None and rows is not None and rows.shape[1] > 4 * chosen.shape[2]
    few = few and not q.requires_grad  # where a masked product is faster
    step = 16 if few else QUERY_BLOCK
    for a in range(0, q.shape[1], step):
        n = min(step, q.shape[1] - a)
        queries, begin = slice(a, a + n), max(0, a + earlier - width + 1)
        near, first = slice(begin, a + n + earlier), a + earlier - begin
        hidden = None
        if n > 1:
            hidden = _outside_window(n, near.stop - begin, first, width, device)
        if rows is None:
            yield _Block(queries, near, first, slice(0), hidden, False)
            continue
        count = (start + a + n) // ratio
        far: slice | Tensor = slice(count)
        mask = None
        if chosen is None or count <= chosen.shape[2]:
            if n > 1:
                mask = _hidden_rows(None, start + a, n, ratio, count, q)
        elif n == 1 and q.shape[0] == 1:
            far = chosen[0, a]  # more rows than k, so none is missing
        elif few:
            yield _Block(queries, near, first, far, None, True)
            continue
        else:
            mask = _hidden_rows(chosen[:, queries], start + a, n, ratio, count, q)
        if hidden is not None and mask is not None:
            hidden = torch.cat((hidden.expand(*mask.shape[:-1], -1), mask), -1)
        yield _Block(queries, near, first, far, hidden, False)


def _hidden_rows(
    chosen: Tensor | None, start: int, queries: int, ratio: int, count: int, like: Tensor
) -> Tensor:
    """``[queries, count]``, or ``[B, queries, count]`` of ``chosen``: True where the query at
    ``start + i`` does not attend to compressed row j."""
    if chosen is None:
        seen = visible_rows(start, queries, ratio, like.device)
        return torch.arange(count, device=like.device) >= seen[:, None]
    mask = torch.ones(*chosen.shape[:2], count + 1, dtype=torch.bool, device=like.device)
    return mask.scatter_(2, chosen.where(chosen >= 0, count), False)[..., :count]


def _outside_window(
    queries: int, keys: int, first: int, width: int, device: torch.device
) -> Tensor:
    """``[queries, keys]``: True where key j is not among the ``width`` up to ``first + i``."""
    distance = torch.arange(first, first + queries, device=device)[:, None]
    distance = distance - torch.arange(keys, device=device)
    return (distance < 0) | (distance >= width)


def _softmax_attention(
    q: Tensor, keys: Tensor, hidden: Tensor | None, sink: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """Queries ``[B, n, H, D]`` over ``keys [B, S, D]``; ``hidden [n, S]`` or ``[B, n, S]``.

    Scores and sums are float32, and only the weights ``exp(score - max)`` are rounded to
    ``dtype`` before they meet the values, as in the reference.
    """
    b, n, h, d = q.shape
    keys = wide(keys)
    scores = attention_scores(wide(q), keys, scale)
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(-2), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    e = scores.sub_(top).exp_()
    total = e.sum(-1, keepdim=True).add_((wide(sink).unsqueeze(1) - top).exp_())
    out = torch.bmm(wide(e.to(dtype)).flatten(1, 2), keys).view(b, n, h, d)
    return out.div_(total).to(dtype)


def attention_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Of queries ``[B, n, H, D]`` for ``keys [B, S, D]``: ``[B, n, H, S]``."""
    b, n, h, _ = q.shape
    return torch.baddbmm(
        q.new_zeros(1), q.flatten(1, 2), keys.transpose(1, 2), beta=0, alpha=scale
    ).view(b, n, h, -1)


def attention_weights(
    q: Tensor, keys: Tensor, hidden: Tensor | None, sink: Tensor, scale: float
) -> Tensor:
    """Of queries ``[B, n, H, D]`` for ``keys [B, 1 + S, D]``: ``[B, n * H, 1 + S]``."""
    scores = attention_scores(q, keys, scale)
    scores[..., 0] = sink
    if hidden is not None:
        scores[..., 1:].masked_fill_(hidden.unsqueeze(-2), -torch.inf)
    high = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(scores.flatten(1, 2), -1, dtype=high).to(q.dtype)


def score_gradient(
    p: Tensor, g: Tensor, keys: Tensor, out: Tensor, scale: float, heads: int
) -> tuple[Tensor, Tensor]:
    """Of products ``q . keys``, and of the sinks; ``g [B, n * H, D]`` is that of ``out``."""
    dot = (wide(g) * wide(out)).sum(-1, keepdim=True)
    ds = torch.bmm(g, keys.transpose(1, 2)).sub_(dot.to(g.dtype)).mul_(p)
    return ds * scale, wide(ds[..., 0]).view(-1, heads).sum(0)


def packed_attention(
    q: Tensor, kv: Tensor, rows: Sequence[Tensor | None], chosen: Sequence[Tensor | None],
    sink: Tensor, packing: Packing, *, ratio: int, width: int, scale: float, dtype: torch.dtype,
    attention: Callable[..., Tensor] = attention,
) -> Tensor:
    """``attention`` within each sample of a packed row: ``q [1, N, H, D]``, ``kv [1, N, D]``.

    ``rows [B, R, D]`` and ``chosen [B, T, k]`` are those of each of the packing's batches."""
    outs = [
        attention(
            *batch, sink, start=0, ratio=ratio, width=width, scale=scale, dtype=dtype
        )
        for batch in zip(packing.split(q), packing.split(kv), rows, chosen, strict=True)
    ]
    return packing.join(outs)


class TrainedAttention(torch.autograd.Function):
    """``_softmax_attention`` of all blocks with its backward, which computes the weights again.

    A zero key stands for the sink: its score is the sink's logit, its value nothing. ``weigh`` and
    ``weigh_back`` are ``attention_weights`` and ``score_gradient``, or do the same.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q, window, rows, sink, blocks, scale, dtype, weigh, weigh_back
    ):
        q, window = q.to(dtype), window.to(dtype)
        out = torch.empty_like(q)
        for block in blocks:
            qs, keys = q[:, block.queries], _with_sink(window, rows, block)
            p = weigh(qs, keys, block.hidden, sink, scale)
            out[:, block.queries] = torch.bmm(p, keys).view_as(qs)
        ctx.save_for_backward(q, window, rows, sink, out)
        ctx.blocks, ctx.scale, ctx.weigh, ctx.weigh_back = blocks, scale, weigh, weigh_back
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, window, rows, sink, out = ctx.saved_tensors
        high = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dwindow = torch.zeros_like(window, dtype=high)
        drows = None if rows is None else torch.zeros_like(rows, dtype=high)
        dsink = torch.zeros_like(sink, dtype=high)
        for block in ctx.blocks:
            qs, keys = q[:, block.queries], _with_sink(window, rows, block)
            p = ctx.weigh(qs, keys, block.hidden, sink, ctx.scale)
            g = grad[:, block.queries].to(q.dtype).flatten(1, 2)
            got = out[:, block.queries].flatten(1, 2)
            ds, more = ctx.weigh_back(p, g, keys, got, ctx.scale, len(sink))
            dsink += more
            dq[:, block.queries] = torch.bmm(ds, keys).view_as(qs)
            dkeys = torch.bmm(ds.transpose(1, 2), qs.flatten(1, 2))
            dkeys = torch.baddbmm(dkeys, p.transpose(1, 2), g)[:, 1:]
            size = block.near.stop - block.near.start
            dwindow[:, block.near] += dkeys[:, :size]
            if drows is not None:
                drows[:, block.far] += dkeys[:, size:]
        drows = None if drows is None else drows.to(rows.dtype)
        return (dq, dwindow.to(window.dtype), drows, dsink.to(sink.dtype), *[None] * 5)


def _with_sink(window: Tensor, rows: Tensor | None, block: _Block) -> Tensor:
    """A zero key, then the keys of a block: ``[B, 1 + S, D]``."""
    near = window[:, block.near]
    parts = [near.new_zeros(near.shape[0], 1, near.shape[2]), near]
    if rows is not None:
        parts.append(rows[:, block.far].to(near.dtype))
    return torch.cat(parts, 1)


def _gathered(
    q: Tensor,
    near: Tensor,
    rows: Tensor,
    chosen: Tensor,
    sink: Tensor,
    first: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Like ``_softmax_attention`` when few of many rows are chosen: each query has its own."""
    b, n = chosen.shape[:2]
    picked = chosen.clamp_min(0).flatten(1).unsqueeze(-1).expand(-1, -1, rows.shape[2])
    mine = wide(rows.gather(1, picked).view(b, n, -1, rows.shape[2]))
    qf, near = wide(q), wide(near)
    outside = _outside_window(n, near.shape[1], first, width, q.device)
    to_near = torch.einsum("bnhd,bsd->bnhs", qf, near) * scale
    to_near = to_near.masked_fill(outside.unsqueeze(1), -torch.inf)
    to_mine = torch.einsum("bnhd,bnsd->bnhs", qf, mine) * scale
    to_mine = to_mine.masked_fill((chosen < 0).unsqueeze(2), -torch.inf)
    scores = torch.cat((to_near, to_mine), -1)
    top = scores.amax(-1, keepdim=True)
    e = (scores - top).exp()
    total = e.sum(-1, keepdim=True) + (wide(sink)[:, None] - top).exp()
    p_near, p_mine = wide(e.to(dtype)).split((near.shape[1], mine.shape[2]), -1)
    out = torch.einsum("bnhs,bsd->bnhd", p_near, near)
    return ((out + torch.einsum("bnhs,bnsd->bnhd", p_mine, mine)) / total).to(dtype)


# ---------------------------------------------------------------- experts


class Stored(NamedTuple):
    """One weight as stored: codes or floats, and its scales if it is quantised."""

    weight: Tensor
    scale: Tensor | None


class Matrices(Protocol):
    """One matrix of each expert; a list will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int, /) -> Stored: ...


def route(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[N, E]`` of the router's ``logits [N, E]``, experts and their weights ``[N, K]``.

    Scores are ``sqrt(softplus(logits))``. The experts are ``chosen [N, K]``, or the ``k`` with the
    highest score + ``bias [E]``; their weights are their scores, made to sum to one with
    ``normalize``, times ``scale``.
    """
    scores = F.softplus(logits).sqrt()
    if chosen is None:
        assert bias is not None
        chosen = (scores.detach() + bias).topk(k, -1).indices
    weights = scores.gather(-1, chosen)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return scores, chosen, weights * scale


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype | None = None) -> Tensor:
    """``silu(min(gate, limit)) * clamp(up, -limit, limit)`` in float32, rounded to ``dtype``."""
    gate, up = wide(gate), wide(up)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up).to(dtype or gate.dtype)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``x`` times a number."""
    return x * factor


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``x + y`` in float32 (float64 if one is), as ``dtype``; ``y`` may have one row for all of
    ``x``'s last but one dimension."""
    return (wide(x) + wide(y)).to(dtype)


def routed_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Matrices,
    w2: Matrices,
    w3: Matrices,
    limit: float,
    round_activations: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The routed experts of ``x [N, d]``: float32 ``[N, d]``.

    ``ids [N, K]`` and ``weights [N, K]`` say which experts a row goes to; ``w1`` (gate), ``w3``
    (up), ``w2`` (down) hold all E experts. A weight enters before the down projection, each used
    expert is touched once. ``x`` is taken as it is; ``round_activations``: FP8 rounding before the
    down projection.
    """
    if x.shape[0] == 1 and not x.requires_grad:
        return _one_row(x, ids[0].tolist(), weights[0], w1, w2, w3, limit, round_activations, dtype)
    mm = matmul_dtype(dtype)
    k = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=len(w1)).tolist()
    rows = order // k
    xs = x.to(mm).index_select(0, rows).split(counts)
    ws = weights.flatten().index_select(0, order).unsqueeze(1).split(counts)
    parts = []
    for e, n in enumerate(counts):
        if n == 0:
            continue
        gate = matmul(xs[e], dequantize(*w1[e], mm)).to(dtype)
        up = matmul(xs[e], dequantize(*w3[e], mm)).to(dtype)
        act = (ws[e] * swiglu(gate, up, limit)).to(dtype)
        if round_activations:
            act = fp8_round(act)
        parts.append(matmul(act.to(mm), dequantize(*w2[e], mm)).to(dtype))
    done = wide(torch.cat(parts))
    return done.new_zeros(x.shape).index_add(0, rows, done)


def _one_row(
    x: Tensor,
    ids: list[int],
    weights: Tensor,
    w1: Matrices,
    w2: Matrices,
    w3: Matrices,
    limit: float,
    round_activations: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``routed_experts`` for a single row: the chosen experts as one batch of stored bytes."""

    def batch(table: list[Stored]) -> Tensor:
        codes = torch.stack([t.weight for t in table])
        scales = [t.scale for t in table if t.scale is not None]
        return dequantize(codes, torch.stack(scales) if scales else None)

    both = batch([w1[e] for e in ids] + [w3[e] for e in ids])
    hidden = F.linear(x.float(), both.flatten(0, 1)).to(dtype).view(2, len(ids), -1)
    act = (weights.unsqueeze(1) * swiglu(hidden[0], hidden[1], limit)).to(dtype)
    if round_activations:
        act = fp8_round(act)
    down = zip(batch([w2[e] for e in ids]), act.float(), strict=True)
    out = torch.stack([torch.mv(weight, row) for weight, row in down])
    return out.to(dtype).float().sum(0, keepdim=True)


# ---------------------------------------------------------------- checksums


def checksum(data: Tensor) -> int:
    """128 bits that change with any change of one word, or of two, of a tensor's bytes, and hardly
    ever stay the same after others: the sum of its words of 32 bits, and above it their sum with
    weights: 16 times the rows of sixteen words that are left, this one included, and the place in
    the row. Zeros fill the last row."""
    stored = data.detach().contiguous().reshape(-1).view(torch.uint8)
    rows = torch.zeros(-(-len(stored) // 64) * 64, dtype=torch.uint8)
    rows[: len(stored)] = stored
    words = (rows.view(torch.int32).to(torch.int64) & 0xFFFFFFFF).view(-1, 16)
    left = torch.arange(len(words), 0, -1).unsqueeze(-1)
    weights = 16 * left + torch.arange(16)
    most = 1 << 64
    return int((words * weights).sum()) % most << 64 | int(words.sum()) % most
