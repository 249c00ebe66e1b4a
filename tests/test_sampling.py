"""Sampling: exact filters, and randomness that depends on seed and position only."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from dsv4.engine.sample import (
    UNLIKELY,
    SamplingParams,
    _likeliest,
    logprob,
    sample,
    uniform,
)
from dsv4.errors import DSV4Error, RequestError

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.1])


def draw(logits: torch.Tensor, params: SamplingParams, n: int) -> Counter[int]:
    return Counter(sample(logits, params, position) for position in range(n))


def test_temperature_zero_takes_the_largest_and_the_lowest_id_on_ties() -> None:
    greedy = SamplingParams(temperature=0)
    assert sample(torch.tensor([1.0, 3.0, 2.0]), greedy, 0) == 1
    assert sample(torch.tensor([1.0, 3.0, 3.0, 3.0]), greedy, 7) == 1
    wide = torch.zeros(129280)
    wide[70000:] = 5
    assert sample(wide, greedy, 0) == 70000
    assert sample(wide.bfloat16(), greedy, 0) == 70000


def test_the_number_drawn_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    one, other = SamplingParams(seed=1), SamplingParams(seed=2)
    forward = [sample(logits, one, p) for p in range(50)]
    torch.manual_seed(123)  # the global generator is not involved
    backward = [sample(logits, one, p) for p in reversed(range(50))][::-1]
    assert forward == backward
    assert forward != [sample(logits, other, p) for p in range(50)]
    assert len(set(forward)) > 10


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for numbers in (
        [uniform(5, p) for p in range(20000)],
        [uniform(s, 5) for s in range(20000)],
        [uniform(-s, 5) for s in range(20000)],
    ):
        assert min(numbers) >= 0 and max(numbers) < 1
        buckets = Counter(int(u * 10) for u in numbers)
        assert all(abs(buckets[b] - 2000) < 200 for b in range(10))  # 200 is 4.7 sigma
        pairs = sum(a < b for a, b in pairwise(numbers))
        assert abs(pairs - 10000) < 400


def test_frequencies_follow_the_probabilities() -> None:
    n = 20000
    counts = draw(PROBABILITIES.log(), SamplingParams(seed=3), n)
    for token, p in enumerate(PROBABILITIES.tolist()):
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_temperature_sharpens_and_flattens() -> None:
    logits = PROBABILITIES.log()
    cold = draw(logits, SamplingParams(seed=3, temperature=0.5), 4000)
    hot = draw(logits, SamplingParams(seed=3, temperature=2), 4000)
    assert cold[0] > 0.6 * 4000 > 0.45 * 4000 > hot[0]
    assert draw(logits, SamplingParams(seed=3, temperature=1e-9), 50) == {0: 50}
    assert draw(logits, SamplingParams(seed=3, temperature=1e-310), 50) == {0: 50}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {0}), (0.49, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    counts = draw(PROBABILITIES.log(), SamplingParams(seed=1, top_p=top_p), 3000)
    assert set(counts) == kept
    total = sum(PROBABILITIES[list(kept)].tolist())
    for token in kept:
        assert abs(counts[token] / 3000 - float(PROBABILITIES[token]) / total) < 0.05


def test_top_p_with_ties_keeps_the_lowest_ids() -> None:
    assert set(draw(torch.zeros(10), SamplingParams(seed=1, top_p=0.25), 500)) == {0, 1, 2}


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999999])
def test_top_p_agrees_with_a_full_sort(spread: float, top_p: float) -> None:
    weight = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * spread).round(
        decimals=1
    )
    weight = weight.double().exp()
    weight[100:200] = 0
    values, order = weight.sort(descending=True, stable=True)
    enough = top_p * float(weight.cumsum(0)[-1])
    kept = int((values.cumsum(0) < enough).sum()) + 1
    got, ids = _likeliest(weight.numpy(), enough)
    assert got.tolist() == values[:kept].tolist() and ids.tolist() == order[:kept].tolist()


def test_a_masked_token_is_never_chosen() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for params in (SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.999)):
        assert set(draw(logits, params, 500)) == {1, 3}


def test_a_large_vocabulary_reaches_its_last_tokens() -> None:
    chosen = draw(torch.zeros(129280), SamplingParams(seed=9), 150)
    assert max(chosen) > 120000 and min(chosen) < 9000


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_unusable_logits_are_refused(bad: float) -> None:
    logits = torch.full((4,), bad)
    for temperature in (0, 1):
        with pytest.raises(DSV4Error, match="no usable logits"):
            sample(logits, SamplingParams(temperature=temperature), 0)


def test_logprobs_are_those_of_the_model_and_never_minus_infinity() -> None:
    scores = logprob(PROBABILITIES.log(), 2, 3)
    assert scores.logprob == pytest.approx(math.log(0.15))
    assert [t for t, _ in scores.top] == [0, 1, 2]
    assert scores.top[0][1] == pytest.approx(math.log(0.5))
    assert logprob(torch.tensor([0.0, -math.inf]), 1, 0) == (UNLIKELY, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_tokens": 0},
            "Invalid max_tokens value, the valid range of max_tokens is [1, 393216]",
        ),
        ({"max_tokens": 393217}, "Invalid max_tokens value"),
        (
            {"temperature": 2.1},
            "Invalid temperature value, the valid range of temperature is [0, 2]",
        ),
        ({"temperature": math.nan}, "Invalid temperature value"),
        ({"top_p": 0}, "Invalid top_p value, the valid range of top_p is (0, 1.0]"),
        ({"top_p": 1.5}, "Invalid top_p value"),
        (
            {"logprobs": 21},
            "Invalid top_logprobs value, the valid range of top_logprobs is [0, 20]",
        ),
    ],
)
def test_values_out_of_range_are_refused_in_the_hosted_words(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_what_a_guide_forbids_is_never_chosen() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    allowed = np.array([False, True, True])  # an id beyond the array may not come either
    for params in (SamplingParams(temperature=0), SamplingParams(seed=1, temperature=2)):
        drawn = Counter(sample(logits, params, p, allowed) for p in range(200))
        assert set(drawn) == ({1} if params.temperature == 0 else {1, 2})
    with pytest.raises(DSV4Error, match="no usable logits"):
        sample(logits, SamplingParams(), 0, np.zeros(4, bool))
