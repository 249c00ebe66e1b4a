"""Damaged, lying and foreign files: refused on opening, with what was expected and what came."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4 import checkpoint as module
from dsv4.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    save_checkpoint,
    with_format,
)
from dsv4.config import V4Config
from dsv4.errors import CheckpointError
from dsv4.synth import resize, synthesize

TINY = resize(V4Config.preset("nano"), num_hidden_layers=3, n_routed_experts=2, vocab_size=300)
Header = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file in ``single``, several in ``sharded``."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "single", TINY, synthesize(TINY))
    save_checkpoint(folder / "sharded", TINY, synthesize(TINY), max_shard_bytes=1_500_000)
    return folder


@pytest.fixture
def single(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "single", tmp_path / "single"))


@pytest.fixture
def sharded(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "sharded", tmp_path / "sharded"))


def split(file: Path) -> tuple[Header, bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file: Path, header: Header | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(folder: Path, *said: str) -> str:
    """Opening raises a CheckpointError that says expected, got and every one of ``said``."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    text = str(error.value)
    for part in ("expected: ", "got: ", *said):
        assert part in text, text
    return text


# ------------------------------------------------------------------ the header of one file


def drop(header: Header) -> None:
    """Takes norm.weight out and closes the gap, so that only the name is missing."""
    begin, end = header.pop("norm.weight")["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [o - (end - begin) for o in entry["data_offsets"]]


def change(name: str, **values: Any) -> Callable[[Header], None]:
    return lambda header: header[name].update(values)


def rename(old: str, new: str) -> Callable[[Header], None]:
    return lambda header: header.update({new: header.pop(old)})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (rename("norm.weight", "model.norm.weight"), ["missing tensors: norm.weight", "absent"]),
        (change("head.weight", shape=[256, 300]), ["head.weight", "[300, 256]", "[256, 300]"]),
        (change("head.weight", dtype="F16"), ["head.weight", "wrong dtype", "BF16", "F16"]),
        (change("head.weight", dtype="F32"), ["head.weight", "does not fill its place"]),
        (change("head.weight", dtype="Q4_K"), ["head.weight", "unknown dtype", "Q4_K"]),
        (change("head.weight", dtype=["BF16"]), ["head.weight", "unknown dtype"]),
        (change("head.weight", shape=[-300, -256]), ["head.weight", "malformed"]),
        (change("head.weight", shape="300"), ["head.weight", "malformed"]),
        (change("head.weight", data_offsets=[0]), ["head.weight", "malformed"]),
        (change("head.weight", data_offsets=[0, 153600]), ["head.weight", "overlaps"]),
        (change("head.weight", data_offsets=[10**15, 10**15 + 153600]), ["a hole after"]),
        (lambda header: header.update({"norm.weight": 7}), ["norm.weight", "malformed"]),
    ],
)
def test_bad_header_entries(edit: Callable[[Header], None], said: list[str], single: Path) -> None:
    header, data = split(single / SINGLE_FILE)
    edit(header)
    join(single / SINGLE_FILE, header, data)
    refused(single, *said)


def test_missing_and_extra_tensors(single: Path) -> None:
    file = single / SINGLE_FILE
    header, data = split(file)
    begin, end = header["norm.weight"]["data_offsets"]
    drop(header)
    join(file, header, data[:begin] + data[end:])
    refused(single, "missing tensors: norm.weight", "BF16 [256]")
    header, data = split(file)
    for name in ("norm.weight", "lora.weight"):
        header[name] = {
            "dtype": "BF16",
            "shape": [256],
            "data_offsets": [len(data), len(data) + 512],
        }
        data += b"\0" * 512
    join(file, header, data)
    refused(single, "lora.weight", "BF16 [256]")


def test_truncated_and_padded_files(single: Path) -> None:
    file = single / SINGLE_FILE
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 1000, 8, 3, 0):
        file.write_bytes(whole[:size])
        refused(single, SINGLE_FILE, "truncated", f"{size:,} bytes")
    file.write_bytes(whole + b"\0")
    refused(single, "after the last tensor", f"{len(whole) + 1:,} bytes")


