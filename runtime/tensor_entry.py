"""One tensor inside a file: where its bytes lie, and how they are read without leaving the file in memory.

Knows files and byte ranges; not the formats that say where a tensor is, and not what it means.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache.errors import FormatError, FormatKind, ReadError
from runtime.open_file import open_file

PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # stored as computed with
_PIECE_BYTES = 8 << 20  # read at once: large enough for the disk, small enough for the budget's headroom of file pages


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """`dtype` is bf16, fp16, fp32 or the format's own name in lower case; `offset` counts from the file's start."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_into(path: Path, offset: int, out: np.ndarray) -> None:
    """Fills uint8 [N] `out` from the file at byte `offset`, and drops the pages again from the page cache.

    Raises FormatError: MISSING_FILE when the file is gone, TRUNCATED when it ends before the range does; ReadError when
    the disk fails.
    """
    view = out.data
    with open_file(path) as file:
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            _read_piece(file.fileno(), path, offset + start, piece)
            os.posix_fadvise(file.fileno(), offset + start, len(piece), os.POSIX_FADV_DONTNEED)


def _read_piece(fd: int, path: Path, offset: int, out: memoryview) -> None:
    done = 0
    while done < len(out):
        try:
            num = os.preadv(fd, [out[done:]], offset + done)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ReadError(str(path), offset + done, len(out) - done, reason) from error
        if num == 0:
            raise FormatError(
                FormatKind.TRUNCATED,
                f"{path}: the file ends at byte {offset + done}, {len(out) - done} bytes too early",
            )
        done += num


def check_ranges(path: Path, entries: Iterable[TensorEntry], file_bytes: int) -> None:
    """FormatError when two tensors overlap (BAD_HEADER) or one ends behind the file (TRUNCATED)."""
    end, previous = 0, ""
    for entry in sorted(entries, key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset < end:
            raise FormatError(FormatKind.BAD_HEADER, f"{path}: the bytes of {entry.name} and {previous} overlap")
        end, previous = entry.offset + entry.num_bytes, entry.name
        if end > file_bytes:
            raise FormatError(
                FormatKind.TRUNCATED, f"{path}: {entry.name} ends at byte {end}, but the file has {file_bytes} bytes"
            )
