"""The small reproduction in benchmarks/relu2_wins: training resumes exactly, what it exports can be opened."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.checkpoint import check_tensors, open_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "relu2_wins"
ACTIVATIONS = {"relu": "relu", "reglu": "relu", "swiglu": "silu", "relu2": "relu2"}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "gated_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "context": 16,
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The training script as a module: it is run, not installed, and finds its neighbour in its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("train", "decoder", "compact"):
        sys.modules.pop(name, None)
    import train

    yield train
    for name in ("train", "decoder", "compact"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = (np.random.default_rng(0).integers(0, 3, 3000).cumsum() % SHAPE["vocab_size"]).astype(np.uint16)
    tokens.tofile(folder / "train.u16")
    tokens[:200].tofile(folder / "heldout.u16")
    return folder


def _train(scripts: Any, data: Path, work: Path, *more: str) -> None:
    settings = ["--steps", "2", "--device", "cpu", "--no-compile", "--no-bf16", "--shape", json.dumps(SHAPE)]
    recipe = json.dumps({"batch": 4, "warmup": 2})
    scripts.main(["--data", str(data), "--work", str(work), *settings, "--recipe", recipe, *more])


def test_training_resumes_to_the_same_weights_and_exports_load(scripts: Any, data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(scripts, data, whole)
    _train(scripts, data, parts, "--stop-at", "1")
    assert not (parts / "export").exists()
    _train(scripts, data, parts)
    for name, hidden_act in ACTIVATIONS.items():
        one, other = (torch.load(work / f"{name}.pt") for work in (whole, parts))
        assert one["step"] == other["step"] == 2
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
        exported = open_checkpoint(parts / "export" / name)
        check_tensors(exported)
        assert exported.config.hidden_act == hidden_act
        key = "model.layers.1.mlp.down_proj.weight"
        torch.testing.assert_close(exported.load(key).float(), one["model"][key], rtol=1e-3, atol=1e-6)


def test_all_four_have_the_same_parameters_and_learn(scripts: Any, data: Path, tmp_path: Path) -> None:
    _train(scripts, data, tmp_path / "work")
    found = [json.loads((tmp_path / "work" / f"{name}.json").read_text()) for name in ACTIVATIONS]
    assert len({row["non_embedding_parameters"] for row in found}) == 1
    assert len({row["tokens"] for row in found}) == 1
    assert all(abs(row["log"][-1]["loss"] - np.log(SHAPE["vocab_size"])) < 0.5 for row in found)


@pytest.mark.parametrize("name", ["reglu", "relu2"])
def test_the_decoder_is_transformers_decoder(scripts: Any, tmp_path: Path, name: str) -> None:
    from decoder import Decoder, Shape, export, load_export
    from transformers import AutoModelForCausalLM

    export(Decoder(Shape(**SHAPE), name, seed=3), tmp_path / name, None)
    ours = load_export(tmp_path / name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    tokens = torch.arange(16)[None] * 5 % SHAPE["vocab_size"]
    with torch.inference_mode():
        logits = ours.hidden(tokens, compiled=False) @ ours.model.embed_tokens.weight.T
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_order_of_windows_depends_on_seed_and_step_alone(scripts: Any) -> None:
    recipe = scripts.Recipe(batch=2)
    make = lambda: scripts.Windows(np.arange(81, dtype=np.uint16), 16, recipe, "cpu")  # noqa: E731
    one, other = make(), make()
    for step in (0, 1, 2, 3):
        inputs, targets = one.batch(step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(other.batch(3)[0], inputs)  # without the steps before


def test_small_files_give_the_models_back(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compact
    from decoder import Decoder, Shape, export, load_export

    monkeypatch.setattr(compact, "SHARD_BYTES", 6000)
    models, small, back = (tmp_path / name for name in ("export", "small", "back"))
    for name in ("relu", "swiglu"):
        export(Decoder(Shape(**SHAPE), name, seed=1), models / name, None)
    compact.main(["pack", "--models", str(models), "--out", str(small)])
    assert max(p.stat().st_size for p in small.iterdir()) < 12_000 and len(list(small.glob("relu-*"))) > 1
    compact.main(["unpack", "--models", str(small), "--out", str(back)])
    for name in ("relu", "swiglu"):
        check_tensors(open_checkpoint(back / name))
        one, other = (dict(load_export(folder / name).named_parameters()) for folder in (models, back))
        for key, weight in one.items():
            step = weight.abs().max(dim=-1, keepdim=True).values / 127
            assert ((weight - other[key]).abs() <= 0.51 * step + 1e-3 * weight.abs()).all(), key
            assert (weight.dim() != 2) == torch.equal(weight, other[key])
