"""The FFN of a GPU host: rows by the kernels that read slots or home, prompts by layers that are copied whole.

`decode` is what a CUDA graph captures: no allocation that matters, no word with the host. Semantics are those of
`runtime.ffn`: a row's neurons depend on its input, the model, the settings and the pinned set.
Shapes: B rows (a power of two), N rows of a prompt, F neurons, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cache.bundle import BundleDtype, BundleLayout
from runtime.activation import activation
from runtime.ffn import record_matrix
from runtime.gpu_slots import GpuSlots
from runtime.kernels.triton_gates import gate_masks
from runtime.kernels.triton_masks import DeviceSketch, plane_masks
from runtime.kernels.triton_neurons import Scratch, add_ffn


class Masks(Protocol):
    """Which neurons of a layer the rows want. num_bytes: on the device. of(layer, x fp32 [B, D]) -> uint8 [B, F], or
    None: the whole layer; the tensor is the caller's until the next call."""

    name: str
    num_bytes: int

    def of(self, layer: int, x: torch.Tensor) -> torch.Tensor | None: ...


class PlaneMasks:
    """As `runtime.predictor.PlanePredictor`: pinned, or scored at the threshold. sketches: None: all neurons."""

    name = "planes"

    def __init__(
        self, sketches: Sequence[DeviceSketch | None], thresholds: Sequence[float], max_rows: int, device: torch.device
    ) -> None:
        self._sketches, self._thresholds = sketches, [float(t) for t in thresholds]
        known = [s for s in sketches if s is not None]
        num_neurons = known[0].num_neurons if known else 0
        self._mask = torch.ones(max_rows, num_neurons, dtype=torch.uint8, device=device)  # the pinned ones stay as is
        self.num_bytes = sum(s.num_bytes for s in known)

    def of(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        sketch = self._sketches[layer]
        if sketch is None:
            return None
        mask = self._mask[: x.shape[0]]
        plane_masks(x, sketch, self._thresholds[layer], mask)
        return mask


class GateMasks:
    """As `runtime.predictor.ResidentGatePredictor`. gates: per layer [F, D] on the device."""

    name = "gate"

    def __init__(self, gates: Sequence[torch.Tensor], max_rows: int) -> None:
        self._gates = gates
        self._mask = torch.empty(max_rows, gates[0].shape[0], dtype=torch.uint8, device=gates[0].device)
        self.num_bytes = sum(g.nbytes for g in gates)

    def of(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        mask = self._mask[: x.shape[0]]
        gate_masks(x, self._gates[layer], mask)
        return mask


class GpuFFN:
    """masks: None: dense. active_at fp32 [L, F]: what a factor must reach to be counted. staged_neurons: that one of
    the two buffers of a copied layer holds."""

    def __init__(
        self,
        slots: GpuSlots,
        act: str,
        masks: Masks | None,
        active_at: torch.Tensor | None,
        max_rows: int,
        staged_neurons: int,
        gemm_dtype: torch.dtype,
    ) -> None:
        self.slots, self.masks = slots, masks
        self._name, self._act, self._gemm_dtype = act, activation(act), gemm_dtype
        self._active_at = active_at
        self._layout: BundleLayout = slots.layout
        num_neurons, device, hidden = slots.table.shape[1], slots.device, slots.layout.hidden_size
        self._scratch = Scratch.make(max_rows, num_neurons, hidden, device)
        staged = min(staged_neurons, num_neurons)
        self._staging = [torch.empty(staged, slots.layout.stride, dtype=torch.uint8, device=device) for _ in range(2)]
        self._records = [slots.records(layer) for layer in range(slots.table.shape[0])]
        cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._copied, self._free = ([torch.cuda.Event() for _ in range(2)] if cuda else [] for _ in range(2))  # type: ignore[no-untyped-call]

    def decode(self, layer: int, x: torch.Tensor, live: torch.Tensor, out: torch.Tensor) -> None:
        """out fp32 [B, D] += FFN(x), row by row; live int64 [B]: zero for padding."""
        mask = None if self.masks is None else self.masks.of(layer, x)
        active_at = None if self._active_at is None else self._active_at[layer]
        add_ffn(
            x, self._records[layer], self._name, mask, active_at, out, self._scratch, self.slots.used[layer],
            self.slots.counters, live,
        )  # fmt: skip

    def prefill(self, layer: int, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """FFN(x) for each of xs, fp32 [N, D], over all neurons: pieces of the layer are copied while those before them
        are multiplied with."""
        outs = [torch.zeros_like(x) for x in xs]
        rows = [x.to(self._gemm_dtype) for x in xs]
        home, size = self.slots.home.records[layer], self._staging[0].shape[0]
        starts = list(range(0, home.shape[0], size))
        if starts:
            self._copy(home[:size], 0)
        for turn, _ in enumerate(starts):
            if turn + 1 < len(starts):
                self._copy(home[starts[turn + 1] : starts[turn + 1] + size], turn + 1)
            records = self._arrived(turn)[: min(size, home.shape[0] - starts[turn])]
            self._multiply(records, rows, outs)
            self._leave(turn)
        return outs

    def _copy(self, records: torch.Tensor, turn: int) -> None:
        """Starts a piece on its way to the buffer of its turn, once that is free."""
        target = self._staging[turn % 2][: records.shape[0]]
        self.slots.copied_bytes += records.nbytes
        if self._copies is None:
            target.copy_(records)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free[turn % 2])
            target.copy_(records, non_blocking=True)
            self._copied[turn % 2].record(self._copies)

    def _arrived(self, turn: int) -> torch.Tensor:
        if self._copies is not None:
            torch.cuda.current_stream().wait_event(self._copied[turn % 2])
        return self._staging[turn % 2]

    def _leave(self, turn: int) -> None:
        if self._copies is not None:
            self._free[turn % 2].record(torch.cuda.current_stream())

    def _multiply(self, records: torch.Tensor, rows: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
        """outs += the neurons of records uint8 [n, stride]."""
        gate = self._matrix(records, "gate") if self._layout.gated else None
        up, down = self._matrix(records, "up"), self._matrix(records, "down")
        for x, out in zip(rows, outs, strict=True):
            h = product(x, up)
            h = self._act(h) if gate is None else self._act(product(x, gate)) * h
            out += product(h.to(self._gemm_dtype), down.T)

    def _matrix(self, records: torch.Tensor, name: str) -> torch.Tensor:
        found = record_matrix(records.view(-1), self._layout, 0, records.shape[0], name)
        return found if self._layout.dtype is not BundleDtype.INT8 else found.to(self._gemm_dtype)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, D] times weight [M, D] transposed, fp32 [N, M]: sums stay in fp32 where x is narrower."""
    weight = weight if weight.dtype is x.dtype else weight.to(x.dtype)
    if x.dtype is not torch.float32 and x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return (x @ weight.T).float()
