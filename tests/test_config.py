"""`ModelConfig` against transformers' own reading of the same config.json, and against GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ArceeConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cache.errors import ColdstreamError, FormatError, FormatKind, UnsupportedError
from runtime.config import ModelConfig, RopeScaling
from runtime.gguf_file import GgufFile
from runtime.tensor_entry import TensorEntry

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096}


def oracle(data: dict[str, Any]) -> Any:
    kind = {"llama": LlamaConfig, "arcee": ArceeConfig}[data["model_type"]]
    return kind.from_dict(json.loads(json.dumps(data)))


@pytest.mark.parametrize(
    "data",
    [
        {"model_type": "llama"},
        {"model_type": "arcee"},
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        {"model_type": "llama", "num_key_value_heads": None, "head_dim": None, "eos_token_id": [7, 8, 7]},
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "tie_word_embeddings": True},
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "attention_bias": True},
        {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"model_type": "arcee", "rope_theta": 1e6, "rope_scaling": {**YARN, "beta_fast": 16, "truncate": False}},
        {"model_type": "arcee", "rope_parameters": {**YARN, "rope_theta": 1e6, "attention_factor": 1.25}},
        {"model_type": "llama", "eos_token_id": None, "bos_token_id": None},
    ],
)
def test_from_hf_reads_what_transformers_reads(data: dict[str, Any]) -> None:
    config, expected = ModelConfig.from_hf(data), oracle(data)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    more = ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    for name in (*same, *more, "attention_bias", "bos_token_id"):
        assert getattr(config, name) == getattr(expected, name), name
    eos = expected.eos_token_id
    assert config.eos_token_ids == tuple(dict.fromkeys(eos if isinstance(eos, list) else [] if eos is None else [eos]))
    assert config.gated == (data["model_type"] == "llama")
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert (config.rope_scaling.rope_type if config.rope_scaling else "default") == expected.rope_parameters[
        "rope_type"
    ]
    for name, value in (config.rope_scaling.parameters if config.rope_scaling else {}).items():
        assert value == expected.rope_parameters.get(name, value), name
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("extra", [{}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": 1.5}])
def test_yarn_is_resolved_to_numbers(extra: dict[str, float]) -> None:
    data = {"model_type": "arcee", "rope_scaling": {**YARN, **extra}}
    scaling = ModelConfig.from_hf(data).rope_scaling
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](oracle(data), torch.device("cpu"))
    assert scaling is not None
    assert scaling.parameters["attention_factor"] == pytest.approx(factor, rel=1e-12)
    assert {k: scaling.parameters[k] for k in ("beta_fast", "beta_slow", "truncate")} == {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": 1.0,
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "opt"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "fatrelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": {}, "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "short_factor": 1.0}}, "short_factor"),
    ],
)
def test_what_is_not_run_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        ModelConfig.from_hf({"model_type": "llama", **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": 2**40}, "num_attention_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_nonsense_is_a_format_error_naming_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named) as caught:
        ModelConfig.from_hf({"model_type": "llama", **change})
    assert caught.value.kind is FormatKind.BAD_HEADER


WEIRD: list[Any] = [1, 0, -1, 2**70, 0.5, float("inf"), True, "x", "", [], ["a"], [1], {}, {"a": {}}, None]


@pytest.mark.parametrize("model_type", ["llama", "arcee"])
def test_no_value_of_any_field_gets_past_the_checks_as_another_error(model_type: str) -> None:
    fields = {**ModelConfig.from_hf({"model_type": model_type}).to_json(), "mlp_bias": 0, "rope_parameters": 0}
    fields |= {"partial_rotary_factor": 1, "layer_types": 0, "sliding_window": 0, "torch_dtype": 0, "eos_token_id": 0}
    for name in fields:
        for value in WEIRD:
            try:
                ModelConfig.from_hf({"model_type": model_type, name: value})
            except ColdstreamError as error:
                assert "config.json" in str(error)
    for name in (*YARN, "rope_theta", "beta_fast", "truncate", "mscale", "attention_factor"):
        for value in WEIRD:
            data = {"model_type": model_type, "rope_parameters": {**YARN, name: value}}
            try:
                ModelConfig.from_hf(data)
            except ColdstreamError as error:
                assert "config.json" in str(error)


def test_from_json_refuses_what_to_json_did_not_write() -> None:
    good = ModelConfig.from_hf({"model_type": "llama", "rope_scaling": LLAMA3}).to_json()
    with pytest.raises(FormatError, match="embedding_dtype"):
        ModelConfig.from_json(good | {"embedding_dtype": 3})
    for name in good:
        data = {k: v for k, v in good.items() if k != name}
        if name in ("rope_scaling", "bos_token_id", "gated", "embedding_dtype", "head_dtype"):  # null or implied
            ModelConfig.from_json(data)
            continue
        with pytest.raises(ColdstreamError, match=name):
            ModelConfig.from_json(data)
    for broken in (None, [], {**good, "rope_scaling": {"rope_type": "llama3", "parameters": {"factor": 8.0}}}):
        with pytest.raises(FormatError, match=r"manifest\.json"):
            ModelConfig.from_json(broken)


# --- GGUF ---


def gguf(arch: str = "llama", entries: dict[str, TensorEntry] | None = None, **meta: Any) -> GgufFile:
    fields = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 16,
        "rope.freq_base": 5e5,
    }
    path = Path("tiny.gguf")
    embedding = TensorEntry("token_embd.weight", path, "q8_0", (32, 64), 0, 2176)
    metadata = {"general.architecture": arch, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    metadata |= {f"{arch}.{k}": v for k, v in fields.items()}
    metadata |= {k.replace("ARCH", arch): v for k, v in meta.items() if v is not None}
    for key in (k for k, v in meta.items() if v is None):
        del metadata[key.replace("ARCH", arch)]
    return GgufFile(path, 0, metadata, {"token_embd.weight": embedding, **(entries or {})})


@pytest.mark.parametrize(("arch", "act", "gated"), [("llama", "silu", True), ("arcee", "relu2", False)])
def test_from_gguf(arch: str, act: str, gated: bool) -> None:
    config = ModelConfig.from_gguf(gguf(arch, **{"tokenizer.ggml.eot_token_id": 5}))
    assert config == ModelConfig(
        model_type=arch,
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        hidden_act=act,
        gated=gated,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=1,
        eos_token_ids=(2, 5),
        dtype="q8_0",
    )


def test_gguf_yarn_is_the_same_as_the_config_that_it_came_from() -> None:
    names = {"type": "yarn", "factor": 20.0, "original_context_length": 4096}
    config = ModelConfig.from_gguf(gguf("arcee", **{f"ARCH.rope.scaling.{k}": v for k, v in names.items()}))
    assert config.rope_scaling == ModelConfig.from_hf({"model_type": "arcee", "rope_scaling": YARN}).rope_scaling


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # linear is llama.cpp's default
        ({"rope.scale_linear": 4.0}, 4.0),  # the key's old name
        ({"rope.scale_linear": 4.0, "rope.scaling.factor": 8.0}, 8.0),
        ({"rope.scale_linear": 4.0, "rope.scaling.type": "linear"}, 4.0),
        ({"rope.scale_linear": 4.0, "rope.scaling.type": "none"}, None),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.original_context_length": 64}, None),
    ],
)
def test_every_way_to_say_linear_scaling_in_gguf(keys: dict[str, Any], factor: float | None) -> None:
    config = ModelConfig.from_gguf(gguf(**{f"ARCH.{k}": v for k, v in keys.items()}))
    assert config.rope_scaling == (None if factor is None else RopeScaling("linear", {"factor": factor}))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (8.0, 2.0, 6.0)])
def test_llama3_is_found_again_in_the_divisors(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, factor: float, low: float, high: float
) -> None:
    data = {"model_type": "llama", "head_dim": head_dim, "rope_theta": 5e5, "max_position_embeddings": 131072}
    given = {**LLAMA3, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    plain = 5e5 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](oracle({**data, "rope_scaling": given}), torch.device("cpu"))
    divisors = (plain / scaled).numpy()
    monkeypatch.setattr(GgufFile, "load", lambda self, name: divisors)
    entry = TensorEntry("rope_freqs.weight", Path("tiny.gguf"), "fp32", (head_dim // 2,), 0, 2 * head_dim)
    lengths = {"ARCH.attention.key_length": head_dim, "ARCH.attention.value_length": head_dim}
    lengths["ARCH.rope.dimension_count"] = head_dim
    config = ModelConfig.from_gguf(gguf(entries={"rope_freqs.weight": entry}, **lengths))
    assert config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3"
    found = {"rope_type": "llama3", **config.rope_scaling.parameters}
    again, _ = ROPE_INIT_FUNCTIONS["llama3"](oracle({**data, "rope_scaling": found}), torch.device("cpu"))
    np.testing.assert_allclose(again.numpy(), scaled.numpy(), rtol=2e-5)


@pytest.mark.parametrize(("divisors", "scaling"), [(np.ones(8), None), (np.arange(1.0, 9.0), "refused")])
def test_other_divisors(
    monkeypatch: pytest.MonkeyPatch, divisors: np.ndarray, scaling: RopeScaling | str | None
) -> None:
    monkeypatch.setattr(GgufFile, "load", lambda self, name: divisors.astype(np.float32))
    entry = TensorEntry("rope_freqs.weight", Path("tiny.gguf"), "fp32", (8,), 0, 32)
    file = gguf(entries={"rope_freqs.weight": entry})
    if scaling == "refused":
        with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
            ModelConfig.from_gguf(file)
    else:
        assert ModelConfig.from_gguf(file).rope_scaling is None


@pytest.mark.parametrize(
    ("meta", "kind", "named"),
    [
        ({"general.architecture": "qwen2"}, UnsupportedError, "general.architecture"),
        ({"general.architecture": None}, UnsupportedError, "general.architecture"),
        ({"ARCH.expert_count": 8}, UnsupportedError, "expert_count"),
        ({"ARCH.rope.dimension_count": 8}, UnsupportedError, "dimension_count"),
        ({"ARCH.attention.head_count": np.array([4, 2])}, UnsupportedError, "head_count"),
        ({"ARCH.rope.scaling.type": "longrope"}, UnsupportedError, "longrope"),
        ({"ARCH.rope.scaling.magic": 3.0}, UnsupportedError, "magic"),
        ({"split.count": 3}, UnsupportedError, "split.count"),
        ({"ARCH.block_count": None}, FormatError, "num_hidden_layers"),
        ({"ARCH.embedding_length": "64"}, FormatError, "hidden_size"),
        ({"ARCH.rope.freq_base": "x"}, FormatError, "freq_base"),
        ({"ARCH.rope.scale_linear": "x"}, FormatError, "factor"),
        ({"ARCH.rope.scaling.type": ""}, UnsupportedError, "rope_type"),
        ({"tokenizer.ggml.eos_token_id": -1}, FormatError, "eos_token_ids"),
    ],
)
def test_gguf_metadata_that_is_not_run(meta: dict[str, Any], kind: type[ColdstreamError], named: str) -> None:
    with pytest.raises(kind, match=named):
        ModelConfig.from_gguf(gguf(**meta))


def test_no_metadata_value_gets_past_the_checks_as_another_error() -> None:
    keys = [*gguf().metadata, "llama.attention.head_count_kv", "llama.attention.key_length", "llama.expert_count"]
    keys += ["llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scaling.attn_factor", "split.count"]
    keys += ["llama.rope.scale_linear"]
    for key in keys:
        for value in [*(v for v in WEIRD if not isinstance(v, dict)), np.array([1, 2]), np.array([])]:
            for scaling in ({}, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}):
                try:
                    ModelConfig.from_gguf(gguf(**{**scaling, key: value} if value is not None else scaling))
                except ColdstreamError as error:
                    assert "tiny.gguf" in str(error)
