"""The header of one GGUF file, read with distrust, and its tensors as floats.

Knows the format (version 2 and 3, little endian) and its tensor types; not what the metadata or the tensors mean.
The `gguf` package dequantises; its own reader is not used because it maps the whole file, trusts the header's
lengths and takes seconds to make objects of a vocabulary.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cache.errors import FormatError, FormatKind, UnsupportedError
from runtime.open_file import open_file
from runtime.tensor_entry import TensorEntry, check_ranges, read_into

MAGIC = b"GGUF"
_PLAIN = {"f32": "fp32", "f16": "fp16"}  # GGUF's names for what safetensors and we call otherwise
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_ROWS_BYTES = 4 << 20  # float32 bytes dequantised at once, so that the package's temporaries stay small


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the header says. Arrays of numbers in `metadata` are numpy arrays, arrays of strings lists."""

    path: Path
    header_bytes: int
    metadata: dict[str, Any]
    entries: dict[str, TensorEntry]

    def load(self, name: str) -> np.ndarray:
        """The tensor `name` as float32, shape as in `entries` (slowest dimension first). KeyError when there is none.

        Memory: the result and about 20 MB. Raises UnsupportedError for a type that cannot be dequantised,
        FormatError(TRUNCATED) when the file ended meanwhile.
        """
        entry = self.entries[name]
        check_type(entry)
        rows = entry.num_bytes and math.prod(entry.shape[:-1])
        out = np.empty((rows, entry.shape[-1] if entry.shape else 1), np.float32)
        row_bytes = entry.num_bytes // max(rows, 1)
        step = max(1, _ROWS_BYTES // max(4 * out.shape[1], 1))
        for start in range(0, rows, step):
            raw = np.empty((min(step, rows - start), row_bytes), np.uint8)
            read_into(self.path, entry.offset + start * row_bytes, raw.reshape(-1))
            out[start : start + len(raw)] = _dequantise(raw, entry.dtype)
        return out.reshape(entry.shape)


def open_gguf(path: Path) -> GgufFile:
    """Reads and checks the header; no tensor is read.

    Raises FormatError: MISSING_FILE, BAD_MAGIC, BAD_VERSION, TRUNCATED, BAD_HEADER; UnsupportedError for big endian.
    """
    with open_file(path) as file:
        header = _Header(path, file, path.stat().st_size)
        header.check_start()
        num_tensors, num_fields = header.number("u8"), header.number("u8")
        header.check_count(num_fields, 13)  # a name's length, a type and one byte, at least
        metadata = dict(header.field() for _ in range(num_fields))
        if len(metadata) != num_fields:
            raise header.bad("a metadata key occurs twice")
        header.check_count(num_tensors, 24)
        infos = [header.tensor_info() for _ in range(num_tensors)]
        data_start = _align(header.position, _alignment(header, metadata))
    entries = {info[0]: _entry(path, *info, data_start) for info in infos}
    if len(entries) != num_tensors:
        raise header.bad("a tensor name occurs twice")
    check_ranges(path, entries.values(), header.file_bytes)
    return GgufFile(path, data_start, metadata, entries)


def check_type(entry: TensorEntry) -> None:
    """UnsupportedError, naming tensor and type, when the tensor cannot be made floats."""
    if not _can_dequantise(entry.dtype):
        raise UnsupportedError(f"{entry.path}: {entry.name} has the type {entry.dtype}, which cannot be dequantised")


class _Header:
    """A cursor over the header that never believes a length before comparing it with the file's."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path, self.file, self.file_bytes, self.position = path, file, file_bytes, 0

    def bad(self, what: str) -> FormatError:
        return FormatError(FormatKind.BAD_HEADER, f"{self.path}: {what}")

    def take(self, num_bytes: int) -> bytes:
        raw = self.file.read(num_bytes) if self.position + num_bytes <= self.file_bytes else b""
        if len(raw) != num_bytes:
            end = self.position + num_bytes
            raise FormatError(
                FormatKind.TRUNCATED,
                f"{self.path}: the header goes on to byte {end}, but the file has {self.file_bytes}",
            )
        self.position += num_bytes
        return raw

    def check_start(self) -> None:
        if self.file_bytes < 4 or self.take(4) != MAGIC:
            raise FormatError(FormatKind.BAD_MAGIC, f"{self.path}: not a GGUF file, it does not begin with GGUF")
        version = self.number("u4")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError(f"{self.path}: a big-endian GGUF file is not read; convert it to little endian")
        if version not in (2, 3):
            raise FormatError(FormatKind.BAD_VERSION, f"{self.path}: GGUF version {version} is not read, only 2 and 3")

    def check_count(self, count: int, item_bytes: int) -> None:
        """Refuses a count that the rest of the file cannot hold, before a loop or an allocation believes it."""
        if count * item_bytes > self.file_bytes - self.position:
            raise FormatError(
                FormatKind.TRUNCATED, f"{self.path}: the header announces {count} items, the file is too short for them"
            )

    def number(self, code: str) -> Any:
        return np.frombuffer(self.take(int(code[-1]) if code != "?" else 1), "<" + code)[0].item()

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad("a string in the header is not UTF-8") from error

    def field(self) -> tuple[str, Any]:
        name = self.text()
        return name, self.value(self.number("u4"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.bad(f"the metadata type {kind} is unknown")
        item_kind, length = self.number("u4"), self.number("u8")
        if item_kind == _STRING:
            self.check_count(length, 8)
            return [self.text() for _ in range(length)]
        if item_kind not in _SCALARS:
            raise self.bad(f"an array of the metadata type {item_kind} is not read")
        dtype = np.dtype("<" + _SCALARS[item_kind])
        self.check_count(length, dtype.itemsize)
        return np.frombuffer(self.take(length * dtype.itemsize), dtype)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self.text(), self.number("u4")
        if num_dims > _MAX_DIMS:
            raise self.bad(f"{name} has {num_dims} dimensions")
        shape = tuple(self.number("u8") for _ in range(num_dims))[::-1]  # GGUF writes the fastest dimension first
        return name, shape, self.number("u4"), self.number("u8")


def _alignment(header: _Header, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise header.bad(f"general.alignment is {alignment!r}, not a power of two")
    return alignment


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _entry(path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int, data_start: int) -> TensorEntry:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise UnsupportedError(f"{path}: {name} has the tensor type {type_id}, which is unknown") from error
    if (shape[-1] if shape else 1) % block:
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: a row of {name} is not a whole number of {kind.name} blocks")
    label = kind.name.lower()
    num_bytes = math.prod(shape) // block * block_bytes
    return TensorEntry(name, path, _PLAIN.get(label, label), shape, data_start + offset, num_bytes)


def _dequantise(raw: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 [R, row bytes] as float32 [R, row]."""
    from gguf import GGMLQuantizationType, dequantize

    name = {"fp32": "F32", "fp16": "F16"}.get(dtype, dtype.upper())
    return np.asarray(dequantize(raw, GGMLQuantizationType[name]))


@cache
def _can_dequantise(dtype: str) -> bool:
    """Asks the package itself, with one block of zeros: it has no list of what it can do."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = {"fp32": "F32", "fp16": "F16"}.get(dtype, dtype.upper())
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    try:
        with np.errstate(all="ignore"):
            _dequantise(np.zeros((1, block_bytes), np.uint8), dtype)
    except NotImplementedError:
        return False
    return True
