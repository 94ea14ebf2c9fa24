"""Sparsity against performance: what a likelihood loses, and the CETT that costs 1 %.

Pure functions on arrays; knows neither layers nor files. CETT as in ReLU² Wins (arXiv 2402.03804), CETT-PPL-p% as in
Sparsing Law (arXiv 2411.02335). Shapes: N tokens, F neurons, V vocabulary, C targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CETT_TARGETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
_BLOCKS = 32  # groups of neighbouring tokens for a standard error: neighbours are not independent


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model says of each scored token, float64 and bool [N]; kl and same_top are empty where nobody asked."""

    nll: np.ndarray  # negative log-likelihood of the token that came
    kl: np.ndarray  # KL(dense || this one) of the whole distribution
    same_top: np.ndarray  # whether the likeliest token is dense's

    @classmethod
    def empty(cls, num: int, brief: bool) -> Likelihood:
        """For `num` tokens, to be filled; brief: nll alone."""
        other = 0 if brief else num
        return cls(np.full(num, np.nan), np.full(other, np.nan), np.zeros(other, bool))

    def put(self, at: int, part: Likelihood) -> None:
        """Copies the figures of neighbouring tokens, the first of them being number `at`."""
        for name in ("nll", "kl", "same_top"):
            values = getattr(part, name)
            getattr(self, name)[at : at + values.size] = values


def likelihood(logits: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> Likelihood:
    """logits fp32 [N, V]; dense: dense's log-probabilities, fp32 [N, V], None: nll alone; targets int64 [N]."""
    if dense is None:
        alone = F.cross_entropy(logits, targets, reduction="none").double().numpy()
        return Likelihood(alone, np.empty(0), np.empty(0, bool))
    log_p = F.log_softmax(logits, dim=1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    kl = (dense.exp() * (dense - log_p)).sum(dim=1)
    same = log_p.argmax(dim=1) == dense.argmax(dim=1)
    return Likelihood(nll.double().numpy(), kl.double().numpy(), same.numpy())


def compare(dense: np.ndarray, found: Likelihood) -> dict[str, float]:
    """Perplexity beside dense's nll [N] of the same tokens, paired; the increase's standard error is over blocks."""
    base, value = math.exp(dense.mean()), math.exp(found.nll.mean())
    row = {
        "perplexity": value,
        "increase_percent": 100 * (value / base - 1),
        "increase_standard_error_percent": 100 * value / base * block_error(found.nll - dense),
    }
    if found.kl.size:
        row |= {"kl": float(found.kl.mean()), "same_top1": float(found.same_top.mean())}
    return row


def block_error(values: np.ndarray) -> float:
    """Standard error of a mean over neighbouring tokens; nan for a single one."""
    means = [block.mean() for block in np.array_split(values, min(_BLOCKS, values.size))]
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def cett_at_increase(cetts: Sequence[float], increases: Sequence[float], percent: float = 1.0) -> float:
    """The CETT (ascending) at which perplexity rises by `percent`: by interpolation, on logarithms where both are
    positive; CETT 0 rises by 0. The last target when none rises so much."""
    left = (0.0, 0.0)
    for cett, increase in zip(cetts, increases, strict=True):
        if increase > percent:
            return _crossing(left, (cett, increase), percent)
        left = (cett, increase)
    return left[0]


def _crossing(left: tuple[float, float], right: tuple[float, float], percent: float) -> float:
    (c0, y0), (c1, y1) = left, right
    if c0 > 0 and y0 > 0:
        share = math.log(percent / y0) / math.log(y1 / y0)
        return math.exp(math.log(c0) + share * math.log(c1 / c0))
    return c0 + (percent - y0) / (y1 - y0) * (c1 - c0)
