"""Who gets the slots of a GPU, on the CPU: the ranking is torch, the copies go through Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache.bundle import BundleDtype, BundleLayout, pack_records
from runtime.gpu_home import GpuHome

pytest.importorskip("triton")

from runtime.gpu_slots import FAVOUR, GpuSlots
from runtime.kernels.triton_neurons import SWAPPED

pytestmark = pytest.mark.gpu

LAYERS, NEURONS, HIDDEN = 2, 12, 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def home_of(seed: int) -> GpuHome:
    layout = BundleLayout.make(HIDDEN, True, BundleDtype.BF16)
    home = GpuHome(LAYERS, NEURONS, layout, register=DEVICE.type == "cuda")
    rng = np.random.default_rng(seed)
    for layer in range(LAYERS):
        vectors = {v.name: rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32) for v in layout.vectors}
        home.records[layer] = torch.from_numpy(pack_records(layout, vectors))
    return home


def resident(slots: GpuSlots) -> list[list[int]]:
    return [(row >= 0).nonzero().flatten().tolist() for row in slots.table.cpu()]


def assert_slots_hold_their_records(slots: GpuSlots) -> None:
    table = slots.table.cpu()
    used = table[table >= 0]
    assert used.unique().numel() == used.numel()  # nobody shares
    for layer, neuron in (table >= 0).nonzero().tolist():
        assert torch.equal(slots.slab[table[layer, neuron]].cpu(), slots.home.records[layer, neuron])


def test_the_profile_fills_the_slots_and_is_left_as_it_was() -> None:
    frequency = np.linspace(0, 0.9, LAYERS * NEURONS, dtype=np.float32).reshape(LAYERS, NEURONS)
    given = frequency.copy()
    slots = GpuSlots(home_of(0), (4, 3), frequency, (2, 0), DEVICE)
    assert resident(slots) == [[0, 1, 10, 11], [9, 10, 11]]  # pinned first, then the most frequent
    np.testing.assert_array_equal(frequency, given)
    assert_slots_hold_their_records(slots)


def test_what_is_wanted_moves_in_and_what_is_pinned_stays() -> None:
    frequency = np.full((LAYERS, NEURONS), 0.01, np.float32)
    slots = GpuSlots(home_of(1), (4, 3), frequency, (2, 0), DEVICE)
    assert resident(slots) == [[0, 1, 2, 3], [0, 1, 2]]
    slots.used[0, [6, 9]] = 40
    slots.used[1, 11] = 40
    ranked = []
    for _ in range(slots.interval):  # each layer in its turn
        for layer in range(LAYERS):
            if slots.has_turn(layer, slots.turn):
                ranked.append(layer)
                slots.rank(layer)
        slots.stepped()
    assert ranked == list(range(LAYERS)) and LAYERS <= slots.interval == len(slots.turns)
    assert resident(slots) == [[0, 1, 6, 9], [0, 1, 11]]
    assert int(slots.counters[SWAPPED]) == 3 and not slots.used.any()
    assert_slots_hold_their_records(slots)


def test_nobody_is_ranked_where_all_are_wanted_alike() -> None:
    frequency = np.ones((LAYERS, NEURONS), np.float32)
    assert GpuSlots(home_of(1), (4, 3), frequency, (0, 0), DEVICE).turn == 0
    slots = GpuSlots(home_of(1), (4, 3), frequency, (0, 0), DEVICE, ranks=False)
    assert slots.turns == (None,) and slots.turn is None and not slots.ranks


def test_who_has_a_slot_is_favoured() -> None:
    frequency = np.full((LAYERS, NEURONS), 1.0, np.float32)
    slots = GpuSlots(home_of(2), (4, 0), frequency, (0, 0), DEVICE)
    for gain, inside in ((0.9, [0, 1, 2, 3]), (1.2, [1, 2, 3, 7])):
        slots._score.fill_(100.0)
        slots._score[0, 0] = 99.0
        slots._score[0, 7] = 99.0 * (1 + (FAVOUR - 1) * gain)
        slots.rerank()
        assert resident(slots) == [inside, []]
    slots._score[0] = 0.0  # of equals the first
    slots._score[0, :3] = 5.0
    slots.rerank()
    assert resident(slots)[0][:3] == [0, 1, 2] and len(resident(slots)[0]) == 4
    assert_slots_hold_their_records(slots)


def test_random_scores_rank_as_sorting_does() -> None:
    rng = np.random.default_rng(3)
    slots = GpuSlots(home_of(3), (5, 12), rng.random((LAYERS, NEURONS), np.float32), (1, 0), DEVICE)
    for _ in range(4):
        slots.used[:] = torch.from_numpy(rng.integers(0, 9, (LAYERS, NEURONS), np.int32))
        before = slots.table.cpu() >= 0
        score = slots._score.cpu() * 0.98**slots.interval + slots.used.cpu()
        slots.rerank()
        order = torch.argsort(torch.where(before, score * FAVOUR, score), dim=1, descending=True, stable=True)
        assert resident(slots) == [sorted(order[0, :5].tolist()), list(range(12))]
        torch.testing.assert_close(slots._score.cpu(), score)
        assert_slots_hold_their_records(slots)
