"""`coldstream serve` to which faults can happen on demand, one a line on standard input. For soak.py: the product
has no such door.

    eio N     the next N reads fail as a broken device's do; 0 ends that
    short N   the next N reads come back short, as of a file that has become shorter
    slow S    every wait for reads takes S seconds more; 0 ends that
    home      says on standard output where the neurons' file is
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import runtime.load
from cache.reader import Reader, ReadResult
from server.cli import main as command


class _Door:
    """Carries out what standard input asks for, on the reader of the model that was loaded."""

    def __init__(self, loaded: runtime.load.Loaded) -> None:
        self._reader: Reader = loaded.cache._reader
        self._home = loaded.packed.bundles.path
        self._wait, self._slow_s = self._reader.wait, 0.0
        self._reader.wait = self._slow_wait  # type: ignore[method-assign]
        threading.Thread(target=self._listen, name="faults", daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            word, _, number = line.strip().partition(" ")
            if word == "home":
                print(f"home: {self._home}", flush=True)
            elif word == "slow":
                self._slow_s = float(number)
            else:
                self._reader.inject(word, times=int(number))

    def _slow_wait(self, ticket: int) -> ReadResult:
        time.sleep(self._slow_s)
        return self._wait(ticket)


def main() -> None:
    load = runtime.load.load

    def load_with_door(*args: Any, **options: Any) -> runtime.load.Loaded:
        loaded = load(*args, **options)
        _Door(loaded)
        return loaded

    runtime.load.load = load_with_door
    command()


if __name__ == "__main__":
    main()
