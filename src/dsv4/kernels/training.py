"""mHC and compressors with a gradient, in C++: the same as the reference and its backward, fused.

Each operation reads its tensors once, keeps only what it was given, and computes the rest again
backwards. Results are those of the reference up to rounding; gates and sums are float32. What the
library does not take (another dtype, device or number of streams) goes to the reference, and what
has no gradient to ``native``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Packing
from . import _native, native, reference
from .reference import Matrices
from .rows import Rows, dense

STREAMS = 4
CHUNK = 32  # rows that a task of the library takes
LOGITS_AT_ONCE = 1 << 22  # of a loss
KERNELS = (  # what is here and in the table
    "hc_read", "hc_expand", "hc_head", "sinkhorn", "compress", "rms_norm", "norm_rope", "rope",
    "swiglu", "routed_experts", "attention", "packed_attention", "cross_entropy",
)  # fmt: skip
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
        return native.hc_read(streams, fn, scale, base, eps, norm_eps, dtype)
    x, logits = _Read.apply(  # type: ignore[no-untyped-call]
        streams, fn, scale[0], base[:STREAMS], eps, norm_eps
    )
    _, post, comb = reference.hc_gates(logits, scale, base, eps)
    return x, post, comb


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ``reference.hc_head``."""
    trained = streams.requires_grad and dtype == streams.dtype and streams.shape[-2] == STREAMS
    if not trained or not _native_takes(streams):
        return native.hc_head(streams, fn, scale, base, eps, norm_eps, dtype)
    x: Tensor
    x, _ = _Read.apply(  # type: ignore[no-untyped-call]
        streams, fn, scale[0], base, eps, norm_eps
    )
    return x


