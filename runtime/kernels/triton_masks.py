"""Scores from a layer's plane sketch (`runtime.sketches`), and the mask of neurons that reach a threshold.

Shapes: B rows, K sketched neurons, F neurons, M planes of a matrix, R bytes of a row of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from runtime.kernels.triton_act import ACTS, activated
from runtime.sketches import PlaneMatrix, PlaneSketch

_BYTES = 64  # of a row of codes at once


@dataclass(frozen=True, slots=True)
class DevicePlanes:
    """A PlaneMatrix where the GPU computes: dimension int64 and coefficient fp32 [8, R] (bit b of byte r is plane
    8 r + b; past the last one the coefficient is zero), codes uint8 [K, R], scale fp32 [K] with `unit` in it, bias fp32
    [K]."""

    dimension: torch.Tensor
    coefficient: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    noise: float

    @classmethod
    def of(cls, planes: PlaneMatrix, device: torch.device) -> DevicePlanes:
        dimension, coefficient = planes.planes()
        scale = planes.scale.astype(np.float32) * np.float32(planes.unit)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def by_bit(array: np.ndarray) -> torch.Tensor:
            whole = np.zeros(8 * planes.codes.shape[1], array.dtype)
            whole[: array.size] = array
            return put(whole.reshape(-1, 8).T)

        return cls(
            by_bit(dimension.astype(np.int64)),
            by_bit(coefficient),
            put(planes.codes),
            put(scale),
            put(planes.bias.astype(np.float32)),
            planes.noise,
        )

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.dimension, self.coefficient, self.codes, self.scale, self.bias))

    def signals(self, x: torch.Tensor) -> torch.Tensor:
        """z fp32 [B, 8, R] of x fp32 [B, D]: what a plane adds or subtracts."""
        return x[:, self.dimension] * self.coefficient


class DeviceSketch:
    """A layer's PlaneSketch on the device; its rows are the neurons from `first` on, the ones before are pinned."""

    def __init__(self, sketch: PlaneSketch, device: torch.device) -> None:
        """ValueError when the sketched neurons are not the last ones of the layer."""
        self.act, self.num_neurons = sketch.act, sketch.num_neurons
        self.first = sketch.num_neurons - sketch.up.codes.shape[0]
        if sketch.neurons is not None and not (sketch.neurons == np.arange(self.first, sketch.num_neurons)).all():
            raise ValueError("the sketched neurons must be the last ones of the layer")
        self.gate = None if sketch.gate is None else DevicePlanes.of(sketch.gate, device)
        self.up = DevicePlanes.of(sketch.up, device)
        norm = sketch.down_norm
        self.down_norm = None if norm is None else torch.from_numpy(norm.astype(np.float32)).to(device)

    @property
    def num_bytes(self) -> int:
        """On the device: scales and biases are wider there than in the file."""
        parts = [self.up.num_bytes, 0 if self.gate is None else self.gate.num_bytes]
        return sum(parts) + (0 if self.down_norm is None else self.down_norm.nbytes)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(z, codes, ids, there, rows, R: tl.constexpr, B: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """sum of z where a row's bit is set, less z where it is not, fp32 [N, B]; z [B, 8, R]."""
    sums = tl.zeros([N, B, BYTES], tl.float32)
    total = tl.zeros([B, BYTES], tl.float32)
    for start in range(0, R, BYTES):
        place = start + tl.arange(0, BYTES)
        inside = place < R
        byte = tl.load(codes + ids[:, None] * R + place[None, :], mask=there[:, None] & inside[None, :], other=0)
        byte = byte.to(tl.int32)
        for bit in tl.static_range(8):
            signal = tl.load(z + (rows[:, None] * 8 + bit) * R + place[None, :], mask=inside[None, :], other=0.0)
            total += signal
            sums += ((byte >> bit) & 1).to(tl.float32)[:, None, :] * signal[None, :, :]
    return 2.0 * tl.sum(sums, 2) - tl.sum(total, 1)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _squared(z, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z)^2."""
    a = activated(z, ACT)
    return a * a


@triton.jit  # type: ignore[untyped-decorator]
def _masks(  # type: ignore[no-untyped-def]
    gate_z, gate_codes, gate_scale, gate_bias, up_z, up_codes, up_scale, up_bias, norm, scores, mask, threshold,
    gate_noise, up_noise, num, first, num_neurons, gate_bytes: tl.constexpr, up_bytes: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    ids = tl.program_id(0) * N + tl.arange(0, N)
    there, rows = ids < num, tl.arange(0, B)
    wide = ids.to(tl.int64)
    up = _dot(up_z, up_codes, wide, there, rows, up_bytes, B, N, BYTES)
    up += tl.load(up_bias + ids, mask=there, other=0.0)[:, None]
    if GATED:
        centre = _dot(gate_z, gate_codes, wide, there, rows, gate_bytes, B, N, BYTES)
        centre += tl.load(gate_bias + ids, mask=there, other=0.0)[:, None]
        scale = tl.load(gate_scale + ids, mask=there, other=0.0)[:, None]
        noise = gate_noise
        size = tl.sqrt(up * up + up_noise * up_noise) * tl.load(up_scale + ids, mask=there, other=0.0)[:, None]
    else:
        centre, noise = up, up_noise
        scale = tl.load(up_scale + ids, mask=there, other=0.0)[:, None]
        size = tl.load(norm + ids, mask=there, other=0.0)[:, None]
    spread = 1.7320508075688772 * noise
    square = 0.6666666666666666 * _squared(centre * scale, ACT)
    square += 0.16666666666666666 * _squared((centre - spread) * scale, ACT)
    square += 0.16666666666666666 * _squared((centre + spread) * scale, ACT)
    score = tl.sqrt(square) * size
    if SCORED:
        tl.store(scores + rows[None, :] * num + ids[:, None], score, mask=there[:, None])
    at = mask + rows[None, :] * num_neurons + (first + ids)[:, None]
    tl.store(at, (score >= threshold).to(tl.uint8), mask=there[:, None])


def plane_masks(
    x: torch.Tensor, sketch: DeviceSketch, threshold: float, mask: torch.Tensor, scores: torch.Tensor | None = None
) -> None:
    """mask uint8 [B, F] of x fp32 [B, D], B a power of two: 1 where the score reaches the threshold, and for neurons
    that have no sketch nothing is written. scores fp32 [B, K]: gets the scores."""
    up, gate, rows = sketch.up, sketch.gate, x.shape[0]
    first = up if gate is None else gate
    up_z = up.signals(x)
    gate_z = up_z if gate is None else gate.signals(x)
    num = up.codes.shape[0]
    tile = 32 if rows == 1 else 8 if rows <= 4 else 2
    _masks[(triton.cdiv(num, tile),)](
        gate_z, first.codes, first.scale, first.bias, up_z, up.codes, up.scale, up.bias,
        up.scale if sketch.down_norm is None else sketch.down_norm, up.scale if scores is None else scores, mask,
        threshold, first.noise, up.noise, num, sketch.first, sketch.num_neurons,
        first.codes.shape[1], up.codes.shape[1], B=rows, N=tile, BYTES=_BYTES, ACT=ACTS[sketch.act],
        GATED=gate is not None, SCORED=scores is not None,
    )  # fmt: skip
