"""Hidden states of several variants of a model, carried through it together, one layer in memory at a time.

A track is a set of windows of text; at each layer it goes through the layer's attention and FFN, all neurons or those
that a rule keeps. Knows layers and rows; not thresholds, predictors or what the rows are for.
Shapes: S windows, T tokens, N rows, D hidden, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig
from runtime.ffn import DenseFFN
from runtime.layers import FFNWeights, full_attention, load_ffn, load_layer
from runtime.model import LayerWeights, rms_norm, rope_tables


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer in fp32, and the positions of a window."""

    index: int
    config: ModelConfig
    attention: LayerWeights
    ffn: FFNWeights
    down_norm: torch.Tensor  # [F]
    cos: torch.Tensor
    sin: torch.Tensor

    def at_length(self, length: int) -> Layer:
        """The same for windows of `length` tokens."""
        return replace(self, cos=self.cos[:length], sin=self.sin[:length])

    def attend(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual after attention, [S, T, D]."""
        return hidden + full_attention(self.config, self.attention, hidden, self.cos, self.sin)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the FFN would see of a residual [S, T, D], as rows [N, D]."""
        return rms_norm(hidden, self.attention.post_attention_layernorm, self.config.rms_norm_eps).flatten(0, 1)

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What each neuron multiplies its down vector with, [N, F]."""
        return DenseFFN(self.config.hidden_act, self.ffn.gate, self.ffn.up, self.ffn.down).neurons(x)


def layers(checkpoint: Checkpoint, length: int) -> Iterator[Layer]:
    """Every layer in turn, for windows of `length` tokens. Nothing of a layer is kept here: whoever drops it before
    taking the next has one in memory."""
    cos, sin = rope_tables(checkpoint.config, length)
    for i in range(checkpoint.config.num_hidden_layers):
        yield _load(checkpoint, i, cos, sin)


def _load(checkpoint: Checkpoint, index: int, cos: torch.Tensor, sin: torch.Tensor) -> Layer:
    ffn = load_ffn(checkpoint, index)
    attention = load_layer(checkpoint, index, torch.float32)
    return Layer(index, checkpoint.config, attention, ffn, ffn.down.norm(dim=1), cos, sin)


def embed(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states before the first layer, fp32 [S, T, D]."""
    return checkpoint.load("model.embed_tokens.weight")[tokens].float()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a layer made of rows: the FFN's input by source (see `predictivity.Family`), and the neurons' factors."""

    inputs: dict[str, torch.Tensor]  # fp32 [N, D]
    h: torch.Tensor  # fp32 [N, F]


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [N, D], magnitudes [N, F] -> kept, bool [N, F]
Watch = Callable[[torch.Tensor, torch.Tensor], None]  # x [N, D], the neurons' factors [N, F]


class Track:
    """Windows [S, T, D] on their way through the layers. Costs two copies of them."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden.clone()
        self._ahead = self.hidden  # the residual at the FFN one layer before
        self.kept_shares: list[float] = []  # of each layer's neurons

    def step(self, layer: Layer, rule: Rule | None = None, watch: Watch | None = None) -> None:
        """Through one layer, a window at a time; `watch` is shown each window before the rule is applied."""
        kept = 0
        for i in range(self.hidden.shape[0]):
            after = layer.attend(self.hidden[i : i + 1])
            x = layer.norm(after)
            h = layer.neurons(x)
            if watch is not None:
                watch(x, h)
            if rule is not None:
                mask = rule(x, h.abs() * layer.down_norm)
                kept += int(mask.count_nonzero())
                h = h.masked_fill_(~mask, 0.0)
            self.hidden[i : i + 1] = after + (h @ layer.ffn.down).view_as(after)
        total = self.hidden.shape[0] * self.hidden.shape[1] * layer.down_norm.numel()
        self.kept_shares.append(kept / total if rule is not None else 1.0)

    def dense_step(self, layer: Layer) -> Seen:
        """Through one layer densely, all windows at once, telling what it saw."""
        after = layer.attend(self.hidden)
        inputs = {"input": layer.norm(after), "residual": layer.norm(self.hidden), "ahead": layer.norm(self._ahead)}
        h = layer.neurons(inputs["input"])
        self.hidden, self._ahead = after + (h @ layer.ffn.down).view_as(after), after
        self.kept_shares.append(1.0)
        return Seen(inputs, h)
