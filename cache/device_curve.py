"""What a read costs on the device that holds a file: measured once, fitted, kept beside the file.

Measured through the reader itself, in every way that it can read here, since that is what will be paid. Knows files,
devices and seconds; not what is read. `device_curve` is the face: it returns what is stored, or measures and stores.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.arena import new_arena
from cache.errors import ReadError
from cache.reader import Reader, ReaderInfo

VERSION = 3
NAME = "device.json"  # beside the file
SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)  # bytes of a read
DEPTHS = (1, 8, 64, 512)  # reads handed over together, then waited for together, as the cache does
LARGEST_BATCH_BYTES = 64 << 20  # of a point: beyond a layer's worth nothing new is learnt
SMALLEST_FILE_BYTES = 32 << 20  # less tells of caches, not of a device
DEFAULT_MERGE_GAP_BYTES = 8 << 10  # without a curve: less than one more request costs (benchmarks/LOG.md)

_LARGEST_MERGE_GAP_BYTES = 12 << 10  # wider gaps double the bytes and gain no time (benchmarks/LOG.md)
_POINT_S = 0.05  # of reading, for each point: 3.5 s in all where there are three ways
_ARENA_BYTES = 4 << 20
_WAYS = ("io_uring", "pread", "buffered")
_MEASURING_DEPTH = 256  # as the cache reads


@dataclass(frozen=True, slots=True)
class Point:
    """`seconds`: of a batch of `depth` scattered reads of `read_bytes` each, from submit to the last byte.

    The lower quartile of many: what others do with the processors meanwhile is not the device's, nor is a batch that
    lay in some cache before it. The shortest promised a fifth more than came (benchmarks/LOG.md).
    """

    read_bytes: int
    depth: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes * self.depth / self.seconds


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Seconds of a batch of reads: batch_s + num_requests * request_s + num_bytes * byte_s."""

    batch_s: float
    request_s: float
    byte_s: float

    @property
    def merge_gap_bytes(self) -> int:
        """The longest gap that costs less to read than one more request does."""
        if self.byte_s <= 0:
            return _LARGEST_MERGE_GAP_BYTES
        return min(_LARGEST_MERGE_GAP_BYTES, int(self.request_s / self.byte_s))

    def seconds(self, num_requests: float, num_bytes: float, num_batches: float = 1) -> float:
        """Of `num_batches` batches that come to so many requests and bytes together."""
        return num_batches * self.batch_s + num_requests * self.request_s + num_bytes * self.byte_s


DEFAULT_READ_COST = ReadCost(100e-6, 12e-6, 0.8e-9)  # of the NVMe disk of DESIGN.md 5, for files too small to tell


@dataclass(frozen=True, slots=True)
class DeviceCurve:
    """Points of each way to read, by the reader's name for it (io_uring+direct, ...), and whose they are."""

    device: str
    ways: dict[str, tuple[Point, ...]]

    def cost(self, way: str) -> ReadCost | None:
        """The fitted cost of a way; None for one that was not measured."""
        points = self.ways.get(way)
        return None if points is None else fit(points)

    def bandwidths(self) -> dict[str, dict[int, float]]:
        """Bytes a second by way and read size, at the largest depth measured: for people."""
        return {w: {p.read_bytes: p.bytes_per_s for p in points} for w, points in self.ways.items()}

    def to_json(self) -> dict[str, Any]:
        ways = {w: [[p.read_bytes, p.depth, p.seconds] for p in points] for w, points in self.ways.items()}
        return {"version": VERSION, "device": self.device, "ways": ways}

    @classmethod
    def from_json(cls, data: Any) -> DeviceCurve | None:
        """What `to_json` wrote; None for anything else, which is measured again."""
        try:
            if data["version"] != VERSION:
                return None
            ways = {str(w): tuple(_point(p) for p in points) for w, points in data["ways"].items()}
            return cls(str(data["device"]), ways)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def device_curve(path: Path, engine: str = "auto") -> DeviceCurve | None:
    """The curve of the device that holds `path`: as stored beside it, else measured now (about 3.5 s) and stored.

    engine: as for `Reader`; a stored curve that lacks the way which that opens, or is of another device, is measured
    again. None where the file is too small to tell. A directory that cannot be written to is no error: then nothing
    is kept. Raises ReadError when the file cannot be read.
    """
    if path.stat().st_size < SMALLEST_FILE_BYTES:
        return None
    way, device, store = reader_info(path, engine).engine, device_of(path), path.parent / NAME
    stored = _stored(store)
    if stored is not None and stored.device == device and way in stored.ways:
        return stored
    curve = DeviceCurve(device, dict(_measured(path, engine)))
    _store(curve, store)
    return curve


