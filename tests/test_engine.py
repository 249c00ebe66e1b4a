"""The engine: answers do not depend on neighbours, prompts are reused, failures stay alone."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from scripted_models import (
    TokenRunner,
    one_torch_thread,  # noqa: F401
    small_tokenizer,
    tiny_model,
)

import dsv4
from dsv4.config import V4Config
from dsv4.engine import Engine, EngineBusyError, EngineClosedError, Generation, SamplingParams
from dsv4.engine.prefix import Reuse
from dsv4.engine.session import Part
from dsv4.errors import ConfigError, ContextLengthError, RequestError

VOCAB = 64
CONFIG = replace(V4Config.preset("nano"), vocab_size=VOCAB, eos_token_id=1)


class HashModel:
    """What follows some tokens is a pure function of them; the rest is the engine's."""

    config = CONFIG

    def __init__(self) -> None:
        self.passes: list[list[list[int]]] = []
        self.before_step: Callable[[Sequence[int]], None] = lambda ids: None

    @property
    def fed(self) -> list[list[int]]:
        return [ids for parts in self.passes for ids in parts]

    def runner(self) -> TokenRunner:
        def note(parts: Sequence[Part]) -> None:
            self.passes.append([list(part.ids) for part in parts])
            for part in parts:
                self.before_step(part.ids)

        runner = TokenRunner(self.logits)
        runner.before_pass = note
        return runner

    def logits(self, tokens: list[int]) -> torch.Tensor:
        seed = hash(tuple(tokens)) & 0x7FFFFFFF
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
        logits[1] = -2  # the end is rare
        return logits


@pytest.fixture
def model() -> HashModel:
    return HashModel()


@pytest.fixture
def engine(model: HashModel) -> Iterator[Engine]:
    with Engine(model, step_tokens=16, max_running=4) as engine:
        yield engine


def params(n: int = 20, seed: int = 0, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=n, seed=seed, **more)


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


# ---------------------------------------------------------------------- answers


def test_an_answer_is_the_same_alone_and_beside_others(model: HashModel) -> None:
    prompts = [[2 + i, *range(2, 2 + 7 * i)] for i in range(8)]
    alone = []
    for i, prompt in enumerate(prompts):
        with Engine(model) as engine:
            alone.append(engine.submit(prompt, params(seed=i)).result())
    for chunk, running in ((1, 8), (16, 3), (512, 8)):
        with Engine(model, step_tokens=chunk, max_running=running) as engine:
            together = [engine.submit(p, params(seed=i)) for i, p in enumerate(prompts)]
            assert [g.result() for g in together] == alone


def test_requests_take_turns(engine: Engine, model: HashModel) -> None:
    """No answer waits for another to finish, and a long prompt goes in between tokens."""
    started = threading.Event()
    model.before_step = lambda ids: started.wait(10) and None
    short = engine.submit([5, 6], params(40))
    long = engine.submit(list(range(2, 62)) * 3, params(3))
    started.set()
    short.result(), long.result()
    assert all(sum(map(len, parts)) <= 16 for parts in model.passes)
    mixed = [parts for parts in model.passes if len(parts) == 2]
    assert sorted(map(len, mixed[3])) == [1, 15]
    chunks = [ids for ids in model.fed if len(ids) > 2]
    assert sum(map(len, chunks)) >= 180 - 15 and len(chunks) >= 11


def test_the_stop_token_ends_and_is_counted_but_not_given(engine: Engine) -> None:
    free = engine.submit([9, 9], params(30)).result()
    stopped = engine.submit([9, 9], params(30, stop_token_ids=(free[10],)))
    assert stopped.result() == free[: free.index(free[10])]
    assert stopped.finish_reason == "stop"
    assert stopped.usage.completion_tokens == free.index(free[10]) + 1


def test_the_models_end_token_stops_by_default(engine: Engine, model: HashModel) -> None:
    endless = engine.submit([3], params(2000, stop_token_ids=()))
    assert 1 in endless.result()  # rare, not impossible
    with_end = engine.submit([3], params(2000))
    assert with_end.result() == endless.tokens[: endless.tokens.index(1)]
    assert (with_end.finish_reason, endless.finish_reason) == ("stop", "length")


