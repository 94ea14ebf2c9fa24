"""The two real models, SwiGLU from its GGUF and ReLU² from its checkpoint, against transformers in fp32.

Both are packed once, bundles fp32, with a short piece of the calibration text: thresholds a little rougher than those
of `coldstream prepare`, in a fraction of the time. The full figures are those of benchmarks/first_path.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from cache.stats import CacheSnapshot
from runtime.batch import Batch, ModelCounters, SequenceView
from runtime.bench import measure
from runtime.load import Loaded, LoadOptions, default_calibration, default_heldout, load, prepare
from runtime.perplexity import perplexity
from runtime.plan import FfnCache
from runtime.request import FinishReason, Request, SamplingParams
from runtime.tokenizer import Tokenizer
from server.chat import render_chat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CALIBRATION_CHARACTERS = 9000
NUM_LAYERS, NUM_NEURONS = 30, 1536
GREEDY_TOKENS = 64
SCORED_TOKENS = 256
BENCH_PROMPT, BENCH_TOKENS = 16, 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nName three animals that live in the sea.<|im_end|>\n<|im_start|>assistant\n",
    "It was a dark and stormy night, and the old house at the end of the road",
    "Les trois couleurs du drapeau sont 1) bleu, 2)",
)


class RealModel(NamedTuple):
    """A packed model, the same model in transformers, and what FACTS says of it at CETT 0.05: share active."""

    name: str
    packed: Path
    reference: Any
    active_share: float


class Decoded(NamedTuple):
    """A stretch of sparse decode: the command's figures, and the counters of all that the process did."""

    figures: dict[str, Any]
    cache: CacheSnapshot
    model: ModelCounters


def quiet(what: str, share: float) -> None:
    """No progress bar."""


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(default_calibration().read_text(encoding="utf-8")[:CALIBRATION_CHARACTERS], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pack_fp32(tmp_path_factory: pytest.TempPathFactory, short_text: Path) -> Callable[[Path, str], Path]:
    """Packs a checkpoint with bundles fp32: no rounding between the checkpoint and what is computed with."""

    def pack(checkpoint: Path, name: str) -> Path:
        return prepare(str(checkpoint), tmp_path_factory.mktemp(name) / name, short_text, 0.05, "fp32", False, quiet)

    return pack


@pytest.fixture(scope="session")
def swiglu(smollm2_gguf: Path, pack_fp32: Callable[[Path, str], Path]) -> RealModel:
    return RealModel("swiglu", pack_fp32(smollm2_gguf, "swiglu"), dequantised(smollm2_gguf), 0.649)


@pytest.fixture(scope="session")
def relu2(relu2_model: Path, pack_fp32: Callable[[Path, str], Path]) -> RealModel:
    reference = LlamaForCausalLM.from_pretrained(relu2_model, dtype=torch.float32).eval()
    return RealModel("relu2", pack_fp32(relu2_model, "relu2"), reference, 0.093)


@pytest.fixture(scope="session", params=["swiglu", "relu2"])
def real(request: pytest.FixtureRequest) -> RealModel:
    model: RealModel = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def dense(real: RealModel) -> Iterator[Loaded]:
    """Every neuron streamed through slots that hold a quarter of them; the engine runs."""
    options = LoadOptions(
        mode="dense", dtype="fp32", ffn_cache=FfnCache.parse("25%"), max_model_len=512, max_num_seqs=len(PROMPTS)
    )
    loaded = load(str(real.packed), options, quiet)
    loaded.engine.start()
    yield loaded
    loaded.engine.shutdown(0)
    loaded.close()


@pytest.fixture(scope="session")
def decoded() -> Callable[[RealModel], Decoded]:
    """Decodes a stretch of the held-out text at CETT 0.05 with 30 % of the FFN in slots, once for each model."""
    done: dict[str, Decoded] = {}

    def of(model: RealModel) -> Decoded:
        if model.name not in done:
            done[model.name] = decode(model)
        return done[model.name]

    return of


def decode(model: RealModel) -> Decoded:
    options = LoadOptions(cett=0.05, dtype="fp32", ffn_cache=FfnCache.parse("30%"), max_model_len=512)
    loaded = load(str(model.packed), options, quiet)
    try:
        figures = measure(loaded, BENCH_PROMPT, BENCH_TOKENS, default_heldout())
        return Decoded(figures, loaded.cache.snapshot(), loaded.model.counters())
    finally:
        loaded.close()


def dequantised(gguf: Path) -> Any:
    """The GGUF in transformers, by transformers' own reader (from_pretrained would want accelerate for it)."""
    config = load_gguf_checkpoint(gguf)["config"]
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    tensors = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"{gguf.name}: missing {missing}, unexpected {unexpected}")
    return model


