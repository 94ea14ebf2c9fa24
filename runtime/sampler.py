"""From logits to a token: one `Sampler` a request, with its own random stream and its own counts.

Knows token ids and numbers, not text, and nothing of other requests: a row is sampled alone, so that the choice never
depends on batch mates. Whole rows are handled in numpy: PyTorch splits so short a vector over its threads, and waits
for them longer than the work takes when other work keeps the cores busy.
Shapes: V vocabulary, N rows, C candidates that are left after filtering.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from runtime.constraint import Constraint, ConstraintCompiler
from runtime.request import SamplingParams, TokenLogprob

_COLDEST = 1e-30  # temperature in fp32: what is smaller is 0, and greedy all the same
_BLOCK = 512  # candidates that are summed up first
_QUICK, _HEAD = 16384, 1024  # candidates that are sorted as fast as the likeliest are found; so many of these


class Sampler:
    """Chooses the tokens of one request.

    Order: repetition, presence and frequency penalties, logit bias, what a JSON schema allows, temperature, top-k,
    top-p, min-p. temperature 0 takes the largest before the temperature. The repetition penalty (CTRL, arXiv
    1909.05858) looks at prompt and output, the other two at the output only. One uniform number a token is drawn from a
    generator seeded by `params.seed`: same seed and logits, same tokens. Memory: 5 KB, with penalties 5 bytes a token
    of the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        constraints: ConstraintCompiler | None = None,
    ) -> None:
        self._params = params
        self._constraints = constraints
        self._constraint: Constraint | None = None
        self._generator = _generator(params.seed)
        self._bias = _bias(params)
        self._seen = _seen(prompt_ids, vocab_size) if params.repetition_penalty != 1.0 else None  # bool [V]
        counted = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._counts = np.zeros(vocab_size, np.float32) if counted else None  # [V]

    def sample(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token of fp32 logits [V] (not changed), and its log-probability when the request asked for it.

        Log-probabilities are of the raw logits, before penalties and temperature. ValueError when a logit is NaN or
        +inf, SchemaError when the request's schema cannot be held.
        """
        constraint = self._compiled()
        adjusted = self._adjust(logits.numpy())
        if constraint is not None:
            adjusted = np.where(constraint.allowed().numpy(), adjusted, np.float32(-np.inf))
        token_id = self._choose(adjusted)
        if constraint is not None:
            constraint.advance(token_id)
        self._count(token_id)
        if self._params.num_logprobs is None:
            return token_id, None
        return token_id, score_rows(logits[None], [token_id], self._params.num_logprobs)[0]

    def _compiled(self) -> Constraint | None:
        """The schema's constraint, made at the first token: in the engine's thread, and only for requests that run."""
        if self._params.json_schema is None:
            return None
        if self._constraint is None:
            if self._constraints is None:
                raise RuntimeError("a request with a JSON schema came to an engine that has no compiler for it")
            self._constraint = self._constraints.compile(self._params.json_schema)
        return self._constraint

    def _choose(self, row: np.ndarray) -> int:
        best = row.max()
        if not np.isfinite(best):
            raise ValueError("the model gave logits that are not numbers")
        if self._params.temperature == 0.0:
            return int(row.argmax())
        with np.errstate(over="ignore"):  # the difference first, so that what overflows is below the largest
            scaled = torch.from_numpy((row - best) / np.float32(max(self._params.temperature, _COLDEST)))
        probs, ids = filter_candidates(scaled, self._params.top_k, self._params.top_p, self._params.min_p)
        index = self._draw(probs)
        return index if ids is None else int(ids[index])

    def _draw(self, probs: torch.Tensor) -> int:
        """An index of probs [C] by inverting the cumulative sum at one uniform number."""
        return invert(probs.numpy(), float(torch.rand((), dtype=torch.float64, generator=self._generator)))

    def _adjust(self, row: np.ndarray) -> np.ndarray:
        """Penalties and bias on a copy of float32 [V], or the row itself where there are none."""
        p = self._params
        if self._seen is not None:
            penalty = np.float32(p.repetition_penalty)
            row = np.where(self._seen, np.where(row > 0, row / penalty, row * penalty), row)
        if self._counts is not None:
            row = (
                row
                - np.float32(p.presence_penalty) * (self._counts > 0)
                - np.float32(p.frequency_penalty) * self._counts
            )
        if self._bias is not None:
            ids, values = self._bias
            row = row.copy()
            row[ids] += values
        return row

    def _count(self, token_id: int) -> None:
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1


def invert(probs: np.ndarray, uniform: float) -> int:
    """The index of float32 [C] at which the cumulative sum passes that share of its whole, never one of zero. In fp64,
    first by blocks: the cumulative sum of a vocabulary takes ten times as long as its sums do."""
    firsts = np.arange(0, probs.size, _BLOCK)
    blocks = np.cumsum(np.add.reduceat(probs, firsts, dtype=np.float64))
    at = min(uniform * blocks[-1], np.nextafter(blocks[-1], 0.0))
    block = int(np.searchsorted(blocks, at, side="right"))
    inside = np.cumsum(probs[firsts[block] : firsts[block] + _BLOCK], dtype=np.float64)
    rest = at - (blocks[block - 1] if block else 0.0)
    rest = min(rest, np.nextafter(inside[-1], 0.0))  # sums in another order may fall short of the block's by a rounding
    return int(firsts[block] + np.searchsorted(inside, rest, side="right"))


def filter_candidates(
    scaled: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities [C] of what top-k, then top-p, then min-p leave of logits [V], and their token ids.

    The ids are None when all V are there in order. top-k 0, top-p 1 and min-p 0 are off. top-p (arXiv 1904.09751) keeps
    the fewest tokens whose sum reaches it; min-p (arXiv 2407.01082) what has at least that share of the largest. The
    likeliest token always stays. The probabilities of what is left need not sum to 1.
    """
    ids = None
    if 0 < top_k < scaled.numel():
        scaled, ids = torch.topk(scaled, top_k)
    probs = torch.softmax(scaled, dim=0)
    if top_p < 1.0:
        probs, order = _nucleus(probs, top_p)
        ids = order if ids is None else ids[order]
    if min_p > 0.0:
        row = probs.numpy()
        probs = torch.from_numpy(np.where(row >= min_p * row.max(), row, np.float32(0)))
    return probs, ids


def _nucleus(probs: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of probs [V] whose sum reaches top_p, likeliest first, and their indices.

    All are sorted but those whose sum is too small to matter; where still many are left, the head is tried before.
    """
    row = probs.numpy()
    some = np.flatnonzero(row >= (1.0 - top_p) / row.size)  # the rest comes to less than 1 - top_p
    many = some.size > _QUICK
    if many:
        kept, order = torch.topk(probs, _HEAD)
    if not many or kept.double().sum() < top_p:
        some = some[np.argsort(-row[some])]
        kept, order = torch.from_numpy(row[some]), torch.from_numpy(some)
    before = np.cumsum(kept.numpy(), dtype=np.float64) - kept.numpy()
    num = max(1, int(np.count_nonzero(before < top_p)))
    return kept[:num], order[:num]


def score_rows(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability of target n under row n of fp32 logits [N, V], with the `num_top` likeliest tokens of the row."""
    logprobs = torch.log_softmax(logits, dim=-1)  # [N, V]: quicker than logsumexp, which needs as much for a while
    chosen = logprobs.gather(1, torch.tensor(targets, dtype=torch.int64)[:, None])[:, 0]
    top = torch.topk(logprobs, min(num_top, logits.shape[1]), dim=-1)
    tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(targets, chosen.tolist(), tops, strict=True)
    ]


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed & (2**64 - 1))
    return generator


def _bias(params: SamplingParams) -> tuple[np.ndarray, np.ndarray] | None:
    if not params.logit_bias:
        return None
    ids, values = zip(*params.logit_bias.items(), strict=True)
    return np.array(ids, np.int64), np.array(values, np.float32)


def _seen(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    seen = np.zeros(vocab_size, np.bool_)
    seen[np.fromiter(token_ids, np.int64)] = True
    return seen
