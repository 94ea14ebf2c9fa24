"""A large shape decoding on the GPU with the sets of a trace: the sparse kernels and a CUDA graph around them.

The graph holds a whole step: attention, the predictor's pass at its real size (its scores are dropped), the trace's
mask, ids, gathered products from slots or home, the next token. Between replays the hot set is ranked anew by the
decayed counts that the graph keeps. Sets and counts of the trace are beside the cap; a product has no trace.
Shapes: B rows, F neurons, D hidden, L layers, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from benchmarks.gpu_decode import Counted
from benchmarks.gpu_dense import Attention
from benchmarks.kernels import random_sketch
from benchmarks.make_checkpoint import Shape
from benchmarks.traces import ROW_STEP, Replay
from cache.bundle import BundleLayout
from runtime.kernels.triton_planes import plane_order, plane_sums
from runtime.kernels.triton_sparse import COUNTERS, LayerRecords, SparseScratch, copy_records, sparse_ffn

DECAY = 0.98
RERANK_TOKENS, RERANK_SOONER, MUCH = 16, 8, 0.3  # sooner where more than so much of a layer fits (LOG.md)
SKETCH_BITS = 1.7
_DOWN_PROGRAMS = 264


class Predictor:
    """The pass of a sketch of random planes over each layer's input."""

    def __init__(self, shape: Shape, bits: float = SKETCH_BITS, device: str = "cuda") -> None:
        sketch = random_sketch(
            np.random.default_rng(1), shape.hidden_size, shape.intermediate_size, bits, shape.gated, shape.hidden_act
        )
        matrices = [m for m in (sketch.gate, sketch.up) if m is not None]
        self._codes = [
            [torch.from_numpy(m.codes.copy()).to(device) for m in matrices] for _ in range(shape.num_hidden_layers)
        ]
        planes = [(*map(torch.from_numpy, m.planes()), m.codes.shape[1]) for m in matrices]
        self._planes = [tuple(part.to(device) for part in plane_order(*one)) for one in planes]
        self.num_bytes = shape.num_hidden_layers * sketch.num_bytes

    def run(self, layer: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """x fp32 [B, D]; out fp32 [B, F] gets the sums of the last matrix."""
        for codes, (dimension, coefficient) in zip(self._codes[layer], self._planes, strict=True):
            plane_sums(codes, x[:, dimension] * coefficient, out)


class TracedModel:
    """See `benchmarks.gpu_decode.Traced`. num_slots: of each layer, at first with what is hottest on another text."""

    def __init__(
        self,
        shape: Shape,
        vocab_size: int,
        layout: BundleLayout,
        home: Sequence[torch.Tensor],
        replay: Replay,
        num_slots: int,
        rows: int = 1,
        device: str = "cuda",
    ) -> None:
        self._shape, self._layout, self._home, self._device, self._rows = shape, layout, home, device, rows
        self._num_slots, self.slots_per_layer = num_slots, (num_slots,) * shape.num_hidden_layers
        self._attention = Attention(shape, vocab_size, device, rows)
        self._predictor = Predictor(shape, device=device)
        num, layers = shape.intermediate_size, shape.num_hidden_layers
        self._sets = torch.stack([replay.sets(i, device) for i in range(layers)]).to(torch.uint8)  # [L, T, F]
        self._place = torch.arange(rows, device=device) * ROW_STEP
        self._homes = torch.tensor([h.data_ptr() for h in home], device=device)  # addresses
        self._slab = torch.empty(max(1, layers * num_slots), layout.stride, dtype=torch.uint8, device=device)
        self._slots = torch.full((layers, num), -1, dtype=torch.int32, device=device)
        self._score = torch.from_numpy(replay.frequency() / (1 - DECAY)).to(device)  # as if seen for long
        self._counters = torch.zeros(layers, len(COUNTERS), dtype=torch.int64, device=device)
        self._records = [
            LayerRecords(home[i], self._slab, self._slots[i], self._score[i], self._counters[i]) for i in range(layers)
        ]
        self._scratch = SparseScratch.make(rows, num, shape.hidden_size, _DOWN_PROGRAMS, device)
        self._scores = torch.empty(rows, num, device=device)
        self._rerank_tokens = RERANK_SOONER if num_slots > MUCH * num else RERANK_TOKENS
        self._swapped = self._tokens = 0
        self._fill_slots()
        self.fixed_bytes = self._attention.num_bytes + self._predictor.num_bytes
        self._graph: torch.cuda.CUDAGraph | None = None

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One token of every row; what a graph captures."""
        places = self._place % self._sets.shape[1]

        def ffn(layer: int, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            self._predictor.run(layer, normed, self._scores)
            mask = self._sets[layer].index_select(0, places)  # [B, F]
            out = torch.empty_like(residual)
            shape = self._shape
            sparse_ffn(
                normed, residual, out, mask, self._records[layer], self._scratch,
                shape.gated, shape.hidden_act == "relu2", torch.bfloat16, DECAY,
            )  # fmt: skip
            return out

        self._attention.step(ffn)
        self._place += 1

    def capture(self) -> None:
        """Loads every kernel with a step that is counted like the others, then captures one."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.step()
        self._restart()

    def _restart(self) -> None:
        """The trace from its beginning, with nothing counted."""
        self._place.copy_(torch.arange(self._rows, device=self._device) * ROW_STEP)
        self._counters.zero_()

    def decode(self, num_steps: int) -> list[float]:
        if self._graph is None:
            self.capture()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self._graph.replay()  # type: ignore[union-attr]
            self._tokens += 1
            if self._tokens % self._rerank_tokens == 0 and 0 < self._num_slots < self._shape.intermediate_size:
                self.rerank()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    def counted(self) -> Counted:
        total = dict(zip(COUNTERS, self._counters.sum(0).tolist(), strict=True))
        vector = self._layout.hidden_size * 2
        first = vector * (2 if self._shape.gated else 1)
        return Counted(
            lookups=total["lookups"],
            hits=total["hits"],
            missed_bytes=(total["lookups"] - total["hits"]) * first + total["missed_down"] * vector,
            hit_bytes=total["hits"] * first + total["hit_down"] * vector,
            overflow=0,
            swapped=self._swapped,
        )

    # -- the hot set --------------------------------------------------------------------------------------------------

    def _wanted(self) -> torch.Tensor:
        """bool [L, F]: each layer's neurons of highest score."""
        wanted = torch.zeros_like(self._slots, dtype=torch.bool)
        return wanted.scatter_(1, torch.topk(self._score, self._num_slots, dim=1).indices, True)

    def _fill_slots(self) -> None:
        layers, neurons = torch.nonzero(self._wanted(), as_tuple=True)
        places = torch.arange(layers.numel(), dtype=torch.int32, device=self._device)
        self._slots[layers, neurons] = places
        copy_records(self._homes, layers, neurons, self._slab, places)

    def rerank(self) -> None:
        """Neurons used more often lately take the slots of those used least; as many leave a layer as enter it, so the
        two lists, ordered by layer, belong together."""
        wanted, held = self._wanted(), self._slots >= 0
        enter, leave = (torch.nonzero(m, as_tuple=True) for m in (wanted & ~held, held & ~wanted))
        freed = self._slots[leave]
        self._slots[leave] = -1
        self._slots[enter] = freed
        copy_records(self._homes, *enter, self._slab, freed)
        self._swapped += int(freed.numel())
