"""Where every byte of the memory budget goes, decided from headers before anything is loaded.

A pure function of the model's shape, the options and the host. Knows sizes, not files and not tensors. The budget is a
promise: every class of bytes has a name in `Plan.details`, estimates err upwards, and what does not fit is refused with
the smallest budget that would work.

    process    this process after its imports, what it still grows by, the tokenizer
    resident   embedding, attention, norms, head, positions, tables of neurons
    kv         keys and values
    predictor  sketches (sparse) or gates (exact)
    slots      FFN records that stay
    staging    where reads land
    scratch    what a step, a load or a request needs for a while
    headroom   file pages, page tables, sockets: the kernel's share of the limit
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cache.budget import HostMemory, default_budget, format_size, parse_size, smallest_staging_bytes
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import BudgetError, ColdstreamError, UnsupportedError
from runtime.config import ModelConfig
from runtime.engine_stats import MemoryLevels
from runtime.packed import SketchSize
from runtime.placement import pinned_sizes

_PLAIN = ("bf16", "fp16", "fp32")  # dtypes that are read as they are used
LAYERS_AT_ONCE = 4  # of attention that is streamed: computed with, just given up, being read, left by a cancelled step

BLOCK_SIZE = 16  # tokens of a KV block
DEFAULT_MAX_MODEL_LEN = 4096
PREFILL_CHUNK = 512  # rows
FEW_ROWS = 16  # of a prompt: up to here our kernels, above it GEMM; decoded rows always go by our kernels
AHEAD_BYTES = 32 << 20  # of a layer's FFN: below, guessing costs more than the reads that it hides (benchmarks/LOG.md)
SCORE_ROWS = 128  # rows of a scoring chunk: logits of more would be the largest thing in memory

_MIB = 1 << 20
_PAGE = 4096
_SMALLEST_MAX_MODEL_LEN = 256  # a context that was not asked for is not shrunk below this
_SHARE = 4  # one part in so many of what is left may go to each of: longer context, staging, more sequences

# Measured with torch 2.13 on x86 (RSS before and after, peaks reset between; benchmarks/memory_budget.py runs the
# whole): a server with an empty model comes to 280-300 MiB, 110 of them pages of shared libraries, wherever on the way
# there it is measured; a tokenizer of 49,152 tokens stays with 26 MiB; what is freed below 4 MiB may stay with glibc.
_PROCESS_BYTES = 312 * _MIB  # at least, so that a plan made early and one made late agree
_GROWTH_BYTES = 16 * _MIB  # after the measurement, where more than that is measured
_TOKENIZER_BYTES = 640  # a token of the vocabulary
_NEURON_BYTES = 48  # slot table 4, owner 4, decayed score 8, its prior 12, threshold and norm 8, temporaries 12
_SKETCH_BITS = 1.7  # a weight of gate and up, for a model that is not packed yet
_SPARSE_SHARE = 4  # one part in so many of a sparse layer is staged at most, unless that is next to nothing
_SPARSE_STAGING_BYTES = 16 * _MIB
_SKETCH_PACE = 3  # sketches are read so many times slower than matrices
_PIECES_BYTES = 32 * _MIB  # read or dequantised at once while a tensor is loaded
_PROFILE_BYTES = 64  # a neuron: its frequencies at each calibrated target, while loading
_REQUEST_BYTES = 64 << 10  # a request's objects, queues and text
_TOKEN_BYTES = 48  # a token of a request as a Python int in a tuple, and its text
_SCORED_TOKEN_BYTES = (
    12 << 10
)  # with 20 alternatives: 2.5 KiB of tuples, 4.7 of the answer's objects, the rest its text
_MAX_QUEUE = 64
_ROW_BYTES = 12  # a logit of each decoded row: the model's own, seen and counted for penalties
_SAMPLER_BYTES = 56  # a logit of the row being sampled: changed, softmax, sorted with int64 index, cumulated in fp64
_SCORE_BYTES = 10  # a logit of a scored row: fp32 and its exponential, or as multiplied (bf16) and fp32
_SLACK_BYTES = 32 * _MIB  # freed blocks that stay with glibc, and holes between them
_HEADROOM_BYTES = 32 * _MIB
_SPARE_MARGIN = 16 * _MIB  # of scratch, for what comes between steps: an audit's records, huge pages cut at the ends
_HEADROOM_SHARE = 256  # one part in so many of the budget, twice what page tables take


@dataclass(frozen=True, slots=True)
class FfnCache:
    """How much of the FFN stays in slots: a share in percent, or bytes."""

    percent: float | None = None
    num_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> FfnCache:
        """ "30%" or a size such as "1GiB". Raises ValueError."""
        if not text.strip().endswith("%"):
            return cls(num_bytes=parse_size(text))
        try:
            percent = float(text.strip()[:-1])
        except ValueError:
            percent = -1.0
        if not 0.0 <= percent <= 100.0:  # also refuses nan
            raise ValueError(f"{text!r} is not a share; write 0% to 100%, or a size such as 1GiB")
        return cls(percent=percent)

    def bytes_of(self, ffn_bytes: int) -> int:
        """Bytes of slots, at most the FFN's own."""
        if self.percent is not None:
            return int(ffn_bytes * self.percent / 100)
        return min(self.num_bytes or 0, ffn_bytes)

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.percent is not None else format_size(self.num_bytes or 0)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user may say about memory. None means: chosen here."""

    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # of resident matrices and KV: auto, bf16, fp32
    mode: str = "sparse"
    cett: float | None = None  # of a packed model; None: its own
    ffn_cache: FfnCache | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 4
    bundles: str = "auto"  # of a checkpoint that is not packed yet; the layout given to `make_plan` follows from it
    max_queue: int = _MAX_QUEUE
    threads: int | None = None  # that what is to be expected is measured with; None: as many as serve
    reads_ahead: bool = True  # a GPU, of large layers


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by use (they never exceed the budget), and what they were turned into."""

    budget_bytes: int
    budget_source: str  # --memory, or what bounded the default
    process_bytes: int
    resident_bytes: int
    kv_bytes: int
    predictor_bytes: int
    slab_bytes: int
    staging_bytes: int
    scratch_bytes: int
    headroom_bytes: int
    ffn_bytes: int  # all records
    disk_bytes: int  # of the packed model; what a checkpoint already holds is not counted again
    smallest_budget_bytes: int  # with these options
    slots_per_layer: tuple[int, ...]
    num_spare_slots: int  # in the bytes of scratch, between steps of many rows
    spare_bytes: int  # of those
    num_pinned: int  # neurons of a sparse layer that are always computed, and always resident
    kv_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    prefill_chunk: int
    dtype: str  # of resident matrices and KV: bf16 or fp32
    mode: str
    streamed_bytes: int = 0  # of attention, read by every step because it does not stay
    details: dict[str, int] = field(default_factory=dict)  # "use.what" -> bytes
    notes: tuple[str, ...] = ()  # sentences for the user

    @property
    def unused_bytes(self) -> int:
        return self.budget_bytes - sum(self.uses().values())

    @property
    def ffn_cache_share(self) -> float:
        """Share of the FFN that fits the slots, 0..1."""
        return self.slab_bytes / self.ffn_bytes

    @property
    def num_slots(self) -> int:
        """Those that are always there."""
        return sum(self.slots_per_layer)

    @property
    def multiplied_bytes(self) -> int:
        """Of what every token is multiplied with, records of neurons aside: attention, head, and the predictor, which
        counts as the matrices that take its time."""
        head = self.details["resident.head"] or self.details["resident.embedding"]
        predictor = self.predictor_bytes * (_SKETCH_PACE if self.mode == "sparse" else 1)
        return (self.streamed_bytes or self.details["resident.attention"]) + head + predictor

    def uses(self) -> dict[str, int]:
        """Bytes planned by use, in the tier cpu; their sum is at most the budget."""
        return {
            "process": self.process_bytes,
            "resident": self.resident_bytes,
            "kv": self.kv_bytes,
            "predictor": self.predictor_bytes,
            "slots": self.slab_bytes,
            "staging": self.staging_bytes,
            "scratch": self.scratch_bytes,
            "headroom": self.headroom_bytes,
        }

    def memory_levels(self) -> MemoryLevels:
        """The plan as the engine shows it in metrics."""
        return MemoryLevels({"cpu": self.budget_bytes}, {("cpu", use): n for use, n in self.uses().items()})

    def to_json(self) -> dict[str, Any]:
        """All fields, and `tiers`: bytes by tier and use."""
        data = asdict(self)
        data["slots_per_layer"] = list(self.slots_per_layer)
        data["notes"] = list(self.notes)
        return data | {
            "unused_bytes": self.unused_bytes,
            "ffn_cache_share": self.ffn_cache_share,
            "tiers": {"cpu": self.uses(), "disk": {"home": self.disk_bytes}},
        }


