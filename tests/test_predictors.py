"""Sketches and low-rank predictors: what the codes mean, what they cost, and that they rank neurons as they should."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.kernels.reference import ReferenceKernels
from runtime.lowrank import LowRank, ResidentGate, TwoLayer, make_low_rank, make_resident_gate, train_two_layer
from runtime.predictor import PlanePredictor
from runtime.sketches import (
    GroupSketch,
    InputStatistics,
    PlaneMatrix,
    PlaneSketch,
    allot_bits,
    make_group_sketch,
    make_plane_sketch,
    padded_bytes,
    plane_matrix,
)

HIDDEN, NEURONS, TOKENS = 48, 96, 800


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """gate, up, down [F, D] and inputs [N, D] with correlated dimensions of very different size, and a mean."""
    rng = np.random.default_rng(0)
    gate, up, down = (rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32) * 0.1 for _ in range(3))
    mix = rng.standard_normal((HIDDEN, HIDDEN)) * np.exp(-np.arange(HIDDEN) / 10)
    x = rng.standard_normal((TOKENS, HIDDEN)) @ mix.T + rng.standard_normal(HIDDEN)
    return gate, up, down, x.astype(np.float32)


def magnitude(gate: np.ndarray, up: np.ndarray, down: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.maximum(x @ gate.T, 0) ** 2 * np.abs(x @ up.T) * np.linalg.norm(down, axis=1)


def recall(scores: np.ndarray, true: np.ndarray, k: int = 10) -> float:
    best, found = np.argsort(-true, axis=1)[:, :k], np.argsort(-scores, axis=1)[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(best, found, strict=True)]))


def row_error(weight: np.ndarray, planes: PlaneMatrix, x: np.ndarray) -> float:
    """Mean square error of the rows' products on x over that of predicting the mean."""
    scale = planes.scale.astype(np.float64) * planes.unit
    found = (x @ planes.directions().T + planes.bias) * scale
    true = x @ weight.T
    return float(np.square(found - true).mean() / true.var(axis=0).mean())


def test_allot_bits_fills_from_the_top() -> None:
    np.testing.assert_array_equal(allot_bits(np.array([64.0, 16.0, 1.0, 1e-9]), 4), [3, 1, 0, 0])
    assert allot_bits(np.ones(5), 12).sum() == 12
    with pytest.raises(ValueError, match="at most 6"):
        allot_bits(np.ones(2), 13)


def test_planes_are_what_the_row_sum_says(layer: tuple[np.ndarray, ...]) -> None:
    gate, _, _, x = layer
    planes = plane_matrix(gate, None, InputStatistics.of(x), 2.0)
    dimension, coefficient = planes.planes()
    assert dimension.size == planes.bits.sum() == 96
    assert planes.codes.shape == (NEURONS, padded_bytes(96)) == (NEURONS, 12)
    z = x[:, dimension] * coefficient  # [N, M]
    bit = np.unpackbits(planes.codes, axis=1, count=dimension.size, bitorder="little")
    by_sum = 2 * z @ bit.T - z.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(by_sum, x @ planes.directions().T, rtol=1e-3, atol=1e-3)


def test_noise_and_bias_say_what_is_left(layer: tuple[np.ndarray, ...]) -> None:
    gate, _, _, x = layer
    planes = plane_matrix(gate, None, InputStatistics.of(x), 2.0)
    scale = planes.scale.astype(np.float64) * planes.unit
    error = (x @ gate.T) / scale - (x @ planes.directions().T + planes.bias)
    assert np.abs(error.mean(axis=0)).max() < 0.01 * error.std()  # the bias takes up the mean
    assert np.sqrt(np.square(error).mean()) == pytest.approx(planes.noise, rel=0.02)


