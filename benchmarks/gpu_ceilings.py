"""What the GPU and its link could do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.gpu_results import Figures
from cache.budget import process_bytes
from runtime.gpu_machine import kernel_seconds, record_bandwidth, seconds
from runtime.kernels.triton_read import sum_records

RECORD_BYTES = (2048, 4096, 8192, 10304, 16384, 24640)  # 10,304: AFM-4.5B's in bf16; 24,640: Llama-7B's
GEMM_ROWS, GEMM_SHAPE = 2048, (18432, 2560)
_PINNED_BYTES = 1 << 30
_RESIDENT_BYTES = 2 << 30


def overheads() -> Figures:
    """What CUDA takes beside tensors, in a process that has not used it yet: GPU memory (nobody else may use the GPU),
    and main memory. After a Triton kernel and a product, since both load code and take workspaces."""
    before = process_bytes()
    record_bandwidth(torch.empty(1 << 20, dtype=torch.int32, device="cuda"), 4096)
    gemm_rate()
    kernel_seconds()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    return {"context_bytes": own, "main_memory_bytes": process_bytes() - before, "main_memory_before_bytes": before}


def ceilings() -> Figures:
    """Bytes a second, floating-point operations a second, seconds a kernel."""
    resident = torch.empty(_RESIDENT_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    pinned = torch.empty(_PINNED_BYTES // 4, dtype=torch.int32, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda")
    pinned.copy_(resident[: pinned.numel()])
    return {
        "pinned_copy_bytes_per_s": _PINNED_BYTES / seconds(lambda: target.copy_(pinned, non_blocking=True)),
        "zero_copy_bytes_per_s": {str(n): record_bandwidth(pinned, n) for n in RECORD_BYTES},
        "zero_copy_in_graph_bytes_per_s": graph_bandwidth(pinned, 10304),
        "read_bytes_per_s": {str(n): record_bandwidth(resident, n) for n in RECORD_BYTES},
        "kernel_s": kernel_seconds(),
        "gemm_flop_per_s": gemm_rate(),
    }


def graph_bandwidth(words: torch.Tensor, record_bytes: int) -> float:
    """As `record_bandwidth`, in a replayed CUDA graph of a decode step's size: 2,000 records at once."""
    width = record_bytes // 4
    records = words[: words.numel() // width * width].view(-1, width)
    ids = torch.randperm(records.shape[0], device="cuda", dtype=torch.int32)[:2000].contiguous()
    out = torch.empty(1056, dtype=torch.int32, device="cuda")
    sum_records(records, ids, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(16):
            sum_records(records, ids, out)
    return 16 * ids.numel() * record_bytes / seconds(graph.replay)


def gemm_rate() -> float:
    """Of a prefill's product with up, bf16, random numbers."""
    x = torch.randn(GEMM_ROWS, GEMM_SHAPE[1], dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(GEMM_SHAPE, dtype=torch.bfloat16, device="cuda")
    return 2 * GEMM_ROWS * GEMM_SHAPE[0] * GEMM_SHAPE[1] / seconds(lambda: F.linear(x, weight))
