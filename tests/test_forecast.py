"""The forecast of tokens/s: by hand where a hand can, and the way it moves where not. No timing is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.bundle import BundleDtype, BundleLayout
from cache.device_curve import ReadCost
from cache.store import BundleFile
from runtime.forecast import (
    _CALLS,
    _LAST_PIECE,
    _NEURON_S,
    _READ_CALLS,
    _REQUEST_S,
    _SCATTERED,
    Forecast,
    Machine,
    ReadTerms,
    coldness,
    forecast,
)
from runtime.gpu_forecast import _KERNELS, GpuMachine, gpu_forecast
from runtime.gpu_plan import DeviceMemory
from runtime.kernels import select
from runtime.machine import measure_machine
from runtime.plan import PlanOptions
from server.plan_table import forecast_line
from tests.test_gpu_plan import plan as gpu_plan
from tests.test_plan import plan

LAYERS, NEURONS = 2, 400
LAYOUT = BundleLayout.make(64, True, BundleDtype.FP32)
FILE = BundleFile(Path("absent"), LAYOUT, NEURONS, (0, NEURONS * LAYOUT.stride))
TERMS = ReadTerms(ReadCost(1e-4, 1e-5, 1e-9), 0, 512)
MACHINE = Machine(1e9, 1e-6)


def small_s(layer_bytes: float, calls: int = _CALLS) -> float:
    """Calls of layers that go through so many bytes, masks and look-up."""
    return LAYERS * (calls * 1e-6 * coldness(layer_bytes) + NEURONS * _NEURON_S)


GPU = GpuMachine(1e11, 1e9, 1e-6)


def test_with_all_resident_only_computing_takes_time() -> None:
    frequency = np.full((LAYERS, NEURONS), 0.25)
    found = forecast(FILE, [NEURONS] * LAYERS, frequency, 1_000_000, 0, TERMS, MACHINE)
    expected = (
        1e-3
        + small_s(1e6 / LAYERS + 100 * LAYOUT.record_bytes)
        + LAYERS * 100 * LAYOUT.record_bytes / (1e9 * _SCATTERED)
    )
    assert found.tokens_per_s == pytest.approx(1 / expected)
    assert (found.disk_s, found.read_bytes, found.num_requests, found.hit_share) == (0, 0, 0, 1)


def test_what_is_needed_and_absent_is_read_one_by_one() -> None:
    """Every 10th neuron is always needed, far from the next: each is a request, and 20 of a layer's are resident."""
    frequency = np.zeros((LAYERS, NEURONS))
    frequency[:, ::10] = 1
    found = forecast(FILE, [20] * LAYERS, frequency, 0, 0, TERMS, MACHINE)
    assert found.num_requests == 2 * 20
    assert found.hit_share == 0.5
    assert found.read_bytes == 40 * (LAYOUT.record_bytes + 512)
    assert found.disk_s == pytest.approx(2e-4 + 40 * 1e-5 + found.read_bytes * 1e-9)


def test_a_streamed_layer_hides_the_multiply_behind_the_reads() -> None:
    ones = np.ones((LAYERS, NEURONS))
    found = forecast(FILE, [0] * LAYERS, ones, 0, 0, TERMS, MACHINE)
    assert forecast(FILE, [0] * LAYERS, ones * 0.1, 0, 0, TERMS, MACHINE, dense=True) == found
    slower, idle = (forecast(FILE, [0] * LAYERS, ones, 0, 0, TERMS, Machine(s, 1e-6)) for s in (1e6, 1e15))
    checks_s = LAYERS * FILE.layer_bytes * 0.2e-9
    calls_s = small_s(NEURONS * LAYOUT.record_bytes, _CALLS + _READ_CALLS) + found.num_requests * _REQUEST_S
    assert idle.tokens_per_s == pytest.approx(1 / (found.disk_s + checks_s * _LAST_PIECE + calls_s))
    in_turn_s = found.disk_s + LAYERS * FILE.layer_bytes / (1e9 * _SCATTERED) + checks_s + calls_s
    assert found.disk_s < 1 / found.tokens_per_s < in_turn_s
    assert slower.tokens_per_s < found.tokens_per_s / 10  # then computing is what takes the time


