"""The network's smallest parts: one parameter each, and what is done with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import kernels, quant
from .kernels import Stored
from .numerics import Numerics


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """A weight ``[N, K]`` in its stored format, with its block scales if it has any."""

    scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, fmt: str = "bf16") -> None:
        super().__init__()
        self.fmt = fmt  # "fp4", "fp8": the format it is stored in when the model is quantised
        self.weight = parameter(outputs, inputs)
        self.register_parameter("scale", None)

    def stored(self, nx: Numerics) -> Stored:
        """The weight as the kernels take it."""
        if nx.qat and self.fmt != "bf16":
            return Stored(quant.fake_quant_weight(self.weight, self.fmt), None)
        return Stored(self.weight, self.scale)

    def rounded(self, x: Tensor, nx: Numerics) -> Tensor:
        """``x`` as this weight's matmul reads it: FP8 in official numerics."""
        return kernels.fp8_round(x) if nx.official and self.scale is not None else x

    def forward(self, x: Tensor, nx: Numerics) -> Tensor:
        return kernels.linear(x, *self.stored(nx), nx.dtype)


class Norm(nn.Module):
    """RMSNorm with a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(dim)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """A table ``[V, d]``."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.weight = parameter(vocab, dim)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return nn.functional.embedding(ids, self.weight).to(dtype)


class Head(nn.Module):
    """The output matrix ``[V, d]``."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.weight = parameter(vocab, dim)