def test_headers_that_are_not_json(single: Path) -> None:
    file = single / SINGLE_FILE
    for text in (b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}'):
        join(file, text, b"")
        refused(single, SINGLE_FILE)
    file.write_bytes(b"GGUF" + b"\x7f" * 100)
    refused(single, "not a safetensors file")
    twice = b'{"norm.weight": {}, "norm.weight": {}}'
    join(file, twice, b"")
    refused(single, "duplicate entry norm.weight")


# ------------------------------------------------------------------ shards and their index


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_shards_that_do_not_match_the_index(sharded: Path, models: Path) -> None:
    def again() -> None:
        shutil.copyfile(models / "sharded" / INDEX_FILE, sharded / INDEX_FILE)

    where = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    first, second = where["embed.weight"], where["head.weight"]
    assert first != second
    edit_index(sharded, lambda m: m.update({"head.weight": first}))
    refused(sharded, "head.weight", first, "absent")
    again()
    edit_index(sharded, lambda m: m.update({"head.weight": "model-00099.safetensors"}))
    refused(sharded, "head.weight", "model-00099.safetensors", "missing")
    again()
    edit_index(sharded, lambda m: m.update({"head.weight": "../single/model.safetensors"}))
    refused(sharded, "head.weight", "../single")
    again()
    edit_index(sharded, lambda m: m.pop("head.weight") and None)
    refused(sharded, "head.weight", f"not in {INDEX_FILE}")
    again()
    (sharded / second).rename(sharded / "elsewhere")
    refused(sharded, second, "missing")
    (sharded / "elsewhere").rename(sharded / second)
    Checkpoint.open(sharded)
    for text in ("{}", '{"weight_map": []}', "nonsense"):
        (sharded / INDEX_FILE).write_text(text)
        refused(sharded, INDEX_FILE)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(sharded, shard.name, "is truncated")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    where = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    file = sharded / where["embed.weight"]
    header, data = split(file)
    header["norm.weight"] = {
        "dtype": "BF16",
        "shape": [256],
        "data_offsets": [len(data), len(data) + 512],
    }
    join(file, header, data + b"\0" * 512)
    refused(sharded, "duplicate tensor norm.weight", file.name)


def test_folders_without_or_with_two_checkpoints(
    single: Path, sharded: Path, tmp_path: Path
) -> None:
    refused(tmp_path / "nowhere", "no checkpoint", "nothing")
    refused(single / SINGLE_FILE, "a folder", "a file")
    shutil.copyfile(single / SINGLE_FILE, sharded / SINGLE_FILE)
    refused(sharded, "two checkpoints", "both")
    (sharded / SINGLE_FILE).unlink()
    (sharded / INDEX_FILE).unlink()
    refused(sharded, "holds no weights", "model-00001")
    (single / "config.json").unlink()
    refused(single, "config.json")


# ------------------------------------------------------------------ configs that lie


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, ["not a DeepSeek-V4", "DeepseekV3"]),
        ({"model_type": "llama"}, ["not a DeepSeek-V4", "llama"]),
        ({"expert_dtype": "fp8"}, ["instruct", "experts.0.w1.weight", "F8_E4M3", "I8"]),
        ({"expert_dtype": "bf16", "quantization_config": None}, ["bf16", "BF16", "I8"]),
        ({"quantization_config": None}, ["contradict"]),
        ({"quantization_config": "fp8"}, []),
        ({"quantization_config": {"quant_method": "gptq"}}, ["contradict", "gptq"]),
        ({"quantization_config": {"weight_block_size": [64, 64]}}, ["weight_block_size", "64"]),
        ({"hidden_size": 512}, ["wrong shape", "embed.weight", "[300, 512]", "[300, 256]"]),
        ({"n_routed_experts": 3}, ["missing tensors", "experts.2.w1.weight"]),
        ({"n_routed_experts": 10**12}, ["more tensors"]),
        ({"num_experts_per_tok": 1}, ["tid2eid", "[300, 1]", "[300, 2]"]),
        ({"compress_ratios": [0, 0, 0, 0]}, ["does not have", "layers.2.attn.compressor"]),
        ({"compress_ratios": [0, 0, 4]}, ["compress_ratios", "4 entries"]),
        ({"num_nextn_predict_layers": 0, "compress_ratios": [0, 0, 4]}, ["mtp.0"]),
        ({"hidden_size": "wide"}, []),
        ({"o_groups": 0}, ["o_groups"]),
    ],
)
def test_config_and_tensors_must_agree(
    values: dict[str, Any], said: list[str], single: Path
) -> None:
    edit_config(single, **values)
    refused(single, *said)


