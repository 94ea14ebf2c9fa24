"""Prefill of a large shape: whole layers copied from the home on a copy stream, double-buffered against dense products.

Shapes: N rows, D hidden, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from benchmarks.gpu_dense import Attention
from benchmarks.gpu_results import Figures
from benchmarks.make_checkpoint import Shape
from cache.bundle import BundleLayout
from runtime.gpu_machine import seconds

ROWS = 2048


class LayerStream:
    """Records of one layer after the other in two buffers on the GPU, one ahead; the number of layers is even."""

    def __init__(self, home: Sequence[torch.Tensor]) -> None:
        self._home = home
        self._buffers = [torch.empty_like(home[0], device="cuda") for _ in range(2)]
        self._copies = torch.cuda.Stream()
        self._filled, self._read = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def fill(self, layer: int) -> None:
        """Begins to copy a layer once its buffer's last reader is done."""
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read[layer % 2])
            self._buffers[layer % 2].copy_(self._home[layer], non_blocking=True)
            self._filled[layer % 2].record()

    def records(self, layer: int) -> torch.Tensor:
        """uint8 [F, stride], once they are there."""
        torch.cuda.current_stream().wait_event(self._filled[layer % 2])
        return self._buffers[layer % 2]

    def done(self, layer: int) -> None:
        self._read[layer % 2].record()


def dense_ffn(x: torch.Tensor, records: torch.Tensor, layout: BundleLayout, squared: bool) -> torch.Tensor:
    """FFN(x) bf16 [N, D] with a layer's records as they lie, uint8 [F, stride]."""
    words, d = records.view(torch.bfloat16), layout.hidden_size
    first, *rest = (words[:, v.offset // 2 : v.offset // 2 + d] for v in layout.vectors)  # [F, D] each, strided
    h = F.relu(F.linear(x, first))
    h = h * h if squared else h
    if len(rest) == 2:
        h = h * F.linear(x, rest[0])
    return h @ rest[-1]


@torch.no_grad()
def prefill(
    shape: Shape, vocab_size: int, layout: BundleLayout, home: Sequence[torch.Tensor], ceilings: Figures
) -> Figures:
    """One step of ROWS rows, against what the link and the products would take alone."""
    attention, stream = Attention(shape, vocab_size, rows=1, context=1), LayerStream(home)
    x = torch.randn(ROWS, shape.hidden_size, device="cuda")

    def step() -> None:
        y = x
        stream.fill(0)
        for layer in range(shape.num_hidden_layers):
            if layer + 1 < shape.num_hidden_layers:
                stream.fill(layer + 1)
            y = attention.prompt(layer, y)
            y = y + dense_ffn(attention.norm(y).bfloat16(), stream.records(layer), layout, shape.hidden_act == "relu2")
            stream.done(layer)

    step_s = seconds(step)
    streamed = sum(h.nbytes for h in home)
    stream_s, gemm_s = streamed / ceilings["pinned_copy_bytes_per_s"], flops(shape) / ceilings["gemm_flop_per_s"]
    return {
        "rows": ROWS,
        "seconds": step_s,
        "stream_s": stream_s,
        "gemm_s": gemm_s,
        "share": max(stream_s, gemm_s) / step_s,
        "tokens_per_s": ROWS / step_s,
    }


def flops(shape: Shape) -> float:
    """Of the products of all layers for ROWS rows, and of attention's scores."""
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    matrices = (
        2 * (q + kv) * shape.hidden_size + (3 if shape.gated else 2) * shape.intermediate_size * shape.hidden_size
    )
    return shape.num_hidden_layers * (2.0 * ROWS * matrices + 2.0 * ROWS * ROWS * q)
