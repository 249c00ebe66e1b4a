"""Muon for matrices, AdamW for the rest: one optimizer, one grouping rule.

Source: report section 2.4 and 4.2.2. Muon: Nesterov momentum, hybrid Newton-Schulz, decoupled
weight decay, update scaled to RMS 0.18 so that AdamW's learning rate fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Coefficients = tuple[float, float, float]
FAST, EXACT = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
STEPS: tuple[Coefficients, ...] = (FAST,) * 8 + (EXACT,) * 2
AT_ONCE = 64  # matrices of one shape that are orthogonalised together


def uses_muon(name: str, parameter: Tensor) -> bool:
    """The grouping rule: matrices but the embedding and the heads go to Muon; the embedding,
    heads, norms, mHC biases and gates, sinks and positional biases go to AdamW."""
    leaf = name.rpartition(".")[2]
    table = name.endswith(("embed.weight", "head.weight", "tok_emb.weight"))
    return parameter.dim() == 2 and not table and leaf != "ape"


def orthogonalize(
    m: Tensor, dtype: torch.dtype = torch.bfloat16, steps: Iterable[Coefficients] = STEPS
) -> Tensor:
    """The nearest (semi-)orthogonal matrices of ``m [B, N, K]``: all singular values about 1.

    Newton-Schulz, 8 fast steps then 2 exact ones, safe in bfloat16 after division by the
    Frobenius norm. In float32, singular values down to 1e-3 of the largest come out within 1e-3
    of 1, down to 1e-4 within 3e-3.
    """
    tall = m.shape[-2] > m.shape[-1]
    x: Tensor = (m.mT if tall else m).float()
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)).to(dtype)
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.to(m.dtype)


@dataclass(frozen=True)
class OptimSettings:
    """Learning rates are those of AdamW's kind; ``lr`` is given with each step. Without ``muon``
    AdamW has the matrices too."""

    muon: bool = True
    weight_decay: float = 0.1
    momentum: float = 0.95
    update_rms: float = 0.18
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20
    newton_schulz: tuple[Coefficients, ...] = STEPS
    dtype: torch.dtype = torch.bfloat16  # of Newton-Schulz


class MuonAdamW:
    """Updates the trainable ones among named parameters in place.

    Matrices of one shape are orthogonalised as one batch; each is a logical matrix of its own.
    ``state`` holds everything needed to go on bit for bit, by parameter
    name: ``.m`` the first moment, and for AdamW ``.v`` the second and ``.t`` the number of updates.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings
    ) -> None:
        self.s = settings
        self._muon: dict[torch.Size, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        self._adam: list[tuple[str, nn.Parameter]] = []
        self.state: dict[str, Tensor] = {}
        for name, p in named:
            if not p.requires_grad:
                continue
            if settings.muon and uses_muon(name, p):
                self._muon[p.shape].append((name, p))
            else:
                self._adam.append((name, p))
                self.state[name + ".v"] = torch.zeros_like(p)
                self.state[name + ".t"] = torch.zeros((), dtype=torch.int64)
            self.state[name + ".m"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, lr: float, seen: Callable[[str, Tensor], None] | None = None) -> None:
        """One update of the parameters that have a gradient; ``seen`` is shown each direction,
        of which ``lr`` times was subtracted."""
        s = self.s
        for shape, group in self._muon.items():
            active = [(name, p, p.grad) for name, p in group if p.grad is not None]
            scale = s.update_rms * max(shape) ** 0.5
            for part in range(0, len(active), AT_ONCE):
                some = active[part : part + AT_ONCE]
                updates = orthogonalize(
                    torch.stack([self._nesterov(name, g) for name, _, g in some]),
                    s.dtype,
                    s.newton_schulz,
                ).mul_(scale)
                for (name, p, _), update in zip(some, updates, strict=True):
                    p.mul_(1 - lr * s.weight_decay).sub_(update, alpha=lr)
                    if seen is not None:
                        seen(name, update)
        for name, p in self._adam:
            if p.grad is None:
                continue
            update = self._adam_direction(name, p.grad)
            if p.dim() > 1:
                p.mul_(1 - lr * s.weight_decay)
            p.sub_(update, alpha=lr)
            if seen is not None:
                seen(name, update)

    def _nesterov(self, name: str, grad: Tensor) -> Tensor:
        m = self.state[name + ".m"].mul_(self.s.momentum).add_(grad)
        return grad.add(m, alpha=self.s.momentum)

    def _adam_direction(self, name: str, grad: Tensor) -> Tensor:
        b1, b2 = self.s.betas
        t = int(self.state[name + ".t"].add_(1))
        m = self.state[name + ".m"].lerp_(grad, 1 - b1)
        v = self.state[name + ".v"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = (v / (1 - b2**t)).sqrt_().add_(self.s.eps)
        return (m / root).div_(1 - b1**t)
