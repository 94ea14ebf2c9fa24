"""A server's threads share two heaps, where glibc would give each its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, sys, threading
if sys.argv[2] == "limited":
    from server.arenas import limit_arenas
    assert limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = (ctypes.c_int, ctypes.c_void_p), (ctypes.c_void_p,)
together = threading.Barrier(6)
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(6)]
[t.start() for t in threads], [t.join() for t in threads]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc's malloc_info")
def test_threads_share_two_heaps(tmp_path: Path) -> None:
    def heaps(way: str) -> int:
        path = tmp_path / way
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", SCRIPT, str(path), way], check=True, timeout=60, cwd=root)
        return path.read_text(encoding="utf-8").count("<heap nr=")

    assert heaps("limited") == 2 < heaps("unlimited")
