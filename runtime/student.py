"""A decoder of the Llama family with gradients: the student of `coldstream sparsify`, and the teacher it starts from.

The same function as `runtime.model`, over whole windows; attention is `runtime.layers.full_attention`. Parameters have
the checkpoint's names. Knows tensors and activations; not losses, texts, nor how a checkpoint is written.
Matrices may be bf16 under autocast; norms, the residual and what trains are fp32.
Shapes: S windows, T tokens, N = S T rows, D hidden, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from runtime.activation import activation
from runtime.checkpoint import Checkpoint, expected_tensors
from runtime.config import ModelConfig
from runtime.layers import full_attention
from runtime.model import LayerWeights, rms_norm, rope_tables
from runtime.objective import Pressed, press
from runtime.quantise import rounded, straight_through

DRELU = "drelu"  # relu(gate) * relu(up), TurboSparse, arXiv 2406.05955: no class of transformers computes it

Visit = Callable[[int, "Ffn", torch.Tensor, torch.Tensor], torch.Tensor]  # layer, ffn, x [N, D], h [N, F] -> h


class Weight(nn.Module):
    """A matrix or vector under a checkpoint's name, and a bias where there is one."""

    def __init__(self, shape: tuple[int, ...], bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:1])) if bias else None


class Ffn(nn.Module):
    """act(gate x) * (up x), or act(up x) without a gate; drelu: relu(gate x) * relu(up x).

    bits: 0, or the bits of its weights while rounding is trained; `settle` makes them what they are rounded to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide, narrow = (config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
        self.gate_proj = Weight(wide) if config.gated else None
        self.up_proj, self.down_proj = Weight(wide), Weight(narrow)
        self.bits = 0
        self._both = config.hidden_act == DRELU
        self._act = activation("relu" if self._both else config.hidden_act)

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What each neuron multiplies its down vector with, x [..., D] -> [..., F]."""
        up = F.linear(x, self._used(self.up_proj.weight, 1))
        if self.gate_proj is None:
            return self._act(up)
        gate = F.linear(x, self._used(self.gate_proj.weight, 1))
        return self._act(gate) * (F.relu(up) if self._both else up)

    def combine(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.down())

    def down(self) -> torch.Tensor:
        """[D, F], rounded where rounding is trained."""
        return self._used(self.down_proj.weight, 0)

    def down_norm(self) -> torch.Tensor:
        """||down_i|| of every neuron, fp32 [F]."""
        norm: torch.Tensor = torch.linalg.vector_norm(self.down().float(), dim=0)
        return norm

    @torch.no_grad()
    def settle(self) -> None:
        """Weights become what they are rounded to."""
        if self.bits:
            for weight, dim in ((self.gate_proj, 1), (self.up_proj, 1), (self.down_proj, 0)):
                if weight is not None:
                    weight.weight.copy_(rounded(weight.weight, self.bits, dim))
        self.bits = 0

    def _used(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        return straight_through(weight, self.bits, dim) if self.bits else weight


class Attention(nn.Module):
    """The four projections, under their names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Weight((q, config.hidden_size), config.attention_bias)
        self.k_proj = Weight((kv, config.hidden_size), config.attention_bias)
        self.v_proj = Weight((kv, config.hidden_size), config.attention_bias)
        self.o_proj = Weight((config.hidden_size, q), config.attention_bias)


class Block(nn.Module):
    """One layer. `attend`, `normed`, then the FFN's `neurons` and `combine`: whoever runs it may look between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.input_layernorm = Weight((config.hidden_size,))
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Weight((config.hidden_size,))
        self.mlp = Ffn(config)

    def weights(self) -> LayerWeights:
        """The attention's parameters as the runtime names them."""
        a = self.self_attn
        return LayerWeights(
            input_layernorm=self.input_layernorm.weight,
            q_proj=a.q_proj.weight,
            k_proj=a.k_proj.weight,
            v_proj=a.v_proj.weight,
            o_proj=a.o_proj.weight,
            post_attention_layernorm=self.post_attention_layernorm.weight,
            q_bias=a.q_proj.bias,
            k_bias=a.k_proj.bias,
            v_bias=a.v_proj.bias,
            o_bias=a.o_proj.bias,
        )

    def attend(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The residual after attention, fp32 [S, T, D]."""
        return hidden + full_attention(self._config, self.weights(), hidden, cos, sin)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The FFN's input of a residual, the same shape."""
        return rms_norm(hidden, self.post_attention_layernorm.weight, self._config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        epsilon: torch.Tensor | None = None,
        masked: bool = False,
    ) -> tuple[torch.Tensor, Pressed | None]:
        """The residual after the layer, and with epsilon what `press` says of it. What torch.compile is given."""
        hidden = self.attend(hidden, cos, sin)
        h = self.mlp.neurons(self.normed(hidden))
        if epsilon is None:
            return hidden + self.mlp.combine(h), None
        pressed = press(h.flatten(0, 1), self.mlp.down_norm(), epsilon, masked)
        return hidden + self.mlp.combine(pressed.h.view(h.shape)), pressed


class _Layers(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight((config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight((config.hidden_size,))


class Decoder(nn.Module):
    """All of it. `state_dict()` has exactly the tensors of a checkpoint of this configuration."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig, context: int) -> None:
        """Parameters are on the meta device until a state is loaded; context: the longest window."""
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = _Layers(config)
            self.lm_head = None if config.tie_word_embeddings else Weight((config.vocab_size, config.hidden_size))
        for name, table in zip(("cos", "sin"), rope_tables(config, context), strict=True):
            self.register_buffer(name, table, persistent=False)

    @property
    def blocks(self) -> list[Block]:
        return [b for b in self.model.layers if isinstance(b, Block)]

    @property
    def head(self) -> torch.Tensor:
        """[V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def precision(self) -> torch.autocast:
        """What its layers run under: bf16 products where its matrices are bf16."""
        return torch.autocast(self.head.device.type, torch.bfloat16, enabled=self.head.dtype == torch.bfloat16)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [S, T] -> fp32 [S, T, D]."""
        return F.embedding(tokens, self.model.embed_tokens.weight).float()

    def tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[:length], self.sin[:length]

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head multiplies, of the last layer's residual."""
        return rms_norm(hidden, self.model.norm.weight, self.config.rms_norm_eps)

    def hidden(self, tokens: torch.Tensor, visit: Visit | None = None) -> torch.Tensor:
        """What the head multiplies, fp32 [S, T, D]; `visit` sees every layer's neurons and says what they become."""
        hidden, tables = self.embed(tokens), self.tables(tokens.shape[1])
        with self.precision():
            for i, block in enumerate(self.blocks):
                hidden = _visited(i, block, hidden, tables, visit)
        return self.final(hidden)

    def logits(self, tokens: torch.Tensor, visit: Visit | None = None) -> torch.Tensor:
        """fp32 [S, T, V]; all of them at once, so for a few windows."""
        return F.linear(self.hidden(tokens, visit).to(self.head.dtype), self.head).float()


def _visited(
    index: int, block: Block, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], visit: Visit | None
) -> torch.Tensor:
    if visit is None:
        out: torch.Tensor = block(hidden, *tables)[0]
        return out
    hidden = block.attend(hidden, *tables)
    x = block.normed(hidden)
    h = block.mlp.neurons(x)
    return hidden + block.mlp.combine(visit(index, block.mlp, x.flatten(0, 1), h.flatten(0, 1)).view(h.shape))


def load_teacher(checkpoint: Checkpoint, context: int, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A checkpoint's decoder, frozen: matrices in `dtype`, norms and biases fp32. One tensor at a time."""
    decoder = Decoder(checkpoint.config, context)
    state = {}
    for name, shape in expected_tensors(checkpoint.config):
        state[name] = checkpoint.load(name).to(device, dtype if len(shape) > 1 else torch.float32)
    return _filled(decoder, state, device).requires_grad_(False)


def student_of(teacher: Decoder, act: str, gated: bool, attention: bool = False) -> Decoder:
    """The teacher with another activation: embeddings and head shared, FFN and norms its own in fp32. Attention is
    shared too, unless it is to train.

    gated False: every gated neuron becomes two, of opposite sign: relu(g + b u)^2 - relu(g - b u)^2 = 4 b g u where
    |b u| < g, b the ratio of the norms of the gate's and the up row; so twice the width, Arcee's form. The scale of
    down is right for that case alone: `match_scale` follows.
    """
    config = student_config(teacher.config, act, gated)
    state = dict(teacher.state_dict())
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}.mlp."
        ffn = {n: state.pop(f"{prefix}{n}_proj.weight").float() for n in ("gate", "up", "down")}
        for name, weight in (ffn if gated else _pairs(**ffn)).items():
            state[f"{prefix}{name}_proj.weight"] = weight.clone()
    own = [name for name in state if is_trained(name, attention)]
    for name in own:
        state[name] = state[name].float().clone()
    decoder = _filled(Decoder(config, teacher.cos.shape[0]), state, teacher.cos.device).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(is_trained(name, attention))
    return decoder


def student_config(config: ModelConfig, act: str, gated: bool) -> ModelConfig:
    """The configuration that the student of a gated model has."""
    if gated:
        return replace(config, hidden_act=act)
    size = 2 * config.intermediate_size
    return replace(config, model_type="arcee", hidden_act=act, gated=False, intermediate_size=size)


def is_trained(name: str, attention: bool = False) -> bool:
    """Of a checkpoint's tensor: FFN and norms train, and attention where asked; embeddings stay."""
    own = (".mlp.", ".self_attn.") if attention else (".mlp.",)
    return any(part in name for part in own) or name.endswith(("layernorm.weight", "model.norm.weight"))


def _pairs(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """up [2 F, D] and down [D, 2 F] of gate, up [F, D] and down [D, F]; a pair's rows are neighbours."""
    ratio = gate.norm(dim=1) / up.norm(dim=1).clamp_min(1e-12)
    scaled, out = up * ratio[:, None], down / (4 * ratio.clamp_min(1e-12))
    return {
        "up": torch.stack([gate + scaled, gate - scaled], dim=1).flatten(0, 1),
        "down": torch.stack([out, -out], dim=2).flatten(1, 2),
    }


def _filled(decoder: Decoder, state: dict[str, torch.Tensor], device: torch.device) -> Decoder:
    """The decoder with these tensors themselves, not copies; its tables on the device."""
    decoder.load_state_dict(state, assign=True)
    decoder.cos, decoder.sin = decoder.cos.to(device), decoder.sin.to(device)
    return decoder


@torch.no_grad()
def match_scale(student: Decoder, teacher: Decoder, tokens: torch.Tensor) -> list[float]:
    """Scales each layer's down so that the student's FFN output is nearest the teacher's in least squares.

    tokens int64 [S, T], run through the teacher. Returns what each layer was multiplied with.
    """
    factors: list[float] = []

    def visit(layer: int, ffn: Ffn, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        own = student.blocks[layer].mlp
        found, wanted = own.combine(own.neurons(x)).float(), ffn.combine(h).float()
        factor = float((found * wanted).sum() / found.square().sum().clamp_min(1e-30))
        factors.append(factor if factor > 0 else 1.0)  # opposed to the teacher: only training can tell
        own.down_proj.weight.mul_(factors[-1])
        return h

    teacher.hidden(tokens, visit)
    return factors