def reader_info(path: Path, engine: str = "auto") -> ReaderInfo:
    """How a file is read with `engine`, found by opening it. Raises ReadError."""
    with _opened(path, engine) as reader:
        return reader.info


def cost_and_gap(curve: DeviceCurve | None, way: str) -> tuple[ReadCost, int]:
    """What reads cost in a way, and the bytes worth reading to save a request; defaults where nothing was measured."""
    cost = None if curve is None else curve.cost(way)
    return (DEFAULT_READ_COST, DEFAULT_MERGE_GAP_BYTES) if cost is None else (cost, cost.merge_gap_bytes)


def fit(points: Iterable[Point]) -> ReadCost:
    """The cost whose relative errors over the points are least in squares, no term of it negative."""
    rows = [(1.0, p.depth, p.depth * p.read_bytes, p.seconds) for p in points]
    table = np.array(rows, np.float64)
    terms = table[:, :3] / table[:, 3:]  # each equation divided by its time, so that all weigh the same
    scale = terms.max(axis=0)
    used = [0, 1, 2]
    found = np.zeros(3)
    while used:
        solved, *_ = np.linalg.lstsq(terms[:, used] / scale[used], np.ones(len(rows)), rcond=None)
        if (solved >= 0).all():
            found[used] = solved / scale[used]
            break
        used.remove(used[int(solved.argmin())])
    return ReadCost(*map(float, found))


def measure(reader: Reader, file_bytes: int, sizes: Sequence[int] = SIZES) -> tuple[Point, ...]:
    """Points of one open reader whose arena is `_ARENA_BYTES` long. Raises ReadError."""
    rng = np.random.default_rng()  # other places each time: the host of a virtual machine remembers those of before
    points = [(s, d) for s in sizes for d in DEPTHS if s * d <= LARGEST_BATCH_BYTES]
    return tuple(_measure_point(reader, file_bytes, s, d, rng) for s, d in points)


def device_of(path: Path, sys_root: Path = Path("/sys")) -> str:
    """What tells the device of a file from others: number, size and model, as far as the kernel says."""
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    block = sys_root / "dev" / "block" / name
    words = [name, *(_text(block / part) for part in ("size", "device/model", "../device/model"))]
    return " ".join(word for word in words if word)


def _point(data: Any) -> Point:
    read_bytes, depth, seconds = data
    if not (read_bytes > 0 and depth > 0 and seconds > 0):
        raise ValueError("a point of nothing")
    return Point(int(read_bytes), int(depth), float(seconds))


@contextlib.contextmanager
def _opened(path: Path, engine: str) -> Iterator[Reader]:
    arena = new_arena(_ARENA_BYTES)
    reader = Reader(path, arena, landing=(0, arena.size), engine=engine, queue_depth=_MEASURING_DEPTH)
    try:
        yield reader
    finally:
        reader.close()


def _measured(path: Path, engine: str) -> Iterator[tuple[str, tuple[Point, ...]]]:
    """Each way that opens here. The one that `engine` names must; the others may not."""
    _drop_pages(path)  # of a file just written: buffered reads would be those of memory
    with _opened(path, engine) as reader:
        first = reader.info.engine
        yield first, measure(reader, path.stat().st_size)
    for way in _WAYS:
        with contextlib.suppress(ReadError), _opened(path, way) as reader:
            if reader.info.engine != first:
                yield reader.info.engine, measure(reader, path.stat().st_size)


def _drop_pages(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure_point(reader: Reader, file_bytes: int, size: int, depth: int, rng: np.random.Generator) -> Point:
    lengths = np.full(depth, size, np.int64)
    landing = np.arange(depth, dtype=np.int64) * size % _ARENA_BYTES  # they may land on each other: nobody looks
    times: list[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < _POINT_S:
        offsets = rng.integers(0, file_bytes // size, depth) * size
        before = time.perf_counter()
        reader.wait(reader.submit(offsets, lengths, landing))
        times.append(time.perf_counter() - before)
    return Point(size, depth, float(np.quantile(times, 0.25)))


def _stored(store: Path) -> DeviceCurve | None:
    try:
        return DeviceCurve.from_json(json.loads(store.read_bytes()))
    except (OSError, ValueError):  # not there, not readable, not JSON
        return None


def _store(curve: DeviceCurve, store: Path) -> None:
    """As a whole or not at all, whoever else writes it at the same time."""
    part = store.with_name(f"{store.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(curve.to_json()))
        part.replace(store)
    except OSError:  # a volume that is read-only, or full: measured again next time
        with contextlib.suppress(OSError):
            part.unlink()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
