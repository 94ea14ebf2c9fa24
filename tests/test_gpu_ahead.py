"""What comes over the link before it is wanted: who is chosen, what is fetched and until when, and which layers are
worth it. On a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from cache.bundle import BundleDtype, BundleLayout
from runtime.gpu_ahead import Ahead, layers_ahead
from runtime.gpu_home import GpuHome
from runtime.gpu_slots import GpuSlots
from runtime.kernels.triton_ahead import FATES, Fetched, choose, fetch, programs
from runtime.kernels.triton_masks import PLACES

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEURONS, EACH, WORDS, SLOTS, LAYER, PROGRAMS = 150, 2, 20, 5, 3, 32
LAYOUT = BundleLayout.make(24, False, BundleDtype.BF16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def some_fetched() -> Fetched:
    ids = torch.full((PROGRAMS, EACH), -7, dtype=torch.int32, device=DEVICE)
    count = torch.full((PROGRAMS,), 99, dtype=torch.int32, device=DEVICE)
    table = torch.full((NEURONS,), 5, dtype=torch.int32, device=DEVICE)  # of the last but one layer
    return Fetched(table, ids, count, ints(*[0] * FATES), ints(*[0] * FATES), SLOTS)


def guess(*neurons: int, rows: int = 1) -> torch.Tensor:
    mask = torch.zeros(rows, NEURONS, dtype=torch.uint8, device=DEVICE)
    mask[rows - 1, list(neurons)] = 1
    return mask


def listed(fetched: Fetched) -> list[int]:
    parts = zip(fetched.ids.tolist(), fetched.count.tolist(), strict=True)
    return sorted(n for ids, num in parts for n in ids[:num])


def test_the_absent_ones_of_a_guess_are_chosen_as_far_as_there_is_room() -> None:
    fetched, table = some_fetched(), torch.full((NEURONS,), -1, dtype=torch.int32, device=DEVICE)
    table[7] = 0
    same = [2, 2 + PROGRAMS, 2 + 2 * PROGRAMS]  # one program's, one more than it has room for
    choose(guess(7, 9, *same, NEURONS - 1), torch.ones(1, dtype=torch.int64, device=DEVICE), table, fetched)
    assert listed(fetched) == sorted([9, *same[:EACH], NEURONS - 1])
    assert (fetched.table == -1).all()


def test_padding_guesses_nothing() -> None:
    fetched, table = some_fetched(), torch.full((NEURONS,), -1, dtype=torch.int32, device=DEVICE)
    live = torch.tensor([1, 0], device=DEVICE)
    choose(guess(9, rows=2), live, table, fetched)
    assert listed(fetched) == []
    choose(guess(9, rows=2), 1 - live, table, fetched)
    assert listed(fetched) == [9]


def test_guesses_that_are_mostly_wrong_are_given_up_and_tried_again_in_time() -> None:
    fetched, table = some_fetched(), torch.full((NEURONS,), -1, dtype=torch.int32, device=DEVICE)
    live = torch.ones(1, dtype=torch.int64, device=DEVICE)
    fetched.fates.copy_(ints(1000, 300, 0, 0))
    choose(guess(9), live, table, fetched)
    assert listed(fetched) == []
    for _ in range(200):
        if listed(fetched):
            break
        fetched.faded.copy_(fetched.fates)  # as a later layer's turn fades them
        choose(guess(9), live, table, fetched)
        fetched.fates.copy_(fetched.faded)
    assert listed(fetched) == [9] and 600 < int(fetched.fates[0]) < 700


def test_what_is_known_of_good_guesses_does_not_outgrow_its_numbers() -> None:
    fetched, table = some_fetched(), torch.full((NEURONS,), -1, dtype=torch.int32, device=DEVICE)
    fetched.faded.copy_(ints(5000, 4000, 0, 0))
    choose(guess(9), torch.ones(1, dtype=torch.int64, device=DEVICE), table, fetched)
    assert fetched.faded.tolist()[:2] == [2500, 2000]


@pytest.mark.parametrize("at, enough, comes", [(0, 0, True), (2, 2, True), (PLACES, 0, False), (-PLACES, 0, False)])
def test_records_come_while_the_decoder_is_there(at: int, enough: int, comes: bool) -> None:
    fetched, counted = some_fetched(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    fetched.table.fill_(-1)
    fetched.count.zero_()
    for neuron in (4, 4 + PROGRAMS, 17):
        program = neuron % PROGRAMS
        fetched.ids[program, fetched.count[program]] = neuron
        fetched.count[program] += 1
    home = torch.arange(NEURONS * WORDS, dtype=torch.int32).view(NEURONS, WORDS)
    home = home.pin_memory() if DEVICE.type == "cuda" else home
    slab = torch.full((SLOTS + PROGRAMS * EACH, WORDS), -1, dtype=torch.int32, device=DEVICE)
    fetch(home, slab, fetched, ints(LAYER * PLACES + at), LAYER, enough, counted)
    slots = fetched.table.tolist()
    found = [n for n, slot in enumerate(slots) if slot >= 0]
    assert found == ([4, 17, 4 + PROGRAMS] if comes else []) and int(counted) == len(found)
    assert fetched.fates.tolist()[:2] == [len(found), 0] and (slab[:SLOTS] == -1).all()
    for neuron in found:
        torch.testing.assert_close(slab[slots[neuron]].cpu(), home[neuron].cpu())


def test_waiting_for_a_layer_that_never_runs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.kernels.triton_ahead._PATIENT", 5)
    fetched, counted = some_fetched(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    fetched.count.fill_(1)
    home, slab = (torch.zeros(n, WORDS, dtype=torch.int32, device=DEVICE) for n in (NEURONS, SLOTS + PROGRAMS * EACH))
    fetch(home, slab, fetched, ints(LAYER * PLACES + 1), LAYER, 2, counted)
    assert int(counted) == 0 and int(fetched.fates[0]) == PROGRAMS  # all of them guesses that were no good


def test_who_has_nothing_to_fetch_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.kernels.triton_ahead._PATIENT", 1 << 30)
    fetched, counted = some_fetched(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    fetched.count.zero_()
    home, slab = (torch.zeros(n, WORDS, dtype=torch.int32, device=DEVICE) for n in (NEURONS, SLOTS + PROGRAMS * EACH))
    fetch(home, slab, fetched, ints(LAYER * PLACES), LAYER, 1, counted)  # of a layer that is never done
    assert int(counted) == 0


def test_what_is_under_way_when_the_next_layer_begins_stays_small() -> None:
    assert [programs(n) for n in (2_000, 10_240, 24_576, 49_152, 1 << 20)] == [32, 32, 16, 8, 4]


def slots_of(layers: int, num_early: int) -> GpuSlots:
    home = GpuHome(layers, NEURONS, LAYOUT, register=DEVICE.type == "cuda")
    frequency = np.ones((layers, NEURONS), np.float32)
    return GpuSlots(home, (4,) * layers, frequency, (0,) * layers, DEVICE, num_early=num_early)


@pytest.mark.parametrize("guessed", [(1, 2, 4, 5, 7), (1, 2, 3), (2, 5), (3,)])
def test_what_is_known_of_every_guessed_layer_fades(guessed: tuple[int, ...]) -> None:
    slots = slots_of(8, 64)
    ahead = Ahead(slots, None, [i in guessed for i in range(8)])  # type: ignore[arg-type]
    fetched = {layer: r.fetched for layer, r in enumerate(ahead._records) if r.fetched is not None}
    assert set(fetched) == set(guessed)
    assert {f.faded.data_ptr() for f in fetched.values()} == {f.fates.data_ptr() for f in fetched.values()}


def test_as_many_come_early_for_each_program() -> None:
    with pytest.raises(ValueError, match="33 records"):
        Ahead(slots_of(2, 33), None, (False, True))  # type: ignore[arg-type]


def test_layers_that_miss_little_or_have_nobody_to_ask_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gpu_ahead._LEAST_BYTES", 200)
    frequency = np.tile(np.array([1.0, 0.5, 0.5, 0.5]), (5, 1))
    assert layers_ahead(frequency, (1,) * 5, 200, [True] * 5) == (False, True, True, True, True)
    assert layers_ahead(frequency, (3, 1, 3, 1, 4), 200, [True] * 5) == (False, True, False, True, False)
    assert layers_ahead(frequency, (1,) * 5, 200, [True, True, False, True, True]) == (False, True, False, False, True)


def test_the_first_layer_has_nothing_to_be_guessed_from() -> None:
    with pytest.raises(ValueError, match="first layer"):
        Ahead(slots_of(2, 32), None, (True, False))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no room"):
        Ahead(slots_of(2, 0), None, (False, True))  # type: ignore[arg-type]
