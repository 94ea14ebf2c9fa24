"""Aligned reads: every byte, every count, every way a disk can fail, on each engine. No neurons here."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cache.bundle import BundleDtype, BundleLayout
from cache.errors import ReadError
from cache.reader import Reader, plan_reads, plan_reads_numpy, volume, volume_of_absent
from cache.store import BundleFile

MIB = 1 << 20
ENGINES = ["io_uring", "pread", "buffered"]
IO_URING = {"setup": 425, "enter": 426, "register": 427}  # numbers of the system calls, the same on every architecture
MakeReader = Callable[..., Reader]

# Denies one system call to this process by seccomp, before or after a reader is opened, and reads with engine="auto".
DENIED = """
import ctypes, mmap, struct, sys
from pathlib import Path
import numpy as np
from cache.errors import ReadError
from cache.reader import Reader

def deny(number):
    load, equal, give = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, 0x00050001), (give, 0, 0, 0x7FFF0000)]  # EPERM, allow
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("H6xQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        print("no seccomp")
        raise SystemExit

def ints(*values):
    return np.array(values, np.int64)

number, when = int(sys.argv[2]), sys.argv[3]
arena = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
if when == "before":
    deny(number)
reader = Reader(Path(sys.argv[1]), arena, landing=(0, 1 << 20))
print(reader.info.engine, reader.info.registered)
if when == "after":
    deny(number)
    tickets = [reader.submit(ints(0, 8192), ints(4096, 4096), ints(0, 8192)) for _ in range(3)]
    for ticket in tickets:
        try:
            reader.wait(ticket)
        except ReadError as error:
            print(error.reason)
    reader.drain()
    reader.close()
else:
    result = reader.wait(reader.submit(ints(4096), ints(8192), ints(0)))
    print(result.num_bytes, int(arena[:8192].sum()))
"""

# Leaves address space for a few more threads only, then reads with as many as there are.
FEW_THREADS = """
import mmap, resource, sys
from pathlib import Path
import numpy as np
from cache.reader import Reader

arena = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
pages = int(Path("/proc/self/statm").read_text().split()[0])
stack = 8 << 20
resource.setrlimit(resource.RLIMIT_STACK, (stack, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + int(float(sys.argv[2]) * stack),) * 2)
reader = Reader(Path(sys.argv[1]), arena, engine="buffered")
blocks = np.arange(16) * 4096
result = reader.wait(reader.submit(blocks, np.full(16, 4096), blocks))
print(reader.info.queue_depth, result.num_bytes, int(arena[:65536].sum()))
reader.close()
"""


# statx(2) of a file system whose direct reads must be that long, as OpenZFS says of its records.
LONG_BLOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/stat.h>
#include <stdarg.h>
#include <sys/syscall.h>

long syscall(long number, ...) {
  va_list list;
  long a[6];
  va_start(list, number);
  for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
  va_end(list);
  long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  long found = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  if (number == SYS_statx && found == 0) {
    struct statx* s = (struct statx*)a[4];
    s->stx_mask |= STATX_DIOALIGN;
    s->stx_dio_mem_align = 4096;
    s->stx_dio_offset_align = 128 << 10;
  }
  return found;
}
"""

READ_A_BLOCK = """
import mmap, sys
from pathlib import Path
import numpy as np
from cache.reader import Reader

arena = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
reader = Reader(Path(sys.argv[1]), arena, landing=(0, arena.size))
block = np.array([4096])
result = reader.wait(reader.submit(block, block, block))
print(reader.info.engine, reader.info.alignment, result.num_bytes, int(arena[4096:8192].sum()))
reader.close()
"""


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def new_arena(size: int = 4 * MIB) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def write(path: Path, size: int, seed: int = 0) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    with path.open("wb") as file:
        file.write(data.tobytes())
        os.fsync(file.fileno())
    return data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.bin"


@pytest.fixture
def make() -> Iterator[MakeReader]:
    """Opens readers and closes them after the test; skips, by name, what this kernel or file system refuses."""
    opened: list[Reader] = []

    def build(path: Path, arena: np.ndarray, engine: str, **more: int) -> Reader:
        try:
            reader = Reader(path, arena, landing=(0, arena.size), engine=engine, **more)
        except ReadError as error:
            if error.reason in ("cannot be opened with O_DIRECT", "io_uring is not available"):
                pytest.skip(f"{engine}: {error.reason} here")
            raise
        opened.append(reader)
        return reader

    yield build
    for reader in opened:
        reader.close()


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_scattered_ranges_arrive_whole_and_nothing_else_is_written(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, 4 * MIB), new_arena()
    arena[:] = 0xA5  # a canary everywhere
    reader = make(file, arena, engine)
    rng = np.random.default_rng(1)
    blocks = rng.permutation(512)[:300] * 8192  # more requests than the queue is deep, each alone in 8 KiB
    places = rng.permutation(512)[:300] * 8192
    result = reader.wait(reader.submit(blocks, np.full(300, 4096), places))
    expected = np.full(arena.size, 0xA5, np.uint8)
    for block, place in zip(blocks, places, strict=True):
        expected[place : place + 4096] = data[block : block + 4096]
    np.testing.assert_array_equal(arena, expected)
    assert (result.num_bytes, result.num_requests) == (300 * 4096, 300)
    assert 0 < result.seconds < 60


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("length", "requests"), [(MIB, 1), (MIB + 4096, 2), (3 * MIB, 3)])
def test_long_ranges_are_split(file: Path, make: MakeReader, engine: str, length: int, requests: int) -> None:
    data, arena = write(file, 4 * MIB), new_arena()
    reader = make(file, arena, engine, queue_depth=1)
    result = reader.wait(reader.submit(ints(4096), ints(length), ints(8192)))
    assert (result.num_bytes, result.num_requests) == (length, requests)
    np.testing.assert_array_equal(arena[8192 : 8192 + length], data[4096 : 4096 + length])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tail", [1, 511, 512, 4095])
