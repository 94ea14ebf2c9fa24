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

from runtime.activation import activation
from runtime.calibrate import LayerTail
from runtime.ffn import DenseFFN
from runtime.kernels import Kernels
from runtime.kernels.sketch import dequantise_rows, make_sketch
from runtime.layers import FFNWeights

BUDGETS = (1.0, 1.2, 1.5, 2.0)
SOURCES = ("input", "residual", "ahead")
_FEW_ROWS = 16  # up to here the kernel of decode, above it a GEMM of the same numbers
_TIMED = 7

Score = Callable[[torch.Tensor], torch.Tensor]  # inputs fp32 [N, D] -> predicted magnitudes fp32 [N, F]


@dataclass(frozen=True, slots=True)
class LayerSample:
    """What a predictor may be made from: one layer's weights, and what it saw on the calibration text."""

    layer: int
    act: str
    weights: FFNWeights
    inputs: dict[str, torch.Tensor]  # by source, fp32 [N, D]
    h: torch.Tensor  # fp32 [N, F], what each neuron multiplies its down vector with


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layer's predictor. num_bytes: all that must be in memory for it. Only the order of scores counts here."""

    name: str
    num_bytes: int
    score: Score


class Family(Protocol):
    """One kind of predictor for all layers. `source`: which input it reads (the FFN's own `input`; the `residual`
    before the layer's attention; the residual one layer `ahead`, at the FFN before; the latter two through this layer's
    norm). `carried`: whether perplexity is measured with it (own input only)."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def carried(self) -> bool: ...

    def fit(self, sample: LayerSample) -> Candidate: ...


@dataclass(frozen=True, slots=True)
class Exact:
    """The true weights: an oracle on its own input, the limit of lookahead on another."""

    name: str
    source: str
    carried: bool = False

    def fit(self, sample: LayerSample) -> Candidate:
        w, norm = sample.weights, sample.weights.down.norm(dim=1)
        dense = DenseFFN(sample.act, w.gate, w.up, w.down)
        num = sum(4 * v.numel() for v in (w.gate, w.up) if v is not None)
        return Candidate(self.name, num, lambda x: dense.neurons(x).abs() * norm)


@dataclass(frozen=True, slots=True)
class GateFirst:
    """The gate (up, where there is none) as it is; up is taken to be as large as it is on average."""

    name: str = "gate"
    source: str = "input"
    carried: bool = False

    def fit(self, sample: LayerSample) -> Candidate:
        w, act = sample.weights, activation(sample.act)
        gate = w.up if w.gate is None else w.gate
        size = w.down.norm(dim=1)
        if w.gate is not None:
            size = size * (sample.inputs["input"] @ w.up.T).abs().mean(dim=0)
        return Candidate(self.name, 2 * gate.numel(), lambda x: act(x @ gate.T).abs() * size)


@dataclass(frozen=True, slots=True)
class Sketch4:
    """The runtime's 4-bit sketch of gate and up."""

    kernels: Kernels
    name: str = "sketch4"
    source: str = "input"
    carried: bool = True

    def fit(self, sample: LayerSample) -> Candidate:
        w = sample.weights
        sketch = make_sketch(None if w.gate is None else w.gate.numpy(), w.up.numpy(), w.down.numpy())
        gate = (
            None
            if sketch.gate_codes is None or sketch.gate_scale is None
            else torch.from_numpy(dequantise_rows(sketch.gate_codes, sketch.gate_scale, sketch.hidden_size))
        )
        up = torch.from_numpy(dequantise_rows(sketch.up_codes, sketch.up_scale, sketch.hidden_size))
        many = DenseFFN(sample.act, gate, up, w.down)
        norm = torch.from_numpy(sketch.down_norm)

        def score(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > _FEW_ROWS:
                return many.neurons(x).abs() * norm
            out = torch.empty(x.shape[0], norm.numel())
            self.kernels.sketch_scores(x.contiguous().numpy(), sketch, sample.act, out.numpy())
            return out

        return Candidate(self.name, sketch.num_bytes, score)


def default_families(kernels: Kernels) -> list[Family]:
    """What is always measured: the shipped sketch, the gate alone, and exact weights on earlier inputs."""
    return [
        Sketch4(kernels),
        GateFirst(),
        Exact("exact from the residual", "residual"),
        Exact("exact one layer ahead", "ahead"),
    ]


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
    """bool [N, F]: each row's ceil(budget * size) highest scores; size int64 [N]."""
    return _taken(scores.argsort(dim=1, descending=True, stable=True), size, budget)


def _taken(order: torch.Tensor, size: torch.Tensor, budget: float) -> torch.Tensor:
    num = (size * budget - 1e-9).ceil().long()
    first = torch.arange(order.shape[1])[None, :] < num[:, None]
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
