"""What passes through main memory while a model is loaded to a GPU, and what is said when the driver refuses.

No GPU is needed.
"""

from __future__ import annotations

import errno
import mmap
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache.arena import new_arena
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import ColdstreamError
from runtime.gpu_errors import load_errors
from runtime.sketches import PlaneMatrix, PlaneSketch
from runtime.sparse import _sketches

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from runtime.gpu_home import GpuHome, register_memory
from runtime.gpu_load import _masks

LAYERS, NEURONS, HIDDEN = 5, 10, 16


class Passing:
    """Counts arrays that somebody still holds."""

    def __init__(self) -> None:
        self._seen: list[weakref.ref[np.ndarray]] = []
        self.most = 0

    def note(self, array: np.ndarray) -> np.ndarray:
        self._seen.append(weakref.ref(array))
        self.most = max(self.most, sum(r() is not None for r in self._seen))
        return array


def test_gates_come_a_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Passing()
    monkeypatch.setattr(
        "runtime.gates._read_layer", lambda file, layer: passing.note(np.full((NEURONS, HIDDEN), layer, np.uint16))
    )
    packed: Any = SimpleNamespace(bundles=SimpleNamespace(num_layers=LAYERS, check=lambda: None))
    masks = _masks(packed, "exact", None, 1, torch.device("meta"))  # copied away, as to a GPU
    assert masks is not None and masks.num_bytes == LAYERS * NEURONS * HIDDEN * 2
    assert passing.most == 1


def test_sketches_are_never_there_twice() -> None:
    def planes() -> PlaneMatrix:
        codes = np.zeros((NEURONS, HIDDEN // 8), np.uint8)
        row = np.ones(NEURONS, np.float16)
        return PlaneMatrix(np.ones(HIDDEN, np.uint8), np.ones(HIDDEN, np.float16), codes, row, row, 1.0, 1.0)

    passing = Passing()

    def layers(file: str, wanted: list[bool]) -> Iterator[dict[str, np.ndarray] | None]:
        for i, own in enumerate(wanted):
            made = PlaneSketch("relu2", None, planes(), NEURONS, np.ones(NEURONS, np.float16))
            arrays = made.to_arrays(f"layers.{i}.") if own else None
            if arrays is not None:
                passing.note(arrays[f"layers.{i}.up_codes"])
            del made
            yield arrays
            del arrays

    config = SimpleNamespace(intermediate_size=NEURONS, hidden_act="relu2")
    packed: Any = SimpleNamespace(config=config, read_layers=layers)
    found = _sketches(packed, np.array([True, False, True, True, True]), 3)
    assert [None if s is None else s.up.codes.shape[0] for s in found] == [7, None, 7, 7, 7]
    assert passing.most <= 2


def refusals() -> list[tuple[Exception, str]]:
    return [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), r"Triton Error \[CUDA\]: out of memory"),
    ]


@pytest.mark.parametrize(("error", "says"), refusals(), ids=["allocator", "launcher"])
def test_a_gpu_that_is_full_while_a_model_is_loaded_is_a_sentence(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 20, 80 << 30))
    found = rf"{says}.*: --gpu-memory 2GiB is planned, and 3MiB are free now; say a smaller --gpu-memory, or --device"
    with pytest.raises(ColdstreamError, match=found), load_errors(2 << 30):
        raise error


def test_a_kernel_that_is_too_large_for_the_gpu_is_a_sentence() -> None:
    too_large = OutOfResources(180_000, 101_376, "shared memory")
    found = "too large for this GPU .*shared memory, Required: 180000, Hardware limit: 101376.*: say --device cpu"
    with pytest.raises(ColdstreamError, match=found), load_errors(2 << 30):
        raise too_large


def test_errors_that_are_not_the_gpus_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="a slip"), load_errors(2 << 30):
        raise RuntimeError("a slip")


def test_main_memory_that_is_refused_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    for make in (lambda: GpuHome(2, 8, BundleLayout.make(16, True, BundleDtype.BF16), False), lambda: new_arena(4096)):
        with pytest.raises(ColdstreamError, match=r"cannot be had \(Cannot allocate memory\): say a smaller --memory"):
            make()


def test_memory_that_the_driver_does_not_register_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(cudaHostRegister=lambda *arguments: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with pytest.raises(ColdstreamError, match=r"4KiB .* \(CUDA error 2\): .* \(ulimit -l\), or say a smaller --memory"):
        register_memory(torch.zeros(4096, dtype=torch.uint8))
