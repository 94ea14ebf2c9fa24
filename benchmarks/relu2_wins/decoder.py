"""The decoder that the comparison trains: Llama's, and Arcee's where the FFN has no gate. Knows no data.

Parameters have the names of Hugging Face's `LlamaForCausalLM` and `ArceeForCausalLM`, the head is the embedding.
Shapes: B batch, T tokens, D hidden, H heads, d head size, F neurons of a layer.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

ACTIVATIONS = {"relu": ("relu", False), "reglu": ("relu", True), "swiglu": ("silu", True), "relu2": ("relu2", False)}
_FUNCTIONS = {"relu": F.relu, "silu": F.silu, "relu2": lambda z: F.relu(z).square()}
SHARD_BYTES = 12 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of all four models; `gated_size` is a gated FFN's, one without a gate is 1.5 times as wide."""

    vocab_size: int = 8192
    hidden_size: int = 512
    gated_size: int = 1280
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 2
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def intermediate_size(self, gated: bool) -> int:
        return self.gated_size if gated else self.gated_size * 3 // 2

    def config(self, activation: str) -> dict[str, Any]:
        """The config.json of one model."""
        hidden_act, gated = ACTIVATIONS[activation]
        name = "Llama" if gated else "Arcee"
        return {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": name.lower(),
            "hidden_act": hidden_act,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size(gated),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "dtype": "float16",
        }


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        kv = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(t, cos, sin).to(v.dtype).transpose(1, 2) for t in (q, k))  # [B, H, T, d]
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in Llama's half layout: x [B, T, H, d], cos and sin [T, 1, d/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Mlp(nn.Module):
    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.act, gated = ACTIVATIONS[activation]
        size = shape.intermediate_size(gated)
        self.gate_proj = nn.Linear(shape.hidden_size, size, bias=False) if gated else None
        self.up_proj = nn.Linear(shape.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, shape.hidden_size, bias=False)

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """h [..., F], what each neuron multiplies its down vector with."""
        up = self.up_proj(x)
        if self.gate_proj is None:
            return _FUNCTIONS[self.act](up)
        return _FUNCTIONS[self.act](self.gate_proj(x)) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.neurons(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = Mlp(shape, activation)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All weights from N(0, 0.02), those that write to the residual divided by sqrt(2 layers), drawn on the CPU."""

    def __init__(self, shape: Shape, activation: str, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.activation = shape, activation
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model.layers = nn.ModuleList(Block(shape, activation) for _ in range(shape.num_layers))
        self.model.norm = nn.RMSNorm(shape.hidden_size, shape.eps)
        inv_freq = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context).float(), inv_freq).unsqueeze(1)  # [T, 1, d/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.num_layers) if writes else 1))

    def compile_blocks(self) -> None:
        """One compiled block for all layers; `hidden(..., compiled=False)` still runs the plain one."""
        for block in self.model.layers:
            block.compile(dynamic=False)

    def hidden(self, tokens: torch.Tensor, compiled: bool = True) -> torch.Tensor:
        """Final normed hidden states [B, T, D] of tokens [B, T]."""
        length = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = (block if compiled else block.forward)(x, self.cos[:length], self.sin[:length])
        return self.model.norm(x)

    @property
    def num_ffn(self) -> int:
        return sum(p.numel() for n, p in self.named_parameters() if ".mlp." in n)

    @property
    def num_non_embedding(self) -> int:
        return sum(p.numel() for n, p in self.named_parameters() if "embed_tokens" not in n)


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of tied logits; hidden [B, T, D], targets [B, T]."""
    logits = F.linear(hidden.flatten(0, 1), weight)
    return F.cross_entropy(logits.float(), targets.flatten())


def export(model: Decoder, out: Path, tokenizer: Path | None) -> None:
    """A Hugging Face checkpoint, fp16, in shards of at most 12 MiB (a tensor is never cut)."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().to("cpu", torch.float16).contiguous() for n, p in model.state_dict().items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, out / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    _write_json(out / "model.safetensors.index.json", index)
    _write_json(out / "config.json", model.shape.config(model.activation))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, out / "tokenizer.json")
        _write_json(out / "tokenizer_config.json", {"eos_token": "<eos>", "add_bos_token": False})


def load_export(folder: Path) -> Decoder:
    """The model that `export` wrote, fp32."""
    config = json.loads((folder / "config.json").read_text())
    gated = config["model_type"] == "llama"
    wanted = (config["hidden_act"], gated)
    size = config["intermediate_size"]
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        gated_size=size if gated else size * 2 // 3,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        context=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
    )
    model = Decoder(shape, next(name for name, kind in ACTIVATIONS.items() if kind == wanted))
    for path in folder.glob("*.safetensors"):
        missing = model.load_state_dict(load_file(path), strict=False)
        if missing.unexpected_keys:
            raise ValueError(f"{path}: unknown tensors {missing.unexpected_keys}")
    return model.eval()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
