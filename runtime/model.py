"""The decoder of the Llama family, once and readable. Architectures are data (`ModelConfig`), not branches.

Knows tensors, layers and positions; the FFN is a callable that it is given, and it never learns where weights live.
Activations are fp32 throughout; matrices are in the dtype they were loaded in.
Shapes: N rows of a batch, T tokens, D hidden, H heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from runtime.batch import Batch, ModelCounters
from runtime.config import ModelConfig
from runtime.kernels import Kernels
from runtime.kv_cache import KVCache

GEMV_ROWS = 16  # up to here our bandwidth-bound kernels, above it torch's GEMM


class FFN(Protocol):
    """y = FFN(x) of one layer, x and y fp32 [N, D]; `kind` is the batch's."""

    def __call__(self, layer: int, x: torch.Tensor, kind: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The resident matrices of one decoder layer, under their checkpoint names."""

    input_layernorm: torch.Tensor  # [D]
    q_proj: torch.Tensor  # [H d, D]
    k_proj: torch.Tensor  # [Hkv d, D]
    v_proj: torch.Tensor  # [Hkv d, D]
    o_proj: torch.Tensor  # [D, H d]
    post_attention_layernorm: torch.Tensor  # [D]
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embed_tokens: torch.Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [D]
    lm_head: torch.Tensor  # [V, D]; the same object as embed_tokens when tied


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, fp32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates halves: x [..., T, H, d], cos and sin [T, d/2] (RoFormer, arXiv 2104.09864, in Llama's half layout)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [T, 1, d/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin fp32 [num_positions, d/2], scaled as the config says (dynamic: up to its context)."""
    inv_freq, factor = rope_frequencies(config)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return angles.cos() * factor, angles.sin() * factor


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies fp32 [d/2] and the factor on cos and sin."""
    d, theta = config.head_dim, config.rope_theta
    inv_freq = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type in ("default", "dynamic"):
        return inv_freq, 1.0
    p = scaling.parameters
    if scaling.rope_type == "linear":
        return inv_freq / p["factor"], 1.0
    if scaling.rope_type == "llama3":
        return _llama3(inv_freq, p), 1.0
    return _yarn(inv_freq, p, config)


def _llama3(inv_freq: torch.Tensor, p: dict[str, float]) -> torch.Tensor:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a ramp between."""
    context, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / p["factor"] + smooth * inv_freq


def _yarn(inv_freq: torch.Tensor, p: dict[str, float], config: ModelConfig) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate where a dimension turns less than beta_slow times in the context."""
    d, factor = config.head_dim, p["factor"]
    context = p.get("original_max_position_embeddings", float(config.max_position_embeddings))

    def dimension(rotations: float) -> float:
        return d * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(p.get("beta_fast", 32.0)), dimension(p.get("beta_slow", 1.0))
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    mixed = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    return mixed, _yarn_attention_factor(p, factor)


def _yarn_attention_factor(p: dict[str, float], factor: float) -> float:
    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if "attention_factor" in p:
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(factor, p["mscale"]) / mscale(factor, p["mscale_all_dim"])
    return mscale(factor)


def project_qkv(
    w: LayerWeights, x: torch.Tensor, config: ModelConfig, linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [N, H, d], keys and values [N, Hkv, d] of normed rows x [N, D], before rotation."""
    q, k, v = linear(x, w.q_proj), linear(x, w.k_proj), linear(x, w.v_proj)
    if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
        q, k, v = q + w.q_bias, k + w.k_bias, v + w.v_bias
    d = config.head_dim
    return (
        q.view(-1, config.num_attention_heads, d),
        k.view(-1, config.num_key_value_heads, d),
        v.view(-1, config.num_key_value_heads, d),
    )


class Model:
    """Runs batches against a block table of keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        ffn: FFN,
        kernels: Kernels,
        max_model_len: int,
        counters: Callable[[], ModelCounters],
    ) -> None:
        self.config = config
        self.counters = counters
        self._weights = weights
        self._ffn = ffn
        self._kernels = kernels
        self._cos, self._sin = rope_tables(config, max_model_len)
        self._scale = config.head_dim**-0.5

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, check: Callable[[], None]) -> torch.Tensor | None:
        """fp32 logits of the rows that `batch.logits` asks for, [B or N or 1, V]; None for "none".

        Writes the batch's keys and values into `kv`. `check` is called before every layer and may raise.
        """
        x = self._weights.embed_tokens[batch.token_ids].float()  # [N, D]
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]  # [N, d/2]
        slots = kv.slots(batch)
        for i, w in enumerate(self._weights.layers):
            check()
            h = rms_norm(x, w.input_layernorm, self.config.rms_norm_eps)
            q, k, v = project_qkv(w, h, self.config, self._linear)
            kv.write(i, slots, apply_rope(k, cos, sin), v)
            attended = self._attend(i, apply_rope(q, cos, sin), batch, kv)  # [N, H d]
            o = self._linear(attended, w.o_proj)
            x = x + (o if w.o_bias is None else o + w.o_bias)
            h = rms_norm(x, w.post_attention_layernorm, self.config.rms_norm_eps)
            x = x + self._ffn(i, h, batch.kind)
        return self._logits(x, batch)

    def _logits(self, x: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        if batch.logits == "none":
            return None
        if batch.logits == "last" and batch.kind != "decode":
            x = x[-1:]
        return self._linear(rms_norm(x, self._weights.norm, self.config.rms_norm_eps), self._weights.lm_head)

    def _attend(self, layer: int, q: torch.Tensor, batch: Batch, kv: KVCache) -> torch.Tensor:
        """q [N, H, d] -> [N, H d]; rows of a decode batch each look at their own sequence."""
        if batch.kind == "decode":
            return self._attend_decode(layer, q, batch, kv)
        view = batch.sequences[0]
        total = view.start + view.length
        keys, values = kv.gather(layer, view.blocks, total)  # [total, Hkv, d]
        mask = None
        if view.start:
            mask = torch.arange(total)[None, :] <= torch.arange(view.start, total)[:, None]  # [T, total]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None].float(),
            values.transpose(0, 1)[None].float(),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).reshape(view.length, -1)

    def _attend_decode(self, layer: int, q: torch.Tensor, batch: Batch, kv: KVCache) -> torch.Tensor:
        out = torch.empty_like(q)
        keys, values = kv.layer_arrays(layer)
        for row, view in enumerate(batch.sequences):
            self._kernels.paged_attention(
                q[row].numpy(), keys, values, view.blocks, view.start + 1, out[row].numpy(), self._scale
            )
        return out.view(q.shape[0], -1)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(self._kernels, x, weight)


def linear(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in fp32 out; x fp32 [N, D], weight fp32 or bf16 [M, D]. Many rows of bf16 are multiplied as bf16."""
    if x.shape[0] <= GEMV_ROWS:
        out = torch.empty(x.shape[0], weight.shape[0])
        kernels.linear(x.contiguous().numpy(), as_numpy(weight), out.numpy())
        return out
    if weight.dtype is torch.float32:
        return F.linear(x, weight)
    return F.linear(x.to(weight.dtype), weight).float()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A view of the tensor for the kernels; bf16, which numpy lacks, as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
