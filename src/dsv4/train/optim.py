"""Muon for matrices, AdamW for the rest: one optimizer, one grouping rule.

Source: report section 2.4 and 4.2.2. Muon: Nesterov momentum, hybrid Newton-Schulz, decoupled
weight decay, update scaled to RMS 0.18 so that AdamW's learning rate fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FAST, EXACT = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
STEPS = (FAST,) * 8 + (EXACT,) * 2


def uses_muon(name: str, parameter: Tensor) -> bool:
    """The grouping rule: matrices but the embedding and the heads go to Muon; the embedding,
    heads, norms, mHC biases and gates, sinks and positional biases go to AdamW."""
    leaf = name.rpartition(".")[2]
    table = name.endswith(("embed.weight", "head.weight", "tok_emb.weight"))
    return parameter.dim() == 2 and not table and leaf != "ape"


def orthogonalize(m: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest (semi-)orthogonal matrices of ``m [..., N, K]``: all singular values about 1.

    Newton-Schulz, 8 fast steps then 2 exact ones, safe in bfloat16 after division by the
    Frobenius norm.
    """
    tall = m.shape[-2] > m.shape[-1]
    x = (m.mT if tall else m).reshape(-1, *sorted(m.shape[-2:])).float()
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)).to(dtype)
    for a, b, c in STEPS:
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return (x.mT if tall else x).reshape(m.shape).to(m.dtype)


@dataclass(frozen=True)
class OptimSettings:
    """Learning rates are those of AdamW's kind; ``lr`` is multiplied by the schedule."""

    lr: float = 2.7e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    update_rms: float = 0.18
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20


class MuonAdamW:
    """Updates the trainable parameters of a model in place.

    Matrices of one shape are orthogonalised as one batch; each is a logical matrix of its own.
    ``state_dict`` holds everything needed to go on bit for bit.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], s: OptimSettings) -> None:
        self.s = s
        self.steps = 0
        self._muon: dict[torch.Size, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        self._adam: list[tuple[str, nn.Parameter]] = []
        self.state: dict[str, Tensor] = {}
        for name, p in named:
            if not p.requires_grad:
                continue
            if uses_muon(name, p):
                self._muon[p.shape].append((name, p))
                self.state[name + ".m"] = torch.zeros_like(p)
            else:
                self._adam.append((name, p))
                self.state[name + ".m"] = torch.zeros_like(p)
                self.state[name + ".v"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with learning rate ``lr * factor``; gradients are consumed."""
        s, lr = self.s, self.s.lr * factor
        self.steps += 1
        for shape, group in self._muon.items():
            grads = []
            for name, p in group:
                assert p.grad is not None, f"{name} got no gradient"
                m = self.state[name + ".m"].mul_(s.momentum).add_(p.grad)
                grads.append(p.grad.add(m, alpha=s.momentum))
            scale = s.update_rms * max(shape) ** 0.5
            for part in range(0, len(group), 64):
                updates = orthogonalize(torch.stack(grads[part : part + 64]))
                for (_, p), update in zip(group[part : part + 64], updates, strict=True):
                    p.mul_(1 - lr * s.weight_decay).add_(update, alpha=-lr * scale)
        b1, b2 = s.betas
        for name, p in self._adam:
            assert p.grad is not None, f"{name} got no gradient"
            m = self.state[name + ".m"].lerp_(p.grad, 1 - b1)
            v = self.state[name + ".v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            root = (v / (1 - b2**self.steps)).sqrt_().add_(s.eps)
            p.mul_(1 - lr * s.weight_decay) if p.dim() > 1 else None
            p.addcdiv_(m, root, value=-lr / (1 - b1**self.steps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "state": self.state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.steps = saved["steps"]
        for name, value in saved["state"].items():
            self.state[name].copy_(value)
