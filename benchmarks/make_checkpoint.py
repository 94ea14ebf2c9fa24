"""A checkpoint of a large model's shape with random weights, for benchmarks of time and memory.

    python -m benchmarks.make_checkpoint --shape afm-4.5b --out DIR [--layers N] [--vocab-size N] [--seed N]

Hugging Face's format (config.json, sharded safetensors, tokenizer), bf16; transformers and `coldstream` load it. One
tensor is made at a time, in pieces of 64 MiB. Weights are of either sign with a standard deviation near 1 / sqrt(D), so
that activations stay finite; they are no language model: random weights have no skew, no reuse and no co-activation
(benchmarks/traces.py lends them those of a real model). The tokenizer is the default model's; a larger --vocab-size
pads the embeddings. AFM-4.5B: arcee, 36 layers, 8.4 GB with the 49,152 tokens of that tokenizer, embeddings not tied.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checkpoint import open_checkpoint
from runtime.load import default_model
from runtime.tokenizer import INFO_FILE, Tokenizer

ITEM_BYTES = 2
SHARD_BYTES = 2 << 30
_PIECE = 32 << 20  # elements made at a time
_ONE = 0x3F80  # 1.0 in bf16
_RMS_OF_PIECE = 2.415  # of the values that `random_bf16` makes, over the smallest of them


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model; names as in Hugging Face's configs."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    @property
    def gated(self) -> bool:
        return self.model_type == "llama"


SHAPES = {
    "afm-4.5b": Shape("arcee", 2560, 18432, 36, 20, 4, 128, "relu2"),
    "llama-7b": Shape("llama", 4096, 11008, 32, 32, 32, 128, "relu"),  # as in ReluLLaMA and ProSparse
    "llama-7b-silu": Shape("llama", 4096, 11008, 32, 32, 32, 128, "silu"),
    "tiny": Shape("arcee", 64, 256, 2, 4, 2, 16, "relu2"),
}


def config_json(shape: Shape, vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    architecture = {"arcee": "ArceeForCausalLM", "llama": "LlamaForCausalLM"}[shape.model_type]
    fields = {name: getattr(shape, name) for name in Shape.__dataclass_fields__}
    return fields | {
        "architectures": [architecture],
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    }


def tensors(shape: Shape, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, in the order of the file."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (vocab_size, hidden)
    for i in range(shape.num_hidden_layers):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, size in (("q", (queries, hidden)), ("k", (keys, hidden)), ("v", (keys, hidden))):
            yield f"{prefix}self_attn.{name}_proj.weight", size
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        for name in ("gate", "up") if shape.gated else ("up",):
            yield f"{prefix}mlp.{name}_proj.weight", (ffn, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab_size, hidden)


def num_bytes(size: tuple[int, ...]) -> int:
    return math.prod(size) * ITEM_BYTES


def shards(named: list[tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in order, as many to a file as fit; a larger one has a file to itself."""
    out: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, size in named:
        if out[-1] and used + num_bytes(size) > shard_bytes:
            out.append([])
            used = 0
        out[-1].append((name, size))
        used += num_bytes(size)
    return out


def random_bf16(rng: np.random.Generator, count: int, deviation: float) -> np.ndarray:
    """bf16 as uint16 [count]: either sign, magnitudes in [m, 4m), root mean square within a factor of two of
    `deviation`. Of 16 random bits sign, lowest bit of the exponent and mantissa are kept: no arithmetic on floats."""
    exponent = round(math.log2(deviation / _RMS_OF_PIECE) / 2 - 0.5) * 2 + 1  # odd: 127 + exponent ends in a zero bit
    words = rng.integers(0, 1 << 64, -(-count // 4), np.uint64)
    words &= np.uint64(0x80FF80FF80FF80FF)
    words |= np.uint64((_ONE + exponent * 128) * 0x0001000100010001)
    return words.view(np.uint16)[:count]


def write_shard(path: Path, named: list[tuple[str, tuple[int, ...]]], deviation: float, seed: int) -> None:
    header, at = {}, 0
    for name, size in named:
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, at + num_bytes(size)]}
        at += num_bytes(size)
    raw = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, size in named:
            left = math.prod(size)
            while left:
                part = min(left, _PIECE)
                one = np.full(part, _ONE, np.uint16)
                file.write((one if len(size) == 1 else random_bf16(rng, part, deviation)).data)
                left -= part


def make_checkpoint(
    shape: Shape, out: Path, vocab_size: int | None = None, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes the checkpoint into `out`, a new or empty directory; returns the bytes of its tensors. SystemExit, before
    anything is written, when `out` holds files, the disk is too full, or the vocabulary smaller than the tokenizer."""
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(default_model()))
    vocab = tokenizer.vocab_size if vocab_size is None else vocab_size
    if vocab < tokenizer.vocab_size:
        raise SystemExit(f"--vocab-size {vocab}: the tokenizer has {tokenizer.vocab_size} tokens")
    named = list(tensors(shape, vocab))
    total = sum(num_bytes(size) for _, size in named)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"--out {out}: is not empty")
    out.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out).free < total + (64 << 20):
        raise SystemExit(
            f"--out {out}: {total / 1e9:.1f} GB are needed, {shutil.disk_usage(out).free / 1e9:.1f} are free"
        )
    parts = shards(named, shard_bytes)
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(out / file, part, shape.hidden_size**-0.5, seed * 1000 + i)
        weight_map |= {name: file for name, _ in part}
        print(f"{file}: {sum(num_bytes(size) for _, size in part) / 1e9:.2f} GB", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    eos_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    config = config_json(shape, vocab, tokenizer.bos_id, eos_id)
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    save_tokenizer(tokenizer, out)
    return total


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """As Hugging Face keeps it: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    tokenizer.save(out)
    (out / INFO_FILE).unlink()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos_token}
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": tokenizer.eos_token}, indent=1))
    if tokenizer.chat_template is not None:
        (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def add_shape_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--shape", choices=SHAPES, required=required)
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    parser.add_argument("--seed", type=int, default=0)


def chosen_shape(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Shape:
    """What `add_shape_options` was given. Exits with a sentence when there is no such number of layers."""
    shape = SHAPES[options.shape]
    if options.layers is None:
        return shape
    if options.layers < 1:
        parser.error(f"--layers {options.layers}: at least 1")
    return replace(shape, num_hidden_layers=options.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--vocab-size", type=int, help="rows of the embeddings; default: the tokenizer's tokens")
    options = parser.parse_args()
    shape = chosen_shape(parser, options)
    total = make_checkpoint(shape, options.out, options.vocab_size, options.seed)
    facts = {"shape": options.shape, "layers": shape.num_hidden_layers, "tensor_bytes": total}
    print(json.dumps(facts | {"parameters": total // ITEM_BYTES}))


if __name__ == "__main__":
    main()
