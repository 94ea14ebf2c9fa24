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

import numpy as np
import torch
from safetensors.numpy import save_file

from cache.bundle import BundleDtype, BundleLayout, pack_records
from cache.errors import ColdstreamError, UnsupportedError
from cache.store import BundleFile
from runtime.calibrate import CETT_GRID, LayerTail, LayerThresholds, calibrate_layer
from runtime.checkpoint import Checkpoint, check_tensors
from runtime.config import ModelConfig
from runtime.ffn import DenseFFN
from runtime.kernels import Kernels
from runtime.kernels.sketch import Sketch, make_sketch
from runtime.layers import FFNWeights, ffn_name, full_attention, load_ffn, load_layer
from runtime.model import rms_norm, rope_tables
from runtime.packed import (
    BUNDLES,
    PROFILE,
    RESIDENT,
    SKETCH,
    Packed,
    Source,
    bundle_header,
    safetensors_header,
    sha256,
    write_manifest,
)
from runtime.tokenizer import Tokenizer

WINDOW = 512  # tokens of a calibration window: each is a text of its own
NUM_WINDOWS = 4
DEFAULT_CETT = 0.05

Progress = Callable[[str, float], None]  # what is being done, share done 0..1


@dataclass(frozen=True, slots=True)
class PackOptions:
    """cett None: the default target; bundles: auto, bf16, fp16, fp32 or int8."""

    calibration: Path
    cett: float | None = None
    bundles: str = "auto"
    standalone: bool = False


