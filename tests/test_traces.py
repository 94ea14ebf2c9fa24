"""Traces of active sets: recorded as the definition says, replayed bit for bit through the engine."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.predictors import forward
from benchmarks.traces import ROW_STEP, Replay, ReplayPredictor, Trace, at_cett, at_share, bench, record
from runtime.affinity import reuse
from runtime.calibrate import LayerTail
from runtime.checkpoint import open_checkpoint
from runtime.ffn import DenseFFN
from runtime.load import LOOKAHEADS, prepare
from runtime.packed import open_packed
from tests.conftest import TinyModel

LAYERS, TOKENS, NEURONS = 3, 40, 24


def make_trace(layers: int = LAYERS, neurons: int = NEURONS, seed: int = 0) -> tuple[Trace, np.ndarray]:
    """A trace and its sets, bool [L, T, F]."""
    active = np.random.default_rng(seed).random((layers, TOKENS, neurons)) < np.linspace(0.05, 0.6, neurons)
    frequency = active.mean(axis=1, dtype=np.float32)
    return Trace(np.packbits(active, axis=2, bitorder="little"), frequency), active


def nothing(layer: int, x: np.ndarray) -> None:
    """No pass."""


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    trace, active = make_trace(neurons=21)
    trace.save(tmp_path / "trace")
    again = Trace.read(tmp_path / "trace")
    np.testing.assert_array_equal(again.frequency, trace.frequency)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(again.active(layer), active[layer])
    with pytest.raises(SystemExit, match=r"--trace .*: not a trace"):
        Trace.read(tmp_path / "absent")
    with pytest.raises(ValueError, match="do not fit"):
        Trace(trace.bits[:, :, :1], trace.frequency)


def test_replay_is_the_real_layers_hottest_first() -> None:
    trace, active = make_trace()
    seen: list[tuple[int, int]] = []
    replayed = Replay(trace, 5, 2 * NEURONS)
    replay = ReplayPredictor(replayed, lambda layer, x: seen.append((layer, x.shape[0])))
    counts = active.sum(axis=2)  # [L, T]
    pairs = [{int(counts[a, t] + counts[b, t]) for a in range(LAYERS) for b in range(LAYERS) if a != b} for t in (0, 1)]
    for token in (0, 1):
        for layer in range(5):
            mask = replay.predict(layer, np.zeros((1, 8), np.float32))
            assert mask.shape == (1, 2 * NEURONS) and mask.dtype == bool
            assert int(mask.sum()) in pairs[token]
    assert seen == [(layer, 1) for layer in range(5)] * 2
    hot = np.mean([replayed.active(0, t)[:NEURONS].sum() for t in range(TOKENS)])
    cold = np.mean([replayed.active(0, t)[NEURONS:].sum() for t in range(TOKENS)])
    assert hot > 1.5 * cold
    assert (np.diff(replayed.frequency(), axis=1) <= 0).all()
    cut = Replay(trace, 5, 2 * NEURONS + 5)
    share = np.mean([cut.active(layer, t).mean() for t in range(TOKENS) for layer in range(5)])
    assert cut.active(0, 0).shape == cut.frequency()[0].shape == (2 * NEURONS + 5,)
    assert share == pytest.approx(active.mean(), abs=0.06)
    sets = cut.sets(3)
    assert sets.shape == (TOKENS, 2 * NEURONS + 5)
    for token in (0, 7, TOKENS - 1):
        np.testing.assert_array_equal(sets[token].numpy(), cut.active(3, token))


def test_replay_keeps_reuse_and_steps_by_token() -> None:
    trace, active = make_trace(layers=1)
    replay = ReplayPredictor(Replay(trace, 1, NEURONS), nothing)
    x = np.zeros((2, 8), np.float32)
    masks = np.stack([replay.predict(0, x) for _ in range(TOKENS + 1)])  # [T + 1, 2, F]
    np.testing.assert_array_equal(masks[TOKENS], masks[0])  # and begins again
    np.testing.assert_array_equal(masks[0, 1], masks[ROW_STEP % TOKENS, 0])
    assert replay.facts()["reuse"] == pytest.approx(reuse(masks[None, :, 0]))
    assert reuse(masks[None, :TOKENS, 0]) == pytest.approx(reuse(active[:1]))
    assert replay.facts()["active_share"] == pytest.approx(masks[:, 0].mean())
    ahead = ReplayPredictor(Replay(trace, 1, NEURONS), nothing, calls_per_token=2)
    twice = np.stack([ahead.predict(0, x) for _ in range(8)])
    np.testing.assert_array_equal(twice[::2], twice[1::2])
    np.testing.assert_array_equal(twice[::2], masks[:4])


def test_record_drops_what_the_cett_allows(tiny_relu2: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_relu2.checkpoint)
    rng = np.random.default_rng(0)
    vocab = checkpoint.config.vocab_size
    calibration, heldout = (torch.from_numpy(rng.integers(0, vocab, shape)) for shape in ((4, 64), (64,)))
    with torch.no_grad():
        trace = record(checkpoint, calibration, heldout, at_cett(0.1))
        layers = list(forward(checkpoint, torch.cat([calibration, heldout[None]])))
    for layer, (ffn, inputs) in enumerate(layers):
        h = DenseFFN("relu2", ffn.gate, ffn.up, ffn.down).neurons(inputs["input"])
        tail = LayerTail(h[-1], ffn.down)
        active = torch.from_numpy(trace.active(layer))
        assert tail.cett(active) == pytest.approx(0.1, abs=0.05)  # other tokens than the threshold's
        assert float(tail.magnitude[active].min()) > float(tail.magnitude[~active].max()) * (1 - 1e-6)
        assert trace.frequency[layer].mean() == pytest.approx(float(active.float().mean()), abs=0.1)


def test_record_keeps_the_share_that_is_asked_for(tiny_relu2: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_relu2.checkpoint)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (5, 64)))
    with torch.no_grad():
        trace = record(checkpoint, tokens[:4], tokens[4], at_share(0.2))
    assert trace.frequency.mean(axis=1) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_bench_replays_through_the_engine(tiny_relu2: TinyModel, lookahead: str, tmp_path: Path) -> None:
    packed = prepare(
        str(tiny_relu2.checkpoint), tmp_path / "packed", tiny_relu2.text, None, "auto", False, lambda w, s: None
    )
    neurons = open_packed(packed).config.intermediate_size
    trace, active = make_trace(neurons=neurons // 2)
    trace.save(tmp_path / "trace")
    options = argparse.Namespace(
        model=str(packed), trace=tmp_path / "trace", memory=None, ffn_cache="25%", mode="dense", threads=1,
        lookahead=lookahead, sketch_bits=2.0, prompt_tokens=8, tokens=20, seed=3,
    )  # fmt: skip
    found = bench(options)
    assert found["predictor"] == "trace" and found["overflow"] == 0 and found["sketch_bytes"] > 0
    assert found["active_share"] == pytest.approx(active[:, :20].mean(), abs=0.05)
    layers = open_packed(packed).bundles.num_layers
    assert found["lookups"] == pytest.approx(active[:, :20].sum() / LAYERS * 2 * layers, rel=0.2)
