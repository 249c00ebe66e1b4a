"""However a session got to its tokens, its logits are those of one full pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv4
from dsv4 import kernels
from dsv4.checkpoint import save_checkpoint
from dsv4.config import V4Config
from dsv4.engine.disk import DiskTier
from dsv4.engine.kvstate import KVState
from dsv4.engine.session import Part, Runner
from dsv4.synth import synthesize

LENGTH = 700
SHAPES = {"flash": (0, 4, 128, 4, 0), "pro": (128, 4, 128, 0)}


KINDS = [("flash", "float32"), ("pro", "float32")]
if kernels.NATIVE:  # where torch multiplies, a last bit may tip a rounding of official numerics
    KINDS = [("flash", "float32"), ("flash", "official"), ("pro", "official")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dsv4.Model:
    shape, numerics = request.param
    ratios = SHAPES[shape]
    config = V4Config(
        vocab_size=256, hidden_size=256, moe_intermediate_size=128,
        num_hidden_layers=len(ratios) - 1, num_hash_layers=1, num_attention_heads=2,
        n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=128, head_dim=128, o_groups=2,
        o_lora_rank=128, compress_ratios=ratios, index_n_heads=2, index_topk=24,
    )
    folder = tmp_path_factory.mktemp("model") / f"{shape}-{numerics}"
    save_checkpoint(folder, config, synthesize(config, seed=1))
    return dsv4.load(folder, numerics=numerics)


few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
IDS = torch.randint(256, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
_full: dict[str, torch.Tensor] = {}


def full(model: dsv4.Model) -> torch.Tensor:
    if model.name not in _full:
        _full[model.name] = model.logits(IDS)
    return _full[model.name]


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same bits; or the same to rounding where torch multiplies, in another order each time."""
    if kernels.NATIVE:
        assert torch.equal(got, wanted)
    else:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@few
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=8))
def test_any_chunking(model: dsv4.Model, cuts: list[int]) -> None:
    session, edges = model.session(), sorted({0, LENGTH, *cuts})
    pieces = [session.extend(IDS[a:b]) for a, b in pairwise(edges)]
    same(torch.cat(pieces), full(model))
    assert session.tokens == IDS and len(session) == LENGTH


def test_token_by_token_across_every_boundary(model: dsv4.Model) -> None:
    session = model.session()
    rows = torch.cat([session.extend([i]) for i in IDS[:270]])
    same(rows, full(model)[:270])


@few
@given(keeps=st.lists(st.integers(0, LENGTH), min_size=1, max_size=3))
def test_rewound_and_fed_again(model: dsv4.Model, keeps: list[int]) -> None:
    session = model.session()
    session.extend(IDS, last=True)
    for keep in keeps:
        session.rewind(keep)
        assert session.tokens == IDS[:keep]
        other = [(i + 1) % 256 for i in IDS[keep : keep + 40]]  # a detour, forgotten again
        if other:
            session.extend(other)
            session.rewind(keep)
        if keep < LENGTH:
            same(session.extend(IDS[keep:]), full(model)[keep:])


