"""Our reader against fio: random reads of 4 to 256 KiB at depth 64, on the same file in the same run.

    python benchmarks/reader.py FILE [--seconds 1.5] [--repeats 5] [--out RESULTS.json]

fio reads with io_uring and O_DIRECT; we read with io_uring and with pread threads, both with O_DIRECT, as the cache
does: one arena in huge pages, registered, tickets of many ranges, one always waiting behind the one that is waited for.
Runs are interleaved, and each figure is the median. FILE should be larger than the device's own cache; the page cache
plays no part. Needs fio. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cache.arena import new_arena
from cache.reader import Reader

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
DEPTH = 64
TARGETS = {"io_uring": 0.9, "pread": 0.8}  # of fio's bandwidth
_ARENA_BYTES = 32 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="file to read, at least 64 MiB")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    arguments = parser.parse_args()
    if not arguments.file.is_file() or arguments.file.stat().st_size < 64 << 20:
        sys.exit(f"{arguments.file}: not a file of at least 64 MiB")
    found = compare(arguments.file, arguments.seconds, arguments.repeats)
    print_table(found)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def compare(path: Path, seconds: float, repeats: int) -> dict[str, Any]:
    """Bytes a second of each way at each size, medians, and our shares of fio's."""
    runs: dict[tuple[int, str], list[float]] = {}
    for repeat in range(repeats):
        for size in SIZES:
            runs.setdefault((size, "fio"), []).append(fio(path, size, seconds))
            for engine in TARGETS:
                runs.setdefault((size, engine), []).append(ours(path, engine, size, seconds, repeat))
    rows = []
    for size in SIZES:
        speed = {way: statistics.median(runs[size, way]) for way in ("fio", *TARGETS)}
        shares = {f"{way}_share": speed[way] / speed["fio"] for way in TARGETS}
        rows.append({"read_bytes": size, **{f"{way}_bytes_per_s": v for way, v in speed.items()}, **shares})
    return {
        "benchmark": "reader",
        "date": datetime.now(UTC).date().isoformat(),
        "depth": DEPTH,
        "file_bytes": path.stat().st_size,
        "seconds": seconds,
        "repeats": repeats,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rows": rows,
        "met": {way: all(r[f"{way}_share"] >= share for r in rows) for way, share in TARGETS.items()},
    }


def fio(path: Path, size: int, seconds: float) -> float:
    """Bytes a second of fio, io_uring and O_DIRECT."""
    command = ["fio", "--name=read", f"--filename={path}", "--readonly", "--direct=1", "--ioengine=io_uring"]
    command += ["--rw=randread", f"--bs={size}", f"--iodepth={DEPTH}", "--time_based", f"--runtime={seconds}"]
    command += ["--output-format=json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        sys.exit("fio is missing: install it first")
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])


def ours(path: Path, engine: str, size: int, seconds: float, seed: int) -> float:
    """Bytes a second of our reader."""
    arena = new_arena(_ARENA_BYTES)
    arena[:] = 0  # resident, as a cache's staging is
    reader = Reader(path, arena, landing=(0, arena.size), engine=engine, queue_depth=DEPTH)
    half = _ARENA_BYTES // 2 // size
    lengths = np.full(half, size, np.int64)
    landing = [(np.arange(half) + part * half) * size for part in range(2)]
    rng = np.random.default_rng(seed)

    def submit(part: int) -> int:
        offsets = rng.integers(0, path.stat().st_size // size, half) * size
        return reader.submit(offsets, lengths, landing[part])

    start, turn, num_bytes = time.perf_counter(), 0, 0
    under_way = [submit(0), submit(1)]
    while time.perf_counter() - start < seconds:
        num_bytes += reader.wait(under_way[turn]).num_bytes
        under_way[turn] = submit(turn)
        turn = 1 - turn
    num_bytes += reader.wait(under_way[turn]).num_bytes + reader.wait(under_way[1 - turn]).num_bytes
    elapsed = time.perf_counter() - start
    reader.close()
    return num_bytes / elapsed


def print_table(found: dict[str, Any]) -> None:
    print(f"{'read':>8} {'fio':>12} " + " ".join(f"{way:>12} {'share':>6}" for way in TARGETS))
    for row in found["rows"]:
        ours = " ".join(f"{row[f'{w}_bytes_per_s'] / 1e9:7.2f} GB/s {row[f'{w}_share']:6.0%}" for w in TARGETS)
        print(f"{row['read_bytes'] >> 10:>4} KiB {row['fio_bytes_per_s'] / 1e9:7.2f} GB/s {ours}")


if __name__ == "__main__":
    main()
