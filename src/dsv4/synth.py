"""Models of any shape with random weights, for tests and benchmarks of whatever reads V4 files."""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .config import FP8_BLOCK, RopeScaling, V4Config
from .encoding import SPECIAL_TOKENS
from .errors import ConfigError
from .formats import MAX_TENSORS, MTP_COPIES, TORCH_DTYPES, inventory
from .quant import E4M3, E8M0, FP4_VALUES
from .tokenizer import Tokenizer

# Shapes to compare implementations on; every part of V4 is in them.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512, "num_attention_heads": 8, "q_lora_rank": 256, "o_groups": 2,
        "o_lora_rank": 256, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 256, "index_n_heads": 8, "index_topk": 128,
    },
    "mid": {
        "hidden_size": 2048, "num_attention_heads": 32, "q_lora_rank": 512, "o_groups": 4,
        "o_lora_rank": 512, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1024, "index_n_heads": 32, "index_topk": 512,
    },
}  # fmt: skip
LAYERS = (0, 0, 4, 128, 4, 128, 4, 128, 0)


def resize(config: V4Config, scale: float = 1.0, **changes: Any) -> V4Config:
    """Another shape of the same architecture, for tests and benchmarks.

    ``scale`` multiplies hidden size, expert width, ranks, experts, heads and output groups and
    rounds them to legal multiples. ``changes`` are config keys; what depends on them follows:
    fewer layers keep the first of the pattern and the MTP entry, experts per token and hash
    layers never exceed what there is, output groups divide the heads. Raises ConfigError.
    """

    def near(value: int, multiple: int) -> int:
        return max(multiple, round(value * scale / multiple) * multiple)

    known = {f.name for f in fields(V4Config)} - {"extra"}
    if unknown := sorted(set(changes) - known):
        raise ConfigError("no such config key", expected=", ".join(sorted(known)), got=unknown[0])
    if not scale > 0:
        raise ConfigError("scale", expected="a number above 0", got=scale)
    new = config.to_dict()
    if scale != 1:
        new["hidden_size"] = near(config.hidden_size, 256)
        for key in ("moe_intermediate_size", "q_lora_rank", "o_lora_rank"):
            new[key] = near(getattr(config, key), FP8_BLOCK)
        new["n_routed_experts"] = near(config.n_routed_experts, 8)
        new["o_groups"] = near(config.o_groups, 1)
        new["num_attention_heads"] = new["o_groups"] * config.num_attention_heads // config.o_groups
    if isinstance(changes.get("rope_scaling"), RopeScaling):
        changes["rope_scaling"] = vars(changes["rope_scaling"])
    new.update(changes)
    follows: dict[str, Any] = {}
    try:
        layers, heads = int(new["num_hidden_layers"]), int(new["num_attention_heads"])
        pattern = list(config.compress_ratios[: config.num_hidden_layers])
        while len(pattern) < min(layers, MAX_TENSORS):
            pattern.append(pattern[-2] if len(pattern) > 1 else pattern[-1])
        mtp = [0] * int(new["num_nextn_predict_layers"])
        follows["compress_ratios"] = pattern[:layers] + mtp
        follows["num_hash_layers"] = min(config.num_hash_layers, layers)
        follows["o_groups"] = math.gcd(heads, int(new["o_groups"]))
        follows["num_experts_per_tok"] = min(
            config.num_experts_per_tok, int(new["n_routed_experts"])
        )
    except (TypeError, ValueError) as e:
        raise ConfigError("a size must be a whole number", got=e) from e
    new.update((key, value) for key, value in follows.items() if key not in changes)
    return V4Config.from_dict(new)


def shape(name: str) -> V4Config:
    """The configuration of a synthetic shape; ConfigError for an unknown name."""
    if name not in SHAPES:
        raise ConfigError("no such synthetic shape", expected=", ".join(SHAPES), got=name)
    layers = {"num_hidden_layers": len(LAYERS) - 1, "compress_ratios": LAYERS}
    changes: dict[str, Any] = {"vocab_size": 16384, "num_hash_layers": 2} | layers | SHAPES[name]
    return resize(V4Config.preset("flash"), **changes)


