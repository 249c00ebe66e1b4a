"""V4 next to V3.2: operations per token and bytes of KV cache at any context length.

The report publishes ratios and a figure, not its bookkeeping. The weights below are the ones under
which all four published FLOPs numbers (27%, 10%, 3.7x, 9.8x) come out; the KV numbers follow from
the storage formats alone. Sources: DeepSeek-V4 report, introduction, figure 1 and section 2; V3.2's
published config.json and inference code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config import V4Config
from ..errors import ConfigError
from .flops import Flops, token_flops
from .memory import kv_bytes, kv_bytes_per_token

WEIGHTS = Flops(fp8=1, fp4=1, bf16=2, head=1, core=2, index_fp4=0.5, index_fp8=1)
"""What one operation of each kind costs, in FP8 operations ("equivalent FP8 FLOPs")."""
PARTS = {
    "linear_fp8_fp4": ("fp8", "fp4", "head"),
    "linear_bf16": ("bf16",),
    "core_attention": ("core",),
    "index": ("index_fp4", "index_fp8"),
}
CONTEXTS = tuple(1 << n for n in (13, 15, 17, 18, 19, 20))
MAX_CONTEXT = 1 << 20


class _V32(NamedTuple):
    """DeepSeek-V3.2's shape (its config.json), for comparison only: it is not run here."""

    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    experts: int = 256
    experts_per_token: int = 8
    expert_width: int = 2048
    dense_width: int = 18432
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 2048
    vocab: int = 129280


V32 = _V32()


def v32_kv_bytes_per_token() -> int:
    """61 layers of 512 FP8 + 4 FP32 scales + 64 BF16, and an FP8 index key with its scale."""
    entry = V32.kv_lora + 4 * V32.kv_lora // 128 + 2 * V32.rope
    return V32.layers * (entry + V32.index_dim + 4)


def v32_token_flops(context: int) -> Flops:
    """V3.2's operations for one token at ``context``, in the form that decodes: absorbed MLA."""
    v, d = V32, V32.hidden
    attention = d * (v.q_lora + v.kv_lora + v.rope) + v.q_lora * v.heads * (v.nope + v.rope)
    attention += v.heads * v.value * d + v.q_lora * v.index_heads * v.index_dim + d * v.index_dim
    expert = 3 * d * v.expert_width
    moe_layers = v.layers - v.dense_layers
    fp8 = v.layers * attention + v.dense_layers * 3 * d * v.dense_width
    fp8 += moe_layers * expert * (v.experts_per_token + 1)
    absorbed = v.heads * v.kv_lora * (v.nope + v.value)
    bf16 = v.layers * (absorbed + d * v.index_heads) + moe_layers * d * v.experts
    entry = (v.kv_lora + v.rope) + v.kv_lora  # key, value
    return Flops(
        fp8=2 * fp8,
        bf16=2 * bf16,
        head=2 * d * v.vocab,
        core=2 * v.layers * v.heads * entry * min(context, v.index_topk),
        index_fp8=2 * v.layers * v.index_heads * v.index_dim * context,
    )


def efficiency(
    context: int = MAX_CONTEXT,
    weights: Mapping[str, float] | None = None,
    models: Mapping[str, V4Config] | None = None,
) -> dict[str, Any]:
    """The comparison at ``context`` tokens, as ``dsv4 plan efficiency --json`` prints it.

    ``{"context", "weights", "models": {"v3.2" | "flash" | "pro" | ...}}``; of each model
    ``kv_bytes_per_token`` (rounded; growth only), ``kv_bytes`` (whole cache of one sequence, the
    window included), ``flops`` of one token in FP8-equivalents, their ratios to V3.2 and the
    ``parts`` of the FLOPs. ``weights`` changes some of WEIGHTS, ``models`` adds others. Raises
    ConfigError for a context that V4 does not have and for weights that are none.
    """
    if not 1 <= context <= MAX_CONTEXT:
        raise ConfigError(
            "--context", expected=f"1 to {MAX_CONTEXT:,} tokens (1024k)", got=f"{context:,}"
        )
    bad = {k: v for k, v in (weights or {}).items() if k not in Flops._fields or not v >= 0}
    if bad:
        raise ConfigError(
            "weights of operations",
            expected=f"numbers of at least 0 for {', '.join(Flops._fields)}",
            got=", ".join(f"{k}={v}" for k, v in bad.items()),
        )
    used = WEIGHTS._replace(**(weights or {}))
    per_token = v32_kv_bytes_per_token()
    reference = _row(v32_token_flops(context), used, per_token, per_token * context)
    rows = {"v3.2": reference}
    configs = {name: V4Config.preset(name) for name in ("flash", "pro")} | dict(models or {})
    for name, config in configs.items():
        if context > config.max_position_embeddings:
            raise ConfigError(
                f"{name} has no such context",
                expected=f"at most {config.max_position_embeddings:,} tokens",
                got=f"{context:,}",
            )
        flops = token_flops(config, context)
        rows[name] = _row(flops, used, kv_bytes_per_token(config), kv_bytes(config, context))
    for row in rows.values():
        row["kv_ratio"] = row["kv_bytes"] / reference["kv_bytes"]
        row["flops_ratio"] = row["flops"] / reference["flops"]
    return {"context": context, "weights": used._asdict(), "models": rows}


def _row(flops: Flops, weights: Flops, per_token: float, kv: int) -> dict[str, Any]:
    cost = flops.times(weights)._asdict()
    parts = {name: sum(cost[kind] for kind in kinds) for name, kinds in PARTS.items()}
    return {
        "kv_bytes_per_token": round(per_token),
        "kv_bytes": kv,
        "flops": sum(parts.values()),
        "parts": parts,
    }


def ratios_over_context(contexts: Sequence[int] = CONTEXTS) -> list[dict[str, Any]]:
    """For each context the KV and FLOPs of Flash and Pro as fractions of V3.2's."""
    out = []
    for context in contexts:
        models = efficiency(context)["models"]
        row: dict[str, Any] = {"context": context}
        for name in ("pro", "flash"):
            row[name] = {key: models[name][key] for key in ("kv_ratio", "flops_ratio")}
        out.append(row)
    return out