def test_logprobs_come_with_the_tokens_when_asked(engine: Engine) -> None:
    tokens = list(engine.submit([4, 5], params(5, temperature=0, logprobs=2)))
    for token in tokens:
        assert token.logprob is not None
        assert token.logprob.top[0] == (token.id, token.logprob.logprob)
        assert len(token.logprob.top) == 2 and token.logprob.logprob < 0
    assert all(t.logprob is None for t in engine.submit([4, 5], params(5)))


def test_a_guide_is_asked_and_told_in_turns(engine: Engine) -> None:
    class EvenThenStop:
        def __init__(self) -> None:
            self.calls: list[int | None] = []

        def allowed(self) -> np.typing.NDArray[np.bool_] | None:
            self.calls.append(None)
            return np.arange(VOCAB) == 1 if len(self.calls) > 10 else np.arange(VOCAB) % 2 == 0

        def accept(self, token: int) -> None:
            self.calls.append(token)

    guide = EvenThenStop()
    tokens = engine.submit([2, 3], params(), guide).result()
    assert len(tokens) == 5 and all(t % 2 == 0 for t in tokens)
    assert guide.calls == [x for t in [*tokens, 1] for x in (None, t)]
    assert any(t % 2 for t in engine.submit([2, 3], params()).result())


def test_asyncio_and_threads_read_the_same(engine: Engine) -> None:
    async def read() -> list[list[int]]:
        async def one(generation: Generation) -> list[int]:
            return [token.id async for token in generation]

        return await asyncio.gather(*(one(engine.submit([7, i], params(30))) for i in range(2, 8)))

    assert asyncio.run(read()) == [engine.submit([7, i], params(30)).result() for i in range(2, 8)]


# ---------------------------------------------------------------------- reuse


def test_a_continued_conversation_feeds_only_what_is_new(engine: Engine, model: HashModel) -> None:
    first = engine.submit(list(range(2, 30)), params(10, stop_token_ids=()))
    answer = first.result()
    model.passes.clear()
    second = engine.submit([*range(2, 30), *answer, 40, 41], params(1, stop_token_ids=()))
    second.result()
    # the answer's last token was given but never fed
    assert second.usage.cached_tokens == 28 + 9
    assert model.fed == [[answer[-1], 40, 41]]
    assert second.usage.reuse == Reuse(hit=37, new=3)


def test_the_same_prompt_again_feeds_one_token(engine: Engine, model: HashModel) -> None:
    prompt = list(range(2, 50))
    once = engine.submit(prompt, params(12))
    assert once.result() and once.usage.cached_tokens == 0
    for _ in range(3):
        again = engine.submit(prompt, params(12))
        assert again.result() == once.tokens
        assert again.usage.cached_tokens == len(prompt) - 1


SYSTEM = [(7 * i) % 50 + 2 for i in range(300)]


def test_a_shared_beginning_stays_with_all_conversations(engine: Engine) -> None:
    for user in (50, 51, 52):
        generation = engine.submit([*SYSTEM, user, 60], params(6))
        generation.result()
        assert generation.usage.cached_tokens == (0 if user == 50 else 256)
        assert generation.usage.reuse.between == (0 if user == 50 else 44)
    for user in (50, 51, 52):
        generation = engine.submit([*SYSTEM, user, 60, 61], params(2))
        generation.result()
        assert generation.usage.cached_tokens == len(SYSTEM) + 1


def test_a_running_request_lends_its_prompt(engine: Engine, model: HashModel) -> None:
    prompt = list(range(2, 40))
    busy = engine.submit(prompt, params(5000, stop_token_ids=()))
    next(iter(busy))
    second = engine.submit([*prompt, 50], params(2))
    second.result()
    assert second.usage.cached_tokens == len(prompt) - 1
    busy.cancel()


