"""A packed model as GGUF, so that llama.cpp runs the same weights.

    python -m benchmarks.packed_gguf PACKED --out FILE.gguf

For standalone packed models of bf16 records and the arcee family (what benchmarks/make_packed.py makes). The tokenizer
is that of the default model. Holds one layer at a time. Knows both formats; nothing of how either is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from cache.bundle import BundleDtype
from runtime.checkpoint import ResidentFile
from runtime.load import default_model
from runtime.packed import RESIDENT, Packed, open_packed

_TOKENS, _TYPES, _MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
_ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
_WHOLE = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}


def write_gguf(packed: Packed, out: Path) -> None:
    """SystemExit for a model that is not as the module says."""
    config = packed.config
    if not packed.standalone or packed.bundles.layout.dtype is not BundleDtype.BF16 or config.model_type != "arcee":
        raise SystemExit(f"{packed.path}: not a standalone arcee model of bf16 records")
    writer = gguf.GGUFWriter(out, "arcee")
    _write_config(writer, packed)
    for name, shape in _shapes(packed):
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            raw = gguf.GGMLQuantizationType.BF16
            size = (shape[0], 2 * shape[1])
            writer.add_tensor_info(name, size, np.dtype(np.uint8), size[0] * size[1], raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in _tensors(packed):
        writer.write_tensor_data(tensor)
    writer.close()


def _write_config(writer: gguf.GGUFWriter, packed: Packed) -> None:
    c = packed.config
    reader = gguf.GGUFReader(default_model())
    names, types = (list(reader.fields[field].contents()) for field in (_TOKENS, _TYPES))
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names[: c.vocab_size])
    writer.add_token_types(types[: c.vocab_size])
    writer.add_token_merges(reader.fields[_MERGES].contents())
    writer.add_bos_token_id(c.bos_token_id or 0)
    writer.add_eos_token_id(c.eos_token_ids[0] if c.eos_token_ids else 0)


def _names(num_layers: int) -> Iterator[tuple[str, str | None]]:
    """(name in the GGUF, name in the checkpoint or None for the FFN's)."""
    yield _WHOLE["embed_tokens"], "model.embed_tokens.weight"
    yield _WHOLE["norm"], "model.norm.weight"
    yield _WHOLE["lm_head"], "lm_head.weight"
    for i in range(num_layers):
        for theirs, ours in _ATTENTION.items():
            yield f"blk.{i}.{ours}", f"model.layers.{i}.{theirs}"
        yield f"blk.{i}.ffn_up.weight", None
        yield f"blk.{i}.ffn_down.weight", None


def _shapes(packed: Packed) -> Iterator[tuple[str, tuple[int, ...]]]:
    resident, c = ResidentFile(packed.path / RESIDENT, packed.config), packed.config
    for ours, theirs in _names(c.num_hidden_layers):
        if theirs is not None:
            yield ours, tuple(resident.shape(theirs))
        else:
            size = (c.intermediate_size, c.hidden_size)
            yield ours, size if "ffn_up" in ours else size[::-1]


def _tensors(packed: Packed) -> Iterator[np.ndarray]:
    """In the order of `_shapes`: vectors float32, matrices the bytes of bf16."""
    resident, c, bundles = ResidentFile(packed.path / RESIDENT, packed.config), packed.config, packed.bundles
    for ours, theirs in _names(c.num_hidden_layers):
        if theirs is not None:
            tensor = resident.load(theirs)
            if tensor.ndim == 1:
                yield tensor.float().numpy()
                continue
            heads = {"attn_q.weight": c.num_attention_heads, "attn_k.weight": c.num_key_value_heads}
            bits = tensor.contiguous().view(-1).view(dtype=torch.uint16).numpy().reshape(tensor.shape)
            count = heads.get(ours.partition(".")[2].partition(".")[2], 0)
            yield np.ascontiguousarray(rope_order(bits, count) if count else bits).view(np.uint8)
            continue
        layer = int(ours.split(".")[1])
        shape = (bundles.num_neurons, bundles.layout.stride)
        records = np.memmap(bundles.path, np.uint8, "r", bundles.layer_offsets[layer], shape)
        vector = bundles.layout.vector("up" if "ffn_up" in ours else "down")
        matrix = np.ascontiguousarray(records[:, vector.offset : vector.offset + 2 * c.hidden_size]).view(np.uint16)
        yield np.ascontiguousarray(matrix if "ffn_up" in ours else matrix.T).view(np.uint8)


def rope_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves, as Hugging Face has them, to neighbours, as llama.cpp wants them."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_gguf(open_packed(options.model), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
