"""Checkpoints: the published inventories, byte-exact round trips, atomic saves, conversions."""

from __future__ import annotations

import filecmp
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dsv4.checkpoint import (
    FORMATS,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    TensorSpec,
    inventory,
    save_checkpoint,
    storage_format,
    with_format,
)
from dsv4.config import V4Config
from dsv4.convert import convert
from dsv4.errors import CheckpointError, ConfigError
from dsv4.quant import dequantize
from dsv4.synth import resize, synthesize

VECTORS = Path(__file__).parents[1].parent / "shared" / "vectors"
TINY = resize(V4Config.preset("nano"), num_hidden_layers=4, n_routed_experts=4, vocab_size=300)


def vectors(name: str) -> Path:
    if not (VECTORS / name).is_dir():
        pytest.skip(f"no conformance vectors at {VECTORS / name}")
    return VECTORS / name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_checkpoint(folder, TINY, synthesize(TINY), extra_files={"LICENSE": b"free"})
    return folder


def values(checkpoint: Checkpoint, name: str) -> Tensor:
    scale = name.removesuffix("weight") + "scale"
    stored = checkpoint.tensor(scale) if scale in checkpoint.specs else None
    return dequantize(checkpoint.tensor(name), stored)


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    raw = torch.uint8
    return a.names() == b.names() and all(
        torch.equal(a.tensor(n).view(raw), b.tensor(n).view(raw)) for n in a.names()
    )


# ------------------------------------------------------------------ inventory


@pytest.mark.parametrize(
    ("preset", "tensors", "gigabytes"),
    [
        ("flash", 69_187, 159.61),
        ("pro", 145_116, 864.70),
        ("flash-base", 69_189, 294.67),
        ("pro-base", 145_118, 1606.03),
    ],
)
def test_inventory_is_the_published_one(preset: str, tensors: int, gigabytes: float) -> None:
    specs = inventory(V4Config.preset(preset))
    assert len(specs) == tensors
    assert round(sum(s.bytes for s in specs.values()) / 1e9, 2) == gigabytes
    if preset == "pro":
        assert sum(s.elements for s in specs.values()) == 861_608_274_846


