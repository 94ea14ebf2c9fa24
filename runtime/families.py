"""The predictors that `coldstream profile` asks: sketches, published ones, and exact ones as bounds.

Each is a `predictivity.Family`: how one layer's predictor is made, what it costs in memory, how it scores. Knows one
layer's weights and statistics at a time; what the scores are compared with is in `predictivity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.activation import activation
from runtime.ffn import DenseFFN
from runtime.kernels import Kernels
from runtime.kernels.sketch import dequantise_rows, make_sketch
from runtime.layers import FFNWeights
from runtime.lowrank import make_low_rank, train_two_layer
from runtime.predictivity import SOURCES, Candidate, Family, LayerSample
from runtime.sketches import InputStatistics, LayerPredictor, make_group_sketch, make_plane_sketch

PLANE_BITS = (1.0, 1.5, 2.0)
ROUNDED_BITS = (1, 2, 3)  # 4: Sketch4, which has a kernel
RANK = 128  # of the low-rank predictors, at most a quarter of the hidden size
TRAINED_TOKENS = 4096  # of the calibration text, for the trained predictor
_OWN = ("input",)
_BY_SOURCE = frozenset({"source"})


@dataclass(frozen=True, slots=True)
class Exact:
    """The true weights: an oracle on its own input, the limit of lookahead on another."""

    name: str = "exact"
    sources: tuple[str, ...] = SOURCES
    carried: bool = False
    fitted_to: frozenset[str] = frozenset()

    def fit(self, sample: LayerSample, source: str, cett: int) -> Candidate:
        w, norm = sample.weights, sample.weights.down.norm(dim=1)
        dense = DenseFFN(sample.act, w.gate, w.up, w.down)
        num = sum(4 * v.numel() for v in (w.gate, w.up) if v is not None)
        return Candidate(num, lambda x: dense.neurons(x).abs() * norm)


@dataclass(frozen=True, slots=True)
class GateFirst:
    """The gate (up, where there is none) as it is; up is taken to be as large as it is on average."""

    name: str = "gate"
    sources: tuple[str, ...] = SOURCES
    carried: bool = True
    fitted_to: frozenset[str] = frozenset()

    def fit(self, sample: LayerSample, source: str, cett: int) -> Candidate:
        w, act = sample.weights, activation(sample.act)
        gate = w.up if w.gate is None else w.gate
        size = w.down.norm(dim=1)
        if w.gate is not None:
            size = size * (sample.inputs["input"] @ w.up.T).abs().mean(dim=0)
        return Candidate(2 * gate.numel(), lambda x: act(x @ gate.T).abs() * size)


@dataclass(frozen=True, slots=True)
class Sketch4:
    """4 bits a weight of gate and up, a scale a row."""

    kernels: Kernels
    name: str = "sketch4"
    sources: tuple[str, ...] = SOURCES
    carried: bool = True
    fitted_to: frozenset[str] = frozenset()

    def fit(self, sample: LayerSample, source: str, cett: int) -> Candidate:
        w = sample.weights
        sketch = make_sketch(None if w.gate is None else w.gate.numpy(), w.up.numpy(), w.down.numpy())
        gate = (
            None
            if sketch.gate_codes is None or sketch.gate_scale is None
            else torch.from_numpy(dequantise_rows(sketch.gate_codes, sketch.gate_scale, sketch.hidden_size))
        )
        up = torch.from_numpy(dequantise_rows(sketch.up_codes, sketch.up_scale, sketch.hidden_size))
        many = DenseFFN(sample.act, gate, up, w.down)  # a GEMM of the same numbers
        norm = torch.from_numpy(sketch.down_norm)

        def decode(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(x.shape[0], norm.numel())
            self.kernels.sketch_scores(x.contiguous().numpy(), sketch, sample.act, out.numpy())
            return out

        return Candidate(sketch.num_bytes, lambda x: many.neurons(x).abs() * norm, decode)


Make = Callable[[LayerSample, str, int], LayerPredictor]


@dataclass(frozen=True, slots=True)
class Made:
    """Any `LayerPredictor`, from a function that makes one."""

    name: str
    make: Make
    sources: tuple[str, ...] = SOURCES
    carried: bool = True
    fitted_to: frozenset[str] = frozenset()

    def fit(self, sample: LayerSample, source: str, cett: int) -> Candidate:
        predictor = self.make(sample, source, cett)
        return Candidate(predictor.num_bytes, lambda x: torch.from_numpy(predictor.predict(x.numpy())))


@dataclass(frozen=True, slots=True)
class Planes:
    """`sketches.make_plane_sketch` at so many bits a weight, its statistics those of the source."""

    kernels: Kernels
    bits: float
    sources: tuple[str, ...] = SOURCES
    carried: bool = True
    fitted_to: frozenset[str] = _BY_SOURCE

    @property
    def name(self) -> str:
        return f"planes {self.bits:g}"

    def fit(self, sample: LayerSample, source: str, cett: int) -> Candidate:
        sketch = make_plane_sketch(sample.act, *_arrays(sample.weights), _statistics(sample, source), self.bits)

        def decode(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(x.shape[0], sketch.num_neurons)
            self.kernels.plane_scores(x.contiguous().numpy(), sketch, out.numpy())
            return out

        return Candidate(sketch.num_bytes, lambda x: torch.from_numpy(sketch.predict(x.numpy())), decode)


def rounded_rows(bits: int, sources: tuple[str, ...] = SOURCES) -> Made:
    """Plain rounding with a scale a row."""
    return Made(f"rows {bits}", lambda m, _, __: make_group_sketch(m.act, *_arrays(m.weights), bits), sources)


def svd(sources: tuple[str, ...] = SOURCES) -> Made:
    return Made("svd", lambda m, _, __: make_low_rank(m.act, *_arrays(m.weights), _rank(m)), sources)


def aware_svd(sources: tuple[str, ...] = SOURCES) -> Made:
    """The SVD in the metric of the source's inputs."""

    def make(sample: LayerSample, source: str, cett: int) -> LayerPredictor:
        return make_low_rank(sample.act, *_arrays(sample.weights), _rank(sample), _statistics(sample, source))

    return Made("aware svd", make, sources, fitted_to=_BY_SOURCE)


