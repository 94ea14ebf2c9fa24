"""The CPU kernels beside what the machine reads at most, in one run: each figure a share of the ceiling of its round.

    flock LOCK python -m benchmarks.kernels [--kernels auto] [--threads 1 2] [--rounds 15] [--quick]

Ceiling: `read_through`, a contiguous read of an arena that no cache holds. Every case walks through its own data so
that nothing is still in a cache when its turn comes again. A round runs every case once, with the ceiling before and
after it; shown are the medians over the rounds of GB/s, of the ceiling around it, and of their ratio, and the best
round over the best ceiling, which other work on the machine disturbs least. Bytes are those
that the kernel must read (weights, codes, keys and values), once a call, whatever the batch. One JSON line at the end.
Needs the native module. Knows no model: weights are random, and neurons all active unless the case says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from cache.arena import new_arena
from cache.bundle import BundleDtype, BundleLayout
from runtime.kernels import select
from runtime.kernels.native import NativeKernels
from runtime.sketches import PlaneMatrix, PlaneSketch, allot_bits, padded_bytes

CALL_BYTES = 20 << 20  # of one call on records
KV = {"num_kv_heads": 4, "head_dim": 128, "block_size": 16}


@dataclass(frozen=True, slots=True)
class Case:
    """A call that reads num_bytes; target: the share of the ceiling that it should reach, None: reported only."""

    name: str
    num_bytes: int
    call: Callable[[], object]
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """What all cases read: an arena far larger than the caches, as bytes and, of each half word, a small number."""

    arena: np.ndarray  # uint8 [N]
    rng: np.random.Generator

    @classmethod
    def make(cls, num_bytes: int) -> Data:
        rng = np.random.default_rng(0)
        piece = rng.integers(0, 1 << 16, 1 << 20, np.uint16)  # 2 MiB
        piece = ((piece & 0x80FF) | 0x3C00).view(np.uint8)  # bf16 of 0.008 to 0.03, either sign
        arena = new_arena(num_bytes)
        for at in range(0, num_bytes, piece.nbytes):
            arena[at : at + piece.nbytes] = piece
        return cls(arena, rng)

    def floats(self, *shape: int) -> np.ndarray:
        return self.rng.normal(0, 1, shape).astype(np.float32)


def ffn_case(
    kernels: NativeKernels, data: Data, layout: BundleLayout, batch: int, target: float | None, only_up: bool = False
) -> Case:
    """Scattered records; only_up: no neuron is active, so that a single vector of each is read."""
    places = data.rng.permutation(data.arena.size // layout.stride).astype(np.int64) * layout.stride
    read = layout.vector("up").dtype.item_bytes * layout.hidden_size * (1 if only_up else len(layout.vectors))
    num = min(CALL_BYTES // read, places.size // 4)
    parts = cycle([places[i : i + num] for i in range(0, places.size - num + 1, num)])
    x, out = data.floats(batch, layout.hidden_size), np.zeros((batch, layout.hidden_size), np.float32)
    act = "silu"
    if only_up:
        x[:], act = 0, "relu"

    def call() -> None:
        kernels.ffn(x, data.arena, next(parts), None, layout, act, out)

    what = f"single {read // 1024} KiB rows" if only_up else f"records of {read // 1024} KiB"
    return Case(f"ffn {layout.dtype.value}, {what}, batch {batch}", num * read, call, target)


def bare_read_case(kernels: NativeKernels, data: Data, stride: int, read: int) -> Case:
    """The same scattered bytes and nothing computed: what is left between this and the ceiling is the memory's."""
    places = data.rng.permutation(data.arena.size // stride).astype(np.int64) * stride
    num = min(CALL_BYTES // read, places.size // 4)
    parts = cycle([places[i : i + num] for i in range(0, places.size - num + 1, num)])
    name = f"bare reads of {read // 1024} KiB, scattered"
    return Case(name, num * read, lambda: kernels.read_records(data.arena, next(parts), read))


def linear_cases(kernels: NativeKernels, data: Data, batch: int) -> Iterator[Case]:
    """Ours and torch's on matrices [2560, 2560] of the arena."""
    hidden = 2560
    size = hidden * hidden * 2
    weights = [data.arena[i : i + size].view(np.uint16).reshape(hidden, hidden) for i in range(0, 32 * size, size)]
    mine, theirs = cycle(weights), cycle([torch.from_numpy(w.view(np.int16)).view(torch.bfloat16) for w in weights])
    x, out = data.floats(batch, hidden), np.zeros((batch, hidden), np.float32)
    row = torch.from_numpy(x).bfloat16()

    def ours() -> None:
        for _ in range(2):
            kernels.linear(x, next(mine), out)

    def torchs() -> None:
        for _ in range(2):
            torch.nn.functional.linear(row, next(theirs))

    yield Case(f"linear bf16, batch {batch}", 2 * size, ours, 0.8)
    yield Case(f"linear bf16, batch {batch}, torch", 2 * size, torchs)


def plane_case(kernels: NativeKernels, data: Data, hidden: int, num: int, bits: float, gated: bool, batch: int) -> Case:
    """Sketches of as many layers as no cache holds."""
    sketches = [random_sketch(data.rng, hidden, num, bits, gated) for _ in range(8 if num > 4096 else 160)]
    read = sketches[0].num_bytes
    x, out = data.floats(batch, hidden), np.zeros((batch, num), np.float32)
    turn = cycle(sketches)
    calls = max(1, (CALL_BYTES // 2) // read)

    def call() -> None:
        for _ in range(calls):
            kernels.plane_scores(x, next(turn), out)

    shape = f"{hidden} x {num}{' gated' if gated else ''}, {bits:g} bits"
    return Case(f"plane_scores {shape}, batch {batch}", calls * read, call)


def random_sketch(
    rng: np.random.Generator, hidden: int, num: int, bits: float, gated: bool, act: str = "relu2"
) -> PlaneSketch:
    """Of the size of a real one at `bits` a weight; its scores mean nothing."""

    def matrix() -> PlaneMatrix:
        allotted = allot_bits(np.exp(rng.normal(0, 1, hidden)), round(bits * hidden / 16) * 16).astype(np.uint8)
        codes = rng.integers(0, 256, (num, padded_bytes(int(allotted.sum()))), np.uint8)
        half = np.ones(max(hidden, num), np.float16)
        return PlaneMatrix(allotted, half[:hidden], codes, half[:num].copy(), half[:num].copy(), 1.0, 1.0)

    return PlaneSketch(act, matrix() if gated else None, matrix(), num, None if gated else np.ones(num, np.float16))


def attention_case(kernels: NativeKernels, data: Data, num_tokens: int) -> Case:
    shape = (-1, KV["block_size"], KV["num_kv_heads"], KV["head_dim"])
    half = data.arena.size // 2
    block_bytes = 2 * KV["block_size"] * KV["num_kv_heads"] * KV["head_dim"]
    keys, values = (a[: half // block_bytes * block_bytes].view(np.uint16) for a in np.split(data.arena[: 2 * half], 2))
    pages, num_blocks = (keys.reshape(shape), values.reshape(shape)), -(-num_tokens // KV["block_size"])
    blocks = data.rng.permutation(pages[0].shape[0]).astype(np.int32)
    tables = cycle([blocks[i : i + num_blocks] for i in range(0, blocks.size - num_blocks + 1, num_blocks)])
    q = data.floats(20, KV["head_dim"])
    out = np.zeros_like(q)
    read = 2 * num_tokens * KV["num_kv_heads"] * KV["head_dim"] * 2
    calls = max(1, CALL_BYTES // read)

    def call() -> None:
        for _ in range(calls):
            kernels.paged_attention(q, *pages, next(tables), num_tokens, out, KV["head_dim"] ** -0.5)

    return Case(f"paged_attention bf16, {num_tokens} tokens", calls * read, call)


def all_cases(kernels: NativeKernels, data: Data, quick: bool) -> Iterator[Case]:
    afm = {d: BundleLayout.make(2560, False, d) for d in BundleDtype}
    llama = BundleLayout.make(4096, False, BundleDtype.BF16)
    yield ffn_case(kernels, data, afm[BundleDtype.BF16], 1, 0.8)
    yield ffn_case(kernels, data, llama, 1, 0.72, only_up=True)
    yield ffn_case(kernels, data, afm[BundleDtype.INT8], 1, 0.8)
    for kib in (10, 8, 5):
        yield bare_read_case(kernels, data, afm[BundleDtype.BF16].stride, kib << 10)
    yield plane_case(kernels, data, 2560, 18432, 2.0, False, 1)
    yield from linear_cases(kernels, data, 1)
    if quick:
        return
    for batch in (2, 4, 8, 16):
        for dtype in (BundleDtype.BF16, BundleDtype.INT8):
            yield ffn_case(kernels, data, afm[dtype], batch, None)
    yield ffn_case(kernels, data, BundleLayout.make(576, True, BundleDtype.BF16), 1, None)
    yield plane_case(kernels, data, 2560, 18432, 2.0, False, 4)
    yield plane_case(kernels, data, 576, 1536, 2.0, True, 1)
    yield plane_case(kernels, data, 576, 1536, 2.0, True, 4)
    yield from linear_cases(kernels, data, 4)
    yield attention_case(kernels, data, 512)
    yield attention_case(kernels, data, 4096)


def gb_per_s(num_bytes: int, call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return num_bytes / (time.perf_counter() - start) / 1e9


def measure(kernels: NativeKernels, data: Data, cases: list[Case], rounds: int) -> list[dict[str, object]]:
    """Medians over the rounds; the first round only warms up."""
    piece = data.arena.size // 16
    pieces = cycle([data.arena[i * piece : (i + 1) * piece] for i in range(16)])

    def ceiling() -> float:
        return gb_per_s(piece, lambda: kernels.read_through(next(pieces)))

    found = np.zeros((rounds + 1, len(cases), 2))
    for sample in found:
        before = ceiling()
        for row, case in zip(sample, cases, strict=True):
            figure, after = gb_per_s(case.num_bytes, case.call), ceiling()
            row[:], before = (figure, (before + after) / 2), after
    best = found[1:].max(axis=0)
    figures, shares = np.median(found[1:], axis=0), np.median(found[1:, :, 0] / found[1:, :, 1], axis=0)
    return [
        {
            "name": case.name,
            "threads": kernels.num_threads,
            "gb_per_s": round(float(figure), 2),
            "ceiling_gb_per_s": round(float(ceiling), 2),
            "share": round(float(share), 3),
            "best_gb_per_s": round(float(most), 2),
            "best_share": round(float(most / best[:, 1].max()), 3),
            "target": case.target,
        }
        for case, (figure, ceiling), share, most in zip(cases, figures, shares, best[:, 0], strict=True)
    ]


def call_us(kernels: NativeKernels, pause_s: float) -> float:
    """A call of next to no work, in microseconds: what starting the threads costs, awake or (after a pause) asleep."""
    x, weight, out = np.ones((1, 8), np.float32), np.ones((64, 8), np.float32), np.zeros((1, 64), np.float32)
    times = []
    for _ in range(300 if pause_s == 0 else 50):
        time.sleep(pause_s) if pause_s else None
        start = time.perf_counter()
        kernels.linear(x, weight, out)
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)) * 1e6, 1)


def show(row: dict[str, object]) -> None:
    target = "" if row["target"] is None else f"  (target {100 * float(str(row['target'])):.0f} %)"
    print(
        f"{row['name']:52} {row['threads']} threads {row['gb_per_s']:7.2f} of {row['ceiling_gb_per_s']:6.2f} GB/s "
        f"= {100 * float(str(row['share'])):5.1f} %, best {row['best_gb_per_s']:6.2f} GB/s "
        f"= {100 * float(str(row['best_share'])):5.1f} %{target}",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="auto", help="generic, avx2 or avx512")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--arena-mib", type=int, default=1024, help="far above the caches")
    parser.add_argument("--quick", action="store_true", help="only the cases that have a target")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    kernels = select(options.kernels)
    if not isinstance(kernels, NativeKernels):
        raise SystemExit(f"--kernels {options.kernels}: the reference is not measured")
    data = Data.make(options.arena_mib << 20)
    rows, starts = [], {}
    cases = list(all_cases(kernels, data, options.quick))
    for threads in options.threads:
        kernels.set_num_threads(threads)
        torch.set_num_threads(threads)
        for row in measure(kernels, data, cases, options.rounds):
            show(row)
            rows.append(row)
        starts[threads] = {"awake_us": call_us(kernels, 0), "asleep_us": call_us(kernels, 0.002)}
        print(f"a call of next to no work, {threads} threads: {starts[threads]}", flush=True)
    machine = {"kernels": kernels.name, "machine": platform.processor() or platform.machine()}
    print(json.dumps(machine | {"rounds": options.rounds, "cases": rows, "call": starts}))


if __name__ == "__main__":
    main()
