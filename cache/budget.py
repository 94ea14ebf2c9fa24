"""What memory and CPU this process may use, and sizes as people write them.

Reads /proc and cgroups (v1 and v2); both roots are arguments, so that tests can fake them. Does not know what the
memory is for: that is the planner's.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cache.bundle import BundleLayout
from cache.errors import UnsupportedError

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
CPU = Path("/sys/devices/system/cpu")

_PAGE = 4096
_MIB = 1 << 20
_MIN_CHUNK_BYTES = 1 << 20  # of a layer that is streamed: long enough to read at the disk's full speed
_KEPT_BYTES = 4 << 20  # freed at once, and not kept for the next allocation
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number of pages close to 2^63
_UNITS = {
    **dict.fromkeys(("", "b"), 1),
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **dict.fromkeys(("k", "ki", "kib"), 1 << 10),
    **dict.fromkeys(("m", "mi", "mib"), 1 << 20),
    **dict.fromkeys(("g", "gi", "gib"), 1 << 30),
    **dict.fromkeys(("t", "ti", "tib"), 1 << 40),
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the host and the tightest cgroup limit on this process. `source` says what bounds a budget."""

    total_bytes: int
    available_bytes: int  # what the kernel would give without swapping, now
    limit_bytes: int | None  # None: no cgroup limits this process
    source: str


def parse_size(text: str) -> int:
    """Bytes of "3GiB", "800MB", "1.5G" or "123": KB, MB, GB, TB are powers of 1000; KiB.. and a bare K.. of 1024.

    Raises ValueError for anything else, also for a fraction without a unit.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None or ("." in match[1] and unit == 1):
        raise ValueError(f"{text!r} is not a size; write bytes or a number with a unit, such as 3GiB, 800MB or 123456")
    if "." not in match[1]:
        return int(match[1]) * unit  # exact at any size
    return int(float(match[1]) * unit)


def format_size(num_bytes: int) -> str:
    """A size for people, powers of 1024, as `parse_size` reads it: exact where that is short, else one decimal."""
    if num_bytes < 0:
        return "-" + format_size(-num_bytes)
    for name, unit in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= unit:
            return f"{num_bytes // unit}{name}" if num_bytes % unit == 0 else f"{num_bytes / unit:.1f}{name}"
    return f"{num_bytes}B"


def process_bytes(proc: Path = PROC) -> int:
    """Resident bytes of this process now (anonymous and mapped file pages). Raises UnsupportedError without /proc."""
    return _kilobytes(proc / "self" / "status").get("VmRSS", 0)


def detect_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> HostMemory:
    """What the host has and what cgroups allow. Raises UnsupportedError without /proc."""
    info = _kilobytes(proc / "meminfo")
    total = info.get("MemTotal", 0)
    available = info.get("MemAvailable", info.get("MemFree", 0))  # MemAvailable: Linux 3.14
    limits = list(_limits(proc, cgroup))
    limit, path = min(limits, default=(None, None))
    if limit is None or limit >= total:  # a limit above the machine's memory limits nothing
        return HostMemory(total, available, None, "MemAvailable")
    return HostMemory(total, available, limit, str(path) if limit < available else "MemAvailable")


def default_budget(host: HostMemory, process_bytes: int) -> int:
    """The budget when none is given: all that this process can have, less a margin."""
    bound = most_bytes(host, process_bytes)
    return max(0, bound - budget_margin(bound))


def most_bytes(host: HostMemory, process_bytes: int) -> int:
    """That this process can have, what it has included: the cgroup's limit or what is free."""
    free = host.available_bytes + process_bytes
    return free if host.limit_bytes is None else min(host.limit_bytes, free)


def budget_margin(bound_bytes: int) -> int:
    """Left to others by default: one sixteenth, at least 64 MiB, at most 2 GiB."""
    return min(max(bound_bytes // 16, 64 * _MIB), 2048 * _MIB)


def cpu_quota(proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """CPUs that cgroups allow, such as 1.5; None without a quota."""
    return min(_quotas(proc, cgroup), default=None)


def physical_cores(cpus: Iterable[int], root: Path = CPU) -> int:
    """Cores that these processors belong to: two threads of one core read memory no faster than one does.

    As many as there are processors where the kernel does not say.
    """
    lists = (_lines(root / f"cpu{cpu}" / "topology" / "thread_siblings_list") or [f"cpu{cpu}"] for cpu in cpus)
    return len({lines[0] for lines in lists})


def give_back_freed_memory() -> bool:
    """Has glibc return to the kernel what is freed: blocks of 4 MiB and more at once, others where they lie on top.

    On its own glibc raises that limit to 32 MiB as it goes, and a server that scored some prompts was seen to keep 140
    MiB of nothing. To be called before there are threads. False where the C library has no mallopt; then nothing is
    changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, _KEPT_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_ARENA_MAX, 2))
    return all([mallopt(name, value) == 1 for name, value in settings])


def trim_heap() -> bool:
    """Gives the kernel every free page of glibc's heaps, once: after a phase that made and dropped much (packing).

    False where the C library has no malloc_trim, or where there was nothing to give.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1


def smallest_staging_bytes(layout: BundleLayout) -> int:
    """The least staging that works: two halves, each a chunk of at least one record with slack for alignment."""
    half = -(-max(_MIN_CHUNK_BYTES, layout.stride + 3 * _PAGE) // _PAGE) * _PAGE
    return 2 * half


def _kilobytes(path: Path) -> dict[str, int]:
    """Lines "Name:  123 kB" of a /proc file, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UnsupportedError(f"{path}: cannot be read ({error.strerror}); coldstream needs Linux's /proc") from error
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0]) << 10
    return found


def _limits(proc: Path, cgroup: Path) -> Iterator[tuple[int, Path]]:
    for group in _groups(proc, cgroup, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):  # above memory.high it crawls
            words = _words(group / name)
            if words and words[0].isdigit() and int(words[0]) < _NO_LIMIT:
                yield int(words[0]), group / name


def _quotas(proc: Path, cgroup: Path) -> Iterator[float]:
    for group in _groups(proc, cgroup, "cpu"):
        words = _words(group / "cpu.max")  # "max 100000" or "150000 100000"
        if len(words) != 2:
            words = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")  # -1: none
        if len(words) == 2 and all(w.isdigit() for w in words) and int(words[1]):
            yield int(words[0]) / int(words[1])


def _groups(proc: Path, cgroup: Path, controller: str) -> Iterator[Path]:
    """The groups that bind this process, own one first, up to the root of what is mounted.

    Inside a container the path in /proc/self/cgroup may be the host's, while the mounted root is the container's own
    group: parts that are not there are skipped.
    """
    for line in _lines(proc / "self" / "cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        for root in _roots(cgroup, number, controllers, controller):
            parts = [p for p in path.split("/") if p not in ("", ".", "..")]
            for depth in range(len(parts), -1, -1):
                group = root.joinpath(*parts[:depth])
                if group.is_dir():
                    yield group


def _roots(cgroup: Path, number: str, controllers: str, controller: str) -> list[Path]:
    """Where the hierarchy of a line of /proc/self/cgroup may be mounted: v2 alone or beside v1, v1 by controller."""
    if number == "0" and not controllers:
        return [cgroup, cgroup / "unified"]
    if controller in controllers.split(","):
        return [cgroup / name for name in dict.fromkeys((controller, controllers))]
    return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no cgroups here, or the file went away with its group
        return []


def _words(path: Path) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []
