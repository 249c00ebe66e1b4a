"""Speculation changes no answer, takes back what was wrong, and stops where it does not pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scripted_models import TokenRunner, one_torch_thread  # noqa: F401

import dsv4
from dsv4 import kernels
from dsv4.config import V4Config
from dsv4.encoding import encode_segments
from dsv4.engine import Engine, Generation, SamplingParams
from dsv4.engine.kvstate import KVState
from dsv4.engine.scheduler import GRAIN, Job, Scheduler
from dsv4.engine.session import Part, Runner
from dsv4.engine.speculate import RETRY_MOST, WARM, Judge, Odds, Trail, Weights
from dsv4.model import Transformer
from dsv4.numerics import OFFICIAL
from dsv4.synth import synthesize

native = pytest.mark.skipif(
    kernels.NATIVE is None, reason="torch's products depend on the number of rows"
)
NANO = V4Config.preset("nano")
QUESTIONS = (
    "Hello! How are you today?", "What is the capital of France?", "What can you do?",
    "Who are you?", "What is 47 + 85?", "Compute 345 - 78.",
)  # fmt: skip


class Eager(Judge):
    """Has a guess made for everybody."""

    def choose(self, odds: Sequence[Odds], decoding: int) -> list[int]:
        return list(range(len(odds)))


class Chance:
    """What follows some tokens has probabilities that depend on the last one alone."""

    vocab = 6
    config = replace(NANO, vocab_size=vocab, eos_token_id=0)

    def __init__(self, guesses: Callable[[list[int]], torch.Tensor]) -> None:
        self.table = torch.randn(self.vocab, self.vocab, generator=torch.Generator().manual_seed(3))
        self.guesses = guesses

    def runner(self) -> TokenRunner:
        runner = TokenRunner(lambda tokens: self.table[tokens[-1]])
        runner.guesses = self.guesses
        return runner


def eager(model: Any, **options: Any) -> Engine:
    engine = Engine(model, **options)
    engine._judge = Eager(Weights(NANO))
    return engine


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("guesser", ["the model's own", "a wrong one"])
def test_sampled_tokens_have_the_models_distribution(guesser: str, top_p: float) -> None:
    """Chi-square of what follows each token, against exact probabilities; fresh randomness."""
    model = Chance(lambda tokens: torch.zeros(Chance.vocab))
    if guesser == "the model's own":
        model.guesses = lambda tokens: model.table[tokens[-1]]
    counts = np.zeros((Chance.vocab, Chance.vocab))
    params = SamplingParams(max_tokens=6, temperature=0.9, top_p=top_p, stop_token_ids=())
    with eager(model, max_running=32, max_waiting=1000) as engine:
        running = [engine.submit([2], params) for _ in range(600)]
        for generation in running:
            tokens = generation.result()
            for before, after in zip([2, *tokens], tokens, strict=False):
                counts[before, after] += 1
        stats = engine.stats()
    assert stats.guessed_tokens > 1000
    if guesser == "the model's own":
        assert stats.accepted_tokens == stats.guessed_tokens
    else:
        assert 0 < stats.accepted_tokens < 0.7 * stats.guessed_tokens
    for before in range(Chance.vocab):
        wanted = probabilities(model.table[before], 0.9, top_p)
        assert not counts[before][wanted == 0].any()
        seen, likely = counts[before][wanted > 0], wanted[wanted > 0] * counts[before].sum()
        if len(seen) > 1 and likely.min(initial=np.inf) >= 5:
            square = torch.tensor(((seen - likely) ** 2 / likely).sum())
            freedom = torch.tensor(len(seen) - 1.0)
            p_value = torch.special.gammaincc(freedom / 2, square.float() / 2)
            assert p_value > 1e-4, (before, seen, likely)


def probabilities(
    logits: torch.Tensor, temperature: float, top_p: float
) -> npt.NDArray[np.float64]:
    """Softmax at a temperature, then the likeliest up to ``top_p``."""
    p = (logits.double() / temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(p[order].cumsum(), top_p)) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@native
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_v4_nano_says_the_same_and_most_guesses_are_right(temperature: float) -> None:
    nano = dsv4.load("v4-nano")
    assert nano.tokenizer is not None
    prompts = [
        nano.tokenizer.encode_segments(
            encode_segments([{"role": "user", "content": text}], mode)
        )
        for text in QUESTIONS for mode in ("chat", "thinking")
    ]  # fmt: skip
    answers: list[list[Any]] = []
    for speculate in (False, True):
        with Engine(nano, speculate=speculate, max_running=3) as engine:
            if speculate:
                engine._judge = Eager(Weights(nano.config))
            running = [
                engine.submit(p, SamplingParams(
                    max_tokens=60, temperature=temperature, seed=i, logprobs=3))
                for i, p in enumerate(prompts)
            ]  # fmt: skip
            answers.append([(list(g), g.finish_reason) for g in running])
            stats = engine.stats()
    assert answers[0] == answers[1]
    assert stats.accepted_tokens > 0.5 * stats.guessed_tokens > 50


@native
def test_what_was_taken_back_never_was() -> None:
    """At every kind of boundary: the state and the logits after it, bit for bit."""
    runner = small_runner()
    random = Random(0)
    ids = [random.randrange(2, 256) for _ in range(300)]
    for at in (1, 2, 3, 4, 5, 126, 127, 128, 129, 131, 255, 256):
        for wrong in (1, 2, 5):
            plain, other = KVState(runner.layout), KVState(runner.layout)
            for state in (plain, other):
                runner.run([Part(state, ids[:at], 1)])
                state.settle()
            runner.run([Part(plain, ids[at : at + 1], 1)])
            runner.run([Part(other, [ids[at], *ids[:wrong]], None)])
            other.take_back(wrong)
            assert same_cut(plain.cut(at + 1), other.cut(at + 1), at + 1)
            assert same_cut(plain.cut(at), other.cut(at), at)
            for state in (plain, other):
                state.settle()
                state.check()
            last = [runner.run([Part(s, ids[at + 1 : at + 9], None)])[0] for s in (plain, other)]
            assert last[0].equal(last[1])


def same_cut(a: Any, b: Any, position: int) -> bool:
    tensors = all(
        x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)
        for x, y in zip(a.layers, b.layers, strict=True)
    )
    written = all(c.partial is None or c.partial.claimed >= position % GRAIN for c in (a, b))
    return a.position == b.position and tensors and written


def small_runner(**changes: Any) -> Runner:
    config = V4Config(
        vocab_size=256, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_hash_layers=1, num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        q_lora_rank=128, head_dim=128, o_groups=2, o_lora_rank=128,
        compress_ratios=(0, 4, 128, 0), index_n_heads=2, index_topk=24,
    )  # fmt: skip
    config = replace(config, **changes)
    net = Transformer(config)
    weights = synthesize(config, seed=1)
    tensors = dict(weights)
    net.load_weights(tensors, tensors.__getitem__)
    return Runner(net, OFFICIAL)


def test_a_model_without_the_block_does_not_speculate() -> None:
    runner = small_runner(num_nextn_predict_layers=0, compress_ratios=(0, 4, 128))
    assert runner.trail() is None


def test_a_guide_is_asked_in_turns_and_rules_guesses_too() -> None:
    """It forbids each token right after itself; the guesser would like nothing better."""
    model = Chance(lambda tokens: torch.nn.functional.one_hot(
        torch.tensor(tokens[-1]), Chance.vocab).float())  # fmt: skip
    calls: list[str] = []

    class NoRepeats:
        last = 2

        def allowed(self) -> npt.NDArray[np.bool_]:
            calls.append("allowed")
            return np.arange(Chance.vocab) != self.last

        def accept(self, token: int) -> None:
            calls.append("accept")
            self.last = token

    def ask(engine: Engine) -> list[int]:
        params = SamplingParams(max_tokens=40, temperature=1, seed=7, stop_token_ids=())
        return engine.submit([2], params, NoRepeats()).result()

    with eager(model) as engine:
        tokens = ask(engine)
        assert engine.stats().guessed_tokens > 10
    assert calls == ["allowed", "accept"] * 40
    assert all(a != b for a, b in zip([2, *tokens], tokens, strict=False))
    with Engine(model, speculate=False) as engine:
        assert ask(engine) == tokens


def test_a_right_guess_of_the_end_ends() -> None:
    """Stop tokens and limits hold wherever they fall between guesses."""
    model = Chance(lambda tokens: model.table[tokens[-1]])
    for seed in range(40):
        answers = []
        for speculate in (False, True):
            with Engine(model, speculate=speculate) as engine:
                if speculate:
                    engine._judge = Eager(Weights(NANO))
                generation = engine.submit([3], SamplingParams(max_tokens=seed % 7 + 1, seed=seed))
                answers.append((generation.result(), generation.finish_reason,
                                generation.usage.completion_tokens))  # fmt: skip
        assert answers[0] == answers[1]


def test_a_guesser_that_fails_is_given_up_and_no_answer_suffers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(tokens: list[int]) -> torch.Tensor:
        if len(tokens) > 6:
            raise RuntimeError("out of luck")
        return torch.zeros(Chance.vocab)

    model = Chance(broken)
    params = SamplingParams(max_tokens=20, seed=1, stop_token_ids=())
    with eager(model) as engine:
        both = [engine.submit([2], params), engine.submit([3], params)]
        tokens = [generation.result() for generation in both]
    assert "speculation is off" in caplog.text
    with Engine(model, speculate=False) as engine:
        assert [engine.submit([first], params).result() for first in (2, 3)] == tokens


# ---------------------------------------------------------------------- where it pays


class Machine:
    """Decodes in simulated time, with passes that take what they take on some machine."""

    def __init__(self, row: float, block: float, noise: float = 0.0) -> None:
        self.row, self.block, self.noise = row, block, noise
        self.random = Random(1)

    def trunk(self, rows: int) -> float:
        return self._held_up(1 + self.row * (rows - 1))

    def _held_up(self, seconds: float) -> float:
        late = self.random.random() < 0.1
        return seconds * (1 + self.noise * self.random.random() + 3 * self.noise * late)

    def run(self, judge: Judge, answers: Sequence[tuple[int, float]], users: int) -> float:
        """Seconds for answers of ``(tokens, chance that a guess is right)``, relative to those
        without speculation."""
        queue = list(answers)
        active: list[list[Any]] = []
        chosen: list[Odds] = []
        took = plain = 0.0
        while queue or active:
            while queue and len(active) < users:
                tokens, chance = queue.pop()
                active.append([tokens, chance, Odds(judge.everyone)])
            guessed = [a for a in active if a[2] in chosen]
            seconds = self.trunk(len(active) + len(guessed))
            judge.took(len(active) + len(guessed), seconds, len(guessed))
            took += seconds
            usual = (1 + self.row * (len(active) - 1)) * (1 + self.noise * 0.8)
            for each in active:
                right = each in guessed and self.random.random() < each[1]
                if each in guessed:
                    each[2].seen(right)
                each[0] -= 1 + right
                plain += usual * (1 + right) / len(active)
            active = [a for a in active if a[0] > 0]
            able = [a[2] for a in active if a[0] > 1]
            chosen = [able[i] for i in judge.choose(able, len(active))] if able else []
            if chosen:
                seconds = self._held_up(self.block * (1 + 0.2 * (len(chosen) - 1)))
                judge.drafting_took(len(chosen), seconds)
                took += seconds
        return took / plain


@pytest.mark.parametrize("users", [1, 2, 8])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("row,block", [(0.05, 0.25), (0.3, 0.2), (0.9, 0.05), (1.5, 0.5)])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9])
def test_it_is_never_slower(
    chance: float, row: float, block: float, noise: float, users: int
) -> None:
    answers = [(n, chance) for n in (20, 200, 50, 1000, 30) * 8]
    ratio = Machine(row, block, noise).run(Judge(Weights(NANO)), answers, users)
    assert ratio < 1.03
    if users == 1 and not noise:  # what always guessing takes, or never, whatever is less
        best = min(1.0, (1 + row + block) / (1 + chance))
        assert ratio < best + 0.06


def test_short_answers_that_cannot_be_guessed_cost_little() -> None:
    answers = [(10, 0.02)] * 300
    assert Machine(0.1, 0.3).run(Judge(Weights(NANO)), answers, 1) < 1.02


def test_it_comes_back_when_the_text_changes() -> None:
    machine, judge = Machine(0.05, 0.25), Judge(Weights(NANO))
    assert machine.run(judge, [(RETRY_MOST * 4, 0.0)], 1) > 0.99
    assert machine.run(judge, [(RETRY_MOST * 4, 0.9)], 1) < 0.85


def test_only_those_that_can_be_guessed_are() -> None:
    judge = Judge(Weights(NANO))
    for rows in range(1, 9):
        judge.took(rows, 1 + 0.3 * rows, 0)
        judge.drafting_took(rows, 0.05 + 0.1 * rows)
    everyone = [Odds(judge.everyone) for _ in range(4)]
    for _ in range(20):
        for i, odds in enumerate(everyone):
            odds.seen(i in (1, 3))
    assert sorted(judge.choose(everyone, 4)) == [1, 3]


def test_bytes_of_experts_are_counted_by_how_many_are_taken() -> None:
    """Against rows that choose at random."""
    weights = Weights(NANO)
    random = Random(0)
    experts, k = NANO.n_routed_experts, NANO.num_experts_per_tok
    for rows in (1, 2, 8, 16):
        taken = [
            len({e for _ in range(rows) for e in random.sample(range(experts), k)})
            for _ in range(2000)
        ]
        ratio = weights.expert_bytes(rows) / weights.expert_bytes(1)
        assert ratio == pytest.approx(sum(taken) / len(taken) / k, rel=0.02)


# ---------------------------------------------------------------------- room for guesses


def test_guesses_never_take_the_row_or_the_block_of_a_token() -> None:
    scheduler = Scheduler(max_running=4, step_tokens=6, blocks=64)
    jobs = [Job(tokens, 600) for tokens in (5, GRAIN, 7, 8)]
    for job in jobs:
        scheduler.add(job)
    scheduler.step()
    for job in jobs:
        scheduler.resumed(job, job.tokens - 1)
        job.guesses = 1
    jobs[1].blocks = 1  # the next token of this one needs a block it does not have yet
    fed = scheduler.feed()
    assert sorted(n for _, n in fed) == [1, 1, 1, 1]
    assert jobs[1].guesses == 0
    assert sum(job.guesses for job in jobs) == 2


def test_a_trail_keeps_what_is_near_and_no_gap() -> None:
    trail = Trail(128)
    rows = torch.arange(400.0).view(-1, 1, 1)
    trail.add(rows[:100])
    assert trail.take().flatten().tolist() == list(range(100 - WARM, 100))
    trail.window(torch.zeros(1, WARM, 4))
    for at in range(100, 100 + WARM):
        trail.add(rows[at : at + 1])
    assert trail.unseen == WARM and trail.window(torch.zeros(1, 1, 4)).length == WARM + 1
    trail.add(rows[200:202])
    trail.take_back(1)
    assert trail.take().flatten().tolist()[-2:] == [100 + WARM - 1, 200]
    assert trail.window(torch.zeros(1, 1, 4)).length == 1, "streams were dropped in between"


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_usage_and_stats_count_guesses() -> None:
    model = Chance(lambda tokens: model.table[tokens[-1]])
    with eager(model) as engine:
        params = SamplingParams(max_tokens=30, seed=2, stop_token_ids=())
        running: list[Generation] = [engine.submit([2], params) for _ in range(3)]
        for generation in running:
            generation.result()
        wait_for(lambda: engine.stats().running == 0)
        stats = engine.stats()
    assert stats.guessed_tokens == sum(g.usage.guessed_tokens for g in running) > 30
    assert stats.accepted_tokens == sum(g.usage.accepted_tokens for g in running)
    assert stats.accepted_tokens == stats.guessed_tokens, "the same logits, the same numbers"
