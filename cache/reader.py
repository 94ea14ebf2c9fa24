"""Many aligned reads of one file at a time, into one arena. Knows a file, byte ranges and devices; not neurons.

io_uring with O_DIRECT where the kernel allows it, else threads that pread with O_DIRECT, else buffered reads whose
pages are dropped again. The reads themselves are native (`cache/native`): there is no Python per read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from cache import _reader as native
from cache.errors import ReadError


@dataclass(frozen=True, slots=True)
class ReaderInfo:
    """How the file is read. `alignment` in bytes, of file offsets, lengths and arena offsets."""

    engine: str  # io_uring+direct, pread+direct, pread+buffered
    alignment: int
    queue_depth: int
    registered: bool  # whether the landing area is registered with io_uring


@dataclass(frozen=True, slots=True)
class ReadResult:
    """`num_bytes` is what the kernel gave; `seconds` from submit to the last completion, less what a ticket waited
    for before has counted: those of all tickets are the time in which anything was under way."""

    num_bytes: int
    num_requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Aligned ranges [R] that cover records [K], and where in the arena each record will then be."""

    offsets: np.ndarray  # int64 [R], in the file
    lengths: np.ndarray  # int64 [R]
    arena_offsets: np.ndarray  # int64 [R]
    record_offsets: np.ndarray  # int64 [K]
    first_records: np.ndarray  # int64 [R], of [0, K): the first record of each range

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    def pieces(self, piece_bytes: int, most: int) -> list[tuple[slice, slice]]:
        """(ranges, records) of consecutive parts, of about `piece_bytes` each or more where there would be over `most`.

        Empty without ranges.
        """
        num = min(most, self.num_bytes // piece_bytes)
        if num <= 1:
            return [(slice(0, self.offsets.size), slice(0, self.record_offsets.size))][: self.offsets.size]
        ends = np.cumsum(self.lengths)
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, num) // num) + 1
        bounds = np.unique(np.concatenate([[0], cuts, [ends.size]]))
        firsts = np.append(self.first_records, self.record_offsets.size)
        return [(slice(a, b), slice(int(firsts[a]), int(firsts[b]))) for a, b in pairwise(bounds.tolist())]


