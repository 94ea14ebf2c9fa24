"""Many records of an arena at once: moving and checking them, natively, at about the speed of memory.

Knows bytes of one arena and the checksum of `cache.bundle`; not who owns a slot, and no file. The GIL is dropped.
"""

from __future__ import annotations

import numpy as np

from cache import _reader as native
from cache.bundle import CHECKSUM_SEED


def copy_records(arena: np.ndarray, from_offsets: np.ndarray, to_offsets: np.ndarray, num_bytes: int) -> None:
    """Copies `num_bytes` bytes from each of `from_offsets` to the one of `to_offsets` beside it.

    arena: uint8 [N], writable; offsets: int64 [K], in bytes, of any alignment. No destination may overlap a source or
    another destination of the same call (not checked: the outcome is then undefined). IndexError when a range is not
    within the arena, ValueError when the offsets differ in number or num_bytes is negative, TypeError for other dtypes;
    then nothing was copied.
    """
    native.copy_records(arena, from_offsets, to_offsets, num_bytes)


def first_bad_record(arena: np.ndarray, offsets: np.ndarray, checksum_offset: int, weights: np.ndarray) -> int:
    """Index into `offsets` of the first record that is not what `cache.bundle.checksums` says; -1 when all are right.

    arena: uint8 [N]; offsets: int64 [K], in bytes, of any alignment; weights: `checksum_weights(layout)`, uint64
    [checksum_offset / 8], computed once by the caller. IndexError when a record does not end within the arena,
    ValueError when the weights are not those of checksum_offset, TypeError for other dtypes.
    """
    return native.first_bad_record(arena, offsets, checksum_offset, weights, int(CHECKSUM_SEED))
