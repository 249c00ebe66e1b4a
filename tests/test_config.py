"""V4Config: the published counts, files that read back as they were, and refusals that help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.config import PRESETS, RopeScaling, V4Config
from dsv4.errors import ConfigError

FLASH = V4Config.preset("flash").to_dict()
STRANGE = (None, -1, 0, 1, 1.5, 1e-6, 2**70, "", "x", [], [[]], ["x"], {}, {"a": 1}, True)


# ------------------------------------------------------------------ the published numbers


@pytest.mark.parametrize(
    ("preset", "total", "trunk", "active"),
    [
        ("flash", "290.94", "284.33", "13.27"),
        ("pro", "1598.8", "1573.0", "48.85"),
    ],
)
def test_presets_have_the_published_counts(
    preset: str, total: str, trunk: str, active: str
) -> None:
    def billions(count: int, like: str) -> str:
        return f"{count / 1e9:.{len(like.partition('.')[2])}f}"

    counts = V4Config.preset(preset).parameter_counts()
    assert billions(counts.total, total) == total
    assert billions(counts.total - counts.mtp, trunk) == trunk
    assert billions(counts.active, active) == active


def test_base_models_store_the_vocabulary_once_more() -> None:
    for preset in ("flash", "pro"):
        config = V4Config.preset(preset)
        instruct, base = (V4Config.preset(p).parameter_counts() for p in (preset, f"{preset}-base"))
        copies = 2 * config.vocab_size * config.hidden_size
        assert (base.total, base.mtp) == (instruct.total + copies, instruct.mtp + copies)
        assert base.active == instruct.active


def test_presets_have_the_published_layers() -> None:
    flash, pro = V4Config.preset("flash"), V4Config.preset("pro")
    assert [flash.compress_ratios.count(r) for r in (0, 4, 128)] == [3, 21, 20]
    assert [pro.compress_ratios.count(r) for r in (0, 4, 128)] == [1, 30, 31]
    assert flash.compress_ratios[:3] == (0, 0, 4) and pro.compress_ratios[:3] == (128, 128, 4)


def test_counts_follow_from_the_inventory() -> None:
    """Stored elements of an unquantised checkpoint, without the frozen routing tables."""
    from dsv4.checkpoint import inventory, with_format

    for preset in PRESETS:
        config = V4Config.preset(preset)
        base = config.is_base
        specs = inventory(config if base else with_format(config, "bf16"))
        stored = sum(
            spec.elements
            for name, spec in specs.items()
            if not name.endswith((".scale", ".tid2eid"))
        )
        assert stored == config.parameter_counts().total, preset


# ------------------------------------------------------------------ in and out


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trips(preset: str, tmp_path: Path) -> None:
    config = V4Config.preset(preset)
    assert V4Config.from_dict(config.to_dict()) == config
    unquantised = replace(config, expert_dtype="bf16", quantization_config=None)
    assert V4Config.from_dict(unquantised.to_dict()) == unquantised
    config.to_json(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        assert V4Config.from_json(path) == config
        assert V4Config.from_json(path).to_dict() == config.to_dict()


def test_unknown_keys_are_kept() -> None:
    config = V4Config.from_dict(FLASH | {"extra": "4.57.1", "notes": [1]})
    assert config.extra == {"extra": "4.57.1", "notes": [1]}
    assert V4Config.from_dict(config.to_dict()) == config
    config.to_dict()["notes"].append(2)
    assert config.extra["notes"] == [1]


def test_null_rope_scaling_means_none() -> None:
    config = V4Config.from_dict(FLASH | {"rope_scaling": None})
    assert config.rope_scaling.factor == 1
    assert V4Config.from_dict(config.to_dict()) == config


def test_expert_dtype_may_be_missing() -> None:
    """As in the first upload of V4-Pro."""
    without = {k: v for k, v in FLASH.items() if k != "expert_dtype"}
    assert V4Config.from_dict(without).expert_dtype == "fp4"
    del without["quantization_config"]
    assert V4Config.from_dict(without).expert_dtype == "bf16"


# What transformers 5.23 writes for V4, cut to the keys that differ.
TRANSFORMERS: dict[str, Any] = {
    "dtype": "bfloat16",
    "layer_types": ["sliding_attention"] * 2
    + ["compressed_sparse_attention", "heavily_compressed_attention"] * 20
    + ["compressed_sparse_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
        "compress": {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
            "rope_theta": 160000.0,
            "attention_factor": 1.0,
        },
    },
    "quantization_config": {**FLASH["quantization_config"], "expert_dtype": "fp4"},
}
OFFICIAL_ONLY = (
    "compress_ratios num_hash_layers rope_scaling compress_rope_theta torch_dtype expert_dtype"
).split()


def test_files_written_by_transformers_are_understood() -> None:
    written = {k: v for k, v in FLASH.items() if k not in OFFICIAL_ONLY} | TRANSFORMERS
    assert V4Config.from_dict(written) == V4Config.preset("flash")
    flat = written | {"rope_parameters": {"rope_type": "yarn", "factor": 8}}
    assert V4Config.from_dict(flat).rope_scaling == RopeScaling(factor=8)
    newer = FLASH | {"rope_scaling": {"rope_type": "yarn", "factor": 8}}
    assert V4Config.from_dict(newer).rope_scaling == RopeScaling(factor=8)
    plain = FLASH | {"rope_scaling": {"rope_type": "default"}}
    assert V4Config.from_dict(plain).rope_scaling.factor == 1


def test_a_real_file_of_transformers_is_understood(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = V4Config.preset("nano")
    config.to_json(tmp_path / "config.json")
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    theirs = V4Config.from_json(tmp_path / "theirs")
    assert replace(theirs, extra={}) == config


# ------------------------------------------------------------------ refusals


def refused(data: Any) -> str:
    with pytest.raises(ConfigError) as error:
        V4Config.from_dict(data)
    text = str(error.value)
    for part in ("expected: ", "got: ", "try: "):
        assert part in text, text
    return text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "4096"}, ["hidden_size", "a whole number", "'4096'"]),
        ({"hidden_size": 4096.0}, ["hidden_size", "a whole number", "4096.0"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"hidden_size": 0}, ["hidden_size", "at least 1"]),
        ({"num_hash_layers": -1}, ["num_hash_layers", "at least 0"]),
        ({"num_hash_layers": 44}, ["num_hash_layers", "0..43"]),
        ({"swiglu_limit": "10"}, ["swiglu_limit", "a finite number"]),
        ({"swiglu_limit": -1.0}, ["swiglu_limit", "at least 0", "-1.0"]),
        ({"rope_theta": [10000]}, ["rope_theta", "a finite number"]),
        ({"rope_theta": 1}, ["rope_theta", "above 1"]),
        ({"compress_rope_theta": float("inf")}, ["compress_rope_theta", "inf"]),
        ({"compress_rope_theta": 10**400}, ["compress_rope_theta", "a finite number"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "above 0"]),
        ({"hc_eps": -1e-6}, ["hc_eps", "above 0"]),
        ({"routed_scaling_factor": 0.0}, ["routed_scaling_factor", "above 0"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob", "true or false"]),
        ({"bos_token_id": 129280}, ["bos_token_id", "0..129279", "129280"]),
        ({"eos_token_id": -1}, ["eos_token_id", "0..129279"]),
        ({"eos_token_id": [1]}, ["eos_token_id", "a whole number"]),
        ({"torch_dtype": 16}, ["torch_dtype", "a string"]),
        ({"expert_dtype": "int4"}, ["expert_dtype", "int4"]),
        ({"quantization_config": "fp8"}, ["quantization_config", "a JSON object or null"]),
        ({"quantization_config": {"scale_fmt": 8}}, ["scale_fmt", "ue8m0"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func", "sqrtsoftplus", "another architecture"]),
        ({"topk_method": "greedy"}, ["topk_method", "noaux_tc"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads", "one key/value head"]),
        ({"attention_bias": True}, ["attention_bias", "no attention bias"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "does not tie"]),
        ({"num_experts_per_tok": 257}, ["more experts per token", "<= 256", "257"]),
        ({"o_groups": 7}, ["o_groups", "a divisor of 64"]),
        ({"index_head_dim": 96}, ["index_head_dim", "a power of two"]),
        ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim", "an even number below 129"]),
        ({"qk_rope_head_dim": -2}, ["qk_rope_head_dim", "at least 1"]),
        ({"compress_ratios": 4}, ["compress_ratios", "a list"]),
        ({"compress_ratios": "0, 4"}, ["compress_ratios", "a list"]),
        ({"compress_ratios": [0.0] * 44}, ["compress_ratios", "whole numbers"]),
        ({"compress_ratios": [0] * 43}, ["compress_ratios", "44 entries", "43"]),
        ({"compress_ratios": [0] * 5 + [3] + [0] * 38}, ["compress_ratios[5]", "3"]),
        ({"compress_ratios": [0] * 43 + [4]}, ["MTP block", "4", "window-only"]),
        (
            {"num_nextn_predict_layers": 2, "compress_ratios": [0] * 45},
            ["num_nextn_predict_layers", "0 or 1", "2"],
        ),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "a JSON object or null"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling.type", "linear"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling.factor", "absent"]),
        ({"rope_scaling": {"factor": "16"}}, ["rope_scaling.factor", "a finite number"]),
        ({"rope_scaling": {"factor": 0.5}}, ["rope_scaling.factor", "at least 1"]),
        ({"rope_scaling": {"factor": 2, "beta_fast": 1, "beta_slow": 32}}, ["beta_slow", "32"]),
        (
            {"rope_scaling": {"factor": 2, "original_max_position_embeddings": 0}},
            ["original_max_position_embeddings", "0"],
        ),
        ({"architectures": "DeepseekV4ForCausalLM"}, ["not a DeepSeek-V4 model", "architectures"]),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, ["not a DeepSeek-V4", "DeepseekV32"]),
        ({"architectures": {"DeepseekV4ForCausalLM": 1}}, ["not a DeepSeek-V4"]),
        ({"architectures": 4}, ["not a DeepSeek-V4", "4"]),
        ({"model_type": ["deepseek_v4"]}, ["not a DeepSeek-V4"]),
    ],
)
def test_bad_values_say_what_was_expected(values: dict[str, Any], said: list[str]) -> None:
    text = refused(FLASH | values)
    for part in said:
        assert part in text, text


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    for data in ([], "x", None, 7, {1: 2}):
        refused(data)
    assert "hidden_size" in refused({k: v for k, v in FLASH.items() if k != "hidden_size"})
    file = tmp_path / "config.json"
    for text in ("{", "[]", "\xff", "[" * 100_000, '{"a": ' * 600 + "1" + "}" * 600):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError):
            V4Config.from_json(file)
    with pytest.raises(ConfigError, match="no config at"):
        V4Config.from_json(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no such preset"):
        V4Config.preset("huge")


@pytest.mark.parametrize("depth", [300, 400, 500, 800])
def test_deep_nesting_is_kept_or_refused(depth: int, tmp_path: Path) -> None:
    deep = json.dumps(FLASH)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "config.json").write_text(deep)
    try:
        assert V4Config.from_json(tmp_path).extra.keys() == {"deep"}
    except ConfigError as error:
        assert "cannot read" in str(error)


def test_extra_does_not_override_fields() -> None:
    with pytest.raises(ConfigError, match="extra"):
        V4Config(extra={"hidden_size": 1})
    with pytest.raises(ConfigError, match="extra"):
        V4Config(extra={"architectures": []})


@given(
    key=st.sampled_from(sorted(FLASH)),
    value=st.one_of(
        st.sampled_from(STRANGE),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    ),
    inside=st.none() | st.sampled_from(sorted(FLASH["rope_scaling"])),
)
def test_any_value_is_taken_as_it_is_or_refused(key: str, value: Any, inside: str | None) -> None:
    """No value raises anything but a ConfigError, and what is taken reads back the same."""
    if inside and key == "rope_scaling":
        value = FLASH[key] | {inside: value}
    try:
        config = V4Config.from_dict(FLASH | {key: value})
    except ConfigError as error:
        assert "expected: " in str(error) and "got: " in str(error)
    else:
        assert V4Config.from_dict(config.to_dict()) == config
        assert config.parameter_counts().active > 0
