"""The kernels in C++ (``native/``), for tensors in the memory of this machine.

Each promises what its reference does, to the rounding of the result, and more: a row's result is
the same bit for bit whatever the other rows, their number, the number of threads and the
instruction set (amx sums in an order of its own). What they do not take (a gradient, another device
or dtype) goes to the reference.

``isas()`` lists the instruction sets that this machine has, best first; ``use`` chooses one, as
does the environment variable DSV4_ISA at import.
"""

from __future__ import annotations

import os
import weakref
from array import array

import torch
from torch import Tensor

from ..errors import ConfigError
from ..quant import E4M3, E8M0
from . import _native, reference
from ._native import stay_awake as stay_awake
from .looking import PACKED
from .reference import Matrices, Span, Stored
from .rows import PagedRows, Rows
from .threads import threads

if not hasattr(_native, "Tape"):
    raise ConfigError(
        "the native kernels were built from older sources than this checkout's",
        hint="make setup (or build them as CONTRIBUTING.md says); DSV4_KERNELS=reference goes on "
        "without them",
    )
FORMATS = {torch.int8: 0, torch.uint8: 0, E4M3: 1, torch.bfloat16: 2, torch.float32: 3}
KERNELS = (
    "linear", "grouped_linear", "head", "routed_experts", "rms_norm", "rope", "fp8_round",
    "hadamard_fp4", "hc_read", "hc_head", "hc_expand", "sinkhorn", "raw_rows", "store", "pool",
    "route", "swiglu", "add", "scaled", "attention", "index_topk", "checksum",
)  # what is here and in the table
BF16, F32 = torch.bfloat16, torch.float32
FP4 = (torch.int8, torch.uint8)  # two codes in each


def isas() -> list[str]:
    """Instruction sets of this machine for which there are kernels, best first."""
    names: list[str] = _native.isas()
    return names


def isa() -> str:
    """The instruction set in use."""
    name: str = _native.isa()
    return name


def use(name: str) -> None:
    """Use another instruction set, in the whole process; ConfigError if this machine lacks it."""
    if name not in isas():
        raise ConfigError("no such instruction set here", expected=" or ".join(isas()), got=name)
    _native.use(name)


# ---------------------------------------------------------------- products


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See ``reference.linear``."""
    if not _takes(x, weight, scale, dtype):
        return reference.linear(x, weight, scale, dtype)
    return _linear(x, weight, scale, dtype, 1)


def grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See ``reference.grouped_linear``."""
    if not _takes(x, weight, scale, dtype):
        return reference.grouped_linear(x, weight, scale, dtype)
    groups = x.shape[-2]
    return _linear(x.flatten(-2), weight, scale, dtype, groups).view(*x.shape[:-1], -1)