def test_calls_cost_their_full_time_only_where_weights_drive_everything_out() -> None:
    found = [coldness(b) for b in (0, 1e6, 16e6, 32e6, 1e9)]
    assert found == sorted(found)
    assert 0 < found[0] < 0.2
    assert found[3] == found[4] == 1


def test_more_slots_and_a_faster_disk_are_never_slower() -> None:
    frequency = np.random.default_rng(0).random((LAYERS, NEURONS)) ** 3
    rates = [forecast(FILE, [n] * LAYERS, frequency, 0, 0, TERMS, MACHINE).tokens_per_s for n in (0, 50, 200, NEURONS)]
    assert rates == sorted(rates)
    fast = ReadTerms(ReadCost(1e-5, 1e-6, 1e-10), 0, 512)
    assert forecast(FILE, [50] * LAYERS, frequency, 0, 0, fast, MACHINE).tokens_per_s > rates[1]


def test_reading_ahead_hides_no_more_than_there_is_to_hide_behind() -> None:
    """What is guessed is read while everything else is done; of the first layer nothing is guessed."""
    frequency = np.full((LAYERS, NEURONS), 0.2)
    slow_disk = ReadTerms(ReadCost(1e-4, 1e-3, 1e-9), 0, 512)

    def found(other_bytes: int, ahead: bool) -> Forecast:
        return forecast(FILE, [20] * LAYERS, frequency, other_bytes, 0, slow_disk, Machine(1e9, 1e-9), ahead=ahead)

    read_s = found(0, False).disk_s / LAYERS
    for other_bytes, hidden_s in ((0, 0.0), (20_000_000, 10e-3), (10**9, 0.4 * 1.1 * read_s)):
        gained_s = 1 / found(other_bytes, False).tokens_per_s - 1 / found(other_bytes, True).tokens_per_s
        assert gained_s == pytest.approx(hidden_s - 0.1 * read_s, abs=0.02 * read_s)  # layers draw apart


def test_the_machine_is_measured() -> None:
    found = measure_machine(select("auto", 1), np.ones((2048, 512), np.float32))
    assert found.bytes_per_s > 0 and found.call_s > 0


def test_a_forecast_is_a_sentence() -> None:
    found = forecast(FILE, [20] * LAYERS, np.full((LAYERS, NEURONS), 0.2), 0, 0, TERMS, MACHINE)
    cpu = plan()
    assert "tokens/s for one sequence" in forecast_line(found, cpu) and " requests: " in forecast_line(found, cpu)
    assert "until the model is packed" in forecast_line(None, cpu)
    gpu = gpu_plan(options=PlanOptions(gpu_memory_bytes=8 << 30), device=DeviceMemory.assumed(8 << 30))
    on_gpu = gpu_forecast(LAYOUT.stride, [20] * LAYERS, np.full((LAYERS, NEURONS), 0.2), 0, GPU)
    assert "5% of its neurons on the GPU" in forecast_line(on_gpu, gpu) and "main memory" in forecast_line(on_gpu, gpu)
    assert "the GPU is not here" in forecast_line(None, gpu)


def test_on_a_gpu_bytes_are_read_with_what_their_place_gives() -> None:
    """Half of each layer's hundred neurons are resident; of all, every second one is needed on average."""
    frequency = np.tile(np.linspace(1, 0, 100), (LAYERS, 1))
    found = gpu_forecast(1000, [50] * LAYERS, frequency, 500_000, GPU)
    hot = float(frequency[:, :50].sum())
    misses = float(frequency.sum()) - hot
    assert found.read_bytes == pytest.approx(misses * 1000)
    assert found.link_s == pytest.approx(misses * 1000 / 1e9)
    assert found.compute_s == pytest.approx((500_000 + hot * 1000) / 1e11 + LAYERS * _KERNELS * 1e-6)
    assert 1 / found.tokens_per_s == pytest.approx(found.link_s + found.compute_s)
    assert found.hit_share == pytest.approx(hot / frequency.sum())
    dense = gpu_forecast(1000, [50] * LAYERS, frequency, 0, GPU, dense=True)
    assert dense.read_bytes == LAYERS * 50 * 1000 and dense.hit_share == 0.5
