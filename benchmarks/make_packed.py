"""A packed model of a large shape with random weights, written at the speed of the disk: nothing is fitted.

    python -m benchmarks.make_packed --shape afm-4.5b --dtype bf16|int8 --trace FILE --out DIR [--layers N]
    python -m benchmarks.make_packed --like DIR --order frequency|shuffled --out DIR

`coldstream prepare` takes minutes for each layer of such a size, and what it would fit there would fit noise. Records
and resident matrices are random, sketches are random planes of the real size, and the profile's frequencies and order
are those of a trace of a real model (benchmarks/traces.py), whose sets are to be forced on the model; thresholds are
there for form's sake, and mean nothing. --like: the same files (linked) with the neurons in another order: by frequency
alone, or shuffled behind the fifth that may be pinned. Knows the packed format; holds one piece of a layer at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.kernels import random_sketch
from benchmarks.make_checkpoint import (
    ITEM_BYTES,
    Shape,
    add_shape_options,
    chosen_shape,
    config_json,
    num_bytes,
    random_bf16,
    tensors,
)
from benchmarks.traces import Replay, Trace
from cache.bundle import BundleDtype, BundleLayout, checksums
from cache.device_curve import device_curve
from cache.store import BundleFile
from runtime.calibrate import CETT_GRID
from runtime.checkpoint import open_checkpoint
from runtime.config import ModelConfig
from runtime.load import default_model
from runtime.pack import is_ffn
from runtime.packed import (
    BUNDLES,
    MANIFEST,
    PROFILE,
    RESIDENT,
    SKETCH,
    Packed,
    Source,
    bundle_header,
    open_packed,
    safetensors_header,
    sha256,
    write_manifest,
)
from runtime.placement import pinned_sizes
from runtime.tokenizer import Tokenizer
from runtime.tune import SKETCH_BITS

_CETT = 0.05  # that traces are recorded at; only a name here
_PINNED_SHARE = 0.2  # that runs pin at most
_PIECE = 4096  # records made at a time
_ONE = 0x3F80  # 1.0 in bf16


def make_packed(
    shape: Shape, out: Path, dtype: BundleDtype, trace: Trace, vocab_size: int | None = None, seed: int = 0
) -> int:
    """Writes the packed model into `out`, which must not exist; returns the bytes of its records. SystemExit, before
    anything is written, when it exists or the disk is too full."""
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(default_model()))
    vocab = tokenizer.vocab_size if vocab_size is None else vocab_size
    eos_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    config = ModelConfig.from_hf(config_json(shape, vocab, tokenizer.bos_id, eos_id))
    layout = BundleLayout.make(shape.hidden_size, shape.gated, dtype)
    resident = [(name, size) for name, size in tensors(shape, vocab) if not is_ffn(name)]
    ffn_bytes = config.num_hidden_layers * config.intermediate_size * layout.stride
    _check(out, ffn_bytes + sum(num_bytes(size) for _, size in resident))
    replay = Replay(trace, config.num_hidden_layers, config.intermediate_size)
    order = replay.disk_order(pinned_sizes(config.intermediate_size))
    frequency = replay.reordered(order).frequency()
    out.mkdir(parents=True)
    rng = np.random.Generator(np.random.SFC64(seed))
    header, offsets = bundle_header(config.num_hidden_layers, config.intermediate_size, layout.stride)
    with (out / BUNDLES).open("wb") as file:
        file.write(header)
        for piece in _records(rng, config, layout):
            file.write(piece.data)
    _write_resident(out / RESIDENT, resident, rng, shape.hidden_size**-0.5)
    _write_sketches(out / SKETCH, config, seed)
    save_file(_profile(frequency, order), out / PROFILE)
    tokenizer.save(out)
    bundles = BundleFile(out / BUNDLES, layout, config.intermediate_size, offsets)
    _write_manifest(out, config, bundles)
    device_curve(out / BUNDLES)
    return ffn_bytes


def make_like(like: Path, out: Path, order: str, seed: int = 0) -> None:
    """Another packed model whose neurons lie in another order, the first one's large files under new names: their
    bytes are random, so that only the profile says who lies where. SystemExit when `out` exists."""
    _check(out, 0)
    packed = open_packed(like)
    profile = packed.read(PROFILE)
    back = np.argsort(profile["order"], axis=1)
    frequency = np.take_along_axis(profile["frequency"][0], back, axis=1)  # by frequency again
    rows = np.tile(np.arange(frequency.shape[1], dtype=np.int32), (frequency.shape[0], 1))
    if order == "shuffled":
        first = round(_PINNED_SHARE * frequency.shape[1])
        np.random.default_rng(seed).permuted(rows[:, first:], axis=1, out=rows[:, first:])
    out.mkdir(parents=True)
    for file in like.iterdir():
        if file.name not in (PROFILE, MANIFEST):
            os.link(file, out / file.name)
    save_file(_profile(np.take_along_axis(frequency, rows, axis=1), rows), out / PROFILE)
    bundles = replace(packed.bundles, path=out / BUNDLES)
    sums = packed.checksums | {PROFILE: sha256(out / PROFILE)}
    write_manifest(replace(packed, path=out, bundles=bundles, checksums=sums))


def _check(out: Path, needed: int) -> None:
    if out.exists():
        raise SystemExit(f"--out {out}: exists already")
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + (1 << 30):
        raise SystemExit(f"--out {out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")


def _records(rng: np.random.Generator, config: ModelConfig, layout: BundleLayout) -> Iterator[np.ndarray]:
    """Pieces of all layers, in order, uint8 [n, stride]."""
    for _ in range(config.num_hidden_layers):
        for start in range(0, config.intermediate_size, _PIECE):
            yield random_records(rng, layout, min(_PIECE, config.intermediate_size - start))


def random_records(rng: np.random.Generator, layout: BundleLayout, num: int) -> np.ndarray:
    """Records of random vectors with a standard deviation near 1 / sqrt(D), checksums right; uint8 [num, stride]."""
    hidden, deviation = layout.hidden_size, layout.hidden_size**-0.5
    out = np.zeros((num, layout.stride), np.uint8)
    for v in layout.vectors:
        size = hidden * v.dtype.item_bytes
        if v.dtype is BundleDtype.BF16:
            values = random_bf16(rng, num * hidden, deviation).view(np.uint8)
        elif v.dtype is BundleDtype.INT8:
            values = np.frombuffer(rng.bytes(num * hidden), np.uint8)
            scale = np.array([deviation / 73.9], np.float32).view(np.uint8)  # 256 codes alike: 73.9 is their deviation
            out[:, v.scale_offset : v.scale_offset + 4] = scale
        else:
            raise SystemExit(f"--dtype {v.dtype.value}: bf16 or int8")
        out[:, v.offset : v.offset + size] = values.reshape(num, size)
    end = layout.checksum_offset
    out[:, end : end + 8] = checksums(layout, out).view(np.uint8).reshape(num, 8)
    return out


def _write_resident(
    path: Path, named: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator, deviation: float
) -> None:
    with path.open("wb") as file:
        file.write(safetensors_header([(name, "BF16", size, num_bytes(size)) for name, size in named]))
        for _, size in named:
            _write_tensor(file, size, rng, deviation)


def _write_tensor(file: IO[bytes], size: tuple[int, ...], rng: np.random.Generator, deviation: float) -> None:
    count = num_bytes(size) // ITEM_BYTES
    file.write((np.full(count, _ONE, np.uint16) if len(size) == 1 else random_bf16(rng, count, deviation)).data)


def _write_sketches(path: Path, config: ModelConfig, seed: int) -> None:
    rng, arrays = np.random.default_rng(seed), {}
    for layer in range(config.num_hidden_layers):
        size = config.hidden_size, config.intermediate_size
        sketch = random_sketch(rng, *size, SKETCH_BITS, config.gated, config.hidden_act)
        arrays |= sketch.to_arrays(f"layers.{layer}.")
    save_file(arrays, path)


def _profile(frequency: np.ndarray, order: np.ndarray) -> dict[str, np.ndarray]:
    """What `runtime.pack` writes: these frequencies [L, F] at every target, and this order of the trace's neurons
    [L, F]; everything else for form's sake."""
    layers, neurons = frequency.shape
    targets = len(CETT_GRID)
    taken = np.full((layers, targets), frequency.mean(), np.float32)
    return {
        "targets": np.asarray(CETT_GRID),
        "frequency": np.repeat(frequency[None], targets, axis=0),
        "epsilon": np.full((layers, targets), 1e-6, np.float32),
        "tau": np.ones((layers, targets), np.float32),
        "active": taken,
        "taken": taken,
        "moved": taken,
        "order": order,
        "down_norm": np.ones((layers, neurons), np.float32),
    }


