"""What of benchmarks/gpu.py needs no GPU: results that survive failures, counting, metrics, models taken apart."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import counted
from benchmarks.gpu_decode import Counted, measure_decode
from benchmarks.gpu_dense import Attention, multiply, random_layer
from benchmarks.gpu_floors import Bandwidths, floor_s, reference_misses, steps_of
from benchmarks.gpu_parts import join, write_parts, write_records
from benchmarks.gpu_peers import decode_times, random_model
from benchmarks.gpu_reference import add_reference
from benchmarks.gpu_results import Results
from benchmarks.gpu_serving import gpu_metrics
from benchmarks.gpu_shapes import shape_plan, weight_cap
from benchmarks.make_checkpoint import SHAPES
from benchmarks.rerank import compare
from benchmarks.traces import ROW_STEP, Replay
from cache.bundle import BundleDtype, BundleLayout
from clients.scrape import Scrape
from runtime.ffn import DenseFFN
from runtime.load import prepare
from runtime.packed import BUNDLES, open_packed, sha256
from tests.conftest import TinyModel
from tests.test_traces import NEURONS, TOKENS, make_trace


def test_every_step_is_written_and_a_failure_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, calls = Results(tmp_path / "gpu.json"), []

    def measure() -> dict[str, object]:
        calls.append(1)
        return {"x": 1}

    def fail() -> dict[str, object]:
        raise RuntimeError("no such kernel")

    assert results.step("bad", fail) is None
    assert "no such kernel" in capsys.readouterr().err
    assert results.step("good", measure) is not None
    assert results.step("late", measure, deadline_s=time.monotonic() - 1) is None
    again = Results(tmp_path / "gpu.json")
    assert again.has("good") and not again.has("late") and len(calls) == 1
    found = again.step("good", measure)
    assert found is not None and found["x"] == 1 and len(calls) == 1  # kept from the run before
    assert again.step("bad", measure) is None and len(calls) == 1  # not tried again by the same run
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert set(data["steps"]) == {"good"} and "no such kernel" in data["errors"]["bad"]["traceback"]


@pytest.mark.parametrize(
    ("output", "passed", "failed", "skipped"),
    [
        ("...\n3 passed, 400 deselected in 2.10s", 3, 0, 0),
        ("==== 1 failed, 2 passed, 4 skipped in 2.10s ====", 2, 1, 4),
        ("no tests ran in 0.10s", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_pytest_is_counted(output: str, passed: int, failed: int, skipped: int) -> None:
    found = counted(output)
    assert (found["passed"], found["failed"], found["skipped"]) == (passed, failed, skipped)


def test_metrics_of_the_gpu_tier_are_increases_that_never_fall() -> None:
    def scrape(at_s: float, lookups: int) -> Scrape:
        lines = [
            f'coldstream_neuron_cache_lookups_total{{tier="gpu"}} {lookups}',
            'coldstream_neuron_cache_lookups_total{tier="cpu"} 5',
            f'coldstream_transfer_bytes_total{{src="cpu",dst="gpu"}} {lookups * 100}',
            'coldstream_memory_budget_bytes{tier="gpu"} 1024',
        ]
        text = "# TYPE coldstream_neuron_cache_lookups counter\n# TYPE coldstream_transfer_bytes counter\n"
        return Scrape.parse(text + "\n".join(lines) + "\n", at_s)

    found = gpu_metrics([scrape(0, 10), scrape(1, 30), scrape(2, 70)])
    assert (found["lookups"], found["transfer_bytes"], found["budget_bytes"], found["fell"]) == (60, 6000, 1024, 0)
    assert gpu_metrics([scrape(0, 30), scrape(1, 10)])["fell"] == 1


def test_parts_are_kept_until_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_parts.PART_BYTES", 10)
    assert write_parts(b"0123456789abcdefghijXYZ", tmp_path / "out") == 3
    assert (tmp_path / "out" / "2").is_dir()
    for part in (1, 2):
        (tmp_path / "came").mkdir(exist_ok=True)
        (tmp_path / "out" / str(part)).rename(tmp_path / "came" / str(part))
    assert join(tmp_path / "came", tmp_path / "work") == {"missing": 1}
    assert join(tmp_path / "absent", tmp_path / "work") == {"missing": 1}


def test_records_written_anew_are_those_that_were_packed(tiny_relu2: TinyModel, tmp_path: Path) -> None:
    packed = prepare(
        str(tiny_relu2.checkpoint), tmp_path / "packed", tiny_relu2.text, None, "auto", False, lambda w, s: None
    )
    digest, moved = sha256(packed / BUNDLES), tmp_path / "moved"
    (packed / BUNDLES).unlink()
    moved.symlink_to(tiny_relu2.checkpoint)
    write_records(packed, moved, digest)
    assert open_packed(packed).source.path == str(moved)
    with pytest.raises(SystemExit, match="not those that were packed"):
        write_records(packed, moved, "0" * 64)


def test_a_floor_is_bytes_over_the_nearest_records_bandwidth() -> None:
    ceilings = {
        "zero_copy_bytes_per_s": {"4096": 10.0, "10304": 50.0},
        "read_bytes_per_s": {"4096": 100.0, "10304": 1000.0},
    }
    found = Bandwidths.of(ceilings, 10248)
    assert (found.zero_copy, found.read) == (50.0, 1000.0)
    assert floor_s(100, 3000, found) == 5.0


def test_reference_misses_by_hand() -> None:
    """Without slots everything misses, with all nothing; a batch's union counts once."""
    trace, active = make_trace(layers=1)
    replay = Replay(trace, 1, NEURONS)
    assert reference_misses(replay, [0], 5, 10) == active[0, 5:15].sum() / 10
    assert reference_misses(replay, [NEURONS], 5, 10) == 0
    some = reference_misses(replay, [NEURONS // 2], 5, 10)
    assert 0 < some < active[0, 5:15].sum() / 10
    both = [np.flatnonzero(active[0, t] | active[0, (t + ROW_STEP) % TOKENS]).size for t in range(10)]
    assert reference_misses(replay, [0], 0, 10, rows=2) == sum(both) / 10


def test_ranking_anew_at_every_token_is_the_reference_and_seldom_swaps_less() -> None:
    trace, _ = make_trace(layers=1)
    replay = Replay(trace, 1, NEURONS)
    found = compare(replay, 0.5, [0], 200)
    assert found["every 1"] == 1.0
    assert found["swapped at 64"] < found["swapped at 8"] < found["swapped at 1"]


@torch.no_grad()
def test_the_peers_model_decodes_finite_numbers() -> None:
    model, config = random_model(SHAPES["tiny"], 320, device="cpu")
    assert config.num_hidden_layers == 2 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits.float()).all()
    assert len(decode_times(model, 320, device="cpu")) == 5


def test_a_cap_grows_by_the_slots_that_a_shape_keeps() -> None:
    plans = {percent: shape_plan(SHAPES["afm-4.5b"], 49152, percent) for percent in (0, 20)}
    grown = weight_cap(plans[20]) - weight_cap(plans[0])
    predictors = plans[20].gpu_details["predictor.weights"] - plans[0].gpu_details["predictor.weights"]
    assert grown == plans[20].slab_bytes + predictors and plans[20].prefill_chunk == 2048


class _Steady:
    """Takes what its misses take on a link of 1,000 bytes a second, and a tenth more."""

    fixed_bytes, slots_per_layer = 0, (NEURONS // 2,)

    def __init__(self, replay: Replay) -> None:
        self._replay, self._token, self._counted = replay, 0, Counted(0, 0, 0, 0, 0, 0)

    def decode(self, num_steps: int) -> list[float]:
        times = []
        for _ in range(num_steps):
            active = self._replay.active(0, self._token)
            hits = int(active[: NEURONS // 2].sum())
            misses = int(active.sum()) - hits
            c = self._counted
            self._counted = Counted(c.lookups + hits + misses, c.hits + hits, c.missed_bytes + misses * 10, 0, 0, 0)
            times.append(misses * 10 / 1000 * 1.1)
            self._token += 1
        return times

    def counted(self) -> Counted:
        return self._counted


def test_decode_is_held_against_what_was_counted() -> None:
    replay = Replay(make_trace(layers=1)[0], 1, NEURONS)
    ceilings = {"zero_copy_bytes_per_s": {"10": 1000}, "read_bytes_per_s": {"10": 1e9}, "pinned_copy_bytes_per_s": 2000}
    found = measure_decode(_Steady(replay), replay, 10, ceilings, tokens=40)
    assert found["over_floor"] == pytest.approx(1.1)
    assert found["missed_bytes_per_step"] == found["misses_per_step"] * 10
    assert found["link_share"] == pytest.approx(found["link_bytes_per_s"] / 2000)
    assert found["active_share"] == pytest.approx(make_trace(layers=1)[1].mean())
    assert add_reference(found, replay)["misses_over_reference"] == pytest.approx(1.0, abs=0.2)  # a static set's


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_plain_dense_decode_is_finite_and_its_ffn_the_specification(gated: bool) -> None:
    shape = replace(SHAPES["tiny"], model_type="llama" if gated else "arcee", hidden_act="relu" if gated else "relu2")
    attention, layers = Attention(shape, 320, "cpu", rows=3), [random_layer(shape, "cpu") for _ in range(2)]
    outs: list[torch.Tensor] = []

    def ffn(layer: int, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        outs.append(multiply(normed.bfloat16(), layers[layer], shape.hidden_act))
        *gate, up, down = layers[layer].float()
        exact = DenseFFN(shape.hidden_act, gate[0] if gate else None, up, down)
        torch.testing.assert_close(outs[-1].float(), exact(normed), rtol=0.05, atol=0.05)
        return residual + outs[-1]

    attention.step(ffn)
    assert len(outs) == 2 and outs[1].shape == (3, 64) and torch.isfinite(outs[1].float()).all()
    assert attention.token.shape == (3,) and int(attention.token.max()) < 320


def test_the_gpu_tier_is_driven_by_the_trace() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_product import ProductTraced, make_home

    shape = replace(SHAPES["tiny"], hidden_size=32, intermediate_size=2 * NEURONS, num_attention_heads=2, head_dim=16)
    replay = Replay(make_trace()[0], 2, 2 * NEURONS)
    home = make_home(shape, BundleLayout.make(32, False, BundleDtype.BF16), "cpu")
    model = ProductTraced(shape, 64, home, shape_plan(shape, 64, 50), replay, 1, "cpu")
    assert len(model.decode(3)) == 3
    counted, steps = model.counted(), [steps_of(replay, layer, 0, 3) for layer in range(2)]
    assert counted.lookups == sum(ids.size for of_layer in steps for ids in of_layer)
    assert counted.hits == sum(int((ids < NEURONS).sum()) for of_layer in steps for ids in of_layer)
    assert counted.missed_bytes >= (counted.lookups - counted.hits) * 64 and model.fixed_bytes > 0
    home.close()


def test_a_home_on_disk_is_driven_by_the_trace(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_tiers import measure_tiers, write_file

    shape = replace(SHAPES["tiny"], hidden_size=32, intermediate_size=2 * NEURONS, num_attention_heads=2, head_dim=16)
    replay, layout = Replay(make_trace()[0], 2, 2 * NEURONS), BundleLayout.make(32, False, BundleDtype.BF16)
    plan = replace(shape_plan(shape, 64, 20), memory_slots_per_layer=(NEURONS // 2,) * 2, memory_staging_bytes=64 << 10)
    file = write_file(shape, layout, tmp_path / "home")
    found = measure_tiers(shape, 64, file, plan, replay, "cpu", warm=1, tokens=2)
    steps = [ids.size for layer in range(2) for ids in steps_of(replay, layer, 1, 2)]
    assert found["active_share"] == sum(steps) / 2 / (2 * 2 * NEURONS)
    assert 0 < found["gpu_hit_share"] < 1 and 0 < found["memory_hit_share"] < 1 and 0 < found["stall_share"] < 1
    assert found["disk_bytes_per_step"] >= found["disk_needed_bytes_per_step"] > 0