def test_samples_of_one_prompt_compute_it_once(model: HashModel) -> None:
    go = threading.Event()
    model.before_step = lambda ids: go.wait(10) and None
    with Engine(model, step_tokens=64) as engine:
        group = [engine.submit(SYSTEM, params(3, seed=i, stop_token_ids=())) for i in range(5)]
        go.set()
        answers = [g.result() for g in group]
    assert len({tuple(answer) for answer in answers}) > 1
    prompts = sum(len(ids) for ids in model.fed) - 5 * 2
    assert prompts <= len(SYSTEM) + 5 * 128  # while it goes on, whole blocks are shared
    for generation in group:
        reuse = generation.usage.reuse
        assert reuse.hit + reuse.between + reuse.dropped + reuse.new == len(SYSTEM)
        assert generation.prompt_done == len(SYSTEM)


@pytest.mark.parametrize("at", [0, 127, 128, 500, 899])
def test_an_edit_computes_what_follows_it(engine: Engine, model: HashModel, at: int) -> None:
    prompt = SYSTEM * 3
    engine.submit(prompt, params(2)).result()
    model.passes.clear()
    edited = [*prompt[:at], 63, *prompt[at + 1 :]]
    generation = engine.submit(edited, params(1))
    generation.result()
    assert sum(map(len, model.fed)) <= len(prompt) - at + 127
    assert at - 127 <= generation.usage.cached_tokens <= at


