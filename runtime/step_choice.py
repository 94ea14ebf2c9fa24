"""Whether sparse steps stream all layers, each begun ahead, or choose by layer what they read: whichever was quicker.

What a disk gives while others compute, and how much of it hides behind what, cannot be told beforehand within a tenth.
So both ways are timed now and then. Knows rows and seconds; not layers. Nothing but time depends on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_TRY = 3  # steps; the first after a change is not timed, since nothing was read ahead for it, or the wrong thing
_STAY = 64  # steps until the other way is tried again
_WORTH_IT = 0.95  # of the time: streaming reads what nobody needs, and others may want the disk


@dataclass(slots=True)
class _Known:
    """Of about as many rows: mean seconds of a step by whether it streams, which way is taken, for how many steps."""

    seconds: dict[bool, float] = field(default_factory=dict)
    streams: bool = False
    trying: bool = False
    left: int = _TRY


class StepChoice:
    """Call `begin` and `end` around a sparse step; in between `streams` says which way it goes. Begins by layer."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._by_rows: dict[int, _Known] = {}
        self._now: _Known | None = None
        self._start_s = 0.0
        self._same = False  # as the step before
        self.streams = False

    def begin(self, rows: int) -> None:
        """A step of so many rows begins; one that did not come to its end is forgotten."""
        self._now = self._by_rows.setdefault(rows.bit_length(), _Known())
        self._same = self.streams == self._now.streams
        self.streams = self._now.streams
        self._start_s = self._clock()

    def end(self, hopeful: bool) -> None:
        """The step is done. hopeful: whether streaming, where it is not done, may be worth trying at all."""
        now, self._now = self._now, None
        if now is None:
            return
        if self._same:
            took_s = self._clock() - self._start_s
            now.seconds[now.streams] = (now.seconds.get(now.streams, took_s) + took_s) / 2
        now.left -= 1
        if now.left <= 0:
            _turn(now, hopeful)


def _turn(now: _Known, hopeful: bool) -> None:
    """The time of a way is over: after a try the quicker one is taken, else the other one is tried."""
    if now.trying:
        by_layer_s, streamed_s = (now.seconds.get(way, math.inf) for way in (False, True))
        now.streams, now.trying, now.left = streamed_s < _WORTH_IT * by_layer_s, False, _STAY
    elif now.streams or hopeful:
        now.streams, now.trying, now.left = not now.streams, True, _TRY
    else:
        now.left = _STAY
