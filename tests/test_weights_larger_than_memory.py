"""Weights larger than memory: few experts fit, and the answer is that of the whole model."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import Server
from scripted_models import small_tokenizer

import dsv4
from dsv4 import bench_experts, kernels
from dsv4.bench_experts import disk_reads
from dsv4.checkpoint import Checkpoint, save_checkpoint, with_format
from dsv4.config import V4Config
from dsv4.engine import Engine, SamplingParams, memory
from dsv4.engine.experts import _Reader, expert_budget, expert_bytes, slot_bytes
from dsv4.engine.residency import Residency, replay
from dsv4.errors import CheckpointError, ConfigError
from dsv4.server import LocalBackend
from dsv4.synth import synthesize

VOCAB, LAYERS, EXPERTS, CHOSEN = 320, 4, 16, 3
CONFIG = V4Config(
    vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=LAYERS,
    num_hash_layers=2, num_attention_heads=2, n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN,
    q_lora_rank=128, head_dim=128, o_groups=2, o_lora_rank=128,
    compress_ratios=(0, 4, 128, 4, 0), index_n_heads=2, index_topk=24,
)  # fmt: skip
LIMITS_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
native = pytest.mark.skipif(
    kernels.NATIVE is None, reason="torch's products depend on the number of rows"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "v4-tiny"
    save_checkpoint(folder, CONFIG, synthesize(CONFIG, seed=1), max_shard_bytes=400_000)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dsv4.Model:
    model = dsv4.load(folder)
    assert model.experts is None  # it fits
    return model


def small(folder: Path, slots: int, numerics: str = "official") -> dsv4.Model:
    """The model with memory for so many of its 80 experts."""
    size = slot_bytes(Checkpoint.open(folder))
    model = dsv4.load(folder, numerics, expert_memory=slots * size + size - 1)
    assert model.experts is not None and model.experts.slots == slots
    return model


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(count)]


# ---------------------------------------------------------------- one answer


@native
@pytest.mark.parametrize("slots", [CHOSEN, 5, 17, 36])
def test_logits_are_those_of_the_whole_model_bit_for_bit(
    folder: Path, whole: dsv4.Model, slots: int
) -> None:
    model = small(folder, slots)
    for count in (1, 2, 7, 150):
        ids = tokens(count, count)
        assert torch.equal(model.logits(ids), whole.logits(ids))
        if count > 1:
            assert torch.equal(model.mtp_logits(ids), whole.mtp_logits(ids))
    session, same = model.session(), whole.session()
    for part in (tokens(130, 1), *([t] for t in tokens(12, 2))):
        assert torch.equal(session.extend(part), same.extend(part))
    assert model.experts is not None and model.experts.stats().counts.read > 0


@native
@pytest.mark.parametrize("fmt", ["fp8", "base", "bf16"])
def test_every_storage_format_can_stay_on_disk(tmp_path: Path, fmt: str) -> None:
    config = with_format(CONFIG, fmt)
    save_checkpoint(tmp_path / "m", config, synthesize(config, seed=2))
    ids = tokens(40, 3)
    for numerics in ("official", "float32"):
        model, same = small(tmp_path / "m", 6, numerics), dsv4.load(tmp_path / "m", numerics)
        assert torch.equal(model.logits(ids), same.logits(ids))


def test_with_torchs_kernels_the_answer_is_the_same_to_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4.kernels import reference

    monkeypatch.setattr(kernels, "routed_experts", reference.routed_experts)
    ids = tokens(40, 4)
    model, same = small(folder, 6, "float32"), dsv4.load(folder, "float32")
    torch.testing.assert_close(model.logits(ids), same.logits(ids), rtol=1e-4, atol=1e-4)


@native
def test_batches_of_an_engine_answer_as_the_whole_model(folder: Path, whole: dsv4.Model) -> None:
    requests = [
        (tokens(count, i), SamplingParams(6, temperature, seed=i, logprobs=2, stop_token_ids=()))
        for i, (count, temperature) in enumerate([(200, 0), (1, 1), (90, 0.7), (130, 0), (31, 1)])
    ]
    with Engine(whole) as engine:
        wanted = [list(engine.submit(*request)) for request in requests]
    with Engine(small(folder, 7), step_tokens=64) as engine:
        generations = [engine.submit(*request) for request in requests]
        assert [list(generation) for generation in generations] == wanted


@native
def test_threads_may_share_the_model(folder: Path, whole: dsv4.Model) -> None:
    model = small(folder, 4)
    prompts = [tokens(9, i) for i in range(4)]
    wanted = [(whole.logits(ids), whole.mtp_logits(ids)) for ids in prompts]
    wrong: list[int] = []

    def ask(i: int) -> None:
        for _ in range(8):
            got = model.logits(prompts[i]), model.mtp_logits(prompts[i])
            if not all(map(torch.equal, got, wanted[i])):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


@native
def test_a_server_answers_the_same_and_says_what_it_read(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    config = V4Config.from_dict(CONFIG.to_dict() | {"vocab_size": tokenizer.vocab_size})
    folder = tmp_path / "m"
    save_checkpoint(folder, config, synthesize(config, seed=3))
    tokenizer.save(folder)
    body = {
        "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12,
        "thinking": {"type": "disabled"}, "logprobs": True,
    }  # fmt: skip
    answers = []
    for model in (dsv4.load(folder), small(folder, 5)):
        with Server(LocalBackend(model)) as server:
            answers.append(server.post(body).json()["choices"])
            metrics = httpx.get(f"{server.url}/metrics").text
            told = server.client.models.list().data[0].model_dump()["description"]
    assert answers[0] == answers[1]
    assert "Memory holds 5 of 80 routed experts" in told
    read = next(x for x in metrics.splitlines() if x.startswith("dsv4_expert_bytes_read{"))
    assert float(read.split()[-1]) > 5 * slot_bytes(Checkpoint.open(folder))


# ---------------------------------------------------------------- what is read


def test_reads_are_what_the_policy_predicts_from_the_choices(folder: Path) -> None:
    model = small(folder, 12)
    experts = model.experts
    assert experts is not None
    experts.trace = trace = []
    session = model.session()
    before = disk_reads()
    session.extend(tokens(600, 5))  # in one pass, as the reads are by the pass
    for token in tokens(40, 6):
        session.extend([token])
    stats, seen = experts.stats(), disk_reads() - before
    predicted = replay(trace, experts.slots, LAYERS + 1, EXPERTS, CHOSEN)
    assert stats.counts == predicted
    assert len(trace) == 41 and sum(len(one) for one in trace) == 41 * LAYERS
    assert 0 < predicted.read < predicted.used == sum(len(e) for one in trace for _, e in one)
    pages = predicted.read * experts.slot_bytes
    assert expert_bytes(Checkpoint.open(folder)) // 80 * predicted.read <= stats.bytes_read <= pages
    if experts.bypasses_the_page_cache:
        assert stats.bytes_read <= seen <= 1.15 * stats.bytes_read


def test_chosen_experts_of_hash_layers_are_read_before_the_pass_needs_them(folder: Path) -> None:
    """Before the first layer is computed, those of both hash layers stand in line."""
    model = small(folder, 30)
    experts, seen = model.experts, []
    assert experts is not None
    experts.trace = []
    hook = model.net.layers[0].register_forward_pre_hook(
        lambda *_: seen.append([layer for layer, _ in experts.trace[-1]])
    )
    model.logits(tokens(3, 7))
    hook.remove()
    assert seen == [[0, 1]]


def test_the_memory_is_the_budget(folder: Path) -> None:
    model = small(folder, 9)
    model.logits(tokens(100, 8))
    assert model.experts is not None
    stats = model.experts.stats()
    assert stats.memory_bytes == 9 * slot_bytes(Checkpoint.open(folder))
    assert not any(p.is_cpu for n, p in model.net.named_parameters() if ".ffn.experts." in n)


def test_the_budget_is_what_is_left_unless_all_fits(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    routed, slot = expert_bytes(checkpoint), slot_bytes(checkpoint)
    others = checkpoint.bytes - routed
    assert expert_budget(checkpoint, checkpoint.bytes) is None
    assert expert_budget(checkpoint, others + routed // 2) == routed // 2
    assert expert_budget(checkpoint, 0) == CHOSEN * slot  # slow is better than not at all
    with pytest.raises(ConfigError, match="experts' memory is too small"):
        dsv4.load(folder, expert_memory=CHOSEN * slot - 1)
    assert dsv4.load(folder, expert_memory=routed).experts is None
    assert dsv4.load(folder, beside=1 << 60).experts is not None


@pytest.mark.parametrize("names", [("memory.max", "memory.current"), LIMITS_V1])
def test_a_limit_on_the_control_group_counts_as_the_end_of_memory(
    tmp_path: Path, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what files have in the page cache, which goes when memory is wanted."""
    monkeypatch.setattr(memory, "control_groups", lambda: [tmp_path])
    limit, usage = (tmp_path / name for name in names)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000\nactive_file 500\n")
    usage.write_text("50000\n")
    limit.write_text("100000\n")
    assert memory.available() == 100_000 - 50_000 + 1500
    limit.write_text("max\n" if limit.name == "memory.max" else "9223372036854771712\n")
    assert memory.available() > 10**8


