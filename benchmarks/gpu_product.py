"""The GPU tier itself with random weights of a large shape and the sets of a trace in its predictor's place.

What runs is `runtime.gpu_model` as served: graphs, slots, ranking, one decode step a call with its logits on the host.
The predictor's pass is run at its real size on random planes and its mask dropped; the trace's sets, on the GPU, stand
beside the cap. Shapes: B rows, F neurons, L layers, T tokens of the trace.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.gpu_decode import Counted
from benchmarks.gpu_shapes import MAX_MODEL_LEN, fill_records, model_config, random_weights
from benchmarks.kernels import random_sketch
from benchmarks.make_checkpoint import Shape
from benchmarks.traces import EARLY, ROW_STEP, Replay
from cache.bundle import BundleLayout
from cache.stats import CacheSnapshot
from runtime.batch import Batch, SequenceView
from runtime.disk_home import DiskHome
from runtime.gpu_ahead import Ahead, layers_ahead
from runtime.gpu_ffn import GpuFFN
from runtime.gpu_home import GpuHome
from runtime.gpu_masks import Guesses, Norm, PlaneMasks
from runtime.gpu_model import GpuModel
from runtime.gpu_plan import GpuPlan
from runtime.gpu_slots import GpuSlots
from runtime.gpu_tiers import TieredFFN
from runtime.kernels.triton_launch import after_others, chained
from runtime.kernels.triton_masks import DeviceSketch, Scoring, Trail
from runtime.kernels.triton_neurons import DOWN_HITS, DOWN_MISSES, FETCHED, FETCHED_HITS, HITS, LOOKUPS, SWAPPED
from runtime.kv_cache import KVCache

SKETCH_BITS = 1.7
_BLOCK = 2048  # neurons of a set at once
CONTEXT = 256  # tokens that are there when decode begins


def make_home(shape: Shape, layout: BundleLayout, device: str = "cuda") -> GpuHome:
    """Random records of every layer, in registered main memory."""
    home = GpuHome(shape.num_hidden_layers, shape.intermediate_size, layout, register=device == "cuda")
    for layer in range(shape.num_hidden_layers):
        fill_records(home.records[layer], layout, layer, device)
    return home


def plane_masks(shape: Shape, rows: int, device: torch.device) -> PlaneMasks:
    """Of random planes at the size of real ones."""
    rng = np.random.default_rng(1)
    sketch = random_sketch(rng, shape.hidden_size, shape.intermediate_size, SKETCH_BITS, shape.gated, shape.hidden_act)
    layers = range(shape.num_hidden_layers)
    return PlaneMasks([DeviceSketch(sketch, device) for _ in layers], [1.0 for _ in layers], rows, device)


@triton.jit  # type: ignore[untyped-decorator]
def _taken(sets, places, masks, tokens, NUM: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """masks[layer, row] = sets[layer, places[row]]."""
    row, layer, place = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after_others(CHAINED)
    at = (layer * tokens + tl.load(places + row)) * NUM + place
    to = (layer * tl.num_programs(1) + row).to(tl.int64) * NUM + place
    tl.store(masks + to, tl.load(sets + at, mask=place < NUM, other=0), mask=place < NUM)


class _Sets:
    """Of a trace, on the device: bool as uint8 [L, T, F], and of these what a step takes, [L, B, F]."""

    def __init__(self, replay: Replay, rows: int, device: torch.device, beside: str | None = None) -> None:
        layers = range(replay.num_layers)
        self._sets = torch.stack([replay.sets(i, device, beside).to(torch.uint8) for i in layers])
        num_layers, self.num_tokens, num = self._sets.shape
        self.masks = torch.empty(num_layers, rows, num, dtype=torch.uint8, device=device)

    def take(self, places: torch.Tensor) -> None:
        """places int64 [B]: which token each row is at."""
        layers, tokens, num = self._sets.shape
        _taken[(triton.cdiv(num, _BLOCK), places.shape[0], layers)](
            self._sets, places, self.masks, tokens, NUM=num, BLOCK=_BLOCK, **chained(places)
        )


class TraceMasks:
    """The pass of `inner`, and the trace's sets as its answer; row b is ROW_STEP * b tokens further. A step's sets are
    taken from the trace at once, by a kernel at its beginning, those that were guessed too."""

    name, num_whole = "trace", 0

    def __init__(self, inner: PlaneMasks, replay: Replay, rows: int, device: torch.device) -> None:
        self._inner, self.num_bytes = inner, inner.num_bytes
        self._own, self._guessed = _Sets(replay, rows, device), None
        if EARLY in replay.trace.beside:
            self._guessed = _Sets(replay, rows, device, EARLY)
        self._first = torch.arange(rows, device=device) * ROW_STEP
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = self._first.clone()

    def of(self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None) -> torch.Tensor:
        self._inner.of(layer, x, norm, h, trail)
        return self._given(layer, x)

    def scoring(
        self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None
    ) -> Scoring | None:
        scoring = self._inner.scoring(layer, x, norm, h, trail)
        return None if scoring is None else replace(scoring, given=self._given(layer, x))

    def _given(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            torch.remainder(self._token + self._first, self._own.num_tokens, out=self._places)
            for sets in filter(None, (self._own, self._guessed)):
                sets.take(self._places)
            self._token += 1
        return self._own.masks[layer]

    def sure(self, max_rows: int, margin: float) -> Guesses | None:
        """None where the trace has no guesses."""
        return None if self._guessed is None else _SureMasks(self._inner.sure(max_rows, margin), self._guessed.masks)

    def restart(self) -> None:
        self._token.zero_()


class _SureMasks:
    """The pass of a guess, and the one that the trace has."""

    def __init__(self, inner: Guesses, masks: torch.Tensor) -> None:
        self._inner, self._masks = inner, masks

    def of(self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None) -> torch.Tensor:
        self._inner.of(layer, x, norm, h)
        return self._masks[layer]


class ProductTraced:
    """See `benchmarks.gpu_decode.Traced`. replay None: dense, every neuron of every layer."""

    def __init__(
        self,
        shape: Shape,
        vocab_size: int,
        home: GpuHome | DiskHome,
        plan: GpuPlan,
        replay: Replay | None,
        rows: int = 1,
        device: str = "cuda",
        ahead: bool = True,
    ) -> None:
        config, self._device, self._rows = model_config(shape, vocab_size), torch.device(device), rows
        layers, num = shape.num_hidden_layers, shape.intermediate_size
        frequency = np.ones((layers, num), np.float32) if replay is None else replay.frequency()
        early = plan.num_early if ahead else 0
        self._slots = GpuSlots(home, plan.slots_per_layer, frequency, (0,) * layers, self._device, num_early=early)
        self.slots_per_layer = plan.slots_per_layer
        self._masks = None
        if replay is not None:
            self._masks = TraceMasks(plane_masks(shape, rows, self._device), replay, rows, self._device)
        staged = plan.staging_bytes // home.layout.stride
        common = shape.hidden_act, self._masks, None, rows, staged, torch.bfloat16
        if isinstance(home, DiskHome):
            home.open((self._slots.table >= 0).cpu().numpy(), frequency, lambda what, share: None)
            self.ffn: GpuFFN = TieredFFN(self._slots, home, *common)
        else:
            guessed = layers_ahead(frequency, plan.slots_per_layer, home.layout.stride, [True] * layers)
            self.ffn = GpuFFN(self._slots, *common, Ahead.of(self._slots, self._masks, guessed))
        weights = random_weights(shape, vocab_size, device=device)
        per_row = -(-(CONTEXT + MAX_MODEL_LEN) // plan.block_size)
        self._kv = KVCache(config, per_row * rows, plan.block_size, torch.bfloat16, self._device)
        self._kv.keys.normal_()
        self._kv.values.normal_()
        self._blocks = [np.arange(r * per_row, (r + 1) * per_row, dtype=np.int32) for r in range(rows)]
        self._model = GpuModel(config, weights, self.ffn, CONTEXT + MAX_MODEL_LEN, (rows,))
        self._layout, self._shape, self._position = home.layout, shape, CONTEXT
        attention = sum(w.nbytes for layer in weights.layers for w in _matrices(layer))
        keys = 2 * config.num_key_value_heads * config.head_dim * layers * CONTEXT * rows * 2
        predictor = 0 if self._masks is None else self._masks.num_bytes
        self.fixed_bytes = attention + weights.lm_head.nbytes + keys + predictor
        self._model.capture(self._kv)
        self._restart()

    def _restart(self) -> None:
        """The trace from its beginning, with nothing counted: capturing has run steps."""
        if self._masks is not None:
            self._masks.restart()
        self._slots.counters.zero_()
        self._slots.used.zero_()

    def decode(self, num_steps: int) -> list[float]:
        """Wall-clock time: each step's logits are on the host when it ends."""
        times = []
        for _ in range(num_steps):
            begin = time.perf_counter()
            self._model.forward_together([self._batch()], self._kv, lambda: None)
            times.append(time.perf_counter() - begin)
            self._position += 1
        return times

    def _batch(self) -> Batch:
        at = self._position
        views = tuple(SequenceView(blocks, at, 1) for blocks in self._blocks)
        rows = self._rows
        return Batch("decode", torch.full((rows,), 7), torch.full((rows,), at), views, "last")

    def prefill(self, num_tokens: int) -> float:
        """Seconds of one step of so many tokens of one prompt."""
        view = SequenceView(self._blocks[0], 0, num_tokens)
        ids = torch.randint(0, self._model.config.vocab_size, (num_tokens,))
        batch = Batch("prefill", ids, torch.arange(num_tokens), (view,), "last")
        begin = time.perf_counter()
        self._model.forward_together([batch], self._kv, lambda: None)
        return time.perf_counter() - begin

    def snapshot(self) -> CacheSnapshot:
        """Of all tiers, as the last step left them."""
        return self._slots.snapshot()

    def counted(self) -> Counted:
        """Downs of records that came early are taken to be silenced as often as those of the others."""
        seen = self._slots.counters.tolist()
        vector = self._layout.hidden_size * self._layout.dtype.item_bytes
        first = vector * (2 if self._shape.gated else 1)
        late = seen[LOOKUPS] - seen[HITS]  # those that came early are hits of the kernels
        misses = late + seen[FETCHED_HITS]
        down_misses = seen[DOWN_MISSES] * (misses / late if late else 1.0)
        down_hits = seen[DOWN_HITS] - (down_misses - seen[DOWN_MISSES])
        return Counted(
            lookups=seen[LOOKUPS],
            hits=seen[LOOKUPS] - misses,
            missed_bytes=round(misses * first + down_misses * vector),
            hit_bytes=round((seen[LOOKUPS] - misses) * first + down_hits * vector),
            overflow=0,
            swapped=seen[SWAPPED],
            fetched=seen[FETCHED],
            fetched_hits=seen[FETCHED_HITS],
        )


def _matrices(layer: object) -> Sequence[torch.Tensor]:
    return [getattr(layer, f"{n}_proj") for n in ("q", "k", "v", "o")]