def reference_logits(model: RealModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.reference(torch.tensor([ids])).logits[0]
    return logits  # [T, V]


def generate(loaded: Loaded, number: int, prompt: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0.0, ignore_eos=True)
    events = list(loaded.engine.generate(Request(f"r{number}", tuple(prompt), params)))
    assert events[-1].finish_reason is FinishReason.LENGTH, events[-1].error
    return [e.token_id for e in events if e.token_id is not None]


def same_until_a_tie(logits: torch.Tensor, found: list[int]) -> int:
    """How many tokens are transformers' greedy choice; logits [T, V] of the rows that chose them.

    The first difference must be a near tie of the two best; after it the texts have parted.
    """
    for i, token in enumerate(found):
        best, second = logits[i].topk(2).values.tolist()
        if token != int(logits[i].argmax()):
            assert best - second < 1e-4, f"token {i}: {token}, not {int(logits[i].argmax())} by {best - second}"
            return i
    return len(found)


def test_dense_greedy_text_is_that_of_transformers(
    real: RealModel, dense: Loaded, record_property: Callable[[str, object], None]
) -> None:
    """Token by token, all prompts decoded in one batch; the reference's greedy text by one pass over ours."""
    before = dense.cache.snapshot()
    prompts = [dense.tokenizer.encode(p, add_special=False) for p in PROMPTS]
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(lambda i: generate(dense, i, prompts[i]), range(len(prompts))))
    same = []
    for prompt, found in zip(prompts, texts, strict=True):
        logits = reference_logits(real, prompt + found)[len(prompt) - 1 : -1]
        assert len(found) == GREEDY_TOKENS
        same.append(same_until_a_tie(logits, found))
    record_property("tokens_equal", same)
    assert min(same) > GREEDY_TOKENS // 2
    tier = (dense.cache.snapshot() - before).tiers["cpu"]
    assert tier.hits + tier.misses == tier.lookups
    assert tier.hits / tier.lookups == pytest.approx(0.25, abs=0.01)


def test_logits_are_those_of_transformers(
    real: RealModel, dense: Loaded, record_property: Callable[[str, object], None]
) -> None:
    """A prompt in two chunks of prefill and scoring, then token by token; every row within 1e-3."""
    ids = dense.tokenizer.encode(default_heldout().read_text(encoding="utf-8")[:2000], add_special=False)[:120]
    expected = reference_logits(real, ids)
    kv, manager = dense.new_kv()
    blocks = manager.allocate(len(ids))

    def run(kind: Any, first: int, stop: int, logits: Any) -> torch.Tensor | None:
        view = SequenceView(blocks, first, stop - first)
        batch = Batch(kind, torch.tensor(ids[first:stop]), torch.arange(first, stop), (view,), logits)
        return dense.model.forward(batch, kv, lambda: None)

    assert run("prefill", 0, 50, "none") is None
    parts = [run("score", 50, 100, "all")] + [run("decode", p, p + 1, "last") for p in range(100, 120)]
    found = torch.cat([p for p in parts if p is not None])  # [70, V]
    error = (found - expected[50:]).norm(dim=1) / expected[50:].norm(dim=1)
    record_property("largest_relative_error", float(error.max()))
    assert float(error.max()) < 1e-3


