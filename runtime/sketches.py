"""Sketches of gate and up at a bit or two a weight, from which a layer's predictor guesses each neuron's output.

Knows one layer's weights and the statistics of its input; not what a score is compared with, nor what is resident.
No training: bits go to the input dimensions that matter (½ log2 of variance left times weight variance), codes are
chosen with error feedback (as GPTQ, arXiv 2210.17323, and LDLQ of QuIP, arXiv 2307.13304) and a pass of coordinate
descent, a bias a row takes up what the input's mean makes of the error, and the score is the root mean square of the
neuron's output under the error that is left, since what looks quiet to a rough sketch often is not.
Shapes: B rows, F neurons, D hidden, M planes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

MAX_BITS = 6
_GAUSS_STEP = np.array([0.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041])  # best uniform steps for a normal variable
_NODES = ((2 / 3, 0.0), (1 / 6, -math.sqrt(3.0)), (1 / 6, math.sqrt(3.0)))  # Gauss-Hermite: weight, standard deviations
_DAMPING = 0.01  # of the mean variance: what calibration saw of no variance may have some
_SHRINK = 0.2  # of the covariances: calibration's are only a sample's, and another text has others
_BLOCK = 64  # columns between two matrix products: everything else of feedback and descent is a rank-1 update
_GATE_SHARE = 0.6  # of the bits of gate and up: act squares gate's errors; 0.5 to 0.67 measure alike
_ROW_BYTES = 2  # rows of codes are padded to 16 planes, a mask register's half


class LayerPredictor(Protocol):
    """One layer's predictor. predict(x fp32 [B, D]) -> fp32 [B, F]: predicted output magnitude ||n_i||, +inf for a
    neuron that it does not cover (pinned: always computed). num_bytes: all it keeps in memory."""

    @property
    def num_bytes(self) -> int: ...

    def predict(self, x: np.ndarray) -> np.ndarray: ...

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of a layer's (normed) inputs on calibration tokens: mean float32 [D], covariance float32 [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> InputStatistics:
        """From inputs [N, D]; N of a few D at least."""
        mean = x.mean(axis=0, dtype=np.float64)
        centred = (x - mean).astype(np.float32)
        return cls(mean.astype(np.float32), centred.T @ centred / np.float32(x.shape[0]))

    @property
    def second_moment(self) -> np.ndarray:
        """E[x x^T], [D, D]."""
        return np.asarray(self.covariance + np.outer(self.mean, self.mean))


@dataclass(frozen=True, slots=True)
class PlaneMatrix:
    """F rows of D weights as signs: w_ij ~ scale_i * sum over planes m of dimension j of coefficient_m * (+1 or -1).

    A dimension of b bits has b planes, coefficients step_j * 2^(k-1) for k = 0..b-1: the codes are uniform, without
    a zero. Planes are in the order of dimensions, low bit first. With z_m = coefficient_m * x_dimension(m), made once
    a token, a row is sum(z where its bit is set) * 2 - sum(z): no multiplications.
    bits: uint8 [D]; step: float16 [D]; codes: uint8 [F, R], R = M / 8 rounded up to 2 bytes, bit m % 8 of byte m // 8
    is plane m, 1 for +1, padding 0; scale: float16 [F] times `unit`; bias: float16 [F], times scale, added to the row.
    noise: root of the mean square of what is left, times scale. ValueError when the shapes do not belong together.
    """

    bits: np.ndarray
    step: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    unit: float
    noise: float

    def __post_init__(self) -> None:
        row_bytes = padded_bytes(int(self.bits.sum(dtype=np.int64)))
        if self.codes.ndim != 2 or self.codes.shape[1] != row_bytes or self.step.shape != self.bits.shape:
            raise ValueError(f"codes of {self.codes.shape} do not fit bits that take {row_bytes} bytes a row")
        if self.scale.shape != self.codes.shape[:1] or self.bias.shape != self.scale.shape:
            raise ValueError(
                f"scale {self.scale.shape} or bias {self.bias.shape} does not fit {self.codes.shape[0]} rows"
            )

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in (self.bits, self.step, self.codes, self.scale, self.bias)) + 8

    def planes(self) -> tuple[np.ndarray, np.ndarray]:
        """(dimension int32 [M], coefficient float32 [M]) of every plane: z = x[dimension] * coefficient."""
        dimension = np.repeat(np.arange(self.bits.size, dtype=np.int32), self.bits)
        first = np.cumsum(self.bits, dtype=np.int64) - self.bits
        place = np.arange(dimension.size) - first[dimension]
        return dimension, (self.step.astype(np.float32)[dimension] * np.exp2(place - 1.0)).astype(np.float32)

    def directions(self) -> np.ndarray:
        """What the codes mean, without scale and bias: float32 [F, D]. The slow way, for tests and research."""
        dimension, coefficient = self.planes()
        signs = np.unpackbits(self.codes, axis=1, count=dimension.size, bitorder="little").astype(np.float32) * 2 - 1
        out = np.zeros((self.codes.shape[0], self.bits.size), np.float32)
        if dimension.size:
            starts = np.flatnonzero(np.diff(dimension, prepend=-1))
            out[:, dimension[starts]] = np.add.reduceat(signs * coefficient, starts, axis=1)
        return out

    def rows(self, keep: np.ndarray) -> PlaneMatrix:
        """Only these rows; keep int64 [K]."""
        return PlaneMatrix(
            self.bits, self.step, self.codes[keep], self.scale[keep], self.bias[keep], self.unit, self.noise
        )

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        arrays = {f"{prefix}{name}": getattr(self, name) for name in ("bits", "step", "codes", "scale", "bias")}
        return arrays | {f"{prefix}unit_noise": np.array([self.unit, self.noise], np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> PlaneMatrix:
        """What `to_arrays` gave. ValueError when one is missing or misfits."""
        bits, step, codes, scale, bias = (_find(arrays, prefix + n) for n in ("bits", "step", "codes", "scale", "bias"))
        unit, noise = _find(arrays, prefix + "unit_noise").tolist()
        return cls(bits, step, codes, scale, bias, unit, noise)


class PlaneSketch:
    """Predictor from the planes of gate (None: not gated) and up. act: silu, relu or relu2.

    neurons uint16 or int32 [K]: whose rows these are, of F; None: all. Where there is a gate, up's scale holds
    ||down_i|| (the score is linear in it); `down_norm` float16 [K] is there only when there is none.
    """

    def __init__(
        self,
        act: str,
        gate: PlaneMatrix | None,
        up: PlaneMatrix,
        num_neurons: int,
        down_norm: np.ndarray | None = None,
        neurons: np.ndarray | None = None,
    ) -> None:
        if (gate is None) == (down_norm is None):
            raise ValueError("a sketch holds either a gate, or down_norm apart")
        self.act, self.gate, self.up, self.num_neurons = act, gate, up, num_neurons
        self.down_norm, self.neurons = down_norm, neurons
        self._dense: tuple[np.ndarray | None, np.ndarray] | None = None

    @property
    def num_bytes(self) -> int:
        parts = [a.nbytes for a in (self.down_norm, self.neurons) if a is not None]
        return self.up.num_bytes + (0 if self.gate is None else self.gate.num_bytes) + sum(parts)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Root of the expected square of the neuron's output magnitude. Keeps the codes' meaning in fp32."""
        if self._dense is None:
            self._dense = (None if self.gate is None else self.gate.directions(), self.up.directions())
        gate_rows, up_rows = self._dense
        if self.gate is None or gate_rows is None:
            score = _expected(self.act, x @ up_rows.T, self.up) * np.asarray(self.down_norm, np.float32)
        else:
            up = x @ up_rows.T + self.up.bias
            size = np.sqrt(up * up + np.float32(self.up.noise**2)) * (self.up.scale.astype(np.float32) * self.up.unit)
            score = _expected(self.act, x @ gate_rows.T, self.gate) * size
        if self.neurons is None:
            return np.asarray(score, np.float32)
        out = np.full((x.shape[0], self.num_neurons), np.inf, np.float32)
        out[:, self.neurons] = score
        return out

    def without(self, pinned: np.ndarray) -> PlaneSketch:
        """The sketch of all other neurons: what is always computed needs none. pinned bool [F]."""
        keep = np.flatnonzero(~pinned)
        return PlaneSketch(
            self.act,
            None if self.gate is None else self.gate.rows(keep),
            self.up.rows(keep),
            self.num_neurons,
            None if self.down_norm is None else self.down_norm[keep],
            keep.astype(np.uint16 if self.num_neurons <= 1 << 16 else np.int32),
        )

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        arrays = self.up.to_arrays(prefix + "up_")
        if self.gate is not None:
            arrays |= self.gate.to_arrays(prefix + "gate_")
        for name in ("down_norm", "neurons"):
            if getattr(self, name) is not None:
                arrays[prefix + name] = getattr(self, name)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str, act: str, num_neurons: int) -> Self:
        """What `to_arrays` gave. ValueError when one is missing or misfits."""
        gate = PlaneMatrix.from_arrays(arrays, prefix + "gate_") if f"{prefix}gate_bits" in arrays else None
        up = PlaneMatrix.from_arrays(arrays, prefix + "up_")
        return cls(act, gate, up, num_neurons, arrays.get(prefix + "down_norm"), arrays.get(prefix + "neurons"))