def test_the_last_block_ends_with_the_file(file: Path, make: MakeReader, engine: str, tail: int) -> None:
    data, arena = write(file, 8192 + tail), new_arena()
    reader = make(file, arena, engine)
    align = reader.info.alignment
    length = 4096 + -(-tail // align) * align
    result = reader.wait(reader.submit(ints(4096), ints(length), ints(0)))
    assert result.num_bytes == 4096 + tail
    np.testing.assert_array_equal(arena[: 4096 + tail], data[4096:])
    assert not arena[length:].any()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_random_ranges_of_any_length_up_to_the_files_end(file: Path, make: MakeReader, engine: str) -> None:
    size = 5 * MIB + 1234
    data, arena = write(file, size), new_arena(8 * MIB)
    reader = make(file, arena, engine)
    align, rng = reader.info.alignment, np.random.default_rng(6)
    last = -(-size // align) * align
    for _ in range(4):
        lengths = np.concatenate([rng.integers(1, 2 * MIB, 3), rng.integers(1, 40_000, 12)])
        lengths = -(-rng.permutation(lengths) // align) * align
        offsets = rng.integers(0, last - lengths) // align * align
        offsets[0] = last - lengths[0]  # one ends with the file
        places = np.cumsum(lengths + align) - lengths
        arena[:] = 0xA5
        expected = arena.copy()
        for offset, length, place in zip(offsets, lengths, places, strict=True):
            expected[place : place + min(length, size - offset)] = data[offset : offset + length]
        result = reader.wait(reader.submit(offsets, lengths, places))
        end = places[0] + lengths[0]
        expected[end - (last - size) : end] = arena[end - (last - size) : end]  # behind the file's end: anything
        np.testing.assert_array_equal(arena, expected)
        assert result.num_requests == int((-(-lengths // MIB)).sum())
        assert result.num_bytes == int(np.minimum(lengths, size - offsets).sum())


@pytest.mark.parametrize("engine", ENGINES)
def test_many_tickets_are_held_and_waited_for_in_any_order(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, 4 * MIB), new_arena()
    reader = make(file, arena, engine, queue_depth=4)
    each = np.arange(64) * 4096
    tickets = [reader.submit(each + i * 65536 * 4, np.full(64, 4096), each + i * 65536 * 4) for i in range(16)]
    assert len(set(tickets)) == 16
    for ticket in np.random.default_rng(2).permutation(tickets).tolist():
        assert reader.wait(ticket).num_bytes == 64 * 4096
    np.testing.assert_array_equal(arena, data)


@pytest.mark.parametrize("engine", ENGINES)
def test_done_drain_and_empty_tickets(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, MIB), new_arena()
    reader = make(file, arena, engine, queue_depth=2)
    empty = reader.submit(ints(), ints(), ints())
    assert reader.done(empty)
    assert reader.wait(empty).num_bytes == 0
    polled = reader.submit(np.arange(64) * 4096, np.full(64, 4096), np.arange(64) * 4096)
    while not reader.done(polled):  # done() alone must bring all 64 through a queue of 2
        pass
    drained = reader.submit(ints(524288), ints(524288), ints(524288))
    reader.drain()
    assert reader.done(drained)
    np.testing.assert_array_equal(arena[:262144], data[:262144])
    np.testing.assert_array_equal(arena[524288:MIB], data[524288:])
    assert [reader.wait(t).num_bytes for t in (drained, polled)] == [524288, 262144]
    with pytest.raises(KeyError, match="waited for already"):
        reader.wait(polled)


def test_a_direct_reader_is_registered_and_says_how_it_reads(file: Path, make: MakeReader) -> None:
    write(file, MIB)
    for engine, name in zip(ENGINES, ("io_uring+direct", "pread+direct", "pread+buffered"), strict=True):
        info = make(file, new_arena(), engine).info
        assert info.engine == name
        assert info.alignment in (512, 4096)
        assert 1 <= info.queue_depth <= 64
        assert engine == "io_uring" or not info.registered


def test_counted_bytes_are_what_the_kernel_says_was_read(file: Path, make: MakeReader) -> None:
    write(file, 16 * MIB)
    for engine in ("io_uring", "pread"):
        reader = make(file, new_arena(), engine)
        offsets = np.random.default_rng(3).permutation(4096)[:600] * 4096
        before = _read_bytes()
        result = reader.wait(reader.submit(offsets, np.full(600, 4096), np.arange(600) * 4096))
        assert result.num_bytes == 600 * 4096
        assert _read_bytes() - before == pytest.approx(result.num_bytes, rel=0.02), engine


def _read_bytes() -> int:
    """What this process has had read from devices, bytes."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError as error:
        pytest.skip(f"/proc/self/io cannot be read here: {error.strerror}")
    return int(fields["read_bytes"])


def test_buffered_reads_leave_no_pages_behind(file: Path, make: MakeReader) -> None:
    write(file, 4 * MIB)
    with file.open("rb") as written:  # those of the writing lie in folios larger than one read, and would stay
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _resident_pages(file):
        pytest.skip("this file system keeps pages that it was asked to drop")
    reader = make(file, new_arena(), "buffered")
    for _ in range(3):
        reader.wait(reader.submit(ints(0), ints(4 * MIB), ints(0)))
    assert _resident_pages(file) <= 8  # of 1024


def _resident_pages(path: Path) -> int:
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as pages:
        view = (ctypes.c_char * size).from_buffer(pages)
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        status = ctypes.CDLL(None).mincore(ctypes.byref(view), ctypes.c_size_t(size), found)
        del view
        assert status == 0
        return sum(page & 1 for page in found)


# -- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_error_is_one_tickets_error_and_names_the_range(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, MIB), new_arena()
    reader = make(file, arena, engine)
    reader.inject("eio")
    bad = reader.submit(ints(8192), ints(4096), ints(0))
    with pytest.raises(ReadError, match=r"data.bin: reading 4096 bytes at offset 8192 failed") as caught:
        reader.wait(bad)
    assert caught.value.reason == os.strerror(errno.EIO)
    assert reader.wait(reader.submit(ints(8192), ints(4096), ints(0))).num_bytes == 4096
    np.testing.assert_array_equal(arena[:4096], data[8192:12288])


@pytest.mark.parametrize("engine", ENGINES)
def test_one_error_among_many_does_not_lose_the_others(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, 4 * MIB), new_arena()
    reader = make(file, arena, engine, queue_depth=8)
    reader.inject("eio", nth=50)
    all_of_it = np.arange(256) * 16384
    with pytest.raises(ReadError) as caught:
        reader.wait(reader.submit(all_of_it, np.full(256, 16384), all_of_it))
    failed = caught.value.offset
    assert failed % 16384 == 0
    kept = np.ones(4 * MIB, bool)
    kept[failed : failed + 16384] = False
    np.testing.assert_array_equal(arena[kept], data[kept])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["short", "eagain"])
def test_short_and_refused_reads_are_finished(file: Path, make: MakeReader, engine: str, fault: str) -> None:
    data, arena = write(file, MIB), new_arena()
    reader = make(file, arena, engine)
    for nth, length in ((0, 512 * 1024), (0, 4096), (1, MIB)):
        arena[:] = 0
        reader.inject(fault, nth)
        lengths = np.full(MIB // length, length)
        places = np.arange(lengths.size) * length
        assert reader.wait(reader.submit(places, lengths, places)).num_bytes == MIB  # each byte counted once
        np.testing.assert_array_equal(arena[:MIB], data)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_storm_of_refusals_passes_or_is_told(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, MIB), new_arena()
    reader = make(file, arena, engine)
    blocks = np.arange(8) * 4096
    reader.inject("eagain", times=400)
    assert reader.wait(reader.submit(blocks, np.full(8, 4096), blocks)).num_bytes == 32768
    np.testing.assert_array_equal(arena[:32768], data[:32768])
    reader.inject("eagain", times=10**9)
    with pytest.raises(ReadError) as caught:
        reader.wait(reader.submit(ints(4096), ints(4096), ints(0)))
    assert caught.value.reason == os.strerror(errno.EAGAIN)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [0, 4096, 70_000, 98_303])
def test_a_file_cut_after_it_was_opened_is_an_error(file: Path, make: MakeReader, engine: str, size: int) -> None:
    write(file, 131072)
    reader = make(file, new_arena(), engine)
    os.truncate(file, size)
    with pytest.raises(ReadError) as caught:
        reader.wait(reader.submit(ints(0), ints(98304), ints(0)))
    assert caught.value.reason == f"the file ends at byte {size}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("offset", "length"), [(1 << 20, 4096), (102400, 4096), (98304, 8192), (0, 2 * MIB)])
def test_a_range_beyond_the_files_last_block_is_an_error(
    file: Path, make: MakeReader, engine: str, offset: int, length: int
) -> None:
    write(file, 100_000)  # the last block of 4096 ends at 102400
    reader = make(file, new_arena(), engine)
    with pytest.raises(ReadError, match="the file ends at byte 100000"):
        reader.wait(reader.submit(ints(offset), ints(length), ints(0)))


@pytest.mark.parametrize("engine", ENGINES)
def test_closing_waits_for_what_is_under_way(file: Path, make: MakeReader, engine: str) -> None:
    data, arena = write(file, 4 * MIB), new_arena()
    reader = make(file, arena, engine, queue_depth=2)
    ticket = reader.submit(np.arange(64) * 65536, np.full(64, 65536), np.arange(64) * 65536)
    reader.close()
    np.testing.assert_array_equal(arena, data)  # no read lands after close
    reader.close()
    calls: list[Callable[[], object]] = [
        lambda: reader.submit(ints(0), ints(4096), ints(0)),
        lambda: reader.wait(ticket),
        lambda: reader.done(ticket),
        reader.drain,
        lambda: reader.inject("eio"),
    ]
    for call in calls:
        with pytest.raises(ReadError, match="the reader is closed"):
            call()


@pytest.mark.parametrize("engine", ENGINES)
def test_closing_while_another_thread_waits(file: Path, make: MakeReader, engine: str) -> None:
    data, places = write(file, 4 * MIB), np.arange(64) * 65536
    for _ in range(10):
        arena = new_arena()
        reader = make(file, arena, engine, queue_depth=4)
        ticket = reader.submit(places, np.full(64, 65536), places)
        outcomes: list[object] = []
        threads = [threading.Thread(target=_try_to_wait, args=(reader, ticket, outcomes)) for _ in range(3)]
        for thread in threads:
            thread.start()
        reader.close()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(arena, data)
        read = [o for o in outcomes if o == 4 * MIB]
        assert len(read) <= 1  # a ticket is one thread's; whoever is late is told so
        assert set(outcomes) - set(read) <= {KeyError, ReadError}
        assert len(outcomes) == 3


def _try_to_wait(reader: Reader, ticket: int, outcomes: list[object]) -> None:
    try:
        outcomes.append(reader.wait(ticket).num_bytes)
    except (KeyError, ReadError) as error:
        outcomes.append(type(error))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dropped_reader_gives_back_its_descriptors_and_threads(file: Path, engine: str, make: MakeReader) -> None:
    write(file, 4 * MIB)
    make(file, new_arena(), engine).close()
    descriptors, threads = _descriptors(), _threads()
    for _ in range(5):
        reader = Reader(file, new_arena(), engine=engine)
        reader.submit(np.arange(64) * 65536, np.full(64, 65536), np.arange(64) * 65536)
        del reader  # with reads under way
    gc.collect()
    assert _descriptors() <= descriptors  # the collector may also have closed what earlier tests left
    assert _threads() <= threads


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _threads() -> set[str]:
    """Of this process, without io_uring's kernel workers, which idle for a while on their own."""
    names = {p.parent.name: p.read_text() for p in Path("/proc/self/task").glob("*/comm")}
    return {task for task, name in names.items() if not name.startswith("iou-")}


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_ranges_are_refused_before_anything_starts(file: Path, make: MakeReader, engine: str) -> None:
    write(file, MIB)
    arena = new_arena()
    reader = make(file, arena, engine)
    good = (ints(0), ints(4096), ints(0))
    for offset, length, place in ((1, 4096, 0), (0, 4095, 0), (0, 4096, 1), (-4096, 4096, 0), (0, 0, 0), (0, -4096, 0)):
        with pytest.raises(ValueError, match="empty, negative or not aligned"):
            reader.submit(ints(0, offset), ints(4096, length), ints(0, place))
    for place in (arena.size, arena.size + 4096, -4096):
        with pytest.raises(IndexError, match="outside of the arena"):
            reader.submit(ints(0), ints(4096), ints(place))
    with pytest.raises(ValueError, match="2\\^63"):
        reader.submit(ints(2**63 - 4096), ints(8192), ints(0))
    with pytest.raises(ValueError, match="differ in length"):
        reader.submit(ints(0, 4096), *good[1:])
    with pytest.raises(TypeError):
        reader.submit(good[0].astype(np.int32), *good[1:])
    with pytest.raises(TypeError):
        reader.submit(np.arange(0, 16384, 4096)[::2], ints(4096, 4096), ints(0, 4096))
    with pytest.raises(KeyError):
        reader.wait(12345)
    assert not arena.any()


def test_bad_readers_are_refused(file: Path, tmp_path: Path) -> None:
    write(file, MIB)
    arena = new_arena()
    for engine in ("auto", *ENGINES):
        with pytest.raises(ReadError, match="No such file"):
            Reader(tmp_path / "absent", arena, engine=engine)
        with pytest.raises(ReadError, match="not a regular file"):
            Reader(tmp_path, arena, engine=engine)
        with pytest.raises(ValueError, match="start at a multiple"):
            Reader(file, arena[8:], engine=engine)
    with pytest.raises(ValueError, match="engine: one of"):
        Reader(file, arena, engine="mmap")
    for depth in (0, -1, 5000):
        with pytest.raises(ValueError, match="queue_depth"):
            Reader(file, arena, queue_depth=depth)
    with pytest.raises(ValueError, match="landing lies outside"):
        Reader(file, arena, landing=(4096, arena.size))
    with pytest.raises(TypeError):
        Reader(file, np.zeros(MIB, np.int8))
    readonly = np.zeros(MIB, np.uint8)
    readonly.flags.writeable = False
    with pytest.raises(TypeError):
        Reader(file, readonly)


def run_child(script: str, *arguments: object) -> list[str]:
    """What the script prints, by lines; skips where seccomp filters cannot be set."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if child.stdout.startswith("no seccomp"):
        pytest.skip("seccomp filters cannot be set here")
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.parametrize("call", ["setup", "enter", "register"])
def test_where_io_uring_is_denied_threads_read_instead(file: Path, make: MakeReader, call: str) -> None:
    data = write(file, 65536)
    opened = [make(file, new_arena(), engine).info.engine for engine in ("auto", "buffered")]
    best = "pread+direct" if opened[0].endswith("direct") else opened[1]
    expected = opened[0] if call == "register" else best  # buffers need not be registered
    how, read = run_child(DENIED, file, IO_URING[call], "before")
    assert how == f"{expected} False"
    assert read == f"8192 {int(data[4096:12288].sum())}"


def test_io_uring_denied_after_it_was_opened_fails_reads_and_nothing_else(file: Path, make: MakeReader) -> None:
    write(file, 65536)
    make(file, new_arena(), "io_uring")
    how, *reasons = run_child(DENIED, file, IO_URING["enter"], "after")
    assert how.startswith("io_uring+direct")
    assert reasons == [f"io_uring_enter: {os.strerror(errno.EPERM)}"] * 3


def test_fewer_threads_than_wanted_read_all_the_same(file: Path) -> None:
    data = write(file, 65536)
    (line,) = run_child(FEW_THREADS, file, 3.7)
    threads, num_bytes, total = map(int, line.split())
    assert 1 <= threads < 16
    assert (num_bytes, total) == (65536, int(data.sum()))


def test_where_direct_reads_must_be_longer_than_records_they_are_buffered(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, source, library = write(file, MIB), tmp_path / "statx.c", tmp_path / "statx.so"
    source.write_text(LONG_BLOCKS)
    compiler = next(c for c in ("cc", "gcc", "clang") if shutil.which(c))  # what the native module was built with
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    (line,) = run_child(READ_A_BLOCK, file)
    assert line.split() == ["pread+buffered", "4096", "4096", str(int(data[4096:8192].sum()))]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_seconds_of_tickets_under_way_together_are_counted_once(file: Path, make: MakeReader, engine: str) -> None:
    write(file, 16 * MIB)
    reader, start = make(file, new_arena(16 * MIB), engine), time.perf_counter()
    blocks = np.arange(4096, dtype=np.int64).reshape(8, 512) * 4096
    tickets = [reader.submit(part, np.full(512, 4096), part) for part in blocks]
    found = [reader.wait(ticket).seconds for ticket in tickets]
    assert min(found) >= 0 < found[0]
    assert sum(found) <= time.perf_counter() - start


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_brings_every_record_and_reads_no_block_twice(file: Path, make: MakeReader) -> None:
    data, arena = write(file, 4 * MIB), new_arena()
    rng = np.random.default_rng(4)
    reader = make(file, arena, "buffered")
    for record, stride, gap in ((3464, 3464, 0), (1000, 1024, 4096), (100, 128, 0), (9000, 9000, 20000)):
        starts = 777 + np.sort(rng.permutation((4 * MIB - 777) // stride)[:150]) * stride
        plan = plan_reads(
            starts, record, alignment=4096, merge_gap_bytes=gap, staging_offset=4096, staging_bytes=arena.size - 4096
        )
        assert plan is not None
        ends = plan.offsets + plan.lengths
        assert (plan.offsets[1:] > ends[:-1]).all()  # apart, and in order
        assert not (plan.offsets % 4096).any()
        assert not (plan.lengths % 4096).any()
        assert plan.arena_offsets.tolist() == (4096 + np.cumsum(plan.lengths) - plan.lengths).tolist()
        assert reader.wait(reader.submit(plan.offsets, plan.lengths, plan.arena_offsets)).num_bytes == plan.num_bytes
        for start, place in zip(starts, plan.record_offsets, strict=True):
            np.testing.assert_array_equal(arena[place : place + record], data[start : start + record])


def naive_blocks(starts: np.ndarray, record: int, align: int, gap: int) -> set[int]:
    """The blocks that must be read, one by one: those of records, and of gaps that are not worth a request."""
    blocks: set[int] = set()
    for i, start in enumerate(starts.tolist()):
        end = start + record
        blocks.update(b for b in range(start // align, -(-end // align)))
        if i + 1 < starts.size and int(starts[i + 1]) - end <= gap:
            blocks.update(b for b in range(end // align, int(starts[i + 1]) // align + 1))
    return blocks


@pytest.mark.parametrize("seed", range(40))
def test_plans_are_those_of_a_naive_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        align = int(rng.choice([512, 4096]))
        record = int(rng.choice([1, 100, align, align + 8, 3464, 13_000]))
        stride = record + int(rng.choice([0, 0, 56, 5000]))
        gap = int(rng.choice([0, 1, 511, 4096, 30_000]))
        count = int(rng.integers(1, 60))
        chosen = np.sort(rng.choice(count * int(rng.choice([1, 3, 40])), count, replace=False))
        starts = chosen * stride + int(rng.integers(0, 10_000))
        blocks = naive_blocks(starts, record, align, gap)
        staging, need = int(rng.integers(0, 10)) * align, len(blocks) * align
        place = partial(plan_reads, starts, record, alignment=align, merge_gap_bytes=gap, staging_offset=staging)
        assert place(staging_bytes=need - 1) is None
        plan = place(staging_bytes=need)
        assert plan is not None
        assert plan.num_bytes == need
        place_of: dict[int, int] = {}  # block -> where it lands
        for offset, length, to in np.stack([plan.offsets, plan.lengths, plan.arena_offsets], 1).tolist():
            assert offset % align == length % align == to % align == 0 < length
            for at in range(0, length, align):
                assert (offset + at) // align not in place_of  # no block is read twice
                place_of[(offset + at) // align] = to + at
        assert set(place_of) == blocks
        assert sorted(place_of.values()) == list(range(staging, staging + need, align))  # and none lands on another
        assert len(plan.offsets) == 1 + sum(b + 1 not in blocks for b in sorted(blocks)[:-1])  # as few as can be
        for start, at in zip(starts.tolist(), plan.record_offsets.tolist(), strict=True):
            for byte in {0, record // 2, record - 1, *range(-start % align, record, align)}:
                if byte < record:
                    assert place_of[(start + byte) // align] + (start + byte) % align == at + byte


@pytest.mark.parametrize(("gap", "reads"), [(0, [1, 1]), (7999, [1, 1]), (8000, [2])])
def test_neighbours_share_a_read_across_a_gap(gap: int, reads: list[int]) -> None:
    starts = ints(0, 8192 + 808)  # 1000 bytes each, 8000 between them
    plan = plan_reads(starts, 1000, alignment=512, merge_gap_bytes=gap, staging_offset=0, staging_bytes=MIB)
    assert plan is not None
    assert plan.offsets.size == len(reads)


@pytest.mark.parametrize(("second", "reads"), [(1023, 1), (1024, 1), (1535, 1), (1536, 2)])
def test_reads_whose_aligned_ranges_touch_are_one(second: int, reads: int) -> None:
    plan = plan_reads(
        ints(10, second), 600, alignment=512, merge_gap_bytes=0, staging_offset=0, staging_bytes=MIB
    )  # the first is aligned outward to [0, 1024)
    assert plan is not None
    assert plan.offsets.size == reads


def test_a_plan_that_does_not_fit_is_none_and_an_empty_one_is_empty() -> None:
    starts = ints(0, 100_000)
    fits = plan_reads(starts, 4096, alignment=512, merge_gap_bytes=0, staging_offset=512, staging_bytes=8704)
    assert fits is not None
    assert fits.num_bytes == 8704  # 4096, and 4096 that lies across nine blocks
    assert fits.record_offsets.tolist() == [512, 512 + 4096 + 100_000 % 512]
    assert plan_reads(starts, 4096, alignment=512, merge_gap_bytes=0, staging_offset=512, staging_bytes=8703) is None
    empty = plan_reads(ints(), 4096, alignment=512, merge_gap_bytes=0, staging_offset=0, staging_bytes=0)
    assert empty is not None
    assert (empty.num_bytes, empty.offsets.size, empty.record_offsets.size) == (0, 0, 0)


@pytest.mark.parametrize("num", [0, 1, 2, 40])
@pytest.mark.parametrize(("piece", "most"), [(1, 8), (4096, 8), (20_000, 3), (1 << 30, 8)])
def test_pieces_are_the_plan_in_order(num: int, piece: int, most: int) -> None:
    starts = np.cumsum(np.random.default_rng(num).integers(1000, 9000, num)).astype(np.int64)
    plan = plan_reads(starts, 1000, alignment=512, merge_gap_bytes=512, staging_offset=0, staging_bytes=MIB)
    assert plan is not None
    pieces = plan.pieces(piece, most)
    assert len(pieces) <= most and bool(pieces) == bool(num)
    assert [i for _, records in pieces for i in range(num)[records]] == list(range(num))
    for reads, records in pieces:
        ends = plan.arena_offsets[reads] + plan.lengths[reads]
        for place in plan.record_offsets[records].tolist():  # each record lies in a read of its own piece
            assert ((plan.arena_offsets[reads] <= place) & (place + 1000 <= ends)).any()


@pytest.mark.parametrize("num", [0, 1, 2, 300])
@pytest.mark.parametrize("alignment", [1, 512, 4096])
@pytest.mark.parametrize("gap", [-1, 0, 700, 20_000])
def test_the_native_plan_is_that_of_numpy(num: int, alignment: int, gap: int) -> None:
    starts = np.cumsum(np.random.default_rng(num).integers(900, 6000, num)).astype(np.int64)
    place = {"alignment": alignment, "merge_gap_bytes": gap, "staging_offset": 8192}
    expected = plan_reads_numpy(starts, 900, **place, staging_bytes=1 << 40)
    assert expected is not None
    for room in (expected.num_bytes, max(0, expected.num_bytes - 1)):
        found, reference = (f(starts, 900, **place, staging_bytes=room) for f in (plan_reads, plan_reads_numpy))
        assert (found is None) == (reference is None) == (room < expected.num_bytes)
        if found is not None and reference is not None:
            for name in ("offsets", "lengths", "arena_offsets", "record_offsets", "first_records"):
                np.testing.assert_array_equal(getattr(found, name), getattr(reference, name))
                assert getattr(found, name).dtype == np.int64


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gap", [-1, 0, 500, 5000])
def test_the_native_volume_is_that_of_numpy(share: float, gap: int) -> None:
    layout = BundleLayout.make(40, False, BundleDtype.FP32)
    file, rng = BundleFile(Path("absent"), layout, 500, (4096,)), np.random.default_rng(0)
    slot_of = np.where(rng.random(500) < 0.3, np.arange(500), -1).astype(np.int32)
    ids = np.flatnonzero(rng.random(500) < share).astype(np.int32)
    for wanted in (ids, None):
        absent = np.flatnonzero(slot_of < 0) if wanted is None else wanted[slot_of[wanted] < 0]
        expected = volume(file.starts(0, absent), layout.record_bytes, 512, gap)
        assert volume_of_absent(slot_of, wanted, layout.stride, layout.record_bytes, 512, gap) == expected
    with pytest.raises(IndexError, match="no such neuron"):
        volume_of_absent(slot_of, np.array([500], np.int32), layout.stride, layout.record_bytes, 512, gap)