# ---------------------------------------------------------------- what goes wrong


def test_a_file_that_shrinks_ends_the_pass_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    model, ids = small(copy, 6), tokens(60, 9)
    wanted = model.logits(ids)
    checkpoint = Checkpoint.open(copy)
    path, begin = checkpoint.place("layers.2.ffn.experts.9.w2.weight")
    data = path.read_bytes()
    os.truncate(path, begin + 100)
    with pytest.raises(CheckpointError, match=r"ended while it was in use"):
        for _ in range(3):
            model.logits(ids)
    path.write_bytes(data)
    if kernels.NATIVE:
        assert torch.equal(model.logits(ids), wanted)


def test_scales_that_are_no_numbers_are_refused_when_they_are_read(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    path, begin = Checkpoint.open(copy).place("layers.3.ffn.experts.2.w1.scale")
    with path.open("r+b") as f:
        f.seek(begin + 5)
        f.write(b"\xff")
    checkpoint = Checkpoint.open(copy, check_values=False)
    checkpoint._checked = False  # as of a checkpoint too large to be looked through at once
    model = dsv4.Model.from_checkpoint(checkpoint, expert_memory=6 * slot_bytes(checkpoint))
    with pytest.raises(CheckpointError, match=r"layers\.3\.ffn\.experts\.2\.w1\.scale"):
        model.logits(tokens(100, 10))


def test_a_pass_that_fails_leaves_the_others_unharmed(folder: Path, whole: dsv4.Model) -> None:
    model, ids = small(folder, 5), tokens(80, 11)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    for layer in (0, 1, 3):
        hook = model.net.layers[layer].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model.logits(ids)
        hook.remove()
    if kernels.NATIVE:
        assert torch.equal(model.logits(ids), whole.logits(ids))


@native
@pytest.mark.parametrize("slots", [CHOSEN, 8, 20])
def test_reads_that_come_late_or_fail_change_no_answer(
    folder: Path, whole: dsv4.Model, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads; a failure ends the pass that met it, and nothing else."""
    model, draw, outcomes = small(folder, slots), random.Random(slots), []
    prompts = [tokens(count, count) for count in (1, 4, 60)]
    wanted = [whole.logits(prompt) for prompt in prompts]
    read = _Reader.read

    def unreliable(*arguments: Any) -> Any:
        if draw.random() < 0.2:
            time.sleep(draw.random() * 0.002)
        if draw.random() < 0.01:
            raise CheckpointError("the disk is gone for a moment")
        return read(*arguments)

    monkeypatch.setattr(_Reader, "read", unreliable)

    def ask() -> None:
        for _ in range(3):
            for prompt, answer in zip(prompts, wanted, strict=True):
                try:
                    outcomes.append(torch.equal(model.logits(prompt), answer))
                except CheckpointError:
                    outcomes.append(None)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 27
    assert outcomes.count(True) >= 3 and False not in outcomes
    monkeypatch.undo()
    assert torch.equal(model.logits(prompts[2]), wanted[2])


# ---------------------------------------------------------------- the commands


@native
@pytest.mark.slow
def test_commands_take_the_budget_in_words() -> None:
    asked = ["generate", "v4-nano", "What is 3 times 4?", "--temperature", "0", "--think", "high"]

    def said(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsv4.cli", *asked, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    whole, part = said(), said("--expert-memory", "1.5MB")
    assert part.returncode == 0 and (part.stdout, part.stderr) == (whole.stdout, whole.stderr)
    refused = said("--expert-memory", "1kB")
    assert refused.returncode != 0 and "experts' memory is too small" in refused.stderr
    assert "8GB" in said("--expert-memory", "much").stderr


# ---------------------------------------------------------------- the bench


@native
@pytest.mark.slow
@pytest.mark.parametrize("groups", [True, False])
def test_the_bench_runs_a_model_under_a_limit(
    folder: Path, groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not groups:  # as where none can be made
        monkeypatch.setattr(bench_experts, "control_groups", list)
    budget = 10 * slot_bytes(Checkpoint.open(folder))
    report = bench_experts.run(
        folder, limit=2 * 10**9, expert_memory=budget, prompt=20, new=6, threads=1
    )
    assert groups or report["limit_by"] == "RLIMIT_DATA"
    assert report["same_logits"] is True
    assert report["memory"]["experts"] == 10
    assert 0 < report["memory"]["peak_bytes"] <= 2 * 10**9
    each = expert_bytes(Checkpoint.open(folder)) // 80
    for phase in bench_experts.PHASES:
        one = report[phase]
        assert one["predicted_bytes"] == one["experts_read"] * each <= one["own_bytes"]
        assert 0 <= one["hit_rate"] < 1
        assert one["of_disk"] > 0 and one["tokens_per_s"] > 0
        assert 0 <= one["waiting"] <= 1 and 0 < one["reading"] <= 1


def test_a_limit_that_holds_everything_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not make experts come and go"):
        bench_experts.run(folder, limit=10**10)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_process_under_the_limit_cannot_have_more(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with bench_experts.memory_limit(10**8, [tmp_path / "file", tmp_path]) as group:
        assert group == ""  # neither is a control group
    assert os.listdir(tmp_path) == ["file"]
    script = "import resource as r; r.setrlimit(r.RLIMIT_DATA, (10**8, 10**8)); bytearray(10**9)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "MemoryError" in done.stderr


# ---------------------------------------------------------------- the policy alone


def decode(
    layers: int, experts: int, chosen: int, passes: int, skew: float, seed: int
) -> list[list[tuple[int, list[int]]]]:
    """Single tokens; in every layer the i-th most popular expert has weight ``i ** -skew``."""
    draw = random.Random(seed)
    orders = [draw.sample(range(experts), experts) for _ in range(layers)]
    weights = [(i + 1) ** -skew for i in range(experts)]

    def choose(order: Sequence[int]) -> list[int]:
        found: set[int] = set()
        while len(found) < chosen:
            found.add(draw.choices(order, weights)[0])
        return sorted(found)

    return [[(layer, choose(orders[layer])) for layer in range(layers)] for _ in range(passes)]


def least_recently_used(trace: list[list[tuple[int, list[int]]]], slots: int) -> float:
    held: dict[tuple[int, int], None] = {}
    used = hits = 0
    for one in trace:
        for key in ((layer, e) for layer, experts in one for e in experts):
            used += 1
            hits += key in held
            held.pop(key, None)
            held[key] = None
            if len(held) > slots:
                del held[next(iter(held))]
    return hits / used


def test_skewed_choices_are_found_in_memory_more_often_than_with_least_recently_used() -> None:
    """A quarter of the experts fits. Evenly used, a quarter of the uses finds them there."""
    rates = {}
    for skew in (0.0, 0.6, 1.0):
        trace = decode(4, 64, 4, 400, skew, seed=1)
        rates[skew] = replay(trace, 64, 4, 64, 4).hit_rate
        assert rates[skew] > least_recently_used(trace, 64) - 0.01
    assert 0.2 < rates[0.0] < 0.3
    assert rates[0.6] > 0.38
    assert rates[1.0] > 0.6
    assert rates[1.0] > least_recently_used(decode(4, 64, 4, 400, 1.0, seed=1), 64) + 0.03


def test_a_long_prompt_that_uses_everything_keeps_what_fits() -> None:
    """Where least recently used would drop every expert just before its turn."""
    trace = [[(layer, list(range(64))) for layer in range(4)] for _ in range(10)]
    assert least_recently_used(trace, 96) == 0
    best = 96 / 256 * 9 / 10  # nothing is there at first
    assert replay(trace, 96, 4, 64, 4).hit_rate > 0.8 * best


def test_what_changes_is_followed() -> None:
    """Half-way every layer has other favourites."""
    trace = decode(4, 64, 4, 300, 1.0, seed=2) + decode(4, 64, 4, 300, 1.0, seed=3)
    early = replay(trace[:300], 64, 4, 64, 4)
    both = replay(trace, 64, 4, 64, 4)
    later = 1 - (both.read - early.read) / (both.used - early.used)
    assert later > early.hit_rate - 0.05


@pytest.mark.parametrize("slots", [1, 3, 8, 50, 200])
def test_a_plan_takes_no_slot_of_what_comes_next(slots: int) -> None:
    """Any sequence of plans: each expert has one slot, and one that was planned within the last
    few steps keeps it."""
    draw = random.Random(slots)
    residency = Residency(slots, 3, 16, 3)
    planned: list[tuple[int, int]] = []  # what stood in which slot, in the order of the steps
    held: dict[int, tuple[int, int]] = {}
    for _ in range(300):
        residency.next_pass()
        for layer in range(3):
            wanted = draw.sample(range(16), draw.choice([1, 3, 16]))
            steps = residency.plan(layer, wanted)
            assert sorted(step.expert for step in steps) == sorted(wanted)
            assert [s.read for s in steps] == sorted(s.read for s in steps)  # hits come first
            for step in steps:
                key = (layer, step.expert)
                assert step.read == (held.get(step.slot) != key)
                recent = [slot for _, slot in planned[-min(16, slots // 4):]] if slots > 3 else []
                assert not (step.read and step.slot in recent)
                held[step.slot] = key
                planned.append((layer, step.slot))
            assert len(set(held.values())) == len(held) <= slots
