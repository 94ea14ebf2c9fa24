"""The header of one safetensors file, read with distrust, and the mode of one that was written. Knows the format, not
models and not directories.

Format: 8 bytes length of the header (little endian), the header as JSON, the data. The offsets in the header count
from the end of the header.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import FormatError, FormatKind
from runtime.open_file import open_file
from runtime.tensor_entry import TensorEntry, check_ranges

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_DTYPES = {"F32": ("fp32", 4), "F16": ("fp16", 2), "BF16": ("bf16", 2)}
_OTHER_DTYPES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What the header says. `header_bytes` is where the data starts."""

    path: Path
    header_bytes: int
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Reads and checks the header; no tensor is read.

    Raises FormatError: MISSING_FILE, TRUNCATED (the file ends before its header or its data does), BAD_HEADER.
    """
    with open_file(path) as file:
        file_bytes = path.stat().st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(FormatKind.TRUNCATED, f"{path}: {file_bytes} bytes are too few for a safetensors file")
        length = int.from_bytes(prefix, "little")
        _check_length(path, prefix, length, file_bytes)
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: __metadata__ in the header is not an object")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    check_ranges(path, entries.values(), file_bytes)
    return SafetensorsFile(path, 8 + length, {str(k): str(v) for k, v in metadata.items()}, entries)


def open_to_others(path: Path) -> None:
    """Gives a file that the format's own library wrote, for its user alone, the mode that any new file has.

    A packed model is made by one user and served by another.
    """
    mask = os.umask(0o077)  # the only way to ask
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _check_length(path: Path, prefix: bytes, length: int, file_bytes: int) -> None:
    if prefix == b"version ":
        raise FormatError(
            FormatKind.BAD_HEADER, f"{path}: this is a Git LFS pointer, not the file itself; fetch it first"
        )
    if length > _MAX_HEADER_BYTES:
        raise FormatError(
            FormatKind.BAD_HEADER, f"{path}: not a safetensors file, a header of {length} bytes is impossible"
        )
    if 8 + length > file_bytes:
        raise FormatError(
            FormatKind.TRUNCATED, f"{path}: the header ends at byte {8 + length}, but the file has {file_bytes} bytes"
        )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            FormatKind.BAD_HEADER, f"{path}: the header is not JSON that can be trusted ({error})"
        ) from error
    if not isinstance(header, dict):
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: the header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        label, item_bytes = _DTYPES.get(dtype) or (dtype.lower(), _OTHER_DTYPES[dtype])
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: the header's entry for {name} cannot be read") from error
    if not sound or math.prod(shape) * item_bytes != end - begin:
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: shape and byte range of {name} in the header do not agree")
    return TensorEntry(name, path, label, tuple(shape), data_start + begin, end - begin)
