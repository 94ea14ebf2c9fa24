"""Audits: what they say of a predictor is what a dense computation says, and they leave the cache alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.bundle import BundleDtype, BundleLayout, pack_records
from cache.errors import ReadError
from cache.store import BundleFile
from runtime.audit import Auditor
from runtime.load import LoadOptions, load, prepare
from runtime.request import Request, SamplingParams

NEURONS, HIDDEN = 900, 40


@pytest.fixture
def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((NEURONS, HIDDEN), np.float32) for n in ("gate", "up", "down")}


@pytest.fixture
def file(tmp_path: Path, vectors: dict[str, np.ndarray]) -> BundleFile:
    layout = BundleLayout.make(HIDDEN, True, BundleDtype.FP32)
    (tmp_path / "bundles").write_bytes(pack_records(layout, vectors).tobytes())
    return BundleFile(tmp_path / "bundles", layout, NEURONS, (0,))


def test_an_audit_equals_a_dense_computation(file: BundleFile, vectors: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, HIDDEN)).astype(np.float32)
    taken = rng.random((2, NEURONS)) < 0.7
    factor = np.maximum(x @ vectors["gate"].T, 0) ** 2 * (x @ vectors["up"].T)
    active_at = np.full((1, NEURONS), 20, np.float32)
    auditor = Auditor(file, "relu2", active_at, rate=1.0)
    auditor.offer(0, x, taken)
    assert auditor.waiting == 2
    while auditor.run_one():
        pass
    active = np.abs(factor) >= 20
    found = auditor.snapshot()
    assert found.tokens == 2 and found.dropped == 0
    assert found.true_positive == (active & taken).sum() and found.false_negative == (active & ~taken).sum()
    dense, tail = factor @ vectors["down"], (factor * ~taken) @ vectors["down"]
    expected = np.linalg.norm(tail, axis=1) / np.linalg.norm(dense, axis=1)
    assert found.relative_error.sum == pytest.approx(expected.sum(), rel=1e-4)
    assert sum(found.relative_error.counts) == 2
    assert found.read_bytes == 2 * NEURONS * file.layout.stride


def test_rate_and_places_are_bounds(file: BundleFile) -> None:
    x, mask = np.ones((100, HIDDEN), np.float32), np.ones((100, NEURONS), bool)
    none, all_of_them = (Auditor(file, "relu", np.ones((1, NEURONS), np.float32), rate) for rate in (0.0, 1.0))
    none.offer(0, x, mask)
    all_of_them.offer(0, x, mask)
    assert none.waiting == 0 and not none.run_one()
    assert all_of_them.waiting + all_of_them.snapshot().dropped == 100
    assert all_of_them.snapshot().dropped > 0
    with pytest.raises(ValueError, match="rate"):
        Auditor(file, "relu", np.ones((1, NEURONS), np.float32), 1.5)


def test_a_damaged_layer_is_an_error_once(file: BundleFile) -> None:
    auditor = Auditor(file, "relu", np.ones((1, NEURONS), np.float32), 1.0)
    auditor.offer(0, np.ones((1, HIDDEN), np.float32), np.ones((1, NEURONS), bool))
    with file.path.open("r+b") as out:
        out.write(b"\x13")
    with pytest.raises(ReadError, match="checksum"):
        auditor.run_one()
    assert not auditor.run_one()


def test_a_file_that_is_gone_or_fails_is_a_read_error_that_names_it(
    file: BundleFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor = Auditor(file, "relu", np.ones((1, NEURONS), np.float32), 1.0)
    x, mask = np.ones((2, HIDDEN), np.float32), np.ones((2, NEURONS), bool)
    auditor.offer(0, x, mask)

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.pread", fails)
    with pytest.raises(ReadError, match=r"bundles: .*offset 0 .*Input/output error"):
        auditor.run_one()
    file.path.rename(file.path.with_name("moved"))
    with pytest.raises(ReadError, match=r"bundles: .*No such file"):
        auditor.run_one()
    assert not auditor.run_one()


def test_a_served_model_is_audited_without_a_change_to_its_text_or_its_cache(tmp_path: Path, tiny_relu2: Any) -> None:
    checkpoint, _, text = tiny_relu2
    model = prepare(str(checkpoint), tmp_path / "packed", text, 0.1, "fp32", False, lambda what, share: None)
    found = []
    for rate in (0.0, 0.5):
        loaded = load(str(model), LoadOptions(dtype="fp32", audit_rate=rate), lambda what, share: None)
        loaded.engine.start()
        request = Request("r", (1, 5, 9), SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
        tokens = [e.token_id for e in loaded.engine.generate(request)]
        while loaded.engine.snapshot().audit.tokens == 0 and rate:
            pass
        loaded.engine.shutdown(0)
        snapshot = loaded.engine.snapshot()
        found.append((tokens, snapshot.cache.tiers))
        loaded.close()
    assert found[0] == found[1]
    assert snapshot.audit.tokens > 0
    recall = snapshot.audit.true_positive / (snapshot.audit.true_positive + snapshot.audit.false_negative)
    assert recall > 0.8
