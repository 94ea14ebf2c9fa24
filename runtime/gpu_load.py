"""From a packed model and its plan to a decoder on a GPU: home, slots, predictor, keys and values, graphs.

Knows in what order things are made; not how any of them works, and not what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache.device_curve import DeviceCurve
from cache.neuron_cache import NeuronCache
from runtime.config import ModelConfig
from runtime.disk_home import DiskHome
from runtime.gates import read_gates
from runtime.gpu_ahead import Ahead, layers_ahead
from runtime.gpu_ffn import GpuFFN
from runtime.gpu_home import GpuHome
from runtime.gpu_masks import GateMasks, Masks, PlaneMasks
from runtime.gpu_model import GpuModel
from runtime.gpu_plan import GpuPlan
from runtime.gpu_slots import GpuSlots
from runtime.gpu_tiers import TieredFFN
from runtime.kernels.triton_masks import DeviceSketch
from runtime.kv_cache import KVCache
from runtime.model import ModelWeights
from runtime.packed import Packed
from runtime.sparse import Sparse


@dataclass(frozen=True, slots=True)
class GpuParts:
    """A decoder that is warm, and what it stands on."""

    model: GpuModel
    kv: KVCache
    slots: GpuSlots
    masks: Masks | None
    below: NeuronCache | None  # what main memory keeps of a home on disk


def make_gpu(
    packed: Packed,
    config: ModelConfig,
    plan: GpuPlan,
    sparse: Sparse | None,
    frequency: np.ndarray,
    slots_per_layer: Sequence[int],
    weights: ModelWeights,
    device: torch.device,
    progress: Callable[[str, float], None],
    io_engine: str = "auto",
    curve: DeviceCurve | None = None,
) -> GpuParts:
    """frequency [L, F]: how often each neuron is needed. A `device` of type cpu is for tests, and captures nothing.
    io_engine, curve: of a home on disk, see `NeuronCache`.

    Raises ReadError, ColdstreamError when memory cannot be registered.
    """
    dtype = torch.bfloat16 if plan.dtype == "bf16" else torch.float32
    home: GpuHome | DiskHome
    if plan.home_on_disk:
        slots_below = plan.memory_slots_per_layer
        home = DiskHome(packed.bundles, slots_below, plan.memory_staging_bytes, device, io_engine, curve)
    else:
        home = _home(packed, device, progress)
    pinned = (0,) * config.num_hidden_layers if sparse is None else sparse.pinned
    ranks = plan.mode != "dense"
    sketches = [None] * config.num_hidden_layers if sparse is None else sparse.predictor.sketches
    layers = layers_ahead(frequency, slots_per_layer, home.layout.stride, [s is not None for s in sketches])
    num_early = plan.num_early if any(layers) else 0
    slots = GpuSlots(home, slots_per_layer, frequency, pinned, device, ranks, num_early)
    most = plan.decode_buckets[-1]
    masks = _masks(packed, plan.mode, sparse, most, device)
    active_at = None if sparse is None else torch.from_numpy(sparse.active_at).to(device)
    staged = plan.staging_bytes // packed.bundles.layout.stride
    common = config.hidden_act, masks, active_at, most, staged, dtype
    if isinstance(home, DiskHome):
        home.open((slots.table >= 0).cpu().numpy(), frequency, progress)
        ffn: GpuFFN = TieredFFN(slots, home, *common)
    else:
        ffn = GpuFFN(slots, *common, Ahead.of(slots, masks, layers))
    kv = KVCache(config, plan.kv_blocks, plan.block_size, dtype, device)
    model = GpuModel(config, weights, ffn, plan.max_model_len, plan.decode_buckets)
    progress("capturing", 0.0)
    model.capture(kv)
    progress("capturing", 1.0)
    return GpuParts(model, kv, slots, masks, home.cache if isinstance(home, DiskHome) else None)


def _home(packed: Packed, device: torch.device, progress: Callable[[str, float], None]) -> GpuHome:
    file = packed.bundles
    file.check()
    home = GpuHome(file.num_layers, file.num_neurons, file.layout, register=device.type == "cuda")
    for layer in range(file.num_layers):
        progress("reading", layer / file.num_layers)
        home.read(file, layer)
    progress("reading", 1.0)
    return home


def _masks(packed: Packed, mode: str, sparse: Sparse | None, max_rows: int, device: torch.device) -> Masks | None:
    if mode == "exact":
        gates = map(lambda gate: _tensor(gate).to(device), read_gates(packed.bundles))  # one at a time in main memory
        return GateMasks(list(gates), max_rows)
    if sparse is None:
        return None
    predictor = sparse.predictor
    sketches = [None if s is None else DeviceSketch(s, device) for s in predictor.sketches]
    return PlaneMasks(sketches, predictor.thresholds.tolist(), max_rows, device)


def _tensor(gates: np.ndarray) -> torch.Tensor:
    """bf16 comes as uint16."""
    found = torch.from_numpy(gates)
    return found.view(torch.bfloat16) if found.dtype is torch.uint16 else found
