"""Thresholds: equal to a naive fp64 CETT, monotone, and within their target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.calibrate import Curve, LayerTail, calibrate_layer

TARGETS = (0.01, 0.05, 0.2)


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(40, 64, generator=generator).relu().pow(2)
    return h, torch.randn(64, 24, generator=generator)


def naive_cett(h: np.ndarray, down: np.ndarray, kept: np.ndarray) -> float:
    total = 0.0
    for token in range(h.shape[0]):
        outputs = [h[token, i] * down[i] for i in range(h.shape[1])]
        tail = (
            np.sum([o for i, o in enumerate(outputs) if not kept[token, i]], axis=0) if not kept[token].all() else 0.0
        )
        total += float(np.linalg.norm(tail) / np.linalg.norm(np.sum(outputs, axis=0)))
    return total / h.shape[0]


@pytest.mark.parametrize("threshold", [0.1, 1.0, 5.0])
def test_cett_equals_the_naive_sum(threshold: float) -> None:
    h, down = layer()
    tail = LayerTail(h, down)
    kept = tail.magnitude >= threshold
    expected = naive_cett(h.double().numpy(), down.double().numpy(), kept.numpy())
    assert tail.cett(kept) == pytest.approx(expected, rel=1e-5)


def test_thresholds_meet_their_targets_and_rise_with_them() -> None:
    h, down = layer()
    tail = LayerTail(h, down)
    found = calibrate_layer(tail, tail.magnitude, TARGETS)
    np.testing.assert_allclose(found.epsilon, found.tau, rtol=0.03)  # the predictor is perfect here
    assert (np.diff(found.epsilon) > 0).all() and (np.diff(found.active) < 0).all()
    for target, epsilon, active in zip(TARGETS, found.epsilon, found.active, strict=True):
        kept = tail.magnitude >= float(epsilon)
        assert tail.cett(kept) <= target
        assert tail.cett(tail.magnitude >= float(epsilon) * 1.1) > 0.9 * target
        assert float(kept.float().mean()) == pytest.approx(float(active))


def test_a_poor_predictor_takes_more_to_meet_the_same_target() -> None:
    h, down = layer()
    tail = LayerTail(h, down)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(7))
    found = calibrate_layer(tail, tail.magnitude * (0.7 * noise).exp(), TARGETS)
    assert (found.taken > found.active).all()
    for target, tau in zip(TARGETS, found.tau, strict=True):
        assert tail.cett(tail.magnitude * (0.7 * noise).exp() >= float(tau)) == pytest.approx(target, rel=0.15)


def test_a_blind_predictor_keeps_the_layer_whole() -> None:
    h, down = layer()
    blind = torch.zeros_like(h)
    blind[:, 0] = 1.0  # sees one neuron and says nothing of the others
    found = calibrate_layer(LayerTail(h, down), blind, TARGETS)
    assert (found.tau == 0).all() and (found.taken == 1).all()


def test_a_silent_layer_has_no_threshold() -> None:
    _, down = layer()
    zeros = torch.zeros(40, 64)
    assert (calibrate_layer(LayerTail(zeros, down), zeros, TARGETS).tau == 0).all()


def test_thresholds_on_known_curves() -> None:
    for curve, expected in (
        (lambda t: t, 0.3),
        (lambda t: t**4, 0.3**0.25),
        (lambda t: 0.0, 1.0),
        (lambda t: 1.0, 0.0),
    ):
        assert Curve(curve, 1e-6, 1.0).threshold(0.3) == pytest.approx(expected, rel=0.03)


def test_few_evaluations_for_many_targets() -> None:
    calls: list[float] = []

    def cett(t: float) -> float:
        calls.append(t)
        return min(1.0, t**1.3 / (0.2 + t))

    curve = Curve(cett, 1e-7, 10.0)
    for target in (0.01, 0.02, 0.05, 0.1, 0.2):
        found = curve.threshold(target)
        assert 0.97 * target <= cett(found) <= target
    assert len(calls) < 35
