"""The whole path below HTTP: checkpoint, packed model, cache, predictor, engine; against transformers and itself."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cache.budget import HostMemory, process_bytes
from cache.bundle import unpack_vector
from cache.errors import BudgetError, ColdstreamError, FormatError, FormatKind, ReadError, UnsupportedError
from runtime import load as load_module
from runtime.batch import Batch, SequenceView
from runtime.bench import measure
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.contract import _head
from runtime.gpu_plan import DeviceMemory
from runtime.load import Loaded, LoadOptions, find_or_pack, load, open_forecast, open_plan, prepare
from runtime.model import Model
from runtime.pack import PackOptions, pack, packing_bytes
from runtime.packed import BUNDLES, MANIFEST, PROFILE, RESIDENT, SKETCH, Packed, open_packed
from runtime.plan import FfnCache, Plan, PlanOptions
from runtime.request import FinishReason, Request, SamplingParams
from runtime.row_file import RowFile
from runtime.streams import Layer, layers
from runtime.tokenizer import Tokenizer
from runtime.windows import Windows
from tests.test_checkpoint import make, write_gguf
from tests.test_plan import LARGE, SMOL

PROMPTS = [[1, 5, 9, 14], [3] * 20, list(range(40, 2, -1)), [60, 2], [7, 11, 13, 17, 19, 23, 29, 31]]


def quiet(what: str, share: float) -> None:
    """No progress bar."""


def packed(model: Path, out: Path, calibration: Path, **options: Any) -> Path:
    arguments = {"cett": None, "bundles": "auto", "standalone": False, **options}
    return prepare(str(model), out, calibration, progress=quiet, **arguments)


def generate(loaded: Loaded, prompt: list[int], tokens: int, **params: Any) -> list[int]:
    request = Request(
        "r", tuple(prompt), SamplingParams(max_tokens=tokens, **{"temperature": 0.0, "ignore_eos": True, **params})
    )
    events = list(loaded.engine.generate(request))
    assert events[-1].finish_reason is FinishReason.LENGTH, events[-1].error
    return [e.token_id for e in events if e.token_id is not None]


def check_greedy(reference: Any, prompt: list[int], found: list[int]) -> None:
    """Token by token equal to transformers' greedy choice; a difference is allowed only at a near tie."""
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + found])).logits[0]
    for i, token in enumerate(found):
        row = logits[len(prompt) - 1 + i]
        best, second = row.topk(2).values.tolist()
        assert token == int(row.argmax()) or best - second < 1e-4, f"token {i}"
        if token != int(row.argmax()):
            return


