"""Dense decode in plain PyTorch, batch 1: the bound with everything resident, and whole layers streamed under a cap.

What a straightforward offloading runtime does, done well: one CUDA graph where all weights are on the GPU; else two
buffers, filled on a copy stream from registered main memory while the layer before is computed. Random weights.
Shapes: D hidden, F neurons, H heads, T context.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.gpu_results import Figures
from benchmarks.gpu_shapes import random_weights
from benchmarks.make_checkpoint import Shape
from runtime.gpu_machine import seconds
from runtime.model import LayerWeights, apply_rope, rms_norm

CONTEXT, TOKENS = 256, 5


class Attention:
    """Everything of a decode step but the FFN, over CONTEXT positions that are already there."""

    def __init__(self, shape: Shape, vocab_size: int, device: str = "cuda") -> None:
        self.shape, self.weights = shape, random_weights(shape, vocab_size, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        kv = (shape.num_hidden_layers, 2, shape.num_key_value_heads, CONTEXT, shape.head_dim)
        self._kv = torch.randn(kv, dtype=torch.bfloat16, device=device)
        angles = torch.rand(1, shape.head_dim // 2, device=device)
        self._cos, self._sin = angles.cos(), angles.sin()

    def step(self, ffn: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """One token through all layers; the next one is chosen greedily and kept in `token`."""
        eps = self.shape.rms_norm_eps
        x = self.weights.embed_tokens[self.token]  # [1, D]
        for i, w in enumerate(self.weights.layers):
            x = x + self._attend(i, w, rms_norm(x.float(), w.input_layernorm, eps).to(x.dtype))
            x = x + ffn(i, rms_norm(x.float(), w.post_attention_layernorm, eps).to(x.dtype))
        last = rms_norm(x.float(), self.weights.norm, eps).to(x.dtype)
        self.token.copy_(F.linear(last, self.weights.lm_head).argmax(-1))

    def _attend(self, layer: int, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        d, keys, values = self.shape.head_dim, *self._kv[layer]
        q, k, v = (F.linear(x, m).view(1, -1, d) for m in (w.q_proj, w.k_proj, w.v_proj))
        keys[:, -1], values[:, -1] = apply_rope(k, self._cos, self._sin)[0].to(k.dtype), v[0]
        query = apply_rope(q, self._cos, self._sin).to(q.dtype).transpose(0, 1)  # [H, 1, d]
        out = F.scaled_dot_product_attention(query[None], keys[None], values[None], enable_gqa=True)
        return F.linear(out.view(1, -1), w.o_proj)

    @property
    def num_bytes(self) -> int:
        """Read by every step: attention, head, keys and values."""
        layers = sum(m.nbytes for w in self.weights.layers for m in (w.q_proj, w.k_proj, w.v_proj, w.o_proj))
        return layers + self.weights.lm_head.nbytes + self._kv.nbytes


def multiply(x: torch.Tensor, matrices: torch.Tensor, act: str) -> torch.Tensor:
    """FFN(x) [1, D] of matrices [2 or 3, F, D]: gate where there is one, up, down transposed."""
    h = F.relu(F.linear(x, matrices[0]))
    h = h * h if act == "relu2" else h
    if matrices.shape[0] == 3:
        h = h * F.linear(x, matrices[1])
    return h @ matrices[-1]


def random_layer(shape: Shape, device: str = "cuda") -> torch.Tensor:
    """bf16 [2 or 3, F, D] on the device."""
    size = (3 if shape.gated else 2, shape.intermediate_size, shape.hidden_size)
    return torch.randn(size, dtype=torch.bfloat16, device=device) * shape.hidden_size**-0.5


def dense_graph(shape: Shape, vocab_size: int, ceilings: Figures) -> Figures:
    """Everything on the GPU, one CUDA graph; held against all its bytes over the bandwidth of a read kernel."""
    attention = Attention(shape, vocab_size)
    layers = [random_layer(shape) for _ in range(shape.num_hidden_layers)]

    def step() -> None:
        attention.step(lambda i, x: multiply(x, layers[i], shape.hidden_act))

    step_s = graph_seconds(step)
    bound_s = (attention.num_bytes + sum(m.nbytes for m in layers)) / max(ceilings["read_bytes_per_s"].values())
    return {"tokens_per_s": 1 / step_s, "s_per_step": step_s, "bound_s": bound_s, "share_of_bound": bound_s / step_s}


@torch.no_grad()
def graph_seconds(step: Callable[[], None]) -> float:
    """Of one replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # loads kernels and workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return seconds(lambda: [graph.replay() for _ in range(10)]) / 10


class Streamed:
    """FFN of layers of which the first ones are on the GPU and the others, an even number, are copied in, one ahead."""

    def __init__(self, shape: Shape, num_resident: int) -> None:
        self._shape, self._num_resident = shape, num_resident
        self._resident = [random_layer(shape) for _ in range(num_resident)]
        self._home = [registered(random_layer(shape)) for _ in range(shape.num_hidden_layers - num_resident)]
        self._buffers = [torch.empty_like(self._home[0], device="cuda") for _ in range(2)]
        self._copies = torch.cuda.Stream()
        self._filled, self._read = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        for event in self._read:
            event.record()
        self._copy(0)

    @property
    def streamed_bytes(self) -> int:
        return sum(m.nbytes for m in self._home)

    def _copy(self, index: int) -> None:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read[index % 2])
            self._buffers[index % 2].copy_(self._home[index], non_blocking=True)
            self._filled[index % 2].record()

    def __call__(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        if layer < self._num_resident:
            return multiply(x, self._resident[layer], self._shape.hidden_act)
        index = layer - self._num_resident
        torch.cuda.current_stream().wait_event(self._filled[index % 2])
        self._copy((index + 1) % len(self._home))  # after the last one the next token's first
        out = multiply(x, self._buffers[index % 2], self._shape.hidden_act)
        self._read[index % 2].record()
        return out


def streaming(shape: Shape, vocab_size: int, gpu_bytes: int) -> Figures:
    """Decode under a cap: as many whole layers on the GPU as fit beside the rest and two buffers."""
    attention = Attention(shape, vocab_size)
    layer_bytes = random_layer(shape).nbytes
    embedding = attention.weights.embed_tokens.nbytes
    fitting = int((gpu_bytes - attention.num_bytes - embedding) // layer_bytes) - 2
    resident = max(0, min(fitting, shape.num_hidden_layers - 2))
    resident -= (shape.num_hidden_layers - resident) % 2  # if there is no place for all in pairs
    ffn = Streamed(shape, resident)
    with torch.no_grad():
        attention.step(ffn)
        times = [seconds_of(lambda: attention.step(ffn)) for _ in range(TOKENS)]
    median = statistics.median(times)
    return {
        "tokens_per_s": 1 / median,
        "s_per_token": times,
        "gpu_budget_bytes": gpu_bytes,
        "layers_on_gpu": resident,
        "streamed_bytes": ffn.streamed_bytes,
        "link_bytes_per_s": ffn.streamed_bytes / median,
    }


def seconds_of(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def registered(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in main memory, page-locked as it is; RuntimeError when the driver refuses."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    if error := int(torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0)):
        raise RuntimeError(f"cudaHostRegister of {copy.nbytes} bytes: error {error}")
    return copy.copy_(tensor)
