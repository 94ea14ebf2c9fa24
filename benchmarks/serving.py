"""`serving`: a real `coldstream serve` in a process of its own for a script to ask. Knows processes, not models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread

_END_S = 60


@dataclass
class Served:
    """A server that is ready. `said`: the lines that it has printed so far."""

    process: subprocess.Popen[str]
    url: str
    said: list[str] = field(default_factory=list)

    def tell(self, line: str) -> None:
        """Writes a line to the process' standard input (fault_server.py listens there)."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@contextmanager
def serving(arguments: Sequence[str], module: str = "server.cli") -> Iterator[Served]:
    """`coldstream serve ARGUMENTS` on a free port until the end of the block. RuntimeError when it does not start.

    COLDSTREAM_* of the environment are left out, but for the cache directory.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_") or k == "COLDSTREAM_CACHE_DIR"}
    start = f"import {module} as it; it.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "serve", *arguments, "--port", "0"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        served = Served(process, "")
        served.url = _until_ready(served)
        Thread(target=lambda: served.said.extend(process.stdout or ()), daemon=True).start()
        yield served
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_ready(served: Served) -> str:
    """Its address. What the server says on the way goes to standard error: a model may be packed first, for minutes."""
    for line in served.process.stdout or ():
        served.said.append(line)
        print(line, end="", file=sys.stderr, flush=True)
        if found := re.search(r"ready: (http://\S+) serves", line):
            return found[1]
    raise RuntimeError(
        f"the server ended before it was ready (exit code {served.process.wait()}):\n{''.join(served.said)}"
    )
