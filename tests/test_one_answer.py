"""One answer: the same request gets the same tokens and logprobs, bit for bit, come what may."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from scripted_models import one_torch_thread  # noqa: F401

import dsv4
from dsv4 import kernels
from dsv4.checkpoint import save_checkpoint
from dsv4.config import V4Config
from dsv4.engine import Engine, Generation, SamplingParams, Token
from dsv4.engine.disk import DiskTier
from dsv4.engine.session import Runner
from dsv4.engine.speculate import Judge, Odds, Trail, Weights
from dsv4.protocols import Continued
from dsv4.synth import synthesize

pytestmark = pytest.mark.skipif(
    kernels.NATIVE is None, reason="torch's products depend on the number of rows"
)
VOCAB = 256
Request = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsv4.Model:
    config = V4Config(
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=4,
        num_hash_layers=1, num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        q_lora_rank=128, head_dim=128, o_groups=2, o_lora_rank=128,
        compress_ratios=(0, 4, 128, 4, 0), index_n_heads=2, index_topk=24,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "v4-tiny"
    save_checkpoint(folder, config, synthesize(config, seed=1))
    return dsv4.load(folder)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Forty: beginnings of one text, edits of it, texts of their own; greedy and sampled."""
    random = Random(1)
    text = [random.randrange(2, VOCAB) for _ in range(420)]
    out: list[Request] = []
    for i in range(40):
        prompt = text[: random.choice([1, 2, 127, 128, 129, 200, 256, 257, 300, 384, 420])]
        if i % 3 == 1:
            prompt[random.randrange(len(prompt))] = random.randrange(2, VOCAB)
        if i % 8 == 2:
            prompt = [random.randrange(2, VOCAB) for _ in range(random.randrange(1, 300))]
        params = SamplingParams(
            max_tokens=random.randrange(1, 9), temperature=random.choice([0, 0.7, 1.5]),
            top_p=random.choice([1, 0.9]), seed=i, stop_token_ids=(), logprobs=2,
        )  # fmt: skip
        out.append((prompt, params))
    return out


@pytest.fixture(scope="module")
def alone(model: dsv4.Model, requests: list[Request]) -> list[list[Token]]:
    """Each by itself, nothing kept from the others, a token at a time."""
    answers = []
    for prompt, params in requests:
        with Engine(model, speculate=False) as engine:
            answers.append(list(engine.submit(prompt, params)))
    assert len({tuple(t.id for t in answer) for answer in answers}) > 20
    return answers


def same(generations: list[Generation], wanted: list[list[Token]]) -> None:
    for generation, tokens in zip(generations, wanted, strict=True):
        assert list(generation) == tokens  # logprobs too, to the last bit


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_in_random_company_and_chunks(
    model: dsv4.Model, requests: list[Request], alone: list[list[Token]], seed: int
) -> None:
    """Two rounds: cold, then cached; requests come at random and the chunks are of random size."""
    random = Random(seed)
    memory = random.choice([3 << 20, 8 << 20, 1 << 30])
    with Engine(
        model, step_tokens=random.choice([8, 50, 200, 512]), max_running=random.randrange(2, 9),
        memory_bytes=memory,
    ) as engine:  # fmt: skip
        for _ in range(2):
            order = random.sample(range(len(requests)), len(requests))
            running = {}
            for i in order:
                running[i] = engine.submit(*requests[i], priority=random.randrange(2))
                time.sleep(random.choice([0, 0, 0.01]))
            same([running[i] for i in range(len(requests))], alone)
        while engine.stats().running:
            time.sleep(0.01)
        engine._cache.check()
    hits = sum(g.usage.cached_tokens for g in running.values())
    assert hits > 0


def test_after_rewinds_and_edits(
    model: dsv4.Model, requests: list[Request], alone: list[list[Token]]
) -> None:
    """Each prompt comes after one that is an edit of it, and one that it is a part of."""
    with Engine(model, step_tokens=64) as engine:
        for (prompt, params), tokens in list(zip(requests, alone, strict=True))[::2]:
            at = len(prompt) // 2
            edit = [*prompt[:at], (prompt[at] + 1) % VOCAB, *prompt[at + 1 :]]
            one = SamplingParams(max_tokens=1, seed=0, stop_token_ids=())
            engine.submit(edit, one).result()
            engine.submit([*prompt, 3, 4, 5], one).result()
            same([engine.submit(prompt, params)], [tokens])


