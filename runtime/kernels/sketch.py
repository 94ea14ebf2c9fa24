"""The 4-bit copy of gate and up from which a predictor guesses the size of each neuron's output.

Knows codes and scales, not how they are multiplied and not what a guess is good for. Symmetric codes -7..7, stored
plus 8, two a byte: element 2j in the low nibble of byte j, element 2j + 1 in the high one; one float32 scale a row.
The scale minimises the squared error over a small grid (training-free, round to nearest).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LEVELS = 7
_SHRINK = np.linspace(1.0, 0.5, 21, dtype=np.float32)  # of max|w| / 7: clipping the largest weights often errs less
_ARRAYS = ("gate_codes", "gate_scale", "up_codes", "up_scale", "down_norm")
_CHUNK = 1024  # rows quantised at a time, so that temporaries stay small


@dataclass(frozen=True, slots=True)
class Sketch:
    """Codes of one layer, F neurons of D weights. `gate_*` are None when the FFN is not gated.

    gate_codes, up_codes: uint8 [F, (D + 1) // 2]; gate_scale, up_scale: float32 [F]; down_norm: float32 [F], the
    Euclidean norm of each neuron's down vector. Raises ValueError when the shapes do not belong together.
    """

    gate_codes: np.ndarray | None
    gate_scale: np.ndarray | None
    up_codes: np.ndarray
    up_scale: np.ndarray
    down_norm: np.ndarray
    hidden_size: int

    def __post_init__(self) -> None:
        num = self.up_codes.shape[0]
        codes_shape = (num, (self.hidden_size + 1) // 2)
        if (self.gate_codes is None) != (self.gate_scale is None):
            raise ValueError("a sketch needs both gate_codes and gate_scale, or neither")
        for codes in (self.gate_codes, self.up_codes):
            if codes is not None and codes.shape != codes_shape:
                raise ValueError(f"the codes of a sketch have shape {codes.shape}, expected {codes_shape}")
        for row in (self.gate_scale, self.up_scale, self.down_norm):
            if row is not None and row.shape != (num,):
                raise ValueError(f"a scale or norm of a sketch has shape {row.shape}, expected {(num,)}")

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays: what the sketch costs in memory."""
        arrays = (self.gate_codes, self.gate_scale, self.up_codes, self.up_scale, self.down_norm)
        return sum(a.nbytes for a in arrays if a is not None)

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under their names, each with `prefix` before it, for a file."""
        arrays = {f"{prefix}{name}": getattr(self, name) for name in _ARRAYS}
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], prefix: str, hidden_size: int) -> Sketch:
        """What `to_arrays` gave. ValueError when an array is missing or of the wrong shape."""
        found = {name: arrays.get(prefix + name) for name in _ARRAYS}
        up_codes, up_scale, down_norm = found["up_codes"], found["up_scale"], found["down_norm"]
        if up_codes is None or up_scale is None or down_norm is None:
            raise ValueError(f"{prefix}up_codes, up_scale or down_norm is missing")
        return cls(found["gate_codes"], found["gate_scale"], up_codes, up_scale, down_norm, hidden_size)


def make_sketch(gate: np.ndarray | None, up: np.ndarray, down: np.ndarray) -> Sketch:
    """Sketch of a layer from float32 gate [F, D] (None when not gated), up [F, D] and down [F, D] (transposed)."""
    gate_codes, gate_scale = (None, None) if gate is None else quantise_rows(gate)
    up_codes, up_scale = quantise_rows(up)
    down_norm = np.sqrt(np.einsum("fd,fd->f", down, down)).astype(np.float32)
    return Sketch(gate_codes, gate_scale, up_codes, up_scale, down_norm, up.shape[1])


def quantise_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """4-bit codes uint8 [F, (D + 1) // 2] and scales float32 [F] of float32 rows [F, D]; temporaries of 1024 rows."""
    num, hidden = w.shape
    codes = np.empty((num, (hidden + 1) // 2), np.uint8)
    scale = np.empty(num, np.float32)
    for start in range(0, num, _CHUNK):
        rows = np.ascontiguousarray(w[start : start + _CHUNK], np.float32)
        scale[start : start + _CHUNK] = _best_scale(rows)
        codes[start : start + _CHUNK] = _pack(_round(rows, scale[start : start + _CHUNK]))
    return codes, scale


def dequantise_rows(codes: np.ndarray, scale: np.ndarray, hidden_size: int) -> np.ndarray:
    """What the codes mean: float32 [F, hidden_size]. For tests and for platforms without the compiled loops."""
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], 2 * codes.shape[1])  # [F, D or D + 1]
    return np.asarray((values[:, :hidden_size].astype(np.float32) - 8) * scale[:, None])


def _round(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    quotient = w / scale[:, None]  # [F, D]
    np.rint(quotient, out=quotient)
    np.clip(quotient, -_LEVELS, _LEVELS, out=quotient)
    return np.asarray(quotient)


def _best_scale(w: np.ndarray) -> np.ndarray:
    """The scale of each row, float32 [F], that gives the least squared error among the grid's."""
    largest = np.maximum(np.abs(w).max(axis=1, initial=0.0), 1e-30) / np.float32(_LEVELS)  # [F]
    best_scale, best_error = largest, np.full(w.shape[0], np.inf, np.float32)
    for shrink in _SHRINK:
        scale = largest * shrink
        difference = _round(w, scale) * scale[:, None] - w  # [F, D]
        error = np.einsum("fd,fd->f", difference, difference)
        better = error < best_error
        best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    return np.asarray(best_scale, np.float32)


def _pack(codes: np.ndarray) -> np.ndarray:
    stored = (codes + 8).astype(np.uint8)  # [F, D]
    if stored.shape[1] % 2:
        stored = np.concatenate([stored, np.full((stored.shape[0], 1), 8, np.uint8)], axis=1)
    return np.asarray(stored[:, 0::2] | (stored[:, 1::2] << 4))
