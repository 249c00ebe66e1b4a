"""V4Config: the official ``config.json`` keys in and out, the presets, and the counts that follow.

The field names are the keys of the published files, so a config reads and writes without a map.
Numbers of the presets: DeepSeek-V4 report table 1 and the published ``config.json`` files.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError

ARCHITECTURE = "DeepseekV4ForCausalLM"
FP8_BLOCK = 128  # a scale of an FP8 weight covers 128 x 128 elements
FP4_BLOCK = 32  # a scale of an FP4 weight covers 32 consecutive inputs of one output
PRESETS = ("nano", "flash", "pro", "flash-base", "pro-base")


class ParameterCounts(NamedTuple):
    """Numbers of weights; block scales are not counted.

    ``total`` is the trunk and the MTP block, ``active`` what one token uses of the trunk (one of
    the two vocabulary matrices counted, as the report does), ``mtp`` the MTP block alone.
    """

    total: int
    active: int
    mtp: int


@dataclass(frozen=True)
class RopeScaling:
    """YaRN; used only by layers with a compressor. ``factor`` 1 switches it off.

    Raises ConfigError for numbers that describe no rotation.
    """

    type: str = "yarn"
    factor: float = 16
    beta_fast: float = 32
    beta_slow: float = 1
    original_max_position_embeddings: int = 65536

    def __post_init__(self) -> None:
        _check_types(self, "rope_scaling.")
        hint = "V4 models have yarn with factor 16, beta_fast 32 and beta_slow 1"
        _need(self.type == "yarn", "rope_scaling.type", "yarn", self.type, hint)
        _need(self.factor >= 1, "rope_scaling.factor", "at least 1", self.factor, hint)
        _need(
            0 < self.beta_slow <= self.beta_fast,
            "rope_scaling.beta_slow and beta_fast",
            "0 < beta_slow <= beta_fast",
            f"{self.beta_slow} and {self.beta_fast}",
            hint,
        )
        _need(
            self.original_max_position_embeddings > 0,
            "rope_scaling.original_max_position_embeddings",
            "an integer >= 1",
            self.original_max_position_embeddings,
            hint,
        )


@dataclass(frozen=True)
class V4Config:
    """The shape and the storage format of a V4 model. Immutable; checked when it is made.

    ``compress_ratios`` has one entry per layer and one per MTP block: 0 is window-only attention,
    4 is CSA (overlapping compressor, lightning indexer, top-k), any other ratio is HCA.
    Raises ConfigError when the numbers contradict each other.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 43
    num_hash_layers: int = 3
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 64
    num_key_value_heads: int = 1
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    q_lora_rank: int = 1024
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4, 0)
    compress_rope_theta: float = 160000.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int = 1048576
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    expert_dtype: str = "fp4"  # "fp4" instruct; "fp8" Base and FP8-only; "bf16" unquantised
    quantization_config: Mapping[str, Any] | None = field(
        default_factory=lambda: dict(_QUANTIZATION)
    )
    extra: Mapping[str, Any] = field(default_factory=dict)  # keys kept but not understood

    def __post_init__(self) -> None:
        _check_types(self)
        if isinstance(self.compress_ratios, list):
            object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        self._check_ranges()
        self._check_attention()
        self._check_experts()
        self._check_storage()

    def _check_ranges(self) -> None:
        """Each number by itself."""
        for names, least, least_excluded in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                inside = value > least if least_excluded else value >= least
                expected = f"a number {'above' if least_excluded else 'of at least'} {least}"
                _need(inside, name, expected, value)
        for name, (only, reason) in _FIXED.items():
            _need(getattr(self, name) == only, name, only, getattr(self, name), reason)
        for name in ("bos_token_id", "eos_token_id"):
            _need(
                0 <= getattr(self, name) < self.vocab_size,
                f"{name} is not in the vocabulary",
                f"0..{self.vocab_size - 1}",
                getattr(self, name),
                "the official tokenizer has 0 and 1",
            )

    def _check_attention(self) -> None:
        entries = self.num_hidden_layers + self.num_nextn_predict_layers
        ratios = self.compress_ratios
        _need(
            isinstance(ratios, tuple) and all(type(ratio) is int for ratio in ratios),
            "compress_ratios",
            "a list of whole numbers",
            ratios,
            "0 = window only, 4 = CSA, 128 = HCA",
        )
        _need(
            len(ratios) == entries,
            "compress_ratios needs one entry per layer and one per MTP block",
            f"{entries} entries",
            len(ratios),
            "0 = window only, 4 = CSA, 128 = HCA; MTP blocks are 0",
        )
        for i, ratio in enumerate(ratios):
            ok = ratio == 0 or (ratio > 1 and 128 % ratio == 0)
            _need(ok, f"compress_ratios[{i}]", "0, 4 or 128", ratio, "a ratio must divide 128")
        hint = "V4 has one window-only MTP block"
        _need(
            self.num_nextn_predict_layers <= 1,
            "num_nextn_predict_layers",
            "0 or 1",
            self.num_nextn_predict_layers,
            hint,
        )
        if self.num_nextn_predict_layers:
            _need(ratios[-1] == 0, "the MTP block's compress ratio", 0, ratios[-1], hint)
        narrowest = min(self.head_dim, self.index_head_dim + 1)
        _need(
            self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim < narrowest,
            "qk_rope_head_dim rotates the last channels of head_dim and index_head_dim",
            f"an even number below {narrowest}",
            self.qk_rope_head_dim,
            "64 in every V4 model",
        )
        _need(
            self.index_head_dim & (self.index_head_dim - 1) == 0,
            "index_head_dim is rotated by a Hadamard matrix",
            "a power of two",
            self.index_head_dim,
            "128 in every V4 model",
        )
        _need(
            self.num_attention_heads % self.o_groups == 0,
            "o_groups must divide the heads",
            f"a divisor of {self.num_attention_heads}",
            self.o_groups,
            "8 for 64 heads, 16 for 128 heads",
        )

    def _check_experts(self) -> None:
        _need(
            self.num_experts_per_tok <= self.n_routed_experts,
            "more experts per token than experts",
            f"num_experts_per_tok <= {self.n_routed_experts}",
            self.num_experts_per_tok,
            "lower num_experts_per_tok",
        )
        _need(
            self.num_hash_layers <= self.num_hidden_layers,
            "num_hash_layers",
            f"0..{self.num_hidden_layers}",
            self.num_hash_layers,
            "hash-routed layers are the first ones of the trunk",
        )

    def _check_storage(self) -> None:
        _need(
            self.expert_dtype in ("fp4", "fp8", "bf16"),
            "expert_dtype",
            "fp4, fp8 or bf16",
            self.expert_dtype,
            "instruct checkpoints are fp4, Base checkpoints fp8",
        )
        quantized = self.quantization_config
        _need(
            quantized is None or _is_object(quantized),
            "quantization_config",
            "a JSON object or null",
            quantized,
            "null goes with expert_dtype bf16",
        )
        _need(
            isinstance((quantized or {}).get("scale_fmt", ""), str | None),
            "quantization_config.scale_fmt",
            "ue8m0, or no such key in Base checkpoints",
            (quantized or {}).get("scale_fmt"),
        )
        _need(_is_object(self.extra), "extra", "an object", self.extra, "leave it out")
        named = {*_HEADER, *(f.name for f in fields(self))} - {"extra"}
        clash = named & set(self.extra)
        _need(
            not clash,
            "extra is for keys that V4Config has no field for",
            "other keys",
            ", ".join(sorted(clash)),
            "give them as fields",
        )

    # ------------------------------------------------------------------ derived

    @property
    def mtp_layers(self) -> int:
        return self.num_nextn_predict_layers

    @property
    def is_base(self) -> bool:
        """Base format: FP8 experts, F32 scales, an MTP block with its own embedding and head."""
        return self.expert_dtype == "fp8" and self._scale_fmt is None

    @property
    def _scale_fmt(self) -> str | None:
        return (self.quantization_config or {}).get("scale_fmt")

    def parameter_counts(self) -> ParameterCounts:
        """Weights in the trunk + MTP, used by one token, and in the MTP block alone."""
        d, hd, heads = self.hidden_size, self.head_dim, self.num_attention_heads
        expert = 3 * d * self.moe_intermediate_size
        attn_fixed = (
            d * self.q_lora_rank
            + self.q_lora_rank * (1 + heads * hd)
            + d * hd
            + hd
            + heads
            + heads * hd * self.o_lora_rank
            + self.o_groups * self.o_lora_rank * d
        )
        hc = self.hc_mult
        mixes = (2 + hc) * hc
        site = mixes * hc * d + mixes + 3
        collapse = hc * hc * d + hc + 1

        def compressor(ratio: int, dim: int) -> int:
            width = dim * (2 if ratio == 4 else 1)
            return 2 * d * width + ratio * width + dim

        def block(ratio: int, routed: int, hashed: bool, count_bias: bool) -> int:
            n = attn_fixed + 2 * d + 2 * site
            if ratio:
                n += compressor(ratio, hd)
            if ratio == 4:
                width = self.index_n_heads * self.index_head_dim
                n += self.q_lora_rank * width + self.index_n_heads * d
                n += compressor(ratio, self.index_head_dim)
            n += routed * expert + self.n_shared_experts * expert + self.n_routed_experts * d
            return n + (self.n_routed_experts if count_bias and not hashed else 0)

        def trunk(routed: int) -> int:
            layers = enumerate(self.compress_ratios[: self.num_hidden_layers])
            return sum(block(r, routed, i < self.num_hash_layers, True) for i, r in layers)

        shared = d + collapse
        total = trunk(self.n_routed_experts) + shared + 2 * self.vocab_size * d
        active = trunk(self.num_experts_per_tok) + shared + self.vocab_size * d
        mtp = 0
        if self.mtp_layers:
            mtp = block(0, self.n_routed_experts, False, True) + 2 * d * d + 3 * d + collapse
            if self.is_base:
                mtp += 2 * self.vocab_size * d
        return ParameterCounts(total + mtp, active, mtp)

    # ------------------------------------------------------------------ in and out

    @classmethod
    def preset(cls, name: str) -> V4Config:
        """A published shape (or ``nano``) by name; raises ConfigError for any other."""
        if name not in PRESETS:
            raise ConfigError(
                "no such preset",
                expected=", ".join(PRESETS),
                got=_shown(name),
                hint="V4Config.from_json reads any other",
            )
        size, _, base = name.partition("-")
        config = _NANO if size == "nano" else _PRO if size == "pro" else cls()
        return replace(config, **_BASE) if base else config

    @classmethod
    def from_json(cls, path: str | Path) -> V4Config:
        """Read an official ``config.json`` (or a folder that holds one)."""
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        if not file.is_file():
            raise ConfigError(
                f"no config at {file}",
                expected="config.json beside the safetensors files",
                got="no such file",
                hint="give the checkpoint's folder",
            )
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as e:
            raise ConfigError(
                f"cannot read {file}", expected="JSON", got=e, hint="fetch the file again"
            ) from e

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> V4Config:
        """From the parsed ``config.json``. Unknown keys are kept and written back.

        The keys that transformers writes instead of the official ones are understood too
        (layer_types, rope_parameters, ...); ``to_dict`` gives the official ones.
        """
        if not _is_object(data):
            raise ConfigError(
                "config.json",
                expected="a JSON object",
                got=_shown(data),
                hint="V4Config.from_json reads a file",
            )
        architectures = data.get("architectures")
        listed = architectures if isinstance(architectures, list | tuple) else []
        model_type = data.get("model_type", "deepseek_v4")
        if model_type != "deepseek_v4" or not (architectures is None or ARCHITECTURE in listed):
            raise ConfigError(
                "this is not a DeepSeek-V4 model",
                expected=f"architectures [{ARCHITECTURE}], model_type deepseek_v4",
                got=f"{_shown(architectures)}, {_shown(model_type)}",
                hint="dsv4 runs V4 only; V3.2 and V4.1 are other architectures",
            )
        data = _official(data)
        missing = [n for n in _REQUIRED if n not in data]
        if missing:
            raise ConfigError(
                "config.json lacks required keys",
                expected=", ".join(missing),
                got="absent",
                hint="compare with a published one: dsv4 inspect --preset flash",
            )
        names = {f.name for f in fields(cls)} - {"extra", "rope_scaling"}
        known = {k: copy.deepcopy(v) for k, v in data.items() if k in names}
        known["rope_scaling"] = _rope_scaling(data.get("rope_scaling"))
        if "expert_dtype" not in data:  # the first Pro upload lacked the key
            known["expert_dtype"] = "fp4" if data.get("quantization_config") else "bf16"
        known.setdefault("quantization_config", None)
        skip = names | _HEADER | {"rope_scaling"}
        known["extra"] = {k: copy.deepcopy(v) for k, v in data.items() if k not in skip}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The official keys, ready for ``json.dump``; ``from_dict`` is its inverse."""
        out: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "deepseek_v4"}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "extra":
                continue
            if isinstance(value, RopeScaling):
                value = {k.name: getattr(value, k.name) for k in fields(RopeScaling)}
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = copy.deepcopy(dict(value))
            if value is not None:
                out[f.name] = value
        return out | copy.deepcopy(dict(self.extra))

    def to_json(self, path: str | Path) -> None:
        """Write ``config.json`` at ``path`` (a file)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ checking