class Reader:
    """One open file. `submit` and `wait` may be interleaved over several tickets. Any thread may call, also `close`
    while another waits; but a call may stand still until another thread's `wait` ends.

    landing: (offset, bytes) of the arena where reads will land; io_uring registers that memory, which pins it.
    engine: auto takes the best that works; io_uring, pread and buffered insist. Raises ReadError when the file cannot
    be opened so.
    """

    def __init__(
        self,
        path: Path,
        arena: np.ndarray,
        *,
        landing: tuple[int, int] = (0, 0),
        engine: str = "auto",
        queue_depth: int = 64,
    ) -> None:
        self._path = str(path)
        try:
            self._native = native.Reader(self._path, arena, *landing, engine, queue_depth)
        except RuntimeError as error:
            raise ReadError(self._path, 0, 0, str(error)) from error
        self.info = ReaderInfo(*self._native.info())

    def submit(self, offsets: np.ndarray, lengths: np.ndarray, arena_offsets: np.ndarray) -> int:
        """Starts reading the ranges, int64 [R] each, all multiples of the alignment; returns a ticket at once.

        A range may end beyond the file's last byte: the bytes up to it are then read. Long ranges are split. ValueError
        for what is not aligned, IndexError for what ends outside of the arena; then nothing was started.
        """
        with self._errors():
            return self._native.submit(offsets, lengths, arena_offsets)

    def wait(self, ticket: int) -> ReadResult:
        """Blocks (without the GIL) until everything of the ticket is there, and forgets it. KeyError for another's.

        Raises ReadError for the first range that failed: an error of the device, or a file that has become shorter.
        """
        with self._errors():
            num_bytes, num_requests, seconds, error, offset, length = self._native.wait(ticket)
        if error:
            raise ReadError(self._path, offset, length, error)
        return ReadResult(num_bytes, num_requests, seconds)

    def done(self, ticket: int) -> bool:
        """Whether `wait` would return at once."""
        with self._errors():
            return self._native.done(ticket)

    def drain(self) -> None:
        """Waits until nothing is under way; tickets keep their results."""
        with self._errors():
            self._native.drain()

    def close(self) -> None:
        """Drains and closes; every later call raises ReadError. Closing twice is harmless."""
        self._native.close()

    def inject(self, fault: str, nth: int = 0, times: int = 1) -> None:
        """For tests: `times` completions from the nth (0: the next) on are changed into eio, short or eagain."""
        with self._errors():
            self._native.inject(fault, nth, times)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the native side says of a closed reader, as ReadError."""
        try:
            yield
        except RuntimeError as error:
            raise ReadError(self._path, 0, 0, str(error)) from error


@dataclass(frozen=True, slots=True)
class ReadVolume:
    """What some reads come to."""

    num_requests: int
    num_bytes: int


def volume(starts: np.ndarray, record_bytes: int, alignment: int, merge_gap_bytes: int) -> ReadVolume:
    """What `plan_reads` would read for these, give or take the edges; in a tenth of its time."""
    if not starts.size:
        return ReadVolume(0, 0)
    gaps = np.diff(starts) - record_bytes
    joined = gaps <= max(merge_gap_bytes, 0)
    num_requests = starts.size - int(np.count_nonzero(joined))
    num_bytes = starts.size * record_bytes + int(gaps[joined].sum()) + num_requests * alignment
    return ReadVolume(num_requests, num_bytes)


def volume_of_absent(
    slot_of: np.ndarray, ids: np.ndarray | None, stride: int, record_bytes: int, alignment: int, merge_gap_bytes: int
) -> ReadVolume:
    """`volume` of those of `ids` (int32 [K] ascending, None: all) whose slot is -1; natively. slot_of: int32 [F] of a
    layer whose records are `stride` apart."""
    return ReadVolume(*native.volume_of_absent(slot_of, ids, stride, record_bytes, alignment, merge_gap_bytes))


def plan_reads(
    starts: np.ndarray,
    record_bytes: int,
    *,
    alignment: int,
    merge_gap_bytes: int,
    staging_offset: int,
    staging_bytes: int,
) -> ReadPlan | None:
    """`plan_reads_numpy`, natively: a tenth of its time."""
    found = native.plan_reads(starts, record_bytes, alignment, merge_gap_bytes, staging_offset, staging_bytes)
    return None if found is None else ReadPlan(*found)


def plan_reads_numpy(
    starts: np.ndarray,
    record_bytes: int,
    *,
    alignment: int,
    merge_gap_bytes: int,
    staging_offset: int,
    staging_bytes: int,
) -> ReadPlan | None:
    """The reads that bring records [starts, starts + record_bytes) of a file into staging; None when they do not fit.

    starts: int64 [K] ascending. Neighbours whose gap is at most `merge_gap_bytes` share a read, gap included (Ripple's
    "access collapse", arXiv 2410.19274); so do those whose aligned ranges touch, so that no block is read twice.
    """
    if not starts.size:
        nothing = np.empty(0, np.int64)
        return ReadPlan(nothing, nothing, nothing, nothing, nothing)
    begins = starts // alignment * alignment
    ends = -(-(starts + record_bytes) // alignment) * alignment
    far = (starts[1:] - starts[:-1] - record_bytes > merge_gap_bytes) & (begins[1:] > ends[:-1])
    first = np.concatenate([[0], np.flatnonzero(far) + 1])  # index of each read's first record
    last = np.concatenate([first[1:] - 1, [starts.size - 1]])
    offsets, lengths = begins[first], ends[last] - begins[first]
    places = np.concatenate([[0], np.cumsum(lengths)])
    if places[-1] > staging_bytes:
        return None
    read_of = np.repeat(np.arange(first.size), last - first + 1)
    arena_offsets = staging_offset + places[:-1]
    return ReadPlan(offsets, lengths, arena_offsets, (arena_offsets - offsets)[read_of] + starts, first)
