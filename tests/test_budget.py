"""Detection against faked /proc and cgroup trees (v1, v2, nested, inside a container) and against this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cache.budget import (
    HostMemory,
    cpu_quota,
    default_budget,
    detect_memory,
    format_size,
    parse_size,
    physical_cores,
    process_bytes,
    smallest_staging_bytes,
)
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[1]

GIB, MIB = 1 << 30, 1 << 20


class Host:
    """A fake /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, groups: str) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        self.write(self.proc / "self/cgroup", groups)
        self.write(self.proc / "self/status", "Name:\tpython\nVmRSS:\t  2048 kB\nThreads:\t3\n")
        meminfo = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\n"
        self.write(self.proc / "meminfo", meminfo)
        self.cgroup.mkdir()

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(self, name: str, text: str) -> None:
        self.write(self.cgroup / name, text)

    def memory(self) -> HostMemory:
        return detect_memory(self.proc, self.cgroup)

    def quota(self) -> float | None:
        return cpu_quota(self.proc, self.cgroup)


def test_without_cgroups_memory_is_what_is_available(tmp_path: Path) -> None:
    host = Host(tmp_path, "")
    assert host.memory() == HostMemory(16 * GIB, 8 * GIB, None, "MemAvailable")
    assert host.quota() is None
    (host.proc / "self/cgroup").unlink()
    assert host.memory().limit_bytes is None
    assert process_bytes(host.proc) == 2 * MIB


def test_v2_limit_of_a_parent_binds(tmp_path: Path) -> None:
    host = Host(tmp_path, "0::/pod/box/worker\n")
    host.group("pod/memory.max", "3221225472\n")
    host.group("pod/box/memory.max", "max\n")
    host.group("pod/box/worker/memory.max", "4294967296\n")
    memory = host.memory()
    assert memory.limit_bytes == 3 * GIB
    assert memory.source.endswith("pod/memory.max")


def test_v2_high_binds_below_max(tmp_path: Path) -> None:
    host = Host(tmp_path, "0::/box\n")
    host.group("box/memory.max", str(4 * GIB))
    host.group("box/memory.high", str(2 * GIB))
    assert host.memory().limit_bytes == 2 * GIB


def test_v2_in_a_container_the_root_is_the_own_group(tmp_path: Path) -> None:
    for i, path in enumerate(("/", "/../../elsewhere", "/system.slice/docker-1234.scope")):
        host = Host(tmp_path / str(i), f"0::{path}\n")
        host.group("memory.max", str(GIB))
        host.group("cpu.max", "150000 100000\n")
        assert host.memory().limit_bytes == GIB
        assert host.quota() == 1.5


def test_v1_nested_and_unlimited(tmp_path: Path) -> None:
    host = Host(tmp_path, "9:name=systemd:/\n4:memory:/a/b\n2:cpu,cpuacct:/a\n0::/\n")
    host.group("memory/memory.limit_in_bytes", "9223372036854771712\n")
    host.group("memory/a/memory.limit_in_bytes", str(5 * GIB))
    host.group("memory/a/b/memory.limit_in_bytes", "9223372036854771712\n")
    assert host.memory().limit_bytes == 5 * GIB
    host.group("cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    host.group("cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert host.quota() is None
    host.group("cpu,cpuacct/a/cpu.cfs_quota_us", "50000\n")
    host.group("cpu,cpuacct/a/cpu.cfs_period_us", "100000\n")
    assert host.quota() == 0.5


def test_v1_path_not_visible_in_the_container(tmp_path: Path) -> None:
    host = Host(tmp_path, "4:memory:/docker/0123abcd\n1:cpu:/docker/0123abcd\n")
    host.group("memory/memory.limit_in_bytes", str(2 * GIB))
    assert host.memory().limit_bytes == 2 * GIB


def test_limit_above_the_machine_is_no_limit(tmp_path: Path) -> None:
    host = Host(tmp_path, "0::/\n")
    host.group("memory.max", str(64 * GIB))
    assert host.memory() == HostMemory(16 * GIB, 8 * GIB, None, "MemAvailable")


def test_source_names_what_bounds(tmp_path: Path) -> None:
    host = Host(tmp_path, "0::/\n")
    host.group("memory.max", str(12 * GIB))
    assert host.memory() == HostMemory(16 * GIB, 8 * GIB, 12 * GIB, "MemAvailable")


def test_no_proc_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="/proc"):
        detect_memory(tmp_path / "none", tmp_path)


def test_this_machine() -> None:
    memory = detect_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert 1 * MIB < process_bytes() < memory.total_bytes
    quota = cpu_quota()
    assert quota is None or quota > 0


def test_default_budget_leaves_a_margin() -> None:
    free = HostMemory(16 * GIB, 8 * GIB, None, "MemAvailable")
    assert default_budget(free, 0) == 8 * GIB - 512 * MIB
    limited = HostMemory(16 * GIB, 8 * GIB, 512 * MIB, "memory.max")
    assert default_budget(limited, 300 * MIB) == 448 * MIB
    big = HostMemory(1024 * GIB, 1000 * GIB, None, "MemAvailable")
    assert default_budget(big, 0) == 998 * GIB


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("123", 123),
        ("0", 0),
        ("3GiB", 3 << 30),
        ("3 gib", 3 << 30),
        ("800MB", 800_000_000),
        ("2KB", 2000),
        ("1.5G", 3 << 29),
        ("512M", 512 << 20),
        ("4k", 4096),
        ("2Gi", 2 << 30),
        ("7B", 7),
        ("1TB", 10**12),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse_size(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.5", "1e9", "3 QiB", "1,5G", "nan", "inf", "3GiB x", "٣"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_format_size_is_readable_and_reads_back() -> None:
    sizes = (0, 1023, 2048, 612 << 20, 3 << 30, (3 << 29) + 5)
    assert [format_size(n) for n in sizes] == ["0B", "1023B", "2KiB", "612MiB", "3GiB", "1.5GiB"]
    assert format_size(-2048) == "-2KiB"
    for n in (7, 4096, 612 << 20, 5 << 40):
        assert parse_size(format_size(n)) == n


def test_smallest_staging_holds_two_chunks() -> None:
    layout = BundleLayout.make(576, True, BundleDtype.BF16)
    assert smallest_staging_bytes(layout) == 2 << 20
    wide = BundleLayout.make(1 << 20, True, BundleDtype.FP32)
    assert smallest_staging_bytes(wide) >= 2 * wide.stride
    assert smallest_staging_bytes(wide) % 8192 == 0


def test_freed_memory_goes_back_to_the_kernel() -> None:
    """In a process of its own, since it is for good: a block of 24 MiB, freed, is not kept for the next one."""
    script = """
import ctypes
from cache.budget import give_back_freed_memory, process_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def take(num_bytes):
    block = libc.malloc(ctypes.c_size_t(num_bytes))
    ctypes.memset(block, 1, num_bytes)
    libc.free(block)
given = give_back_freed_memory()
before = process_bytes()
for _ in range(3):
    take(24 << 20)  # freed once, glibc alone would keep it from the second time on
    libc.malloc(64)  # something on top, so that the heap could not shrink
print(int(given), process_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    given, kept = map(int, done.stdout.split())
    if not given:
        pytest.skip("mallopt: this C library has none")
    assert kept < 4 << 20


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert physical_cores({0, 2}, tmp_path) == 1
    assert physical_cores({0, 1, 7, 8}, tmp_path) == 4  # of two the kernel says nothing
    assert physical_cores(range(3), tmp_path / "absent") == 3
