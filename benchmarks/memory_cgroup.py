"""`MemoryCgroup`: a fresh memory cgroup (v1 or v2) that a child process is started in, and the kernel's counters of it.

Knows files below /sys/fs/cgroup; not what runs in the group. The group is made below the one of this process, so that
every limit that holds here holds there too; with cgroup v2, where a group that has processes takes no memory
controller for its children, beside it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_ENTER = 'echo $$ > "$0" && exec "$@"'  # the shell moves itself, so that every page of the command is charged
_LEAVE_S = 10


class NoCgroup(Exception):
    """Memory cgroups cannot be made here; the sentence says why."""


@dataclass(frozen=True, slots=True)
class CgroupCounters:
    """The kernel's word, in bytes.

    held: anonymous and shared pages, which cannot be taken back. file: page cache, which can. failures: charges that
    met the limit, so that file pages were taken back.
    """

    usage_bytes: int
    peak_bytes: int  # file pages included, so that it may reach the limit without harm
    held_bytes: int
    file_bytes: int
    failures: int
    oom_kills: int


class MemoryCgroup:
    """A group whose processes together, page cache included, get no more than `limit_bytes`.

    As a context manager it is removed at the end of the block; its processes must have ended by then. Raises NoCgroup.
    """

    def __init__(self, limit_bytes: int) -> None:
        parent, self.version = _parent()
        self.path = parent / f"coldstream-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.path.mkdir()
        except OSError as error:
            raise NoCgroup(f"{parent}: a cgroup cannot be made ({error.strerror})") from error
        try:
            self._limit(limit_bytes)
        except OSError as error:
            self.path.rmdir()
            raise NoCgroup(f"{self.path}: the limit cannot be set ({error.strerror})") from error

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                self.path.rmdir()
                return
            except OSError as failure:  # a process that has ended leaves its group a moment later
                if failure.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    @property
    def limit_bytes(self) -> int:
        """As the kernel rounded it."""
        return self._number("memory.limit_in_bytes" if self.version == 1 else "memory.max")

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` inside the group."""
        return ["/bin/sh", "-c", _ENTER, str(self.path / "cgroup.procs"), *command]

    def counters(self) -> CgroupCounters:
        return self._counters_v1() if self.version == 1 else self._counters_v2()

    def _limit(self, limit_bytes: int) -> None:
        if self.version == 1:
            (self.path / "memory.limit_in_bytes").write_text(str(limit_bytes))
            swap = self.path / "memory.memsw.limit_in_bytes"  # memory and swap together: no way out through swap
            if swap.exists():
                swap.write_text(str(limit_bytes))
            return
        (self.path / "memory.max").write_text(str(limit_bytes))
        if (self.path / "memory.swap.max").exists():
            (self.path / "memory.swap.max").write_text("0")

    def _counters_v1(self) -> CgroupCounters:
        stat, oom = self._table("memory.stat"), self._table("memory.oom_control")
        return CgroupCounters(
            usage_bytes=self._number("memory.usage_in_bytes"),
            peak_bytes=self._number("memory.max_usage_in_bytes"),
            held_bytes=stat["total_rss"] + stat["total_shmem"],
            file_bytes=stat["total_cache"] - stat["total_shmem"],
            failures=self._number("memory.failcnt"),
            oom_kills=oom.get("oom_kill", 0),
        )

    def _counters_v2(self) -> CgroupCounters:
        stat, events = self._table("memory.stat"), self._table("memory.events")
        peak = self.path / "memory.peak"  # Linux 5.19
        usage = self._number("memory.current")
        return CgroupCounters(
            usage_bytes=usage,
            peak_bytes=self._number("memory.peak") if peak.exists() else usage,
            held_bytes=stat["anon"] + stat["shmem"],
            file_bytes=stat["file"] - stat["shmem"],
            failures=events["max"],
            oom_kills=events["oom_kill"],
        )

    def _number(self, name: str) -> int:
        return int((self.path / name).read_text())

    def _table(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return {words[0]: int(words[1]) for words in lines if len(words) == 2}


def _parent() -> tuple[Path, int]:
    """Where a group may be made, and the version of its hierarchy. Raises NoCgroup."""
    for controllers, path in _own_groups():
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), 1
    for controllers, path in _own_groups():
        if controllers == "":
            return _parent_v2(Path("/sys/fs/cgroup"), Path(path.lstrip("/"))), 2
    raise NoCgroup("/proc/self/cgroup names no memory controller")


def _parent_v2(root: Path, own: Path) -> Path:
    group = root / own
    for candidate in (group, group.parent):
        control = candidate / "cgroup.subtree_control"
        inside = candidate == root or root in candidate.parents
        if inside and control.is_file() and "memory" in control.read_text().split():
            return candidate
    raise NoCgroup(f"{group}: neither this cgroup nor the one above gives its children the memory controller")


def _own_groups() -> Iterator[tuple[str, str]]:
    """(controllers, path) of each hierarchy that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError as error:
        raise NoCgroup(f"/proc/self/cgroup: cannot be read ({error.strerror})") from error
    for line in lines:
        _, controllers, path = line.split(":", 2)
        yield controllers, path