def make_plan(
    config: ModelConfig,
    layout: BundleLayout,
    options: PlanOptions,
    host: HostMemory,
    process_bytes: int,
    sketches: Sequence[SketchSize] | None = None,
) -> Plan:
    """Divides the budget. `process_bytes`: RSS of the process after its imports. `sketches`: of the layers that are
    sparse, from a packed model; None: not packed yet, every layer is taken to be.

    Raises BudgetError (--memory too small, or more than there is), UnsupportedError (an option this version lacks),
    ColdstreamError (an option out of range).
    """
    check_options(config, options)
    if options.gpu_memory_bytes is not None:
        raise UnsupportedError("--gpu-memory: nothing is kept on a GPU when the CPU computes; leave it out")
    sizes = _Sizes(config, layout, options, sketch_sizes(config) if sketches is None else sketches, process_bytes)
    slow = replace(sizes, streams_attention=attention_can_stream(config))
    needed, smallest = _smallest_budget(sizes), _smallest_budget(slow)
    budget, source = memory_budget(options, host, process_bytes)
    if smallest <= budget < needed:
        sizes = slow
    if budget < smallest:
        raise BudgetError(_too_small(sizes, budget, source, smallest), smallest)
    return _divide(sizes, budget, source, smallest, host)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is decided: a candidate, priced by `_Sizes`."""

    max_model_len: int
    num_sequences: int  # full-length ones that KV holds
    staging_bytes: int
    num_slots: int
    num_pinned: int = 0  # of each sparse layer


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Prices that are the same wherever a model is computed: bytes of its parts for a model and options."""

    config: ModelConfig
    layout: BundleLayout
    options: PlanOptions
    sketches: Sequence[SketchSize]

    @property
    def num_neurons(self) -> int:
        return self.config.num_hidden_layers * self.config.intermediate_size

    @property
    def ffn_bytes(self) -> int:
        return self.num_neurons * self.layout.stride

    @property
    def layer_bytes(self) -> int:
        return self.config.intermediate_size * self.layout.stride

    @property
    def dtype(self) -> str:
        """Of resident matrices and KV: what was asked for, else the checkpoint's own, everything short as bf16."""
        if self.options.dtype != "auto":
            return self.options.dtype
        return "fp32" if self.config.dtype == "fp32" else "bf16"

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def wanted_slots(self) -> int:
        """Slots that --ffn-cache asks for; 0 without it."""
        cache = self.options.ffn_cache
        return 0 if cache is None else cache.bytes_of(self.ffn_bytes) // self.layout.stride

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // BLOCK_SIZE)

    def kv_bytes(self, num_tokens: int) -> int:
        c = self.config
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.item_bytes
        return self.blocks(num_tokens) * BLOCK_SIZE * token

    def resident(self, max_model_len: int) -> dict[str, int]:
        """ "use.what" -> bytes."""
        c = self.config
        embedding = c.vocab_size * c.hidden_size * self.item_bytes
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        biases = (q + 2 * kv + c.hidden_size) if c.attention_bias else 0
        return {
            "resident.embedding": embedding,
            "resident.head": 0 if c.tie_word_embeddings else embedding,
            "resident.attention": c.num_hidden_layers * 2 * (q + kv) * c.hidden_size * self.item_bytes,
            "resident.norms": 4 * (c.num_hidden_layers * (2 * c.hidden_size + biases) + c.hidden_size),
            "resident.positions": max_model_len * c.head_dim * 4,  # cos and sin of half a head
        }

    def predictor_bytes(self, num_pinned: int) -> int:
        if self.options.mode == "dense":
            return 0
        if self.options.mode == "exact":
            item = 2 if self.layout.dtype is BundleDtype.INT8 else self.layout.dtype.item_bytes  # int8 is widened
            return self.num_neurons * self.config.hidden_size * item
        rows = self.config.intermediate_size - num_pinned
        ids = 4 if num_pinned else 0  # whose rows they are, at most
        return sum(s.other_bytes + rows * (s.row_bytes + ids) for s in self.sketches)

    @property
    def pinned_sizes(self) -> tuple[int, ...]:
        """Of a sparse layer, largest first: those that thresholds were calibrated for."""
        return tuple(reversed(pinned_sizes(self.config.intermediate_size))) if self.options.mode == "sparse" else (0,)

    def process(self, measured_bytes: int, extra: int = 0) -> dict[str, int]:
        """Of a process that was measured after its imports, "use.what" -> bytes. `extra`: what it comes to
        beyond a server without a model."""
        return {
            "process.measured": measured_bytes,
            "process.growth": max(_GROWTH_BYTES, _PROCESS_BYTES + extra - measured_bytes),
            "process.tokenizer": self.config.vocab_size * _TOKENIZER_BYTES,
        }

    def request_bytes(self, max_model_len: int) -> int:
        """All requests as they wait, and the answers of those that run, scored with the most alternatives."""
        held = self.options.max_num_seqs + self.options.max_queue
        answers = self.options.max_num_seqs * _SCORED_TOKEN_BYTES * max_model_len
        return held * (_REQUEST_BYTES + _TOKEN_BYTES * max_model_len) + answers

    def load_bytes(self) -> int:
        """The largest resident tensor as it comes out of the file, unless that is its dtype already; the profile."""
        c = self.config
        tables = max(map(self._copied_bytes, table_dtypes(c))) * c.vocab_size
        matrices = self._copied_bytes(c.dtype) * c.num_attention_heads * c.head_dim
        return max(tables, matrices) * c.hidden_size + self.num_neurons * _PROFILE_BYTES + _PIECES_BYTES

    def _copied_bytes(self, stored: str) -> int:
        """An element of a tensor as it comes out of the file; 0 where it is that which stays. Quantised types are
        dequantised to fp32."""
        return 0 if stored == self.dtype else {"bf16": 2, "fp16": 2}.get(stored, 4)

    def disk_bytes(self) -> int:
        """Estimated from shapes: records, sketch, frequencies at each target; 16 MiB for all that is small."""
        return self.num_neurons * (self.layout.stride + sketch_row_bytes(self.config) + _PROFILE_BYTES) + 16 * _MIB


