"""A model of a large shape with random weights, made on the GPU in seconds: no checkpoint, no packing.

Shapes: L layers, F neurons, D hidden, V tokens.
"""

from __future__ import annotations

import math

import torch

from benchmarks.make_checkpoint import Shape, config_json
from cache.budget import HostMemory
from cache.bundle import BundleDtype, BundleLayout
from runtime.config import ModelConfig
from runtime.gpu_plan import DeviceMemory, GpuPlan, make_gpu_plan
from runtime.model import LayerWeights, ModelWeights
from runtime.plan import FfnCache, PlanOptions

MAX_MODEL_LEN = 2304  # a prefill of 2,048 tokens, and some decode
_HOST = HostMemory(1 << 40, 1 << 40, None, "MemAvailable")
_CARD = DeviceMemory("GPU", 1 << 40, 1 << 40)


def shape_plan(
    shape: Shape,
    vocab_size: int,
    percent: float,
    mode: str = "sparse",
    num_seqs: int = 1,
    memory_bytes: int | None = None,
) -> GpuPlan:
    """Of a random model with so much of its FFN on the GPU: what the plan uses is the cap for whoever is beside it."""
    config = model_config(shape, vocab_size)
    options = PlanOptions(
        memory_bytes=memory_bytes,
        dtype="bf16",
        mode=mode,
        ffn_cache=FfnCache(percent=percent),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_seqs,
    )
    layout = BundleLayout.make(config.hidden_size, config.gated, BundleDtype.BF16)
    return make_gpu_plan(config, layout, options, _HOST, _CARD, 0)


def weight_cap(plan: GpuPlan) -> int:
    """Bytes that a plan uses on the GPU, the context aside, which everybody has."""
    uses = plan.uses()["gpu"]
    return sum(uses.values()) - uses["context"]


def model_config(shape: Shape, vocab_size: int) -> ModelConfig:
    return ModelConfig.from_hf(config_json(shape, vocab_size, 1, 2))


def fill_records(records: torch.Tensor, layout: BundleLayout, seed: int, device: str = "cuda") -> None:
    """Random bf16 vectors into uint8 records [F, stride] in main memory; what is beside the vectors is zero.

    Made on the device a slice at a time; std 1 / sqrt(D), so that activations stay finite.
    """
    generator = torch.Generator(device).manual_seed(seed)
    width, step = len(layout.vectors) * layout.hidden_size, max(1, (256 << 20) // layout.stride)
    for first in range(0, records.shape[0], step):
        part = records[first : first + step]
        made = torch.zeros(part.shape, dtype=torch.uint8, device=device)
        values = torch.randn(part.shape[0], width, generator=generator, device=device) * layout.hidden_size**-0.5
        made[:, : 2 * width] = values.to(torch.bfloat16).view(torch.uint8)
        part.copy_(made)


def random_weights(
    shape: Shape, vocab_size: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> ModelWeights:
    """All but the FFN, on the device."""
    hidden, q = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=device) / math.sqrt(columns)).to(dtype)

    layers = tuple(
        LayerWeights(
            torch.ones(hidden, device=device),
            matrix(q, hidden),
            matrix(kv, hidden),
            matrix(kv, hidden),
            matrix(hidden, q),
            torch.ones(hidden, device=device),
        )
        for _ in range(shape.num_hidden_layers)
    )
    embed, head = matrix(vocab_size, hidden), matrix(vocab_size, hidden)
    return ModelWeights(embed, layers, torch.ones(hidden, device=device), head)
