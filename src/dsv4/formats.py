"""The four storage formats, and the tensors a checkpoint has in each: from the config alone.

All knowledge of official names, shapes and dtypes is here. The formats share the tensor names:

    instruct   FP4 experts, FP8 dense, E8M0 scales     (DeepSeek-V4-Flash, -Pro; v4-nano)
    fp8        FP8 experts, FP8 dense, E8M0 scales
    base       the same with F32 scales, and an embedding and head of its own in the MTP block
    bf16       no quantisation, no scales
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from .config import FP4_BLOCK, FP8_BLOCK, V4Config
from .errors import ConfigError

FORMATS = ("instruct", "fp8", "base", "bf16")
MAX_TENSORS = 10_000_000  # V4-Pro has 145,116

# In the order in which safetensors lays tensors out in a file (then by name).
TORCH_DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
MTP_COPIES = {
    "mtp.0.emb.tok_emb.weight": "embed.weight",
    "mtp.0.head.weight": "head.weight",
}
"""What only Base files store twice: the MTP block's own matrix, and the trunk's it equals."""


class TensorSpec(NamedTuple):
    """What a file stores under one name: the safetensors dtype and the stored shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def storage_format(config: V4Config) -> str:
    """Which of FORMATS ``config`` describes; raises ConfigError when it describes none."""
    quantized = config.quantization_config
    if config.expert_dtype == "bf16" and quantized is None:
        return "bf16"
    if (
        config.expert_dtype == "bf16"
        or not isinstance(quantized, Mapping)
        or quantized.get("quant_method", "fp8") != "fp8"
    ):
        raise ConfigError(
            "expert_dtype and quantization_config contradict each other",
            expected="fp4 or fp8 experts with quant_method fp8, or bf16 with no quantization",
            got=f"expert_dtype {config.expert_dtype}, quantization_config {quantized}",
        )
    block = quantized.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    if block not in ([FP8_BLOCK, FP8_BLOCK], (FP8_BLOCK, FP8_BLOCK)):
        raise ConfigError(
            "weight_block_size", expected=[FP8_BLOCK, FP8_BLOCK], got=block, hint="V4 has no other"
        )
    if config.expert_dtype == "fp4":
        return "instruct"
    return "base" if config.is_base else "fp8"


def with_format(config: V4Config, to: str) -> V4Config:
    """The same model stored in another of FORMATS."""
    if to not in FORMATS:
        raise ConfigError("no such storage format", expected=", ".join(FORMATS), got=to)
    if to == "bf16":
        return replace(config, expert_dtype="bf16", quantization_config=None)
    quantization = dict(config.quantization_config or V4Config().quantization_config or {})
    quantization["scale_fmt"] = "ue8m0"
    if to == "base":
        del quantization["scale_fmt"]
    expert_dtype = "fp4" if to == "instruct" else "fp8"
    return replace(config, expert_dtype=expert_dtype, quantization_config=quantization)


