"""Checkpoints of random weights: transformers and our loader read the same model out of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.make_checkpoint import SHAPES, Shape, make_checkpoint, num_bytes, random_bf16, tensors
from runtime.checkpoint import open_checkpoint
from runtime.load import default_model
from runtime.tokenizer import Tokenizer

GATED = replace(SHAPES["tiny"], model_type="llama", hidden_act="relu", num_hidden_layers=1)


@pytest.mark.parametrize("shape", [SHAPES["tiny"], GATED])
def test_transformers_and_we_read_the_same(tmp_path: Path, shape: Shape) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    total = make_checkpoint(shape, tmp_path / "model", vocab_size=49216, seed=1, shard_bytes=3 << 20)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert sum(checkpoint.num_bytes(name) for name in checkpoint.names()) == total
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    theirs = model.state_dict()
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor.float(), theirs[name].float())
    assert checkpoint.config.hidden_act == shape.hidden_act and checkpoint.config.gated == shape.gated
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(40)[None]).logits).all()
    text = "Two words, and 3 more."
    ids = Tokenizer.from_checkpoint(checkpoint).encode(text, add_special=False)
    assert ids == Tokenizer.from_checkpoint(open_checkpoint(default_model())).encode(text, add_special=False)
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "model")(text, add_special_tokens=False)["input_ids"]


def test_refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--vocab-size 10: the tokenizer has 49152"):
        make_checkpoint(SHAPES["tiny"], tmp_path / "small", vocab_size=10)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        make_checkpoint(SHAPES["tiny"], tmp_path)
    with pytest.raises(SystemExit, match="GB are needed"):
        make_checkpoint(replace(SHAPES["afm-4.5b"], num_hidden_layers=10**6), tmp_path / "large")


def test_afm_has_the_size_of_the_issue() -> None:
    total = sum(num_bytes(size) for _, size in tensors(SHAPES["afm-4.5b"], 49152))
    assert total == pytest.approx(8.4e9, rel=0.01)


@pytest.mark.parametrize("deviation", [1.0, 64**-0.5, 2560**-0.5, 4096**-0.5])
def test_random_bf16_has_the_asked_size(deviation: float) -> None:
    bits = random_bf16(np.random.default_rng(0), 100_001, deviation)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert values.shape == (100_001,) and abs(values.mean()) < 0.02 * deviation
    assert 0.5 < values.std() / deviation < 2
    assert np.unique(bits).size == 512
