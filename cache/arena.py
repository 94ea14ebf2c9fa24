"""Memory that a disk reads into and that is computed with. Knows pages, not what lies in them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

import numpy as np

from cache.budget import format_size
from cache.errors import ColdstreamError


def new_arena(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes] of zeros, page-aligned, in huge pages where the kernel gives them; freed with the array.

    A read of 64 KiB or more is up to twice as fast into huge pages (one piece to hand to the device, where there were
    16), and scattered records cost fewer TLB misses. Not for children: a fork while the disk writes here would leave
    one of the two with the wrong copy. Nothing is resident until it is touched; then 2 MiB at a time. Raises
    ColdstreamError when the kernel refuses.
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones get no huge pages
    except OSError as error:
        raise not_mapped(num_bytes, error) from error
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def not_mapped(num_bytes: int, error: OSError) -> ColdstreamError:
    """What to say to a user whose kernel refuses so much memory."""
    what = f"{format_size(num_bytes)} of main memory cannot be had ({error.strerror})"
    return ColdstreamError(f"{what}: say a smaller --memory, or raise the limit of address space (ulimit -v)")


def drop_pages(arena: np.ndarray, start: int, stop: int) -> None:
    """Gives the kernel the whole pages of bytes start..stop-1; they read as zeros until they are written again.

    OSError when the kernel refuses, as it does for locked memory.
    """
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    place, size = ctypes.c_void_p(arena.ctypes.data + first), ctypes.c_size_t(last - first)
    if libc.madvise(place, size, mmap.MADV_DONTNEED) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"madvise: {os.strerror(code)}")
