"""The FFN of a GPU whose home is on disk: between the two halves of a layer the host brings what its rows want.

It reads the masks, waits for the missing records in main memory and tells the kernels their addresses; what does not
fit there, and prompts, come through as whole layers in chunks. The results are those of `runtime.gpu_ffn`.
Shapes: B rows of a step, N rows of a prompt, F neurons, D hidden; n neurons of a piece.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from runtime.disk_home import DiskHome
from runtime.gpu_ffn import GpuFFN, Wanted
from runtime.gpu_masks import Masks, Norm
from runtime.gpu_slots import GpuSlots
from runtime.kernels.triton_neurons import ACTIVE, NUM_COUNTERS, PREDICTED, Records, add_ffn


class TieredFFN(GpuFFN):
    """As `GpuFFN`, over slots whose home is a `DiskHome` that is open. staged_neurons: at least 1."""

    visited = True

    def __init__(
        self,
        slots: GpuSlots,
        home: DiskHome,
        act: str,
        masks: Masks | None,
        active_at: torch.Tensor | None,
        max_rows: int,
        staged_neurons: int,
        gemm_dtype: torch.dtype,
    ) -> None:
        super().__init__(slots, act, masks, active_at, max_rows, staged_neurons, gemm_dtype)
        self._below, num, device, pin = home, slots.table.shape[1], slots.device, slots.device.type == "cuda"
        self._seen = torch.zeros(max_rows, num, dtype=torch.uint8, pin_memory=pin)
        self._live = torch.zeros(max_rows, dtype=torch.int64, pin_memory=pin)
        self._left = torch.zeros(max_rows, num, dtype=torch.uint8, device=device)  # what a layer's second half is to do
        self._absent = torch.full((num,), -1, dtype=torch.int32, device=device)
        self._counted = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)  # of layers that come through whole
        self._kept = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        self._kept[[ACTIVE, PREDICTED]] = 1
        self._turn = 0
        self.waited_s = 0.0  # for the GPU

    def ask(self, layer: int, x: torch.Tensor, norm: Norm, live: torch.Tensor, following: Norm | None = None) -> Wanted:
        wanted = super().ask(layer, x, norm, live, following)
        if wanted.mask is None:
            return wanted
        self._seen[: x.shape[0]].copy_(wanted.mask, non_blocking=True)
        self._live[: x.shape[0]].copy_(live, non_blocking=True)
        left = self._left[: x.shape[0]].copy_(wanted.mask)  # the mask itself stays as the predictor left it
        return replace(wanted, mask=left)

    def visit(self, wanted: Wanted) -> None:
        self._wait()
        if wanted.mask is None:
            self._stream_rows(wanted)
            return
        rows = wanted.x.shape[0]
        live = self._seen[:rows].numpy()[self._live[:rows].numpy() != 0]
        if not self._below.bring(wanted.layer, live.any(axis=0)):
            self.overflow += 1
            self._stream_rows(wanted)
            wanted.mask.zero_()  # done: the second half finds nothing to do

    def answer(self, wanted: Wanted) -> None:
        if wanted.mask is not None:
            super().answer(wanted)

    def settle(self) -> None:
        """Of a step that is over, or was given up."""
        self._wait()
        self._below.settle()

    def _wait(self) -> None:
        if self.slots.device.type == "cuda":
            begin = time.perf_counter()
            torch.cuda.current_stream().synchronize()
            self.waited_s += time.perf_counter() - begin

    def _pieces(self, layer: int, following: int | None) -> Iterator[tuple[int, torch.Tensor]]:
        """The layer on the device, piece by piece: (first neuron, records uint8 [n, stride]), good until the one after
        the next. Raises ReadError."""
        if (whole := self.slots.whole(layer)) is not None:
            size = self._staging[0].shape[0]
            yield from ((i * size, records) for i, records in enumerate(torch.split(whole, size)))
            return
        self.settle()
        arena, stride = torch.from_numpy(self._below.cache.arena), self._layout.stride
        with contextlib.closing(self._below.cache.stream(layer, following)) as chunks:
            for chunk in chunks:
                for start in range(chunk.start, chunk.stop, self._staging[0].shape[0]):
                    num = min(self._staging[0].shape[0], chunk.stop - start)
                    at = chunk.offset + (start - chunk.start) * stride
                    target = self._staging[self._turn % 2][:num]
                    self._turn += 1
                    target.copy_(arena[at : at + num * stride].view(num, stride), non_blocking=True)
                    self.slots.copied_bytes += target.nbytes
                    yield start, target
                self._wait()  # where the chunk is may be read into again

    def _stream_rows(self, wanted: Wanted) -> None:
        """x += FFN(h) of a step's rows by the kernels that read slots: numbers do not depend on the way of records."""
        layer, counted, hs = wanted.layer, self._counted.zero_(), wanted.h
        for start, records in self._pieces(layer, None):
            stop = start + records.shape[0]
            mask = None if wanted.mask is None else wanted.mask[:, start:stop].contiguous()
            active_at = None if self._active_at is None else self._active_at[layer, start:stop]
            add_ffn(
                hs, Records(records, self.slots.slab, self._absent[: records.shape[0]], self._layout), self._name, mask,
                active_at, wanted.x, self._scratch, self.slots.used[layer, start:stop], counted, wanted.live,
            )  # fmt: skip
        self.slots.counters += counted * self._kept

    def begin(self) -> None:
        """Nothing is ahead."""

    def prefill(self, layer: int, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outs = [torch.zeros_like(x) for x in xs]
        rows = [x.to(self._gemm_dtype) for x in xs]
        following = next((i for i in self._copied_layers if i > layer), None)
        for _, records in self._pieces(layer, following):
            self._multiply(records, rows, outs)
        return outs