def test_rewinding_computes_at_most_127_tokens(
    model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anywhere in a prompt of 20,000 tokens; with little memory for cuts, near its end."""
    run, fed = Runner.run, list[int]()

    def counted(runner: Runner, parts: Sequence[Part]) -> list[torch.Tensor]:
        fed.extend(len(part.ids) for part in parts)
        return run(runner, parts)

    random, session = Random(2), model.session()
    session.extend([random.randrange(256) for _ in range(20_000)], last=True)
    monkeypatch.setattr(Runner, "run", counted)
    for keep in sorted((random.randrange(20_000) for _ in range(30)), reverse=True):
        fed.clear()
        session.rewind(keep)
        assert sum(fed) == keep % 128
    monkeypatch.setattr("dsv4.engine.session.DENSE_BYTES", 0)
    session.rewind(0)
    session.extend(IDS * 10, last=True)
    fed.clear()
    session.rewind(7000 - 16 * 128)
    assert sum(fed) == (7000 - 16 * 128) % 128
    session.extend(IDS * 3, last=True)
    fed.clear()
    session.rewind(1000)
    assert 127 < sum(fed) < 1000
    same(session.extend([IDS[300]])[-1:], model.session().extend((IDS * 2)[:1001], last=True))


def test_a_session_is_saved_and_restored(model: dsv4.Model, tmp_path: Path) -> None:
    session = model.session()
    session.extend(IDS[:500], last=True)
    disk = DiskTier(tmp_path, model.fingerprint(), 1 << 30)
    try:
        session.save(disk)
        disk.flush()
        other = model.session()
        assert other.restore(disk, [7, *IDS]) == 0
        assert other.restore(disk, IDS) == 500 and other.tokens == IDS[:500]
        same(other.extend(IDS[500:]), full(model)[500:])
        assert other.restore(disk, IDS) == LENGTH  # nothing longer is there
        other.rewind(130)
        same(other.extend(IDS[130:200]), full(model)[130:200])
    finally:
        disk.close()


def test_forks_do_not_touch_each_other(model: dsv4.Model) -> None:
    session = model.session()
    session.extend(IDS[:300], last=True)
    fork = session.fork()
    fork.extend([1, 2, 3])
    fork.rewind(200)
    fork.extend([7] * 150)
    same(session.extend(IDS[300:]), full(model)[300:])
    fork.rewind(200)
    same(fork.extend(IDS[200:]), full(model)[200:])


def test_last_gives_the_last_row(model: dsv4.Model) -> None:
    got = model.session().extend(IDS[:200], last=True)
    assert got.shape == (1, 256)
    same(got, full(model)[199:200])


def test_state_is_small_and_counted(model: dsv4.Model) -> None:
    session = model.session()
    session.extend(IDS, last=True)
    ratios = model.config.compress_ratios[:-1]
    rows = sum(LENGTH // r * (2 if r == 4 else 1) for r in ratios if r) * 128
    rows *= 4 if model.numerics == "float32" else 1
    assert rows * 0.5 <= session.bytes() < 40 * rows


def test_a_fork_copies_nothing_until_it_goes_on(model: dsv4.Model) -> None:
    session = model.session()
    session.extend(IDS[:300], last=True)
    fork = session.fork()
    assert blocks(fork) == blocks(session)
    fork.extend(IDS[300:310])
    session.extend(IDS[300:310])
    assert blocks(fork)[:2] == blocks(session)[:2] and blocks(fork)[2] != blocks(session)[2]
    session.rewind(280)
    assert blocks(session)[:2] == blocks(fork)[:2]


def test_a_dropped_session_is_free_at_once(model: dsv4.Model) -> None:
    session = model.session()
    session.extend(IDS)
    kept = [weakref.ref(session._state), *(weakref.ref(b.data) for b in session._state.blocks)]
    gc.disable()  # attention state must not wait for it
    try:
        del session
        assert not any(ref() for ref in kept)
    finally:
        gc.enable()


def blocks(session: dsv4.Session) -> list[int]:
    session._state.check()
    return [b.data.data_ptr() for b in session._state.blocks]


def test_every_cut_of_a_pass_is_the_state_at_that_position(model: dsv4.Model) -> None:
    runner = Runner(model._net, model._nx)
    for start, end in ((0, 300), (5, 6), (120, 390)):
        state = KVState(runner.layout)
        if start:
            runner.run([Part(state, IDS[:start], 0)])
            state.settle()
        runner.run([Part(state, IDS[start:end], 0)])
        for at in {start, start + 1, 127, 128, 129, 131, 255, 256, 257, end - 1, end} - {0}:
            if start <= at <= end:
                back = KVState.resume(runner.layout, state.blocks, state.cut(at))
                back.check()
                (rows,) = runner.run([Part(back, IDS[at : at + 30], None)])
                same(rows, full(model)[at : at + 30])


def test_timelines_that_share_passes_are_those_that_run_alone(model: dsv4.Model) -> None:
    runner = Runner(model._net, model._nx)
    states = [KVState(runner.layout) for _ in range(4)]
    rows, random = [list[torch.Tensor]() for _ in states], Random(3)
    while min(state.length for state in states) < 300:
        some = [random.choice([0, 1, 1, 7, 60, 150]) for _ in states]
        ids = [IDS[s.length : s.length + n] for s, n in zip(states, some, strict=True)]
        mine = [i for i in range(4) if ids[i]]
        done = runner.run([Part(states[i], ids[i], None) for i in mine]) if mine else []
        for i, logits in zip(mine, done, strict=True):
            rows[i].append(logits)
            states[i].settle()
            states[i].check()
    for state, out in zip(states, rows, strict=True):
        same(torch.cat(out), full(model)[: state.length])


def test_tokens_of_several_timelines_one_at_a_time(model: dsv4.Model) -> None:
    """In one native call, where there is one; what it leaves is what passes of many tokens read."""
    runner = Runner(model._net, model._nx)
    starts = [0, 1, 3, 95, 96, 130, 254]
    states = [KVState(runner.layout) for _ in starts]
    for state, start in zip(states, starts, strict=True):
        if start:
            runner.run([Part(state, IDS[:start], 0)])
            state.settle()
    forks = []
    for step in range(140):
        parts = [Part(s, IDS[s.length : s.length + 1], 1) for s in states]
        at = [state.length for state in states]
        same(torch.cat(runner.run(parts)), full(model)[at])
        for state in states:
            if step % 3:  # else a cut of the last pass may still be wanted
                state.settle()
        if step in (57, 58):
            forks += [KVState.resume(runner.layout, s.blocks, s.cut(s.length)) for s in states]
    for state in (*states, *forks):
        state.settle()
        state.check()
        (rows,) = runner.run([Part(state, IDS[state.length : state.length + 150], None)])
        same(rows, full(model)[state.length - 150 : state.length])
    assert not model._net.tapes.foreign


@pytest.mark.parametrize("bad", [[], [256], [-1]])
def test_bad_tokens_leave_the_session_alone(model: dsv4.Model, bad: list[int]) -> None:
    session = model.session()
    session.extend([1, 2, 3])
    with pytest.raises(dsv4.RequestError):
        session.extend(bad)
    with pytest.raises(dsv4.RequestError):
        session.rewind(4)
    assert session.tokens == [1, 2, 3]


def test_greedy_generation_is_the_argmax_of_full_passes(model: dsv4.Model) -> None:
    ids = IDS[:50]
    out = model.generate(ids, dsv4.SamplingParams(max_tokens=6, temperature=0, stop_token_ids=()))
    for token in out:
        assert int(model.logits(ids)[-1].argmax()) == token
        ids = [*ids, token]


def test_full_size_models_build_without_memory() -> None:
    from dsv4.model import Transformer

    net = Transformer(V4Config.preset("flash"))
    assert all(p.device.type == "meta" for p in net.parameters())
    unquantised = sum(p.numel() for n, p in net.named_parameters() if not n.endswith("tid2eid"))
    assert unquantised == V4Config.preset("flash").parameter_counts().total


def test_official_rounding_needs_whole_blocks() -> None:
    from dsv4.api import check_numerics
    from dsv4.numerics import FLOAT32, OFFICIAL

    odd = replace(V4Config.preset("nano"), hidden_size=320)
    check_numerics(FLOAT32, odd)
    with pytest.raises(dsv4.ConfigError, match="multiple of 128"):
        check_numerics(OFFICIAL, odd)


def test_a_prompt_that_fills_the_context_is_refused(
    model: dsv4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=50))
    with pytest.raises(dsv4.ContextLengthError):
        model.generate(IDS[:50])
