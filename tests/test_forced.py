"""Large shapes with forced sets: made without fitting, decoded as the trace says, the same weights as GGUF."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.disk_report import write_report
from benchmarks.forced import POLICIES, decode
from benchmarks.lookahead import show, table
from benchmarks.make_checkpoint import SHAPES
from benchmarks.make_packed import make_like, make_packed, random_records
from benchmarks.packed_gguf import write_gguf
from benchmarks.predictors import forward
from benchmarks.traces import BESIDE, SURE, Replay, ReplayPredictor, Trace, record_taken, replay_on
from cache.bundle import BundleDtype, BundleLayout, unpack_vector
from runtime.affinity import reuse
from runtime.checkpoint import open_checkpoint
from runtime.ffn import DenseFFN
from runtime.load import LoadOptions, load, prepare
from runtime.packed import BUNDLES, PROFILE, RESIDENT, open_packed
from runtime.sparse import interpolate
from tests.conftest import TinyModel

LAYERS, TOKENS, NEURONS = 3, 40, 24
SHAPE = replace(SHAPES["tiny"], intermediate_size=2 * NEURONS)


def make_trace() -> Trace:
    """A trace whose guesses are the sets of other tokens."""
    taken = np.random.default_rng(0).random((LAYERS, TOKENS, NEURONS)) < np.linspace(0.05, 0.6, NEURONS)
    bits = np.packbits(taken, axis=2, bitorder="little")
    beside = {name: np.roll(bits, shift, axis=1) for shift, name in enumerate(BESIDE)}
    return Trace(bits, taken.mean(axis=1, dtype=np.float32), beside, np.concatenate([bits, bits], axis=1))


def test_what_lies_beside_a_trace_survives_and_is_replayed(tmp_path: Path) -> None:
    make_trace().save(tmp_path / "trace")
    trace = Trace.read(tmp_path / "trace")
    assert trace.calibration is not None and trace.calibration.shape == (LAYERS, 2 * TOKENS, NEURONS // 8)
    with pytest.raises(ValueError, match="another shape"):
        replace(trace, beside={"active": trace.bits[:1]})
    replay = Replay(trace, 2, NEURONS)
    predictor = ReplayPredictor(replay, lambda layer, x: None, calls_per_token=2, num_pinned=3)
    both = np.stack([predictor.predict(0, np.zeros((1, 8), np.float32))[0] for _ in range(8)])
    assert both[:, :3].all()
    own = np.stack([replay.active(0, t) for t in range(4)])
    np.testing.assert_array_equal(both[1::2, 3:], own[:, 3:])
    np.testing.assert_array_equal(both[2::2, 3:], own[:3, 3:])  # here the guess is the token before
    sure = ReplayPredictor(replay, lambda layer, x: None, num_pinned=3)
    for token in range(4):  # of the token to come, before its set is taken
        confidence = sure.confidence(1, np.zeros((1, 8), np.float32))
        assert confidence is not None and not confidence[0, :3].any()
        levels = [(at, replay.active(1, token, name)[3:]) for name, at in SURE.items()]
        expected = np.max([np.where(mask, at, 0) for at, mask in levels], axis=0)
        np.testing.assert_array_equal(confidence[0, 3:], expected)
        sure.predict(1, np.zeros((1, 8), np.float32))
    facts, taken = replay.facts(0, TOKENS), np.stack([[replay.active(i, t) for t in range(TOKENS)] for i in (0, 1)])
    assert facts["reuse"] == pytest.approx(reuse(taken))
    assert facts["taken_share"] == pytest.approx(taken.mean()) == facts["active_share"]


def test_the_table_of_guesses_counts_what_is_absent() -> None:
    """Perfect guesses are all the misses and nothing in vain; those of another token are some of both."""
    trace = make_trace()
    sets = {"ahead 1": np.zeros_like(trace.bits), "begun 1": trace.bits, "residual 1": np.roll(trace.bits, 1, axis=1)}
    options = argparse.Namespace(layers=2, neurons=2 * NEURONS, warm=5)
    head, *rows = table(replace(trace, beside=sets), options, "4 GiB")
    nothing, all_of_them, others = ({k: v for k, v in r.items() if k not in ("source", "margin")} for r in rows)
    assert head["misses"] > 0
    assert (nothing["covered"], nothing["in_vain"], nothing["requests"]) == (0, 0, 1)
    assert (all_of_them["covered"], all_of_them["in_vain"], all_of_them["bytes"]) == (1, 0, 1)
    assert 0 < others["covered"] < 1 and others["in_vain"] > 0 and others["bytes"] > 1
    assert show([head, *rows]).count("\n") == 5


def test_what_a_packed_model_takes_is_recorded(tiny_relu2: TinyModel, tmp_path: Path) -> None:
    options = (tiny_relu2.text, None, "auto", False, lambda what, share: None)
    packed = open_packed(prepare(str(tiny_relu2.checkpoint), tmp_path / "packed", *options))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, packed.config.vocab_size, 64))
    trace, profile = record_taken(packed, tokens, 0.1, tokens.view(1, 64)), packed.read(PROFILE)
    np.testing.assert_array_equal(trace.calibration, trace.beside["active"])
    loaded = load(str(packed.path), LoadOptions(mode="sparse", cett=0.1, threads=1), lambda what, share: None)
    epsilon = interpolate(profile["targets"], profile["epsilon"], 0.1)
    with torch.no_grad():
        layers = list(forward(open_checkpoint(tiny_relu2.checkpoint), tokens[None]))
    active = Trace(trace.beside["active"], trace.frequency)
    for layer, (ffn, inputs) in enumerate(layers):
        h = DenseFFN("relu2", ffn.gate, ffn.up, ffn.down).neurons(inputs["input"])[0]
        size = (h.abs() * ffn.down.norm(dim=1))[:, torch.from_numpy(profile["order"][layer].astype(np.int64))]
        np.testing.assert_array_equal(active.active(layer), (size >= float(epsilon[layer])).numpy())
        taken = loaded.model._ffn._predictor.predict(layer, inputs["input"][0].contiguous().numpy())
        beside = loaded.plan.num_pinned if taken is not None else 0
        expected = np.ones((64, h.shape[1]), bool) if taken is None else taken
        np.testing.assert_array_equal(trace.active(layer)[:, beside:], expected[:, beside:])
    loaded.close()


@pytest.mark.parametrize("dtype", [BundleDtype.BF16, BundleDtype.INT8])
def test_random_records_are_of_the_asked_size(dtype: BundleDtype) -> None:
    layout = BundleLayout.make(256, True, dtype)
    records = random_records(np.random.Generator(np.random.SFC64(0)), layout, 300)
    for name in ("gate", "up", "down"):
        values = unpack_vector(layout, records, name)
        assert 0.5 < values.std() * 16 < 2 and abs(values.mean()) < 0.01


@pytest.mark.parametrize("dtype", [BundleDtype.BF16, BundleDtype.INT8])
def test_a_made_model_decodes_what_is_forced(dtype: BundleDtype, tmp_path: Path) -> None:
    trace = make_trace()
    trace.save(tmp_path / "trace")
    make_packed(SHAPE, tmp_path / "model", dtype, trace)
    with pytest.raises(SystemExit, match="exists already"):
        make_packed(SHAPE, tmp_path / "model", dtype, trace)
    options = dict(
        model=tmp_path / "model", trace=tmp_path / "trace", memory=None, mode="sparse", threads=1, io_engine="auto",
        lookahead="none", sets="taken", merge_gap=0, max_model_len=1024, warm=3, tokens=5,
    )  # fmt: skip
    replay = replay_on(open_packed(tmp_path / "model"), trace)
    for policy in POLICIES if dtype is BundleDtype.BF16 else ("ours",):
        found = decode(argparse.Namespace(**options, policy=policy))
        assert found["hit_rate"] == 1 and found["misses"] == found["reference_misses"] == 0
        assert found | replay.facts(3, 8) == found
    dense = decode(argparse.Namespace(**options | {"mode": "dense"}, policy="ours"))
    assert dense["mode"] == "dense" and dense["tokens_per_s"] > 0


def test_a_model_may_have_the_same_neurons_in_another_order(tmp_path: Path) -> None:
    """Whatever the order, the same sets are replayed, with the hottest in front as far as they may be pinned."""
    trace, num = make_trace(), SHAPE.intermediate_size
    assert (Replay(replace(trace, calibration=None), 2, num).disk_order((0,)) == np.arange(num)).all()
    make_packed(SHAPE, tmp_path / "model", BundleDtype.BF16, trace)
    plain = Replay(trace, SHAPE.num_hidden_layers, num)
    for order in ("frequency", "shuffled"):
        make_like(tmp_path / "model", tmp_path / order, order)
    with pytest.raises(SystemExit, match="exists already"):
        make_like(tmp_path / "model", tmp_path / "shuffled", "shuffled")
    for name in ("model", "frequency", "shuffled"):
        packed = open_packed(tmp_path / name)
        replay, profile = replay_on(packed, trace), packed.read(PROFILE)
        np.testing.assert_array_equal(profile["frequency"][0], replay.frequency())
        first = round(0.2 * num)
        for layer, order in enumerate(profile["order"]):
            assert sorted(order) == list(range(num)) and sorted(order[:first]) == list(range(first))
            assert (name == "frequency") == bool((order == np.arange(num)).all())
            np.testing.assert_array_equal(replay.active(layer, 7), plain.active(layer, 7)[order])
        for file in (BUNDLES, RESIDENT):
            assert (packed.path / file).samefile(tmp_path / "model" / file)
        load(str(packed.path), LoadOptions(threads=1), lambda what, share: None).close()


def test_a_gguf_has_the_weights_of_the_packed_model(tmp_path: Path) -> None:
    make_packed(SHAPE, tmp_path / "model", BundleDtype.BF16, make_trace())
    packed = open_packed(tmp_path / "model")
    write_gguf(packed, tmp_path / "model.gguf")
    gguf = open_checkpoint(tmp_path / "model.gguf")
    assert gguf.config.hidden_act == packed.config.hidden_act and gguf.config.gated == packed.config.gated
    for layer in range(SHAPE.num_hidden_layers):
        records = np.concatenate([piece for _, piece in packed.bundles.pieces(layer)])
        for name, turned in (("up", False), ("down", True)):
            mine = torch.from_numpy(unpack_vector(packed.bundles.layout, records, name))
            theirs = gguf.load(f"model.layers.{layer}.mlp.{name}_proj.weight").float()
            assert torch.equal(mine.T if turned else mine, theirs)
    loaded = load(str(packed.path), LoadOptions(threads=1), lambda what, share: None)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        mine = getattr(loaded.model._weights.layers[1], name).float()
        assert torch.equal(mine, gguf.load(f"model.layers.1.self_attn.{name}.weight").float())
    loaded.close()


def test_the_report_is_the_medians_and_their_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(stage: str, name: str, number: int, speed: float) -> dict[str, object]:
        return {"stage": stage, "name": name, "round": number, "time": 0.0, "tokens_per_s": speed}

    runs = [run("decode", "bf16 3GiB", i, speed) for i, speed in enumerate((1.0, 5.0, 3.0))]
    runs += [run("decode", "llama.cpp bf16 3GiB", i, 0.5) for i in range(3)]
    runs += [{"stage": "decode", "name": "int8 3GiB", "round": 0, "failed": "no memory"}]
    runs += [{"stage": "plan", "name": "plan 3GiB", "round": 0, "expected": {"tokens_per_s": 4.5}}]
    found = write_report(runs, tmp_path / "disk.json")
    assert found["ratios"] == [
        {"ours": "bf16 3GiB", "theirs": "llama.cpp bf16 3GiB", "ratio": 6.0, "target": 5.0, "met": True}
    ]
    assert [(p["error"], p["met"]) for p in found["plan"]] == [(0.5, False)]
    assert "| int8 3GiB | no memory |" in capsys.readouterr().out
    assert json.loads((tmp_path / "disk.json").read_text())["rows"][0]["rounds"] == 3
