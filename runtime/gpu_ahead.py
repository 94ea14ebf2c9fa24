"""Reading a layer ahead on a GPU: the surest of what the next layer will want comes while the link has nothing to do.

While a layer's absent records are read, the predictor of the next one is asked about the residual that this layer
began with. What it is sure of is fetched from the end of this FFN until the next layer's predictor begins, beside sum,
projections and attention. As `runtime.ffn` does over a disk; results never depend on it. Knows streams and slots; not
how sets are guessed.
Shapes: L layers, F neurons, B rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from runtime.gpu_masks import Guesses, Masks, Norm
from runtime.gpu_slots import GpuSlots
from runtime.kernels.triton_ahead import FATES, Fetched, choose, fetch, programs
from runtime.kernels.triton_launch import apart
from runtime.kernels.triton_masks import Trail
from runtime.kernels.triton_neurons import FETCHED, FEW, Records, few_rows, num_programs

MARGIN = 4.0  # over a layer's threshold: who scores that is taken nine times in ten (benchmarks/LOG.md)
ROWS = FEW  # of a step that reads ahead, at most: more rows want so much that the link is never idle for long
_LEAST_BYTES = 1 << 20  # that a layer is expected to miss: less is read before a guess is made


def layers_ahead(
    frequency: np.ndarray, slots_per_layer: Sequence[int], stride: int, sketched: Sequence[bool]
) -> tuple[bool, ...]:
    """Which layers are worth a guess: those expected to miss enough, frequency [L, F] being how often neurons are
    needed, that have a predictor and follow one."""
    ranked = -np.sort(-np.minimum(frequency, 1.0), axis=1)
    missed = [float(f[num:].sum()) * stride for f, num in zip(ranked, slots_per_layer, strict=True)]
    pairs = zip(missed, sketched, (False, *sketched), strict=False)
    return tuple(m >= _LEAST_BYTES and own and before for m, own, before in pairs)


class Ahead:
    """guesses: the masks of what the rows of a step would surely want, at an input that is not yet the true one.
    layers: which of them are guessed. ValueError when the slots have no room for records that come early, or not as
    much for each program that fetches, or when the first layer is to be guessed."""

    def __init__(self, slots: GpuSlots, guesses: Guesses, layers: Sequence[bool]) -> None:
        (num_layers, num_neurons), num, fetching = slots.table.shape, slots.num_early, programs(slots.layout.stride)
        if num < 1:
            raise ValueError("the slots have no room for records that come early")
        if num % fetching:
            raise ValueError(f"{num} records that come early are not as many for each of {fetching} programs")
        if layers[0]:
            raise ValueError("there is nothing to guess the first layer from")
        self.slots, self.layers = slots, tuple(layers)
        self._guesses, hidden = guesses, slots.layout.hidden_size
        self._x = torch.zeros(2, ROWS, hidden, device=slots.device)  # where two neighbouring layers began
        self._h = torch.empty(ROWS, hidden, device=slots.device)
        self._at = torch.full((1,), -1, dtype=torch.int32, device=slots.device)
        sizes = (2, num_neurons), (fetching, num // fetching), (fetching,), (num_layers, FATES)
        self._early = [torch.zeros(size, dtype=torch.int32, device=slots.device) for size in sizes]  # as of `Fetched`
        told = [replace(slots.records(layer), done=self._at) for layer in range(num_layers)]
        self._plain, self._records = told, [self._with(layer, records) for layer, records in enumerate(told)]
        cuda = slots.device.type == "cuda"
        self._beside = torch.cuda.Stream(slots.device) if cuda else None  # type: ignore[no-untyped-call]
        self._guessed: set[int] = set()  # layers of this step
        self._come = [torch.cuda.Event() for _ in range(2 if cuda else 0)]  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, slots: GpuSlots, masks: Masks | None, layers: Sequence[bool]) -> Ahead | None:
        """Of masks; None where there is no room, no layer to guess, or nothing that can be surer than the masks."""
        if masks is None or not slots.num_early or not any(layers):
            return None
        guesses = masks.sure(ROWS, MARGIN)
        return None if guesses is None else cls(slots, guesses, layers)

    def _with(self, layer: int, records: Records) -> Records:
        """With those that come early, if any do."""
        if not self.layers[layer]:
            return records
        slots, turn = self.slots, layer % 2
        table, ids, count, fates = self._early
        place = slots.num_slots + turn * slots.num_early
        guessed = [i for i, own in enumerate(self.layers) if own]  # nobody is at the last but one of them, if any
        faded = fates[guessed[guessed.index(layer) - 2]] if len(guessed) > 2 else fates[layer]
        fetched = Fetched(table[turn], ids, count, fates[layer], faded, place)
        return replace(records, fetched=fetched)

    def trail(self, layer: int, rows: int) -> Trail | None:
        """What the predictor's pass of a layer has to leave; None: of so many rows nothing is guessed."""
        if layer == 0:  # a step begins, whatever became of the last one
            self._guessed.clear()
        if not few_rows(rows, self.slots.layout.hidden_size):
            return None
        return Trail(self._x[layer % 2, :rows], self._at, layer)

    def guess(self, layer: int, trail: Trail, norm: Norm, live: torch.Tensor) -> None:
        """Once the masks of the layer before are there. What is fetched for it waits beside that layer's FFN."""
        if not self.layers[layer]:
            return
        records = self._records[layer]
        assert records.fetched is not None
        with self._after_others():
            mask = self._guesses.of(layer, trail.x, norm, self._h[: trail.x.shape[0]])
            assert mask is not None  # of a layer with a sketch
            choose(mask, live, records.table, records.fetched)
            self._guessed.add(layer)
            if self._come:
                self._fetch(layer)
                self._come[layer % 2].record()

    def go_on(self, layer: int) -> None:
        """A layer's FFN has been started: where nothing runs beside anything, what comes next is fetched now."""
        if layer + 1 in self._guessed and not self._come:
            self._fetch(layer + 1)

    def _fetch(self, layer: int) -> None:
        fetched, num = self._records[layer].fetched, self.slots.table.shape[1]
        assert fetched is not None
        own = self.slots.home_words[layer * num : (layer + 1) * num]
        enough = 0 if self.slots.whole(layer - 1) is not None else num_programs(self.slots.device)
        counted = self.slots.counters[FETCHED : FETCHED + 1]
        fetch(own, self.slots.slab.view(torch.int32), fetched, self._at, layer - 1, enough, counted)

    def come(self, layer: int, rows: int) -> Records | None:
        """The layer's records with those that came early; None: of so many rows nothing does."""
        if not few_rows(rows, self.slots.layout.hidden_size):
            return None
        if layer not in self._guessed:
            return self._plain[layer]
        if self._come:
            torch.cuda.current_stream().wait_event(self._come[layer % 2])
        return self._records[layer]

    @contextmanager
    def _after_others(self) -> Iterator[None]:
        """On the stream beside, after what has been started so far."""
        if self._beside is None:
            yield
            return
        now = torch.cuda.current_stream().record_event()
        self._beside.wait_event(now)
        with torch.cuda.stream(self._beside), apart():
            yield
