"""How many floating-point operations a V4 model spends, by the precision they are done in.

What is counted: matrix products, two operations per multiply-add, and of attention and indexer
only what a query may see. What is not: norms, softmaxes, rotations, the pooling of the compressor
(well under one percent), and products that a mask throws away afterwards, which a kernel may do
for convenience. One vocabulary matrix is counted, the head: the embedding is a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import V4Config
from ..errors import ConfigError


class Flops(NamedTuple):
    """Operations by what they are and in which precision the published code does them.

    ``fp4`` routed experts (FP4 weights, FP8 activations); ``fp8`` the quantised dense matrices;
    ``bf16`` the output's first projection (wo_a), compressors, indexer weights, router, mHC;
    ``head`` the output matrix; ``core`` attention itself; ``index_fp4`` scores of V4's indexer
    and ``index_fp8`` those of V3.2's.
    """

    fp8: float = 0
    fp4: float = 0
    bf16: float = 0
    head: float = 0
    core: float = 0
    index_fp4: float = 0
    index_fp8: float = 0

    @property
    def total(self) -> float:
        """All of them, unweighted."""
        return sum(self)

    def times(self, weights: Sequence[float]) -> Flops:
        """Each part times a number."""
        return Flops(*(part * weight for part, weight in zip(self, weights, strict=True)))


def forward_flops(
    config: V4Config, length: int, *, start: int = 0, mtp: bool = False, logits: bool = True
) -> Flops:
    """Operations of a forward pass over ``length`` tokens after ``start`` earlier ones.

    ``mtp`` adds the MTP block (its block, its projections and its use of the head); without
    ``logits`` the head is left out, as in a prefill that only fills the cache. Indexer work is
    counted for tokens that see more entries than ``index_topk``: the others need no choice.
    Raises ConfigError when the tokens are not inside the context.
    """
    if length < 1 or start < 0 or start + length > config.max_position_embeddings:
        raise ConfigError(
            "tokens outside the model's context",
            expected=f"1 to {config.max_position_embeddings} tokens",
            got=f"{length} after {start}",
        )
    seen = np.arange(start + 1, start + length + 1, dtype=np.int64)
    total = np.zeros(len(Flops._fields))
    for ratio in sorted(set(layers := config.compress_ratios[: config.num_hidden_layers])):
        total += layers.count(ratio) * np.array(_block(config, ratio, seen))
    c, d = config, config.hidden_size
    collapse = 2 * length * c.hc_mult * d * (c.hc_mult + 1)
    head = 2 * length * c.vocab_size * d if logits else 0
    out = Flops(*total.tolist())
    out = out._replace(bf16=out.bf16 + collapse * logits, head=head)
    if mtp and c.mtp_layers:
        block = Flops(*map(float, _block(config, 0, seen)))
        dense = 2 * length * d * d * (1 + c.hc_mult)  # e_proj once, h_proj for each stream
        extra = _dense(config, dense)
        extra = extra._replace(bf16=extra.bf16 + collapse, head=2 * length * c.vocab_size * d)
        out = Flops(*(a + b + e for a, b, e in zip(out, block, extra, strict=True)))
    return out


def token_flops(config: V4Config, context: int) -> Flops:
    """Operations of one token that makes the timeline ``context`` tokens long."""
    return forward_flops(config, 1, start=context - 1)


def training_flops(config: V4Config, length: int, *, mtp: bool = True) -> Flops:
    """Operations of a training step on one sample: forward, and twice that backward."""
    return forward_flops(config, length, mtp=mtp).times([3.0] * len(Flops._fields))


def _dense(config: V4Config, flops: float) -> Flops:
    """``flops`` of a matrix that quantised models keep in FP8."""
    return Flops(bf16=flops) if config.quantization_config is None else Flops(fp8=flops)


def _block(c: V4Config, ratio: int, seen: npt.NDArray[np.int64]) -> Flops:
    """One layer, for tokens that see ``seen`` tokens each (themselves included)."""
    d, heads, n = c.hidden_size, c.num_attention_heads, len(seen)
    expert = 3 * d * c.moe_intermediate_size
    dense = d * (c.q_lora_rank + c.head_dim) + c.q_lora_rank * heads * c.head_dim
    dense += c.o_groups * c.o_lora_rank * d + c.n_shared_experts * expert
    mixes = (2 + c.hc_mult) * c.hc_mult
    # mHC, twice a layer: mixing logits, the read, the write into all streams
    bf16 = 2 * c.hc_mult * d * (mixes + 1 + c.hc_mult)
    bf16 += heads * c.head_dim * c.o_lora_rank + d * c.n_routed_experts
    entries = np.minimum(seen, c.sliding_window).sum()
    scores = chosen_by_index = 0
    if ratio:
        bf16 += 2 * d * c.head_dim * (2 if ratio == 4 else 1)
        rows = seen // ratio
        entries += (np.minimum(rows, c.index_topk) if ratio == 4 else rows).sum()
    if ratio == 4:
        bf16 += 2 * d * c.index_head_dim * 2
        many = rows[rows > c.index_topk]
        chosen_by_index, width = len(many), c.index_n_heads * c.index_head_dim
        scores = 2 * width * int(many.sum())
    per_query = c.q_lora_rank * c.index_n_heads * c.index_head_dim
    out = _dense(c, 2 * (dense * n + per_query * chosen_by_index))
    routed = 2 * c.num_experts_per_tok * expert * n
    experts = Flops(**{c.expert_dtype: float(routed)})
    return Flops(
        fp8=out.fp8 + experts.fp8,
        fp4=experts.fp4,
        bf16=out.bf16 + experts.bf16 + 2 * (bf16 * n + d * c.index_n_heads * chosen_by_index),
        core=4 * heads * c.head_dim * int(entries),
        index_fp4=scores,
    )
