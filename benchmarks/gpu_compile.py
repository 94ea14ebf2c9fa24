"""Compiles every Triton kernel of the GPU tier for a GPU that is not here: what the interpreter lets pass.

    python -m benchmarks.gpu_compile [--capability 90]

Each wrapper is called with tensors in main memory; its launches are compiled and not launched. Typing, shapes that must
be known, and what the assembler refuses show up here; results and speed do not. One line of JSON a call, in its order;
the exit code is 1 when one of them failed. Triton's compiler is needed, and its interpreter must be off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.kernels import random_sketch
from cache.bundle import BundleDtype, BundleLayout
from runtime.gpu_ahead import Ahead
from runtime.gpu_ffn import GpuFFN
from runtime.gpu_home import GpuHome
from runtime.gpu_masks import Norm, PlaneMasks
from runtime.gpu_slots import GpuSlots
from runtime.kernels import triton_launch
from runtime.kernels.triton_attention import Splits, attend
from runtime.kernels.triton_copy import copy_records
from runtime.kernels.triton_gates import gate_masks
from runtime.kernels.triton_inputs import FIELDS, inputs
from runtime.kernels.triton_masks import DeviceSketch, Digits, Scoring, plane_masks
from runtime.kernels.triton_matvec import matvec, norm_rows
from runtime.kernels.triton_neurons import NUM_COUNTERS, Records, Scratch, add_scored, scores_itself
from runtime.sketches import InputStatistics, make_plane_sketch

HIDDEN, NEURONS = 576, 192  # SmolLM2's rows; few neurons, whose number is no constant
CPU = torch.device("cpu")
LAYOUT = BundleLayout.make(HIDDEN, True, BundleDtype.BF16)
Case = tuple[str, Callable[[], None]]


def compile_only(capability: int) -> None:
    """From now on a launch compiles for that compute capability (90: 9.0) and does nothing else."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compiled
    triton_launch.ASSUMED = capability // 10
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(driver)


def cases() -> Iterator[Case]:
    """Dtypes, gates, activations, masks and row counts that change what is compiled."""
    for dtype in BundleDtype:
        for gated, act in ((True, "silu"), (False, "relu2"), (True, "relu2")):
            yield f"neurons {dtype.value} {'gated ' * gated}{act}", neurons(dtype, gated, act, 1)
    for rows in (2, 4, 8, 16):
        yield f"neurons bf16 rows {rows}", neurons(BundleDtype.BF16, True, "silu", rows)
    yield "neurons int8 rows 16", neurons(BundleDtype.INT8, True, "relu2", 16)
    yield "neurons dense", neurons(BundleDtype.BF16, True, "silu", 1, masked=False)
    for dtype in BundleDtype:
        for gated in (True, False):
            yield f"a whole layer {dtype.value} {'gated' * gated}", whole(dtype, gated)
    for dtype in BundleDtype:
        for gated in (True, False):
            yield f"scored neurons {dtype.value} {'gated' * gated}", scored(dtype, gated, given=False)
    yield "scored neurons of the trace", scored(BundleDtype.BF16, False, True, 18432, 2560)
    yield "neurons by address", neurons(BundleDtype.BF16, True, "silu", 1, by_address=True)
    for rows in (1, 16):
        for gated, act in ((True, "silu"), (True, "relu2"), (False, "relu2")):
            for bits in (False, True):
                yield f"planes {'gated ' * gated}{act} rows {rows} {'by bits' * bits}", planes(gated, act, rows, bits)
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            yield f"gates {kind} rows {rows}", gates(kind, rows)
            if kind is not torch.float16:
                yield f"attention {kind} rows {rows}", attention(kind, rows)
    for rows in (1, 4):
        for kind in (torch.float32, torch.bfloat16):
            yield f"projections {kind} rows {rows}", projections(kind, rows)
    yield "inputs", step_inputs
    yield "copies", copies
    for rows in (1, 2):
        yield f"records that come early, rows {rows}", early(rows)


