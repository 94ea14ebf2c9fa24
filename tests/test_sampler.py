"""The sampler against its definitions, against numbers worked out by hand, and against odds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from runtime.request import SamplingParams
from runtime.sampler import Sampler, filter_candidates, invert, score_rows

VOCAB = 8


def sampler(prompt: tuple[int, ...] = (0,), vocab_size: int = VOCAB, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, vocab_size)


def draw(s: Sampler, logits: torch.Tensor, num: int) -> list[int]:
    return [s.sample(logits)[0] for _ in range(num)]


def log_probs(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([0.1, 3.0, -2.0, 2.9, 0, 0, 0, 0])
    assert draw(sampler(temperature=0.0), logits, 3) == [1, 1, 1]


def test_same_seed_same_tokens_and_other_seeds_differ() -> None:
    logits = torch.randn(20, 512, generator=torch.Generator().manual_seed(1))

    def run(seed: int | None) -> list[int]:
        s = sampler(vocab_size=512, seed=seed)
        return [s.sample(row)[0] for row in logits]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)
    assert run(-1) == run(2**64 - 1)  # any 64-bit number is a seed


def test_logits_are_not_changed() -> None:
    logits = torch.randn(VOCAB)
    before = logits.clone()
    s = sampler(
        repetition_penalty=1.5, presence_penalty=1, frequency_penalty=1, logit_bias={1: 5.0}, top_p=0.5, min_p=0.1
    )
    draw(s, logits, 3)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    expected = torch.softmax(probs.log() / temperature, 0)
    tokens = draw(sampler(vocab_size=4, temperature=temperature, seed=3), probs.log(), 4000)
    seen = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    error = (expected * (1 - expected) / 4000).sqrt()  # of a share of 4000 draws
    assert ((seen - expected).abs() < 4 * error).all()


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = torch.tensor([88.0, 90.0, -50.0, 0, 0, 0, 0, -math.inf])
    assert set(draw(sampler(temperature=1e-30), logits, 50)) == {1}


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 0.7}, {0, 1}),  # 0.5 is not enough, 0.75 is
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.45}, {0, 1}),  # at least 0.225
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of 0.5 0.25 0.15 renormalised: 0.56 0.28 0.17
        ({"top_p": 0.95, "min_p": 0.25}, {0, 1, 2}),
        ({"logit_bias": {0: -100.0, 3: 1.0}, "top_k": 2}, {1, 3}),
    ],
)
def test_filters_leave_what_they_should(params: dict[str, Any], left: set[int]) -> None:
    logits = log_probs(0.5, 0.25, 0.15, 0.1)
    assert set(draw(sampler(vocab_size=4, seed=1, **params), logits, 400)) == left


def test_filters_leave_all_in_order_when_off() -> None:
    logits = torch.randn(VOCAB)
    probs, ids = filter_candidates(logits, 0, 1.0, 0.0)
    assert ids is None and torch.equal(probs, torch.softmax(logits, 0))


@pytest.mark.parametrize("top_p", [0.3, 0.95])
@pytest.mark.parametrize(
    ("size", "spread"),
    [(20_000, 0.1), (20_000, 3.0), (60_000, 1.5)],
    ids=["most of the vocabulary", "a few tokens", "a head of many"],
)
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(top_p: float, size: int, spread: float) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(4)) * spread
    probs, ids = filter_candidates(logits, 0, top_p, 0.0)
    ordered, order = torch.softmax(logits, 0).sort(descending=True)
    num = int((ordered.double().cumsum(0) < top_p).sum()) + 1
    assert ids is not None and set(ids.tolist()) == set(order[:num].tolist())
    assert probs.sum().item() >= top_p and torch.equal(probs, ordered[:num])


@pytest.mark.parametrize("size", [1, 511, 512, 1300])
def test_a_drawn_index_is_where_the_cumulative_sum_passes(size: int) -> None:
    rng = np.random.default_rng(size)
    probs = rng.random(size).astype(np.float32) * (rng.random(size) < 0.3)
    probs[size // 2] = 0.5
    cumulative = np.cumsum(probs, dtype=np.float64)
    for uniform in (*rng.random(200), 0.0, float(np.nextafter(1.0, 0.0))):
        index = invert(probs, uniform)
        assert probs[index] > 0
        at, slack = uniform * cumulative[-1], 1e-12 * cumulative[-1]
        assert cumulative[index] >= at - slack and (index == 0 or cumulative[index - 1] <= at + slack)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((1000,), -math.inf)
    logits[[3, 500]] = 1.0
    assert set(draw(sampler(vocab_size=1000, seed=5), logits, 300)) == {3, 500}


def test_the_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.tensor([4.0, 3.0, 2.5, -1.0, -1.5, -9, -9, -9])
    s = sampler(prompt=(0,), temperature=0.0, repetition_penalty=2.0)
    assert draw(s, logits, 3) == [1, 2, 0]  # 4/2 < 3, then 3/2 < 2.5, then 2.5/2 < 4/2
    below = torch.tensor([-1.0, -1.5, -9, -9, -9, -9, -9, -9])
    assert draw(sampler(prompt=(0,), temperature=0.0, repetition_penalty=2.0), below, 1) == [1]  # negative: times 2


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.5, 0, 0, 0, 0, 0, 0])
    assert draw(sampler(prompt=(0, 0, 0), temperature=0.0, presence_penalty=1.0), logits, 3) == [0, 1, 0]
    # 2 | 1.6 | 1.2 < 1.5 | 1.2 > 1.1 | ...: each use of a token costs 0.4
    assert draw(sampler(prompt=(0,), temperature=0.0, frequency_penalty=0.4), logits, 5) == [0, 0, 1, 0, 1]


def test_logit_bias_moves_greedy_too() -> None:
    logits = torch.zeros(VOCAB)
    assert draw(sampler(temperature=0.0, logit_bias={5: 1.0}), logits, 1) == [5]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = log_probs(0.5, 0.25, 0.15, 0.1)
    s = sampler(vocab_size=4, temperature=0.0, logit_bias={2: 100.0}, num_logprobs=2)
    token_id, logprob = s.sample(logits)
    assert token_id == 2 and logprob is not None and logprob.token_id == 2
    assert logprob.logprob == pytest.approx(math.log(0.15), abs=1e-6)
    assert [i for i, _ in logprob.top] == [0, 1]
    assert [p for _, p in logprob.top] == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-6)
    assert sampler(vocab_size=4, temperature=0.0).sample(logits)[1] is None
    only_chosen = sampler(vocab_size=4, temperature=0.0, num_logprobs=0).sample(logits)[1]
    assert only_chosen is not None and only_chosen.top == ()


def test_score_rows_is_log_softmax() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)) * 4
    scores = score_rows(logits, [3, 39, 0, 7, 7], 3)
    expected = torch.log_softmax(logits.double(), -1)
    for row, score in enumerate(scores):
        assert score.logprob == pytest.approx(expected[row, score.token_id].item(), abs=1e-5)
        best = expected[row].topk(3)
        assert [i for i, _ in score.top] == best.indices.tolist()
        assert [p for _, p in score.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [s.token_id for s in scores] == [3, 39, 0, 7, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error(bad: float) -> None:
    logits = torch.zeros(VOCAB)
    logits[4] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not numbers"):
            sampler(temperature=temperature).sample(logits)
