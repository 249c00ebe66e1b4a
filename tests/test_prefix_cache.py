"""The prefix cache: what it finds was kept, it drops what is worth least, its books balance."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.engine.prefix import GRAIN, PrefixCache, Reuse
from dsv4.errors import DSV4Error

BLOCK, CUT = 1000, 8000  # bytes; rows are small beside cuts


@dataclass(eq=False)
class Rows:
    tokens: list[int]

    def checksum(self) -> int:
        return hash(tuple(self.tokens))


@dataclass(eq=False)
class Place:
    tokens: list[int]
    bytes: int = CUT

    @property
    def position(self) -> int:
        return len(self.tokens)


def rows_of(tokens: list[int]) -> list[Rows]:
    return [Rows(tokens[i : i + GRAIN]) for i in range(0, len(tokens), GRAIN)]


def feed(cache: PrefixCache, tokens: list[int], cuts: list[int], end: bool = True) -> Reuse:
    """What a request does that finds what it can and keeps its state at ``cuts``."""
    lease, blocks, cut, reuse = cache.find(tokens)
    if cut is None:
        assert reuse.hit == 0 and blocks == []
    else:
        assert isinstance(cut, Place) and cut.tokens == tokens[: reuse.hit]
        whole = [t for block in blocks for t in block.tokens]  # type: ignore[attr-defined]
        assert whole == tokens[: reuse.hit // GRAIN * GRAIN]
    assert reuse.hit < len(tokens)
    assert reuse.hit + reuse.between + reuse.dropped + reuse.new == len(tokens)
    assert reuse.new >= 1 and min(reuse.between, reuse.dropped) >= 0
    places = [Place(tokens[:p]) for p in sorted(cuts) if reuse.hit < p <= len(tokens)]
    cache.keep(lease, tokens, rows_of(tokens), places, {len(tokens)} if end else ())
    cache.release(lease)
    cache.check()
    return reuse


def every(tokens: list[int], step: int = GRAIN) -> list[int]:
    return [*range(step, len(tokens) + 1, step), len(tokens)]


_random = Random(4)
TEXT = [_random.randrange(9) for _ in range(6000)]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.tuples(st.integers(1, 900), st.integers(0, 900), st.integers(0, 3), st.booleans()),
        max_size=25,
    ),
    budget=st.integers(0, 30 * (BLOCK + CUT)),
)
def test_what_is_found_was_kept_and_the_books_balance(
    texts: list[tuple[int, int, int, bool]], budget: int
) -> None:
    cache = PrefixCache(budget, BLOCK)
    for length, edit, by, sparse in texts:
        tokens = TEXT[:length]
        if edit < length:
            tokens[edit] = (tokens[edit] + by) % 9
        feed(cache, tokens, [length] if sparse else every(tokens))
        assert cache.bytes <= budget
    cache.clear()
    assert (cache.bytes, cache.cuts) == (0, 0)


def test_what_running_timelines_lease_stays() -> None:
    cache = PrefixCache(10 * (BLOCK + CUT), BLOCK)
    feed(cache, TEXT[:300], every(TEXT[:300]))
    lease, blocks, cut, _ = cache.find([*TEXT[:300], 9])
    cache.clear()
    cache.check()
    assert cache.bytes == 2 * BLOCK and len(blocks) == 2 and cut is not None
    cache.release(lease)
    assert cache.bytes == 0


def test_each_miss_has_its_reason() -> None:
    cache = PrefixCache(1 << 30, BLOCK)
    assert feed(cache, TEXT[:700], [256, 700]) == Reuse(new=700)
    again = [*TEXT[:600], *[9] * 50]
    assert feed(cache, again, []) == Reuse(hit=256, between=344, new=50)
    assert feed(cache, TEXT[:701], []) == Reuse(hit=700, new=1)
    assert feed(cache, TEXT[:700], []) == Reuse(hit=256, between=443, new=1)
    cache.clear()
    assert feed(cache, TEXT[:700], []) == Reuse(dropped=640, new=60)


def test_memory_thins_old_cuts_evenly_and_keeps_ends() -> None:
    length = 40 * GRAIN
    cache = PrefixCache(40 * BLOCK + 12 * CUT, BLOCK)
    feed(cache, TEXT[:length], every(TEXT[:length]))
    kept = sorted(node.end for node in cache._nodes() if node.cut is not None)
    gaps = [b - a for a, b in zip([0, *kept], kept, strict=False)]
    assert len(kept) == 12 and kept[-1] == length
    assert max(gaps) <= 3 * length / 12
    # an edit anywhere costs at most such a gap
    for at in (1000, 3000, 5000):
        lease, _, _, reuse = cache.find([*TEXT[:at], 9, 9])
        cache.release(lease)
        assert reuse.hit + reuse.between == at and reuse.between <= max(gaps)


def test_what_was_used_last_goes_last() -> None:
    cache = PrefixCache(9 * (BLOCK + CUT), BLOCK)
    texts = [[i, *TEXT[i : i + 2 * GRAIN]] for i in range(12)]
    for text in texts:
        feed(cache, text, every(text))
        assert feed(cache, [*texts[0], 9], []).hit >= 2 * GRAIN  # in use all the time
    assert feed(cache, [*texts[-1], 9], []).hit >= 2 * GRAIN
    assert feed(cache, [*texts[1], 9], []).hit == 0


def test_a_changed_block_is_noticed() -> None:
    cache = PrefixCache(1 << 30, BLOCK)
    feed(cache, TEXT[:600], every(TEXT[:600]))
    for _ in range(3):
        cache.audit(2)
    node = next(n for n in cache._nodes() if n.end == 256)
    node.block.tokens[7] += 1  # type: ignore[union-attr]
    with pytest.raises(DSV4Error, match="token 256"):
        cache.audit(9)


def test_a_cut_before_its_lease_is_refused() -> None:
    cache = PrefixCache(1 << 30, BLOCK)
    feed(cache, TEXT[:300], every(TEXT[:300]))
    lease, *_ = cache.find(TEXT[:300])
    with pytest.raises(DSV4Error, match="before its lease"):
        cache.keep(lease, TEXT[:300], rows_of(TEXT[:300]), [Place(TEXT[:100])])
