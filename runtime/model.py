"""The decoder of the Llama family, once and readable. Architectures are data (`ModelConfig`), not branches.

Knows tensors, layers and positions; the FFN is a callable that it is given, and it never learns where weights live.
Activations are fp32 throughout; matrices are in the dtype they were loaded in.
Several batches go through a layer one after the other, its FFN read once for all, each computed by the calls that it
would get alone: its numbers do not depend on who came along, bit for bit.
Shapes: N rows of a batch, T tokens, D hidden, H heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from runtime.batch import Batch, BatchKind, ModelCounters
from runtime.config import ModelConfig
from runtime.kernels import Kernels
from runtime.kv_cache import KVCache
from runtime.row_file import RowFile

GEMV_ROWS = 16  # up to here our bandwidth-bound kernels, above it torch's GEMM


NextInput = Callable[[torch.Tensor], torch.Tensor]
"""From what an FFN has added up so far, fp32 [N, D]: a guess at the next layer's input to its FFN, [N, D]."""


class FFN(Protocol):
    """FFN(x) of one layer for each of `xs`, fp32 [N, D] of any N each; `kinds` are those of their batches. next_input:
    of a batch that comes alone, for an FFN that looks ahead."""

    def __call__(
        self,
        layer: int,
        xs: Sequence[torch.Tensor],
        kinds: Sequence[BatchKind],
        next_input: NextInput | None = None,
    ) -> list[torch.Tensor]: ...


MakeRoom = Callable[[Sequence[Batch]], None]
"""Told the batches of a step before anything of it is allocated."""


class LookAhead(Protocol):
    """A hint before a layer's attention: what the FFN's inputs would be without it, fp32 [N, D] each."""

    def __call__(self, layer: int, xs: Sequence[torch.Tensor], kinds: Sequence[BatchKind]) -> None: ...


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
    embed_tokens: torch.Tensor | RowFile  # [V, D]
    layers: Sequence[LayerWeights]  # taken in order, once a step
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
        look_ahead: LookAhead | None = None,
        guesses_next: bool = False,
        make_room: MakeRoom | None = None,
    ) -> None:
        """look_ahead: called before each layer's attention. guesses_next: each layer's FFN gets a `next_input`; for
        layers that are in memory. make_room: called before each step."""
        self.config = config
        self.counters = counters
        self._weights = weights
        self._ffn = ffn
        self._look_ahead, self._guesses_next, self._make_room = look_ahead, guesses_next, make_room
        self._kernels = kernels
        self._cos, self._sin = rope_tables(config, max_model_len)
        self._scale = config.head_dim**-0.5

    def forward(self, batch: Batch, kv: KVCache, check: Callable[[], None]) -> torch.Tensor | None:
        """As `forward_together`, of one batch."""
        return self.forward_together((batch,), kv, check)[0]

    @torch.inference_mode()
    def forward_together(
        self, batches: Sequence[Batch], kv: KVCache, check: Callable[[], None]
    ) -> list[torch.Tensor | None]:
        """For each batch: fp32 logits of the rows that `batch.logits` asks for, [B or N or 1, V]; None for "none".

        Writes the batches' keys and values into `kv`; a batch sees what those before it have written, so that chunks of
        one prompt may come together, in order. `check` is called before every layer and may raise.
        """
        if self._make_room is not None:
            self._make_room(batches)
        rows = [_Rows(b, self._weights, self._cos, self._sin, kv.slots(b)) for b in batches]
        kinds = [b.kind for b in batches]
        for i, w in enumerate(self._weights.layers):
            check()
            eps = self.config.rms_norm_eps
            if self._look_ahead is not None:  # attention changes the residual by little
                self._look_ahead(i, [rms_norm(part.x, w.post_attention_layernorm, eps) for part in rows], kinds)
            for part in rows:
                self._attention(i, w, part, kv)
            next_input = self._next_input(i, rows[0].x) if self._guesses_next and len(rows) == 1 else None
            xs = [rms_norm(part.x, w.post_attention_layernorm, eps) for part in rows]
            outs = self._ffn(i, xs, kinds, next_input)
            for part, out in zip(rows, outs, strict=True):
                part.x = part.x + out
        return self._logits(rows)

    def _next_input(self, layer: int, x: torch.Tensor) -> NextInput | None:
        """The layer after the last one is the first one, of a token that is not known."""
        if layer + 1 == len(self._weights.layers):
            return None
        weight = self._weights.layers[layer + 1].post_attention_layernorm
        return lambda out: rms_norm(x + out, weight, self.config.rms_norm_eps)  # attention changes it by little

    def _attention(self, layer: int, w: LayerWeights, part: _Rows, kv: KVCache) -> None:
        """part.x += attention of one layer; writes keys and values."""
        by_row = part.batch.kind == "decode"

        def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear(self._kernels, x, weight, by_row)

        h = rms_norm(part.x, w.input_layernorm, self.config.rms_norm_eps)
        q, k, v = project_qkv(w, h, self.config, multiply)
        kv.write(layer, part.slots, apply_rope(k, part.cos, part.sin), v)
        attended = self._attend(layer, apply_rope(q, part.cos, part.sin), part.batch, kv)  # [N, H d]
        o = multiply(attended, w.o_proj)
        part.x = part.x + (o if w.o_bias is None else o + w.o_bias)

    def _logits(self, rows: Sequence[_Rows]) -> list[torch.Tensor | None]:
        """Last rows of all batches by the row, in one pass over the head; the rows of "all" as a batch of their own."""
        lasts = [part.x if part.batch.kind == "decode" else part.x[-1:] for part in rows if part.batch.logits == "last"]
        last = iter(torch.split(self._head(torch.cat(lasts), True), [x.shape[0] for x in lasts]) if lasts else ())
        out: list[torch.Tensor | None] = []
        for part in rows:
            wanted = part.batch.logits
            out.append(None if wanted == "none" else next(last) if wanted == "last" else self._head(part.x, False))
        return out

    def _head(self, x: torch.Tensor, by_row: bool) -> torch.Tensor:
        x = rms_norm(x, self._weights.norm, self.config.rms_norm_eps)
        return linear(self._kernels, x, self._weights.lm_head, by_row)

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


class _Rows:
    """A batch on its way through the layers: its residual, and what every layer needs of its positions."""

    def __init__(
        self, batch: Batch, weights: ModelWeights, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self.batch, self.slots = batch, slots  # int64 [N]
        self.x = weights.embed_tokens[batch.token_ids].float()  # [N, D]
        self.cos, self.sin = cos[batch.positions], sin[batch.positions]  # [N, d/2]


def linear(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor, by_row: bool = False) -> torch.Tensor:
    """x @ weight.T in fp32 out; x fp32 [N, D], weight fp32 or bf16 [M, D]. Many rows of bf16 are multiplied as bf16.

    by_row: however many rows there are, each is computed as it would be alone.
    """
    if by_row or x.shape[0] <= GEMV_ROWS:
        out = torch.empty(x.shape[0], weight.shape[0])
        kernels.linear(x.contiguous().numpy(), as_numpy(weight), out.numpy())
        return out
    if weight.dtype is torch.float32:
        return F.linear(x, weight)
    return F.linear(x.to(weight.dtype), weight).float()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A view of the tensor for the kernels; bf16, which numpy lacks, as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
