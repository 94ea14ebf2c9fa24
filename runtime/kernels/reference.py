"""The kernels in numpy: what they mean, readable and slow. Serves where nothing is compiled.

Knows records, sketches and arrays; not layers, caches or files. Sums are float32 like the compiled ones, in another
order. Rows are computed one by one, so a row's result does not depend on its batch mates.
"""

from __future__ import annotations

import numpy as np

from cache.bundle import BundleLayout, unpack_vector
from runtime.kernels.sketch import Sketch, dequantise_rows
from runtime.sketches import PlaneSketch

_CHUNK = 256  # records, sketch rows or weight rows unpacked at a time


def activate(act: str, a: np.ndarray) -> np.ndarray:
    """silu, relu or relu2 (relu squared), elementwise; ValueError for another name."""
    if act == "silu":
        with np.errstate(over="ignore"):
            return np.asarray(a / (1 + np.exp(-a)), np.float32)
    if act not in ("relu", "relu2"):
        raise ValueError(f"unknown activation {act}")
    positive = np.where(a < 0, np.float32(0), a)
    return positive if act == "relu" else positive * positive


class ReferenceKernels:
    """See `runtime.kernels.Kernels` for the meaning of each method and its arguments."""

    def __init__(self) -> None:
        self.name = "reference"
        self.num_threads = 1

    def set_num_threads(self, num_threads: int) -> None:
        """numpy chooses its own threads: only 1 is accepted."""
        if num_threads != 1:
            raise ValueError("the reference kernels run on 1 thread; num_threads must be 1")

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
        _check_dtypes((x, np.float32), (arena, np.uint8), (offsets, np.int64), (out, np.float32))
        _check_mask(mask, (x.shape[0], offsets.shape[0]))
        if threshold is not None:
            _check_dtypes((threshold, np.float32))
            _check_shape("threshold", threshold, offsets.shape)
        _check_shape("out", out, (x.shape[0], layout.hidden_size))
        _check_shape("x", x, out.shape)
        if offsets.size and (offsets.min() < 0 or offsets.max() > arena.shape[0] - layout.record_bytes):
            raise IndexError("a record offset lies outside the arena")
        activate(act, x[:0])
        active = 0
        for b in range(x.shape[0]):
            wanted = np.arange(offsets.shape[0]) if mask is None else np.flatnonzero(mask[b])
            for start in range(0, wanted.shape[0], _CHUNK):
                ids = wanted[start : start + _CHUNK]
                least = None if threshold is None else threshold[ids]
                output, count = _records_output(x[b], _gather(arena, offsets[ids], layout), layout, act, least)
                out[b] += output
                active += count
        return active

    def sketch_scores(self, x: np.ndarray, sketch: Sketch, act: str, out: np.ndarray) -> None:
        _check_dtypes((x, np.float32), (out, np.float32))
        _check_shape("x", x, (x.shape[0], sketch.hidden_size))
        _check_shape("out", out, (x.shape[0], sketch.up_codes.shape[0]))
        for start in range(0, out.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            up = _sketched(x, sketch.up_codes[part], sketch.up_scale[part])  # [B, C]
            if sketch.gate_codes is None or sketch.gate_scale is None:
                product = activate(act, up)
            else:
                gate = activate(act, _sketched(x, sketch.gate_codes[part], sketch.gate_scale[part]))
                product = _multiply(gate, up)
            out[:, part] = np.abs(product) * sketch.down_norm[part]

    def plane_scores(self, x: np.ndarray, sketch: PlaneSketch, out: np.ndarray) -> None:
        _check_dtypes((x, np.float32), (out, np.float32))
        activate(sketch.act, x[:0])
        num = sketch.up.codes.shape[0]
        _check_shape("x", x, (x.shape[0], sketch.up.bits.shape[0]))
        _check_shape("out", out, (x.shape[0], num))
        for start in range(0, num, _CHUNK):
            part = _plane_rows(sketch, np.arange(start, min(start + _CHUNK, num)))
            for b in range(x.shape[0]):
                out[b, start : start + _CHUNK] = part.predict(x[b : b + 1])[0]

    def linear(self, x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        _check_dtypes((x, np.float32), (out, np.float32))
        _check_shape("weight", weight, (weight.shape[0], x.shape[1]))
        _check_shape("out", out, (x.shape[0], weight.shape[0]))
        _as_float(weight[:0])
        for start in range(0, weight.shape[0], _CHUNK):
            part = _as_float(weight[start : start + _CHUNK])
            for b in range(x.shape[0]):
                out[b, start : start + _CHUNK] = part @ x[b]

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
        _check_dtypes((q, np.float32), (out, np.float32), (block_table, np.int32))
        if keys.dtype not in (np.float32, np.uint16) or keys.dtype != values.dtype:
            raise TypeError("keys and values must both be float32 or bf16 as uint16")
        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        _check_shape("values", values, keys.shape)
        _check_shape("q", q, (q.shape[0], head_dim))
        _check_shape("out", out, q.shape)
        if not 1 <= num_tokens <= block_table.shape[0] * block_size:
            raise ValueError("num_tokens must fit the block table")
        if q.shape[0] % num_kv_heads:
            raise ValueError("query heads must be a multiple of kv heads")
        blocks = block_table[: -(-num_tokens // block_size)]
        if blocks.min() < 0 or blocks.max() >= num_blocks:
            raise IndexError("a block of the table does not exist")
        k, v = (_as_float(a[blocks]).reshape(-1, num_kv_heads, head_dim)[:num_tokens] for a in (keys, values))
        group = q.shape[0] // num_kv_heads
        for head in range(q.shape[0]):
            scores = (k[:, head // group] @ q[head]) * np.float32(scale)  # [T]
            weights = np.exp(scores - scores.max())
            out[head] = (weights @ v[:, head // group]) / weights.sum()


def _gather(arena: np.ndarray, offsets: np.ndarray, layout: BundleLayout) -> np.ndarray:
    return arena[offsets[:, None] + np.arange(layout.record_bytes)]  # [C, record_bytes]


def _records_output(
    x: np.ndarray, records: np.ndarray, layout: BundleLayout, act: str, threshold: np.ndarray | None
) -> tuple[np.ndarray, int]:
    up = unpack_vector(layout, records, "up") @ x  # [C]
    if layout.gated:
        coefficients = _multiply(activate(act, unpack_vector(layout, records, "gate") @ x), up)
    else:
        coefficients = activate(act, up)
    reached = (coefficients != 0) & (np.abs(coefficients) >= (0 if threshold is None else threshold))
    kept = np.flatnonzero(coefficients != 0)  # a coefficient of zero gives exactly nothing, whatever down holds
    output = np.asarray(coefficients[kept] @ unpack_vector(layout, records[kept], "down"))  # [D]
    return output, int(np.count_nonzero(reached))


def _multiply(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate * up, and zero where the gate is zero whatever up is: the compiled loops do not read up then."""
    with np.errstate(invalid="ignore"):
        return np.where(gate == 0, np.float32(0), gate * up)


def _sketched(x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    weights = dequantise_rows(codes, scale, x.shape[1])  # [C, D]
    return np.stack([weights @ row for row in x]) if x.shape[0] else np.empty((0, codes.shape[0]), np.float32)


def _plane_rows(sketch: PlaneSketch, rows: np.ndarray) -> PlaneSketch:
    gate = None if sketch.gate is None else sketch.gate.rows(rows)
    norms = None if sketch.down_norm is None else sketch.down_norm[rows]
    return PlaneSketch(sketch.act, gate, sketch.up.rows(rows), rows.shape[0], norms)


def _as_float(a: np.ndarray) -> np.ndarray:
    """float32 of float32, float16, or bf16 held as uint16; TypeError otherwise."""
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32)
    if a.dtype not in (np.float32, np.float16):
        raise TypeError("weight must be float32, float16, or bf16 as uint16")
    return a.astype(np.float32, copy=False)


def _check_dtypes(*pairs: tuple[np.ndarray, type[np.generic]]) -> None:
    for array, dtype in pairs:
        if array.dtype != dtype:
            raise TypeError(f"an array is {array.dtype}, expected {np.dtype(dtype)}")


def _check_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"mask is {mask.dtype}, expected bool or uint8")
    _check_shape("mask", mask, shape)


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