def test_feedback_descent_and_bits_each_reduce_the_error(layer: tuple[np.ndarray, ...]) -> None:
    gate, _, _, x = layer
    statistics = InputStatistics.of(x)
    apart = InputStatistics(statistics.mean, np.diag(statistics.covariance.diagonal()))  # nothing to feed back to
    errors = [row_error(gate, plane_matrix(gate, None, s, 2.0, passes=p), x) for s, p in ((apart, 0), (statistics, 1))]
    assert errors[1] < 0.6 * errors[0]
    by_bits = [row_error(gate, plane_matrix(gate, None, statistics, b), x) for b in (1.0, 2.0, 3.0)]
    assert by_bits[0] > 2 * by_bits[1] > 4 * by_bits[2]


@pytest.mark.parametrize("act", ["relu2", "silu"])
def test_sketch_ranks_neurons_and_survives_a_file(layer: tuple[np.ndarray, ...], act: str) -> None:
    gate, up, down, x = layer
    sketch = make_plane_sketch(act, gate, up, down, InputStatistics.of(x), 3.0)
    scores = sketch.predict(x)
    if act == "relu2":
        assert recall(scores, magnitude(gate, up, down, x)) > 0.85
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    arrays = sketch.to_arrays("layers.0.")
    again = PlaneSketch.from_arrays(arrays, "layers.0.", act, NEURONS)
    np.testing.assert_array_equal(again.predict(x), scores)
    assert 0 <= again.num_bytes - sum(a.nbytes for a in arrays.values()) <= 16
    del arrays["layers.0.up_codes"]
    with pytest.raises(ValueError, match="up_codes is missing"):
        PlaneSketch.from_arrays(arrays, "layers.0.", act, NEURONS)


def test_pinned_neurons_need_no_sketch(layer: tuple[np.ndarray, ...]) -> None:
    gate, up, down, x = layer
    sketch = make_plane_sketch("relu2", gate, up, down, InputStatistics.of(x), 2.0)
    pinned = np.zeros(NEURONS, bool)
    pinned[::4] = True
    part = sketch.without(pinned)
    scores = part.predict(x)
    assert np.isposinf(scores[:, pinned]).all()
    np.testing.assert_allclose(scores[:, ~pinned], sketch.predict(x)[:, ~pinned], rtol=1e-4, atol=1e-6)
    assert part.num_bytes < 0.85 * sketch.num_bytes
    again = PlaneSketch.from_arrays(part.to_arrays(""), "", "relu2", NEURONS)
    np.testing.assert_array_equal(again.predict(x), scores)


def test_not_gated(layer: tuple[np.ndarray, ...]) -> None:
    _, up, down, x = layer
    sketch = make_plane_sketch("relu2", None, up, down, InputStatistics.of(x), 3.0)
    true = np.maximum(x @ up.T, 0) ** 2 * np.linalg.norm(down, axis=1)
    assert recall(sketch.predict(x), true) > 0.9


