"""Records: what is packed is what is read back, and damage is found."""

from __future__ import annotations

import numpy as np
import pytest

from cache.bundle import (
    BundleDtype,
    BundleLayout,
    checksums,
    pack_records,
    stored_checksums,
    unpack_vector,
)
from cache.errors import FormatError, FormatKind

DTYPES = list(BundleDtype)


def random_vectors(gated: bool, num: int, hidden: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("gate", "up", "down") if gated else ("up", "down")
    return {n: rng.standard_normal((num, hidden), np.float32) for n in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hidden", [7, 64, 576])
def test_round_trip_keeps_what_the_dtype_can_hold(dtype: BundleDtype, gated: bool, hidden: int) -> None:
    vectors = random_vectors(gated, 5, hidden)
    layout = BundleLayout.make(hidden, gated, dtype)
    records = pack_records(layout, vectors)
    assert records.shape == (5, layout.stride)
    relative = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.5 / 127}[dtype.value]
    for name, expected in vectors.items():
        found = unpack_vector(layout, records, name)
        bound = relative * (
            np.abs(expected).max(axis=1, keepdims=True) if dtype is BundleDtype.INT8 else np.abs(expected)
        )
        assert (np.abs(found - expected) <= bound + 1e-7).all()


def test_bf16_rounds_to_nearest_even_as_torch_does() -> None:
    import torch

    vectors = random_vectors(True, 64, 33)
    layout = BundleLayout.make(33, True, BundleDtype.BF16)
    records = pack_records(layout, vectors)
    for name, values in vectors.items():
        expected = torch.from_numpy(values).bfloat16().float().numpy()
        np.testing.assert_array_equal(unpack_vector(layout, records, name), expected)


def test_fp16_overflow_is_refused() -> None:
    vectors = random_vectors(False, 2, 8)
    vectors["up"][1, 3] = 1e6
    with pytest.raises(ValueError, match="fp16"):
        pack_records(BundleLayout.make(8, False, BundleDtype.FP16), vectors)


def test_a_row_of_zeros_survives_int8() -> None:
    vectors = random_vectors(False, 2, 8)
    vectors["down"][0] = 0
    layout = BundleLayout.make(8, False, BundleDtype.INT8)
    assert (unpack_vector(layout, pack_records(layout, vectors), "down")[0] == 0).all()


@pytest.mark.parametrize(
    ("hidden", "gated", "dtype", "stride"),
    [(576, True, "bf16", 3520), (576, True, "int8", 1792), (2560, False, "bf16", 10304)],
)
def test_padding_costs_less_than_a_twentieth(hidden: int, gated: bool, dtype: str, stride: int) -> None:
    layout = BundleLayout.make(hidden, gated, BundleDtype(dtype))
    assert layout.stride == stride
    assert layout.stride <= 1.05 * layout.record_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_found(dtype: BundleDtype) -> None:
    layout = BundleLayout.make(9, True, dtype)
    record = pack_records(layout, random_vectors(True, 1, 9))
    assert (checksums(layout, record) == stored_checksums(layout, record)).all()
    for byte in range(layout.record_bytes):
        for bit in range(8):
            damaged = record.copy()
            damaged[0, byte] ^= 1 << bit
            assert checksums(layout, damaged) != stored_checksums(layout, damaged), (byte, bit)


def test_a_hole_of_zeros_is_found() -> None:
    layout = BundleLayout.make(16, False, BundleDtype.BF16)
    zeros = np.zeros((1, layout.stride), np.uint8)
    assert checksums(layout, zeros) != stored_checksums(layout, zeros)


def test_layout_survives_json_and_refuses_what_points_outside() -> None:
    layout = BundleLayout.make(576, True, BundleDtype.INT8)
    data = layout.to_json()
    assert BundleLayout.from_json(data) == layout
    for field, value in (("stride", 8), ("record_bytes", 10**6), ("checksum_offset", 4), ("hidden_size", 10**6)):
        with pytest.raises(FormatError) as caught:
            BundleLayout.from_json({**data, field: value})
        assert caught.value.kind is FormatKind.BAD_HEADER
    for broken in ({}, {**data, "vectors": [{}]}, {**data, "vectors": data["vectors"][:1]}, {**data, "stride": None}):
        with pytest.raises(FormatError):
            BundleLayout.from_json(broken)
