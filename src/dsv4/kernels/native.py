"""The kernels in C++ (``native/``), for tensors in the memory of this machine.

Each promises what its reference does, to the rounding of the result, and more: a row's result is
the same bit for bit whatever the other rows, their number, the number of threads and the
instruction set. What they do not take (a gradient, another device or dtype) goes to the reference.

``isas()`` lists the instruction sets that this machine has, best first; ``use`` chooses one, as
does the environment variable DSV4_ISA at import.
"""

from __future__ import annotations

import os
import weakref

import torch
from torch import Tensor

from ..errors import ConfigError
from ..quant import E4M3, E8M0
from . import _native, reference
from .reference import Matrices, Stored

FORMATS = {torch.int8: 0, torch.uint8: 0, E4M3: 1, torch.bfloat16: 2, torch.float32: 3}
KERNELS = ("linear", "grouped_linear", "head", "routed_experts")  # what is here and in the table
BF16, F32 = torch.bfloat16, torch.float32
FP4 = (torch.int8, torch.uint8)  # two codes in each


def isas() -> list[str]:
    """Instruction sets of this machine for which there are kernels, best first."""
    return _native.isas()


def isa() -> str:
    """The instruction set in use."""
    return _native.isa()


def use(name: str) -> None:
    """Use another instruction set, in the whole process; ConfigError if this machine lacks it."""
    if name not in isas():
        raise ConfigError("no such instruction set here", expected=" or ".join(isas()), got=name)
    _native.use(name)


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
    out = _linear(x.flatten(-2), weight, scale, dtype, groups)
    return out.unflatten(-1, (groups, -1))


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
    table = None if torch.is_grad_enabled() else _table(w1, w2, w3)
    x = x.to(dtype).contiguous()
    if table is None or not table.takes(x, dtype):
        return reference.routed_experts(
            x, ids, weights, w1, w2, w3, limit, round_activations, dtype
        )
    ids, weights = ids.contiguous(), weights.float().contiguous()
    out = torch.empty(x.shape)
    table.experts.run(
        x.data_ptr(), dtype == BF16, x.shape[0], ids.data_ptr(), weights.data_ptr(), ids.shape[1],
        limit, round_activations, out.data_ptr(), torch.get_num_threads(),
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


def _table(w1: Matrices, w2: Matrices, w3: Matrices) -> _Table:
    if isinstance(w1, list):  # cannot be remembered
        return _Table(w1, w2, w3)
    if w1 not in _tables:
        _tables[w1] = _Table(w1, w2, w3)
    return _tables[w1]


def _takes(x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the product of these is native; see ``reference.linear``."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype not in (BF16, F32) or (weight.dtype == F32 and dtype != F32):
        return False  # values are rounded to the type of the product first
    return _readable(weight, scale)


def _readable(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a stored weight is of a format and in a place that the kernels can read."""
    if weight.dtype not in FORMATS or weight.device.type != "cpu":
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
        out.data_ptr(), dtype == BF16, torch.get_num_threads(),
    )  # fmt: skip
    return out


if "DSV4_ISA" in os.environ:
    use(os.environ["DSV4_ISA"])
