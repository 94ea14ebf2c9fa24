"""How many rows of prompts ride along: all while nobody waits, else what computes in time or hides behind reads."""

from __future__ import annotations

import pytest

from runtime.pace import Pace


def test_all_rows_while_nobody_decodes_or_nothing_is_known() -> None:
    pace = Pace(least=64, most=512)
    assert pace.rows(somebody_decodes=True) == 512
    pace.observe(100, 1.0, 0.0)
    assert pace.rows(somebody_decodes=False) == 512


@pytest.mark.parametrize(
    ("seconds", "stall_s", "rows"),
    [
        (0.2, 0.0, 125),  # 2 ms a row: a quarter of a second
        (20.0, 0.0, 64),  # one chunk at least, however long it takes
        (0.01, 0.0, 512),
        (0.7, 0.5, 250),  # bound by the disk: as much as hides behind the half second of reading
        (0.5, 0.5, 512),  # computing takes nothing
    ],
)
def test_rows_are_bounded_while_somebody_decodes(seconds: float, stall_s: float, rows: int) -> None:
    pace = Pace(least=64, most=512)
    pace.observe(100, seconds, stall_s)
    assert pace.rows(somebody_decodes=True) == rows


def test_the_mean_follows_the_newest_steps() -> None:
    pace = Pace(least=1, most=512)
    pace.observe(100, 1.0, 0.0)
    before = pace.rows(somebody_decodes=True)
    for _ in range(20):
        pace.observe(100, 0.1, 0.0)
    assert before == 25 and 240 <= pace.rows(somebody_decodes=True) <= 250