@pytest.mark.parametrize("bundles", ["fp32", "auto"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_arcee"])
def test_dense_greedy_text_equals_transformers(
    family: str, bundles: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint, reference, text = request.getfixturevalue(family)
    model = packed(checkpoint, tmp_path / "packed", text, bundles=bundles)
    loaded = load(str(model), LoadOptions(mode="dense", dtype="fp32", ffn_cache=FfnCache.parse("25%")), quiet)
    loaded.engine.start()
    try:
        for prompt in PROMPTS:
            check_greedy(reference, prompt, generate(loaded, prompt, 32))
        tier = loaded.cache.snapshot().tiers["cpu"]
        assert 0.2 < tier.hits / tier.lookups < 0.3
    finally:
        loaded.engine.shutdown(0)
        loaded.close()


@pytest.fixture(scope="module")
def tiny_reglu(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny Llama with ReLU in place of SiLU."""
    checkpoint = tmp_path_factory.mktemp("tiny-reglu") / "checkpoint"
    shutil.copytree(tiny_llama.checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    return tiny_llama._replace(checkpoint=checkpoint)


def decoded(model: Path, mode: str) -> tuple[torch.Tensor, float, int]:
    """Logits of a prompt's tokens decoded one by one [T, V], bytes needed from disk a token, and neurons computed."""
    loaded = load(str(model), LoadOptions(mode=mode, dtype="fp32", ffn_cache=FfnCache.parse("0%")), quiet)
    kv, manager = loaded.new_kv()
    blocks, prompt = manager.allocate(len(PROMPTS[2])), PROMPTS[2]
    rows = []
    for position, token in enumerate(prompt):
        view = SequenceView(blocks, position, 1)
        batch = Batch("decode", torch.tensor([token]), torch.tensor([position]), (view,), "last")
        rows.append(loaded.model.forward(batch, kv, lambda: None))
    needed = loaded.cache.snapshot().transfers["disk", "cpu"].needed_bytes
    counted = loaded.model.counters().predicted_neurons
    loaded.close()
    return torch.cat([row for row in rows if row is not None]), needed / len(prompt), counted


def test_dense_keeps_the_first_records_so_that_the_rest_is_one_read(tmp_path: Path, tiny_relu2: Any) -> None:
    checkpoint, _, text = tiny_relu2
    model = packed(checkpoint, tmp_path / "packed", text)
    loaded = load(str(model), LoadOptions(mode="dense", ffn_cache=FfnCache.parse("25%")), quiet)
    try:
        for layer in range(loaded.cache.file.num_layers):
            resident = loaded.cache.resident(layer)
            assert 0 < resident.size < loaded.cache.file.num_neurons
            np.testing.assert_array_equal(resident, np.arange(resident.size))
    finally:
        loaded.close()


def test_a_checkpoint_is_packed_as_asked_the_first_time_that_it_is_loaded(
    tmp_path: Path, tiny_relu2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _, text = tiny_relu2
    monkeypatch.setenv("COLDSTREAM_CACHE_DIR", str(tmp_path))
    for bundles in ("int8", "fp16"):
        loaded = load(str(checkpoint), LoadOptions(pack=PackOptions(text, bundles=bundles)), quiet)
        loaded.close()
        assert loaded.packed.bundles.layout.dtype.value == bundles
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("family", ["tiny_relu2", "tiny_reglu", "tiny_arcee"])
def test_exact_equals_dense_and_moves_what_is_not_zero(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, record_property: Any
) -> None:
    """Within rounding, for the gated and the non-gated; of what is read nothing is provably zero."""
    checkpoint, _, text = request.getfixturevalue(family)
    model = packed(checkpoint, tmp_path / "packed", text, bundles="fp32")
    dense, dense_bytes, _ = decoded(model, "dense")
    exact, exact_bytes, computed = decoded(model, "exact")
    assert float((exact - dense).norm() / dense.norm()) < 1e-5
    layout = open_packed(model).bundles.layout
    active = computed / len(PROMPTS[2])  # a token, of 3 layers of 136
    wanted, vector = active * layout.record_bytes, 48 * 4
    gate = 3 * 136 * vector  # what decides; it is resident here, and would be the least that another way moves
    assert wanted <= gate + active * (layout.record_bytes - vector)
    assert wanted <= exact_bytes * (1 + 1e-9)  # both are means of whole numbers
    assert exact_bytes <= dense_bytes  # a layer is streamed whole where the disk is quicker that way
    assert 0.2 < active / (3 * 136) < 0.8
    record_property("bytes_share_of_dense", wanted / dense_bytes)


def texts_of(
    model: Path, share: str, order: list[int], lookahead: str = "none"
) -> tuple[list[list[int]], dict[str, Any]]:
    """Each prompt's text at a cache size, run in `order` (an index may come again), and what the engine tells."""
    options = LoadOptions(dtype="fp32", ffn_cache=FfnCache.parse(share), lookahead=lookahead)
    loaded = load(str(model), options, quiet)
    loaded.engine.start()
    found = [generate(loaded, PROMPTS[i], 24) for i in order]
    counters = loaded.model.counters()
    assert counters.steps["sparse"] > 0 and counters.predicted_neurons > 0
    assert (loaded.cache.snapshot().prefetch_used_bytes > 0) == (lookahead != "none")
    loaded.engine.shutdown(0)
    loaded.close()
    return found, loaded.info


def test_nothing_is_guessed_where_nothing_is_waited_for(tmp_path: Path, tiny_relu2: Any) -> None:
    model = packed(tiny_relu2.checkpoint, tmp_path / "packed", tiny_relu2.text, cett=0.05)
    options = LoadOptions(mode="sparse", ffn_cache=FfnCache.parse("100%"), lookahead="layer", threads=1)
    loaded = load(str(model), options, quiet)
    asked: list[int] = []
    loaded.model._ffn._predictor.confidence = lambda layer, x: asked.append(layer)
    loaded.engine.start()
    generate(loaded, PROMPTS[0], 4)
    assert loaded.model.counters().steps["sparse"] > 0 and not asked
    loaded.engine.shutdown(0)
    loaded.close()


def test_sparse_text_does_not_depend_on_what_the_cache_holds(
    tmp_path: Path, tiny_relu2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The active set is a function of the input and the pinned set: as long as that is the same, so is the text, at any
    cache size, read ahead or not, and whatever passed through the cache before."""
    monkeypatch.setattr("runtime.ffn._WORTH_A_GUESS", 1)  # tiny layers have few neurons
    checkpoint, _, text = tiny_relu2
    model = packed(checkpoint, tmp_path / "packed", text, bundles="fp32", cett=0.15)
    nothing, info = texts_of(model, "0%", [0, 1, 2, 3, 4])
    assert info["cett"] == 0.15 and info["pinned_share"] == 0 and info["sparse_layers"] == 3
    assert texts_of(model, "8%", [0, 1, 2, 3, 4])[0] == nothing
    assert texts_of(model, "0%", [0, 1, 2, 3, 4], "attention")[0] == nothing
    assert texts_of(model, "0%", [0, 1, 2, 3, 4], "layer")[0] == nothing
    fresh, info = texts_of(model, "35%", [0, 1, 2, 3, 4])
    assert info["pinned_share"] == pytest.approx(0.3, abs=0.01)
    again, _ = texts_of(model, "38%", [4, 3, 2, 1, 0, 2], "attention")
    assert again == [*reversed(fresh), fresh[2]]
    again, _ = texts_of(model, "38%", [4, 3, 2, 1, 0, 2], "layer")
    assert again == [*reversed(fresh), fresh[2]]


def test_pinned_neurons_never_leave(tmp_path: Path, tiny_relu2: Any) -> None:
    checkpoint, _, text = tiny_relu2
    model = packed(checkpoint, tmp_path / "packed", text, cett=0.15)
    loaded = load(str(model), LoadOptions(ffn_cache=FfnCache.parse("25%")), quiet)
    loaded.engine.start()
    generate(loaded, PROMPTS[2], 64)
    loaded.engine.shutdown(0)
    assert loaded.cache.snapshot().tiers["cpu"].evictions > 0
    pinned = loaded.plan.num_pinned
    assert pinned == round(0.2 * 136)
    for layer in range(3):
        assert set(range(pinned)) <= set(loaded.cache.resident(layer).tolist())
    loaded.close()


def test_records_lie_in_the_order_that_the_profile_tells(tmp_path: Path, tiny_relu2: Any) -> None:
    checkpoint, reference, text = tiny_relu2
    opened = open_packed(packed(checkpoint, tmp_path / "packed", text, bundles="fp32"))
    order = opened.read(PROFILE)["order"]
    for layer in range(3):
        assert sorted(order[layer].tolist()) == list(range(136)) and order[layer].tolist() != list(range(136))
        records = np.concatenate([r.copy() for _, r in opened.bundles.pieces(layer)])
        up = reference.model.layers[layer].mlp.up_proj.weight.detach().numpy()
        np.testing.assert_array_equal(unpack_vector(opened.bundles.layout, records, "up"), up[order[layer]])


def test_the_contract_is_kept_with_the_model(tmp_path: Path, tiny_relu2: Any, tiny_llama: Any) -> None:
    """Paired perplexities of rising CETT, the choice between them, and what each layer does."""
    checkpoint, _, text = tiny_relu2
    strict = open_packed(packed(checkpoint, tmp_path / "strict", text, max_ppl_increase=1e-6))
    assert strict.mode == "dense"  # nothing costs so little
    assert load(str(strict.path), LoadOptions(), quiet).info["mode"] == "dense"
    loose = open_packed(packed(checkpoint, tmp_path / "loose", text, max_ppl_increase=50.0))
    assert loose.mode == "sparse" and 0.05 <= loose.cett <= 0.2
    dense, *measured = loose.contract["measured"]
    assert dense["cett"] == 0 and [row["cett"] for row in measured] == [0.02, 0.03, 0.05, 0.1, 0.2]
    assert all(0 < row["taken_share"] <= 1 for row in measured if row["increase_percent"] is not None)
    assert all(row["sparse"] and row["moved"] < 0.53 for row in loose.contract["layers"])
    assert [s.row_bytes > 0 for s in loose.sketch_sizes(loose.cett)] == [True] * 3
    loaded = load(str(loose.path), LoadOptions(), quiet)
    assert loaded.info["contract"]["measured"] == loose.contract["measured"]  # type: ignore[index]
    assert loaded.info["mode"] == "sparse" and loaded.info["predictor_bytes"] <= loaded.plan.predictor_bytes
    loaded.close()


def test_a_lower_cett_takes_more_neurons(tmp_path: Path, tiny_relu2: Any) -> None:
    checkpoint, _, text = tiny_relu2
    model = packed(checkpoint, tmp_path / "packed", text)
    taken = []
    for cett in (0.01, 0.03, 0.2):
        loaded = load(str(model), LoadOptions(cett=cett), quiet)
        loaded.engine.start()
        generate(loaded, PROMPTS[0], 16)
        taken.append(loaded.model.counters().predicted_neurons)
        loaded.engine.shutdown(0)
        loaded.close()
    assert taken[0] > taken[1] > taken[2] > 0


def test_counters_add_up_and_agree_with_the_kernel(tmp_path: Path, tiny_relu2: Any) -> None:
    checkpoint, _, text = tiny_relu2
    model = packed(checkpoint, tmp_path / "packed", text)
    loaded = load(str(model), LoadOptions(ffn_cache=FfnCache.parse("20%")), quiet)
    try:
        if "direct" not in str(loaded.info["io_engine"]):
            pytest.skip("this file system has no O_DIRECT: the kernel's count is that of its page cache")
        figures = measure(loaded, 16, 64, text)
        expected = open_forecast(str(model), loaded.plan, PlanOptions())
    finally:
        loaded.close()
    assert expected is not None
    assert expected.read_bytes == pytest.approx(figures["predicted_read_bytes_per_token"])
    assert figures["predicted_tokens_per_s"] > 0
    assert 0 < figures["hits"] < figures["lookups"]
    assert 0 < figures["needed_bytes_per_token"] <= figures["bytes_read_per_token"]
    assert figures["bytes_read_per_token"] == pytest.approx(figures["kernel_bytes_read_per_token"], rel=0.02)


# -- what can be wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Any) -> Path:
    checkpoint, _, text = tiny_llama
    return packed(checkpoint, tmp_path / "packed", text)


def refused(model: Path, kind: FormatKind, says: str, mode: str = "auto") -> None:
    with pytest.raises(FormatError) as caught:
        load(str(model), LoadOptions(mode=mode), quiet).close()
    assert caught.value.kind is kind
    assert says in str(caught.value) and "\n" not in str(caught.value)


def edit_manifest(model: Path, **fields: Any) -> None:
    path = model / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_wrong_magic_and_version(model: Path) -> None:
    edit_manifest(model, version=99)
    refused(model, FormatKind.BAD_VERSION, "version 99")
    edit_manifest(model, format="something else")
    refused(model, FormatKind.BAD_MAGIC, MANIFEST)
    (model / MANIFEST).write_text("{")
    refused(model, FormatKind.BAD_HEADER, MANIFEST)


def test_hostile_manifest(model: Path) -> None:
    good = (model / MANIFEST).read_text()
    for fields in (
        {"layer_offsets": [0]},
        {"layer_offsets": None},
        {"config": {}},
        {"layout": {}},
        {"checksums": {}},
        {"source": 3},
    ):
        (model / MANIFEST).write_text(good)
        edit_manifest(model, **fields)
        with pytest.raises(ColdstreamError, match=MANIFEST):
            open_packed(model)
    (model / MANIFEST).write_text(good)
    edit_manifest(model, layer_offsets=[-4096, 0])
    with pytest.raises(FormatError, match=MANIFEST):
        open_packed(model)


def test_truncated_bundles_and_missing_files(model: Path) -> None:
    bundles = (model / BUNDLES).read_bytes()
    (model / BUNDLES).write_bytes(bundles[:-1])
    refused(model, FormatKind.TRUNCATED, BUNDLES)
    (model / BUNDLES).write_bytes(bundles)
    sketch = (model / SKETCH).read_bytes()
    (model / SKETCH).write_bytes(sketch[:-1] + b"\x01")
    refused(model, FormatKind.BAD_CHECKSUM, SKETCH, "sparse")
    (model / SKETCH).write_bytes(sketch)
    (model / PROFILE).unlink()
    refused(model, FormatKind.MISSING_FILE, PROFILE)


def test_another_user_may_read_a_packed_model_as_far_as_the_umask_lets(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    before = os.umask(0o027)
    try:
        model = packed(checkpoint, tmp_path / "packed", text, standalone=True)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in model.iterdir()} == {p.name: 0o640 for p in model.iterdir()}


@pytest.mark.parametrize("name", [MANIFEST, PROFILE, SKETCH])
def test_a_file_that_may_not_be_read_is_named_with_the_reason(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Path.open

    def denies(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opener(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", denies)
    with pytest.raises(FormatError, match=rf"{name}: cannot be opened \(Permission denied\)"):
        load(str(model), LoadOptions(mode="sparse"), quiet)


def test_damage_to_the_resident_part_is_found(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    model = packed(checkpoint, tmp_path / "packed", text, standalone=True)
    data = bytearray((model / RESIDENT).read_bytes())
    data[-7] ^= 1
    (model / RESIDENT).write_bytes(data)
    refused(model, FormatKind.BAD_CHECKSUM, RESIDENT)


def test_a_source_that_changed_or_vanished_is_refused(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    model = packed(copy, tmp_path / "packed", text)
    alone = packed(copy, tmp_path / "alone", text, standalone=True)
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(model, FormatKind.SOURCE_CHANGED, "changed since")
    shutil.rmtree(copy)
    refused(model, FormatKind.MISSING_FILE, "copy")
    load(str(alone), LoadOptions(), quiet).close()  # standalone needs no source
    assert (alone / RESIDENT).is_file() and not (model / RESIDENT).exists()


def test_a_pack_whose_rope_was_read_otherwise_is_refused(model: Path) -> None:
    config = json.loads((model / MANIFEST).read_text())["config"]
    scaling = {"rope_type": "linear", "parameters": {"factor": 4.0}}
    edit_manifest(model, config=config | {"rope_scaling": scaling})
    refused(model, FormatKind.SOURCE_CHANGED, "RoPE")


def test_options_that_make_no_sense_are_refused_by_name(model: Path) -> None:
    for options, says in (
        (LoadOptions(device="cuda"), "--device"),
        (LoadOptions(gpu_memory_bytes=1 << 30), "--gpu-memory"),
        (LoadOptions(mode="exact"), "--mode exact: silu"),
        (LoadOptions(mode="dense", cett=0.1), "--cett"),
        (LoadOptions(cett=0.9), "--cett 0.9"),
    ):
        with pytest.raises(ColdstreamError, match=says):
            load(str(model), options, quiet).close()


def test_a_budget_too_small_names_the_smallest_that_works(model: Path) -> None:
    with pytest.raises(BudgetError, match="--memory") as caught:
        load(str(model), LoadOptions(memory_bytes=1 << 20), quiet)
    smallest = caught.value.smallest_bytes
    load(str(model), LoadOptions(memory_bytes=smallest + (64 << 20)), quiet).close()


def test_gpu_memory_that_others_have_is_refused_before_anything_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("runtime.load.gpu_memory", lambda: DeviceMemory("Card", 80 << 30, 4 << 30))
    monkeypatch.setattr("runtime.load._load_weights", lambda *arguments, **options: pytest.fail("read"))
    with pytest.raises(BudgetError, match=r"--gpu-memory 20GiB: only .* of Card are free now"):
        load(str(model), LoadOptions(gpu_memory_bytes=20 << 30), quiet)


@pytest.mark.parametrize("standalone", [False, True])
def test_an_embedding_that_is_quantised_beside_plain_matrices_is_planned_as_it_is_loaded(
    standalone: bool, tmp_path: Path, tiny_llama: Any
) -> None:
    """In memory where its rows need decoding, as the copy of a standalone pack does not; its copy in fp32 meanwhile."""
    sizes = {"vocab_size": 320, "max_position_embeddings": 512}
    model = make("llama", tmp_path / "hf", **sizes, tie_word_embeddings=False)
    kind = gguf.GGMLQuantizationType
    write_gguf(tmp_path / "m.gguf", model, "llama", kind.F16, {"model.embed_tokens.weight": kind.Q8_0})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    config = checkpoint.config
    assert (config.dtype, config.embedding_dtype, config.head_dtype) == ("fp16", "q8_0", "fp16")
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(tiny_llama.checkpoint))
    out = tmp_path / "packed"
    pack(checkpoint, tokenizer, out, PackOptions(tiny_llama.text, standalone=standalone), quiet)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["config"]["embedding_dtype"] == ("fp32" if standalone else "q8_0")
    planned = []
    for names in ((), ("embedding_dtype", "head_dtype")):  # the second as packs were made before
        edit_manifest(out, config={k: v for k, v in manifest["config"].items() if k not in names})
        loaded = load(str(out), LoadOptions(mode="dense"), quiet)
        assert isinstance(loaded.plan, Plan) and isinstance(loaded.model, Model)
        planned.append((loaded.plan.details["resident.embedding"], loaded.plan.details["resident.head"]))
        assert (planned[-1][0] == 0) == isinstance(loaded.model._weights.embed_tokens, RowFile) == standalone
        loaded.close()
    assert planned[0] == planned[1]


# -- packing that is found, or under way -------------------------------------------------------------------------------


def test_a_plan_is_that_of_the_pack_which_would_be_loaded(
    tmp_path: Path, tiny_relu2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTREAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("runtime.load.process_bytes", lambda: 400 << 20)
    model, options, packing = (
        str(tiny_relu2.checkpoint),
        PlanOptions(2 << 30, mode="auto"),
        PackOptions(tiny_relu2.text),
    )
    estimate = open_plan(model, options, packing)
    assert open_forecast(model, estimate, options, packing) is None
    found = find_or_pack(model, quiet, packing)
    exact = open_plan(model, options, packing)
    assert exact == open_plan(str(found.path), options) != estimate
    assert open_forecast(model, exact, options, packing) is not None
    assert open_plan(model, options, replace(packing, bundles="int8")) == estimate  # that is not packed yet


@pytest.mark.parametrize("limited", [False, True], ids=["by the host", "by a cgroup"])
def test_packing_that_memory_cannot_hold_is_refused_before_it_begins(
    limited: bool, tmp_path: Path, tiny_relu2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = 1 << 20
    now = process_bytes()
    monkeypatch.setattr("runtime.pack.process_bytes", lambda: now)
    host = HostMemory(1 << 40, 1 << 40, now + some, "cgroup")
    free = host if limited else HostMemory(1 << 40, some, None, "MemAvailable")
    monkeypatch.setattr("runtime.pack.detect_memory", lambda: free)
    with pytest.raises(ColdstreamError, match=r"packing needs .*MiB of memory or more, and .* are free here"):
        prepare(str(tiny_relu2.checkpoint), tmp_path / "packed", tiny_relu2.text, None, "auto", False, quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_least_that_packing_takes_is_a_tenth_below_what_was_measured() -> None:
    windows = Windows(*(torch.zeros(n, 512, dtype=torch.int64) for n in (9, 2, 7)))
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    llama = replace(SMOL, **shape, head_dim=128)
    process_mib = 160  # after the imports
    for config, measured_mib in ((LARGE, 2813), (llama, 3613)):
        assert 0.85 < packing_bytes(config, windows) / 2**20 / (measured_mib - process_mib) < 0.95


def test_who_finds_that_another_packs_waits_and_takes_what_it_made(
    tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTREAM_CACHE_DIR", str(tmp_path))
    begun, waiting, stages = threading.Event(), threading.Event(), set()
    options, paths = PackOptions(tiny_llama.text), []

    def first(what: str, share: float) -> None:
        begun.set()
        assert waiting.wait(60)

    def second(what: str, share: float) -> None:
        stages.add(what)
        waiting.set()

    def run() -> None:
        paths.append(find_or_pack(str(tiny_llama.checkpoint), first, options).path)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    paths.append(find_or_pack(str(tiny_llama.checkpoint), second, options).path)
    thread.join()
    assert paths[0] == paths[1] and stages == {"waiting for another process that packs this model"}
    assert list(tmp_path.iterdir()) == [paths[0]]


def test_what_was_left_is_removed_whatever_the_number_of_its_process(tmp_path: Path, tiny_llama: Any) -> None:
    """Which may be another's by now, or was given in another container."""
    (tmp_path / f".packed.partial-{os.getppid()}").mkdir()
    (tmp_path / ".packed.lock").touch()
    packed(tiny_llama.checkpoint, tmp_path / "packed", tiny_llama.text)
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_without_locks_nobody_removes_what_another_may_be_writing(
    tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    others = tmp_path / ".packed.partial-1"
    others.mkdir()
    packed(tiny_llama.checkpoint, tmp_path / "packed", tiny_llama.text)
    assert sorted(p.name for p in tmp_path.iterdir()) == [others.name, "packed"]


def test_what_would_be_refused_is_refused_before_packing(
    tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTREAM_CACHE_DIR", str(tmp_path))
    model, packing = str(tiny_llama.checkpoint), PackOptions(tiny_llama.text)
    refused = [({"mode": "exact"}, "--mode exact: silu"), ({"cett": 0.9}, "--cett 0.9")]
    for options, says in [*refused, ({"memory_bytes": 1 << 20}, "--memory"), ({"max_model_len": 10**6}, "--max-model")]:
        with pytest.raises(ColdstreamError, match=says):
            load(model, LoadOptions(pack=packing, **options), quiet)
        assert not list(tmp_path.iterdir())
    for options, says in refused:
        with pytest.raises(ColdstreamError, match=says):
            open_plan(model, PlanOptions(**options), packing)


def test_all_files_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, renamed, sync, rename = set(), [], os.fsync, os.rename

    def note(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        sync(fd)

    def move(source: Path, to: Path) -> None:
        renamed.append({p.name for p in (source, *source.iterdir()) if p.stat().st_ino not in synced})
        rename(source, to)

    monkeypatch.setattr("os.fsync", note)
    monkeypatch.setattr("runtime.pack.os.rename", move)
    packed(tiny_llama.checkpoint, tmp_path / "packed", tiny_llama.text)
    assert renamed == [set()]
    assert tmp_path.stat().st_ino in synced


def test_packing_holds_one_layer_at_a_time(tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def watched(checkpoint: Checkpoint, length: int) -> Iterator[Layer]:
        seen = []
        for layer in layers(checkpoint, length):
            seen.append(weakref.ref(layer.ffn.up))
            yield layer
            del layer
            alive.append(sum(ref() is not None for ref in seen))

    monkeypatch.setattr("runtime.pack.layers", watched)
    packed(tiny_llama.checkpoint, tmp_path / "packed", tiny_llama.text)
    assert len(alive) > 1 and not any(alive)


def test_the_contracts_head_multiplies_a_part_at_a_time(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = _head(open_checkpoint(str(tiny_llama.checkpoint))), torch.randn(5, 48)
    whole = head(x)
    monkeypatch.setattr("runtime.contract._HEAD_ROWS", 7)
    torch.testing.assert_close(head(x), whole)


def test_a_plan_reads_no_sketch_and_measures_memory_that_is_there(
    tmp_path: Path, tiny_relu2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(tiny_relu2.checkpoint, tmp_path / "packed", tiny_relu2.text)
    plan, read, measure_it = open_plan(str(model), PlanOptions(threads=1)), Packed.read, load_module.measure_machine
    files, measured = [], []

    def noted(self: Packed, file: str) -> dict[str, np.ndarray]:
        files.append(file)
        return read(self, file)

    def measuring(kernels: Any, weight: np.ndarray) -> Any:
        measured.append((kernels.num_threads, bool(weight.all())))  # zeros may be one page of the kernel's, cached
        return measure_it(kernels, weight)

    monkeypatch.setattr(Packed, "read", noted)
    monkeypatch.setattr(load_module, "measure_machine", measuring)
    assert open_forecast(str(model), plan, PlanOptions(threads=1)) is not None
    assert set(files) == {PROFILE} and measured == [(1, True)]


# -- packing that fails -----------------------------------------------------------------------------------------------


def test_out_that_exists_is_refused(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    with pytest.raises(ColdstreamError, match="already exists"):
        packed(checkpoint, tmp_path, text)


def test_a_truncated_shard_leaves_nothing(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(FormatError) as caught:
        packed(copy, tmp_path / "out" / "packed", text)
    assert caught.value.kind is FormatKind.TRUNCATED and shard.name in str(caught.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_source_that_cannot_be_read_is_named_not_what_is_written(
    tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _, text = tiny_llama
    preadv, calls = os.preadv, itertools.count()

    def fails(fd: int, buffers: Any, offset: int) -> int:
        if next(calls) > 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr("os.preadv", fails)
    with pytest.raises(ReadError, match=r"model-.*safetensors: reading \d+ bytes at offset \d+ failed: Input/output"):
        packed(checkpoint, tmp_path / "out" / "packed", text)
    assert not list((tmp_path / "out").iterdir())


def test_a_calibration_text_that_is_not_utf_8_is_named(tmp_path: Path, tiny_llama: Any) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(ColdstreamError, match=rf"--calibration {latin}: not UTF-8, at byte 3"):
        packed(tiny_llama.checkpoint, tmp_path / "packed", latin)


def test_a_missing_tokenizer_is_one_sentence(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        packed(copy, tmp_path / "packed", text)
    assert not (tmp_path / "packed").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, tiny_llama: Any) -> None:
    """On a real file system that is too small."""
    checkpoint, _, text = tiny_llama
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", mount], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(ColdstreamError, match=r"disk"):
            packed(checkpoint, mount / "packed", text)
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", mount], check=True)


_PREPARE = """
import sys
from pathlib import Path
from runtime.load import prepare

prepare(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), None, "auto", False, lambda w, s: print(s, flush=True))
"""


def test_a_killed_run_leaves_nothing_that_loads(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    out = tmp_path / "packed"
    run = subprocess.Popen(
        [sys.executable, "-c", _PREPARE, str(checkpoint), str(out), str(text)], stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    run.stdout.readline()
    run.stdout.readline()  # the second layer is being packed
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not out.exists()
    left = list(tmp_path.glob(".packed.partial-*"))
    for directory in left:
        with pytest.raises(FormatError):
            open_packed(directory)
    packed(checkpoint, out, text)  # the next run succeeds, and cleans up behind the killed one
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    assert time.time() - out.stat().st_mtime < 600


def test_unsupported_is_said_by_name(tmp_path: Path, tiny_llama: Any) -> None:
    checkpoint, _, text = tiny_llama
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(UnsupportedError, match="hidden_act"):
        packed(copy, tmp_path / "packed", text)


def test_profile_shares_are_shares(model: Path) -> None:
    profile = open_packed(model).read(PROFILE)
    assert ((profile["active"] > 0) & (profile["active"] <= 1)).all()
    assert (np.diff(profile["active"], axis=1) <= 0).all()
    assert profile["frequency"].shape[0] == profile["targets"].size