def test_answers_fit_a_schema_and_make_sense(dense: Loaded) -> None:
    properties = {"city": {"type": "string", "maxLength": 20}, "population": {"type": "integer", "minimum": 0}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    question = "Name a large city and its population, as JSON with the keys city and population."
    ids = dense.tokenizer.encode_parts(render_chat(dense.tokenizer, [{"role": "user", "content": question}]))
    for number, form in enumerate((schema, {"type": "object"})):
        params = SamplingParams(max_tokens=80, temperature=0.0, json_schema=json.dumps(form))
        events = list(dense.engine.generate(Request(f"schema-{number}", tuple(ids), params)))
        answer = dense.tokenizer.decode([e.token_id for e in events if e.token_id is not None])
        assert answer.startswith("{") and events[-1].error is None
        if form is schema:
            value = json.loads(answer)
            assert events[-1].finish_reason is FinishReason.STOP, answer
            assert value["city"].strip() and type(value["population"]) is int


def test_sparse_perplexity_and_shares_are_sane(real: RealModel) -> None:
    options = LoadOptions(dtype="fp32", max_model_len=SCORED_TOKENS)
    found = perplexity(str(real.packed), options, None, SCORED_TOKENS, [0.05], quiet)
    dense_row, sparse_row = found["rows"]
    assert found["tokens_scored"] == SCORED_TOKENS - 1
    nll = torch.nn.functional.cross_entropy(*shifted(real, heldout_ids(real)))
    assert dense_row["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-3)  # the command's figure is transformers'
    assert -3 < sparse_row["increase_percent"] < 6
    assert sparse_row["active_share"] == pytest.approx(real.active_share, rel=0.25)
    assert sparse_row["active_share"] * 0.9 < sparse_row["taken_share"] < 1


def heldout_ids(model: RealModel) -> list[int]:
    text = default_heldout().read_text(encoding="utf-8")
    return Tokenizer.from_dir(model.packed).encode(text, add_special=False)[:SCORED_TOKENS]


def shifted(model: RealModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of logits and the tokens that they should have foretold."""
    return reference_logits(model, ids)[:-1], torch.tensor(ids[1:])


def test_counters_add_up(real: RealModel, decoded: Callable[[RealModel], Decoded]) -> None:
    figures, cache, model = decoded(real)
    tier, disk = cache.tiers["cpu"], cache.transfers["disk", "cpu"]
    assert tier.hits + tier.misses == tier.lookups
    assert 0 < figures["hits"] < figures["lookups"] < tier.lookups  # all counts prefill too, which is dense
    assert tier.used_bytes <= tier.capacity_bytes == figures["slot_bytes"]
    assert figures["slot_bytes"] == pytest.approx(0.3 * figures["ffn_bytes"], rel=0.02)
    assert 0 < disk.needed_bytes <= disk.bytes
    assert sum(cache.read_sizes["disk"].counts) > 0
    assert cache.read_sizes["disk"].sum == pytest.approx(disk.bytes, rel=0.01)
    assert 0 < figures["needed_bytes_per_token"] <= figures["bytes_read_per_token"]
    assert model.steps["sparse"] == BENCH_TOKENS and model.steps["dense"] == 0 < model.steps["prefill"]
    assert model.predicted_rows == BENCH_TOKENS * NUM_LAYERS
    assert 0 < model.active_neurons <= model.predicted_neurons <= model.predicted_rows * NUM_NEURONS
    assert model.overflow == 0 and model.predicted_neurons == figures["lookups"]


def test_bytes_are_those_that_the_kernel_says(real: RealModel, decoded: Callable[[RealModel], Decoded]) -> None:
    figures = decoded(real).figures
    if "direct" not in figures["io_engine"]:
        pytest.skip("this file system has no O_DIRECT: the kernel's count is that of its page cache")
    assert figures["bytes_read_per_token"] == pytest.approx(figures["kernel_bytes_read_per_token"], rel=0.02)


def test_relu2_reads_less_than_a_sixth(
    swiglu: RealModel, relu2: RealModel, decoded: Callable[[RealModel], Decoded]
) -> None:
    """At the same CETT and with the same share of the FFN in slots."""
    gated, sparse = (decoded(m).figures["bytes_read_per_token"] for m in (swiglu, relu2))
    assert sparse < gated / 6


def test_sparse_chat_answers_sensibly(swiglu: RealModel) -> None:
    options = LoadOptions(cett=0.05, ffn_cache=FfnCache.parse("30%"), max_model_len=512)
    loaded = load(str(swiglu.packed), options, quiet)
    loaded.engine.start()
    try:
        parts = render_chat(loaded.tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
        ids = tuple(loaded.tokenizer.encode_parts(parts))
        request = Request("chat", ids, SamplingParams(max_tokens=24, temperature=0.0))
        answer = [e.token_id for e in loaded.engine.generate(request) if e.token_id is not None]
        assert "scattering" in loaded.tokenizer.decode(answer)
    finally:
        loaded.engine.shutdown(0)
        loaded.close()
