"""The FFN: `DenseFFN` is the specification, `OffloadedFFN` the same function with its weights in a neuron cache.

Knows tensors, masks and arena offsets; not requests, and not which tier a byte came from.
Shapes: N rows, D hidden, F neurons, K neurons of the union.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from cache.bundle import BundleDtype, BundleLayout
from cache.neuron_cache import Chunk, Lease, NeuronCache
from runtime.activation import activation
from runtime.audit import Auditor
from runtime.batch import BatchKind, ModelCounters
from runtime.kernels import Kernels
from runtime.model import NextInput
from runtime.plan import FEW_ROWS
from runtime.predictor import Predictor
from runtime.read_cost import reading_seconds
from runtime.step_choice import StepChoice

_WORTH_A_CALL = 16  # neurons: computing fewer while others are read saves less than the call costs
_ALONE = 2.0  # times slower reading apart must be before one row's step streams: who runs alone wants little read
_WORTH_A_GUESS = 48  # records that a layer waits for: in less time than their reads take a guess is not made
_SURE = 2.0  # confidence from which a guess is read a layer ahead: 4 % of the misses are then read in vain (LOG.md)
_HOPELESS = 1.5  # times the time of reading apart: streaming that should take longer is not tried
_FEW_NEURONS = 1 / 8  # of a layer: below that nobody needs to ask whether to read it whole


class DenseFFN:
    """act(x gate^T) * (x up^T) down^T with all weights in memory; gate None: act(x up^T) down^T. down is [F, D]."""

    def __init__(self, act: str, gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> None:
        self._act, self._gate, self._up, self._down = activation(act), gate, up, down

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What each neuron multiplies its down vector with, [N, F]."""
        up = x @ self._up.T
        return self._act(up) if self._gate is None else self._act(x @ self._gate.T) * up

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.neurons(x) @ self._down


@dataclass(frozen=True, slots=True)
class _Part:
    """One batch's rows of a layer. by_row: by our kernels, whose result for a row depends on that row alone."""

    x: torch.Tensor  # [N, D]
    mask: np.ndarray | None  # bool [N, F]: each row's own set; None: all neurons
    counted: bool  # its active neurons are: the semantics are sparse, even where the layer is computed whole
    by_row: bool
    out: torch.Tensor  # [N, D], added to


