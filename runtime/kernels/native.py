"""The compiled kernels of this processor, behind the face that the reference has.

Knows how a `BundleLayout` and a `Sketch` are spelled out for the native module; checks nothing, the bindings do.
"""

from __future__ import annotations

import numpy as np

from cache.bundle import BundleLayout
from runtime.kernels._cpu import CpuKernels, backends
from runtime.kernels.sketch import Sketch
from runtime.sketches import PlaneMatrix, PlaneSketch

PlaneArrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]

__all__ = ["NativeKernels", "backends"]


class NativeKernels:
    """See `runtime.kernels.Kernels`. Owns its threads; calls from several threads run one after another."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._cpu = CpuKernels(name, num_threads)

    @property
    def name(self) -> str:
        return self._cpu.name

    @property
    def num_threads(self) -> int:
        return self._cpu.num_threads

    def set_num_threads(self, num_threads: int) -> None:
        """Replaces the pool; ValueError outside 1..1024. Waits for a call that is running."""
        self._cpu.set_num_threads(num_threads)

    def ffn(
        self,
        x: np.ndarray,
        arena: np.ndarray,
        offsets: np.ndarray,
        mask: np.ndarray | None,
        layout: BundleLayout,
        act: str,
        out: np.ndarray,
        threshold: np.ndarray | None = None,
    ) -> int:
        if x.ndim != 2 or x.shape[1] != layout.hidden_size:
            raise ValueError(f"x has shape {x.shape}, expected [B, {layout.hidden_size}]")
        flags = mask.view(np.uint8) if mask is not None and mask.dtype == np.bool_ else mask
        places = {v.name: (v.offset, v.scale_offset) for v in layout.vectors}
        return self._cpu.ffn(
            x=x,
            arena=arena,
            offsets=offsets,
            mask=flags,
            threshold=threshold,
            record_bytes=layout.record_bytes,
            dtype=layout.dtype.value,
            gate=places.get("gate"),
            up=places["up"],
            down=places["down"],
            act=act,
            out=out,
        )

    def sketch_scores(self, x: np.ndarray, sketch: Sketch, act: str, out: np.ndarray) -> None:
        self._cpu.sketch_scores(
            x,
            sketch.gate_codes,
            sketch.gate_scale,
            sketch.up_codes,
            sketch.up_scale,
            sketch.down_norm,
            act,
            out,
        )

    def plane_scores(self, x: np.ndarray, sketch: PlaneSketch, out: np.ndarray) -> None:
        gate = None if sketch.gate is None else _planes(sketch.gate)
        self._cpu.plane_scores(x, gate, _planes(sketch.up), sketch.down_norm, sketch.act, out)

    def linear(self, x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        self._cpu.linear(x, weight, out)

    def paged_attention(
        self,
        q: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        block_table: np.ndarray,
        num_tokens: int,
        out: np.ndarray,
        scale: float,
    ) -> None:
        self._cpu.paged_attention(q, keys, values, block_table, num_tokens, out, scale)

    def read_through(self, data: np.ndarray) -> int:
        """The sum of uint8 [N] as words, read front to back as fast as this machine reads: the others' ceiling."""
        return self._cpu.read_through(data)

    def read_records(self, data: np.ndarray, offsets: np.ndarray, num_bytes: int) -> int:
        """The sum of the num_bytes (a multiple of 256) at each of int64 offsets [K] of uint8 data as words, read as
        `ffn` reads records: what bare reads of them reach. Raises ValueError for one outside the data."""
        return self._cpu.read_records(data, offsets, num_bytes)


def _planes(m: PlaneMatrix) -> PlaneArrays:
    return m.bits, m.step, m.codes, m.scale, m.bias, float(m.unit), float(m.noise)
