"""How well a layer's active set can be known beforehand: predictors at equal and at larger budgets than the set.

Knows scores and one layer at a time; how a predictor is made is in its own module. A predictor's budget for a token is
a multiple of that token's true active set, so that predictors are compared at equal cost (after the second question of
ReLU² Wins, arXiv 2402.03804). Shapes: N tokens, D hidden, F neurons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from runtime.calibrate import LayerTail
from runtime.layers import FFNWeights

BUDGETS = (1.0, 1.2, 1.5, 2.0)
SOURCES = ("input", "residual", "ahead")
_TIMED = 7

Score = Callable[[torch.Tensor], torch.Tensor]  # inputs fp32 [N, D] -> predicted magnitudes fp32 [N, F]


@dataclass(frozen=True, slots=True)
class LayerSample:
    """What a predictor may be made from: one layer's weights, and what it saw on the calibration text."""

    layer: int
    act: str
    weights: FFNWeights
    inputs: dict[str, torch.Tensor]  # by source, fp32 [N, D]
    active: tuple[torch.Tensor, ...]  # the true sets at each CETT that is looked at, bool [N, F]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layer's predictor. num_bytes: all that must be in memory for it. Only the order of scores counts here.

    decode: how one row is scored at run time, where that is another way than `score`.
    """

    num_bytes: int
    score: Score
    decode: Score | None = None


class Family(Protocol):
    """One kind of predictor for all layers.

    sources: the inputs that it is asked with (the FFN's own `input`; the `residual` before the layer's attention; the
    residual one layer `ahead`, at the FFN before; the latter two through this layer's norm). carried: whether
    perplexity is measured with it, on its own input. fitted_to: which of "source" and "cett" it has to be made anew
    for. fit: one layer's; cett is a place in `sample.active`.
    """

    @property
    def name(self) -> str: ...

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def carried(self) -> bool: ...

    @property
    def fitted_to(self) -> frozenset[str]: ...

    def fit(self, sample: LayerSample, source: str, cett: int) -> Candidate: ...


class Fitted:
    """One layer's predictors of one family, each made once."""

    def __init__(self, family: Family, sample: LayerSample) -> None:
        self._family, self._sample = family, sample
        self._made: dict[tuple[str | None, int | None], Candidate] = {}

    def of(self, source: str, cett: int) -> Candidate:
        key = (
            source if "source" in self._family.fitted_to else None,
            cett if "cett" in self._family.fitted_to else None,
        )
        if key not in self._made:
            self._made[key] = self._family.fit(self._sample, source, cett)
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Hit:
    """One predictor, one layer, one budget. energy: share of the sum of ||n_i||² that is kept."""

    budget: float
    recall: float
    precision: float
    energy: float
    cett: float


def predictivity(tail: LayerTail, active: torch.Tensor, scores: torch.Tensor, budgets: Sequence[float]) -> list[Hit]:
    """Figures of a predictor's scores fp32 [N, F] against the true sets, bool [N, F], one for each budget."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    size = active.sum(dim=1)  # [N]
    return [_judge(tail, active, _taken(order, size, b), b) for b in budgets]


def top_scores(scores: torch.Tensor, size: torch.Tensor, budget: float) -> torch.Tensor:
    """bool [N, F]: each row's ceil(budget * size) highest scores; size int64 [N]. Of equals, any."""
    most = min(scores.shape[1], int(_num_taken(size, budget).max()))
    first = torch.arange(most)[None, :] < _num_taken(size, budget)[:, None]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(most, dim=1).indices, first)


def _num_taken(size: torch.Tensor, budget: float) -> torch.Tensor:
    return (size * budget - 1e-9).ceil().long()


def _taken(order: torch.Tensor, size: torch.Tensor, budget: float) -> torch.Tensor:
    first = torch.arange(order.shape[1])[None, :] < _num_taken(size, budget)[:, None]
    return torch.zeros_like(first).scatter_(1, order, first)


def _judge(tail: LayerTail, active: torch.Tensor, taken: torch.Tensor, budget: float) -> Hit:
    both = float((active & taken).sum())
    energy = tail.magnitude.square()
    return Hit(
        budget=budget,
        recall=both / max(1.0, float(active.sum())),
        precision=both / max(1.0, float(taken.sum())),
        energy=float((energy * taken).sum() / energy.sum().clamp_min(1e-30)),
        cett=tail.cett(taken),
    )


def decode_microseconds(score: Score, x: torch.Tensor) -> float:
    """Median time of scoring one row x [1, D]."""
    score(x)
    times = []
    for _ in range(_TIMED):
        begin = time.perf_counter()
        score(x)
        times.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(times))


def mean_hits(layers: Sequence[Sequence[Hit]]) -> list[dict[str, Any]]:
    """Means over layers, a row a budget."""
    rows = []
    for hits in zip(*layers, strict=True):
        names = asdict(hits[0]).keys()
        rows.append({name: float(np.mean([getattr(h, name) for h in hits])) for name in names})
    return rows