def make_plane_sketch(
    act: str,
    gate: np.ndarray | None,
    up: np.ndarray,
    down: np.ndarray,
    statistics: InputStatistics,
    bits: float,
    gate_share: float = _GATE_SHARE,
    passes: int = 1,
) -> PlaneSketch:
    """Sketch of a layer at `bits` a weight on average over gate and up (codes only; num_bytes counts the rest too).

    gate [F, D] or None, up [F, D], down [F, D] (transposed), float32. passes: of coordinate descent. Cost: F D²
    multiply-adds a matrix and pass, and three temporaries of [F, D].
    """
    norms = np.sqrt(np.einsum("fd,fd->f", down, down))
    if gate is None:
        return PlaneSketch(
            act, None, plane_matrix(up, None, statistics, bits, passes), up.shape[0], norms.astype(np.float16)
        )
    gate_planes = plane_matrix(gate, None, statistics, 2 * bits * gate_share, passes)
    up_planes = plane_matrix(up, norms, statistics, 2 * bits * (1 - gate_share), passes)
    return PlaneSketch(act, gate_planes, up_planes, up.shape[0])


def plane_matrix(
    weight: np.ndarray, times: np.ndarray | None, statistics: InputStatistics, bits: float, passes: int = 1
) -> PlaneMatrix:
    """Planes of float32 rows [F, D] at `bits` a weight on average; `times` [F] multiplies the rows' scales."""
    spread = np.maximum(weight.std(axis=1), 1e-20)  # [F]
    rows = (weight / spread[:, None]).astype(np.float32)  # [F, D]
    variance = np.maximum(rows.var(axis=0), 1e-12)  # [D]
    covariance = _damped(statistics.covariance)
    order = np.argsort(-covariance.diagonal() * variance, kind="stable")  # the most important first
    factor = _feedback(covariance, order)
    left = np.empty_like(variance)
    left[order] = 1 / np.square(factor.diagonal())  # variance of x_j that later dimensions cannot make up for
    wanted = round(bits * weight.shape[1] / 16) * 16  # whole registers of planes
    allotted = allot_bits(left * variance, wanted)
    values = _round_with_feedback(rows, factor, order, allotted, np.sqrt(variance))
    step = (_GAUSS_STEP[allotted] * np.sqrt(variance)).astype(np.float16)
    step32 = step.astype(np.float32)
    for _ in range(passes):
        _descend(rows, values, covariance, order, allotted, step32)
    error = rows - _value(values, step32)
    row_scale = spread if times is None else spread * times
    unit = float(max(row_scale.max(initial=0.0), 1e-30))
    mean_square = np.einsum("fd,fd->f", error @ statistics.covariance, error)
    return PlaneMatrix(
        bits=allotted.astype(np.uint8),
        step=step,
        codes=_pack(values, allotted),
        scale=(row_scale / unit).astype(np.float16),
        bias=(error @ statistics.mean).astype(np.float16),
        unit=unit,
        noise=float(np.sqrt(max(mean_square.mean(), 1e-12))),
    )