def hc_expand(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ``reference.hc_expand``."""
    trained = streams.requires_grad and out.dtype == streams.dtype and post.shape[-1] == STREAMS
    if not trained or not _native_takes(streams, out):
        return native.hc_expand(out, streams, post, comb)
    fresh: Tensor = _Expand.apply(out, streams, post, comb)  # type: ignore[no-untyped-call]
    return fresh


def compress(kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool) -> Tensor:
    """See ``reference.compress``."""
    if not kv.requires_grad or kv.shape[1] < ratio or not _native_takes(kv, gate):
        whole = reference.whole_blocks(kv, gate, bias, ratio, overlap)
        return native.pool(*whole, ratio, overlap).to(kv.dtype)
    entries: Tensor = _Compress.apply(  # type: ignore[no-untyped-call]
        kv, gate, bias, ratio, overlap
    )
    return entries


def sinkhorn(comb: Tensor, iters: int, eps: float) -> Tensor:
    """See ``reference.sinkhorn``."""
    if not comb.requires_grad or comb.dtype != torch.float32 or comb.shape[-1] != STREAMS:
        return native.sinkhorn(comb, iters, eps)
    out: Tensor = _Sinkhorn.apply(comb, iters, eps)  # type: ignore[no-untyped-call]
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    trained = x.requires_grad or (weight is not None and weight.requires_grad)
    if weight is None or not trained or not _native_takes(x):
        return native.rms_norm(x, weight, eps)
    out: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def attention(
    q: Tensor, window: Tensor, rows: Rows | None, chosen: Tensor | None, sink: Tensor, *,
    start: int, ratio: int, width: int, scale: float, dtype: torch.dtype,
) -> Tensor:
    """See ``reference.attention``."""
    if not q.requires_grad or not _native_takes(q) or q.dtype != dtype:
        return native.attention(
            q, window, rows, chosen, sink, start=start, ratio=ratio, width=width, scale=scale,
            dtype=dtype,
        )
    rows = None if rows is None else dense(rows)
    blocks = reference.query_blocks(q, window, rows, chosen, start, ratio, width)
    out: Tensor = reference.TrainedAttention.apply(  # type: ignore[no-untyped-call]
        q, window, rows, sink, list(blocks), scale, dtype, _weigh, _weigh_back
    )
    return out


def packed_attention(
    q: Tensor, kv: Tensor, rows: Sequence[Tensor | None], chosen: Sequence[Tensor | None],
    sink: Tensor, packing: Packing, *, ratio: int, width: int, scale: float, dtype: torch.dtype,
) -> Tensor:
    """See ``reference.packed_attention``. With tiles nothing is moved: the row is read as it is."""
    heads, dim = q.shape[2:]
    typed = all(x is None or x.dtype == dtype == torch.bfloat16 for x in (q, kv, *rows))
    fits = dim % 32 == 0 and heads in (1, 2, 4, 8, 16, 32, 64, 128)
    if not (typed and fits and _native_takes(q) and _native.train_attends()):
        return reference.packed_attention(
            q, kv, rows, chosen, sink, packing, ratio=ratio, width=width, scale=scale, dtype=dtype,
            attention=attention,
        )
    out: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        q, kv, sink, packing, chosen, ratio, width, scale, *rows
    )
    return out


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See ``reference.cross_entropy``. Logits are made a part at a time, and again for the
    gradient: they are never whole."""
    if x.dtype not in TYPES or x.device.type != "cpu":
        return reference.cross_entropy(x, weight, targets)
    losses: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, max(16, LOGITS_AT_ONCE // weight.shape[0])
    )
    return losses


def norm_rope(x: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """See ``reference.norm_rope``."""
    if not x.requires_grad or not _turns(x, rotation.unsqueeze(-3)):
        return native.rope(native.rms_norm(x, None, eps), rotation.unsqueeze(-3))
    out: Tensor = _NormRope.apply(x, rotation, eps)  # type: ignore[no-untyped-call]
    return out


def rope(x: Tensor, rotation: Tensor, inverse: bool = False) -> Tensor:
    """See ``reference.rope``."""
    if not x.requires_grad or not _turns(x, rotation):
        return native.rope(x, rotation, inverse)
    out: Tensor = _Rope.apply(x, rotation, inverse)  # type: ignore[no-untyped-call]
    return out


def _turns(x: Tensor, rotation: Tensor) -> bool:
    """``x`` is ``[B, T, D]`` with a rotation ``[T, W, 2]``, or ``[B, T, H, D]`` and
    ``[T, 1, W, 2]``; the vectors of the rotation are whole."""
    fits = rotation.shape[:-2] == (x.shape[1:2] if x.dim() == 3 else (x.shape[1], 1))
    return fits and rotation.shape[-2] % 8 == 0 and _native_takes(x)


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype | None = None) -> Tensor:
    """See ``reference.swiglu``."""
    if not gate.requires_grad or not _native_takes(gate, up) or dtype not in (None, gate.dtype):
        return native.swiglu(gate, up, limit, dtype)
    act: Tensor = _SwiGLU.apply(gate, up, limit)  # type: ignore[no-untyped-call]
    return act


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
    """See ``reference.routed_experts``. Without a gradient it is ``native.routed_experts``."""
    if not torch.is_grad_enabled() or not x.requires_grad:
        return native.routed_experts(
            x, ids, weights, w1, w2, w3, limit, round_activations, dtype
        )
    gates, ups, downs = ([table[e].weight for e in range(len(w1))] for table in (w1, w3, w2))
    if round_activations or not _native_takes(x, gates[0].T) or x.dtype != dtype:
        return reference.routed_experts(
            x, ids, weights, w1, w2, w3, limit, round_activations, dtype
        )
    out: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x, ids, weights, limit, *gates, *ups, *downs
    )
    return out


