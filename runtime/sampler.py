"""From logits to a token: one `Sampler` a request, with its own random stream and its own counts.

Knows token ids and numbers, not text, and nothing of other requests: a row is sampled alone, so that the choice never
depends on batch mates. Shapes: V vocabulary, N rows, C candidates that are left after filtering.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from runtime.constraint import Constraint, ConstraintCompiler
from runtime.request import SamplingParams, TokenLogprob

_HEAD = 1024  # candidates that nearly always hold the whole nucleus; a sort of the vocabulary takes milliseconds


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
        self._counts = torch.zeros(vocab_size) if counted else None  # [V]

    def sample(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token of fp32 logits [V] (not changed), and its log-probability when the request asked for it.

        Log-probabilities are of the raw logits, before penalties and temperature. ValueError when a logit is NaN or
        +inf, SchemaError when the request's schema cannot be held.
        """
        constraint = self._compiled()
        adjusted = self._adjust(logits)
        if constraint is not None:
            adjusted = adjusted.masked_fill(~constraint.allowed(), -torch.inf)
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

    def _choose(self, logits: torch.Tensor) -> int:
        best = logits.max()
        if not torch.isfinite(best):
            raise ValueError("the model gave logits that are not numbers")
        if self._params.temperature == 0.0:
            return int(logits.argmax())
        scaled = (logits - best) / self._params.temperature  # the difference first, so that nothing overflows
        probs, ids = filter_candidates(scaled, self._params.top_k, self._params.top_p, self._params.min_p)
        index = self._draw(probs)
        return index if ids is None else int(ids[index])

    def _draw(self, probs: torch.Tensor) -> int:
        """An index of probs [C] by inverting the cumulative sum at one uniform number."""
        cumulative = probs.double().cumsum(0)
        at = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, at, right=True))  # right: never an index of probability 0
        return min(index, probs.numel() - 1)

    def _adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Penalties and bias on a copy, or the logits themselves where there are none."""
        p = self._params
        if self._seen is not None:
            penalised = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits = logits - p.presence_penalty * (self._counts > 0) - p.frequency_penalty * self._counts
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        return logits

    def _count(self, token_id: int) -> None:
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1


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
        probs = torch.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs, ids


def _nucleus(probs: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of probs [V] whose sum reaches top_p, likeliest first, and their indices. Sorts all if it must."""
    kept, order = torch.topk(probs, min(_HEAD, probs.numel()))
    if kept.numel() < probs.numel() and kept.double().sum() < top_p:
        kept, order = torch.sort(probs, descending=True, stable=True)
    before = kept.double().cumsum(0) - kept
    num = max(1, int((before < top_p).sum()))
    return kept[:num], order[:num]


def score_rows(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability of target n under row n of fp32 logits [N, V], with the `num_top` likeliest tokens of the row."""
    log_sum = torch.logsumexp(logits, dim=-1)  # [N]
    chosen = logits.gather(1, torch.tensor(targets, dtype=torch.int64)[:, None])[:, 0] - log_sum
    top = torch.topk(logits, min(num_top, logits.shape[1]), dim=-1)
    tops = zip(top.indices.tolist(), (top.values - log_sum[:, None]).tolist(), strict=True)
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


def _bias(params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not params.logit_bias:
        return None
    ids, values = zip(*params.logit_bias.items(), strict=True)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)


def _seen(token_ids: Iterable[int], vocab_size: int) -> torch.Tensor:
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    seen[torch.tensor(list(token_ids), dtype=torch.int64)] = True
    return seen