class OffloadedFFN:
    """FFN(x) of any layer: predict, acquire, compute. Without a predictor: dense, streamed.

    active_at, float32 [L, F]: what a neuron's factor must reach to count as active (epsilon / ||down||).
    A row's set is what the predictor says of that row. It never depends on other rows, on what is resident or
    on timing: the union of the rows' sets is only what is read, and a set too large for staging is streamed and masked.
    """

    def __init__(
        self,
        cache: NeuronCache,
        kernels: Kernels,
        act: str,
        predictor: Predictor | None,
        gemm_dtype: torch.dtype,
        active_at: np.ndarray | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self._cache = cache
        self._kernels = kernels
        self._layout: BundleLayout = cache.layout
        self._act_name, self._act = act, activation(act)
        self._predictor = predictor
        self._gemm_dtype = gemm_dtype
        self._arena = torch.from_numpy(cache.arena)
        self._adds_in_order = kernels.name != "reference"  # neuron by neuron, so that a sum may be made in pieces
        self._active_at = active_at
        self._auditor = auditor
        self.choice: StepChoice | None = StepChoice()  # None: never to stream a whole step, for measurements
        self._chosen: StepChoice | None = None  # `choice`, in a step of more than one row
        self._expected_s = np.zeros(2)  # of this step's layers that were chosen for: reading apart, streaming
        self._steps = {"sparse": 0, "dense": 0, "prefill": 0}
        self._active = self._predicted = self._rows = self._overflow = self._switched = 0

    def counters(self) -> ModelCounters:
        """Counted so far, layers of steps by kind included."""
        return ModelCounters(
            dict(self._steps), self._active, self._predicted, self._overflow, self._rows, self._switched
        )

    def __call__(
        self,
        layer: int,
        xs: Sequence[torch.Tensor],
        kinds: Sequence[BatchKind],
        next_input: NextInput | None = None,
    ) -> list[torch.Tensor]:
        """FFN(x) for each of xs, fp32 [N, D] each, computed as if it were alone. Raises ReadError.

        A layer that somebody needs whole is streamed, and all ride along; else the union of the rows' sets is read
        apart, unless streaming is quicker. Either way gives the same numbers. With `next_input`, for the cache made
        with lookahead, a row that runs alone lets the next layer's surest neurons be read behind its own.
        """
        if layer == 0:
            for kind in dict.fromkeys(map(self._step_kind, kinds)):
                self._steps[kind] += 1
        sparse = kinds[0] == "decode" and len(xs) == 1 and self._predictor is not None
        if layer == 0:
            self._chosen = self.choice if sparse and xs[0].shape[0] > 1 else None
            self._expected_s[:] = 0.0
            if self._chosen is not None:
                self._chosen.begin(xs[0].shape[0])
        parts = [self._part(layer, x, kind, len(xs) > 1) for x, kind in zip(xs, kinds, strict=True)]
        following = self._streamed_next(layer, kinds)
        if not (sparse and self._sparse(layer, parts[0], next_input if xs[0].shape[0] == 1 else None)):
            self._streamed(layer, parts, following)
        if layer == self._cache.file.num_layers - 1 and self._chosen is not None:
            self._chosen.end(hopeful=bool(self._expected_s[1] < _HOPELESS * self._expected_s[0]))
        return [part.out for part in parts]

    def look_ahead(self, layer: int, xs: Sequence[torch.Tensor], kinds: Sequence[BatchKind]) -> None:
        """Starts reading what the layer will probably want, from guesses at its inputs, shaped as they will be.

        For the cache made with lookahead. Nothing but time and counters depends on it: the layer's true input decides.
        """
        if self._predictor is None or len(xs) > 1 or kinds[0] != "decode":
            return
        guess = self._predictor.predict(layer, xs[0].contiguous().numpy())
        if guess is None:
            return
        ids = np.flatnonzero(guess.any(axis=0)).astype(np.int32)
        apart_s, whole_s = self._reading_seconds(layer, ids)
        if whole_s * (_ALONE if xs[0].shape[0] == 1 else 1.0) >= apart_s:  # as `_reads_apart` will choose
            self._cache.prefetch(layer, ids)

    def _guess(self, layer: int, x: torch.Tensor) -> None:
        """Lets what the layer will surely want be read once the lease that is out has what it needs."""
        confidence = None if self._predictor is None else self._predictor.confidence(layer, x.contiguous().numpy())
        if confidence is not None:
            ids = np.flatnonzero(confidence[0] >= _SURE).astype(np.int32)
            self._cache.prefetch(layer, ids, confidence[0, ids])

    def _step_kind(self, kind: BatchKind) -> str:
        return "prefill" if kind == "prefill" else "dense" if self._predictor is None else "sparse"

    def _part(self, layer: int, x: torch.Tensor, kind: BatchKind, in_company: bool) -> _Part:
        by_row = kind == "decode" or x.shape[0] <= FEW_ROWS
        if self._predictor is None or kind == "prefill":
            return _Part(x, None, False, by_row, torch.zeros_like(x))
        mask = self._predict(layer, x)
        if mask is None:
            return _Part(x, None, True, by_row, torch.zeros_like(x))
        if kind == "decode" and self._auditor is not None:
            self._auditor.offer(layer, x.numpy(), mask)
        own = mask.copy() if in_company else mask  # the predictor reuses its own
        return _Part(x, own, True, by_row, torch.zeros_like(x))

    def _predict(self, layer: int, x: torch.Tensor) -> np.ndarray | None:
        if self._predictor is None:
            raise RuntimeError("dense has no predictor")
        mask = self._predictor.predict(layer, x.contiguous().numpy())
        taken = x.shape[0] * self._cache.file.num_neurons if mask is None else int(np.count_nonzero(mask))
        self._predicted += taken
        self._rows += x.shape[0]
        return mask

    def _sparse(self, layer: int, part: _Part, next_input: NextInput | None) -> bool:
        """Reads the union of the rows' sets apart, where that is chosen and fits staging; False where not."""
        if part.mask is None:
            return False
        if self._chosen is not None and self._chosen.streams:
            self._switched += 1
            return False
        ids = np.flatnonzero(part.mask.any(axis=0)).astype(np.int32)
        return self._reads_apart(layer, ids, alone=part.x.shape[0] == 1) and self._read_apart(
            layer, part, part.mask, ids, next_input
        )

    def _reads_apart(self, layer: int, ids: np.ndarray, alone: bool) -> bool:
        """Whether reading the absent of `ids` record by record is quicker than the whole layer, or, alone, not far
        slower; counts where not."""
        apart_s, whole_s = self._reading_seconds(layer, ids)
        self._expected_s += apart_s, whole_s
        streams = whole_s * (_ALONE if alone else 1.0) < apart_s
        self._switched += streams
        return not streams

    def _reading_seconds(self, layer: int, ids: np.ndarray) -> tuple[float, float]:
        """What reading apart and streaming should take; few neurons are not worth the question."""
        cache = self._cache
        if ids.size < _FEW_NEURONS * cache.file.num_neurons:
            return 0.0, cache.file.layer_bytes * cache.read_cost.byte_s
        apart, whole = cache.volumes(layer, ids)
        return reading_seconds(apart, whole, cache.file.layer_bytes, cache.read_cost)

    def _read_apart(
        self, layer: int, part: _Part, mask: np.ndarray, ids: np.ndarray, next_input: NextInput | None
    ) -> bool:
        """Reads the union `ids` and computes each row's own set; False when the misses do not fit staging."""
        lease = self._cache.begin(layer, ids)
        if lease is None:
            self._overflow += 1
            return False
        own = None if part.x.shape[0] == 1 else mask[:, ids]
        if np.count_nonzero(~lease.hit) < _WORTH_A_GUESS:
            next_input = None
        with lease:
            done = 0
            for there in chain((lease.num_ready,), self._cache.arrivals(lease)):  # while the others are read
                if there == ids.size or (self._adds_in_order and there - done >= _WORTH_A_CALL):
                    self._run_some(layer, part, lease, own, slice(done, there))
                    done = there
                if next_input is not None:  # once, with what the resident ones have added: the others are being read
                    self._guess(layer + 1, next_input(part.out))
                    next_input = None
        return True

    def _run_some(self, layer: int, part: _Part, lease: Lease, mask: np.ndarray | None, some: slice) -> None:
        """Adds some of the lease's records to the part's `out`, in order; mask bool [N, K]."""
        if some.start < some.stop:
            own = None if mask is None else np.ascontiguousarray(mask[:, some])
            self._run(part.x, lease.offsets[some], own, part.out, self._active_at_of(layer, lease.ids[some]))

    def _active_at_of(self, layer: int, ids: np.ndarray | slice) -> np.ndarray | None:
        return None if self._active_at is None else self._active_at[layer, ids]

    def _run(
        self,
        x: torch.Tensor,
        offsets: np.ndarray,
        mask: np.ndarray | None,
        out: torch.Tensor,
        active_at: np.ndarray | None,
    ) -> None:
        """out += the records at `offsets`, by our kernels; counts the active among them when a predictor chose them."""
        rows, arena = x.contiguous().numpy(), self._cache.arena
        num = self._kernels.ffn(rows, arena, offsets, mask, self._layout, self._act_name, out.numpy(), active_at)
        if self._predictor is not None and active_at is not None:
            self._active += num

    def _streamed_next(self, layer: int, kinds: Sequence[BatchKind]) -> int | None:
        """The layer after this one where it will be streamed: for prompts, in company, and where steps are streamed."""
        following = (layer + 1) % self._cache.file.num_layers
        if self._predictor is None:
            return following
        if len(kinds) > 1 or kinds[0] != "decode":
            return following or None  # what comes after this step is not known
        return following if self._chosen is not None and self._chosen.streams else None

    def _streamed(self, layer: int, parts: Sequence[_Part], following: int | None) -> None:
        """Adds the whole layer, in chunks that are read once for all parts, to each part's `out`."""
        with contextlib.closing(self._cache.stream(layer, following)) as chunks:
            for chunk in chunks:
                for part in parts:
                    if part.by_row:
                        self._run_chunk(layer, chunk, part)
                self._multiply(layer, chunk, [part for part in parts if not part.by_row])

    def _run_chunk(self, layer: int, chunk: Chunk, part: _Part) -> None:
        ids = slice(chunk.start, chunk.stop)
        offsets = chunk.offset + np.arange(chunk.stop - chunk.start, dtype=np.int64) * self._layout.stride
        mask = None if part.mask is None else np.ascontiguousarray(part.mask[:, ids])
        self._run(part.x, offsets, mask, part.out, self._active_at_of(layer, ids) if part.counted else None)

    def _multiply(self, layer: int, chunk: Chunk, parts: Sequence[_Part]) -> None:
        """out += the chunk's neurons, by a GEMM for each part; the weights are widened once, one vector at a time."""
        if not parts:
            return
        rows = [part.x.to(self._gemm_dtype) for part in parts]
        weight = self._matrix(chunk, "gate" if self._layout.gated else "up")
        hs = [self._act((x @ weight.T).float()) for x in rows]  # [N, n] each
        if self._layout.gated:
            weight = self._matrix(chunk, "up")
            for h, x in zip(hs, rows, strict=True):
                h *= (x @ weight.T).float()
        weight = self._matrix(chunk, "down")
        for h, part in zip(hs, parts, strict=True):
            self._apply_mask(layer, chunk, h, part)
            part.out.add_((h.to(self._gemm_dtype) @ weight).float())

    def _apply_mask(self, layer: int, chunk: Chunk, h: torch.Tensor, part: _Part) -> None:
        """Zeroes what is not in a row's set; counts the active among all."""
        ids = slice(chunk.start, chunk.stop)
        active_at = self._active_at_of(layer, ids)
        if part.counted and active_at is not None:
            self._active += int(torch.count_nonzero((h.abs() >= torch.from_numpy(active_at)) & (h != 0)))
        if part.mask is not None:
            h *= torch.from_numpy(np.ascontiguousarray(part.mask[:, ids]))

    def _matrix(self, chunk: Chunk, name: str) -> torch.Tensor:
        """The chunk's vectors `name` as a matrix [n, D] in the GEMM's dtype; a view where the bytes allow it."""
        return record_matrix(self._arena, self._layout, chunk.offset, chunk.stop - chunk.start, name).to(
            self._gemm_dtype
        )


_TORCH_DTYPES = {
    BundleDtype.BF16: torch.bfloat16,
    BundleDtype.FP16: torch.float16,
    BundleDtype.FP32: torch.float32,
    BundleDtype.INT8: torch.int8,
}


def record_matrix(arena: torch.Tensor, layout: BundleLayout, offset: int, num: int, name: str) -> torch.Tensor:
    """Vectors `name` of `num` records from byte `offset` of a uint8 arena, [num, D]; int8 comes scaled, as fp32."""
    vector = layout.vector(name)
    records = arena[offset : offset + num * layout.stride].view(num, layout.stride)
    raw = records[:, vector.offset : vector.offset + layout.hidden_size * vector.dtype.item_bytes]
    dtype = _TORCH_DTYPES[vector.dtype]
    aligned = layout.stride % dtype.itemsize == 0 and (offset + vector.offset) % dtype.itemsize == 0
    matrix = raw.view(dtype) if aligned else raw.contiguous().view(dtype)
    if vector.dtype is not BundleDtype.INT8:
        return matrix
    scale = records[:, vector.scale_offset : vector.scale_offset + 4].contiguous().view(torch.float32)  # [num, 1]
    return matrix.float() * scale