class _Sinkhorn(torch.autograd.Function):
    """Doubly stochastic matrices; the rounds are computed again backwards."""

    @staticmethod
    def forward(ctx: Any, comb, iters, eps):  # type: ignore[no-untyped-def]
        comb = comb.contiguous()
        out = torch.empty_like(comb)
        ctx.settings = iters, eps
        _native.train_sinkhorn(
            comb.data_ptr(), comb.numel() // STREAMS**2, iters, eps, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(comb)
        return out

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        (comb,) = ctx.saved_tensors
        out, grad = torch.empty_like(comb), grad.contiguous()
        iters, eps = ctx.settings
        _native.train_sinkhorn_back(
            comb.data_ptr(), grad.data_ptr(), comb.numel() // STREAMS**2, iters, eps,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out, None, None


def _heads(x: Tensor, rotation: Tensor) -> tuple[bool, int, int, int, int, int, int]:
    """How the library is told of heads to turn: see ``norm_rope`` in training_module.cpp."""
    rows, heads = x.shape[0] * x.shape[1], x.shape[2] if x.dim() == 4 else 1
    return (
        _bf16(x), rows, heads, x.shape[-1], rotation.data_ptr(), x.shape[1], rotation.shape[-2]
    )  # fmt: skip


class _Norm(torch.autograd.Function):
    """RMSNorm with a learned weight."""

    @staticmethod
    def forward(ctx: Any, x, weight, eps):  # type: ignore[no-untyped-def]
        x, typed, out = x.contiguous(), weight.float().contiguous(), torch.empty_like(x)
        _native.train_norm(
            *_at(x), *_rows(x), typed.data_ptr(), eps, out.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx, grad, typed = torch.empty_like(x), grad.contiguous(), weight.float().contiguous()
        rows, d = _rows(x)
        dweights = torch.zeros(-(-rows // CHUNK), d)
        _native.train_norm_back(
            x.data_ptr(), grad.data_ptr(), _bf16(x), rows, d, typed.data_ptr(), ctx.eps,
            dx.data_ptr(), dweights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dweights.sum(0).to(weight.dtype), None


def _weigh(
    q: Tensor, keys: Tensor, hidden: Tensor | None, sink: Tensor, scale: float
) -> Tensor:
    """See ``reference.attention_weights``."""
    scores = reference.attention_scores(q, keys, scale)
    mask, step = 0, 0
    if hidden is not None:
        hidden = F.pad(hidden, (1, 0))  # the sink's place
        mask, step = hidden.data_ptr(), hidden[0].numel() if hidden.dim() == 3 else 0
    sink = sink.float().contiguous()
    b, n, h, places = scores.shape
    _native.train_weigh(
        *_at(scores), b, n, h, places, mask, step, sink.data_ptr(), torch.get_num_threads()
    )
    return scores.flatten(1, 2)


def _weigh_back(
    p: Tensor, g: Tensor, keys: Tensor, out: Tensor, scale: float, heads: int
) -> tuple[Tensor, Tensor]:
    """See ``reference.score_gradient``."""
    g, out = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (g, out))
    ds = torch.bmm(g, keys.transpose(1, 2))
    batches, rows, width = ds.shape
    dots, dsinks = torch.empty(batches, rows), torch.empty(batches * rows // heads, heads)
    threads = torch.get_num_threads()
    _native.train_row_dots(
        g.data_ptr(), out.data_ptr(), _bf16(g), batches, rows, g.stride(0), out.stride(0),
        g.shape[2], dots.data_ptr(), threads,
    )
    _native.train_weigh_back(
        ds.data_ptr(), p.data_ptr(), _bf16(ds), batches * rows, width, dots.data_ptr(), scale,
        dsinks.data_ptr(), threads,
    )
    return ds, dsinks.sum(0)


class _PackedAttention(torch.autograd.Function):
    """Scores are computed again backwards; of the forward pass their log sums are kept."""

    @staticmethod
    def samples(
        packing: Packing, ratio: int, rows: Sequence[Tensor | None],
        drows: Sequence[Tensor | None], chosen: Sequence[Tensor | None],
    ) -> Tensor:
        """How the library is told of samples: see ``Samples`` in training_module.cpp."""
        table = []
        for members, entries, grads, picks in zip(
            packing.members, rows, drows, chosen, strict=True
        ):
            for i, sample in enumerate(members):
                tokens = packing.lengths[sample]
                count = 0 if entries is None else min(entries.shape[1], tokens // ratio)
                table.append([
                    packing.starts[sample], tokens, count, 0 if picks is None else picks.shape[2],
                    *(0 if x is None or count == 0 else x[i].data_ptr()
                      for x in (entries, grads, picks)),
                ])  # fmt: skip
        return torch.tensor(table)

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q, kv, sink, packing, chosen, ratio, width, scale, *rows
    ):
        q, kv, sink = q.contiguous(), kv.contiguous(), sink.float().contiguous()
        heads, dim = q.shape[2:]
        entries = [r if r is None else r.contiguous() for r in rows]
        chosen = [c if c is None else c.contiguous() for c in chosen]
        out, log_sum = torch.empty_like(q), torch.empty(q.shape[:3])
        samples = _PackedAttention.samples(packing, ratio, entries, [None] * len(rows), chosen)
        _native.train_attend(
            q.data_ptr(), kv.data_ptr(), sink.data_ptr(), heads, dim, width, scale,
            out.data_ptr(), log_sum.data_ptr(), samples.data_ptr(), len(samples), ratio,
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(q, kv, sink, out, log_sum, *entries, *chosen)
        ctx.settings = packing, ratio, width, scale
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, kv, sink, out, log_sum, *others = ctx.saved_tensors
        rows, chosen = others[: len(others) // 2], others[len(others) // 2 :]
        packing, ratio, width, scale = ctx.settings
        heads, dim = q.shape[2:]
        drows = [r if r is None else torch.zeros_like(r) for r in rows]
        samples = _PackedAttention.samples(packing, ratio, rows, drows, chosen)
        grad, dq, dkv = grad.contiguous(), torch.empty_like(q), torch.empty_like(kv)
        dsinks = torch.empty(len(samples), len(sink))
        _native.train_attend_back(
            q.data_ptr(), kv.data_ptr(), sink.data_ptr(), heads, dim, width, scale,
            out.data_ptr(), log_sum.data_ptr(), samples.data_ptr(), len(samples), ratio,
            grad.data_ptr(), dq.data_ptr(), dkv.data_ptr(), dsinks.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return dq, dkv, dsinks.sum(0), *[None] * 5, *drows


class _CrossEntropy(torch.autograd.Function):
    """Losses from logits as the matrix product leaves them, ``rows`` at a time."""

    @staticmethod
    def forward(ctx: Any, x, weight, targets, rows):  # type: ignore[no-untyped-def]
        typed, total, hit = weight.to(x.dtype), torch.empty(len(x)), torch.empty(len(x))
        for at in range(0, len(x), rows):
            part = slice(at, at + rows)
            logits = F.linear(x[part], typed)
            _native.train_log_sums(
                logits.data_ptr(), _bf16(x), len(logits), logits.shape[1], total[part].data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
            hit[part] = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1).float()
        ctx.save_for_backward(x, weight, targets, total)
        ctx.rows = rows
        return total - hit

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        x, weight, targets, total = ctx.saved_tensors
        typed, dx, grad = weight.to(x.dtype), torch.empty_like(x), grad.float().contiguous()
        dweight = torch.zeros(weight.shape)
        for at in range(0, len(x), ctx.rows):
            part = slice(at, at + ctx.rows)
            logits, wanted = F.linear(x[part], typed), targets[part].contiguous()
            _native.train_shares(
                logits.data_ptr(), _bf16(x), len(logits), logits.shape[1], total[part].data_ptr(),
                wanted.data_ptr(), grad[part].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            torch.mm(logits, typed, out=dx[part])
            dweight += logits.T @ x[part]
        return dx, dweight.to(weight.dtype), None, None


class _NormRope(torch.autograd.Function):
    """The heads of a query: normalised, then turned."""

    @staticmethod
    def forward(ctx: Any, x, rotation, eps):  # type: ignore[no-untyped-def]
        x, rotation = x.contiguous(), rotation.contiguous()
        out = torch.empty_like(x)
        _native.train_norm_rope(
            x.data_ptr(), *_heads(x, rotation), True, False, eps, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, rotation)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        x, rotation = ctx.saved_tensors
        dx, grad = torch.empty_like(x), grad.contiguous()
        _native.train_norm_rope_back(
            x.data_ptr(), grad.data_ptr(), *_heads(x, rotation), ctx.eps, dx.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return dx, None, None


class _Rope(torch.autograd.Function):
    """A rotation; its gradient is turned the other way."""

    @staticmethod
    def turned(x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        _native.train_norm_rope(
            x.data_ptr(), *_heads(x, rotation), False, inverse, 0.0, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    @staticmethod
    def forward(ctx: Any, x, rotation, inverse):  # type: ignore[no-untyped-def]
        rotation = rotation.contiguous()
        ctx.save_for_backward(rotation)
        ctx.inverse = inverse
        return _Rope.turned(x, rotation, inverse)

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        (rotation,) = ctx.saved_tensors
        return _Rope.turned(grad, rotation, not ctx.inverse), None, None


class _SwiGLU(torch.autograd.Function):
    """The shared expert's, where every row counts once."""

    @staticmethod
    def forward(ctx: Any, gate, up, limit):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        act, (rows, width) = torch.empty_like(gate), _rows(gate)
        ones = torch.ones(rows)
        _native.train_swiglu(
            gate.data_ptr(), up.data_ptr(), _bf16(gate), rows, width, ones.data_ptr(), limit,
            act.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return act

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        dgate, dup, grad = torch.empty_like(gate), torch.empty_like(up), grad.contiguous()
        rows, width = _rows(gate)
        ones, unused = torch.ones(rows), torch.empty(rows)
        _native.train_swiglu_back(
            gate.data_ptr(), up.data_ptr(), grad.data_ptr(), _bf16(gate), rows, width,
            ones.data_ptr(), ctx.limit, dgate.data_ptr(), dup.data_ptr(), unused.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return dgate, dup, None


class _Experts(torch.autograd.Function):
    """All routed experts: rows in the order of experts, what a used one needs from each product.

    An expert's rows are filled up to a multiple of 16 (see ``reference.matmul``) with copies of
    row 0 of weight 0.
    """

    @staticmethod
    def forward(ctx: Any, x, ids, weights, limit, *matrices):  # type: ignore[no-untyped-def]
        experts, k = len(matrices) // 3, ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=experts).tolist()
        used, cut, places, begin = [], 0, [], 0
        for e, n in enumerate(counts):
            if n:
                used.append((e, cut, cut + n + -n % 16))
                places.append(torch.arange(cut, cut + n))
                cut, begin = used[-1][2], begin + n
        place = torch.cat(places)  # of each sorted pair
        rows = torch.zeros(cut, dtype=torch.int64).index_copy_(0, place, order // k)
        share = torch.zeros(cut).index_copy_(0, place, weights.flatten().float()[order])
        xs = x.index_select(0, rows)
        typed = [m.to(x.dtype) for m in matrices]
        gates, ups, downs = typed[:experts], typed[experts : 2 * experts], typed[2 * experts :]
        width = gates[0].shape[0]
        gate, up, act = (x.new_empty(cut, width) for _ in range(3))
        for e, a, b in used:
            torch.mm(xs[a:b], gates[e].T, out=gate[a:b])
            torch.mm(xs[a:b], ups[e].T, out=up[a:b])
        _native.train_swiglu(
            gate.data_ptr(), up.data_ptr(), _bf16(x), cut, width, share.data_ptr(), limit,
            act.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        down = torch.empty_like(xs)
        for e, a, b in used:
            torch.mm(act[a:b], downs[e].T, out=down[a:b])
        pairs = down.index_select(0, place).float()
        out = torch.zeros(x.shape).index_add_(0, order // k, pairs)
        ctx.save_for_backward(xs, gate, up, act, share, rows, place, order, *typed)
        ctx.used, ctx.limit, ctx.k, ctx.dtypes = used, limit, k, [m.dtype for m in matrices]
        ctx.rows = x.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        xs, gate, up, act, share, rows, place, order, *typed = ctx.saved_tensors
        experts = len(typed) // 3
        gates, ups, downs = typed[:experts], typed[experts : 2 * experts], typed[2 * experts :]
        dy = grad.to(xs.dtype).index_select(0, rows)
        dact = torch.empty_like(act)
        found: list[Tensor | None] = [None] * len(typed)
        for e, a, b in ctx.used:
            torch.mm(dy[a:b], downs[e], out=dact[a:b])
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        dshare = torch.empty_like(share)
        _native.train_swiglu_back(
            gate.data_ptr(), up.data_ptr(), dact.data_ptr(), _bf16(xs), gate.shape[0],
            gate.shape[1], share.data_ptr(), ctx.limit, dgate.data_ptr(), dup.data_ptr(),
            dshare.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        dx = torch.empty_like(xs)
        for e, a, b in ctx.used:
            torch.mm(dgate[a:b], gates[e], out=dx[a:b])
            dx[a:b] += dup[a:b] @ ups[e]
            # the rows that fill up have act = dgate = dup = 0
            found[e] = (dgate[a:b].T @ xs[a:b]).to(ctx.dtypes[e])
            found[experts + e] = (dup[a:b].T @ xs[a:b]).to(ctx.dtypes[experts + e])
            found[2 * experts + e] = (dy[a:b].T @ act[a:b]).to(ctx.dtypes[2 * experts + e])
        pairs = dx.index_select(0, place).float()
        total = torch.zeros(ctx.rows, xs.shape[1]).index_add_(0, order // ctx.k, pairs)
        dweights = torch.empty(len(order)).index_copy_(0, order, dshare[place])
        return total.to(xs.dtype), None, dweights.view(-1, ctx.k), None, *found


class _Read(torch.autograd.Function):
    """Streams -> the site's input and all mixing logits; only ``pre`` is applied here."""

    @staticmethod
    def forward(ctx: Any, streams, fn, scale, base, eps, norm_eps):  # type: ignore[no-untyped-def]
        streams = streams.contiguous()
        rows, d = streams.shape[:-2].numel(), streams.shape[-1]
        flat, threads = streams.view(rows, -1), torch.get_num_threads()
        products = F.linear(flat, fn.to(flat.dtype)).float()
        squares = torch.empty(rows)
        _native.train_hc_squares(*_at(streams), rows, d, squares.data_ptr(), threads)
        root = squares.div_(flat.shape[1]).add_(norm_eps).rsqrt_().unsqueeze(1)
        logits = products * root
        pre = torch.sigmoid(logits[:, :STREAMS] * scale + base).add_(eps)
        x = streams.new_empty(rows, d)
        _native.train_hc_collapse(*_at(streams), rows, d, pre.data_ptr(), x.data_ptr(), threads)
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
        _native.train_hc_dots(
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
        _native.train_hc_collapse_back(
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
        _native.train_hc_expand(
            out.data_ptr(), *_at(streams), *_rows(out), post.data_ptr(), comb.data_ptr(),
            fresh.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(out, streams, post, comb)
        return fresh

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        out, streams, post, comb = ctx.saved_tensors
        grad = grad.contiguous()
        dout, dstreams, dpost, dcomb = map(torch.empty_like, (out, streams, post, comb))
        _native.train_hc_expand_back(
            grad.data_ptr(), out.data_ptr(), *_at(streams), *_rows(out), post.data_ptr(),
            comb.data_ptr(), dout.data_ptr(), dstreams.data_ptr(), dpost.data_ptr(),
            dcomb.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return dout, dstreams, dpost, dcomb


class _Compress(torch.autograd.Function):
    """The entries of whole sequences."""

    @staticmethod
    def forward(ctx: Any, kv, gate, bias, ratio, overlap):  # type: ignore[no-untyped-def]
        kv, gate, bias = kv.contiguous(), gate.contiguous(), bias.float().contiguous()
        dim = kv.shape[2] // (1 + overlap)
        ctx.ratio, ctx.overlap, ctx.dim = ratio, overlap, dim
        entries = kv.new_empty(kv.shape[0], kv.shape[1] // ratio, dim)
        _native.train_pool(
            kv.data_ptr(), gate.data_ptr(), bias.data_ptr(), _bf16(kv), overlap, ratio, dim,
            kv.shape[0], kv.shape[1], entries.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(kv, gate, bias)
        return entries

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        kv, gate, bias = ctx.saved_tensors
        ratio = ctx.ratio
        dkv, dgate = torch.zeros_like(kv), torch.zeros_like(gate)
        _native.train_pool_back(
            kv.data_ptr(), gate.data_ptr(), bias.data_ptr(), _bf16(kv), ctx.overlap, ratio, ctx.dim,
            kv.shape[0], kv.shape[1], grad.contiguous().data_ptr(), dkv.data_ptr(),
            dgate.data_ptr(), torch.get_num_threads(),
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
