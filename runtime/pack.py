"""Checkpoint to packed model: one pass over the layers that re-lays the FFN, and finds its thresholds on the way.

Holds one layer's weights and the calibration's activations, so that it runs where the model does not fit. All work is
done in a hidden directory beside the result, which is renamed when complete: a killed run leaves nothing that loads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.numpy import save_file

from cache.budget import detect_memory, format_size, most_bytes, process_bytes
from cache.bundle import BundleDtype, BundleLayout, pack_records
from cache.errors import ColdstreamError, UnsupportedError
from cache.store import BundleFile
from runtime.calibrate import CETT_GRID, LayerThresholds
from runtime.checkpoint import Checkpoint, ResidentFile, check_tensors
from runtime.config import ModelConfig
from runtime.contract import CANDIDATES, Contract, choose_cett
from runtime.layers import FFNWeights, ffn_name
from runtime.pack_lock import pack_lock
from runtime.packed import (
    BUNDLES,
    PROFILE,
    RESIDENT,
    SKETCH,
    Packed,
    Source,
    bundle_header,
    is_packed,
    safetensors_header,
    sha256,
    write_manifest,
)
from runtime.plan import sketch_row_bytes
from runtime.safetensors_file import open_to_others
from runtime.streams import embed, layers
from runtime.tokenizer import Tokenizer
from runtime.tune import REFERENCE_CACHE, SKETCH_BITS, Samples, TunedLayer
from runtime.windows import WINDOW, Windows, read_ids, split_windows

NUM_WINDOWS = 4
_WORTH = 0.95  # of the bytes that dense moves: a model that saves less is served densely

Progress = Callable[[str, float], None]  # what is being done, share done 0..1


@dataclass(frozen=True, slots=True)
class PackOptions:
    """cett None: chosen by the contract, the largest whose perplexity is at most `max_ppl_increase` percent above
    dense; bundles: auto, bf16, fp16, fp32 or int8."""

    calibration: Path
    cett: float | None = None
    max_ppl_increase: float = 1.0
    bundles: str = "auto"
    standalone: bool = False


def pack(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    out: Path,
    options: PackOptions,
    progress: Progress,
    reuse: bool = False,
) -> None:
    """Writes a packed model to `out`, which must not exist. Raises ColdstreamError; then nothing is left behind.

    Waits while another process writes there. reuse: what that has made will do, and is not refused.
    """
    check_tensors(checkpoint)
    config = checkpoint.config
    layout = BundleLayout.make(config.hidden_size, config.gated, bundle_dtype(options.bundles, checkpoint))
    _refuse_existing(out, reuse)
    _check_space(out, packed_bytes(config, layout) + (resident_bytes(checkpoint) if options.standalone else 0))
    _check_options(options)
    windows = split_windows(tokenizer, options.calibration, config.vocab_size)
    _check_memory(config, windows)
    waiting = "waiting for another process that packs this model"
    with _writing(out), pack_lock(out, lambda: progress(waiting, 0.0)) as alone:
        if reuse and is_packed(out):
            return
        _refuse_existing(out, False)
        with _atomic_directory(out, alone) as partial:
            _write(checkpoint, tokenizer, partial, layout, windows, options, progress)


def _refuse_existing(out: Path, reuse: bool) -> None:
    if out.exists() and not (reuse and is_packed(out)):
        raise ColdstreamError(f"--out {out}: already exists; remove it or name another directory")


def _check_options(options: PackOptions) -> None:
    if options.cett is not None and not CETT_GRID[0] <= options.cett <= CETT_GRID[-1]:
        raise ColdstreamError(f"--cett {options.cett:g}: from {CETT_GRID[0]:g} to {CETT_GRID[-1]:g}")
    if options.max_ppl_increase <= 0:
        raise ColdstreamError(f"--max-ppl-increase {options.max_ppl_increase:g}: a percentage above 0")


def bundle_dtype(name: str, checkpoint: Checkpoint) -> BundleDtype:
    """The records' dtype for --bundles; `auto` keeps a float checkpoint's own, fp16 for quantised GGUF types."""
    if name != "auto":
        return BundleDtype(name)
    source = checkpoint.dtype(ffn_name(0, "up"))
    return BundleDtype(source) if source in ("bf16", "fp16", "fp32") else BundleDtype.FP16


def is_ffn(name: str) -> bool:
    return ".mlp." in name


def packed_bytes(config: ModelConfig, layout: BundleLayout) -> int:
    """Bytes that packing writes, within a few percent: bundles, sketch, profile."""
    neurons = config.num_hidden_layers * config.intermediate_size
    return neurons * (layout.stride + sketch_row_bytes(config) + 4 * (len(CETT_GRID) + 3)) + (16 << 20)


def resident_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that a standalone copy of everything but the FFN takes: what is quantised is kept as fp32."""
    return sum(_resident_size(checkpoint, n) for n in checkpoint.names() if not is_ffn(n))


