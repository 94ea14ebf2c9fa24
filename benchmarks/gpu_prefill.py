"""Prefill of a large shape against what link and products would take alone. Knows the shape and the ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.gpu_results import Figures
from benchmarks.make_checkpoint import Shape

ROWS, RUNS = 2048, 3


def measure_prefill(prefill: Callable[[int], float], shape: Shape, home_bytes: int, ceilings: Figures) -> Figures:
    """prefill(ROWS): seconds of one step of so many tokens, all of the FFN copied in from main memory."""
    prefill(ROWS)
    step_s = statistics.median(prefill(ROWS) for _ in range(RUNS))
    stream_s, gemm_s = home_bytes / ceilings["pinned_copy_bytes_per_s"], flops(shape) / ceilings["gemm_flop_per_s"]
    return {
        "rows": ROWS,
        "seconds": step_s,
        "stream_s": stream_s,
        "gemm_s": gemm_s,
        "share": max(stream_s, gemm_s) / step_s,
        "tokens_per_s": ROWS / step_s,
    }


def flops(shape: Shape) -> float:
    """Of the products of all layers for ROWS rows, and of attention's scores."""
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    matrices = (
        2 * (q + kv) * shape.hidden_size + (3 if shape.gated else 2) * shape.intermediate_size * shape.hidden_size
    )
    return shape.num_hidden_layers * (2.0 * ROWS * matrices + 2.0 * ROWS * ROWS * q)
