"""The home tier on disk: which bytes of the bundle file a neuron's record is. Knows files and records, not slots."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.bundle import BundleLayout, checksums, stored_checksums
from cache.errors import FormatError, FormatKind, ReadError

_PIECE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class BundleFile:
    """Where the records lie: layer l's neuron i at `layer_offsets[l] + i * layout.stride` of `path`."""

    path: Path
    layout: BundleLayout
    num_neurons: int  # F
    layer_offsets: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layer_offsets)

    @property
    def layer_bytes(self) -> int:
        return self.num_neurons * self.layout.stride

    def starts(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """File offsets of the records of `ids`, int64 [K]."""
        return self.layer_offsets[layer] + ids.astype(np.int64) * self.layout.stride

    def pieces(self, layer: int) -> Iterator[tuple[int, np.ndarray]]:
        """A layer past any cache: (first neuron, records uint8 [n, stride]) in order, a few MiB at a time.

        Checksums are verified, and the pages dropped again. Raises ReadError.
        """
        step = max(1, _PIECE_BYTES // self.layout.stride)
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:  # moved, or no longer ours to read
            raise _read_error(self.path, self.layer_offsets[layer], self.layer_bytes, error) from error
        with file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # read what is asked for and no more
            for start in range(0, self.num_neurons, step):
                num = min(step, self.num_neurons - start)
                yield start, self._piece(file.fileno(), layer, start, num)

    def _piece(self, fd: int, layer: int, start: int, num: int) -> np.ndarray:
        offset, wanted = self.layer_offsets[layer] + start * self.layout.stride, num * self.layout.stride
        try:
            data = os.pread(fd, wanted, offset)
        except OSError as error:
            raise _read_error(self.path, offset, wanted, error) from error
        os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)
        if len(data) < wanted:
            raise ReadError(str(self.path), offset, wanted, "the file ends too early")
        records = np.frombuffer(data, np.uint8).reshape(num, self.layout.stride)
        if (checksums(self.layout, records) != stored_checksums(self.layout, records)).any():
            raise ReadError(str(self.path), offset, wanted, f"wrong checksum (layer {layer})")
        return records

    def check(self) -> None:
        """Raises FormatError when the file is missing or shorter than its layers."""
        if not self.path.is_file():
            raise FormatError(FormatKind.MISSING_FILE, f"{self.path}: the bundle file is missing")
        end, size = max(self.layer_offsets) + self.layer_bytes, self.path.stat().st_size
        if size < end:
            raise FormatError(FormatKind.TRUNCATED, f"{self.path}: {size} bytes long, its layers end at {end}")


def _read_error(path: Path, offset: int, num_bytes: int, error: OSError) -> ReadError:
    return ReadError(str(path), offset, num_bytes, error.strerror or str(error))