def allot_bits(importance: np.ndarray, total: int) -> np.ndarray:
    """Bits of every dimension, int64 [D], `total` in all: the next bit always where ½ log2(importance) less the bits
    given is largest, which is reverse water-filling (Cover and Thomas, 10.3) in whole bits. At most MAX_BITS each."""
    if not 0 <= total <= MAX_BITS * importance.size:
        raise ValueError(f"{total} bits for {importance.size} dimensions: at most {MAX_BITS} each")
    gain = 0.5 * np.log2(np.maximum(importance, 1e-30))[:, None] - np.arange(MAX_BITS)  # [D, MAX_BITS]
    best = np.argsort(-gain, axis=None, kind="stable")[:total]
    return np.bincount(best // MAX_BITS, minlength=importance.size)


def padded_bytes(num_planes: int) -> int:
    return -(-num_planes // (8 * _ROW_BYTES)) * _ROW_BYTES


def _damped(covariance: np.ndarray) -> np.ndarray:
    mean = max(float(covariance.diagonal().mean()), 1e-12)
    diagonal = np.diag(_SHRINK * covariance.diagonal() + _DAMPING * mean)
    return np.asarray((1 - _SHRINK) * covariance + diagonal, np.float32)


def _feedback(covariance: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the inverse covariance in that order, [D, D]: GPTQ's way to spread an error."""
    inverse = np.linalg.inv(covariance[np.ix_(order, order)].astype(np.float64))
    return np.asarray(np.linalg.cholesky(inverse).T)


def _codes(target: np.ndarray, step: float, bits: int) -> np.ndarray:
    half = 2.0 ** (bits - 1)
    return np.asarray(np.clip(np.floor(target / max(step, 1e-12)), -half, half - 1), np.float32) + np.float32(0.5)


def _round_with_feedback(
    rows: np.ndarray, factor: np.ndarray, order: np.ndarray, bits: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """Half-integer codes float32 [F, D], 0 where no bits; each error is passed on to the dimensions yet to come."""
    work = np.ascontiguousarray(rows[:, order].T)  # [D, F]
    factor = factor.astype(np.float32)
    out = np.zeros_like(work)
    step = (_GAUSS_STEP[bits] * spread).astype(np.float16).astype(np.float32)[order]
    for start in range(0, work.shape[0], _BLOCK):
        stop = min(start + _BLOCK, work.shape[0])
        errors = np.empty((stop - start, work.shape[1]), np.float32)
        for j in range(start, stop):
            if bits[order[j]]:
                out[j] = _codes(work[j], step[j], bits[order[j]])
            errors[j - start] = (work[j] - out[j] * step[j]) / factor[j, j]
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        work[stop:] -= factor[start:stop, stop:].T @ errors
    values = np.empty_like(rows)
    values[:, order] = out.T
    return values


def _descend(
    rows: np.ndarray, values: np.ndarray, covariance: np.ndarray, order: np.ndarray, bits: np.ndarray, step: np.ndarray
) -> None:
    """One pass of coordinate descent on the mean square of the rows' errors; changes `values`. Dimension by dimension,
    a block of them between two matrix products."""
    pull = covariance @ (rows - _value(values, step)).T  # [D, F]
    coded = order[bits[order] > 0]
    for start in range(0, coded.size, _BLOCK):
        block = coded[start : start + _BLOCK]
        inner = covariance[np.ix_(block, block)]
        local, changes = pull[block], np.empty((block.size, rows.shape[0]), np.float32)
        for k, j in enumerate(block):
            now = values[:, j].copy()
            values[:, j] = _codes(now * step[j] + local[k] / inner[k, k], step[j], bits[j])
            changes[k] = (values[:, j] - now) * step[j]
            local -= inner[:, k, None] * changes[k]
        pull -= covariance[:, block] @ changes


def _value(codes: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.asarray(codes * step)


def _pack(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Half-integer codes [F, D] to planes uint8 [F, R], see PlaneMatrix."""
    total = int(bits.sum())
    planes = np.zeros((values.shape[0], padded_bytes(total) * 8), np.uint8)
    dimension = np.repeat(np.arange(bits.size), bits)
    place = np.arange(total) - (np.cumsum(bits) - bits)[dimension]
    unsigned = (values + (2.0 ** (bits - 1))).astype(np.uint8)  # floor: the half is dropped
    planes[:, :total] = (unsigned[:, dimension] >> place.astype(np.uint8)) & 1
    return np.packbits(planes, axis=1, bitorder="little")


def activate(act: str, z: np.ndarray) -> np.ndarray:
    if act == "silu":
        return np.asarray(z / (1 + np.exp(-np.clip(z, -80, 80))))
    positive = np.maximum(z, 0)
    return np.asarray(positive * positive if act == "relu2" else positive)


def _expected(act: str, directions_x: np.ndarray, planes: PlaneMatrix) -> np.ndarray:
    """Root of E[act(z)²] for z = scale (directions·x + bias + noise), by three Gauss-Hermite nodes; [B, K]."""
    centre = directions_x + planes.bias
    scale = planes.scale.astype(np.float32) * np.float32(planes.unit)
    square = sum(
        np.float32(w) * np.square(activate(act, (centre + np.float32(sd * planes.noise)) * scale)) for w, sd in _NODES
    )
    return np.asarray(np.sqrt(square))


def _find(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    return arrays[name]


class GroupSketch:
    """Plain rounding, the training-free baseline: symmetric codes of `bits` a weight, a float16 scale a row and group.

    gate (None: not gated) and up: (codes uint8 [F, D * bits / 8 rounded up], scale float16 [F, G]); norms float16 [F].
    """

    def __init__(
        self,
        act: str,
        gate: tuple[np.ndarray, np.ndarray] | None,
        up: tuple[np.ndarray, np.ndarray],
        norms: np.ndarray,
        bits: int,
        hidden_size: int,
    ) -> None:
        self.act, self._gate, self._up, self._norms = act, gate, up, norms.astype(np.float16)
        self._bits, self._hidden = bits, hidden_size
        self._dense: tuple[np.ndarray | None, np.ndarray] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in self.to_arrays("").values())

    def predict(self, x: np.ndarray) -> np.ndarray:
        """|act(gate x) up x| ||down|| with the rounded matrices, kept in fp32 (research)."""
        if self._dense is None:
            self._dense = (None if self._gate is None else self._meaning(self._gate), self._meaning(self._up))
        gate, up = self._dense
        value = activate(self.act, x @ up.T) if gate is None else activate(self.act, x @ gate.T) * (x @ up.T)
        return np.asarray(np.abs(value) * self._norms.astype(np.float32), np.float32)

    def _meaning(self, part: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        codes, scale = part
        planes = np.unpackbits(codes, axis=1, count=self._hidden * self._bits, bitorder="little")
        unsigned = planes.reshape(-1, self._hidden, self._bits) @ (1 << np.arange(self._bits))
        levels = unsigned.astype(np.float32) - np.float32((2**self._bits - 1) / 2)
        group = -(-self._hidden // scale.shape[1])
        return np.asarray(levels * np.repeat(scale.astype(np.float32), group, axis=1)[:, : self._hidden])

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        arrays = {"up_codes": self._up[0], "up_scale": self._up[1], "norms": self._norms}
        if self._gate is not None:
            arrays |= {"gate_codes": self._gate[0], "gate_scale": self._gate[1]}
        return {prefix + name: array for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str, act: str, bits: int, hidden_size: int) -> Self:
        """What `to_arrays` gave. ValueError when one is missing."""
        up = (_find(arrays, prefix + "up_codes"), _find(arrays, prefix + "up_scale"))
        gated = f"{prefix}gate_codes" in arrays
        gate = (arrays[prefix + "gate_codes"], _find(arrays, prefix + "gate_scale")) if gated else None
        return cls(act, gate, up, _find(arrays, prefix + "norms"), bits, hidden_size)


def make_group_sketch(
    act: str, gate: np.ndarray | None, up: np.ndarray, down: np.ndarray, bits: int, group: int | None = None
) -> GroupSketch:
    """Plain rounding of float32 rows [F, D] at 1 to 4 bits; group: inputs that share a scale, None: the whole row."""
    size = group or up.shape[1]
    if up.shape[1] % size:
        raise ValueError(f"{up.shape[1]} dimensions are not whole groups of {size}")
    parts = [None if w is None else _round_groups(w, bits, size) for w in (gate, up)]
    norms = np.sqrt(np.einsum("fd,fd->f", down, down))
    if parts[1] is None:
        raise ValueError("up is missing")
    return GroupSketch(act, parts[0], parts[1], norms, bits, up.shape[1])


def _round_groups(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Half-integer levels with the best step for a normal variable, refitted once by least squares."""
    grouped = weight.reshape(weight.shape[0], -1, group)  # [F, G, group]
    step = np.maximum(grouped.std(axis=2, keepdims=True), 1e-12) * _GAUSS_STEP[bits]
    half = 2.0 ** (bits - 1)
    levels = np.clip(np.floor(grouped / step), -half, half - 1) + 0.5
    scale = (levels * grouped).sum(axis=2) / np.square(levels).sum(axis=2)
    unsigned = (levels + half).astype(np.uint8).reshape(weight.shape[0], -1, 1)
    planes = (unsigned >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(weight.shape[0], -1), axis=1, bitorder="little"), scale.astype(np.float16)
