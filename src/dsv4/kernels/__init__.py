"""The kernel table: the functions that V4's arithmetic is made of.

Each is defined by its torch reference (``reference.py``); a faster version takes its place in
this table and must agree with it. Nothing here knows a configuration or a model. Callers look a
kernel up at each call (``kernels.linear(...)``), so the table can change at run time.
"""

import torch as _torch

from . import reference as _reference
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
    "compile_elementwise",
    "grouped_linear",
    "hc_collapse",
    "hc_expand",
    "hc_logits",
    "hc_read",
    "hc_split",
    "head",
    "index_topk",
    "linear",
    "pool",
    "rms_norm",
    "rope",
    "routed_experts",
    "sinkhorn",
    "swiglu",
]


def compile_elementwise() -> None:
    """Put fused (torch.compile) versions of the elementwise kernels into the table.

    For training: memory traffic falls by half and more. Needs a C++ compiler; the first step
    takes a minute.
    """
    for name in ("hc_expand", "hc_read", "rms_norm", "rope"):
        globals()[name] = _torch.compile(getattr(_reference, name), dynamic=True)
    _reference.swiglu = _torch.compile(_reference.swiglu, dynamic=True)  # type: ignore[assignment]
    globals()["swiglu"] = _reference.swiglu
