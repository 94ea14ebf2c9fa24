"""Who may write a packed model: one process at a time, the others wait. Knows a path and a lock, not what is written.

A file beside the result, locked while it is made. The kernel frees the lock of a process that is gone, wherever it ran:
in another container its number means nothing here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.2


@contextlib.contextmanager
def pack_lock(out: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Holds the lock for `out`, whose parent exists; `waiting` is called now and then while another has it.

    False where the file system has no locks: then nobody waits, and others may be at work too. Raises OSError when the
    file cannot be made.
    """
    path = out.parent / f".{out.name}.lock"
    fd, held = _locked(path, waiting)
    try:
        yield held
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for this one sees that it is gone
        os.close(fd)


def _locked(path: Path, waiting: Callable[[], None]) -> tuple[int, bool]:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _wait(fd, waiting)
            if _is_still(path, fd):
                return fd, held
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the one before us has removed it


def _wait(fd: int, waiting: Callable[[], None]) -> bool:
    """Whether the lock is held in the end."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            time.sleep(_POLL_S)
        except OSError:  # not on this file system
            return False
        else:
            return True


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
