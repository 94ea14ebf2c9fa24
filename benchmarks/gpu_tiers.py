"""A large shape whose home is on disk, main memory holding a part of it: what a token waits for.

The records are random, written once; the sets are a trace's. Knows a plan and a model by its counters.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.gpu_results import Figures
from benchmarks.make_checkpoint import Shape
from benchmarks.make_packed import random_records
from benchmarks.traces import Replay
from cache.bundle import BundleLayout
from cache.device_curve import device_curve
from cache.store import BundleFile
from runtime.gpu_plan import GpuPlan
from runtime.packed import bundle_header

MEMORY_PERCENT = 40  # of the FFN's bytes, for records in main memory and where they are read to
_WRITERS, _PIECE = 12, 2048


def write_file(shape: Shape, layout: BundleLayout, path: Path) -> BundleFile:
    """Random records of every layer. Before CUDA is used: it forks."""
    header, offsets = bundle_header(shape.num_hidden_layers, shape.intermediate_size, layout.stride)
    if not path.is_file():
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(header)
        with ProcessPoolExecutor(_WRITERS) as pool:
            list(pool.map(partial(_write_layer, shape, layout, part), offsets))
        os.sync()  # or reads past the page cache would wait for it
        part.rename(path)
    return BundleFile(path, layout, shape.intermediate_size, offsets)


def _write_layer(shape: Shape, layout: BundleLayout, path: Path, offset: int) -> None:
    rng = np.random.Generator(np.random.SFC64(offset))
    with path.open("r+b") as file:
        file.seek(offset)
        for start in range(0, shape.intermediate_size, _PIECE):
            file.write(random_records(rng, layout, min(_PIECE, shape.intermediate_size - start)).data)


def tiers_plan(shape: Shape, vocab_size: int, percent: int) -> GpuPlan:
    """With `percent` of the FFN on the GPU and MEMORY_PERCENT in main memory."""
    from benchmarks.gpu_shapes import shape_plan

    whole = shape_plan(shape, vocab_size, percent)
    memory = whole.home_memory_bytes - whole.ffn_bytes * (100 - MEMORY_PERCENT) // 100
    return shape_plan(shape, vocab_size, percent, memory_bytes=memory)


def measure_tiers(
    shape: Shape,
    vocab_size: int,
    file: BundleFile,
    plan: GpuPlan,
    replay: Replay,
    device: str = "cuda",
    warm: int = 32,
    tokens: int = 64,
) -> Figures:
    """Decode, batch 1; means over the same steps."""
    import torch

    from benchmarks.gpu_product import ProductTraced
    from benchmarks.gpu_shapes import weight_cap
    from runtime.disk_home import DiskHome
    from runtime.gpu_tiers import TieredFFN

    curve, slots = device_curve(file.path), plan.memory_slots_per_layer
    home = DiskHome(file, slots, plan.memory_staging_bytes, torch.device(device), curve=curve)
    model = ProductTraced(shape, vocab_size, home, plan, replay, device=device)
    model.decode(warm)
    assert isinstance(model.ffn, TieredFFN)
    before, waited_s = model.snapshot(), model.ffn.waited_s
    times = model.decode(tokens)
    moved = model.snapshot() - before
    gpu, cpu, disk = moved.tiers["gpu"], moved.tiers["cpu"], moved.transfers["disk", "cpu"]
    cost = home.cache.read_cost
    return {
        "tokens_per_s": 1 / statistics.fmean(times),
        "s_per_step": statistics.fmean(times),
        "s_per_step_median": statistics.median(times),
        "gpu_wait_s_per_step": (model.ffn.waited_s - waited_s) / tokens,
        "stall_share": disk.stall_seconds / sum(times),
        "active_share": gpu.lookups / tokens / (shape.num_hidden_layers * shape.intermediate_size),
        "gpu_hit_share": gpu.hits / gpu.lookups,
        "memory_hit_share": cpu.hits / cpu.lookups,  # of what the GPU lacks
        "disk_bytes_per_step": disk.bytes / tokens,
        "disk_needed_bytes_per_step": disk.needed_bytes / tokens,
        "disk_requests_per_step": disk.requests / tokens,
        "disk_bytes_per_s": disk.bytes / disk.stall_seconds,
        "disk_s_by_curve": cost.seconds(disk.requests, disk.bytes, shape.num_hidden_layers * tokens) / tokens,
        "link_bytes_per_step": moved.transfers["cpu", "gpu"].bytes / tokens,
        "io_engine": home.cache.reader_info.engine,
        "merge_gap_bytes": home.cache.merge_gap_bytes,
        "memory_slots_per_layer": list(slots),
        "memory_staging_bytes": plan.memory_staging_bytes,
        "ffn_on_gpu_percent": round(100 * plan.ffn_cache_share),
        "ffn_in_memory_percent": MEMORY_PERCENT,
        "memory_budget_bytes": plan.memory_budget_bytes,
        "gpu_budget_bytes": weight_cap(plan),
    }


def memory_below(packed: Path, served: Sequence[str]) -> int:
    """A --memory that leaves a real model's FFN the same percentage of main memory. served: options of `serve`, each
    with its value. Raises CalledProcessError."""
    pairs = zip(served[::2], served[1::2], strict=True)
    env = os.environ | {f"COLDSTREAM_{flag[2:].replace('-', '_').upper()}": value for flag, value in pairs}
    command = [sys.executable, "-c", "import server.cli as it; it.main()", "plan", str(packed), "--json"]
    plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)
    return int(plan["home_memory_bytes"] - plan["ffn_bytes"] * (100 - MEMORY_PERCENT) // 100)
