"""The plan keeps its promise: nothing exceeds any budget, the smallest works, and one byte less is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from cache.budget import HostMemory, smallest_staging_bytes
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import BudgetError, ColdstreamError, UnsupportedError
from runtime.config import ModelConfig
from runtime.plan import FfnCache, ModelSizes, Plan, PlanOptions, make_plan

GIB, MIB = 1 << 30, 1 << 20
PROCESS = 250 * MIB
HOST = HostMemory(24 * GIB, 20 * GIB, None, "MemAvailable")

SMOL = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    hidden_act="relu2",
    gated=True,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    attention_bias=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bf16",
)
LARGE = replace(
    SMOL,
    model_type="arcee",
    vocab_size=128004,
    hidden_size=2560,
    intermediate_size=18432,
    num_hidden_layers=36,
    num_attention_heads=20,
    num_key_value_heads=4,
    head_dim=128,
    gated=False,
    max_position_embeddings=65536,
    tie_word_embeddings=False,
)
TINY = replace(
    SMOL,
    vocab_size=97,
    hidden_size=33,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=11,
    max_position_embeddings=128,
)

LAYOUT = BundleLayout.make(LARGE.hidden_size, LARGE.gated, BundleDtype.BF16)


def plan(
    config: ModelConfig = SMOL,
    options: PlanOptions | None = None,
    bundles: str = "bf16",
    host: HostMemory = HOST,
    process: int = PROCESS,
) -> Plan:
    layout = BundleLayout.make(config.hidden_size, config.gated, BundleDtype(bundles))
    return make_plan(config, layout, options or PlanOptions(), host, process)


def check(made: Plan, config: ModelConfig) -> None:
    """What holds of every plan."""
    uses = made.uses()
    assert sum(uses.values()) + made.unused_bytes == made.budget_bytes
    assert made.unused_bytes >= 0
    assert min(uses.values()) >= 0
    assert sum(made.details.values()) == sum(uses.values())
    assert {name.partition(".")[0] for name in made.details} == set(uses)
    assert made.smallest_budget_bytes <= made.budget_bytes
    assert len(made.slots_per_layer) == config.num_hidden_layers
    assert max(made.slots_per_layer) <= config.intermediate_size
    assert max(made.slots_per_layer) - min(made.slots_per_layer) <= 1
    stride = made.ffn_bytes // (config.num_hidden_layers * config.intermediate_size)
    assert sum(made.slots_per_layer) * stride == made.slab_bytes <= made.ffn_bytes
    assert made.kv_blocks * made.block_size >= made.max_model_len
    assert made.staging_bytes % 8192 == 0
    assert 0 <= made.num_spare_slots * stride == made.spare_bytes <= made.details["scratch.step"]
    assert made.num_slots + made.num_spare_slots <= config.num_hidden_layers * config.intermediate_size


@pytest.mark.parametrize("config", [SMOL, LARGE, TINY], ids=["smol", "large", "tiny"])
@pytest.mark.parametrize("mode", ["sparse", "exact", "dense"])
@pytest.mark.parametrize("bundles", ["bf16", "fp32", "int8"])
def test_any_budget_is_kept(config: ModelConfig, mode: str, bundles: str) -> None:
    dice = random.Random(f"{config.hidden_size}{mode}{bundles}")
    for _ in range(40):
        options = PlanOptions(
            memory_bytes=dice.randrange(200 * MIB, 24 * GIB),
            mode=mode,
            dtype=dice.choice(["auto", "bf16", "fp32"]),
            ffn_cache=dice.choice(
                [None, FfnCache(percent=dice.uniform(0, 100)), FfnCache(num_bytes=dice.randrange(GIB))]
            ),
            max_num_seqs=dice.randint(1, 32),
            max_model_len=dice.choice([None, 17, config.max_position_embeddings]),
        )
        try:
            check(plan(config, options, bundles), config)
        except BudgetError as error:
            assert error.smallest_bytes > (options.memory_bytes or 0)


@pytest.mark.parametrize("config", [SMOL, LARGE, TINY], ids=["smol", "large", "tiny"])
@pytest.mark.parametrize("cache", [None, FfnCache(percent=30.0)], ids=["free", "30%"])
def test_smallest_budget_works_and_one_byte_less_is_refused(config: ModelConfig, cache: FfnCache | None) -> None:
    smallest = plan(config, PlanOptions(ffn_cache=cache)).smallest_budget_bytes
    assert smallest % MIB == 0
    made = plan(config, PlanOptions(memory_bytes=smallest, ffn_cache=cache))
    check(made, config)
    assert made.unused_bytes < 4 * MIB or made.slab_bytes or made.details["scratch.loading"]
    with pytest.raises(BudgetError) as caught:
        plan(config, PlanOptions(memory_bytes=smallest - 1, ffn_cache=cache))
    assert caught.value.smallest_bytes == smallest
    assert f"--memory {smallest >> 20}MiB" in str(caught.value)


def test_more_memory_never_means_fewer_slots_at_the_same_context() -> None:
    shares = []
    for memory in range(4500 * MIB, 16 * GIB, 512 * MIB):
        made = plan(LARGE, PlanOptions(memory_bytes=memory, max_model_len=2048))
        shares.append(made.ffn_cache_share)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_what_prompts_need_holds_neurons_between_them() -> None:
    made = plan(LARGE, PlanOptions(memory_bytes=6 * GIB, max_num_seqs=1))
    assert 0.5 < made.spare_bytes / made.details["scratch.step"] < 1
    many = plan(LARGE, PlanOptions(memory_bytes=6 * GIB, max_num_seqs=128))
    assert many.spare_bytes < made.spare_bytes  # a step of all of them is wider
    for options in (PlanOptions(mode="dense"), PlanOptions(ffn_cache=FfnCache.parse("10%"))):
        assert plan(LARGE, replace(options, memory_bytes=12 * GIB)).num_spare_slots == 0
    assert plan(SMOL).num_spare_slots == 0  # everything has a slot of its own


def test_plenty_of_memory_holds_everything() -> None:
    made = plan(SMOL, PlanOptions(max_num_seqs=3))
    assert made.slots_per_layer == (1536,) * 30
    assert made.ffn_cache_share == 1.0
    assert made.max_model_len == 4096
    assert made.kv_blocks == 3 * 4096 // 16
    assert made.notes == ()
    assert made.staging_bytes >= 1536 * 3520  # a layer's misses at once


def test_context_shrinks_with_the_budget_and_says_so() -> None:
    smallest = plan().smallest_budget_bytes
    made = plan(options=PlanOptions(memory_bytes=smallest + 8 * MIB))
    assert made.max_model_len < 4096
    assert any(f"the context is {made.max_model_len} tokens instead of 4096" in note for note in made.notes)
    asked = PlanOptions(memory_bytes=smallest + 8 * MIB, max_model_len=4096)
    with pytest.raises(BudgetError, match=r"--max-model-len 4096; the smallest that works is --memory [0-9]+MiB"):
        plan(options=asked)


def test_ffn_cache_overrides_the_share() -> None:
    made = plan(options=PlanOptions(ffn_cache=FfnCache.parse("30%")))
    assert sum(made.slots_per_layer) == int(30 * 1536 * 0.3)
    assert made.ffn_cache_share == pytest.approx(0.3, abs=1e-3)
    sized = plan(options=PlanOptions(ffn_cache=FfnCache.parse("16MiB")))
    assert 16 * MIB - 3520 < sized.slab_bytes <= 16 * MIB
    everything = plan(options=PlanOptions(ffn_cache=FfnCache.parse("1TiB")))
    assert everything.ffn_cache_share == 1.0
    nothing = plan(options=PlanOptions(ffn_cache=FfnCache.parse("0%")))
    assert sum(nothing.slots_per_layer) == 0
    assert any("no FFN neuron" in note for note in nothing.notes)
    with pytest.raises(BudgetError, match="--ffn-cache 100%"):
        plan(LARGE, PlanOptions(memory_bytes=6 * GIB, ffn_cache=FfnCache.parse("100%")))


@pytest.mark.parametrize("text", ["-1%", "101%", "x%", "%", "nan%", "1.5", "", "lots"])
def test_ffn_cache_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a s"):
        FfnCache.parse(text)


def test_ffn_cache_reads_and_writes() -> None:
    assert FfnCache.parse(" 12.5% ") == FfnCache(percent=12.5)
    assert FfnCache.parse("1GiB") == FfnCache(num_bytes=GIB)
    assert [str(FfnCache.parse(t)) for t in ("30%", "1GiB")] == ["30%", "1GiB"]


def test_bytes_by_hand() -> None:
    made = plan(SMOL, PlanOptions(mode="sparse", max_model_len=1000, max_num_seqs=1))
    neurons = 30 * 1536
    assert made.num_pinned == 0 and made.predictor_bytes == 30 * (1536 * (2 * (123 + 6) + 2) + 6 * 576 + 16)
    half = plan(SMOL, PlanOptions(mode="sparse", ffn_cache=FfnCache.parse("35%")))
    assert half.num_pinned == round(0.3 * 1536)  # the largest that the slots hold
    most = plan(SMOL, PlanOptions(mode="sparse", ffn_cache=FfnCache.parse("60%")))
    assert most.num_pinned == round(0.1 * 1536)  # the largest that hides behind what is read
    assert half.predictor_bytes == 30 * ((1536 - half.num_pinned) * (2 * (123 + 6) + 2 + 4) + 6 * 576 + 16)
    assert made.kv_bytes == 2 * 30 * 3 * 64 * 2 * 63 * 16  # 63 blocks hold 1,000 tokens
    assert made.details["resident.embedding"] == 49152 * 576 * 2
    assert made.details["resident.head"] == 0
    assert made.details["resident.attention"] == 30 * (576 * 576 * 2 + 576 * 192 * 2) * 2
    assert made.details["process.measured"] == PROCESS
    assert made.disk_bytes > made.ffn_bytes + made.predictor_bytes
    assert plan(SMOL, PlanOptions(mode="dense")).predictor_bytes == 0
    assert plan(SMOL, PlanOptions(mode="exact")).predictor_bytes == neurons * 576 * 2
    odd = plan(TINY, PlanOptions(ffn_cache=FfnCache.parse("35%")))
    assert odd.predictor_bytes == 2 * ((64 - 19) * (2 * (8 + 6) + 2 + 4) + 6 * 33 + 16)
    assert plan(LARGE).predictor_bytes <= 36 * 18432 * (544 + 6 + 6) + 36 * 6 * 2560 + 36 * 16
    assert plan(LARGE).details["resident.head"] == 128004 * 2560 * 2
    assert plan(LARGE).details["resident.embedding"] == 0  # its rows are read when they are needed
    quantised = plan(replace(LARGE, dtype="q8_0"))
    assert quantised.details["resident.embedding"] == quantised.details["resident.head"]
    assert plan(replace(SMOL, attention_bias=True)).resident_bytes > plan(SMOL).resident_bytes


def test_embedding_and_head_are_priced_as_they_are_stored() -> None:
    fp32 = LARGE.vocab_size * LARGE.hidden_size * 4
    plain, quantised = plan(LARGE), plan(replace(LARGE, embedding_dtype="q6_k"))
    assert plain.details["resident.embedding"] == 0 and quantised.details["resident.embedding"] == fp32 // 2
    assert plan(replace(LARGE, dtype="q4_k", embedding_dtype="fp16")).details["resident.embedding"] == 0
    for change in ({"embedding_dtype": "q6_k"}, {"head_dtype": "q6_k"}):  # in fp32 until it is bf16
        sizes = ModelSizes(replace(LARGE, **change), LAYOUT, PlanOptions(), [])  # type: ignore[arg-type]
        assert sizes.load_bytes() - replace(sizes, config=LARGE).load_bytes() == fp32


def test_dtype_follows_the_checkpoint_unless_asked() -> None:
    assert plan(SMOL).dtype == "bf16"
    assert plan(replace(SMOL, dtype="q4_1")).dtype == "bf16"
    assert plan(replace(SMOL, dtype="fp32")).dtype == "fp32"
    wide = plan(SMOL, PlanOptions(dtype="fp32"))
    assert wide.kv_bytes == 2 * plan(SMOL).kv_bytes
    assert wide.details["resident.embedding"] == 49152 * 576 * 4


def test_default_budget_is_the_cgroup_less_a_margin() -> None:
    made = plan(host=HostMemory(24 * GIB, 20 * GIB, 2 * GIB, "box/memory.max"))
    assert made.budget_bytes == 2 * GIB - 128 * MIB
    assert made.budget_source == "box/memory.max"
    with pytest.raises(BudgetError, match=r"448MiB of memory \(box/memory.max\) is too small"):
        plan(host=HostMemory(24 * GIB, 20 * GIB, 512 * MIB, "box/memory.max"))


def test_a_promise_above_the_limit_is_refused() -> None:
    limited = HostMemory(24 * GIB, 20 * GIB, 2 * GIB, "box/memory.max")
    assert plan(options=PlanOptions(memory_bytes=2 * GIB), host=limited).budget_bytes == 2 * GIB
    with pytest.raises(ColdstreamError, match=f"--memory 3GiB .*: more than the {2 * GIB} bytes that the cgroup"):
        plan(options=PlanOptions(memory_bytes=3 * GIB), host=limited)
    with pytest.raises(ColdstreamError, match=f"--memory 30GiB .*: more than the {24 * GIB} bytes that this host has"):
        plan(options=PlanOptions(memory_bytes=30 * GIB))
    rounded = plan(options=PlanOptions(memory_bytes=2 * GIB + 4095), host=limited)  # as the kernel rounds a limit
    assert rounded.budget_bytes == 2 * GIB
    busy = plan(options=PlanOptions(memory_bytes=22 * GIB))
    assert any("are free now" in note for note in busy.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PlanOptions(gpu_memory_bytes=GIB), "--gpu-memory"),
        (PlanOptions(mode="fast"), "--mode fast"),
        (PlanOptions(dtype="fp8"), "--dtype fp8"),
        (PlanOptions(max_num_seqs=0), "--max-num-seqs 0"),
        (PlanOptions(max_model_len=0), "--max-model-len 0"),
        (PlanOptions(max_model_len=8193), "--max-model-len 8193: from 1 to 8192"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: PlanOptions, words: str) -> None:
    with pytest.raises(ColdstreamError, match=words):
        plan(options=options)


def test_gpu_memory_is_unsupported_not_ignored() -> None:
    with pytest.raises(UnsupportedError):
        plan(options=PlanOptions(gpu_memory_bytes=1))


def test_json_round_trips_and_metrics_levels_agree() -> None:
    made = plan()
    data = json.loads(json.dumps(made.to_json()))
    assert data["tiers"]["cpu"] == made.uses()
    assert data["smallest_budget_bytes"] == made.smallest_budget_bytes
    assert sum(data["details"].values()) + data["unused_bytes"] == data["budget_bytes"]
    levels = made.memory_levels()
    assert levels.budget_bytes == {"cpu": made.budget_bytes}
    assert levels.used_bytes["cpu", "slots"] == made.slab_bytes


def test_staging_is_never_below_what_the_cache_needs() -> None:
    layout = BundleLayout.make(2560, False, BundleDtype.BF16)
    smallest = plan(LARGE).smallest_budget_bytes
    assert plan(LARGE, PlanOptions(memory_bytes=smallest)).staging_bytes >= smallest_staging_bytes(layout)


def test_when_the_process_is_measured_does_not_matter() -> None:
    """`plan` measures another process than `serve`, and `serve` goes on importing: one smallest budget all the same."""
    found = {plan(process=measured * MIB).smallest_budget_bytes for measured in (150, 226, 253, 293)}
    assert len(found) == 1
    large = plan(process=400 * MIB)
    assert large.smallest_budget_bytes > found.pop()
    assert large.details["process.growth"] > 0


def test_a_step_is_priced_by_its_largest_phase() -> None:
    """Attention, FFN and scored logits follow each other; a scored prompt's logits are the most at a short context."""
    made = plan(options=PlanOptions(max_model_len=256, memory_bytes=plan().smallest_budget_bytes + 64 * MIB))
    logits = 128 * 49152 * 10
    assert logits < made.details["scratch.step"] < logits + 16 * MIB
    longer = plan(options=PlanOptions(max_model_len=8192))
    assert longer.details["scratch.step"] > 2 * 8192 * 3 * 64 * (4 + 2)  # keys and values, gathered and widened


def test_a_sparse_layer_has_room_for_its_misses_before_there_are_slots() -> None:
    smallest = plan(LARGE, PlanOptions(mode="sparse")).smallest_budget_bytes
    made = plan(LARGE, PlanOptions(mode="sparse", memory_bytes=smallest + 96 * MIB))
    assert made.staging_bytes >= 18432 * 10248 // 4


def test_attention_is_streamed_where_it_does_not_fit() -> None:
    slow = plan(LARGE, PlanOptions(mode="sparse", memory_bytes=plan(LARGE).smallest_budget_bytes))
    attention = plan(LARGE).details["resident.attention"]
    assert slow.streamed_bytes == attention and slow.details["resident.attention"] == attention * 4 // 36
    assert any("every step reads" in note for note in slow.notes)
    quantised = replace(LARGE, dtype="q8_0")
    assert plan(quantised, PlanOptions(memory_bytes=plan(quantised).smallest_budget_bytes)).streamed_bytes == 0
