"""The kernel that bandwidths are measured with reads every word of the records it is given, and no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from cache.errors import UnsupportedError
from runtime import gpu_machine
from runtime.bench import _predicted
from runtime.gpu_machine import gpu_memory, measure_gpu
from runtime.kernels.triton_read import sum_records

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("num", "words", "taken", "programs"), [(7, 40, 5, 3), (20, 2576, 9, 4), (3, 1030, 3, 8)])
def test_sums_of_scattered_records(num: int, words: int, taken: int, programs: int) -> None:
    dice = torch.Generator().manual_seed(num)
    records = torch.randint(-1000, 1000, (num, words), dtype=torch.int32, generator=dice)
    ids = torch.randperm(num, generator=dice)[:taken].to(torch.int32)
    out = torch.full((programs,), 77, dtype=torch.int32, device=DEVICE)
    sum_records(records.pin_memory() if DEVICE.type == "cuda" else records, ids.to(DEVICE), out)
    assert int(out.sum()) == int(records[ids.long()].sum())


def test_a_gpu_is_found_where_one_is() -> None:
    found = gpu_memory()
    assert (found is not None) == torch.cuda.is_available()
    assert found is None or 0 < found.free_bytes <= found.total_bytes


def pretend(monkeypatch: pytest.MonkeyPatch, **found: Callable[..., object]) -> None:
    """A GPU whose driver says this."""
    answers = {"is_available": lambda: True, "get_device_name": lambda: "Card", "empty_cache": lambda: None} | found
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_what_a_model_that_is_gone_has_left_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10]
    pretend(monkeypatch, empty_cache=lambda: free.append(70), mem_get_info=lambda: (free[-1], 80))
    found = gpu_memory()
    assert found is not None and found.free_bytes == 70


def test_a_gpu_that_another_has_for_itself_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    pretend(monkeypatch, mem_get_info=refuse)
    with pytest.raises(UnsupportedError, match=r"busy or unavailable\): free it, or say --device cpu$"):
        gpu_memory()


@pytest.mark.parametrize(("held", "lent"), [(256, 128), (96, 96)])
def test_a_loaded_models_own_records_are_what_is_measured(
    held: int, lent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(gpu_machine, "_LEAST_BYTES", 64)
    monkeypatch.setattr(gpu_machine, "_LENT_BYTES", 128)
    monkeypatch.setattr(gpu_machine, "record_bandwidth", lambda words, record_bytes: seen.append(words) or 1.0)
    monkeypatch.setattr(gpu_machine, "kernel_seconds", lambda: 1e-6)
    slab, home = torch.zeros(held // 8, 8, dtype=torch.uint8), torch.zeros(2, held // 8, 8, dtype=torch.uint8)
    assert measure_gpu(8, slab, home) == gpu_machine.GpuMachine(1.0, 1.0, 1e-6)
    assert [w.data_ptr() for w in seen] == [slab.data_ptr(), home.data_ptr()]  # nothing is taken
    assert seen[0].nbytes == lent and seen[0].dtype is torch.int32


def test_a_gpu_without_room_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(words: torch.Tensor, record_bytes: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_machine, "_LEAST_BYTES", 64)
    monkeypatch.setattr(gpu_machine, "record_bandwidth", refuse)
    assert measure_gpu(8, torch.zeros(64, dtype=torch.uint8), None) is None
    assert set(_predicted(None, 0.1).values()) == {None}
