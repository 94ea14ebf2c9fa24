"""The decoder against transformers: tiny random checkpoints of every family and RoPE variant, logits in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

from runtime.batch import Batch, Cancelled, ModelCounters, SequenceView
from runtime.checkpoint import open_checkpoint
from runtime.ffn import DenseFFN
from runtime.kernels import select
from runtime.kv_cache import BlockManager, KVCache
from runtime.layers import load_ffn, load_layer
from runtime.model import Model, ModelWeights

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "relu": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "relu"}),
    "relu2-tied": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "relu2", "tie_word_embeddings": True}),
    "bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "one-kv-head-wide": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "head_dim": 10}),
    "linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**LLAMA3, "rope_theta": 5000.0}}),
    "yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**YARN, "rope_theta": 10000.0}}),
    "arcee": (ArceeConfig, ArceeForCausalLM, {"hidden_act": "relu2"}),
    "arcee-yarn": (
        ArceeConfig,
        ArceeForCausalLM,
        {"hidden_act": "relu2", "rope_parameters": {**YARN, "rope_theta": 10000.0}},
    ),
}


def reference(case: str) -> Any:
    config_class, model_class, extra = CASES[case]
    torch.manual_seed(11)
    model = model_class(config_class(**{**TINY, **extra})).float().eval()
    with torch.no_grad():  # away from the symmetric start, so that a mix-up of tensors shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def ours(path: Path, kernel: str) -> Model:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    ffns = []
    for i in range(config.num_hidden_layers):
        w = load_ffn(checkpoint, i)
        ffns.append(DenseFFN(config.hidden_act, w.gate, w.up, w.down))
    embed = checkpoint.load("model.embed_tokens.weight")
    weights = ModelWeights(
        embed,
        tuple(load_layer(checkpoint, i, torch.float32) for i in range(config.num_hidden_layers)),
        checkpoint.load("model.norm.weight"),
        embed if config.tie_word_embeddings else checkpoint.load("lm_head.weight"),
    )
    return Model(
        config, weights, lambda layer, xs, kinds, _: [ffns[layer](x) for x in xs], select(kernel), 128, ModelCounters
    )


def batch(kind: str, ids: list[int], start: int, blocks: np.ndarray, logits: str = "all") -> Batch:
    return Batch(
        kind=kind,  # type: ignore[arg-type]
        token_ids=torch.tensor(ids),
        positions=torch.arange(start, start + len(ids)),
        sequences=(SequenceView(blocks, start, len(ids)),),
        logits=logits,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kernel: str, tmp_path: Path) -> None:
    """A prompt in two chunks, then token by token: the same logits as one pass of transformers."""
    expected_model = reference(case)
    expected_model.save_pretrained(tmp_path, max_shard_size="40kB")
    model = ours(tmp_path, kernel)
    ids = torch.randint(0, TINY["vocab_size"], (60,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.no_grad():
        expected = expected_model(torch.tensor([ids])).logits[0]
    kv, manager = KVCache(model.config, 16, 8, torch.float32), BlockManager(16, 8)
    manager.allocate(5 * 8)
    blocks = manager.allocate(60)
    parts = [model.forward(batch("prefill", ids[:30], 0, blocks), kv, lambda: None)]
    parts.append(model.forward(batch("score", ids[30:41], 30, blocks), kv, lambda: None))
    parts += [model.forward(batch("decode", [ids[p]], p, blocks), kv, lambda: None) for p in range(41, 60)]
    found = torch.cat([p for p in parts if p is not None])
    assert found.shape == expected.shape
    error = (found - expected).norm() / expected.norm()
    assert float(error) < 1e-4, float(error)


def test_rows_of_a_decode_batch_see_their_own_sequence_only(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path)
    model = ours(tmp_path, "auto")
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7], [50] * 11]
    kv, manager = KVCache(model.config, 16, 8, torch.float32), BlockManager(16, 8)
    tables = [manager.allocate(len(p) + 1) for p in prompts]
    for prompt, blocks in zip(prompts, tables, strict=True):
        assert model.forward(batch("prefill", prompt, 0, blocks, "none"), kv, lambda: None) is None
    together = model.forward(
        Batch(
            kind="decode",
            token_ids=torch.tensor([6, 6, 6]),
            positions=torch.tensor([len(p) for p in prompts]),
            sequences=tuple(SequenceView(b, len(p), 1) for p, b in zip(prompts, tables, strict=True)),
            logits="all",
        ),
        kv,
        lambda: None,
    )
    assert together is not None
    for row, (prompt, blocks) in enumerate(zip(prompts, tables, strict=True)):
        alone = model.forward(batch("decode", [6], len(prompt), blocks), kv, lambda: None)
        assert alone is not None
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_check_is_called_between_layers_and_stops_the_pass(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path)
    model = ours(tmp_path, "auto")
    kv, blocks = KVCache(model.config, 4, 8, torch.float32), BlockManager(4, 8).allocate(8)
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        model.forward(batch("prefill", [1, 2, 3], 0, blocks), kv, check)
    assert len(calls) == 2 < model.config.num_hidden_layers
