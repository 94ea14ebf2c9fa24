"""Which neurons are in GPU memory: slab, slot table and counters, all on the device, and the ranking that moves them.

Which neurons have a slot decides where bytes come from and nothing else. The hot set starts from the profile and is
ranked again from what was wanted (decayed frequency; benchmarks/LOG.md has the intervals), each layer in its turn and
once a step is done with it, by the device alone; over a home on disk it stays as it is.
Shapes: L layers, F neurons, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from cache.stats import CacheSnapshot, TierSnapshot, TransferSnapshot
from runtime.disk_home import DiskHome
from runtime.gpu_home import GpuHome
from runtime.kernels.triton_neurons import (
    DOWN_MISSES,
    FETCHED,
    FETCHED_HITS,
    HITS,
    LOOKUPS,
    NUM_COUNTERS,
    SWAPPED,
    Records,
)
from runtime.kernels.triton_rank import rerank

RERANK_STEPS = 4  # between two rankings
FAVOUR = 1.25  # who has a slot keeps it until somebody is wanted so much more: a swap costs as much as two misses
_DECAY = 0.98  # a step
_PRIOR_STEPS = 50.0  # that the profile's frequencies weigh at first: 1 / (1 - decay)


class GpuSlots:
    """Slots of each layer, and who has them. frequency [L, F]: how often needed; pinned [L]: the first so many neurons
    of a layer keep their slots; ranks: False where all neurons are wanted alike. num_early: records of a layer that can
    come early (`runtime.gpu_ahead`): there is room for those of two layers behind all slots. `used` int32 [L, F] and
    `counters` int64 are added to by the kernels."""

    def __init__(
        self,
        home: GpuHome | DiskHome,
        slots_per_layer: Sequence[int],
        frequency: np.ndarray,
        pinned: Sequence[int],
        device: torch.device,
        ranks: bool = True,
        num_early: int = 0,
    ) -> None:
        num_layers, num_neurons, stride = home.shape
        self.home, self.layout, self.device = home, home.layout, device
        self.slots_per_layer = tuple(int(n) for n in slots_per_layer)
        self.num_slots, self.num_early = max(1, sum(self.slots_per_layer)), num_early
        self.slab = torch.zeros(self.num_slots + 2 * num_early, stride, dtype=torch.uint8, device=device)
        self.table = torch.full((num_layers, num_neurons), -1, dtype=torch.int32, device=device)
        self.used = torch.zeros((num_layers, num_neurons), dtype=torch.int32, device=device)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        pin = device.type == "cuda"
        self._seen = torch.zeros(NUM_COUNTERS, dtype=torch.int64, pin_memory=pin)
        self._wanted = torch.tensor(self.slots_per_layer, dtype=torch.int32, device=device)
        self._moves = torch.zeros(num_layers, 1 + 2 * num_neurons, 1, dtype=torch.int32, device=device)
        prior = torch.from_numpy(np.array(frequency, np.float32))  # a copy: it is changed
        for layer, num in enumerate(pinned):
            prior[layer, :num] = torch.inf
        self._score = (prior * _PRIOR_STEPS).to(device)
        self.interval = RERANK_STEPS
        self.ranks = ranks and home.words is not None and 0 < sum(self.slots_per_layer) < num_layers * num_neurons
        self._steps = 0
        self.copied_bytes = 0  # of layers that were copied whole
        self._fill()

    def records(self, layer: int) -> Records:
        """What the kernels take of a layer."""
        num, slots = self.table.shape[1], self.slots_per_layer[layer]
        return self.home.of_layer(layer, self.slab, self.table[layer], slots == num)

    def whole(self, layer: int) -> torch.Tensor | None:
        """The records of a layer whose neurons all have slots, uint8 [F, stride], in order: nobody takes one from
        another there. None of other layers."""
        first, num = sum(self.slots_per_layer[:layer]), self.table.shape[1]
        return self.slab[first : first + num] if self.slots_per_layer[layer] == num else None

    @property
    def home_words(self) -> torch.Tensor:
        """int32 [L F, words of a record]. RuntimeError where they are on disk."""
        if self.home.words is None:
            raise RuntimeError("slots over a home on disk stay as they are")
        return self.home.words

    @property
    def in_memory(self) -> torch.Tensor:
        """The records of all neurons, uint8 [L, F, stride]. RuntimeError where they are on disk."""
        if isinstance(self.home, DiskHome):
            raise RuntimeError("no place in main memory holds all records")
        return self.home.records

    def note(self) -> None:
        """Counters go to the host behind what has been started."""
        self._seen.copy_(self.counters, non_blocking=True)

    def seen(self) -> list[int]:
        """The kernels' counters as the last step that is done left them; waits for nothing."""
        return [int(n) for n in self._seen.tolist()]

    def stepped(self) -> None:
        """After each decode step."""
        self._steps += 1

    @property
    def turns(self) -> tuple[int | None, ...]:
        """All that `turn` can be."""
        return tuple(range(self.interval)) if self.ranks else (None,)

    @property
    def turn(self) -> int | None:
        """Whose slots are to be ranked again in the step that comes next: every interval-th layer's, by turns, so that
        the link has as much to do in every step. None: of no layer."""
        return self._steps % self.interval if self.ranks else None

    def has_turn(self, layer: int, turn: int | None) -> bool:
        """Whether a layer is ranked again in the steps of a turn."""
        return turn is not None and layer % self.interval == turn

    def rank(self, layer: int, decay: float | None = None) -> None:
        """A layer's neurons most wanted of late take the slots of those least wanted. Nobody may read them meanwhile.
        decay: of scores; 1 where nothing was wanted since they were ranked."""
        words, own, num = self.home_words, slice(layer, layer + 1), self.table.shape[1]
        rerank(
            self._score[own], self.used[own], self.table[own], self._wanted[own],
            words[layer * num : (layer + 1) * num], self.slab.view(torch.int32), self._moves[layer],
            self.counters[SWAPPED : SWAPPED + 1], _DECAY**self.interval if decay is None else decay, FAVOUR,
        )  # fmt: skip

    def rerank(self) -> None:
        """All layers."""
        for layer in range(self.table.shape[0]):
            self.rank(layer)

    def _fill(self) -> None:
        chosen = self._best().nonzero()
        self._move(chosen, torch.arange(chosen.shape[0], dtype=torch.int32, device=self.device))

    def _best(self) -> torch.Tensor:
        """bool [L, F]: of each layer, as many as it has slots; of equals the first."""
        order = torch.argsort(self._score, dim=1, descending=True, stable=True)
        rank = torch.empty_like(order)
        places = torch.arange(order.shape[1], device=self.device).expand_as(order)
        rank.scatter_(1, order, places)
        return rank < self._wanted[:, None]

    def _move(self, neurons: torch.Tensor, slots: torch.Tensor) -> None:
        """Records of neurons int64 [N, 2] (layer, neuron) into slots int32 [N]."""
        if not neurons.shape[0]:
            return
        self.home.fill(neurons, self.slab, slots.long())
        self.table[neurons[:, 0], neurons[:, 1]] = slots

    def snapshot(self) -> CacheSnapshot:
        """As the last step that is done left it, with the tiers below; waits for nothing. Of what came early and was
        wanted, the whole record counts as needed."""
        seen, below = self.seen(), self.home.snapshot()
        vectors = len(self.layout.vectors)
        vector_bytes = self.layout.hidden_size * self.layout.dtype.item_bytes
        misses = seen[LOOKUPS] - seen[HITS]
        read = misses * (vectors - 1) * vector_bytes + seen[DOWN_MISSES] * vector_bytes
        early, used = seen[FETCHED] * self.layout.stride, seen[FETCHED_HITS] * self.layout.stride
        moved = read + early + self.copied_bytes + seen[SWAPPED] * self.layout.stride
        capacity = sum(self.slots_per_layer) * self.layout.stride
        tier = TierSnapshot(seen[LOOKUPS], seen[HITS], misses, seen[SWAPPED], seen[SWAPPED], capacity, capacity)
        needed, requests = read + used + self.copied_bytes, misses + seen[FETCHED]
        transfer = TransferSnapshot(bytes=moved, needed_bytes=needed, requests=requests)
        return replace(
            below,
            tiers={"gpu": tier} | below.tiers,
            transfers={("cpu", "gpu"): transfer} | below.transfers,
            prefetch_issued_bytes=below.prefetch_issued_bytes + early,
            prefetch_used_bytes=below.prefetch_used_bytes + used,
            prefetch_wasted_bytes=below.prefetch_wasted_bytes + early - used,
        )

    def close(self) -> None:
        self.home.close()
