"""The teacher samples itself: many texts at once, token by token, over fixed arrays of keys and values.

On cuda a step is a CUDA graph, one for each power of two that the context reaches; on cpu the same code runs plainly.
Prompts are forced tokens of the same loop, so that texts may begin with any number of them.
Knows a decoder and token ids; not what the texts are for. Shapes: S texts, T tokens, D hidden, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from runtime.model import apply_rope, project_qkv, rms_norm
from runtime.student import Block, Decoder

_SHORTEST = 64  # positions that a step looks at, at least
FREE = -1  # in a matrix of forced tokens: to be sampled


class SelfSampler:
    """Owns keys and values for `num` texts of `length` tokens: 2 L S T kv_heads d numbers in the head's dtype."""

    def __init__(self, decoder: Decoder, num: int, length: int) -> None:
        config, device = decoder.config, decoder.head.device
        shape = (config.num_hidden_layers, num, config.num_key_value_heads, length, config.head_dim)
        self._decoder = decoder
        self._keys = torch.zeros(shape, dtype=decoder.head.dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._tokens = torch.zeros(num, length + 1, dtype=torch.int64, device=device)  # one more: the last step's
        self._forced = torch.zeros_like(self._tokens)
        self._temperature = torch.ones(num, 1, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._generator = torch.Generator(device)
        self._length = length
        self._steps: dict[int, Callable[[], None]] = {}  # by the number of positions looked at
        self._memory: Any = None  # of the graphs: they run one after the other and share it

    @torch.no_grad()
    def sample(self, forced: torch.Tensor, temperature: torch.Tensor, seed: int) -> torch.Tensor:
        """Texts int64 [S, T]; forced int64 [S, T]: a token id, or FREE where the teacher chooses; the first column is
        never FREE. temperature fp32 [S]. The same arguments give the same texts on cpu."""
        self._generator.manual_seed(seed)
        self._forced[:, :-1].copy_(forced)
        self._forced[:, -1] = FREE
        self._tokens[:, :1].copy_(self._forced[:, :1])
        self._temperature[:, 0].copy_(temperature)
        for position in range(self._length - 1):
            self._position.fill_(position)
            self._step_for(position + 1)()
        return self._tokens[:, :-1].clone()

    def _step_for(self, reach: int) -> Callable[[], None]:
        """The step that looks at the first `reach` positions or a few more."""
        seen = min(self._length, max(_SHORTEST, 1 << (reach - 1).bit_length()))
        if seen not in self._steps:
            self._steps[seen] = self._captured(seen) if self._keys.is_cuda else lambda: self._step(seen)
        return self._steps[seen]

    def _captured(self, seen: int) -> Callable[[], None]:
        """The step as a CUDA graph. What warming up draws and writes is written again by the first replay."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(seen)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._memory):
            self._step(seen)
        self._memory = self._memory or graph.pool()
        return graph.replay

    def _step(self, seen: int) -> None:
        """One token for every text: reads tokens[:, position], writes tokens[:, position + 1]."""
        decoder, position = self._decoder, self._position
        hidden = decoder.embed(self._tokens.index_select(1, position))[:, 0]  # [S, D]
        cos, sin = decoder.cos.index_select(0, position), decoder.sin.index_select(0, position)
        mask = torch.arange(seen, device=position.device) <= position  # [seen]
        with decoder.precision():
            for i, block in enumerate(decoder.blocks):
                hidden = hidden + self._attended(i, block, hidden, cos, sin, mask)
                hidden = hidden + block.mlp.combine(block.mlp.neurons(block.normed(hidden)))
            logits = F.linear(decoder.final(hidden), decoder.head).float()
        noise = torch.empty_like(logits).exponential_(generator=self._generator)
        chosen = ((logits / self._temperature).softmax(dim=1) / noise).argmax(dim=1, keepdim=True)  # a sample of it
        forced = self._forced.index_select(1, position + 1)
        self._tokens.index_copy_(1, position + 1, torch.where(forced == FREE, chosen, forced))

    def _attended(
        self,
        layer: int,
        block: Block,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention's output [S, D] of hidden [S, D] at the position; its keys and values go into the arrays."""
        config, w = self._decoder.config, block.weights()
        q, k, v = project_qkv(w, rms_norm(hidden, w.input_layernorm, config.rms_norm_eps), config, F.linear)
        q, k = apply_rope(q[:, None], cos, sin)[:, 0], apply_rope(k[:, None], cos, sin)[:, 0]
        keys, values = self._keys[layer], self._values[layer]  # [S, kv heads, T, d]
        keys.index_copy_(2, self._position, k[:, :, None].to(keys.dtype))
        values.index_copy_(2, self._position, v[:, :, None].to(keys.dtype))
        grouped = q.view(q.shape[0], config.num_key_value_heads, -1, config.head_dim).to(keys.dtype)
        reach = mask.numel()
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :reach], values[:, :, :reach], attn_mask=mask[None])
        o = F.linear(out.flatten(1), w.o_proj)
        return o if w.o_bias is None else o + w.o_bias