def test_config_that_is_not_json(single: Path) -> None:
    (single / "config.json").write_text("{")
    refused(single, "config.json")


def test_base_files_open_even_if_their_config_keeps_scale_fmt(tmp_path: Path) -> None:
    base = with_format(TINY, "base")
    save_checkpoint(tmp_path / "base", base, synthesize(base))
    edit_config(tmp_path / "base", quantization_config=dict(TINY.quantization_config or {}))
    assert Checkpoint.open(tmp_path / "base").config.is_base


# ------------------------------------------------------------------ values that break a model


def poke(folder: Path, name: str, value: torch.Tensor) -> None:
    header, _ = split(folder / SINGLE_FILE)
    raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    with (folder / SINGLE_FILE).open("r+b") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        f.seek(start + header[name]["data_offsets"][0])
        f.write(raw)


def test_nan_scales(single: Path, tmp_path: Path) -> None:
    poke(single, "layers.1.attn.wq_b.scale", torch.tensor([255], dtype=torch.uint8))
    refused(single, "layers.1.attn.wq_b.scale", "NaN")
    base = with_format(TINY, "base")
    save_checkpoint(tmp_path / "base", base, synthesize(base))
    poke(tmp_path / "base", "mtp.0.e_proj.scale", torch.tensor([float("inf")]))
    refused(tmp_path / "base", "mtp.0.e_proj.scale", "infinite")


@pytest.mark.parametrize("bad", [-1, 2, 2**40])
def test_expert_ids_out_of_range(bad: int, single: Path) -> None:
    poke(single, "layers.0.ffn.gate.tid2eid", torch.tensor([0, bad]))
    refused(single, "layers.0.ffn.gate.tid2eid", "0..1", str(bad))


def test_values_of_giant_files_are_checked_when_taken(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poke(single, "layers.1.attn.wq_b.scale", torch.tensor([255], dtype=torch.uint8))
    monkeypatch.setattr(module, "_CHECK_AT_OPEN", 0)
    checkpoint = Checkpoint.open(single)
    checkpoint.tensor("layers.0.attn.wq_b.scale")
    with pytest.raises(CheckpointError, match="not numbers"):
        checkpoint.tensor("layers.1.attn.wq_b.scale")
    with pytest.raises(CheckpointError, match="not numbers"):
        checkpoint.check_values()
    with pytest.raises(CheckpointError, match="not numbers"):
        Checkpoint.open(single, check_values=True)


def test_unknown_names_are_refused(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    with pytest.raises(CheckpointError, match=r"model\.embed"):
        checkpoint.tensor("model.embed.weight")
    with pytest.raises(CheckpointError, match=r"model\.embed"):
        checkpoint.save(single, {"model.embed.weight": torch.ones(1)})


# ------------------------------------------------------------------ anything at all


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_is_a_checkpoint_error_or_harmless(data: st.DataObject, models: Path) -> None:
    """Random edits of the header or the config: an answer or a CheckpointError, nothing else."""
    folder = models / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("config.json", SINGLE_FILE):
        shutil.copyfile(models / "single" / name, folder / name)
    victim = data.draw(st.sampled_from(["config.json", SINGLE_FILE]))
    raw = bytearray((folder / victim).read_bytes())
    reach = len(raw) if victim == "config.json" else 3000
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, reach - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"null", b"-1", b"[]", b'"', b"1e9"]))
        )
    (folder / victim).write_bytes(raw)
    try:
        Checkpoint.open(folder)
    except CheckpointError as error:
        assert "\n" in str(error)


def test_any_config_value_is_a_checkpoint_error_or_harmless(single: Path) -> None:
    strange = (None, -1, 0, 1, 1.5, 2**70, "", "x", [], [[]], ["x"] * 4, {}, {"a": 1}, True)
    for key in TINY.to_dict():
        for value in strange:
            (single / "config.json").write_text(json.dumps(TINY.to_dict() | {key: value}))
            try:
                Checkpoint.open(single)
            except CheckpointError as error:
                assert "\n" in str(error)