def test_group_sketch_bytes_and_file(layer: tuple[np.ndarray, ...]) -> None:
    gate, up, down, x = layer
    for bits, group in ((4, None), (3, 16), (1, None)):
        sketch = make_group_sketch("relu2", gate, up, down, bits, group)
        groups = HIDDEN // (group or HIDDEN)
        assert sketch.num_bytes == NEURONS * (2 * (HIDDEN * bits // 8 + 2 * groups) + 2)
        again = GroupSketch.from_arrays(sketch.to_arrays("a."), "a.", "relu2", bits, HIDDEN)
        np.testing.assert_array_equal(again.predict(x), sketch.predict(x))
    true = magnitude(gate, up, down, x)
    assert recall(make_group_sketch("relu2", gate, up, down, 4).predict(x), true) > 0.8
    with pytest.raises(ValueError, match="whole groups"):
        make_group_sketch("relu2", gate, up, down, 2, 7)


def test_low_rank(layer: tuple[np.ndarray, ...]) -> None:
    gate, up, down, x = layer
    statistics, true = InputStatistics.of(x), magnitude(gate, up, down, x)
    whole = make_low_rank("relu2", gate, up, down, HIDDEN)
    assert recall(whole.predict(x), true) > 0.98  # full rank: fp16 rounding alone
    plain, aware = (make_low_rank("relu2", gate, up, down, 12, s) for s in (None, statistics))
    assert recall(aware.predict(x), true) > recall(plain.predict(x), true) + 0.1
    assert aware.num_bytes == 2 * (2 * 12 * (NEURONS + HIDDEN) + NEURONS)
    again = LowRank.from_arrays(aware.to_arrays("a."), "a.", "relu2")
    np.testing.assert_array_equal(again.predict(x), aware.predict(x))


def test_two_layer_learns(layer: tuple[np.ndarray, ...]) -> None:
    gate, up, down, x = layer
    true = magnitude(gate, up, down, x)
    active = true >= np.quantile(true, 0.9)
    made = train_two_layer(x, active, 32, epochs=60)
    assert recall(made.predict(x), true) > 0.4  # chance: 0.1
    np.testing.assert_array_equal(TwoLayer.from_arrays(made.to_arrays(""), "").predict(x), made.predict(x))


def test_resident_gate_never_scores_a_provable_zero(layer: tuple[np.ndarray, ...]) -> None:
    gate, up, down, x = layer
    made = make_resident_gate("relu2", gate, up, down, InputStatistics.of(x))
    scores = made.predict(x)
    np.testing.assert_array_equal(scores > 0, x @ gate.T > 0)
    assert recall(scores, magnitude(gate, up, down, x)) > 0.6
    again = ResidentGate.from_arrays(made.to_arrays(""), "", "relu2")
    np.testing.assert_array_equal(again.predict(x), scores)


@pytest.mark.parametrize("num_pinned", [1, 12, 40])
def test_a_pinned_set_only_adds(num_pinned: int) -> None:
    """What the contract was measured with, nothing pinned, is computed beside any pinned set too."""
    rng = np.random.default_rng(3)
    gate, up, down = (rng.standard_normal((40, 24)).astype(np.float32) for _ in range(3))
    statistics = InputStatistics.of(rng.standard_normal((300, 24)).astype(np.float32))
    sketch = make_plane_sketch("relu2", gate, up, down, statistics, 1.69)
    x = rng.standard_normal((5, 24)).astype(np.float32)
    threshold = np.array([np.median(sketch.predict(x))], np.float32)
    kernels = ReferenceKernels()
    alone = PlanePredictor([sketch], threshold, 0, kernels).predict(0, x)
    rest = sketch.without(np.arange(40) < num_pinned)
    beside = PlanePredictor([rest], threshold, num_pinned, kernels).predict(0, x)
    assert alone is not None and beside is not None and 0 < alone.mean() < 1
    np.testing.assert_array_equal(beside, alone | (np.arange(40) < num_pinned))


def test_confidence_is_one_where_a_neuron_is_just_taken() -> None:
    rng = np.random.default_rng(3)
    gate, up, down = (rng.standard_normal((40, 24)).astype(np.float32) for _ in range(3))
    statistics = InputStatistics.of(rng.standard_normal((300, 24)).astype(np.float32))
    sketch = make_plane_sketch("relu2", gate, up, down, statistics, 1.69)
    x = rng.standard_normal((5, 24)).astype(np.float32)
    threshold = np.array([np.median(sketch.predict(x)), 1.0], np.float32)
    rest = sketch.without(np.arange(40) < 7)
    predictor = PlanePredictor([rest, None], threshold, 7, ReferenceKernels())
    confidence = predictor.confidence(0, x)
    assert confidence is not None and not confidence[:, :7].any()
    np.testing.assert_allclose(confidence[:, 7:], rest.predict(x)[:, 7:] / threshold[0], rtol=1e-5)
    taken = predictor.predict(0, x)
    assert taken is not None
    np.testing.assert_array_equal(taken[:, 7:], confidence[:, 7:] >= 1)
    assert predictor.confidence(1, x) is None
