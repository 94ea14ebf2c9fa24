"""What steps of many rows need for a while holds neurons in between: whose turn it is, decided before each step.

Knows batches and the cache's spare slots; the planner has made them as large as what a narrow step leaves
(`Plan.num_spare_slots`).
"""

from __future__ import annotations

from collections.abc import Sequence

from cache.budget import trim_heap
from cache.neuron_cache import NeuronCache
from runtime.batch import Batch
from runtime.plan import FEW_ROWS, narrow_rows


def is_wide(batches: Sequence[Batch], max_num_seqs: int) -> bool:
    """Whether a step takes more scratch than the planner allows a narrow one: more rows, matrices that are widened for
    a GEMM, or logits of every row."""
    rows = [b.token_ids.shape[0] for b in batches]
    widened = any(b.kind != "decode" and n > FEW_ROWS for b, n in zip(batches, rows, strict=True))
    return widened or sum(rows) > narrow_rows(max_num_seqs) or any(b.logits == "all" for b in batches)


class SpareRoom:
    """Called with the batches of each step before anything of it is allocated."""

    def __init__(self, cache: NeuronCache, max_num_seqs: int) -> None:
        self._cache, self._max_num_seqs = cache, max_num_seqs
        self._was_wide = False

    def __call__(self, batches: Sequence[Batch]) -> None:
        if is_wide(batches, self._max_num_seqs):
            self.make()
        elif self._was_wide:
            trim_heap()  # pieces below 4 MiB that the last step has freed stay with glibc otherwise
            self._cache.take_back()
            self._was_wide = False

    def make(self) -> None:
        """For something else that takes as much, until the next narrow step."""
        if not self._was_wide:
            self._cache.give_back()
        self._was_wide = True
