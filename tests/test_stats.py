"""Histograms: many values at once are as one by one."""

from __future__ import annotations

import numpy as np

from cache.stats import Histogram


def test_many_values_at_once_are_as_one_by_one() -> None:
    values = np.array([0, 1, 2, 3, 4, 5, 8, 9, 1 << 40], np.int64)
    one, many = Histogram((1.0, 4.0, 8.0)), Histogram((1.0, 4.0, 8.0))
    for value in values.tolist():
        one.observe(value)
    many.observe_all(values)
    many.observe_all(values[:0])
    assert one.snapshot() == many.snapshot()
    assert one.snapshot().counts == (2, 3, 2, 2)
