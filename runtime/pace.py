"""How many rows of prompts a step may compute while somebody waits for their next token. Knows rows and seconds."""

from __future__ import annotations

_WAIT_S = 0.25  # what computing prompts may add to a step of somebody who decodes
_WEIGHT = 0.25  # of the newest step in the mean


class Pace:
    """As many as are computed in _WAIT_S, or in the time that a step waits for reads anyway: between least and most.

    On a host that is bound by its disk a step takes the time of reading the FFN, however few its rows are.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._row_s = 0.0  # computing one row of a prompt; 0: not known yet
        self._stall_s = 0.0  # of the last step with prompts

    def rows(self, somebody_decodes: bool) -> int:
        """Rows of prompts that the next step may hold."""
        if not somebody_decodes or not self._row_s:
            return self._most
        return max(self._least, min(self._most, int(max(_WAIT_S, self._stall_s) / self._row_s)))

    def observe(self, num_rows: int, seconds: float, stall_s: float) -> None:
        """A step computed `num_rows` rows of prompts, and waited `stall_s` of its `seconds` for reads."""
        row_s = max(0.0, seconds - stall_s) / num_rows
        self._row_s += (row_s - self._row_s) * (_WEIGHT if self._row_s else 1.0)
        self._stall_s = stall_s
