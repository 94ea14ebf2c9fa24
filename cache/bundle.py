"""The record of one neuron: its vectors, contiguous, with their quantisation inside.

Knows bytes and dtypes, not files and not layers. A record of a gated FFN is `gate_i | up_i | down_i`, of a
non-gated one `up_i | down_i`; int8 vectors have one fp32 scale each, kept behind the vectors in the same record,
so that whoever has the record can compute. A 64-bit checksum closes the record, so that whoever read it can check it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from cache.errors import FormatError, FormatKind

_ALIGN = 64  # bytes: a cache line, and the widest vector register
_MAX_PADDING = 0.05  # of a record; above that the padding costs more I/O than alignment saves


class BundleDtype(StrEnum):
    """Number format of one vector inside a record."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    INT8 = "int8"

    @property
    def item_bytes(self) -> int:
        return {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1}[self.value]


@dataclass(frozen=True, slots=True)
class VectorLayout:
    """One vector of a record. Offsets are bytes from the start of the record; `scale_offset` is -1 without a scale."""

    name: str  # gate, up or down
    dtype: BundleDtype
    offset: int
    scale_offset: int = -1


@dataclass(frozen=True, slots=True)
class BundleLayout:
    """How the bytes of one record are read. `stride` is the distance between records, `record_bytes` what is used.

    The checksum (uint64, little endian) covers the bytes before `checksum_offset`, a multiple of 8.
    """

    hidden_size: int
    vectors: tuple[VectorLayout, ...]
    checksum_offset: int
    record_bytes: int
    stride: int

    @classmethod
    def make(cls, hidden_size: int, gated: bool, dtype: BundleDtype) -> BundleLayout:
        """The standard layout: vectors in order, then the scales (int8), then padding where it is cheap."""
        names = ("gate", "up", "down") if gated else ("up", "down")
        vector_bytes = hidden_size * dtype.item_bytes
        scales_at = _round_up(vector_bytes * len(names), 4)
        scaled = dtype is BundleDtype.INT8
        vectors = tuple(
            VectorLayout(name, dtype, i * vector_bytes, scales_at + 4 * i if scaled else -1)
            for i, name in enumerate(names)
        )
        checksum_offset = _round_up(scales_at + 4 * len(names) if scaled else vector_bytes * len(names), 8)
        record_bytes = checksum_offset + 8
        padded = _round_up(record_bytes, _ALIGN)
        stride = padded if padded - record_bytes <= _MAX_PADDING * record_bytes else record_bytes
        return cls(hidden_size, vectors, checksum_offset, record_bytes, stride)

    @property
    def gated(self) -> bool:
        return len(self.vectors) == 3

    @property
    def dtype(self) -> BundleDtype:
        return self.vectors[0].dtype

    def vector(self, name: str) -> VectorLayout:
        """The vector called `name`; KeyError when the record has none."""
        for v in self.vectors:
            if v.name == name:
                return v
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "checksum_offset": self.checksum_offset,
            "record_bytes": self.record_bytes,
            "stride": self.stride,
            "vectors": [
                {"name": v.name, "dtype": v.dtype.value, "offset": v.offset, "scale_offset": v.scale_offset}
                for v in self.vectors
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BundleLayout:
        """Reads what `to_json` wrote. FormatError(BAD_HEADER) when a field is missing or points outside the record."""
        try:
            vectors = tuple(
                VectorLayout(str(v["name"]), BundleDtype(v["dtype"]), int(v["offset"]), int(v["scale_offset"]))
                for v in data["vectors"]
            )
            layout = cls(
                int(data["hidden_size"]),
                vectors,
                int(data["checksum_offset"]),
                int(data["record_bytes"]),
                int(data["stride"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                FormatKind.BAD_HEADER, f"manifest.json: the bundle layout cannot be read ({error})"
            ) from error
        layout._check()
        return layout

    def _check(self) -> None:
        names = tuple(v.name for v in self.vectors)
        inside = all(
            v.offset >= 0
            and v.offset + self.hidden_size * v.dtype.item_bytes <= self.checksum_offset
            and v.scale_offset + 4 <= self.checksum_offset
            and (v.scale_offset >= 0) == (v.dtype is BundleDtype.INT8)
            for v in self.vectors
        )
        one_dtype = len({v.dtype for v in self.vectors}) == 1
        sized = self.checksum_offset % 8 == 0 and self.checksum_offset + 8 == self.record_bytes <= self.stride
        if names not in (("gate", "up", "down"), ("up", "down")) or not (inside and one_dtype and sized):
            raise FormatError(FormatKind.BAD_HEADER, "manifest.json: the bundle layout points outside its record")


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def pack_records(layout: BundleLayout, vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Records of N neurons out of their vectors.

    vectors: name -> float32 [N, D], one row a neuron (`down` already transposed). Returns uint8 [N, stride]; the
    padding is zero. int8 is symmetric, one scale a vector: scale = max|w| / 127. Raises ValueError when a finite
    number does not fit fp16.
    """
    num = next(iter(vectors.values())).shape[0]
    out = np.zeros((num, layout.stride), np.uint8)
    for v in layout.vectors:
        values = np.ascontiguousarray(vectors[v.name], np.float32)
        encoded, scale = encode(values, v.dtype)
        out[:, v.offset : v.offset + encoded.shape[1]] = encoded
        if scale is not None:
            out[:, v.scale_offset : v.scale_offset + 4] = scale.view(np.uint8).reshape(num, 4)
    end = layout.checksum_offset
    out[:, end : end + 8] = checksums(layout, out).view(np.uint8).reshape(num, 8)
    return out


def checksum_weights(layout: BundleLayout) -> np.ndarray:
    """The odd multipliers of the checksum, uint64 [checksum_offset / 8]: splitmix64 of the word's index."""
    z = np.arange(1, layout.checksum_offset // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd: np.ndarray = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return odd


CHECKSUM_SEED = np.uint64(0xC01D57)  # so that a hole of zeros in a file does not pass


def checksums(layout: BundleLayout, records: np.ndarray) -> np.ndarray:
    """What the checksums of uint8 records [N, >= checksum_offset] should be, uint64 [N].

    A multilinear hash modulo 2^64: seed + sum of word * odd multiplier. Any change within one word is found for
    certain, other damage but for one case in 2^64.
    """
    words = np.ascontiguousarray(records[:, : layout.checksum_offset]).view(np.uint64)
    sums: np.ndarray = (words * checksum_weights(layout)).sum(axis=1, dtype=np.uint64)
    return sums + CHECKSUM_SEED


def stored_checksums(layout: BundleLayout, records: np.ndarray) -> np.ndarray:
    """What the records say their checksums are, uint64 [N]."""
    end = layout.checksum_offset
    return np.ascontiguousarray(records[:, end : end + 8]).view(np.uint64)[:, 0]


def encode(values: np.ndarray, dtype: BundleDtype) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [N, D] as bytes [N, D * item_bytes] and, for int8, its float32 scales [N]."""
    if dtype is BundleDtype.FP32:
        return values.view(np.uint8), None
    if dtype is BundleDtype.FP16:
        with np.errstate(over="ignore"):  # found by the next line, and refused
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError("a weight does not fit fp16; use --bundles bf16 or fp32")
        return half.view(np.uint8), None
    if dtype is BundleDtype.BF16:
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return rounded.astype(np.uint16).view(np.uint8), None
    scale = np.maximum(np.abs(values).max(axis=1), 1e-30) / np.float32(127)
    return np.rint(values / scale[:, None]).astype(np.int8).view(np.uint8), scale.astype(np.float32)


def unpack_vector(layout: BundleLayout, records: np.ndarray, name: str) -> np.ndarray:
    """The vector `name` of uint8 records [N, stride] as float32 [N, D]: what the bytes mean."""
    v = layout.vector(name)
    raw = np.ascontiguousarray(records[:, v.offset : v.offset + layout.hidden_size * v.dtype.item_bytes])
    if v.dtype is BundleDtype.FP32:
        return raw.view(np.float32)
    if v.dtype is BundleDtype.FP16:
        return raw.view(np.float16).astype(np.float32)
    if v.dtype is BundleDtype.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    scale = np.ascontiguousarray(records[:, v.scale_offset : v.scale_offset + 4]).view(np.float32)
    return raw.view(np.int8).astype(np.float32) * scale
