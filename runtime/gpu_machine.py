"""What GPU is here, and how fast it reads its own memory and main memory. Knows a driver and a clock, not models."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from cache.errors import UnsupportedError
from runtime.gpu_errors import first_line
from runtime.gpu_forecast import GpuMachine
from runtime.gpu_plan import DeviceMemory

_PROGRAMS_A_PROCESSOR = 8
_RUNS = 5
_RESIDENT_BYTES = 1 << 30  # many times the cache
_LENT_BYTES = 256 << 20  # at most: an id of every record is taken beside
_LEAST_BYTES = 64 << 20  # more than the cache
_PINNED_BYTES = 256 << 20
_EMPTY_KERNELS = 200


def gpu_memory() -> DeviceMemory | None:
    """Of the first GPU; None where there is none that Triton's kernels run on. Makes the process's context; what a
    model that is gone has left counts as free. UnsupportedError where the driver refuses."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return None
    try:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(torch.cuda.get_device_name(), total, free)
    except RuntimeError as error:  # full, or another process has it for itself
        why = first_line(error)
        raise UnsupportedError(f"the GPU that is here cannot be used ({why}): free it, or say --device cpu") from error


def measure_gpu(
    record_bytes: int, slab: torch.Tensor | None = None, home: torch.Tensor | None = None
) -> GpuMachine | None:
    """Needs a GPU; takes about a second. slab and home uint8: a loaded model's records in GPU memory, and in main
    memory that is registered: they are read, so that budgets are kept (64 MiB are taken where the slab is smaller).
    Without them it takes up to 1 GiB of what is free on the GPU, and 256 MiB of main memory, for that long. None where
    the GPU has no room."""
    try:
        return GpuMachine(
            record_bandwidth(_on_gpu(slab), record_bytes),
            record_bandwidth(_in_memory(home), record_bytes),
            kernel_seconds(),
        )
    except torch.OutOfMemoryError:
        return None


def _on_gpu(slab: torch.Tensor | None) -> torch.Tensor:
    """int32, in GPU memory."""
    if slab is not None and slab.nbytes >= _LEAST_BYTES:
        return _lent(slab)
    most = _LEAST_BYTES
    if slab is None:
        most = min(_RESIDENT_BYTES, max(most, torch.cuda.mem_get_info()[0] // 2))
    return torch.empty(most // 4, dtype=torch.int32, device="cuda").random_()


def _in_memory(home: torch.Tensor | None) -> torch.Tensor:
    """int32, in main memory that the GPU reads."""
    return _lent(home) if home is not None else torch.zeros(_PINNED_BYTES // 4, dtype=torch.int32, pin_memory=True)


def _lent(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(-1)[: min(memory.nbytes, _LENT_BYTES) // 4 * 4].view(torch.int32)


def record_bandwidth(words: torch.Tensor, record_bytes: int) -> float:
    """Bytes a second that a kernel reads of `words` int32, taken as records of so many bytes in random order."""
    from runtime.kernels.triton_read import sum_records

    width = record_bytes // 4
    records = words[: words.numel() // width * width].view(-1, width)
    ids = torch.randperm(records.shape[0], device="cuda", dtype=torch.int32)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(processors * _PROGRAMS_A_PROCESSOR, dtype=torch.int32, device="cuda")
    return records.nbytes / seconds(lambda: sum_records(records, ids, out))


def kernel_seconds() -> float:
    """Of one of many small kernels in a replayed CUDA graph."""
    small = torch.zeros(1024, device="cuda")
    small.add_(1)  # loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_EMPTY_KERNELS):
            small.add_(1)
    return seconds(graph.replay) / _EMPTY_KERNELS


def seconds(run: Callable[[], object]) -> float:
    """Median of a few runs on the device, the first one left out."""
    run()
    found: list[float] = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[_RUNS // 2]
