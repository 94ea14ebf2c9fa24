"""Seconds that this machine's processors have worked, and those of a process's children. Knows /proc/stat."""

from __future__ import annotations

import os
import resource
from pathlib import Path


def cpu_seconds() -> tuple[float, float]:
    """(busy, all) of the machine so far; interrupts count as busy, waiting for a disk as idle."""
    fields = [float(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle, total = fields[3] + fields[4], sum(fields)
    tick = os.sysconf("SC_CLK_TCK")
    return (total - idle) / tick, total / tick


def children_seconds() -> float:
    """Of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
