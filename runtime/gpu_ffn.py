"""The FFN of a GPU host: rows by the kernels that read slots or home, prompts by layers that are copied whole, unless
they lie in slots whole.

`decode` is what a CUDA graph captures: no allocation that matters, no word with the host. Semantics are those of
`runtime.ffn`: a row's neurons depend on its input, the model, the settings and the pinned set.
Shapes: B rows (a power of two), N rows of a prompt, F neurons, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache.bundle import BundleLayout
from runtime.activation import activation
from runtime.ffn import record_matrix
from runtime.gpu_ahead import Ahead
from runtime.gpu_masks import Masks, Norm
from runtime.gpu_slots import GpuSlots
from runtime.kernels.triton_masks import Scoring
from runtime.kernels.triton_neurons import Scratch, add_ffn, add_scored, add_whole, scores_itself


@dataclass(frozen=True, slots=True)
class Wanted:
    """What rows of a step want of a layer. x fp32 [B, D]: the residual, h: x normed, until the next layer asks; mask
    uint8 [B, F], None: all neurons, or those that `scoring` finds; live int64 [B]: zero for padding."""

    layer: int
    x: torch.Tensor
    h: torch.Tensor
    mask: torch.Tensor | None
    live: torch.Tensor
    norm: Norm
    scoring: Scoring | None = None


class GpuFFN:
    """masks: None: dense. active_at fp32 [L, F]: what a factor must reach to be counted. staged_neurons: that one of
    the two buffers of a copied layer holds. ahead: what reads a layer ahead of these masks, if anything does. visited:
    whether the host has something to do in the middle of a layer. overflow: layers of steps whose records did not fit
    where they were to be read."""

    visited = False
    overflow = 0

    def __init__(
        self,
        slots: GpuSlots,
        act: str,
        masks: Masks | None,
        active_at: torch.Tensor | None,
        max_rows: int,
        staged_neurons: int,
        gemm_dtype: torch.dtype,
        ahead: Ahead | None = None,
    ) -> None:
        self.slots, self.masks, self._ahead = slots, masks, ahead
        self._name, self._act, self._gemm_dtype = act, activation(act), gemm_dtype
        self._active_at = active_at
        self._layout: BundleLayout = slots.layout
        num_neurons, device, hidden = slots.table.shape[1], slots.device, slots.layout.hidden_size
        self._scratch = Scratch.make(max_rows, num_neurons, hidden, device)
        self._h = torch.empty(max_rows, hidden, device=device)
        staged = min(staged_neurons, num_neurons)
        self._staging = [torch.empty(staged, slots.layout.stride, dtype=torch.uint8, device=device) for _ in range(2)]
        self._records = [slots.records(layer) for layer in range(slots.table.shape[0])]
        cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._copied, self._free = ([torch.cuda.Event() for _ in range(2)] if cuda else [] for _ in range(2))  # type: ignore[no-untyped-call]
        self._copied_layers = [i for i in range(slots.table.shape[0]) if slots.whole(i) is None]
        self._begun = 0  # the first piece of all copied layers' that is not yet on its way

    def decode(self, layer: int, x: torch.Tensor, norm: Norm, live: torch.Tensor) -> None:
        """x fp32 [B, D] += FFN(x normed), row by row; live int64 [B]: zero for padding."""
        wanted = self.ask(layer, x, norm, live)
        self.visit(wanted)
        self.answer(wanted)

    def ask(self, layer: int, x: torch.Tensor, norm: Norm, live: torch.Tensor, following: Norm | None = None) -> Wanted:
        """The first half of `decode`. following: the norm in front of the next layer's FFN, where it comes next."""
        h, mask, scoring = self._h[: x.shape[0]], None, None
        if self.masks is not None:
            trail = None if self._ahead is None else self._ahead.trail(layer, x.shape[0])
            if not self.visited and scores_itself(x, self._records[layer]):
                scoring = self.masks.scoring(layer, x, norm, h, trail)
            mask = self.masks.of(layer, x, norm, h, trail) if scoring is None else None
            if self._ahead is not None and trail is not None and following is not None:
                self._ahead.guess(layer + 1, trail, following, live)
        elif not self._alone(layer, x):
            norm.of(x, h)
        return Wanted(layer, x, h, mask, live, norm, scoring)

    def visit(self, wanted: Wanted) -> None:
        """What the host does between both halves where `visited`: here nothing, so that one graph holds a step."""

    def answer(self, wanted: Wanted) -> None:
        """The second half of `decode`."""
        layer = wanted.layer
        if self.masks is None and self._alone(layer, wanted.x):
            x, norm = wanted.x, wanted.norm
            add_whole(
                x, norm.weight, norm.eps, self._records[layer], self._name, x, self._scratch, self.slots.counters,
                wanted.live,
            )  # fmt: skip
            return
        active_at = None if self._active_at is None else self._active_at[layer]
        if wanted.scoring is not None:
            add_scored(
                wanted.h, wanted.scoring, self._records[layer], self._name, active_at, wanted.x, self._scratch,
                self.slots.counters, wanted.live,
            )  # fmt: skip
            return
        early = None if self._ahead is None else self._ahead.come(layer, wanted.x.shape[0])
        add_ffn(
            wanted.h, early or self._records[layer], self._name, wanted.mask, active_at, wanted.x, self._scratch,
            self.slots.used[layer], self.slots.counters, wanted.live,
        )  # fmt: skip
        if self._ahead is not None:
            self._ahead.go_on(layer)

    def _alone(self, layer: int, x: torch.Tensor) -> bool:
        """Whether one row meets a layer that lies in slots as a whole."""
        return x.shape[0] == 1 and self._records[layer].resident and self._active_at is None

    def settle(self) -> None:
        """The GPU is done with a step."""

    def begin(self) -> None:
        """Starts the first layer that is copied on its way for a prefill, in which all layers follow in their order."""
        self._begun = 0
        self._copy_ahead(0)

    def prefill(self, layer: int, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """FFN(x) for each of xs, fp32 [N, D], over all neurons: while a piece of the layer is multiplied with, the next
        one is copied, the next layer's included. After `begin`, layer by layer."""
        outs = [torch.zeros_like(x) for x in xs]
        rows = [x.to(self._gemm_dtype) for x in xs]
        if (whole := self.slots.whole(layer)) is not None:
            for records in torch.split(whole, self._staging[0].shape[0]):
                self._multiply(records, rows, outs)
            return outs
        num = self._num_pieces()
        first = self._copied_layers.index(layer) * num
        for piece in range(first, first + num):
            self._copy_ahead(piece)
            self._multiply(self._arrived(piece), rows, outs)
            self._leave(piece)
        self._copy_ahead(first + num)
        return outs

    def _num_pieces(self) -> int:
        """Of a layer."""
        staged = self._staging[0].shape[0]
        return -(-self.slots.table.shape[1] // staged) if staged else 0

    def _piece(self, piece: int) -> torch.Tensor:
        """Its records in main memory."""
        (place, turn), size = divmod(piece, self._num_pieces()), self._staging[0].shape[0]
        return self.slots.in_memory[self._copied_layers[place], turn * size : (turn + 1) * size]

    def _copy_ahead(self, piece: int) -> None:
        """A piece and the one after it are on their way to the two buffers, as soon as these are free."""
        last = self._num_pieces() * len(self._copied_layers)
        while self._begun < min(piece + 2, last):
            self._copy(self._begun)
            self._begun += 1

    def _copy(self, piece: int) -> None:
        records = self._piece(piece)
        target = self._staging[piece % 2][: records.shape[0]]
        self.slots.copied_bytes += records.nbytes
        if self._copies is None:
            target.copy_(records)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free[piece % 2])
            target.copy_(records, non_blocking=True)
            self._copied[piece % 2].record(self._copies)

    def _arrived(self, piece: int) -> torch.Tensor:
        if self._copies is not None:
            torch.cuda.current_stream().wait_event(self._copied[piece % 2])
        return self._staging[piece % 2][: self._piece(piece).shape[0]]

    def _leave(self, piece: int) -> None:
        if self._copies is not None:
            self._free[piece % 2].record(torch.cuda.current_stream())

    def _multiply(self, records: torch.Tensor, rows: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
        """outs += the neurons of records uint8 [n, stride], of which one matrix at a time is widened."""
        hs = self._products(rows, records, "up")
        if self._layout.gated:
            gates = self._products(rows, records, "gate")
            hs = [h.mul_(self._act(gate)) for h, gate in zip(hs, gates, strict=True)]
        else:
            hs = [self._act(h) for h in hs]
        down = self._matrix(records, "down")
        for h, out in zip(hs, outs, strict=True):
            out += product(h.to(self._gemm_dtype), down.T)

    def _products(self, rows: Sequence[torch.Tensor], records: torch.Tensor, name: str) -> list[torch.Tensor]:
        """fp32 [N, n] each."""
        matrix = self._matrix(records, name)
        return [product(x, matrix) for x in rows]

    def _matrix(self, records: torch.Tensor, name: str) -> torch.Tensor:
        return record_matrix(records.view(-1), self._layout, 0, records.shape[0], name).to(self._gemm_dtype)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, D] times weight [M, D] transposed, fp32 [N, M]: sums stay in fp32 where x is narrower."""
    weight = weight if weight.dtype is x.dtype else weight.to(x.dtype)
    if x.dtype is not torch.float32 and x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return (x @ weight.T).float()
