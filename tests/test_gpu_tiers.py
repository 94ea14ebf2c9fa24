"""A GPU whose home is on disk: the same numbers as with all records in main memory, and what is counted on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cache.errors import ReadError
from runtime.gpu_slots import GpuSlots
from tests.test_gpu_model import CUDA, Side, cpu_side, gpu_side, packed, some_ids

pytestmark = pytest.mark.gpu
__all__ = ["packed"]
STEPS = 16 if CUDA else 2


@pytest.fixture
def unranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that keep whom they have, as those over a home on disk do."""
    monkeypatch.setattr(GpuSlots, "turns", (None,))
    monkeypatch.setattr(GpuSlots, "turn", None)


def texts(side: Side, steps: int = STEPS) -> list[torch.Tensor]:
    """Logits of a prompt and of the steps after it, greedy."""
    found = [side.run("prefill", some_ids(9, 1), 0, "last").clone()]
    for at in range(9, 9 + steps):
        found.append(side.run("decode", [int(found[-1].argmax())], at, "last").clone())
    return found


@pytest.fixture
def short_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest one holds a few records of a tiny layer, instead of all of them."""
    monkeypatch.setattr("cache.neuron_cache.smallest_staging_bytes", lambda layout: 4 * 4096)


@pytest.mark.usefixtures("unranked", "short_staging")
@pytest.mark.parametrize("staging", [1 << 20, 1], ids=["roomy", "tight"])
@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"] if CUDA else ["sparse"])
def test_a_home_on_disk_changes_no_number(packed: Path, mode: str, staging: int) -> None:
    loaded, _ = cpu_side(packed, mode, 20.0)
    below = 40.0 if staging > 1 else 0.0
    two, three = gpu_side(packed, mode, 20.0, loaded), gpu_side(packed, mode, 20.0, loaded, below, staging)
    for a, b in zip(texts(two), texts(three), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    few, more = two.slots.snapshot(), three.slots.snapshot()
    assert set(few.tiers) == {"gpu"} and set(more.tiers) == {"gpu", "cpu"}
    disk, above = more.transfers["disk", "cpu"], more.transfers["cpu", "gpu"]
    assert disk.bytes >= disk.needed_bytes > 0 and above.bytes > 0 and disk.stall_seconds > 0
    if mode != "dense":
        assert two.model.counters().predicted_neurons == three.model.counters().predicted_neurons
        assert two.model.counters().active_neurons == three.model.counters().active_neurons
    if mode != "dense" and staging > 1:
        assert more.tiers["gpu"] == few.tiers["gpu"] and above.needed_bytes == few.transfers["cpu", "gpu"].needed_bytes
        prompts = packed_neurons(three)  # streamed by the prompt, which asks for all of them
        assert more.tiers["cpu"].lookups == more.tiers["gpu"].misses + prompts
        assert three.model.counters().overflow == 0
    if mode != "dense" and staging == 1 and three.slots.layout.gated:  # without a gate one row's misses always fit
        assert three.model.counters().overflow > 0
    loaded.close()


def packed_neurons(side: Side) -> int:
    layers, neurons, _ = side.slots.home.shape
    return int(layers * neurons)


@pytest.mark.usefixtures("unranked", "short_staging")
def test_batches_scored_texts_and_sets_that_do_not_fit(packed: Path) -> None:
    loaded, _ = cpu_side(packed, "sparse", 20.0)
    two, three = gpu_side(packed, "sparse", 20.0, loaded), gpu_side(packed, "sparse", 20.0, loaded, 10.0, 1)
    blocks = [[9, 2], [4, 11], [7, 5]]

    def close(what: str, *arguments: Any) -> None:
        a, b = (getattr(side, what)(*arguments) for side in (two, three))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    for row in range(3):
        close("run", "prefill", some_ids(4 + row, row), 0, "last", torch.tensor(blocks[row]).int().numpy())
    close("step", some_ids(3, 10), [4, 5, 6], [torch.tensor(b).int().numpy() for b in blocks])
    close("run", "score", some_ids(3, 21), 0, "all")
    assert three.model.counters().predicted_neurons == two.model.counters().predicted_neurons
    assert three.model.counters().overflow > 0  # and those take nothing from what comes after them
    loaded.close()


def test_a_failed_read_is_one_steps_error_and_nothing_more(packed: Path) -> None:
    loaded, _ = cpu_side(packed, "sparse", 0.0)
    one, other = (gpu_side(packed, "sparse", 0.0, loaded, 0.0) for _ in range(2))
    for side in (one, other):
        side.run("prefill", some_ids(5, 1), 0, "last")
    one.slots.home.cache._reader.inject("eio")
    with pytest.raises(ReadError):
        one.run("decode", [7], 5, "last")
    torch.testing.assert_close(one.run("decode", [7], 5, "last"), other.run("decode", [7], 5, "last"))
    loaded.close()
