"""The device curve: what is fitted, what is kept, when it is measured again. Timings are never judged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cache import device_curve as module
from cache.arena import new_arena
from cache.device_curve import (
    DEPTHS,
    LARGEST_BATCH_BYTES,
    NAME,
    SIZES,
    DeviceCurve,
    Point,
    ReadCost,
    device_curve,
    device_of,
    fit,
)

COST = ReadCost(60e-6, 12e-6, 0.5e-9)


def points(cost: ReadCost) -> tuple[Point, ...]:
    return tuple(Point(s, d, cost.seconds(d, d * s)) for s in SIZES for d in DEPTHS)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """2 MiB, which is enough here, measured with one batch a point."""
    monkeypatch.setattr(module, "SMALLEST_FILE_BYTES", 2 << 20)
    monkeypatch.setattr(module, "_POINT_S", 0.0)
    path = tmp_path / "bundles"
    path.write_bytes(bytes(2 << 20))
    return path


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the stored curve was not used")

    monkeypatch.setattr(module, "measure", refuse)


def test_a_fit_finds_the_cost_that_made_the_points() -> None:
    found = fit(points(COST))
    np.testing.assert_allclose(
        [found.batch_s, found.request_s, found.byte_s], [COST.batch_s, COST.request_s, COST.byte_s], rtol=1e-6
    )
    assert found.merge_gap_bytes == 12 << 10  # 24,000 bytes cost no more than a request, but there is a limit
    cheaper = fit(points(ReadCost(COST.batch_s, COST.request_s / 4, COST.byte_s)))
    assert cheaper.merge_gap_bytes == pytest.approx(6000, abs=2)


def test_no_term_of_a_fit_is_negative() -> None:
    odd = [Point(4096, 1, 1e-3), Point(4096, 64, 1e-4), Point(65536, 64, 1e-4)]
    found = fit(odd)
    assert min(found.batch_s, found.request_s, found.byte_s) >= 0
    assert fit(points(ReadCost(0.0, 1e-5, 0.0))).merge_gap_bytes == 12 << 10  # bytes cost nothing: there is a limit


def test_every_way_that_opens_is_measured_and_kept(file: Path) -> None:
    curve = device_curve(file)
    assert curve is not None
    assert "pread+buffered" in curve.ways
    expected = [(s, d) for s in SIZES for d in DEPTHS if s * d <= LARGEST_BATCH_BYTES]
    for measured in curve.ways.values():
        assert [(p.read_bytes, p.depth) for p in measured] == expected
        assert all(p.seconds > 0 for p in measured)
    assert set(curve.bandwidths()["pread+buffered"]) == set(SIZES)
    assert DeviceCurve.from_json(json.loads((file.parent / NAME).read_text())) == curve
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(NAME)] == [NAME]


@pytest.mark.usefixtures("never")
def test_a_stored_curve_is_not_measured_again(file: Path) -> None:
    kept = DeviceCurve(device_of(file), {"pread+buffered": points(COST)})
    (file.parent / NAME).write_text(json.dumps(kept.to_json()))
    assert device_curve(file, "buffered") == kept


@pytest.mark.parametrize("change", ["device", "way", "version", "nonsense", "zero"])
def test_a_curve_of_another_device_way_or_form_is_measured_again(file: Path, change: str) -> None:
    data = DeviceCurve(device_of(file), {"pread+buffered": points(COST)}).to_json()
    if change == "device":
        data["device"] = "another"
    elif change == "way":
        data["ways"] = {"another": data["ways"]["pread+buffered"]}
    elif change == "version":
        data["version"] = 0
    elif change == "zero":
        data["ways"]["pread+buffered"][0][2] = 0
    (file.parent / NAME).write_text("{" if change == "nonsense" else json.dumps(data))
    found = device_curve(file, "buffered")
    assert found is not None
    assert found.device == device_of(file)
    assert found.ways["pread+buffered"] != points(COST)
    assert DeviceCurve.from_json(json.loads((file.parent / NAME).read_text())) == found


def test_where_nothing_can_be_kept_the_curve_is_measured_all_the_same(file: Path) -> None:
    (file.parent / NAME).mkdir()  # nothing can be put in its place, by root either
    assert device_curve(file, "buffered") is not None
    assert sorted(p.name for p in file.parent.iterdir()) == ["bundles", NAME]


def test_a_file_too_small_to_tell_has_no_curve(file: Path) -> None:
    os.truncate(file, (2 << 20) - 1)
    assert device_curve(file) is None
    assert not (file.parent / NAME).exists()


def test_a_device_is_told_by_what_the_kernel_says_of_it(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    assert device_of(tmp_path, tmp_path) == name
    block = tmp_path / "dev" / "block" / name
    (block / "device").mkdir(parents=True)
    (block / "size").write_text("1024\n")
    (block / "device" / "model").write_text("FAST 9\n")
    assert device_of(tmp_path, tmp_path) == f"{name} 1024 FAST 9"


def test_an_arena_is_zero_aligned_and_writable() -> None:
    arena = new_arena(3 << 20)
    assert arena.shape == (3 << 20,) and not arena.any()
    assert arena.ctypes.data % 4096 == 0
    arena[-1] = 7
    assert arena[-1] == 7