def head(x: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.head``."""
    if not _takes(x, weight, None, F32):
        return reference.head(x, weight)
    return _linear(x, weight, None, F32, 1)


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
    """See ``reference.routed_experts``. A row's experts are summed in the order of their numbers.

    The addresses of all matrices are looked up when ``w1`` is first seen.
    """
    table = None if torch.is_grad_enabled() else _table(w1, w2, w3, dtype)
    x = x.to(dtype).contiguous()
    if table is None or not table.takes(x, dtype):
        return reference.routed_experts(
            x, ids, weights, w1, w2, w3, limit, round_activations, dtype
        )
    ids, weights = ids.contiguous(), weights.float().contiguous()
    out = torch.empty(x.shape)
    table.experts.run(
        x.data_ptr(), dtype == BF16, x.shape[0], ids.data_ptr(), weights.data_ptr(), ids.shape[1],
        limit, round_activations, out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def route(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.route``."""
    if not _plain(logits) or logits.dtype != F32 or (bias is not None and bias.dtype != F32):
        return reference.route(logits, bias, chosen, k, normalize, scale)
    rows, experts = logits.shape
    logits, scores, weights = logits.contiguous(), torch.empty(rows, experts), torch.empty(rows, k)
    if chosen is None:
        assert bias is not None
        chosen, bias_address = torch.empty(rows, k, dtype=torch.int64), bias.data_ptr()
    else:
        chosen, bias_address = chosen.contiguous(), 0
    _native.route(
        logits.data_ptr(), rows, experts, bias_address, k, normalize, scale, scores.data_ptr(),
        chosen.data_ptr(), weights.data_ptr(), threads(),
    )  # fmt: skip
    return scores, chosen, weights


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype | None = None) -> Tensor:
    """See ``reference.swiglu``."""
    width = gate.shape[-1]
    if width % 128 or not _plain(gate, up) or gate.dtype != up.dtype:
        return reference.swiglu(gate, up, limit, dtype)
    dtype = dtype or F32
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate, dtype=dtype)
    _native.swiglu(
        gate.data_ptr(), up.data_ptr(), gate.dtype == BF16, gate.numel() // width, width, limit,
        out.data_ptr(), dtype == BF16, threads(),
    )  # fmt: skip
    return out


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``reference.add``."""
    width, each = x.shape[-1], 1 if x.shape == y.shape else x.shape[-2]
    alike = x.shape == y.shape or y.shape == (*x.shape[:-2], 1, width)
    if width % 16 or not alike or not _plain(x, y):
        return reference.add(x, y, dtype)
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    _native.add(
        x.data_ptr(), x.dtype == BF16, y.data_ptr(), y.dtype == BF16, x.numel() // width, width,
        each, out.data_ptr(), dtype == BF16, threads(),
    )  # fmt: skip
    return out


class _Table:
    """The addresses of the experts' matrices; it keeps these in memory."""

    def __init__(self, w1: Matrices, w2: Matrices, w3: Matrices) -> None:
        self.experts = _native.Experts()
        self._kept = [(w1[e], w3[e], w2[e]) for e in range(len(w1))]
        gate, _, down = self._kept[0]
        self._shape = gate.weight.shape[0], down.weight.shape[0]
        self._dtype = gate.weight.dtype
        self._readable = all(
            m.weight.is_contiguous() and m.weight.dtype == self._dtype and _readable(*m)
            for matrices in self._kept for m in matrices
        )  # fmt: skip
        for gate, up, down in self._kept:
            self.experts.append(_address(gate), _address(up), _address(down))

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        width, inputs = self._shape
        whole = width % 128 == 0 and inputs % 16 == 0 and x.shape[0] > 0
        return self._readable and whole and (self._dtype != F32 or dtype == F32)


def _address(stored: Stored) -> tuple[int, int, int, int, int, int]:
    weight, scale = stored
    outputs, inputs = weight.shape[0], weight.shape[1] * (2 if weight.dtype in FP4 else 1)
    where, size = (0, 0) if scale is None else (scale.data_ptr(), scale.element_size())
    return weight.data_ptr(), where, FORMATS.get(weight.dtype, -1), size, outputs, inputs


_tables: weakref.WeakKeyDictionary[Matrices, _Table] = weakref.WeakKeyDictionary()


def _table(
    w1: Matrices, w2: Matrices, w3: Matrices, dtype: torch.dtype
) -> _Table | None:
    remembered = not isinstance(w1, list)  # a list cannot be
    table = _tables.get(w1) if remembered else None
    if table is None:
        if w1[0].weight.dtype == F32 and dtype != F32:
            return None  # masters in training, made ready one by one
        table = _Table(w1, w2, w3)
        if remembered:
            _tables[w1] = table
    return table