class Prophet:
    """A runner whose guesses are mostly right, because it knows the answers."""

    def __init__(self, runner: Runner, answers: list[list[int]], random: Random) -> None:
        self._runner, self._answers, self._random = runner, answers, random

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def guess(self, timelines: Sequence[Continued], trails: Sequence[Trail]) -> torch.Tensor:
        logits = self._runner.guess(timelines, trails).clone()
        for row, timeline in zip(logits, timelines, strict=True):
            at = timeline.start + 1
            end = at + len(timeline.ids)
            known = [a[end] for a in self._answers if len(a) > end and a[at:end] == timeline.ids]
            if known and self._random.random() < 0.8:
                row[known[0]] = 1e9
        return logits


class Eager(Judge):
    """Has guesses made for anybody, at random."""

    random = Random(5)

    def choose(self, odds: Sequence[Odds], decoding: int) -> list[int]:
        return [i for i in range(len(odds)) if self.random.random() < 0.8]


@pytest.mark.parametrize("right", [False, True])
def test_with_speculation(
    model: dsv4.Model, requests: list[Request], alone: list[list[Token]], tmp_path: Path,
    right: bool,
) -> None:
    """Wrong guesses are taken back and right ones give the same token: in company, in chunks, with
    too little memory for all, from the cache and from disk."""
    whole = [[*p, *(t.id for t in a)] for (p, _), a in zip(requests, alone, strict=True)]
    guessed = accepted = 0
    for seed, memory in ((0, 3 << 20), (1, 1 << 30), (2, 1 << 30)):
        random = Random(seed)
        tier = DiskTier(tmp_path, model.fingerprint(), 1 << 30) if seed else None
        with Engine(
            model, step_tokens=random.choice([8, 50, 200]), max_running=random.randrange(2, 7),
            memory_bytes=memory, disk=tier,
        ) as engine:  # fmt: skip
            engine._judge = Eager(Weights(model.config))
            if right:
                engine._runner = Prophet(model.runner(), whole, random)
            some = random.sample(range(40), 40) if seed == 0 else range(0, 40, 2)
            running = {i: engine.submit(*requests[i]) for i in some}
            same([running[i] for i in some], [alone[i] for i in some])
            guessed += sum(g.usage.guessed_tokens for g in running.values())
            accepted += sum(g.usage.accepted_tokens for g in running.values())
            while engine.stats().running:
                time.sleep(0.01)
            engine._cache.check()
    assert guessed > 60
    assert accepted > 0.5 * guessed if right else accepted < 0.2 * guessed


def test_a_session_agrees(
    model: dsv4.Model, requests: list[Request], alone: list[list[Token]]
) -> None:
    for (prompt, params), tokens in list(zip(requests, alone, strict=True))[:6]:
        assert model.generate(prompt, params) == [token.id for token in tokens]


def test_cancelled_neighbours_leave_no_trace(
    model: dsv4.Model, requests: list[Request], alone: list[list[Token]]
) -> None:
    with Engine(model, step_tokens=50) as engine:
        kept = []
        for i, (prompt, params) in enumerate(requests[:16]):
            generation = engine.submit(prompt, params)
            if i % 2:
                generation.cancel()
            else:
                kept.append(generation)
        same(kept, alone[:16:2])


def test_after_a_restart_with_a_disk(
    model: dsv4.Model, requests: list[Request], alone: list[list[Token]], tmp_path: Path
) -> None:
    some = range(0, 40, 3)
    for start in range(3):
        tier = DiskTier(tmp_path, model.fingerprint(), 1 << 30)
        with Engine(model, step_tokens=200, disk=tier) as engine:
            running = [engine.submit(*requests[i]) for i in some]
            same(running, [alone[i] for i in some])
        hits = [generation.usage.reuse.disk for generation in running]
        assert tier.failures == 0
        assert sum(hits) > 300 if start else not any(hits)


def test_an_edit_after_a_restart_costs_what_follows_it_and_127_tokens_at_most(
    model: dsv4.Model, tmp_path: Path
) -> None:
    random = Random(5)
    text = [random.randrange(2, VOCAB) for _ in range(1000)]
    params = SamplingParams(max_tokens=2, temperature=0, stop_token_ids=())

    def answer(prompt: list[int]) -> Generation:
        tier = DiskTier(tmp_path, model.fingerprint(), 1 << 30)
        with Engine(model, step_tokens=200, disk=tier) as engine:
            generation = engine.submit(prompt, params)
            generation.result()
        assert tier.failures == 0
        return generation

    answer(text)
    for place in (999, 640, 639, 300, 130, 127):
        edited = [*text[:place], 1 + text[place] % 200, *text[place + 1 :]]
        generation = answer(edited)
        assert generation.usage.reuse.hit == generation.usage.reuse.disk >= place // 128 * 128
        assert generation.tokens == model.generate(edited, params)