def _write_manifest(out: Path, config: ModelConfig, bundles: BundleFile) -> None:
    row: dict[str, Any] = {"sparse": True, "sparse_from": CETT_GRID[0], "sketch_bytes": 0}
    contract = {
        "mode": "sparse",
        "cett": _CETT,
        "max_ppl_increase_percent": None,
        "measured": [],
        "layers": [row] * config.num_hidden_layers,
        "sketch_bits": SKETCH_BITS,
    }
    write_manifest(
        Packed(
            path=out,
            config=config,
            bundles=bundles,
            source=Source(str(out.absolute()), "random", []),
            standalone=True,
            contract=contract,
            checksums={name: sha256(out / name) for name in (PROFILE, SKETCH, RESIDENT)},
            calibration={"text": "none: random weights"},
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, required=False)
    parser.add_argument("--dtype", choices=["bf16", "int8"], default="bf16", help="of the records")
    parser.add_argument("--trace", type=Path, help="whose frequencies the model has")
    parser.add_argument("--like", type=Path, help="a model of this script, whose files are linked")
    parser.add_argument("--order", choices=["frequency", "shuffled"], help="of the neurons, with --like")
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    options = parser.parse_args()
    new, other = (options.shape, options.trace), (options.like, options.order)
    if (None in new) == (None in other):
        parser.error("either --shape and --trace, or --like and --order")
    if options.like is not None:
        make_like(options.like, options.out, options.order)
        return
    shape = chosen_shape(parser, options)
    made = make_packed(shape, options.out, BundleDtype(options.dtype), Trace.read(options.trace), seed=options.seed)
    print(json.dumps({"shape": options.shape, "layers": shape.num_hidden_layers, "record_bytes": made}))


if __name__ == "__main__":
    main()