def test_published_names_dtypes_and_shapes() -> None:
    flash = inventory(V4Config.preset("flash"))
    assert flash["layers.2.attn.wo_a.weight"] == TensorSpec("F8_E4M3", (8192, 4096))
    assert flash["layers.2.attn.wo_a.scale"] == TensorSpec("F8_E8M0", (64, 32))
    assert flash["layers.2.attn.indexer.weights_proj.weight"] == TensorSpec("BF16", (64, 4096))
    assert flash["layers.3.attn.compressor.ape"] == TensorSpec("F32", (128, 512))
    assert flash["layers.0.ffn.gate.tid2eid"] == TensorSpec("I64", (129280, 6))
    assert flash["layers.3.ffn.experts.255.w2.weight"] == TensorSpec("I8", (4096, 1024))
    assert flash["layers.3.ffn.experts.255.w2.scale"] == TensorSpec("F8_E8M0", (4096, 64))
    assert flash["mtp.0.hc_attn_fn"] == TensorSpec("F32", (24, 16384))
    base = inventory(V4Config.preset("flash-base"))
    assert base["layers.3.ffn.experts.0.w1.scale"] == TensorSpec("F32", (16, 32))
    assert set(base) - set(flash) == {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"}
    assert {s.dtype for s in base.values()} == {"F8_E4M3", "BF16", "F32", "I64"}


@pytest.mark.parametrize("name", ["flash-like", "pro-like"])
def test_inventory_matches_the_official_files(name: str) -> None:
    folder = vectors(name)
    with (folder / SINGLE_FILE).open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    del header["__metadata__"]
    stored = {n: TensorSpec(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
    assert inventory(V4Config.from_json(folder)) == stored


def test_odd_sizes_round_the_number_of_blocks_up() -> None:
    config = with_format(resize(TINY, q_lora_rank=200, hidden_size=288), "fp8")
    specs = inventory(config)
    assert specs["layers.0.attn.wq_a.scale"].shape == (2, 3)
    assert specs["layers.0.ffn.experts.0.w2.scale"].shape == (3, 1)
    with pytest.raises(ConfigError, match="multiples of 32"):
        inventory(with_format(resize(config, hidden_size=272), "instruct"))


def test_formats_are_told_apart_and_contradictions_refused() -> None:
    for fmt in FORMATS:
        assert storage_format(with_format(TINY, fmt)) == fmt
    bf16 = with_format(TINY, "bf16")
    assert not any(name.endswith(".scale") for name in inventory(bf16))
    with pytest.raises(ConfigError, match="contradict"):
        inventory(resize(bf16, expert_dtype="fp4"))
    with pytest.raises(ConfigError, match="more tensors than"):
        inventory(resize(TINY, n_routed_experts=10**9))


# ------------------------------------------------------------------ reading


def test_open_gives_the_written_tensors_and_the_config(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert checkpoint.config == TINY
    assert checkpoint.names() == list(inventory(TINY)) and checkpoint.specs == inventory(TINY)
    assert checkpoint.bytes == sum(s.bytes for s in inventory(TINY).values())
    for name, tensor in synthesize(TINY):
        stored = checkpoint.tensor(name)
        assert stored.dtype == tensor.dtype and stored.shape == tensor.shape
        assert torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8)), name


def test_tensors_are_views_and_the_file_is_safe_from_writes(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    first = checkpoint.tensor("norm.weight")
    assert first.data_ptr() == checkpoint.tensor("norm.weight").data_ptr()
    before = (tiny / SINGLE_FILE).read_bytes()
    first.zero_()
    assert (tiny / SINGLE_FILE).read_bytes() == before


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    """The format allows any byte offset; this file puts one-byte tensors first."""
    specs = dict(sorted(inventory(TINY).items(), key=lambda item: item[1].dtype == "F32"))
    tensors = dict(synthesize(TINY))
    header, data = {}, b""
    lopsided = [n for n in specs if specs[n].dtype == "F8_E8M0" and specs[n].elements % 2]
    for name in [*lopsided[:1], *(n for n in specs if n not in lopsided[:1])]:
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": specs[name].dtype,
            "shape": list(specs[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    TINY.to_json(tmp_path / "config.json")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.tensor("embed.weight"), tensors["embed.weight"])
    assert torch.equal(checkpoint.tensor("hc_head_fn"), tensors["hc_head_fn"])


def test_an_opened_checkpoint_survives_its_replacement(tiny: Path, tmp_path: Path) -> None:
    Checkpoint.open(tiny).save(tmp_path / "m")
    opened = Checkpoint.open(tmp_path / "m")
    save_checkpoint(tmp_path / "m", TINY, synthesize(TINY, seed=9))
    assert same_tensors(opened, Checkpoint.open(tiny))
    for act in (opened.fingerprint, opened.check_values, lambda: opened.save(tmp_path / "n")):
        with pytest.raises(CheckpointError, match="changed since"):
            act()


def test_fingerprint_follows_config_and_weights(tiny: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny)
    original.save(tmp_path / "copy")
    assert Checkpoint.open(tmp_path / "copy").fingerprint() == original.fingerprint()
    changed = original.tensor("norm.weight") + 1
    original.save(tmp_path / "copy", {"norm.weight": changed})
    copy = Checkpoint.open(tmp_path / "copy")
    assert copy.fingerprint() != original.fingerprint()
    assert torch.equal(copy.tensor("norm.weight"), changed)
    original.save(tmp_path / "copy")
    resize(TINY, index_topk=64).to_json(tmp_path / "copy" / "config.json")
    assert Checkpoint.open(tmp_path / "copy").fingerprint() != original.fingerprint()


# ------------------------------------------------------------------ writing


def test_our_file_is_the_file_of_the_safetensors_library(tiny: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file(dict(synthesize(TINY)), tmp_path / "theirs", {"format": "pt"})
    assert filecmp.cmp(tiny / SINGLE_FILE, tmp_path / "theirs", shallow=False)
    loaded = safetensors.torch.load_file(tiny / SINGLE_FILE)
    assert loaded.keys() == inventory(TINY).keys()


@pytest.mark.parametrize("name", ["flash-like", "pro-like"])
def test_official_files_round_trip_byte_for_byte(name: str, tmp_path: Path) -> None:
    official = vectors(name)
    checkpoint = Checkpoint.open(official)
    tensors = {n: checkpoint.tensor(n) for n in reversed(checkpoint.names())}
    save_checkpoint(tmp_path / "rewritten", checkpoint.config, tensors)
    checkpoint.save(tmp_path / "copied")
    for saved in ("rewritten", "copied"):
        assert filecmp.cmp(official / SINGLE_FILE, tmp_path / saved / SINGLE_FILE, shallow=False)
    assert filecmp.cmp(official / "config.json", tmp_path / "copied/config.json", shallow=False)


def test_sharded_files_round_trip_byte_for_byte(tmp_path: Path) -> None:
    a, b, one = tmp_path / "a", tmp_path / "b", tmp_path / "one"
    save_checkpoint(a, TINY, synthesize(TINY), max_shard_bytes=2_000_000, metadata={"k": "v"})
    files = sorted(p.name for p in a.iterdir())
    assert INDEX_FILE in files and len(files) > 4
    assert all(p.stat().st_size < 2_100_000 for p in a.glob("*.safetensors"))
    checkpoint = Checkpoint.open(a)
    checkpoint.save(b)
    assert filecmp.cmpfiles(a, b, files, shallow=False) == (files, [], [])
    save_checkpoint(one, TINY, ((n, checkpoint.tensor(n)) for n in checkpoint.names()))
    assert same_tensors(Checkpoint.open(one), checkpoint)


def test_large_checkpoints_are_split_as_published() -> None:
    """46 files for Flash: embedding, a file per layer, the head, the MTP block."""
    from dsv4.checkpoint import _plan_shards

    plan = _plan_shards(inventory(V4Config.preset("flash")), None)
    assert len(plan) == 46 and plan[0] == ["embed.weight"]
    assert "head.weight" in plan[-2] and all(n.startswith("mtp.0.") for n in plan[-1])
    assert len(_plan_shards(inventory(V4Config.preset("pro")), None)) == 64
    with pytest.raises(CheckpointError, match="max_shard_bytes"):
        _plan_shards(inventory(TINY), 0)


def test_a_failed_save_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    Checkpoint.open(tiny).save(target)
    before = (target / SINGLE_FILE).read_bytes()

    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield from itertools.islice(synthesize(TINY, seed=1), 20)
        assert (target / SINGLE_FILE).read_bytes() == before  # the old one until the end
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(target, TINY, breaks())
    all_but_one = dict(synthesize(TINY, seed=1))
    del all_but_one["layers.1.attn.wkv.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.wkv\.weight"):
        save_checkpoint(target, TINY, all_but_one)
    with pytest.raises(CheckpointError, match="twice"):
        save_checkpoint(target, TINY, [("norm.weight", all_but_one["norm.weight"])] * 2)
    with pytest.raises(CheckpointError, match="does not fit"):
        save_checkpoint(target, TINY, {"norm.weight": torch.ones(3)})
    diverged = {"layers.0.attn.wkv.scale": torch.full((4, 2), 255, dtype=torch.uint8)}
    nan = {n: t.view(torch.float8_e8m0fnu) for n, t in diverged.items()}
    with pytest.raises(CheckpointError, match="not numbers"):
        save_checkpoint(target, TINY, nan)
    assert (target / SINGLE_FILE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_checkpoint_keeps_its_side_files(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    Checkpoint.open(tiny).save(target)
    (target / "encoding").mkdir()
    (target / "encoding" / "notes.txt").write_text("mine")
    save_checkpoint(target, TINY, synthesize(TINY, 2), max_shard_bytes=4_000_000)
    assert (target / "encoding" / "notes.txt").read_text() == "mine"
    assert (target / "LICENSE").read_bytes() == b"free"
    assert not (target / SINGLE_FILE).exists() and (target / INDEX_FILE).exists()
    Checkpoint.open(target)
    mode = (target / "config.json").stat().st_mode
    assert target.stat().st_mode & 0o444 == mode & 0o444 and os.access(target, os.X_OK)


def test_replacing_works_where_names_cannot_be_swapped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two-step way, for file systems without an atomic exchange."""
    monkeypatch.setattr("dsv4.checkpoint._exchange", lambda a, b: False)
    for seed in (1, 2):
        save_checkpoint(tmp_path / "m", TINY, synthesize(TINY, seed))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    save_checkpoint(tmp_path / "same", TINY, synthesize(TINY, 2))
    assert same_tensors(Checkpoint.open(tmp_path / "m"), Checkpoint.open(tmp_path / "same"))


def test_what_killed_saves_left_behind_is_swept_up(tiny: Path, tmp_path: Path) -> None:
    hours_ago = time.time() - 7200
    names = (".m.abcd_123.partial", ".m.zzzzzzzz.partial", ".m.v2.abcdefgh.partial", ".m.partial")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / SINGLE_FILE).write_bytes(b"half")
        os.utime(tmp_path / name / SINGLE_FILE, (hours_ago, hours_ago))
        os.utime(tmp_path / name, (hours_ago, hours_ago))
    os.utime(tmp_path / names[1] / SINGLE_FILE)  # a save that is still writing
    Checkpoint.open(tiny).save(tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"m", *names[1:]}


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(CheckpointError, match="will not write over"):
        save_checkpoint(tmp_path / "photos", TINY, synthesize(TINY))
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


# ------------------------------------------------------------------ conversions


@pytest.mark.parametrize("path", [("fp8",), ("bf16",), ("base",), ("base", "bf16", "fp8")])
def test_conversions_keep_every_value_and_lead_back(
    path: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    """What holds for the whole circle: equal dequantised values, and side files carried along."""
    source = Checkpoint.open(tiny)
    folder = tiny
    for fmt in (*path, "instruct"):
        convert(folder, tmp_path / fmt, fmt, max_shard_bytes=5_000_000)
        folder = tmp_path / fmt
        converted = Checkpoint.open(folder)
        assert storage_format(converted.config) == fmt
        assert (folder / "LICENSE").read_bytes() == b"free"
        for name in source.names():
            if name.endswith(".weight"):
                assert torch.equal(values(converted, name), values(source, name)), (fmt, name)
            elif not name.endswith(".scale"):
                assert torch.equal(converted.tensor(name), source.tensor(name)), (fmt, name)


def test_converting_twice_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for turn in ("1", "2"):
        convert(tiny if turn == "1" else tmp_path / "instruct1", tmp_path / f"bf16{turn}", "bf16")
        convert(tmp_path / f"bf16{turn}", tmp_path / f"instruct{turn}", "instruct")
    for fmt in ("bf16", "instruct"):
        first, second = (tmp_path / f"{fmt}{turn}" / SINGLE_FILE for turn in ("1", "2"))
        assert filecmp.cmp(first, second, shallow=False)


def test_official_vectors_convert_exactly(tmp_path: Path) -> None:
    source = Checkpoint.open(vectors("flash-like"))
    convert(source, tmp_path / "fp8", "fp8")
    converted = Checkpoint.open(tmp_path / "fp8")
    for name in source.names():
        if name.endswith(".weight"):
            assert torch.equal(values(converted, name), values(source, name)), name


def test_base_with_its_own_mtp_embedding_is_not_silently_dropped(tmp_path: Path) -> None:
    config = with_format(TINY, "base")
    tensors = dict(synthesize(config))
    save_checkpoint(tmp_path / "base", config, tensors)
    convert(tmp_path / "base", tmp_path / "fp8", "fp8")
    tensors["mtp.0.emb.tok_emb.weight"] = tensors["mtp.0.emb.tok_emb.weight"] * 2
    save_checkpoint(tmp_path / "base", config, tensors)
    with pytest.raises(CheckpointError, match=r"mtp\.0\.emb\.tok_emb\.weight differs"):
        convert(tmp_path / "base", tmp_path / "fp8", "fp8")
    tensors["layers.0.attn.wkv.scale"] = tensors["layers.0.attn.wkv.scale"] * 1.3
    del tensors["mtp.0.emb.tok_emb.weight"]
    tensors["mtp.0.emb.tok_emb.weight"] = tensors["embed.weight"]
    save_checkpoint(tmp_path / "base", config, tensors)  # scales need not be powers of two
    convert(tmp_path / "base", tmp_path / "fp8", "fp8")
    name = "layers.0.attn.wkv.weight"
    was, now = (values(Checkpoint.open(tmp_path / f), name) for f in ("base", "fp8"))
    assert (was - now).abs().max() <= was.abs().max() / 16


def test_an_inexact_conversion_names_the_tensor(tmp_path: Path) -> None:
    tensors = dict(synthesize(TINY))
    scale = tensors["layers.1.ffn.experts.2.w1.scale"].view(torch.uint8)
    scale[0, 0], scale[1, 0] = 100, 140  # 2 ** 40 apart in one FP8 block
    save_checkpoint(tmp_path / "wide", TINY, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w1\.weight"):
        convert(tmp_path / "wide", tmp_path / "fp8", "fp8")
    assert not (tmp_path / "fp8").exists()


# ------------------------------------------------------------------ synthetic weights


@pytest.mark.parametrize("fmt", FORMATS)
def test_synthetic_weights_are_finite_sized_and_repeatable(fmt: str) -> None:
    config = with_format(resize(TINY, hidden_size=512), fmt)
    first, again, other = (dict(synthesize(config, seed)) for seed in (0, 0, 1))
    for name, tensor in first.items():
        raw = torch.uint8
        assert torch.equal(tensor.view(raw), again[name].view(raw)), name
        if name.endswith(".weight"):
            scale = first.get(name.removesuffix("weight") + "scale")
            value = dequantize(tensor, scale)
            assert bool(torch.isfinite(value).all()), name
            if value.dim() == 2 and name not in ("embed.weight", "mtp.0.emb.tok_emb.weight"):
                assert 0.6 < float(value.std()) * math.sqrt(value.shape[1]) < 1.6, name
            assert not torch.equal(tensor.view(raw), other[name].view(raw)), name
    ids = first["layers.0.ffn.gate.tid2eid"]
    assert bool((ids.sort(1).values.diff(dim=1) > 0).all())
    assert set(ids.unique().tolist()) == set(range(config.n_routed_experts))


def test_resize_keeps_shapes_legal() -> None:
    flash = V4Config.preset("flash")
    half = resize(flash, 0.5)
    assert (half.hidden_size, half.num_attention_heads, half.o_groups) == (2048, 32, 4)
    assert (half.n_routed_experts, half.q_lora_rank, half.moe_intermediate_size) == (128, 512, 1024)
    small = resize(flash, 0.01, num_hidden_layers=5)
    assert small.compress_ratios == (0, 0, 4, 128, 4, 0) and small.num_experts_per_tok == 6
    assert (small.hidden_size, small.num_attention_heads, small.o_groups) == (256, 8, 1)
    deep = resize(flash, num_hidden_layers=46, n_routed_experts=2, num_attention_heads=12)
    assert deep.compress_ratios[-5:] == (4, 128, 4, 128, 0)
    assert (deep.num_experts_per_tok, deep.o_groups) == (2, 4)
    assert resize(flash) == flash
    for wrong in ({"no_such_key": 1}, {"num_hidden_layers": "many"}, {"hidden_size": 0}):
        with pytest.raises(ConfigError):
            resize(flash, **wrong)
    with pytest.raises(ConfigError, match="scale"):
        resize(flash, 0)