def _resident_size(checkpoint: Checkpoint, name: str) -> int:
    item_bytes = 2 if checkpoint.dtype(name) in ("bf16", "fp16") else 4
    return math.prod(checkpoint.shape(name)) * item_bytes


def calibration_tokens(
    tokenizer: Tokenizer, text: Path, vocab_size: int, num_windows: int = NUM_WINDOWS
) -> torch.Tensor:
    """Windows evenly spread over a text, int64 [num_windows, WINDOW]; fewer when the text is short."""
    ids = read_ids(tokenizer, text, vocab_size)
    num = min(num_windows, ids.numel() // WINDOW)
    return torch.stack([ids[s : s + WINDOW] for s in np.linspace(0, ids.numel() - WINDOW, num).astype(int)])


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """The directory for `out`; what the disk refuses is said of it, not of a file in it that will not be there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ColdstreamError(f"{out.parent}: the disk is full; nothing was kept") from error
        raise ColdstreamError(f"{out}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _atomic_directory(out: Path, alone: bool) -> Iterator[Path]:
    """A directory to write into that becomes `out` when the block ends well, and vanishes when it does not.

    alone: nobody else writes there, so what else is there was left by those that were killed.
    """
    for left in out.parent.iterdir() if alone else ():
        if left.name.startswith(f".{out.name}.partial-"):
            shutil.rmtree(left, ignore_errors=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.iterdir(), partial):  # or a power cut leaves a model whose manifest is empty
            _sync(path)
        os.rename(partial, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_space(out: Path, needed: int) -> None:
    existing = next(p for p in (out.parent, *out.parent.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ColdstreamError(f"{existing}: packing needs {needed} bytes of disk, {free} are free")


def _check_memory(config: ModelConfig, windows: Windows) -> None:
    """Packing keeps to no budget: where it cannot do, the kernel would kill it after minutes without a word."""
    now, needed = process_bytes(), packing_bytes(config, windows)
    free = max(0, most_bytes(detect_memory(), now) - now)
    if free < needed:
        raise ColdstreamError(
            f"packing needs {format_size(needed)} of memory or more, and {format_size(free)} are free here; pack where "
            f"there is more, with coldstream prepare --standalone, and serve a copy of what it writes"
        )


def packing_bytes(config: ModelConfig, windows: Windows) -> int:
    """The least that packing takes at its peak, beside what the process has: all tracks of the text, twice, a layer in
    fp32 as it came, its FFN as it is ordered, and, for the rest, six times one of its matrices: about a tenth less than
    was measured at the widths of AFM-4.5B and Llama-7B (benchmarks/LOG.md)."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    matrix, tokens = config.hidden_size * config.intermediate_size, windows.sizes()
    rows = tokens["statistics"] + tokens["thresholds"] + (1 + len(CANDIDATES)) * tokens["validation"]
    weights = config.hidden_size * heads + (2 * (3 if config.gated else 2) + 6) * matrix
    return 4 * (2 * rows * config.hidden_size + weights)


def _write(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    out: Path,
    layout: BundleLayout,
    windows: Windows,
    options: PackOptions,
    progress: Progress,
) -> None:
    config = checkpoint.config
    header, offsets = bundle_header(config.num_hidden_layers, config.intermediate_size, layout.stride)
    with (out / BUNDLES).open("wb") as file:
        file.write(header)
        found = _pack_layers(checkpoint, file, layout, windows, options, progress)
    for name, tensors in ((SKETCH, found.sketches), (PROFILE, found.profile())):
        save_file(tensors, out / name)
        open_to_others(out / name)
    if options.standalone:
        _copy_resident(checkpoint, out / RESIDENT)
        config = ResidentFile(out / RESIDENT, config).config  # what was quantised is not, in the copy
    tokenizer.save(out)
    small = (PROFILE, SKETCH, *((RESIDENT,) if options.standalone else ()))
    contract = found.contract(options)
    write_manifest(
        Packed(
            path=out,
            config=config,
            bundles=BundleFile(out / BUNDLES, layout, config.intermediate_size, offsets),
            source=Source(
                str(checkpoint.path.absolute()), checkpoint.kind, [f.to_json() for f in checkpoint.fingerprint()]
            ),
            standalone=options.standalone,
            contract=contract,
            checksums={name: sha256(out / name) for name in small},
            calibration={
                "text": options.calibration.name,
                "sha256": hashlib.sha256(options.calibration.read_bytes()).hexdigest(),
                "tokens": windows.sizes(),
            },
        )
    )
    progress("packing", 1.0)


@torch.inference_mode()
def _pack_layers(
    checkpoint: Checkpoint,
    file: IO[bytes],
    layout: BundleLayout,
    windows: Windows,
    options: PackOptions,
    progress: Progress,
) -> _Found:
    """One pass: every layer is tuned on the text's dense way through it, written, and tried by all candidates."""
    targets = sorted({*CETT_GRID, *CANDIDATES, *([options.cett] if options.cett else [])})
    samples = Samples(embed(checkpoint, windows.statistics), embed(checkpoint, windows.thresholds))
    contract = Contract(checkpoint, windows.validation, targets, [options.cett] if options.cett else CANDIDATES)
    found = _Found(targets)
    for layer in layers(checkpoint, windows.length):
        progress("packing", layer.index / checkpoint.config.num_hidden_layers)
        tuned = samples.tune(layer, layout, targets)
        _write_records(file, layout, tuned.layer.ffn)
        contract.step(tuned)
        found.add(tuned)
        del layer, tuned  # before the next one is loaded, and before the head is
    found.measured = contract.measure()
    return found


class _Found:
    """What the layers gave: sketches, arrays of the profile, and the contract."""

    def __init__(self, targets: Sequence[float]) -> None:
        self.targets = targets
        self.sketches: dict[str, np.ndarray] = {}
        self.measured: list[dict[str, Any]] = []
        self._thresholds: list[LayerThresholds] = []
        self._arrays: dict[str, list[np.ndarray]] = {"order": [], "down_norm": [], "moved": []}
        self._sketch_bytes: list[int] = []
        self._moved_dense = 1.0

    def add(self, tuned: TunedLayer) -> None:
        self._thresholds.append(tuned.found)
        self._arrays["order"].append(tuned.order.astype(np.int32))
        self._arrays["down_norm"].append(tuned.layer.down_norm.numpy())
        self._arrays["moved"].append(tuned.moved.astype(np.float32))
        self._moved_dense = tuned.moved_dense
        wanted = bool(tuned.found.tau.any())  # a layer that is read whole at every target needs no sketch
        self._sketch_bytes.append(tuned.sketch.num_bytes if wanted else 0)
        if wanted:
            self.sketches |= tuned.sketch.to_arrays(f"layers.{len(self._thresholds) - 1}.")

    def profile(self) -> dict[str, np.ndarray]:
        """Arrays of profile.safetensors, neurons as they lie in the file: targets [C]; epsilon, tau, active,
        taken, moved [L, C]; frequency [C, L, F]; order, down_norm [L, F]."""
        names = ("epsilon", "tau", "active", "taken")
        stacked = {name: np.stack([getattr(f, name) for f in self._thresholds]) for name in names}
        frequency = np.stack([f.frequency for f in self._thresholds]).transpose(1, 0, 2)
        return {
            "targets": np.asarray(self.targets),
            "frequency": np.ascontiguousarray(frequency),
            **stacked,
            **{name: np.stack(arrays) for name, arrays in self._arrays.items()},
        }

    def contract(self, options: PackOptions) -> dict[str, Any]:
        """What was measured, what was chosen, and why, as the manifest keeps it."""
        chosen = options.cett or choose_cett(self.measured, options.max_ppl_increase)
        cett = max(_rounded(chosen, self.targets), self.targets[0])
        right = int(np.searchsorted(self.targets, cett * (1 - 1e-9)))
        left = right if math.isclose(self.targets[right], cett) else right - 1  # whole at the left: whole between
        rows = [self._row(i, left) for i in range(len(self._thresholds))]
        moved = float(np.mean([row["moved"] for row in rows]))
        worth = chosen >= self.targets[0] and moved <= _WORTH * self._moved_dense
        return {
            "mode": "sparse" if worth else "dense",
            "cett": cett,
            "max_ppl_increase_percent": None if options.cett else options.max_ppl_increase,
            "measured": self.measured,
            "layers": rows,
            "sketch_bits": SKETCH_BITS,
            "bytes_moved": {
                "at_cache_share": REFERENCE_CACHE,
                "dense": self._moved_dense,
                "sparse": moved,
            },
        }

    def _row(self, layer: int, target: int) -> dict[str, Any]:
        """One layer at the target that is served, and the smallest target at which it is sparse."""
        found = self._thresholds[layer]
        sparse_at = [t for t, tau in zip(self.targets, found.tau, strict=True) if tau > 0]
        return {
            "sparse": bool(found.tau[target] > 0),
            "sparse_from": min(sparse_at, default=None),
            "active": float(found.active[target]),
            "taken": float(found.taken[target]) if found.tau[target] else 1.0,
            "moved": float(self._arrays["moved"][layer][target]),
            "sketch_bytes": self._sketch_bytes[layer],
        }


def _rounded(cett: float, targets: Sequence[float]) -> float:
    """Down to three digits, unless it is a target but for rounding."""
    near = [t for t in targets if math.isclose(t, cett, rel_tol=1e-6)]
    if near or not cett:
        return near[0] if near else 0.0
    unit = 10.0 ** (math.floor(math.log10(cett)) - 2)
    return float(f"{math.floor(cett / unit) * unit:.3g}")


def _write_records(file: IO[bytes], layout: BundleLayout, weights: FFNWeights) -> None:
    vectors = {k: v.numpy() for k, v in weights.named() if v is not None}
    try:
        records = pack_records(layout, vectors)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    file.write(records.data)


def _copy_resident(checkpoint: Checkpoint, path: Path) -> None:
    """Everything but the FFN, as it would be loaded from the source, one tensor at a time."""
    names = [n for n in checkpoint.names() if not is_ffn(n)]
    dtypes = {n: _SAFETENSORS.get(checkpoint.dtype(n), "F32") for n in names}  # what is quantised is loaded as fp32
    with path.open("wb") as file:
        tensors = [(n, dtypes[n], checkpoint.shape(n), _resident_size(checkpoint, n)) for n in names]
        file.write(safetensors_header(tensors))
        for name in names:
            file.write(checkpoint.load(name).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


_SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
