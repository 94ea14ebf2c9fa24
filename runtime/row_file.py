"""A matrix that stays in its file: rows are read when they are asked for. Knows a file and rows; not what they mean.

Of an embedding a token needs one row, so that a copy in memory would be better spent on neurons. Reads are buffered,
without read-ahead, and their pages dropped: a few KiB at some 100 µs, once a token.
"""

from __future__ import annotations

import os
import weakref

import torch

from cache.errors import ReadError
from runtime.open_file import open_file
from runtime.tensor_entry import PLAIN_DTYPES, TensorEntry


class RowFile:
    """Rows of `entry` [N, D], stored as one of PLAIN_DTYPES, given in `dtype`. The file is open until this is garbage.

    Raises FormatError when it is gone.
    """

    def __init__(self, entry: TensorEntry, dtype: torch.dtype) -> None:
        self._entry, self._dtype, self._stored = entry, dtype, PLAIN_DTYPES[entry.dtype]
        with open_file(entry.path) as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ids int64 [n], each below N: [n, D]. Raises ReadError."""
        unique, places = torch.unique(ids, return_inverse=True)
        rows = torch.empty(unique.numel(), self._entry.shape[1], dtype=self._stored)
        view = rows.view(torch.uint8).numpy()
        for place, row in enumerate(unique.tolist()):
            self._read(row, view[place].data)
        return rows.to(self._dtype)[places]

    def _read(self, row: int, out: memoryview) -> None:
        path, offset = str(self._entry.path), self._entry.offset + row * len(out)
        try:
            num = os.preadv(self._fd, [out], offset)
        except OSError as error:
            raise ReadError(path, offset, len(out), str(error.strerror)) from error
        os.posix_fadvise(self._fd, offset, len(out), os.POSIX_FADV_DONTNEED)
        if num < len(out):
            raise ReadError(path, offset, len(out), f"the file ends at byte {os.fstat(self._fd).st_size}")