def _takes(x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the product of these is native; see ``reference.linear``."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype not in (BF16, F32) or (weight.dtype == F32 and dtype != F32):
        return False  # values are rounded to the type of the product first
    return _readable(weight, scale)


def _readable(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a stored weight is of a format and in a place that the kernels can read."""
    if weight.dtype not in FORMATS or not weight.is_cpu:
        return False
    if scale is None:
        return weight.dtype in (BF16, F32)
    if scale.dtype == E8M0:
        return True
    return weight.dtype == E4M3 and scale.dtype == F32 and _powers_of_two(scale)


def _powers_of_two(scale: Tensor) -> bool:
    bits = scale.view(torch.int32)
    return not bool(((bits & 0x007FFFFF) | (bits & -0x80000000)).any())


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, groups: int
) -> Tensor:
    if dtype == BF16:
        x = x.to(BF16)
    x, weight = x.contiguous(), weight.contiguous()
    outputs, inputs = weight.shape[0], x.shape[-1] // groups
    out = torch.empty(*x.shape[:-1], outputs, dtype=dtype)
    address, size = 0, 0
    if scale is not None:
        scale = scale.contiguous()
        address, size = scale.data_ptr(), scale.element_size()
    _native.linear(
        x.data_ptr(), x.dtype == BF16, x.numel() // (inputs * groups),
        weight.data_ptr(), address, FORMATS[weight.dtype], size, outputs, inputs, groups,
        out.data_ptr(), dtype == BF16, threads(),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- row by row


def _plain(*tensors: Tensor) -> bool:
    """Whether these are numbers in the memory of this machine that need no gradient."""
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t.dtype not in (BF16, F32) or not t.is_cpu or (grad and t.requires_grad):
            return False
    return True


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    width = x.shape[-1]
    if width % 16 or not _plain(x if weight is None else weight, x):
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    address, bf16 = (0, False) if weight is None else (weight.data_ptr(), weight.dtype == BF16)
    _native.norm(
        x.data_ptr(), x.dtype == BF16, x.numel() // width, width, address, bf16, eps,
        out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def rope(x: Tensor, rotation: Tensor, inverse: bool = False) -> Tensor:
    """See ``reference.rope``."""
    turned = 2 * rotation.shape[-2]
    # [T, W, 2] against x [B, T, D], or [T, 1, W, 2] against x [B, T, H, D]
    known = (x.shape[1], 1)[: x.dim() - 2] if x.dim() in (3, 4) else None
    if rotation.shape[:-2] != known or turned % 32 or not _plain(x, rotation):
        return reference.rope(x, rotation, inverse)
    heads = x.shape[2] if x.dim() == 4 else 1
    x, rotation = x.contiguous(), rotation.contiguous()
    out = torch.empty_like(x)
    _native.rope(
        x.data_ptr(), x.dtype == BF16, x.numel() // x.shape[-1], x.shape[-1], rotation.data_ptr(),
        turned, heads, x.shape[1], inverse, out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def fp8_round(x: Tensor, block: int = 128, keep: int = 0) -> Tensor:
    """See ``reference.fp8_round``."""
    width = x.shape[-1]
    if not _plain(x) or (width - keep) % block or block not in (64, 128):
        return reference.fp8_round(x, block, keep)
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.fp8_round(
        x.data_ptr(), x.dtype == BF16, x.numel() // width, width, block, keep, out.data_ptr(),
        threads(),
    )  # fmt: skip
    return out


def hadamard_fp4(x: Tensor) -> Tensor:
    """See ``reference.hadamard_fp4``."""
    if not _plain(x) or x.shape[-1] != 128:
        return reference.hadamard_fp4(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.hadamard_fp4(
        x.data_ptr(), x.dtype == BF16, x.numel() // 128, out.data_ptr(), threads()
    )
    return out


def scaled(x: Tensor, factor: float) -> Tensor:
    """See ``reference.scaled``."""
    if not _plain(x):
        return reference.scaled(x, factor)
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.scaled(x.data_ptr(), x.dtype == BF16, x.numel(), factor, out.data_ptr(), threads())
    return out


# ---------------------------------------------------------------- hyper-connections, pooling


def _streams_fit(streams: Tensor, *others: Tensor) -> bool:
    h, d = streams.shape[-2:]
    return h <= 8 and d % 16 == 0 and _plain(streams, *others)


def hc_read(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.hc_read``."""
    if not _streams_fit(streams, fn) or any(t.dtype != F32 for t in (fn, scale, base)):
        return reference.hc_read(streams, fn, scale, base, eps, norm_eps, dtype)
    *lead, h, d = streams.shape
    streams = streams.contiguous()
    out = torch.empty(*lead, d, dtype=dtype)
    post, comb = torch.empty(*lead, h), torch.empty(*lead, h, h)
    _native.hc_read(
        streams.data_ptr(), streams.dtype == BF16, post.numel() // h, h, d, fn.data_ptr(),
        scale.data_ptr(), base.data_ptr(), eps, norm_eps, out.data_ptr(), dtype == BF16,
        post.data_ptr(), comb.data_ptr(), threads(),
    )  # fmt: skip
    return out, post, comb


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ``reference.hc_head``."""
    if not _streams_fit(streams, fn) or any(t.dtype != F32 for t in (fn, scale, base)):
        return reference.hc_head(streams, fn, scale, base, eps, norm_eps, dtype)
    *lead, h, d = streams.shape
    streams = streams.contiguous()
    out = torch.empty(*lead, d, dtype=dtype)
    _native.hc_read(
        streams.data_ptr(), streams.dtype == BF16, out.numel() // d, h, d, fn.data_ptr(),
        scale.data_ptr(), base.data_ptr(), eps, norm_eps, out.data_ptr(), dtype == BF16, 0, 0,
        threads(),
    )  # fmt: skip
    return out


def hc_expand(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ``reference.hc_expand``."""
    if not _streams_fit(streams, out, post, comb) or {post.dtype, comb.dtype} != {F32}:
        return reference.hc_expand(out, streams, post, comb)
    h, d = streams.shape[-2:]
    out, streams, post, comb = (t.contiguous() for t in (out, streams, post, comb))
    new = torch.empty_like(streams)
    _native.hc_expand(
        out.data_ptr(), out.dtype == BF16, streams.data_ptr(), streams.dtype == BF16,
        post.numel() // h, h, d, post.data_ptr(), comb.data_ptr(), new.data_ptr(),
        threads(),
    )  # fmt: skip
    return new


def sinkhorn(comb: Tensor, iters: int, eps: float) -> Tensor:
    """See ``reference.sinkhorn``."""
    h = comb.shape[-1]
    if comb.requires_grad or comb.dtype != F32 or h > 8 or not _plain(comb):
        return reference.sinkhorn(comb, iters, eps)
    comb = comb.contiguous()
    out = torch.empty_like(comb)
    _native.sinkhorn(
        comb.data_ptr(), comb.numel() // (h * h), h, iters, eps, out.data_ptr(),
        threads(),
    )  # fmt: skip
    return out


def raw_rows(span: Span, start: int, kv: Tensor, gate: Tensor, bias: Tensor) -> None:
    """See ``reference.raw_rows``."""
    plain = _plain(kv, gate, bias) and kv.dtype == gate.dtype == bias.dtype == F32
    if not plain or not (kv.is_contiguous() and gate.is_contiguous() and bias.is_contiguous()):
        return reference.raw_rows(span, start, kv, gate, bias)
    width = kv.shape[2]
    _native.raw_rows(
        span.room.data_ptr() + span.first * 8 * width, span.length, start, kv.data_ptr(),
        gate.data_ptr(), width, bias.data_ptr(), bias.shape[0], threads(),
    )  # fmt: skip


def store(rows: Tensor, table: PagedRows, first: int) -> None:
    """See ``reference.store``."""
    form = table.format
    kind = form.dtype if form.packed is None else BF16 if form.packed == "entry" else rows.dtype
    if rows.dtype != kind or not _plain(rows):
        return reference.store(rows, table, first)
    rows = rows.contiguous()
    _native.store(
        rows.data_ptr(), rows.dtype == BF16, len(rows), form.width, PACKED[form.packed],
        form.kept, form.bytes, table.addresses.data_ptr(), table.offset, table.each, first,
        threads(),
    )  # fmt: skip


def pool(kv: Tensor, gate: Tensor, ratio: int, overlap: bool) -> Tensor:
    """See ``reference.pool``."""
    width = kv.shape[-1] // (1 + overlap)
    alike = kv.stride()[1:] == gate.stride()[1:] and kv.stride(-1) == 1 and kv.shape[0] == 1
    if not alike or width % 16 or not _plain(kv, gate) or {kv.dtype, gate.dtype} != {F32}:
        return reference.pool(kv, gate, ratio, overlap)
    blocks = kv.shape[1] // ratio - overlap
    out = torch.empty(1, blocks, width)
    _native.pool(
        kv.data_ptr(), gate.data_ptr(), blocks, kv.stride(1), ratio, width, overlap,
        out.data_ptr(), threads(),
    )  # fmt: skip
    return out


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
    """See ``reference.attention``."""
    batch, queries, heads, dim = q.shape
    there = rows is None or (start + queries) // ratio <= rows.shape[1]
    fit = rows is None or _fits(rows, dtype)
    if dim % 32 or not there or not fit or {q.dtype, window.dtype} != {dtype} or not _plain(
        q, window, sink
    ):
        return reference.attention(
            q, window, rows, chosen, sink, start=start, ratio=ratio, width=width, scale=scale,
            dtype=dtype,
        )  # fmt: skip
    q, sink = q.contiguous(), sink.float().contiguous()
    out = torch.empty_like(q)
    for b in range(batch):
        near = window[b].contiguous()
        pieces, kept, kept_alive = _pieces(rows, b)
        picked = None if chosen is None else chosen[b].contiguous()
        _native.attention(
            q[b].data_ptr(), dtype == BF16, queries, heads, dim, near.data_ptr(),
            near.shape[0] - queries, width, pieces, kept,
            0 if picked is None else picked.data_ptr(), 0 if picked is None else picked.shape[1],
            sink.data_ptr(), start, ratio, scale, out[b].data_ptr(), threads(),
        )  # fmt: skip
        del kept_alive
    return out


def _fits(rows: Rows, dtype: torch.dtype) -> bool:
    """Whether the kernels read a table whose numbers they take as ``dtype``."""
    if not isinstance(rows, PagedRows):
        return rows.dtype == dtype and _plain(rows)
    form = rows.format
    if form.packed is None:
        return form.dtype == dtype
    block, most = (64, 256) if form.packed == "key" else (64, form.width)
    return dtype == BF16 and (form.width - form.kept) % block == 0 and form.width <= most


def _pieces(rows: Rows | None, b: int) -> tuple[tuple[int, int, int, int], int, object]:
    """Where sequence b's rows are; the channels that packed ones keep in BF16 (0: not packed), and
    what must live as long as these addresses are used."""
    if rows is None or rows.shape[1] == 0:
        return (0, 0, 1, 0), 0, None
    if isinstance(rows, PagedRows):
        where = rows.addresses.data_ptr(), rows.offset, rows.each, rows.format.bytes
        return where, rows.format.kept, rows
    table = rows[b].contiguous()
    address = array("q", [table.data_ptr()])
    where = address.buffer_info()[0], 0, 1 << 62, table.shape[1] * table.element_size()
    return where, 0, (table, address)


def index_topk(
    q: Tensor, keys: Rows, weights: Tensor, start: int, ratio: int, k: int
) -> Tensor:
    """See ``reference.index_topk``."""
    batch, queries, heads, dim = q.shape
    there = (start + queries) // ratio <= keys.shape[1]
    alike = q.dtype == weights.dtype and _fits(keys, q.dtype)
    if dim % 32 or dim > 256 or not there or not alike or not _plain(q, weights):
        return reference.index_topk(q, keys, weights, start, ratio, k)
    q, weights = q.contiguous(), weights.contiguous()
    out = torch.empty(batch, queries, k, dtype=torch.int64)
    for b in range(batch):
        pieces, _, kept_alive = _pieces(keys, b)
        packed = isinstance(keys, PagedRows) and keys.format.packed is not None
        _native.index_topk(
            q[b].data_ptr(), q.dtype == BF16, queries, heads, dim, pieces, packed,
            weights[b].data_ptr(), start, ratio, k, out[b].data_ptr(), threads(),
        )  # fmt: skip
        del kept_alive
    return out


def checksum(data: Tensor) -> int:
    """See ``reference.checksum``."""
    if not data.is_contiguous() or data.device.type != "cpu":
        return reference.checksum(data)
    plain, weighted = _native.checksum(data.data_ptr(), data.nbytes)
    return int(weighted) << 64 | int(plain)


if "DSV4_ISA" in os.environ:
    use(os.environ["DSV4_ISA"])
