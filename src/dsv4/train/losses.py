"""What a training step minimises: next token, MTP, balance of the experts, indexer.

Pure functions of a network and a batch; the loop owns the schedule, the optimizer and the logs.
Sources: report section 4.2 (weights), the V3 report (MTP, sequence-wise balance) and the V3.2
report (indexer warm-up, then sparse training); the V4 report does not describe the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TrainingError
from ..model import Gate, Noted, Pass, Transformer
from ..numerics import Numerics
from .data import Batch

ATTENTION = ("dense", "warmup", "sparse")


@dataclass(frozen=True)
class Objective:
    """The weights of the losses, and how the forward pass is done.

    ``attention``: what CSA layers attend to and how their indexers learn.
      dense   all visible compressed rows; the indexers are neither used nor trained
      warmup  the same, while the indexers learn where that attention goes; all else is frozen
      sparse  the rows that the indexers choose; these go on learning where attention goes among
              the chosen, by a gradient that reaches them alone (``index_weight`` 0: not at all)
    ``qat``: weights as they will be stored and the indexers' queries and keys in FP4.
    ``recompute``: blocks keep their inputs only and are computed again for the gradient.
    ``dtype``: of activations and matmuls.
    Raises TrainingError for another ``attention``.
    """

    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    attention: str = "dense"
    index_weight: float = 1.0
    qat: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise TrainingError(
                "attention", expected=" or ".join(ATTENTION), got=repr(self.attention)
            )

    @property
    def numerics(self) -> Numerics:
        """The arithmetic of a forward pass."""
        return Numerics("train-qat" if self.qat else "train", self.dtype, qat=self.qat)

    @property
    def trains_indexers(self) -> bool:
        """Whether the indexers have a loss."""
        return self.attention != "dense" and self.index_weight > 0

    def trains(self, name: str) -> bool:
        """Whether a step may change the parameter ``name``; the others get no gradient."""
        if ".indexer." in name:
            return self.trains_indexers
        return self.attention != "warmup"


class Shares(NamedTuple):
    """What share of a whole batch its part has: of the weights that count for the next token, of
    those that count for MTP, of the tokens, and of the tokens with a successor."""

    loss: float = 1.0
    mtp: float = 1.0
    tokens: float = 1.0
    followed: float = 1.0

    @classmethod
    def of(cls, part: Batch, whole: Batch) -> Shares:
        """The shares of some samples of a batch."""
        if part is whole:
            return cls()
        pairs = zip(_sizes(part), _sizes(whole), strict=True)
        return cls(*(a / b if b else 0.0 for a, b in pairs))


def _sizes(batch: Batch) -> tuple[float, float, float, float]:
    place = torch.cat([torch.arange(n) for n in batch.lengths])
    weights = batch.weights.flatten().double()
    next_token, mtp = (float(weights[place >= first].sum()) for first in (1, 2))
    return next_token, mtp, len(place), len(place) - len(batch.lengths)


def losses(
    net: Transformer,
    ids: Tensor,
    weights: Tensor,
    lengths: Sequence[int] | None,
    objective: Objective,
    routes: Sequence[Tensor] | None = None,
    shares: Shares | None = None,
) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    """The loss of one batch, its parts for the log, and what each router did.

    ``ids`` and ``weights`` (how much each token counts as a target, float) are ``[1, N]`` with the
    ``lengths`` of the samples in the row, or ``[B, T]`` without. No sample's first token is a
    target, nor its second one of MTP. ``routes``, from the function of that name, decide which
    experts the tokens go to. Parts: ``loss``, ``mtp``, ``balance``, and ``index``, the mean
    divergence of an indexer in nats. Last comes the number of tokens of each expert, ``[E]`` for
    each learned gate in the order of ``learned_gates``. With ``shares`` the batch is a part of a
    larger one, and losses and gradients are its contributions: summed over the parts they are
    those of the whole.
    """
    shares = shares or Shares()
    gates = learned_gates(net)
    run = _start(net, ids, lengths, objective)
    if routes is not None:
        if len(routes) != len(gates):
            raise TrainingError("routes", expected=f"{len(gates)} gates", got=len(routes))
        run.routes = dict(zip(gates, routes, strict=True))
    run.recompute = objective.recompute and objective.attention != "warmup"
    noted = run.noted = Noted(objective.trains_indexers)
    place, sample = _places(run)
    wanted = weights.flatten()
    # a target's prediction stands one token before it, or two in a row that lacks the last
    # token of each sample
    next_at = ((wanted > 0) & (place >= 1)).nonzero().squeeze(1)
    ahead_at = ((wanted > 0) & (place >= 2)).nonzero().squeeze(1)
    owners = [sample] * len(gates)  # the sample of each token that a gate saw
    seen = [shares.tokens] * len(gates)  # the share of these tokens in all that it sees
    with _trainable(net, objective):
        streams = net.trunk(run)
        total = shares.loss * _token_loss(streams, next_at - 1, next_at, run, wanted, net.logits)
        parts = {"loss": total.item()}
        if net.mtp and objective.mtp_weight:
            ahead = net.mtp_streams(streams, run)
            # as many have a successor
            owners[-1], seen[-1] = sample[place >= 1], shares.followed
            mtp = _token_loss(
                ahead, ahead_at - 2 - sample[ahead_at], ahead_at, run, wanted, net.mtp_logits
            )
            mtp = shares.mtp * mtp
            total = total + objective.mtp_weight * mtp
            parts["mtp"] = mtp.item()
    done = list(zip(noted.balance, owners, seen, strict=False))  # perhaps without the MTP block
    balance = sum(
        (share * _balance(*each, owner) for each, owner, share in done), start=total.new_zeros(())
    )
    total = total + objective.balance_weight * balance
    parts["balance"] = balance.item()
    if noted.divergences:
        index = shares.tokens * torch.stack(noted.divergences).sum()
        total = total + objective.index_weight * index
        parts["index"] = index.item() / len(noted.divergences)
    experts = net.config.n_routed_experts
    loads = [torch.zeros(experts, dtype=torch.int64, device=ids.device) for _ in gates]
    for load, (_, chosen) in zip(loads, noted.balance, strict=False):
        load += torch.bincount(chosen.flatten(), minlength=experts)
    return total, parts, loads


@torch.no_grad()
def routes(
    net: Transformer, ids: Tensor, lengths: Sequence[int] | None, objective: Objective
) -> list[Tensor]:
    """The experts ``[N, K]`` that each learned gate would choose for a batch, with the weights as
    they are now: computed some steps ahead and given to ``losses``, they are anticipatory routing.
    """
    run = _start(net, ids, lengths, objective)
    noted = run.noted = Noted()
    streams = net.trunk(run)
    if net.mtp:
        net.mtp_streams(streams, run)
    return [chosen for _, chosen in noted.balance]


def learned_gates(net: Transformer) -> list[Gate]:
    """The gates that have a bias, in the order in which a pass meets them."""
    return [m for m in net.modules() if isinstance(m, Gate) and m.bias is not None]


def _start(
    net: Transformer, ids: Tensor, lengths: Sequence[int] | None, objective: Objective
) -> Pass:
    run = net.start(ids, objective.numerics, lengths=lengths)
    run.dense = objective.attention != "sparse"
    return run


@contextmanager
def _trainable(net: Transformer, objective: Objective) -> Iterator[None]:
    """Inside, only what the objective trains asks for a gradient."""
    frozen = [p for n, p in net.named_parameters() if p.requires_grad and not objective.trains(n)]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _places(run: Pass) -> tuple[Tensor, Tensor]:
    """Of each token, flattened: its position in its sample, and the number of the sample."""
    if run.packing is not None:
        return run.packing.positions, run.packing.samples
    b, t = run.ids.shape
    each = torch.arange(b * t, device=run.ids.device)
    return each % t, each // t


def _token_loss(
    streams: Tensor,
    at: Tensor,
    targets: Tensor,
    run: Pass,
    weights: Tensor,
    head: Callable[[Tensor, Pass, Tensor], Tensor],
) -> Tensor:
    """Mean cross-entropy of the tokens ``targets``, predicted by the rows ``at`` of ``streams``,
    weighted; 0 of none. Only their logits are computed."""
    each = head(streams.flatten(0, 1).index_select(0, at), run, run.ids.flatten()[targets])
    w = weights[targets].to(each.dtype)
    return (each * w).sum() / w.sum().clamp_min(1.0)


def _balance(scores: Tensor, chosen: Tensor, sample: Tensor) -> Tensor:
    """V3's sequence-wise balance loss, ``sum_e f_e P_e`` of each sample, averaged over tokens.

    ``f_e`` is expert e's share of a sample's choices times E, ``P_e`` its mean normalised score;
    ``scores [N, E]``, ``chosen [N, K]``; ``sample [N]``: the sample of each row. 1 at best.
    """
    experts, count = scores.shape[1], int(sample.max()) + 1
    cells = (sample.unsqueeze(1) * experts + chosen).flatten()
    taken = torch.bincount(cells, minlength=count * experts).view(count, experts).to(scores)
    share = (taken * experts / taken.sum(1, keepdim=True).clamp_min(1))[sample]
    wanted = scores / scores.sum(-1, keepdim=True)
    return (wanted * share).sum() / len(sample)