def neurons(
    dtype: BundleDtype, gated: bool, act: str, rows: int, masked: bool = True, by_address: bool = False
) -> Callable[[], None]:
    """A layer's FFN in a decode step. by_address: as over a home on disk."""

    def call() -> None:
        layout = BundleLayout.make(HIDDEN, gated, dtype)
        home = GpuHome(1, NEURONS, layout, register=False)
        slots = GpuSlots(home, (NEURONS // 4,), np.ones((1, NEURONS), np.float32), (0,), CPU)
        if by_address:
            made, where = slots.records, torch.zeros(NEURONS, dtype=torch.int64)
            slots.records = lambda layer: replace(made(layer), where=where)  # type: ignore[method-assign]
        masks = AllMasks(rows) if masked else None
        least = torch.zeros(1, NEURONS) if masked else None
        ffn = GpuFFN(slots, act, masks, least, rows, NEURONS, torch.bfloat16)
        ffn.decode(0, torch.zeros(rows, HIDDEN), norm_of(HIDDEN), torch.ones(rows, dtype=torch.int64))

    return call


def whole(dtype: BundleDtype, gated: bool) -> Callable[[], None]:
    """One row, and all records in slots."""

    def call() -> None:
        layout = BundleLayout.make(HIDDEN, gated, dtype)
        home = GpuHome(1, NEURONS, layout, register=False)
        slots = GpuSlots(home, (NEURONS,), np.ones((1, NEURONS), np.float32), (0,), CPU)
        ffn = GpuFFN(slots, "relu2", None, None, 1, NEURONS, torch.bfloat16)
        ffn.decode(0, torch.zeros(1, HIDDEN), norm_of(HIDDEN), torch.ones(1, dtype=torch.int64))

    return call


class AllMasks:
    """Every neuron, as one that predicts would say it."""

    name, num_bytes, num_whole = "all", 0, 0

    def __init__(self, rows: int) -> None:
        self._mask = torch.ones(rows, NEURONS, dtype=torch.uint8)

    def of(self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: object = None) -> torch.Tensor:
        return self._mask

    def scoring(self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: object = None) -> Scoring | None:
        return None

    def sure(self, max_rows: int, margin: float) -> None:
        """Nothing is surer than all."""


def scored(
    dtype: BundleDtype, gated: bool, given: bool, neurons: int = NEURONS, hidden: int = HIDDEN
) -> Callable[[], None]:
    """One row, all records in slots, and no list. given: a trace says what is wanted."""

    def call() -> None:
        triton_launch.BITS = True
        layout = BundleLayout.make(hidden, gated, dtype)
        slab = torch.zeros(neurons, layout.stride, dtype=torch.uint8)
        records = Records(slab, slab, torch.arange(neurons, dtype=torch.int32), layout, resident=True)
        scratch, x = Scratch.make(1, neurons, hidden, CPU), torch.zeros(1, hidden)
        there = DeviceSketch(random_sketch(np.random.default_rng(0), hidden, neurons, 1.7, gated, "relu2"), CPU)
        mask = torch.zeros(1, neurons, dtype=torch.uint8)
        scoring = Scoring(there, 0.5, Digits.make(1, there.width, CPU), mask, mask if given else None)
        counters, live = torch.zeros(NUM_COUNTERS, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        least = torch.zeros(neurons) if not given else None
        if not scores_itself(x, records):
            raise AssertionError("this is not how such a layer is scored")
        add_scored(x, scoring, records, "relu2", least, x, scratch, counters, live)

    return call


def norm_of(hidden: int) -> Norm:
    return Norm(torch.ones(hidden), 1e-5)


def planes(gated: bool, act: str, rows: int, bits: bool) -> Callable[[], None]:
    """bits: by products of bits, for a GPU that has them."""

    def call() -> None:
        triton_launch.BITS = bits
        rng, hidden = np.random.default_rng(0), 48
        gate, up, down = (rng.standard_normal((40, hidden)).astype(np.float32) for _ in range(3))
        statistics = InputStatistics.of(rng.standard_normal((200, hidden)).astype(np.float32))
        sketch = make_plane_sketch(act, gate if gated else None, up, down, statistics, 1.69)
        mask, x, there = torch.zeros(rows, 40, dtype=torch.uint8), torch.zeros(rows, hidden), DeviceSketch(sketch, CPU)
        plane_masks(x, torch.ones(hidden), 1e-5, there, 0.5, Digits.make(rows, there.width, CPU), x, mask)

    return call


def gates(dtype: torch.dtype, rows: int) -> Callable[[], None]:
    def call() -> None:
        mask = torch.zeros(rows, NEURONS, dtype=torch.uint8)
        gate_masks(torch.zeros(rows, HIDDEN), torch.zeros(NEURONS, HIDDEN, dtype=dtype), mask)

    return call


def attention(dtype: torch.dtype, rows: int) -> Callable[[], None]:
    def call() -> None:
        heads, kv_heads, size, page = 9, 3, 64, 16
        keys = torch.zeros(4, page, kv_heads, size, dtype=dtype)
        qkv, out = torch.zeros(rows, heads + 2 * kv_heads, size), torch.zeros(rows, heads, size)
        angles, positions = torch.zeros(64, size // 2), torch.zeros(rows, dtype=torch.int64)
        tables, scratch = torch.zeros(rows, 4, dtype=torch.int64), Splits.make(rows, heads, size, CPU)
        attend(qkv, angles, angles, positions, positions, keys, keys, tables, scratch, out, 0.125)

    return call


def projections(dtype: torch.dtype, rows: int) -> Callable[[], None]:
    def call() -> None:
        x, weight = torch.zeros(rows, HIDDEN), torch.zeros(NEURONS, HIDDEN, dtype=dtype)
        norm_rows(x, torch.ones(HIDDEN), 1e-5, x)
        matvec(x, weight, torch.zeros(rows, NEURONS), torch.ones(HIDDEN), 1e-5, torch.zeros(NEURONS))
        matvec(x, weight, torch.zeros(rows, NEURONS), added=True)

    return call


def step_inputs() -> None:
    fields, tables = torch.zeros(FIELDS, 2, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    embedding = torch.zeros(9, HIDDEN, dtype=torch.bfloat16)
    inputs(torch.zeros(2, FIELDS + 5, dtype=torch.int64), embedding, fields, tables, torch.zeros(2, HIDDEN))


def copies() -> None:
    words, ids = torch.zeros(8, 432, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    copy_records(words, words, ids, ids)
    GpuSlots(GpuHome(1, NEURONS, LAYOUT, register=False), (4,), np.ones((1, NEURONS), np.float32), (0,), CPU).rerank()


def early(rows: int) -> Callable[[], None]:
    """A layer, and what the one after it will surely want."""

    def call() -> None:
        rng, num = np.random.default_rng(0), NEURONS
        sketch = DeviceSketch(random_sketch(rng, HIDDEN, num, 1.7, True, "silu"), CPU)
        home = GpuHome(2, num, LAYOUT, register=False)
        slots = GpuSlots(home, (4, 4), np.ones((2, num), np.float32), (0, 0), CPU, num_early=64)
        masks = PlaneMasks([sketch, sketch], [1.0, 1.0], rows, CPU)
        ahead = Ahead(slots, masks.sure(rows, 2.0), (False, True))
        ffn = GpuFFN(slots, "silu", masks, torch.zeros(2, num), rows, num, torch.bfloat16, ahead)
        x, live, norm = torch.zeros(rows, HIDDEN), torch.ones(rows, dtype=torch.int64), norm_of(HIDDEN)
        ffn.answer(ffn.ask(0, x, norm, live, norm))
        ffn.answer(ffn.ask(1, x, norm, live))

    return call


def run(capability: int) -> int:
    """How many calls failed."""
    compile_only(capability)
    failed = 0
    for name, call in cases():
        begin, error = time.monotonic(), None
        try:
            call()
        except Exception:
            failed, error = failed + 1, traceback.format_exc()[-1500:]
        print(json.dumps({"call": name, "seconds": round(time.monotonic() - begin, 2), "error": error}), flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU to compile for: 90 is 9.0")
    sys.exit(1 if run(parser.parse_args().capability) else 0)


if __name__ == "__main__":
    main()
