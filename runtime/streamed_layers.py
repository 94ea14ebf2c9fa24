"""Layers whose resident matrices do not fit: read when their turn comes, the next one meanwhile. Knows where matrices
are read from and in what order; not what is done with them.

The same bytes as in memory, and so the same numbers; every step reads all of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import overload

from cache.errors import ColdstreamError, ReadError
from runtime.model import LayerWeights


class StreamedLayers(Sequence[LayerWeights]):
    """`num_layers` layers, each made by `load(layer)` on a thread of its own. One iteration at a time; at most
    `runtime.plan.LAYERS_AT_ONCE` are in memory.

    Where `load` fails (the file is gone, or shorter than it was, or the disk is broken) a ReadError is raised.
    """

    def __init__(self, num_layers: int, load: Callable[[int], LayerWeights]) -> None:
        self._num_layers, self._load = num_layers, load
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._first: Future[LayerWeights] | None = None  # layer 0, for the step to come

    def __len__(self) -> int:
        return self._num_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._num_layers))]
        return self._read(range(self._num_layers)[index])

    def __iter__(self) -> Iterator[LayerWeights]:
        ahead, self._first = self._first or self._reader.submit(self._read, 0), None
        for layer in range(self._num_layers):
            current = ahead.result()
            ahead = self._reader.submit(self._read, (layer + 1) % self._num_layers)
            yield current
        self._first = ahead

    def _read(self, layer: int) -> LayerWeights:
        try:
            return self._load(layer)
        except ReadError:
            raise
        except (ColdstreamError, OSError) as error:
            raise ReadError(f"layer {layer}", 0, 0, str(error)) from error