def inventory(config: V4Config) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this config, in reading order, from the config alone.

    Shapes are the stored ones: an FP4 matrix ``[N, K]`` is I8 ``[N, K / 2]`` with scales
    ``[N, K / 32]``, an FP8 one has scales ``[ceil(N / 128), ceil(K / 128)]``.
    Raises ConfigError for a storage format V4 does not have.
    """
    fmt = storage_format(config)
    c, d, heads, hc = config, config.hidden_size, config.num_attention_heads, config.hc_mult
    rows = (2 + hc) * hc
    blocks = c.num_hidden_layers + c.mtp_layers
    if blocks * (6 * c.n_routed_experts + 60) > MAX_TENSORS:
        raise ConfigError(
            "the config asks for more tensors than any V4 checkpoint has",
            expected=f"at most {MAX_TENSORS:,}",
            got=f"{blocks} layers of {c.n_routed_experts} experts",
        )
    fp4 = fmt == "instruct"
    if fp4 and (d % FP4_BLOCK or c.moe_intermediate_size % FP4_BLOCK):
        raise ConfigError(
            "FP4 experts need sizes that are multiples of 32",
            expected="hidden_size % 32 == 0 and moe_intermediate_size % 32 == 0",
            got=f"{d} and {c.moe_intermediate_size}",
        )
    out: dict[str, TensorSpec] = {}

    def add(name: str, dtype: str, *shape: int) -> None:
        out[name] = TensorSpec(dtype, shape)

    def linear(name: str, n: int, k: int, fp4: bool = False) -> None:
        if fmt == "bf16":
            add(f"{name}.weight", "BF16", n, k)
        elif fp4:
            add(f"{name}.weight", "I8", n, k // 2)
            add(f"{name}.scale", "F8_E8M0", n, k // FP4_BLOCK)
        else:
            add(f"{name}.weight", "F8_E4M3", n, k)
            scale = "F32" if fmt == "base" else "F8_E8M0"
            add(f"{name}.scale", scale, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK))

    def mlp(name: str, width: int, fp4: bool = False) -> None:
        linear(f"{name}.w1", width, d, fp4)
        linear(f"{name}.w2", d, width, fp4)
        linear(f"{name}.w3", width, d, fp4)

    def compressor(name: str, ratio: int, dim: int) -> None:
        width = dim * (2 if ratio == 4 else 1)
        add(f"{name}.ape", "F32", ratio, width)
        add(f"{name}.wkv.weight", "BF16", width, d)
        add(f"{name}.wgate.weight", "BF16", width, d)
        add(f"{name}.norm.weight", "BF16", dim)

    def hc_head(name: str) -> None:
        add(f"{name}hc_head_fn", "F32", hc, hc * d)
        add(f"{name}hc_head_base", "F32", hc)
        add(f"{name}hc_head_scale", "F32", 1)

    def block(name: str, ratio: int, hashed: bool) -> None:
        attn, ffn = f"{name}.attn", f"{name}.ffn"
        add(f"{name}.attn_norm.weight", "BF16", d)
        linear(f"{attn}.wq_a", c.q_lora_rank, d)
        add(f"{attn}.q_norm.weight", "BF16", c.q_lora_rank)
        linear(f"{attn}.wq_b", heads * c.head_dim, c.q_lora_rank)
        linear(f"{attn}.wkv", c.head_dim, d)
        add(f"{attn}.kv_norm.weight", "BF16", c.head_dim)
        add(f"{attn}.attn_sink", "F32", heads)
        linear(f"{attn}.wo_a", c.o_groups * c.o_lora_rank, heads * c.head_dim // c.o_groups)
        linear(f"{attn}.wo_b", d, c.o_groups * c.o_lora_rank)
        if ratio:
            compressor(f"{attn}.compressor", ratio, c.head_dim)
        if ratio == 4:
            linear(f"{attn}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            add(f"{attn}.indexer.weights_proj.weight", "BF16", c.index_n_heads, d)
            compressor(f"{attn}.indexer.compressor", ratio, c.index_head_dim)
        add(f"{name}.ffn_norm.weight", "BF16", d)
        add(f"{ffn}.gate.weight", "BF16", c.n_routed_experts, d)
        if hashed:
            add(f"{ffn}.gate.tid2eid", "I64", c.vocab_size, c.num_experts_per_tok)
        else:
            add(f"{ffn}.gate.bias", "F32", c.n_routed_experts)
        for expert in range(c.n_routed_experts):
            mlp(f"{ffn}.experts.{expert}", c.moe_intermediate_size, fp4)
        mlp(f"{ffn}.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
        for site in ("attn", "ffn"):
            add(f"{name}.hc_{site}_fn", "F32", rows, hc * d)
            add(f"{name}.hc_{site}_base", "F32", rows)
            add(f"{name}.hc_{site}_scale", "F32", 3)

    add("embed.weight", "BF16", c.vocab_size, d)
    for i in range(c.num_hidden_layers):
        block(f"layers.{i}", c.compress_ratios[i], i < c.num_hash_layers)
    hc_head("")
    add("norm.weight", "BF16", d)
    add("head.weight", "BF16", c.vocab_size, d)
    for i in range(c.mtp_layers):
        mtp = f"mtp.{i}"
        if fmt == "base":
            add(f"{mtp}.emb.tok_emb.weight", "BF16", c.vocab_size, d)
        add(f"{mtp}.enorm.weight", "BF16", d)
        add(f"{mtp}.hnorm.weight", "BF16", d)
        linear(f"{mtp}.e_proj", d, d)
        linear(f"{mtp}.h_proj", d, d)
        block(mtp, 0, False)
        hc_head(f"{mtp}.")
        add(f"{mtp}.norm.weight", "BF16", d)
        if fmt == "base":
            add(f"{mtp}.head.weight", "BF16", c.vocab_size, d)
    return out