def embedding_stays_on_disk(config: ModelConfig) -> bool:
    """Whether a token's row is read when it is needed: where the head is another matrix, and rows need no decoding."""
    return not config.tie_word_embeddings and table_dtypes(config)[0] in _PLAIN


def table_dtypes(config: ModelConfig) -> tuple[str, str]:
    """Of embedding and head, as stored: a GGUF often keeps them otherwise than the other matrices."""
    embedding = config.embedding_dtype or config.dtype
    return embedding, embedding if config.tie_word_embeddings else config.head_dtype or config.dtype


def attention_can_stream(config: ModelConfig) -> bool:
    """Whether reading attention by the layer saves memory, and needs no decoding: that would take longer."""
    return config.num_hidden_layers > LAYERS_AT_ONCE and config.dtype in _PLAIN


@dataclass(frozen=True, slots=True)
class _Sizes(ModelSizes):
    """All prices in main memory. Nothing here depends on the budget."""

    measured_process_bytes: int
    streams_attention: bool = False  # layer by layer, where all of it does not fit

    def resident(self, max_model_len: int) -> dict[str, int]:
        found = ModelSizes.resident(self, max_model_len)
        if embedding_stays_on_disk(self.config):
            found["resident.embedding"] = 0
        if self.streams_attention:
            found["resident.attention"] = self.attention_bytes * LAYERS_AT_ONCE // self.config.num_hidden_layers
        return found

    @property
    def attention_bytes(self) -> int:
        """Of all layers."""
        return ModelSizes.resident(self, 0)["resident.attention"]

    @property
    def smallest_staging(self) -> int:
        return smallest_staging_bytes(self.layout)

    @property
    def largest_staging(self) -> int:
        """What is read at once at most, every record apart: a part of a sparse layer, else the whole one.

        The room is better spent on slots, and what a prompt takes for a chunk of half of this grows with it.
        """
        wanted = self.layer_bytes
        if self.options.mode == "sparse":
            wanted = min(wanted, max(wanted // _SPARSE_SHARE, _SPARSE_STAGING_BYTES))
        return max(self.smallest_staging, round_up(wanted + 4 * _PAGE, 2 * _PAGE))

    @property
    def most_partial_slots(self) -> int:
        """Slots that leave every layer at least one neuron short."""
        return self.config.num_hidden_layers * (self.config.intermediate_size - 1)

    def details(self, shape: _Shape) -> dict[str, int]:
        """Every class of bytes but the headroom, "use.what" -> bytes."""
        sequence = self.kv_bytes(shape.max_model_len)
        return {
            **self.process(self.measured_process_bytes),
            **self.resident(shape.max_model_len),
            "resident.neuron_tables": self.num_neurons * _NEURON_BYTES,
            "kv.blocks": sequence * shape.num_sequences,
            "predictor.weights": self.predictor_bytes(shape.num_pinned),
            "slots.records": shape.num_slots * self.layout.stride,
            "staging.buffer": shape.staging_bytes,
            **self._scratch(shape),
        }

    def _scratch(self, shape: _Shape) -> dict[str, int]:
        """What comes and goes. The phases of a step follow each other, so the largest counts.

        Loading is over before slots, KV and staging are first touched, so it may use their room; a tied head leaves
        the embedding as the largest tensor, which comes before the layers.
        """
        serving = {
            "scratch.step": self._wide_step_bytes(shape),
            "scratch.sampling": self._sampling_bytes(),
            "scratch.requests": self.request_bytes(shape.max_model_len),
            "scratch.allocator": _SLACK_BYTES,
        }
        later = self.kv_bytes(shape.max_model_len) * shape.num_sequences + shape.num_slots * self.layout.stride
        if self.config.tie_word_embeddings:
            later += self.resident(shape.max_model_len)["resident.attention"]
        loading = max(0, self.load_bytes() - sum(serving.values()) - later - shape.staging_bytes)
        padding = _PAGE + round_up(self.layout.stride, _PAGE)  # of the arena: between its parts, and a spare record
        return serving | {"scratch.loading": loading, "scratch.arena_padding": padding}

    def spare_slots(self, shape: _Shape) -> int:
        """Slots that fit what only steps of many rows take: between two of those they hold neurons. None in dense mode,
        where slots are filled once, and beside a number of slots that was asked for."""
        room = self._wide_step_bytes(shape) - self._narrow_step_bytes(shape) - _SPARE_MARGIN
        absent = self.num_neurons - shape.num_slots
        if self.options.mode == "dense" or self.options.ffn_cache is not None:
            return 0
        return min(absent, max(0, room) // self.layout.stride)

    def _wide_step_bytes(self, shape: _Shape) -> int:
        """A chunk of a prompt, or one that is scored."""
        rows = self.chunk_rows(shape.max_model_len)
        phases = (self._attention_bytes(shape.max_model_len, rows), self._ffn_bytes(shape, rows), self._score_bytes())
        return self._activation_bytes(rows) + max(phases)

    def _narrow_step_bytes(self, shape: _Shape) -> int:
        """At most `narrow_rows`, by kernels that widen nothing: logits are the sampler's."""
        rows, c = narrow_rows(self.options.max_num_seqs), self.config
        ffn = rows * (c.intermediate_size * (4 * 4 + 2 + 1 + 8) + c.hidden_size * 4 * 3)
        return self._activation_bytes(rows) + max(self._attention_bytes(shape.max_model_len, rows), ffn)

    def chunk_rows(self, max_model_len: int) -> int:
        """Rows of the largest prefill chunk."""
        return min(PREFILL_CHUNK, max_model_len)

    def _activation_bytes(self, rows: int) -> int:
        """fp32 rows of a step: residual, normed, projections, rotated, attended and their casts."""
        c = self.config
        heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        return rows * 4 * (8 * c.hidden_size + 6 * heads)

    def _attention_bytes(self, max_model_len: int, rows: int) -> int:
        """One sequence's keys and values of a layer, gathered and in fp32; masks; blocks of scores."""
        c = self.config
        gathered = max_model_len * c.num_key_value_heads * c.head_dim * 2 * (4 + self.item_bytes)
        mask = rows * max_model_len * (2 + 4)
        return gathered + mask + 8 * _MIB

    def _ffn_bytes(self, shape: _Shape, rows: int) -> int:
        """A chunk of a streamed layer widened to the GEMM's dtype, one vector at a time, and what its neurons give."""
        c = self.config
        whole_layers = shape.num_slots > self.most_partial_slots  # then a layer is one chunk
        in_half = max(1, shape.staging_bytes // 2 // self.layout.stride)
        chunk = c.intermediate_size if whole_layers else min(c.intermediate_size, in_half)
        widened = chunk * c.hidden_size * {"int8": 4 + 4 + 2, "fp32": 4, "bf16": 6, "fp16": 6}[self.layout.dtype.value]
        hidden = rows * chunk * (4 * 4 + 2 + 1)
        out = rows * c.hidden_size * 4 * 3
        scored = max(SCORE_ROWS, self.options.max_num_seqs) * c.intermediate_size * 8  # predictions, masks, copies
        return widened + hidden + out + scored

    def _score_bytes(self) -> int:
        return SCORE_ROWS * self.config.vocab_size * _SCORE_BYTES

    def _sampling_bytes(self) -> int:
        """Rows are decoded together and sampled one after the other."""
        return (self.options.max_num_seqs * _ROW_BYTES + _SAMPLER_BYTES) * self.config.vocab_size

    def total(self, shape: _Shape) -> int:
        return sum(self.details(shape).values())

    def left(self, shape: _Shape, bound: int) -> int:
        """What slots or KV may grow by until the total is `bound`; the room that loading alone needs costs nothing."""
        return bound - self.total(shape) + self.details(shape)["scratch.loading"]


def sketch_row_bytes(config: ModelConfig) -> int:
    """Bytes of a neuron's sketch, estimated from the shape: codes, a scale and a bias a row, the norm of down."""
    vectors = 2 if config.gated else 1
    return vectors * (math.ceil(_SKETCH_BITS * config.hidden_size / 8) + 2 + 4) + 2


def sketch_sizes(config: ModelConfig) -> list[SketchSize]:
    """Of a model that is not packed yet: every layer is taken to be sparse."""
    return [SketchSize(sketch_row_bytes(config), 6 * config.hidden_size + 16)] * config.num_hidden_layers


def check_options(config: ModelConfig, options: PlanOptions) -> None:
    """Raises ColdstreamError, naming the flag."""
    if options.mode not in ("sparse", "exact", "dense"):
        raise ColdstreamError(f"--mode {options.mode}: one of sparse, exact, dense")
    if options.dtype not in ("auto", "bf16", "fp32"):
        raise ColdstreamError(f"--dtype {options.dtype}: one of auto, bf16, fp32")
    if options.max_num_seqs < 1:
        raise ColdstreamError(f"--max-num-seqs {options.max_num_seqs}: at least 1")
    longest = config.max_position_embeddings
    if options.max_model_len is not None and not 1 <= options.max_model_len <= longest:
        raise ColdstreamError(f"--max-model-len {options.max_model_len}: from 1 to {longest}, the model's own context")


def memory_budget(options: PlanOptions, host: HostMemory, process_bytes: int) -> tuple[int, str]:
    """The budget and where it comes from. A promise above what can be had is refused."""
    if options.memory_bytes is None:
        return default_budget(host, process_bytes), host.source
    most = host.total_bytes if host.limit_bytes is None else min(host.limit_bytes, host.total_bytes)
    if options.memory_bytes >= most + _PAGE:  # a cgroup rounds its limit down to a page
        where = "this host has" if most == host.total_bytes else "the cgroup of this process may use"
        given = f"--memory {format_size(options.memory_bytes)} ({options.memory_bytes} bytes)"
        raise ColdstreamError(f"{given}: more than the {most} bytes that {where}")
    return min(options.memory_bytes, most), "--memory"


def context_lengths(sizes: ModelSizes) -> list[int]:
    """Contexts to choose from, longest first."""
    if sizes.options.max_model_len is not None:
        return [sizes.options.max_model_len]
    longest = min(sizes.config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    found = [longest]
    while found[-1] > _SMALLEST_MAX_MODEL_LEN:
        found.append(max(found[-1] // 2, _SMALLEST_MAX_MODEL_LEN))
    return found


def narrow_rows(max_num_seqs: int) -> int:
    """Rows of a step that takes next to no scratch: of all sequences, or the last few of a prompt."""
    return max(FEW_ROWS, max_num_seqs)


def headroom(budget: int) -> int:
    """What the kernel takes of a budget, bytes."""
    return _HEADROOM_BYTES + budget // _HEADROOM_SHARE


def _smallest_shape(sizes: _Sizes, max_model_len: int) -> _Shape:
    return _Shape(max_model_len, 1, sizes.smallest_staging, sizes.wanted_slots)


def _smallest_budget(sizes: _Sizes) -> int:
    """Whole MiB, so that it can be typed back."""
    needed = sizes.total(_smallest_shape(sizes, context_lengths(sizes)[-1])) + _HEADROOM_BYTES
    budget = -(-needed * _HEADROOM_SHARE // (_HEADROOM_SHARE - 1))
    return round_up(budget, _MIB)


def _too_small(sizes: _Sizes, budget: int, source: str, smallest: int) -> str:
    given = f"--memory {format_size(budget)}" if source == "--memory" else f"{format_size(budget)} of memory ({source})"
    cache = sizes.options.ffn_cache
    options = [f"--mode {sizes.options.mode}"]
    if cache is not None:
        options.append(f"--ffn-cache {cache}")
    if sizes.options.max_model_len is not None:
        options.append(f"--max-model-len {sizes.options.max_model_len}")
    what = f"is too small for this model with {' '.join(options)}"
    return f"{given} {what}; the smallest that works is --memory {smallest // _MIB}MiB"


def _divide(sizes: _Sizes, budget: int, source: str, smallest: int, host: HostMemory) -> Plan:
    """The largest pinned set that the slots hold and that hides behind reads: it needs no sketch. What is read falls
    faster than slots grow, about with the square of what is absent; where nothing is, nothing is pinned."""
    room = budget - headroom(budget)
    absent = 1 - _shape(sizes, room, 0).num_slots / sizes.num_neurons
    hidden = int(absent**2 * sizes.config.intermediate_size)
    shapes = (_shape(sizes, room, num_pinned) for num_pinned in sizes.pinned_sizes if num_pinned <= hidden)
    shape = next(s for s in shapes if s.num_slots >= s.num_pinned * len(sizes.sketches))
    return _plan(sizes, shape, budget, source, smallest, host)


def _shape(sizes: _Sizes, room: int, num_pinned: int) -> _Shape:
    """The table of contents: context, staging, sequences, slots, and what is left to sequences again."""
    shape = replace(_smallest_shape(sizes, _choose_length(sizes, room)), num_pinned=num_pinned)
    shape = _more_staging(sizes, shape, room)
    shape = _more_sequences(sizes, shape, _part(sizes, shape, room))
    if sizes.options.ffn_cache is None:
        shape = _more_slots(sizes, shape, room)
    return _more_sequences(sizes, shape, room)


def _part(sizes: _Sizes, shape: _Shape, room: int) -> int:
    """How far the total may grow for something other than slots, which come first unless their number is given."""
    total = sizes.total(shape)
    return room if sizes.options.ffn_cache is not None else total + (room - total) // _SHARE


def _choose_length(sizes: _Sizes, room: int) -> int:
    lengths = context_lengths(sizes)
    bound = _part(sizes, _smallest_shape(sizes, lengths[-1]), room)
    fitting = (n for n in lengths if sizes.total(_smallest_shape(sizes, n)) <= bound)
    return next(fitting, lengths[-1])


def _more_staging(sizes: _Sizes, shape: _Shape, room: int) -> _Shape:
    """Before slots where layers are sparse: a layer whose misses do not fit is read whole."""
    bound = room if sizes.options.mode == "sparse" else _part(sizes, shape, room)
    for staging in _stagings(sizes):
        larger = replace(shape, staging_bytes=staging)
        if sizes.total(larger) <= bound:
            return larger
    return shape


def _stagings(sizes: _Sizes) -> Iterator[int]:
    """From a whole layer down, halving."""
    staging = sizes.largest_staging
    while staging > sizes.smallest_staging:
        yield staging
        staging = round_up(staging // 2, 2 * _PAGE)


def _more_sequences(sizes: _Sizes, shape: _Shape, bound: int) -> _Shape:
    """Full-length sequences at once, up to --max-num-seqs."""
    sequence = sizes.kv_bytes(shape.max_model_len)
    more = max(0, sizes.left(shape, bound)) // sequence
    num = min(sizes.options.max_num_seqs, shape.num_sequences + more)
    return replace(shape, num_sequences=num)


def _more_slots(sizes: _Sizes, shape: _Shape, room: int) -> _Shape:
    everything = replace(shape, num_slots=sizes.num_neurons)
    if sizes.total(everything) <= room:
        return everything
    left = sizes.left(shape, room)
    num = min(left // sizes.layout.stride, sizes.most_partial_slots)
    return replace(shape, num_slots=max(0, num))


def _plan(sizes: _Sizes, shape: _Shape, budget: int, source: str, smallest: int, host: HostMemory) -> Plan:
    details = sizes.details(shape) | {"headroom.kernel": headroom(budget)}
    uses = by_use(details)
    return Plan(
        budget_bytes=budget,
        budget_source=source,
        process_bytes=uses["process"],
        resident_bytes=uses["resident"],
        kv_bytes=uses["kv"],
        predictor_bytes=uses["predictor"],
        slab_bytes=shape.num_slots * sizes.layout.stride,
        staging_bytes=shape.staging_bytes,
        scratch_bytes=uses["scratch"],
        headroom_bytes=uses["headroom"],
        ffn_bytes=sizes.ffn_bytes,
        disk_bytes=sizes.disk_bytes(),
        smallest_budget_bytes=smallest,
        slots_per_layer=spread(shape.num_slots, sizes.config.num_hidden_layers),
        num_spare_slots=sizes.spare_slots(shape),
        spare_bytes=sizes.spare_slots(shape) * sizes.layout.stride,
        num_pinned=shape.num_pinned,
        kv_blocks=sizes.blocks(shape.max_model_len) * shape.num_sequences,
        block_size=BLOCK_SIZE,
        max_model_len=shape.max_model_len,
        max_num_seqs=sizes.options.max_num_seqs,
        prefill_chunk=PREFILL_CHUNK,
        dtype=sizes.dtype,
        mode=sizes.options.mode,
        streamed_bytes=sizes.attention_bytes if sizes.streams_attention else 0,
        details=details,
        notes=tuple(_notes(sizes, shape, budget, host)),
    )


def by_use(details: dict[str, int]) -> dict[str, int]:
    """Sums of "use.what" by use."""
    uses: dict[str, int] = {}
    for name, num_bytes in details.items():
        use = name.partition(".")[0]
        uses[use] = uses.get(use, 0) + num_bytes
    return uses


def spread(num_slots: int, num_layers: int) -> tuple[int, ...]:
    """As even as can be, the first layers one more: the first layer needs the most care."""
    each, more = divmod(num_slots, num_layers)
    return tuple(each + (layer < more) for layer in range(num_layers))


def context_notes(sizes: ModelSizes, max_model_len: int, num_sequences: int) -> Iterator[str]:
    """Sentences on what of context and sequences did not fit."""
    longest = context_lengths(sizes)[0]
    if max_model_len < longest:
        yield f"the context is {max_model_len} tokens instead of {longest}, to fit the budget (--max-model-len)"
    if num_sequences < sizes.options.max_num_seqs:
        tokens = num_sequences * max_model_len
        yield f"keys and values hold {tokens} tokens at once; requests beyond that wait for room (--max-num-seqs)"


def _notes(sizes: _Sizes, shape: _Shape, budget: int, host: HostMemory) -> Iterator[str]:
    yield from context_notes(sizes, shape.max_model_len, shape.num_sequences)
    if sizes.streams_attention:
        read = format_size(sizes.attention_bytes)
        yield f"attention does not fit either: every step reads its {read} from disk, exact but slow"
    if shape.num_slots + sizes.spare_slots(shape) < sizes.config.num_hidden_layers:
        yield "no FFN neuron fits the cache: every token reads all it needs from disk"
    free = host.available_bytes + sizes.measured_process_bytes
    if budget > free:
        yield f"the budget is {format_size(budget)}, but only {format_size(free)} are free now"


def round_up(value: int, to: int) -> int:
    """To the next multiple."""
    return -(-value // to) * to