def synthesize(config: V4Config, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random, finite weights for ``config``, one tensor at a time, for ``save_checkpoint``.

    Matrices have a standard deviation near ``1 / sqrt(fan_in)``, norms are near 1, so activations
    and logits stay of order one at any shape. Each tensor depends on ``seed`` and its name alone
    (counter-based Philox), so a run is repeatable and the order does not matter.
    """
    specs = inventory(config)
    for name, spec in specs.items():
        if name.endswith(".scale"):
            continue  # comes with its weight
        scale_spec = specs.get(name.removesuffix("weight") + "scale")
        random = _random(seed, MTP_COPIES.get(name, name))
        if scale_spec is not None and name.endswith(".weight"):
            fp4 = spec.dtype == "I8"
            table, rms = _fp4_table() if fp4 else _fp8_table()
            codes = _draw(random, spec.elements, np.uint8, table, TORCH_DTYPES[spec.dtype])
            fan_in = spec.shape[1] * (2 if fp4 else 1)
            # exponents e and e - 1 in equal parts: root mean square 0.79 * 2^e
            exponent = round(math.log2(1 / (0.79 * rms * math.sqrt(fan_in))))
            bits = torch.from_numpy(_bytes(random, scale_spec.elements) & 1)
            scale = (127 + exponent - bits).to(torch.uint8).view(E8M0)
            yield name, codes.view(spec.shape)
            yield (
                name.removesuffix("weight") + "scale",
                scale.to(TORCH_DTYPES[scale_spec.dtype]).view(scale_spec.shape),
            )
        elif spec.dtype == "I64":
            yield name, _distinct_ids(random, spec.shape, config.n_routed_experts)
        else:
            mean, std = _statistics(name, spec.shape)
            table = torch.from_numpy(_quantiles(65536)) * std + mean
            values = _draw(random, spec.elements, np.uint16, table, TORCH_DTYPES[spec.dtype])
            yield name, values.view(spec.shape)


def small_tokenizer(config: V4Config, wanted: bool | None = None) -> dict[str, bytes]:
    """The files of a byte-level tokenizer that fits ``config``: name -> content.

    Empty when it is not ``wanted`` or, without a wish, when the vocabulary has no room for one.
    """
    least = len(SPECIAL_TOKENS) + 256
    if wanted is False or (wanted is None and config.vocab_size < least):
        return {}
    text = "\n".join(name for name in inventory(config) if "experts" not in name)
    trained = Tokenizer.train([text], min(config.vocab_size, least + 256), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trained.save(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def _statistics(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of an unquantised tensor."""
    last = name.rsplit(".", 1)[-1]
    if "norm.weight" in name:
        return 1.0, 0.1
    if last.startswith("hc_") and last.endswith("_scale"):
        return 0.2, 0.03
    fixed = {"attn_sink": 0.1, "bias": 0.01, "ape": 0.3}
    if last in fixed or last.endswith("_base"):
        return 0.0, fixed.get(last, 0.5)
    if name in ("embed.weight", "mtp.0.emb.tok_emb.weight"):
        return 0.0, 1.0
    return 0.0, 1 / math.sqrt(shape[-1])


def _random(seed: int, name: str) -> np.random.Philox:
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little"))


def _bytes(random: np.random.Philox, count: int) -> npt.NDArray[np.uint8]:
    words = random.random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def _draw(
    random: np.random.Philox, count: int, index: type[Any], table: Tensor, dtype: torch.dtype
) -> Tensor:
    """``count`` entries of ``table`` (one per value of the unsigned ``index`` type) at random."""
    table = table.to(dtype)
    width = table.element_size()
    as_bytes = table.view(torch.uint8).numpy().reshape(-1, width)
    lookup = as_bytes.copy().view(f"u{width}").reshape(-1)
    out = np.empty(count, dtype=lookup.dtype)
    step = 2**23
    for begin in range(0, count, step):
        n = min(step, count - begin)
        picks = _bytes(random, n * np.dtype(index).itemsize).view(index)
        np.take(lookup, picks, out=out[begin : begin + n], mode="clip")  # in range; unbuffered
    return torch.from_numpy(out.view(np.uint8)).view(dtype)


def _distinct_ids(random: np.random.Philox, shape: tuple[int, ...], experts: int) -> Tensor:
    """``[rows, k]`` expert ids, distinct within a row and evenly used: start + j * step."""
    rows, k = shape
    steps = np.array([s for s in range(1, experts + 1) if math.gcd(s, experts) == 1])
    start = random.random_raw(rows) % experts
    step = steps[random.random_raw(rows) % len(steps)]
    ids = (start[:, None].astype(np.int64) + step[:, None] * np.arange(k)) % experts
    return torch.from_numpy(ids.astype(np.int64))


@functools.cache
def _quantiles(n: int) -> npt.NDArray[np.float32]:
    """``n`` equally likely values of the standard normal distribution, symmetric about 0."""
    normal = statistics.NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (i + 0.5) / n) for i in range(n // 2)])
    return np.concatenate((-upper[::-1], upper)).astype(np.float32)


@functools.cache
def _fp8_table() -> tuple[Tensor, float]:
    values = (torch.from_numpy(_quantiles(256)) * 128).to(E4M3)
    return values, float(values.float().square().mean().sqrt())


@functools.cache
def _fp4_table() -> tuple[Tensor, float]:
    """Every pair of 16 equally likely FP4 values as one byte, and their root mean square."""
    target = torch.from_numpy(_quantiles(16)) * (6 / 1.863)
    levels = torch.tensor(FP4_VALUES)
    code = (target.abs()[:, None] - levels).abs().argmin(1)
    nibble = code + 8 * (target < 0)
    pairs = (nibble[:, None] + 16 * nibble[None, :]).reshape(-1)
    return pairs.to(torch.uint8).view(torch.int8), float(levels[code].square().mean().sqrt())
