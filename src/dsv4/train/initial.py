"""What a network's weights are before it has learned anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import V4Config
from ..layers import Embedding, Head, Norm
from ..model import Transformer


def init_weights(net: Transformer, seed: int = 0, std: float | None = None) -> None:
    """Float32 masters for training, ready to learn; ``seed`` decides everything.

    Matrices are normal with ``std`` (V3 used 0.006), or, by default, with ``fan_in ** -0.5``,
    except that blocks write nothing into the streams at first and the embedding has std 1,
    which is what small models want. Norms are one, biases and sinks zero. mHC starts as a
    plain residual: streams read evenly, written with weight one, and hardly mixed.
    """
    generator = torch.Generator().manual_seed(seed)
    h = net.config.hc_mult
    for name, parameter in list(net.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        value = torch.zeros(parameter.shape)
        if leaf == "tid2eid":
            value = hash_routing(net.config)
        elif leaf.endswith("_scale"):
            value.fill_(0.01)
        elif leaf == "hc_head_base":
            value.fill_(-math.log(h - 1) if h > 1 else 4.0)
        elif leaf.endswith("_base"):
            value[:h] = -math.log(h - 1) if h > 1 else 4.0
            value[2 * h :] = (4 * torch.eye(h)).flatten()
        elif isinstance(module, Norm):
            value.fill_(1.0)
        elif std is None and isinstance(module, Embedding):
            value.normal_(0, 1, generator=generator)
        elif std is None and (isinstance(module, Head) or owner.endswith((".wo_b", ".w2"))):
            pass
        elif parameter.dim() == 2 and leaf != "ape":
            value.normal_(0, std or parameter.shape[1] ** -0.5, generator=generator)
        trainable = leaf not in ("tid2eid", "bias")
        setattr(module, leaf, nn.Parameter(value, requires_grad=trainable))
    net.tapes.clear()


def hash_routing(config: V4Config) -> Tensor:
    """A frozen table token id -> experts ``[V, K]`` (int64), distinct in a row and balanced."""
    token = torch.arange(config.vocab_size)[:, None]
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    generator = torch.Generator().manual_seed(0x5EED)
    order = torch.randperm(experts, generator=generator)
    stride = 1 + torch.randint(experts, (config.vocab_size, 1), generator=generator) % max(
        1, (experts - 1) // max(1, k - 1)
    )
    return order[(token + torch.arange(k) * stride) % experts]