def test_an_edit_anywhere_in_a_long_prompt_computes_what_follows_it(model: HashModel) -> None:
    random = Random(4)
    prompt = [random.randrange(2, VOCAB) for _ in range(20_000)]
    with Engine(model) as engine:
        engine.submit(prompt, params(1)).result()
        for at in (random.randrange(20_000) for _ in range(20)):
            model.passes.clear()
            edited = [*prompt[:at], prompt[at] ^ 1, *prompt[at + 1 :]]
            generation = engine.submit(edited, params(1))
            generation.result()
            assert sum(map(len, model.fed)) <= 20_000 - at + 127
            assert generation.usage.cached_tokens == min(at // 128 * 128, 20_000 - 1)


def test_reuse_changes_no_answer(model: HashModel) -> None:
    prompts = [[2, 3, 4, *SYSTEM[: 40 * i]] for i in range(7)]
    expected = []
    for prompt in prompts:
        with Engine(model) as cold:
            expected.append(cold.submit(prompt, params(15)).result())
            assert cold.submit(prompt, params(15)).result() == expected[-1]
    for memory in (12 << 10, 40 << 10, 1 << 20):  # too little to keep much, to keep all
        with Engine(model, memory_bytes=memory) as warm:
            for _ in range(2):
                for prompt, answer in zip(prompts, expected, strict=True):
                    assert warm.submit(prompt, params(15)).result() == answer
            wait_for(lambda: warm.stats().running == 0)
            warm._cache.check()
            assert warm.stats().cache_bytes <= memory


def test_a_miss_says_why(model: HashModel) -> None:
    with Engine(model, memory_bytes=24 << 10) as engine:
        first = engine.submit(SYSTEM, params(1))
        first.result()
        assert first.usage.reuse == Reuse(new=300)
        for i in range(6):
            engine.submit([60 + i % 3, *SYSTEM[i:]], params(1)).result()
        again = engine.submit(SYSTEM, params(1))
        again.result()
        assert again.usage.reuse.dropped > 0 and again.usage.cached_tokens < 256


def test_answers_that_outgrow_memory_take_turns_and_do_not_change(model: HashModel) -> None:
    prompts = [[2 + i, *SYSTEM] for i in range(4)]
    free = params(300, stop_token_ids=())
    with Engine(model) as engine:
        expected = [engine.submit(p, free).result() for p in prompts]
    with Engine(model, memory_bytes=14 << 10) as engine:
        group = [engine.submit(p, free) for p in prompts]
        assert [g.result() for g in group] == expected


def test_what_could_never_fit_is_refused_and_a_long_answer_cut(model: HashModel) -> None:
    with Engine(model, memory_bytes=4 << 10) as engine:
        assert engine.context_length == 3 * 128
        with pytest.raises(ContextLengthError, match="384 tokens"):
            engine.submit(SYSTEM * 2)
        cut = engine.submit(SYSTEM, params(500, stop_token_ids=()))
        assert len(cut.result()) == 84 and cut.finish_reason == "length"
    with pytest.raises(ConfigError, match="memory"):
        Engine(model, memory_bytes=1 << 10)


def test_a_higher_priority_goes_first(model: HashModel) -> None:
    go = threading.Event()
    model.before_step = lambda ids: go.wait(10) and None
    with Engine(model, max_running=1) as engine:
        first = engine.submit([2, 3], params(3, stop_token_ids=()))
        wait_for(lambda: len(model.passes) == 1)
        humble = engine.submit([4, 5], params(3, stop_token_ids=()))
        urgent = engine.submit([6, 7], params(3, stop_token_ids=()), priority=1)
        go.set()
        first.result(), humble.result(), urgent.result()
    order = [ids for ids in model.fed if ids in ([4, 5], [6, 7])]
    assert order == [[6, 7], [4, 5]]


def test_a_written_over_block_is_found_when_idle(engine: Engine, model: HashModel) -> None:
    answer = engine.submit(SYSTEM, params(4)).result()
    wait_for(lambda: all(node.checksum is not None for node in blocks_of(engine)))
    assert engine.stats().cuts > 2
    blocks_of(engine)[0].block.tokens[5] += 1
    engine.submit([6], params(1)).result()
    wait_for(lambda: engine.stats().cuts <= 1)
    assert engine.submit(SYSTEM, params(4)).result() == answer


def blocks_of(engine: Engine) -> list[Any]:
    return [node for node in engine._cache._nodes() if node.block is not None]


def test_a_real_model_answers_as_it_does_without_an_engine() -> None:
    """Chunks, neighbours, forks and rewinds of real attention state change no token."""
    model = tiny_model(small_tokenizer())
    long = [(7 * i) % 300 + 20 for i in range(260)]
    prompts = [long[:n] for n in (3, 130, 260, 259)]
    expected = [model.generate(p, params(6, seed=i)) for i, p in enumerate(prompts)]
    with Engine(model, step_tokens=100) as engine:
        for _ in range(2):
            together = [engine.submit(p, params(6, seed=i)) for i, p in enumerate(prompts)]
            assert [g.result() for g in together] == expected
        assert [g.usage.cached_tokens for g in together] == [2, 129, 259, 258]


# ---------------------------------------------------------------------- limits, ends, failures


def test_a_prompt_that_leaves_no_room_is_refused_before_any_work(model: HashModel) -> None:
    with Engine(model, context_length=10) as engine:
        with pytest.raises(ContextLengthError) as refused:
            engine.submit(list(range(2, 12)), params(5))
        assert str(refused.value) == (
            "This model's maximum context length is 10 tokens. However, you requested 15 tokens "
            "(10 in the messages, 5 in the completion). Please reduce the length of the messages "
            "or completion."
        )
        assert model.fed == []
        cut = engine.submit(list(range(2, 9)), SamplingParams(stop_token_ids=()))
        assert len(cut.result()) == 3 and cut.finish_reason == "length"


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1]])
def test_impossible_prompts_are_refused(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(RequestError):
        engine.submit(prompt)


def test_a_full_line_is_refused_and_a_free_one_is_not(model: HashModel) -> None:
    go = threading.Event()
    model.before_step = lambda ids: go.wait(10) and None
    with Engine(model, max_running=1, max_waiting=2) as engine:
        first = engine.submit([2], params(2))
        wait_for(lambda: engine.stats().running == 1)
        waiting = [engine.submit([3], params(2)) for _ in range(2)]
        with pytest.raises(EngineBusyError, match="too many requests"):
            engine.submit([4])
        waiting[0].cancel()
        go.set()
        assert len(first.result()) == 2 and len(waiting[1].result()) == 2
        assert waiting[0].result() == [] and waiting[0].finish_reason == "cancelled"


def test_cancel_ends_soon_and_frees_the_place(engine: Engine) -> None:
    generation = engine.submit([2, 3], SamplingParams(seed=1, stop_token_ids=()))
    tokens = iter(generation)
    for _ in range(5):
        next(tokens)
    generation.cancel()
    rest = list(tokens)
    assert generation.finish_reason == "cancelled"
    assert generation.usage.completion_tokens == len(rest) + 5 < 5000
    wait_for(lambda: engine.stats()[:2] == (0, 0))


def test_a_failing_step_fails_that_request_only(engine: Engine, model: HashModel) -> None:
    def fail(ids: Sequence[int]) -> None:
        if 63 in ids:
            raise RuntimeError("a broken kernel")

    model.before_step = fail
    healthy = engine.submit([2, 3], params(50))
    broken = engine.submit([63], params(5))
    with pytest.raises(RuntimeError, match="broken kernel"):
        broken.result()
    assert broken.finish_reason == "error"
    assert healthy.result() and healthy.finish_reason in ("stop", "length")
    assert engine.submit([4], params(3)).result()

    async def read() -> None:
        async for _ in engine.submit([63], params(5)):
            pass

    with pytest.raises(RuntimeError, match="broken kernel"):
        asyncio.run(read())


def test_a_program_may_end_without_closing() -> None:
    program = """
import dsv4
from dsv4.engine import Engine, SamplingParams
params = SamplingParams(max_tokens=100_000, stop_token_ids=())
tokens = iter(Engine(dsv4.load("v4-nano")).submit([3, 4, 5], params))
print([next(tokens).id for _ in range(9)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count(",") == 8


def test_close_cancels_what_is_unfinished_and_can_be_repeated(model: HashModel) -> None:
    engine = Engine(model, max_running=1)
    running = engine.submit([2], SamplingParams(stop_token_ids=()))
    waiting = engine.submit([3])
    next(iter(running))
    engine.close()
    engine.close()
    for generation in (running, waiting):
        generation.result()
        assert generation.finish_reason == "cancelled"
    with pytest.raises(EngineClosedError):
        engine.submit([4])
    assert not any(t.name == "dsv4-engine" and t.is_alive() for t in threading.enumerate())


def test_an_idle_engine_uses_no_processor(engine: Engine) -> None:
    engine.submit([2], params(2)).result()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_usage_times_come_from_the_given_clock(model: HashModel) -> None:
    ticks = iter(range(1000))
    with Engine(model, clock=lambda: float(next(ticks))) as engine:
        generation = engine.submit([2, 3], params(3))
        generation.result()
    usage = generation.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 3)
    assert (usage.queue_time, usage.prefill_time, usage.decode_time) == (1, 1, 1)


# ---------------------------------------------------------------------- structure


def imports_of(folder: str) -> dict[str, set[str]]:
    """Module of dsv4 -> the modules it imports, by absolute name; type-only imports left out."""
    root = Path(dsv4.__file__).parent
    found: dict[str, set[str]] = {}
    for file in (root / folder).rglob("*.py"):
        package = ["dsv4", *file.parent.relative_to(root).parts]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
            for node in ast.walk(block)
        }
        names = found.setdefault(str(file.relative_to(root)), set())
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("engine", {"dsv4.encoding", "dsv4.tokenizer", "dsv4.api", "dsv4.server", "dsv4.cli"}),
        ("server", {"torch", "dsv4.model", "dsv4.kernels", "dsv4.train", "dsv4.cli"}),
    ],
)
def test_arrows_point_down(folder: str, forbidden: set[str]) -> None:
    """The engine never sees text, the server never sees tensors."""
    modules = imports_of(folder)
    assert len(modules) >= 3
    for module, names in modules.items():
        bad = {n for n in names if any(n == f or n.startswith(f + ".") for f in forbidden)}
        assert not bad, f"{module} imports {bad}"
