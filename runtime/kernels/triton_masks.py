"""Scores from a layer's plane sketch (`runtime.sketches`), and the mask of neurons that reach a threshold.

A row of codes says of each plane whether it is added or subtracted. Four planes have sixteen sums, so these are made
once a token, and a neuron takes one of each sixteen by four bits of its codes: a quarter of the additions.
Shapes: B rows, K sketched neurons, F neurons, R words of 16 bits of a row of codes, all matrices of a sketch one behind
the other where a shape says W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from runtime.kernels.triton_act import ACTS, activated
from runtime.kernels.triton_launch import after_others, chained
from runtime.sketches import PlaneMatrix, PlaneSketch

_WORDS = 16  # of a row of codes at once
_NEURONS = 64  # of a program
_TABLE_WORDS = 32  # whose sums a program makes
_QUARTERS, _SUMS = 4, 16  # of a word; of four planes


@dataclass(frozen=True, slots=True)
class DevicePlanes:
    """A PlaneMatrix where the GPU computes: dimension int32 and coefficient fp32 [16, R] (bit b of word r is plane
    16 r + b; past the last one the coefficient is zero), codes int16 [K, R], scale fp32 [K] with `unit` in it, bias
    fp32 [K]."""

    dimension: torch.Tensor
    coefficient: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    noise: float

    @classmethod
    def of(cls, planes: PlaneMatrix, device: torch.device) -> DevicePlanes:
        dimension, coefficient = planes.planes()
        codes = np.ascontiguousarray(planes.codes).view(np.int16)  # rows are padded to two bytes
        scale = planes.scale.astype(np.float32) * np.float32(planes.unit)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def by_bit(array: np.ndarray) -> torch.Tensor:
            whole = np.zeros(16 * codes.shape[1], array.dtype)
            whole[: array.size] = array
            return put(whole.reshape(-1, 16).T)

        return cls(
            by_bit(dimension.astype(np.int32)),
            by_bit(coefficient),
            put(codes),
            put(scale),
            put(planes.bias.astype(np.float32)),
            planes.noise,
        )

    @property
    def num_words(self) -> int:
        """R."""
        return self.codes.shape[1]


class DeviceSketch:
    """A layer's PlaneSketch on the device; its rows are the neurons from `first` on, the ones before are pinned.

    dimension, coefficient [16, W]: of gate, where there is one, and up.
    """

    def __init__(self, sketch: PlaneSketch, device: torch.device) -> None:
        """ValueError when the sketched neurons are not the last ones of the layer."""
        self.act, self.num_neurons = sketch.act, sketch.num_neurons
        self.first = sketch.num_neurons - sketch.up.codes.shape[0]
        if sketch.neurons is not None and not (sketch.neurons == np.arange(self.first, sketch.num_neurons)).all():
            raise ValueError("the sketched neurons must be the last ones of the layer")
        self.gate = None if sketch.gate is None else DevicePlanes.of(sketch.gate, device)
        self.up = DevicePlanes.of(sketch.up, device)
        both = [self.up] if self.gate is None else [self.gate, self.up]
        self.dimension = torch.cat([p.dimension for p in both], dim=1)
        self.coefficient = torch.cat([p.coefficient for p in both], dim=1)
        norm = sketch.down_norm
        self.down_norm = None if norm is None else torch.from_numpy(norm.astype(np.float32)).to(device)

    @property
    def num_words(self) -> int:
        """W."""
        return self.dimension.shape[1]

    @property
    def num_bytes(self) -> int:
        """On the device: scales and biases are wider there than in the file."""
        planes = [self.up] if self.gate is None else [self.gate, self.up]
        own = [t for p in planes for t in (p.codes, p.scale, p.bias)] + [self.dimension, self.coefficient]
        return sum(t.nbytes for t in own) + (0 if self.down_norm is None else self.down_norm.nbytes)


@triton.jit  # type: ignore[untyped-decorator]
def _tables(  # type: ignore[no-untyped-def]
    x, norm, dimension, coefficient, tables, h, eps, D: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
    C: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """tables[row, quarter, v, word] = sum over the quarter's planes of +-z as the bits of v say, of the row normed; the
    row itself, normed, to h."""
    place, row = tl.program_id(0) * C + tl.arange(0, C), tl.program_id(1)
    inside, value, column = place < WORDS, tl.arange(0, 16), tl.arange(0, WIDE)
    after_others(CHAINED)
    there = column < D
    xs = tl.load(x + row * D + column, mask=there, other=0.0)
    scale = tl.rsqrt(tl.sum(xs * xs, 0) / D + eps)
    if tl.program_id(0) == 0:
        tl.store(h + row * D + column, xs * scale * tl.load(norm + column, mask=there, other=0.0), mask=there)
    for quarter in tl.static_range(4):
        table = tl.zeros([16, C], tl.float32)
        for bit in tl.static_range(4):
            at = (4 * quarter + bit) * WORDS + place
            source = tl.load(dimension + at, mask=inside, other=0)
            z = tl.load(x + row * D + source, mask=inside, other=0.0) * tl.load(norm + source, mask=inside, other=0.0)
            z *= tl.load(coefficient + at, mask=inside, other=0.0)
            sign = (2 * ((value >> bit) & 1) - 1).to(tl.float32)
            table += sign[:, None] * z[None, :]
        to = tables + ((row * 4 + quarter) * 16 + value[:, None]) * WORDS + place[None, :]
        tl.store(to, table * scale, mask=inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _fetched(codes, ids, there, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of neurons, [N, C] words at a time."""
    tiles = ()
    for i in tl.static_range(T):
        place = i * C + tl.arange(0, C)
        both = there[:, None] & (place < R)[None, :]
        tiles += (tl.load(codes + ids.to(tl.int64)[:, None] * R + place[None, :], mask=both, other=0),)  # type: ignore[assignment]
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def _looked_up(  # type: ignore[no-untyped-def]
    tiles, tables, R: tl.constexpr, WORDS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, T: tl.constexpr
):
    """Of each neuron, the sum of what its codes choose, fp32 [N]; tables [4, 16, WORDS]: its matrix's."""
    sums, value = tl.zeros([N, C], tl.float32), tl.arange(0, 16)
    for i in tl.static_range(T):
        place = i * C + tl.arange(0, C)
        word = tiles[i].to(tl.int32)
        for quarter in tl.static_range(4):
            at = (quarter * 16 + value[:, None]) * WORDS + place[None, :]
            table = tl.load(tables + at, mask=(place < R)[None, :], other=0.0)
            sums += tl.gather(table, (word >> (4 * quarter)) & 15, 0)
    return tl.sum(sums, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _squared(z, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z)^2."""
    a = activated(z, ACT)
    return a * a


@triton.jit  # type: ignore[untyped-decorator]
def _masks(  # type: ignore[no-untyped-def]
    tables, gate_codes, gate_scale, gate_bias, up_codes, up_scale, up_bias, norm, scores, mask, threshold, gate_noise,
    up_noise, num, first, num_neurons, gate_words: tl.constexpr, up_words: tl.constexpr, WORDS: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, GATE_T: tl.constexpr, UP_T: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, SCORED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    ids, row = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    there = ids < num
    up_tiles = _fetched(up_codes, ids, there, up_words, C, UP_T)
    after_others(CHAINED)
    own = tables + row * 64 * WORDS
    up = _looked_up(up_tiles, own + WORDS - up_words, up_words, WORDS, N, C, UP_T)
    up += tl.load(up_bias + ids, mask=there, other=0.0)
    if GATED:
        gate_tiles = _fetched(gate_codes, ids, there, gate_words, C, GATE_T)
        centre = _looked_up(gate_tiles, own, gate_words, WORDS, N, C, GATE_T)
        centre += tl.load(gate_bias + ids, mask=there, other=0.0)
        scale = tl.load(gate_scale + ids, mask=there, other=0.0)
        noise = gate_noise
        size = tl.sqrt(up * up + up_noise * up_noise) * tl.load(up_scale + ids, mask=there, other=0.0)
    else:
        centre, noise = up, up_noise
        scale = tl.load(up_scale + ids, mask=there, other=0.0)
        size = tl.load(norm + ids, mask=there, other=0.0)
    spread = 1.7320508075688772 * noise
    square = 0.6666666666666666 * _squared(centre * scale, ACT)
    square += 0.16666666666666666 * _squared((centre - spread) * scale, ACT)
    square += 0.16666666666666666 * _squared((centre + spread) * scale, ACT)
    score = tl.sqrt(square) * size
    if SCORED:
        tl.store(scores + row * num + ids, score, mask=there)
    tl.store(mask + row * num_neurons + first + ids, (score >= threshold).to(tl.uint8), mask=there)


def table_numbers(rows: int, num_words: int) -> int:
    """Of the buffer that `plane_masks` takes for so many rows."""
    return rows * _QUARTERS * _SUMS * num_words


def plane_masks(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    sketch: DeviceSketch,
    threshold: float,
    tables: torch.Tensor,
    h: torch.Tensor,
    mask: torch.Tensor,
    scores: torch.Tensor | None = None,
) -> None:
    """mask uint8 [B, F] of x fp32 [B, D] once it has passed an RMS norm: 1 where the score reaches the threshold, and
    for neurons that have no sketch nothing is written. h fp32 [B, D]: gets x normed. tables fp32: at least
    `table_numbers` of scratch. scores fp32 [B, K]: gets the scores."""
    up, gate, (rows, hidden) = sketch.up, sketch.gate, x.shape
    first, words, num = up if gate is None else gate, sketch.num_words, up.codes.shape[0]
    _tables[(triton.cdiv(words, _TABLE_WORDS), rows)](
        x, norm, sketch.dimension, sketch.coefficient, tables, h, eps, D=hidden, WIDE=triton.next_power_of_2(hidden),
        WORDS=words, C=_TABLE_WORDS, **chained(x),
    )  # fmt: skip
    _masks[(triton.cdiv(num, _NEURONS), rows)](
        tables, first.codes, first.scale, first.bias, up.codes, up.scale, up.bias,
        up.scale if sketch.down_norm is None else sketch.down_norm, up.scale if scores is None else scores, mask,
        threshold, first.noise, up.noise, num, sketch.first, sketch.num_neurons, first.num_words, up.num_words,
        WORDS=words, N=_NEURONS, C=_WORDS, GATE_T=triton.cdiv(first.num_words, _WORDS),
        UP_T=triton.cdiv(up.num_words, _WORDS), ACT=ACTS[sketch.act], GATED=gate is not None,
        SCORED=scores is not None, **chained(x),
    )  # fmt: skip
