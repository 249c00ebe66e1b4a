"""The kernel table: the functions that V4's arithmetic is made of.

Each is defined by its torch reference (``reference.py``); a faster version takes its place in
this table and must agree with it. Nothing here knows a configuration or a model. Callers look a
kernel up at each call (``kernels.linear(...)``), so the table can change at run time.
"""

from .reference import (
    Mix,
    Stored,
    attention,
    grouped_linear,
    hc_collapse,
    hc_expand,
    hc_logits,
    hc_read,
    hc_split,
    head,
    index_loss,
    index_topk,
    linear,
    pool,
    rms_norm,
    rope,
    routed_experts,
    sinkhorn,
    swiglu,
)

__all__ = [
    "Mix",
    "Stored",
    "attention",
    "grouped_linear",
    "hc_collapse",
    "hc_expand",
    "hc_logits",
    "hc_read",
    "hc_split",
    "head",
    "index_loss",
    "index_topk",
    "linear",
    "pool",
    "rms_norm",
    "rope",
    "routed_experts",
    "sinkhorn",
    "swiglu",
]