def _need(ok: bool, what: str, expected: object, got: object, hint: str = "") -> None:
    if not ok:
        hint = hint or "compare with a preset: dsv4 inspect --preset flash"
        raise ConfigError(what, expected=expected, got=_shown(got), hint=hint)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _check_types(config: V4Config | RopeScaling, prefix: str = "") -> None:
    """Fields annotated int, float, bool and str hold just that; a float may be a whole number."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type == "int":
            ok, expected = type(value) is int, "a whole number"
        elif f.type == "float":
            ok, expected = type(value) in (int, float) and _is_finite(value), "a finite number"
        elif f.type == "bool":
            ok, expected = type(value) is bool, "true or false"
        elif f.type == "str":
            ok, expected = isinstance(value, str), "a string"
        elif f.type == "RopeScaling":
            ok, expected = isinstance(value, RopeScaling), "a RopeScaling"
        else:
            continue
        _need(ok, prefix + f.name, expected, repr(value))


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no float holds
        return False


# ------------------------------------------------------------------ what others write


def _rope_scaling(scaling: object) -> RopeScaling:
    """From ``rope_scaling``, whose kind is under ``type`` or, in newer files, ``rope_type``."""
    if scaling is None or scaling == {}:
        return RopeScaling(factor=1)
    _need(_is_object(scaling), "rope_scaling", "a JSON object or null", scaling)
    assert isinstance(scaling, Mapping)
    kind = scaling.get("type", scaling.get("rope_type", "yarn"))
    if kind == "default":
        return RopeScaling(factor=1)
    _need("factor" in scaling, "rope_scaling.factor", "a number of at least 1", "absent")
    keep = {f.name for f in fields(RopeScaling)}
    return RopeScaling(**{k: v for k, v in scaling.items() if k in keep} | {"type": kind})


def _official(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with the official keys, where transformers wrote its own for the same things."""
    out = dict(data)
    kinds, rates = out.pop("layer_types", None), out.pop("compress_rates", None)
    if "compress_ratios" not in out and isinstance(kinds, list):
        table = {"sliding_attention": 0, **_RATES, **(rates if _is_object(rates) else {})}
        mtp = out.get("num_nextn_predict_layers", 1)
        out["compress_ratios"] = [table.get(str(kind)) for kind in kinds]
        out["compress_ratios"] += [0] * (mtp if type(mtp) is int and mtp < 9 else 0)
    routers = out.pop("mlp_layer_types", None)
    if "num_hash_layers" not in out and isinstance(routers, list):
        hashed = [router == "hash_moe" for router in routers]
        _need(
            hashed == sorted(hashed, reverse=True),
            "mlp_layer_types",
            "hash_moe layers first",
            routers,
            "V4 routes by hash in its first layers only",
        )
        out["num_hash_layers"] = sum(hashed)
    ropes = out.pop("rope_parameters", None)
    if "rope_scaling" not in out and isinstance(ropes, Mapping):
        out["rope_scaling"] = ropes.get("compress", ropes)
        for key, name in (("rope_theta", "main"), ("compress_rope_theta", "compress")):
            if isinstance(rope := ropes.get(name), Mapping) and "rope_theta" in rope:
                out.setdefault(key, rope["rope_theta"])
    if isinstance(dtype := out.pop("dtype", None), str):
        out.setdefault("torch_dtype", dtype)
    quantized = out.get("quantization_config")
    if isinstance(quantized, Mapping) and "expert_dtype" in quantized:
        out["quantization_config"] = {k: v for k, v in quantized.items() if k != "expert_dtype"}
        out.setdefault("expert_dtype", quantized["expert_dtype"])
    return out


_RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_REQUIRED = (
    "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "n_routed_experts num_experts_per_tok q_lora_rank o_groups o_lora_rank compress_ratios"
).split()
_HEADER = {"architectures", "model_type"}
# (names, least value, is the least itself excluded?)
_RANGES = (
    (
        "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "n_routed_experts n_shared_experts num_experts_per_tok q_lora_rank head_dim "
        "qk_rope_head_dim o_groups o_lora_rank sliding_window max_position_embeddings "
        "index_n_heads index_head_dim index_topk hc_mult hc_sinkhorn_iters",
        1,
        False,
    ),
    ("num_hash_layers num_nextn_predict_layers swiglu_limit initializer_range", 0, False),
    ("routed_scaling_factor hc_eps rms_norm_eps", 0, True),
    ("rope_theta compress_rope_theta", 1, True),
)
_FIXED: dict[str, tuple[object, str]] = {
    "num_key_value_heads": (1, "V4 attention has one key/value head"),
    "scoring_func": ("sqrtsoftplus", "V3's sigmoid routing is another architecture"),
    "topk_method": ("noaux_tc", "V4's router has a bias that only selects"),
    "hidden_act": ("silu", "V4's experts are SwiGLU"),
    "attention_bias": (False, "V4 has no attention bias"),
    "tie_word_embeddings": (False, "V4 does not tie its embeddings"),
}
_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
_BASE: dict[str, Any] = {
    "expert_dtype": "fp8",
    "quantization_config": {k: v for k, v in _QUANTIZATION.items() if k != "scale_fmt"},
}
_PRO = V4Config(
    hidden_size=7168,
    moe_intermediate_size=3072,
    num_hidden_layers=61,
    num_attention_heads=128,
    n_routed_experts=384,
    routed_scaling_factor=2.5,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    index_topk=1024,
)
_NANO = V4Config(
    vocab_size=2048,
    hidden_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=5,
    num_hash_layers=1,
    num_attention_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=2,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    compress_ratios=(0, 0, 4, 128, 4, 0),
    index_n_heads=4,
)