def pack(
    checkpoint: Checkpoint, tokenizer: Tokenizer, out: Path, options: PackOptions, kernels: Kernels, progress: Progress
) -> None:
    """Writes a packed model to `out`, which must not exist. Raises ColdstreamError; then nothing is left behind."""
    check_tensors(checkpoint)
    config = checkpoint.config
    layout = BundleLayout.make(config.hidden_size, config.gated, bundle_dtype(options.bundles, checkpoint))
    if out.exists():
        raise ColdstreamError(f"--out {out}: already exists; remove it or name another directory")
    _check_space(out, packed_bytes(config, layout) + (resident_bytes(checkpoint) if options.standalone else 0))
    tokens = calibration_tokens(tokenizer, options.calibration, config.vocab_size)
    with _atomic_directory(out) as partial:
        _write(checkpoint, tokenizer, partial, layout, tokens, options, kernels, progress)


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
    codes = -(-config.hidden_size // 2) * (2 if layout.gated else 1)
    return neurons * (layout.stride + codes + 12 + 4 * (len(CETT_GRID) + 1)) + (16 << 20)


def resident_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that a standalone copy of everything but the FFN takes: what is quantised is kept as fp32."""
    return sum(_resident_size(checkpoint, n) for n in checkpoint.names() if not is_ffn(n))


def _resident_size(checkpoint: Checkpoint, name: str) -> int:
    item_bytes = 2 if checkpoint.dtype(name) in ("bf16", "fp16") else 4
    return math.prod(checkpoint.shape(name)) * item_bytes


def calibration_tokens(tokenizer: Tokenizer, text: Path, vocab_size: int) -> torch.Tensor:
    """Windows evenly spread over a text, int64 [NUM_WINDOWS, WINDOW]; fewer when the text is short."""
    if not text.is_file():
        raise ColdstreamError(f"--calibration {text}: not found")
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special=False)
    if len(ids) < WINDOW:
        raise ColdstreamError(f"--calibration {text}: {len(ids)} tokens, at least {WINDOW} are needed")
    num = min(NUM_WINDOWS, len(ids) // WINDOW)
    starts = np.linspace(0, len(ids) - WINDOW, num).astype(int)
    tokens = torch.tensor([ids[s : s + WINDOW] for s in starts])
    if int(tokens.max()) >= vocab_size:
        raise UnsupportedError(
            f"the tokenizer has token {int(tokens.max())}, the model's vocabulary ends at {vocab_size - 1}"
        )
    return tokens


@contextlib.contextmanager
def _atomic_directory(out: Path) -> Iterator[Path]:
    """A directory to write into that becomes `out` when the block ends well, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.rename(partial, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ColdstreamError(f"{out.parent}: the disk is full; nothing was kept") from error
        raise ColdstreamError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Removes what killed runs left for the same `out`."""
    for left in out.parent.glob(f".{out.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        if not (pid.isdigit() and Path("/proc", pid).exists()):
            shutil.rmtree(left, ignore_errors=True)


def _check_space(out: Path, needed: int) -> None:
    existing = next(p for p in (out.parent, *out.parent.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ColdstreamError(f"{existing}: packing needs {needed} bytes of disk, {free} are free")


def _write(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    out: Path,
    layout: BundleLayout,
    tokens: torch.Tensor,
    options: PackOptions,
    kernels: Kernels,
    progress: Progress,
) -> None:
    config = checkpoint.config
    header, offsets = bundle_header(config.num_hidden_layers, config.intermediate_size, layout.stride)
    targets = sorted({*CETT_GRID, options.cett or DEFAULT_CETT})
    found: list[LayerThresholds] = []
    sketches: dict[str, np.ndarray] = {}
    with (out / BUNDLES).open("wb") as file:
        file.write(header)
        for i, layer in enumerate(_layers(checkpoint, tokens)):
            progress("packing", i / config.num_hidden_layers)
            _write_records(file, layout, layer.weights)
            ffn = layer.weights
            sketch = make_sketch(None if ffn.gate is None else ffn.gate.numpy(), ffn.up.numpy(), ffn.down.numpy())
            sketches |= sketch.to_arrays(f"layers.{i}.")
            found.append(_calibrate(config, layer, sketch, targets, kernels))
        file.flush()
        os.fsync(file.fileno())
    save_file(sketches, out / SKETCH)
    save_file(_profile(targets, found), out / PROFILE)
    if options.standalone:
        _copy_resident(checkpoint, out / RESIDENT)
    tokenizer.save(out)
    small = (PROFILE, SKETCH, *((RESIDENT,) if options.standalone else ()))
    write_manifest(
        Packed(
            path=out,
            config=config,
            bundles=BundleFile(out / BUNDLES, layout, config.intermediate_size, offsets),
            source=Source(
                str(checkpoint.path.absolute()), checkpoint.kind, [f.to_json() for f in checkpoint.fingerprint()]
            ),
            standalone=options.standalone,
            cett=options.cett or DEFAULT_CETT,
            checksums={name: sha256(out / name) for name in small},
            calibration={
                "text": options.calibration.name,
                "sha256": hashlib.sha256(options.calibration.read_bytes()).hexdigest(),
                "tokens": tokens.numel(),
            },
        )
    )
    progress("packing", 1.0)


def _write_records(file: object, layout: BundleLayout, weights: FFNWeights) -> None:
    vectors = {k: v.numpy() for k, v in weights.named() if v is not None}
    try:
        records = pack_records(layout, vectors)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    file.write(records.data)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's FFN and what it sees on the calibration text."""

    weights: FFNWeights
    x: torch.Tensor  # [N, D], normed inputs
    h: torch.Tensor  # [N, F]


@torch.inference_mode()
def _layers(checkpoint: Checkpoint, tokens: torch.Tensor) -> Iterator[_Layer]:
    """The dense forward pass over windows [S, T], a layer at a time."""
    config = checkpoint.config
    hidden = checkpoint.load("model.embed_tokens.weight")[tokens].float()  # [S, T, D]
    cos, sin = rope_tables(config, tokens.shape[1])
    for i in range(config.num_hidden_layers):
        weights = load_layer(checkpoint, i, torch.float32)
        hidden = hidden + full_attention(config, weights, hidden, cos, sin)
        x = rms_norm(hidden, weights.post_attention_layernorm, config.rms_norm_eps)
        ffn = load_ffn(checkpoint, i)
        rows = x.flatten(0, 1)  # [N, D]
        h = DenseFFN(config.hidden_act, ffn.gate, ffn.up, ffn.down).neurons(rows)  # [N, F]
        hidden = hidden + (h @ ffn.down).view_as(hidden)
        yield _Layer(ffn, rows, h)


def _calibrate(
    config: ModelConfig, layer: _Layer, sketch: Sketch, targets: Sequence[float], kernels: Kernels
) -> LayerThresholds:
    predicted = np.empty((layer.x.shape[0], sketch.up_scale.shape[0]), np.float32)
    kernels.sketch_scores(layer.x.numpy(), sketch, config.hidden_act, predicted)
    return calibrate_layer(LayerTail(layer.h, layer.weights.down), torch.from_numpy(predicted), targets)


def _profile(targets: Sequence[float], found: Sequence[LayerThresholds]) -> dict[str, np.ndarray]:
    """Arrays of profile.safetensors: targets [C]; epsilon, tau, active, taken [L, C]; frequency [C, L, F]."""
    stacked = {name: np.stack([getattr(f, name) for f in found]) for name in ("epsilon", "tau", "active", "taken")}
    frequency = np.stack([f.frequency for f in found]).transpose(1, 0, 2)
    return {"targets": np.asarray(targets, np.float64), "frequency": np.ascontiguousarray(frequency), **stacked}


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
