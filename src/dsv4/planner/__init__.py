"""The numbers on the box: what a V4 model costs, from its config alone.

    flops        operations of a forward pass, a token, a training step
    memory       bytes of weights, of the KV cache (published formats and ours), of training
    efficiency   V4 next to V3.2 at any context length
    hardware     machines: memory, bandwidth, compute, links, prices, each with its source
    fit          does it fit on a machine, how fast, what limits it, what it costs
    fleet        a simulation of serving, from one replica to ten thousand nodes
"""

from __future__ import annotations

from .efficiency import efficiency, ratios_over_context
from .flops import Flops, forward_flops, token_flops, training_flops
from .memory import (
    activation_bytes,
    block_bytes,
    extend_passes,
    kv_bytes,
    kv_bytes_per_token,
    session_bytes,
    training_bytes,
    training_peak_bytes,
    weight_bytes,
)

__all__ = [
    "Flops",
    "activation_bytes",
    "block_bytes",
    "efficiency",
    "extend_passes",
    "forward_flops",
    "kv_bytes",
    "kv_bytes_per_token",
    "ratios_over_context",
    "session_bytes",
    "token_flops",
    "training_bytes",
    "training_flops",
    "training_peak_bytes",
    "weight_bytes",
]
