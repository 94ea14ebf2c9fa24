"""Where every byte goes when a GPU computes: what is kept on the device, and the home of all records in main memory.

A pure function of the model's shape, the options, the host and the device. Knows sizes, not tensors, and asks no
driver. Both budgets are promises, as in `runtime/plan.py`, and refused with the smallest that works.

    on the GPU, under --gpu-memory                          in main memory, under --memory
    context    the driver's and the libraries' share        process    as without a GPU, and what CUDA adds to it
    resident   embedding, attention, norms, head            home       the records of all neurons, registered; else
    kv         keys and values                              slots      records that stay, and where those that a
    predictor  sketches (sparse) or gates (exact)           staging    step wants come from disk, registered too
    slots      FFN records that stay                        tables     frequencies and order of the neurons
    tables     slot table, counters, thresholds             scratch    loading, requests, the allocator
    staging    two buffers that layers are copied into, and  headroom   the kernel's share
               records that come before they are wanted
    scratch    a step's activations, logits, CUDA graphs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cache.budget import HostMemory, budget_margin, format_size, smallest_staging_bytes
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import BudgetError, ColdstreamError
from runtime.config import ModelConfig
from runtime.engine_stats import MemoryLevels
from runtime.packed import SketchSize
from runtime.plan import (
    AHEAD_BYTES,
    BLOCK_SIZE,
    LAYERS_AT_ONCE,
    SCORE_ROWS,
    ModelSizes,
    PlanOptions,
    by_use,
    check_options,
    context_lengths,
    context_notes,
    headroom,
    memory_budget,
    round_up,
    sketch_sizes,
    spread,
)

DECODE_BUCKETS = (1, 2, 4, 8, 16)  # rows of a captured decode step
NOT_HERE = "not here"  # name of a GPU that is only planned for
PREFILL_ROWS = 2048  # of a step: the home is read once for all of them
_SMALLEST_PREFILL_ROWS = 256
_SMALLEST_STAGING_SHARE = 16  # of a layer: less is not copied at the link's pace
_EARLY_STEP = 32  # records that come early are as many for each program that fetches (runtime/kernels/triton_ahead.py)
_AHEAD_HIDDEN = 4096  # longer vectors go another way (LONGEST in runtime/kernels/triton_neurons.py)
_EARLY_BYTES = 2 << 20  # of a layer's records that come early: twice what the link brings while attention runs
_EARLY_NEURON_BYTES = 12  # of a layer: two tables, and masks of the guess

_MIB, _PAGE = 1 << 20, 4096
_SHARE = 4  # one part in so many of what is left may go to each of: longer context, staging, rows, more sequences
# Measured on an H100 with torch 2.11 (benchmarks/gpu.py, step "overheads"): 755 MiB beside tensors; in main memory 303
# MiB more than the 545 after the imports.
_CONTEXT_BYTES = 768 * _MIB  # context, loaded kernels and library workspaces
_CUDA_HOST_BYTES = 704 * _MIB  # beyond a server without a GPU: CUDA's libraries and its side of the context
_GRAPH_BYTES = 16 * _MIB  # of a captured bucket: nodes, and what its private pool rounds up
_ALLOCATOR_BYTES = 64 * _MIB  # torch takes memory in segments, some of them half used
_TABLE_BYTES = 56  # a neuron: slot, uses, score and threshold 16; what ranking makes of them 40, for a moment
_LISTED_BYTES = 20  # a neuron of one layer: its id, its record's address, and that in main memory
_SKETCH_ROW_BYTES, _CODE_BYTES = 20, 64  # of a matrix: a row's padding and wider numbers; the planes of a byte of a row
_SUMS, _SUMS_FEW = 128, 396  # sums of a row that are made apart, and of up to two (runtime/kernels/triton_neurons.py)
_NEURON_BYTES = 48  # a neuron in main memory: frequency, ranks, counters read back
_VISITED_BYTES = 64  # a neuron of one layer: its address, ids and offsets of what a step wants of it
_HOST_SLACK_BYTES = 32 * _MIB
_HOST_HEADROOM_BYTES = 32 * _MIB
_HOST_HEADROOM_SHARE = 256


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one GPU. free_bytes: what this process could still take now, its context already made."""

    name: str
    total_bytes: int
    free_bytes: int

    @property
    def budget_bytes(self) -> int:
        """The most that a budget, which counts the context, can be now."""
        return min(self.total_bytes, self.free_bytes + _CONTEXT_BYTES)

    @classmethod
    def assumed(cls, budget_bytes: int) -> DeviceMemory:
        """A GPU that is not here and has just what a budget says."""
        return cls(NOT_HERE, budget_bytes, max(0, budget_bytes - _CONTEXT_BYTES))


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Bytes by use in both tiers, never above their budgets, and what they were turned into."""

    device: str
    gpu_budget_bytes: int
    gpu_budget_source: str  # --gpu-memory, or the device
    smallest_gpu_bytes: int  # with these options
    memory_budget_bytes: int
    memory_budget_source: str
    smallest_memory_bytes: int
    home_memory_bytes: int  # the smallest budget of main memory that holds the records of all neurons
    ffn_bytes: int  # all records
    num_neurons: int  # of a layer
    disk_bytes: int
    slab_bytes: int
    slots_per_layer: tuple[int, ...]
    num_pinned: int  # neurons of a sparse layer that are always computed, and always resident
    kv_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    prefill_chunk: int  # rows of a prefill step
    staging_bytes: int  # of one of the two buffers: whole records
    decode_buckets: tuple[int, ...]
    dtype: str  # of resident matrices and KV: bf16 or fp32
    mode: str
    num_early: int = 0  # records of a layer that can come before they are wanted; 0: nothing is read ahead
    memory_slots_per_layer: tuple[int, ...] = ()  # of a home on disk: records that main memory keeps
    memory_staging_bytes: int = 0  # and where others are read to
    gpu_details: dict[str, int] = field(default_factory=dict)  # "use.what" -> bytes
    memory_details: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences for the user

    @property
    def home_on_disk(self) -> bool:
        """Whether main memory does not hold the records of all neurons."""
        return self.memory_staging_bytes > 0

    @property
    def ffn_cache_share(self) -> float:
        """Share of the FFN that fits the slots, 0..1."""
        return self.slab_bytes / self.ffn_bytes

    @property
    def multiplied_bytes(self) -> int:
        """Of what every token is multiplied with, records of neurons aside: attention, head, predictor."""
        d = self.gpu_details
        return d["resident.attention"] + (d["resident.head"] or d["resident.embedding"]) + d["predictor.weights"]

    def uses(self) -> dict[str, dict[str, int]]:
        """Bytes planned by tier and use; the sum of a tier is at most its budget."""
        return {"gpu": by_use(self.gpu_details), "cpu": by_use(self.memory_details)}

    def budgets(self) -> dict[str, int]:
        """Bytes by tier."""
        return {"gpu": self.gpu_budget_bytes, "cpu": self.memory_budget_bytes}

    def unused(self) -> dict[str, int]:
        """Bytes by tier that nothing is planned for."""
        return {tier: budget - sum(self.uses()[tier].values()) for tier, budget in self.budgets().items()}

    def memory_levels(self) -> MemoryLevels:
        """The plan as the engine shows it in metrics."""
        used = {(tier, use): n for tier, uses in self.uses().items() for use, n in uses.items()}
        return MemoryLevels(self.budgets(), used)

    def to_json(self) -> dict[str, Any]:
        """All fields, and `tiers`: bytes by tier and use."""
        return asdict(self) | {
            "unused_bytes": self.unused(),
            "ffn_cache_share": self.ffn_cache_share,
            "tiers": {**self.uses(), "disk": {"home": self.disk_bytes}},
        }


def make_gpu_plan(
    config: ModelConfig,
    layout: BundleLayout,
    options: PlanOptions,
    host: HostMemory,
    device: DeviceMemory,
    process_bytes: int,
    sketches: Sequence[SketchSize] | None = None,
) -> GpuPlan:
    """Divides both budgets. process_bytes: RSS after the imports, before CUDA is initialised or after; sketches: as for
    `make_plan`.

    Raises BudgetError (--gpu-memory or --memory too small), ColdstreamError (an option out of range, a promise above
    what there is).
    """
    check_options(config, options)
    sizes = _Sizes(config, layout, options, sketch_sizes(config) if sketches is None else sketches, process_bytes)
    smallest = _smallest_gpu_budget(sizes)
    budget, source = _gpu_budget(options, device)
    if budget < smallest:
        raise BudgetError(_too_small(sizes, "--gpu-memory", budget, source, smallest), smallest)
    shape = _divide(sizes, budget)
    memory, memory_source = memory_budget(options, host, process_bytes)
    shortest = context_lengths(sizes)[-1]
    home_memory = _smallest_memory(sizes, shortest, None)
    smallest_memory = min(home_memory, _smallest_memory(sizes, shortest, sizes.smallest_below))
    if memory < smallest_memory:
        raise BudgetError(_too_small(sizes, "--memory", memory, memory_source, smallest_memory), smallest_memory)
    below = None if memory >= home_memory else sizes.smallest_below
    shape = _fit_memory(sizes, shape, memory, below)
    if below is not None:
        below = _divide_memory(sizes, shape, memory)
    notes = (
        *_notes(sizes, shape, budget, device),
        *_memory_notes(memory, host, process_bytes),
        *_below_notes(sizes, below, home_memory),
    )
    return GpuPlan(
        device=device.name,
        gpu_budget_bytes=budget,
        gpu_budget_source=source,
        smallest_gpu_bytes=smallest,
        memory_budget_bytes=memory,
        memory_budget_source=memory_source,
        smallest_memory_bytes=smallest_memory,
        home_memory_bytes=home_memory,
        ffn_bytes=sizes.ffn_bytes,
        num_neurons=config.intermediate_size,
        disk_bytes=sizes.disk_bytes(),
        slab_bytes=shape.num_slots * layout.stride,
        slots_per_layer=spread(shape.num_slots, config.num_hidden_layers),
        num_pinned=shape.num_pinned,
        kv_blocks=sizes.blocks(shape.max_model_len) * shape.num_sequences,
        block_size=BLOCK_SIZE,
        max_model_len=shape.max_model_len,
        max_num_seqs=options.max_num_seqs,
        prefill_chunk=shape.prefill_rows,
        staging_bytes=shape.staged_neurons * layout.stride,
        decode_buckets=sizes.buckets,
        dtype=sizes.dtype,
        mode=options.mode,
        num_early=sizes.num_early(shape) if below is None else 0,
        memory_slots_per_layer=() if below is None else spread(below.num_slots, config.num_hidden_layers),
        memory_staging_bytes=0 if below is None else below.staging_bytes,
        gpu_details=sizes.details(shape) | ({} if below is None else {"staging.early": 0}),
        memory_details=sizes.memory_details(shape.max_model_len, below) | {"headroom.kernel": headroom(memory)},
        notes=notes,
    )


def check_free(plan: GpuPlan, device: DeviceMemory) -> None:
    """BudgetError where less is free than the GPU's budget: to plan is one thing, to load would fail in the middle."""
    if plan.gpu_budget_bytes > device.budget_bytes:
        free = f"{format_size(device.budget_bytes)} ({device.budget_bytes} bytes)"
        given = f"--gpu-memory {format_size(plan.gpu_budget_bytes)}: only {free} of {device.name} are free now"
        smallest = f"the smallest that works is --gpu-memory {plan.smallest_gpu_bytes // _MIB}MiB"
        raise BudgetError(f"{given}; {smallest}, or say --device cpu", plan.smallest_gpu_bytes)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is decided: a candidate, priced by `_Sizes`."""

    max_model_len: int
    prefill_rows: int
    staged_neurons: int  # that one of the two buffers holds
    num_sequences: int  # full-length ones that KV holds
    num_slots: int
    num_pinned: int = 0  # of each sparse layer


@dataclass(frozen=True, slots=True)
class _Below:
    """What main memory keeps of a home on disk, and where it reads the rest to."""

    num_slots: int
    staging_bytes: int


@dataclass(frozen=True, slots=True)
class _Sizes(ModelSizes):
    """All prices, on the device and beside it. Nothing here depends on a budget."""

    measured_process_bytes: int

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row counts that decode is captured for: up to the first that holds all sequences."""
        held = [b for b in DECODE_BUCKETS if b < self.options.max_num_seqs]
        return (*held, *DECODE_BUCKETS[len(held) : len(held) + 1])

    def details(self, shape: _Shape) -> dict[str, int]:
        """On the device, "use.what" -> bytes."""
        c = self.config
        return {
            "context.driver": _CONTEXT_BYTES,
            **self.resident(shape.max_model_len),
            "kv.blocks": self.kv_bytes(shape.max_model_len) * shape.num_sequences,
            "predictor.weights": self.predictor_bytes(shape.num_pinned),
            "slots.records": shape.num_slots * self.layout.stride,
            "tables.neurons": self.num_neurons * _TABLE_BYTES,
            "staging.buffers": 2 * shape.staged_neurons * self.layout.stride,
            "staging.early": self._early_bytes(shape),
            "scratch.prefill": self._prefill_bytes(shape),
            "scratch.logits": self._logit_bytes(),
            "scratch.lists": (c.intermediate_size + _SUMS_FEW) * _LISTED_BYTES + self._sums() * c.hidden_size * 4,
            "scratch.graphs": len(self.buckets) * (_GRAPH_BYTES + self._decode_bytes(shape.max_model_len)),
            "scratch.allocator": _ALLOCATOR_BYTES,
        }

    def num_early(self, shape: _Shape) -> int:
        """Records of a layer that can come early, where a layer is large and its neurons do not all have slots."""
        some = self.options.mode == "sparse" and self.options.reads_ahead and shape.num_slots < self.num_neurons
        if not some or self.layer_bytes < AHEAD_BYTES or self.config.hidden_size > _AHEAD_HIDDEN:
            return 0
        return _EARLY_STEP * max(1, _EARLY_BYTES // self.layout.stride // _EARLY_STEP)

    def _early_bytes(self, shape: _Shape) -> int:
        """Of two layers' records, and what a guess is made with: tables and masks, and a MiB for inputs and digits."""
        num = self.num_early(shape)
        tables = self.config.intermediate_size * _EARLY_NEURON_BYTES + self.config.num_hidden_layers * 8
        return 2 * num * self.layout.stride + tables + _MIB if num else 0

    def predictor_bytes(self, num_pinned: int) -> int:
        """And what a sketch takes more here than in its file: padded rows of codes, wider numbers, planes spelt out."""
        found = ModelSizes.predictor_bytes(self, num_pinned)  # super() misses a class that slots made anew
        if self.options.mode == "sparse":
            rows, vectors = self.config.intermediate_size - num_pinned, 2 if self.config.gated else 1
            found += len(self.sketches) * rows * vectors * _SKETCH_ROW_BYTES
            found += sum(s.row_bytes for s in self.sketches) * _CODE_BYTES
        return found

    @property
    def smallest_below(self) -> _Below:
        return _Below(0, smallest_staging_bytes(self.layout))

    @property
    def largest_staging(self) -> int:
        """A layer as it streams through, half a layer at a time, or all that a sparse step could want of it."""
        return max(self.smallest_below.staging_bytes, round_up(self.layer_bytes + 4 * _PAGE, 2 * _PAGE))

    def memory_details(self, max_model_len: int, below: _Below | None) -> dict[str, int]:
        """In main memory, "use.what" -> bytes; the headroom aside. below: of a home on disk. Resident matrices pass
        through a layer at a time, embedding and head stay until all are on the device."""
        resident = self.resident(max_model_len)
        passing = resident["resident.attention"] * LAYERS_AT_ONCE // self.config.num_hidden_layers
        passing += resident["resident.embedding"] + resident["resident.head"]
        return {
            **self.process(self.measured_process_bytes, _CUDA_HOST_BYTES),
            **({"home.records": self.ffn_bytes} if below is None else self._below_bytes(below)),
            "tables.neurons": self.num_neurons * _NEURON_BYTES,
            "scratch.requests": self.request_bytes(max_model_len),
            "scratch.loading": self.load_bytes() + passing + self._passing_predictor_bytes(),
            "scratch.allocator": _HOST_SLACK_BYTES,
        }

    def _passing_predictor_bytes(self) -> int:
        """Of the predictor in main memory until it is on the device: gates a layer at a time, sketches all together,
        one layer's as they come from the file and padded beside."""
        most = max(ModelSizes.predictor_bytes(self, n) for n in self.pinned_sizes)
        if self.options.mode == "sparse":
            return most + 2 * most // max(1, len(self.sketches))
        return most // self.config.num_hidden_layers

    def _below_bytes(self, below: _Below) -> dict[str, int]:
        """The cache's slots, staging and tables; masks that come from the GPU."""
        masks = self.buckets[-1] * self.config.intermediate_size
        return {
            "slots.records": below.num_slots * self.layout.stride,
            "staging.buffer": below.staging_bytes,
            "tables.cache": self.num_neurons * _NEURON_BYTES,
            "scratch.visits": 2 * masks
            + self.config.intermediate_size * _VISITED_BYTES
            + 2 * _PAGE
            + self.layout.stride,
        }

    def _sums(self) -> int:
        """Rows of partial sums of a step."""
        rows = self.buckets[-1]
        return max(_SUMS * rows, _SUMS_FEW * min(rows, 2))

    def _prefill_bytes(self, shape: _Shape) -> int:
        """A step's rows: residual, normed and projected in fp32 and as they are multiplied, one sequence's keys and
        values gathered, scores of the rows that attend together, what the staged neurons make of the rows (up, gate,
        what the activation passes through, and their product as it is multiplied with down), and one of their matrices
        as it is multiplied."""
        c = self.config
        heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        staged = shape.staged_neurons * (3 * 4 + 2 + (4 if c.gated else 0))
        rows = shape.prefill_rows * (4 * (8 * c.hidden_size + 6 * heads) + staged)
        gathered = shape.max_model_len * c.num_key_value_heads * c.head_dim * 2 * (4 + self.item_bytes)
        scores = SCORE_ROWS * shape.max_model_len * (2 + 3 * 4 * c.num_attention_heads)
        return rows + gathered + scores + shape.staged_neurons * c.hidden_size * self._widened_bytes

    @property
    def _widened_bytes(self) -> int:
        """An element of a staged matrix that is multiplied in another dtype than it lies in; int8 is scaled in fp32."""
        kept = self.layout.dtype
        return 0 if kept.value == self.dtype else self.item_bytes + (8 if kept is BundleDtype.INT8 else 0)

    def _decode_bytes(self, max_model_len: int) -> int:
        """A bucket's own, priced as the largest: residual and projections of its rows, masks and factors of all
        neurons, scores of the context."""
        c = self.config
        heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        row = 4 * (8 * c.hidden_size + 6 * heads + 4 * c.intermediate_size) + 4 * c.num_attention_heads * max_model_len
        return self.buckets[-1] * row

    def _logit_bytes(self) -> int:
        """fp32 logits of the rows that are scored at once and of those decoded, and what sampling makes of one."""
        return self.config.vocab_size * 4 * (3 * SCORE_ROWS + 2 * self.buckets[-1] + 8)

    def total(self, shape: _Shape) -> int:
        return sum(self.details(shape).values())


def _gpu_budget(options: PlanOptions, device: DeviceMemory) -> tuple[int, str]:
    """The budget and where it comes from. A promise above what the device has is refused."""
    if options.gpu_memory_bytes is None:
        most = device.budget_bytes
        return max(0, most - budget_margin(most)), "free GPU memory"
    if options.gpu_memory_bytes > device.total_bytes:
        given = f"--gpu-memory {format_size(options.gpu_memory_bytes)} ({options.gpu_memory_bytes} bytes)"
        raise ColdstreamError(f"{given}: more than the {device.total_bytes} bytes that {device.name} has")
    return options.gpu_memory_bytes, "--gpu-memory"


def _smallest_shape(sizes: _Sizes, max_model_len: int) -> _Shape:
    staged = -(-sizes.config.intermediate_size // _SMALLEST_STAGING_SHARE)
    rows = min(_SMALLEST_PREFILL_ROWS, max_model_len)
    return _Shape(max_model_len, rows, staged, 1, sizes.wanted_slots)


def _smallest_gpu_budget(sizes: _Sizes) -> int:
    """Whole MiB, so that it can be typed back."""
    return round_up(sizes.total(_smallest_shape(sizes, context_lengths(sizes)[-1])), _MIB)


def _smallest_memory(sizes: _Sizes, max_model_len: int, below: _Below | None) -> int:
    needed = sum(sizes.memory_details(max_model_len, below).values()) + _HOST_HEADROOM_BYTES
    return round_up(-(-needed * _HOST_HEADROOM_SHARE // (_HOST_HEADROOM_SHARE - 1)), _MIB)


def _too_small(sizes: _Sizes, flag: str, budget: int, source: str, smallest: int) -> str:
    given = f"{flag} {format_size(budget)}" if source == flag else f"{format_size(budget)} of memory ({source})"
    options = [f"--mode {sizes.options.mode}"]
    if sizes.options.ffn_cache is not None:
        options.append(f"--ffn-cache {sizes.options.ffn_cache}")
    if sizes.options.max_model_len is not None:
        options.append(f"--max-model-len {sizes.options.max_model_len}")
    why = "" if flag == "--gpu-memory" else ", even with the records of its neurons on disk"
    what = f"is too small for this model with {' '.join(options)}{why}"
    return f"{given} {what}; the smallest that works is {flag} {smallest // _MIB}MiB"


def _divide(sizes: _Sizes, budget: int) -> _Shape:
    """The largest pinned set that the slots hold: it needs no sketch, and the others pass a higher threshold."""
    shapes = (_shape(sizes, budget, num_pinned) for num_pinned in sizes.pinned_sizes)
    return next(s for s in shapes if s.num_slots >= s.num_pinned * len(sizes.sketches))


def _shape(sizes: _Sizes, room: int, num_pinned: int) -> _Shape:
    """The table of contents: context, staging, rows of a prefill, sequences, slots, what is left to sequences again."""
    shape = _smallest_shape(sizes, context_lengths(sizes)[-1])
    for wider in (_lengths, _stagings, _rows):
        bound = _part(sizes, shape, room)
        shape = next((s for s in wider(sizes, shape) if sizes.total(s) <= bound), shape)
    shape = replace(shape, num_pinned=num_pinned)
    shape = _more_sequences(sizes, shape, _part(sizes, shape, room))
    if sizes.options.ffn_cache is None:
        whole = replace(shape, num_slots=sizes.num_neurons)  # with nothing left to read ahead
        more = max(0, room - sizes.total(shape)) // sizes.layout.stride
        some = replace(shape, num_slots=min(sizes.num_neurons, more))
        shape = whole if sizes.total(whole) <= room else some
    return _more_sequences(sizes, shape, room)


def _part(sizes: _Sizes, shape: _Shape, room: int) -> int:
    """How far the total may grow for something other than slots, which come first unless their number is given."""
    total = sizes.total(shape)
    return room if sizes.options.ffn_cache is not None else total + max(0, room - total) // _SHARE


def _lengths(sizes: _Sizes, shape: _Shape) -> Iterator[_Shape]:
    """Contexts, longest first."""
    for length in context_lengths(sizes):
        yield replace(shape, max_model_len=length, prefill_rows=min(_SMALLEST_PREFILL_ROWS, length))


def _stagings(sizes: _Sizes, shape: _Shape) -> Iterator[_Shape]:
    """From a whole layer down, halving."""
    staged = sizes.config.intermediate_size
    while staged > shape.staged_neurons:
        yield replace(shape, staged_neurons=staged)
        staged = -(-staged // 2)


def _rows(sizes: _Sizes, shape: _Shape) -> Iterator[_Shape]:
    """Of a prefill step, halving; no more than the context has."""
    rows = PREFILL_ROWS
    while rows > shape.prefill_rows:
        yield replace(shape, prefill_rows=min(rows, shape.max_model_len))
        rows //= 2


def _more_sequences(sizes: _Sizes, shape: _Shape, bound: int) -> _Shape:
    """Full-length sequences at once, up to --max-num-seqs."""
    more = max(0, bound - sizes.total(shape)) // sizes.kv_bytes(shape.max_model_len)
    return replace(shape, num_sequences=min(sizes.options.max_num_seqs, shape.num_sequences + more))


def _fit_memory(sizes: _Sizes, shape: _Shape, memory: int, below: _Below | None) -> _Shape:
    """Requests of a long context take main memory too: the longest context that both budgets hold."""
    lengths = [n for n in context_lengths(sizes) if n <= shape.max_model_len]
    length = next((n for n in lengths if _smallest_memory(sizes, n, below) <= memory), lengths[-1])
    return replace(shape, max_model_len=length, prefill_rows=min(shape.prefill_rows, length))


def _divide_memory(sizes: _Sizes, shape: _Shape, memory: int) -> _Below:
    """What is left of main memory: a part to staging, since for misses that do not fit a whole layer has to come; the
    rest to slots, no more than the GPU leaves out."""
    below = sizes.smallest_below
    left = memory - headroom(memory) - sum(sizes.memory_details(shape.max_model_len, below).values())
    staging = sizes.largest_staging
    while staging > below.staging_bytes and staging - below.staging_bytes > max(0, left) // _SHARE:
        staging = round_up(staging // 2, 2 * _PAGE)
    staging = max(staging, below.staging_bytes)
    left -= staging - below.staging_bytes
    return _Below(min(sizes.num_neurons - shape.num_slots, max(0, left) // sizes.layout.stride), staging)


def _below_notes(sizes: _Sizes, below: _Below | None, home_memory: int) -> Iterator[str]:
    if below is not None:
        kept = format_size(below.num_slots * sizes.layout.stride)
        yield (
            f"main memory keeps {kept} of the FFN's {format_size(sizes.ffn_bytes)} and reads the rest from disk; "
            f"--memory {home_memory // _MIB}MiB would hold all of it"
        )


def _notes(sizes: _Sizes, shape: _Shape, budget: int, device: DeviceMemory) -> Iterator[str]:
    yield from context_notes(sizes, shape.max_model_len, shape.num_sequences)
    if shape.num_slots < sizes.config.num_hidden_layers:
        yield "no FFN neuron stays on the GPU: every token reads all it needs from main memory"
    if budget > device.budget_bytes:
        free = format_size(device.budget_bytes)
        yield f"the GPU budget is {format_size(budget)}, but only {free} of {device.name} are free now"


def _memory_notes(memory: int, host: HostMemory, process_bytes: int) -> Iterator[str]:
    free = host.available_bytes + process_bytes
    if memory > free:
        yield f"the budget of main memory is {format_size(memory)}, but only {format_size(free)} are free now"