def deja_vu(sources: tuple[str, ...] = SOURCES) -> Made:
    """The trained two-layer predictor, its labels the true sets at the CETT it is judged at."""

    def make(sample: LayerSample, source: str, cett: int) -> LayerPredictor:
        num = sample.inputs[source].shape[0]
        rows = torch.linspace(0, num - 1, min(num, TRAINED_TOKENS)).long()
        with torch.inference_mode(mode=False):
            x, active = (t[rows].numpy().copy() for t in (sample.inputs[source], sample.active[cett]))
            return train_two_layer(x, active, _rank(sample))

    return Made("deja vu", make, sources, fitted_to=frozenset({"source", "cett"}))


def all_families(kernels: Kernels) -> list[Family]:
    """What a full profile asks, each from all three inputs."""
    made: list[Family] = [Exact(), GateFirst(), Sketch4(kernels)]
    made += [rounded_rows(bits) for bits in ROUNDED_BITS]
    made += [Planes(kernels, bits) for bits in PLANE_BITS]
    return [*made, svd(), aware_svd(), deja_vu()]


def quick_families(kernels: Kernels) -> list[Family]:
    """The same kinds, one of each; lookahead with the exact weights and one sketch alone."""
    made: list[Family] = [Exact(), GateFirst(sources=_OWN), Sketch4(kernels, sources=_OWN)]
    return [*made, Planes(kernels, PLANE_BITS[2]), aware_svd(_OWN), deja_vu(_OWN)]


def _arrays(w: FFNWeights) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    return None if w.gate is None else w.gate.numpy(), w.up.numpy(), w.down.numpy()


def _statistics(sample: LayerSample, source: str) -> InputStatistics:
    return InputStatistics.of(sample.inputs[source].numpy())


def _rank(sample: LayerSample) -> int:
    return min(RANK, sample.weights.up.shape[1] // 4)
