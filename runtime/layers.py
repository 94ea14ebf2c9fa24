"""One decoder layer of a checkpoint in memory, and its attention over whole windows of text.

For passes that take one layer at a time (packing, profiling); knows tensors and names, not the cache and not serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.checkpoint import Checkpoint, ResidentFile
from runtime.config import ModelConfig
from runtime.model import LayerWeights, apply_rope, project_qkv, rms_norm


def ffn_name(layer: int, vector: str) -> str:
    return f"model.layers.{layer}.mlp.{vector}_proj.weight"


@dataclass(frozen=True, slots=True)
class FFNWeights:
    """One layer's FFN in fp32, a row a neuron: gate and up [F, D], down transposed [F, D]."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor

    def named(self) -> Sequence[tuple[str, torch.Tensor | None]]:
        return (("gate", self.gate), ("up", self.up), ("down", self.down))


def full_attention(
    config: ModelConfig, w: LayerWeights, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Full causal attention of windows [S, T, D]."""
    windows, length, _ = hidden.shape
    x = rms_norm(hidden, w.input_layernorm, config.rms_norm_eps).flatten(0, 1)
    q, k, v = (t.view(windows, length, -1, config.head_dim) for t in project_qkv(w, x, config, F.linear))
    out = F.scaled_dot_product_attention(
        apply_rope(q, cos, sin).transpose(1, 2),
        apply_rope(k, cos, sin).transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=True,
    )
    o = F.linear(out.transpose(1, 2).flatten(2), w.o_proj)  # [S, T, D]
    return o if w.o_bias is None else o + w.o_bias


def load_ffn(checkpoint: Checkpoint, layer: int) -> FFNWeights:
    """One layer's FFN in fp32; gate is None where there is none."""
    gate = checkpoint.load(ffn_name(layer, "gate")).float() if checkpoint.config.gated else None
    up = checkpoint.load(ffn_name(layer, "up")).float()
    return FFNWeights(gate, up, checkpoint.load(ffn_name(layer, "down")).float().T.contiguous())


def load_layer(checkpoint: Checkpoint | ResidentFile, layer: int, dtype: torch.dtype) -> LayerWeights:
    """One layer's resident matrices in `dtype`; norms and biases in fp32."""
    prefix = f"model.layers.{layer}."

    def matrix(name: str) -> torch.Tensor:
        return checkpoint.load(f"{prefix}self_attn.{name}.weight").to(dtype)

    def vector(name: str) -> torch.Tensor:
        return checkpoint.load(prefix + name).float()

    biases = {}
    if checkpoint.config.attention_bias:
        biases = {f"{n}_bias": vector(f"self_attn.{n}_proj.bias") for n in ("q", "k", "v", "o")}
    return LayerWeights(
        input_layernorm=vector("input_layernorm.weight"),
        q_proj=matrix("q_proj"),
        k_proj=matrix("k_proj"),
        v_proj=matrix("v_proj"),
        o_proj=matrix("o_proj"),
        post_attention_layernorm=vector("post_attention_layernorm.weight"),
        **biases,
    )
