"""The plan of a GPU keeps both promises: no tier exceeds its budget, the smallest works, and one byte less is refused.

No GPU: devices are made up.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from cache.budget import HostMemory
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import BudgetError, ColdstreamError
from runtime.config import ModelConfig
from runtime.gpu_plan import DeviceMemory, GpuPlan, check_free, make_gpu_plan
from runtime.plan import FfnCache, PlanOptions, sketch_sizes
from tests.test_plan import GIB, LARGE, MIB, PROCESS, SMOL, TINY

HOST = HostMemory(128 * GIB, 120 * GIB, None, "MemAvailable")
CARD = DeviceMemory("Card", 80 * GIB, 79 * GIB)


def plan(
    config: ModelConfig = SMOL,
    options: PlanOptions | None = None,
    bundles: str = "bf16",
    host: HostMemory = HOST,
    device: DeviceMemory = CARD,
) -> GpuPlan:
    layout = BundleLayout.make(config.hidden_size, config.gated, BundleDtype(bundles))
    return make_gpu_plan(config, layout, options or PlanOptions(), host, device, PROCESS)


def check(made: GpuPlan, config: ModelConfig) -> None:
    """What holds of every plan."""
    for tier, budget in made.budgets().items():
        assert sum(made.uses()[tier].values()) + made.unused()[tier] == budget
        assert made.unused()[tier] >= 0 and min(made.uses()[tier].values()) >= 0
    assert made.smallest_gpu_bytes <= made.gpu_budget_bytes
    assert made.smallest_memory_bytes <= made.memory_budget_bytes
    stride = made.ffn_bytes // (config.num_hidden_layers * config.intermediate_size)
    assert sum(made.slots_per_layer) * stride == made.slab_bytes <= made.ffn_bytes
    assert max(made.slots_per_layer) <= config.intermediate_size
    assert sum(made.slots_per_layer) >= made.num_pinned * config.num_hidden_layers
    assert made.kv_blocks * made.block_size >= made.max_model_len
    assert made.staging_bytes % stride == 0 and made.gpu_details["staging.buffers"] == 2 * made.staging_bytes
    assert 1 <= made.prefill_chunk <= made.max_model_len
    assert made.decode_buckets[-1] >= min(16, made.max_num_seqs) and made.decode_buckets[0] == 1
    if made.home_on_disk:
        below = sum(made.memory_slots_per_layer)
        assert made.memory_details["slots.records"] == below * stride < made.ffn_bytes
        assert made.memory_details["staging.buffer"] == made.memory_staging_bytes
        assert below + sum(made.slots_per_layer) <= config.num_hidden_layers * config.intermediate_size
        assert made.memory_budget_bytes < made.home_memory_bytes
        assert any(f"--memory {made.home_memory_bytes >> 20}MiB would hold all" in note for note in made.notes)
    else:
        assert made.memory_details["home.records"] == made.ffn_bytes and not made.memory_slots_per_layer


@pytest.mark.parametrize("config", [SMOL, LARGE, TINY], ids=["smol", "large", "tiny"])
@pytest.mark.parametrize("mode", ["sparse", "exact", "dense"])
def test_any_budget_is_kept(config: ModelConfig, mode: str) -> None:
    dice = random.Random(f"{config.hidden_size}{mode}")
    for _ in range(60):
        options = PlanOptions(
            memory_bytes=dice.randrange(2 * GIB, 40 * GIB),
            gpu_memory_bytes=dice.choice([None, dice.randrange(GIB, 24 * GIB)]),
            mode=mode,
            dtype=dice.choice(["auto", "bf16", "fp32"]),
            ffn_cache=dice.choice([None, FfnCache(percent=dice.uniform(0, 100))]),
            max_num_seqs=dice.randint(1, 32),
            max_model_len=dice.choice([None, 17, config.max_position_embeddings]),
        )
        try:
            check(plan(config, options, dice.choice(["bf16", "fp32", "int8"])), config)
        except BudgetError as error:
            assert error.smallest_bytes > 0 and "the smallest that works is --" in str(error)


@pytest.mark.parametrize("config", [SMOL, LARGE, TINY], ids=["smol", "large", "tiny"])
@pytest.mark.parametrize("cache", [None, FfnCache(percent=20.0)], ids=["free", "20%"])
def test_smallest_budgets_work_and_one_byte_less_is_refused(config: ModelConfig, cache: FfnCache | None) -> None:
    free = plan(config, PlanOptions(ffn_cache=cache))
    gpu, memory = free.smallest_gpu_bytes, free.smallest_memory_bytes
    assert gpu % MIB == memory % MIB == 0
    check(plan(config, PlanOptions(gpu_memory_bytes=gpu, memory_bytes=memory, ffn_cache=cache)), config)
    with pytest.raises(BudgetError, match=f"is too small .*; the smallest that works is --gpu-memory {gpu >> 20}MiB"):
        plan(config, PlanOptions(gpu_memory_bytes=gpu - 1, ffn_cache=cache))
    with pytest.raises(BudgetError, match=f"even with the records .* on disk; .* --memory {memory >> 20}MiB") as caught:
        plan(config, PlanOptions(memory_bytes=memory - 1, ffn_cache=cache))
    assert caught.value.smallest_bytes == memory


def test_main_memory_that_cannot_hold_the_home_leaves_it_on_disk() -> None:
    free = plan(LARGE, PlanOptions(max_model_len=2048))
    home, smallest = free.home_memory_bytes, free.smallest_memory_bytes
    assert not free.home_on_disk and smallest < home - 0.9 * free.ffn_bytes
    gpu = PlanOptions(gpu_memory_bytes=8 * GIB, max_model_len=2048, reads_ahead=False)
    at_home, without = (plan(LARGE, replace(gpu, memory_bytes=n)) for n in (home, home - 1))
    assert not at_home.home_on_disk and without.home_on_disk
    assert at_home.uses()["gpu"] == without.uses()["gpu"] and at_home.num_pinned == without.num_pinned
    tight = [plan(LARGE, replace(gpu, memory_bytes=n)) for n in range(smallest, home, GIB)]
    for made in tight:
        check(made, LARGE)
    shares = [sum(made.memory_slots_per_layer) for made in tight]
    assert shares == sorted(shares) and shares[0] < 0.05 * 36 * 18432
    assert tight[-1].memory_staging_bytes > 18432 * 10304  # a whole layer


def test_more_gpu_memory_never_means_fewer_slots() -> None:
    smallest = plan(LARGE, PlanOptions(max_model_len=2048)).smallest_gpu_bytes
    budgets = range(smallest, 16 * GIB, 512 * MIB)
    shares = [
        plan(LARGE, PlanOptions(gpu_memory_bytes=b, max_model_len=2048, mode="dense")).ffn_cache_share for b in budgets
    ]
    assert shares == sorted(shares) and shares[0] < 0.05 and shares[-1] == 1.0


def test_bytes_by_hand() -> None:
    made = plan(LARGE, PlanOptions(gpu_memory_bytes=8 * GIB, max_num_seqs=4, ffn_cache=FfnCache.parse("20%")))
    stride = BundleLayout.make(2560, False, BundleDtype.BF16).stride
    assert made.slab_bytes == int(36 * 18432 * 0.2) * stride
    assert made.gpu_details["resident.attention"] == 36 * 2 * (20 * 128 + 4 * 128) * 2560 * 2
    assert made.gpu_details["resident.head"] == 128004 * 2560 * 2
    assert made.kv_blocks == made.max_model_len // 16 * 4
    assert made.gpu_details["kv.blocks"] == 2 * 36 * 4 * 128 * 2 * made.max_model_len * 4
    assert made.prefill_chunk == 2048 and made.staging_bytes == 18432 * stride and made.decode_buckets == (1, 2, 4)
    assert made.num_pinned == round(0.2 * 18432)
    rest = made.gpu_details["resident.attention"] + made.gpu_details["resident.head"]
    assert made.multiplied_bytes == rest + made.gpu_details["predictor.weights"]


def test_matrices_that_are_widened_for_prompts_are_priced() -> None:
    made = {b: plan(LARGE, PlanOptions(ffn_cache=FfnCache(percent=0)), b) for b in ("bf16", "fp32", "int8")}
    prefill = {b: p.gpu_details["scratch.prefill"] for b, p in made.items()}
    assert len({(p.prefill_chunk, p.max_model_len, p.decode_buckets) for p in made.values()}) == 1
    assert prefill["fp32"] - prefill["bf16"] == 18432 * 2560 * 2
    assert prefill["int8"] - prefill["bf16"] == 18432 * 2560 * (4 + 4 + 2)


def test_a_predictor_passes_through_main_memory() -> None:
    made = {mode: plan(LARGE, PlanOptions(max_model_len=2048, mode=mode)) for mode in ("dense", "exact", "sparse")}
    loading = {mode: p.memory_details["scratch.loading"] for mode, p in made.items()}
    assert loading["exact"] - loading["dense"] == 18432 * 2560 * 2  # one layer's gates
    whole = sum(s.other_bytes + 18432 * s.row_bytes for s in sketch_sizes(LARGE))
    assert loading["sparse"] - loading["dense"] == whole + 2 * whole // 36


def test_the_default_is_what_the_card_has_left() -> None:
    busy = plan(device=DeviceMemory("Card", 80 * GIB, 10 * GIB))
    assert busy.gpu_budget_source == "free GPU memory" and 9 * GIB < busy.gpu_budget_bytes < 11 * GIB
    asked = plan(options=PlanOptions(gpu_memory_bytes=20 * GIB), device=DeviceMemory("Card", 80 * GIB, 10 * GIB))
    assert any("the GPU budget is 20GiB, but only" in note for note in asked.notes)
    with pytest.raises(
        BudgetError, match=r"--gpu-memory 20GiB: only 10.8GiB \(\d+ bytes\) of Card are free now; .*--device"
    ):
        check_free(asked, DeviceMemory("Card", 80 * GIB, 10 * GIB))
    check_free(busy, DeviceMemory("Card", 80 * GIB, 10 * GIB))
    with pytest.raises(ColdstreamError, match=rf"--gpu-memory 90GiB .*: more than the {80 * GIB} bytes that Card has"):
        plan(options=PlanOptions(gpu_memory_bytes=90 * GIB))
    with pytest.raises(BudgetError, match=r"of memory \(free GPU memory\) is too small"):
        plan(device=DeviceMemory("Card", 80 * GIB, 64 * MIB))


def test_a_card_that_is_not_here_has_what_is_asked_of_it() -> None:
    made = plan(options=PlanOptions(gpu_memory_bytes=6 * GIB), device=DeviceMemory.assumed(6 * GIB))
    assert made.gpu_budget_bytes == 6 * GIB and made.device == "not here"
    assert not any("free now" in note for note in made.notes)


def test_a_tight_budget_shrinks_context_rows_and_staging_and_says_so() -> None:
    smallest = plan(LARGE).smallest_gpu_bytes
    made = plan(LARGE, PlanOptions(gpu_memory_bytes=smallest + 64 * MIB))
    check(made, LARGE)
    assert made.max_model_len < 4096 and made.staging_bytes < 18432 * 10304 and made.prefill_chunk < 2048
    assert any(f"the context is {made.max_model_len} tokens instead of 4096" in note for note in made.notes)
    tight = PlanOptions(memory_bytes=plan(SMOL, PlanOptions(max_num_seqs=32)).smallest_memory_bytes, max_num_seqs=32)
    assert plan(SMOL, tight).max_model_len == 256  # a long context's requests do not fit main memory


@pytest.mark.parametrize(
    ("seqs", "buckets"), [(1, (1,)), (3, (1, 2, 4)), (16, (1, 2, 4, 8, 16)), (99, (1, 2, 4, 8, 16))]
)
def test_buckets_reach_the_number_of_sequences(seqs: int, buckets: tuple[int, ...]) -> None:
    assert plan(options=PlanOptions(max_num_seqs=seqs)).decode_buckets == buckets


def test_json_round_trips_and_metrics_levels_agree() -> None:
    made = plan(replace(SMOL, dtype="fp32"))
    data = json.loads(json.dumps(made.to_json()))
    assert set(data["tiers"]) == {"gpu", "cpu", "disk"} and data["tiers"]["gpu"] == made.uses()["gpu"]
    assert sum(data["gpu_details"].values()) + data["unused_bytes"]["gpu"] == data["gpu_budget_bytes"]
    levels = made.memory_levels()
    assert levels.budget_bytes == {"gpu": made.gpu_budget_bytes, "cpu": made.memory_budget_bytes}
    assert levels.used_bytes["gpu", "slots"] == made.slab_bytes and levels.used_bytes["cpu", "home"] == made.ffn_bytes
    with pytest.raises(ColdstreamError, match="--mode fast"):
        plan(options=PlanOptions(mode="fast"))


# -- records that come before they are wanted --------------------------------------------------------------------------


def early(config: ModelConfig = LARGE, percent: float | None = 20, **options: Any) -> GpuPlan:
    cache = None if percent is None else FfnCache(percent=percent)
    return plan(config, PlanOptions(**{"gpu_memory_bytes": 16 * GIB, "ffn_cache": cache, "max_num_seqs": 1} | options))


def test_records_that_come_early_are_priced_and_as_many_for_each_program() -> None:
    made = early()
    stride = made.ffn_bytes // (LARGE.num_hidden_layers * LARGE.intermediate_size)
    assert made.num_early > 0 and 2 * made.num_early * stride < made.gpu_details["staging.early"]
    programs = pytest.importorskip("runtime.kernels.triton_ahead").programs
    assert all(made.num_early % programs(size) == 0 for size in (stride, 4 * stride, 1 << 20))


@pytest.mark.parametrize(
    "options",
    [{"mode": "dense"}, {"mode": "exact"}, {"reads_ahead": False}, {"percent": 100}, {"memory_bytes": 8 * GIB}],
    ids=lambda options: next(iter(options)),
)
def test_nothing_comes_early_where_nothing_is_read_ahead(options: dict[str, Any]) -> None:
    made = early(**options)
    assert made.num_early == 0 and made.gpu_details["staging.early"] == 0


def test_small_layers_and_long_vectors_are_not_read_ahead() -> None:
    pytest.importorskip("triton")
    from runtime.kernels.triton_neurons import LONGEST

    assert early(SMOL).num_early == 0
    heads = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert early(replace(LARGE, hidden_size=LONGEST, **heads), gpu_memory_bytes=32 * GIB).num_early > 0
    assert early(replace(LARGE, hidden_size=LONGEST + 128, **heads), gpu_memory_bytes=32 * GIB).num_early == 0


def test_a_budget_that_holds_all_neurons_is_not_spent_on_reading_ahead() -> None:
    def least(reads_ahead: bool) -> int:
        low, high = 6 * GIB, 24 * GIB
        while low < high:
            middle = (low + high) // 2
            made = early(percent=None, gpu_memory_bytes=middle, reads_ahead=reads_ahead, max_model_len=2048)
            low, high = (low, middle) if made.ffn_cache_share == 1 else (middle + 1, high)
        return low

    assert least(True) == least(False)
