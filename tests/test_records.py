"""Records moved and checked natively, against numpy and against the checksum of cache/bundle.py."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from cache.bundle import BundleDtype, BundleLayout, checksum_weights, pack_records
from cache.records import copy_records, first_bad_record

LAYOUTS = [
    BundleLayout.make(hidden, gated, dtype)
    for hidden in (1, 7, 48, 576)
    for gated in (True, False)
    for dtype in BundleDtype
]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def random_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def scatter(layout: BundleLayout, num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An arena of noise with `num` right records in it, at offsets of any alignment, in random order."""
    rng = np.random.default_rng(seed)
    vectors = {v.name: rng.standard_normal((num, layout.hidden_size)).astype(np.float32) for v in layout.vectors}
    records = pack_records(layout, vectors)
    room = layout.record_bytes + 13
    offsets = rng.permutation(num) * room + rng.integers(0, 14, num)
    arena = random_bytes(num * room, seed)
    for offset, record in zip(offsets, records, strict=True):
        arena[offset : offset + layout.record_bytes] = record[: layout.record_bytes]
    return arena, offsets


# -- moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 64, 3464, 40_000])
def test_records_are_moved_and_nothing_else_changes(num_bytes: int) -> None:
    num = 60
    room = num_bytes + 5
    arena = random_bytes(2 * num * room)
    places = np.random.default_rng(1).permutation(2 * num) * room + 3  # of no alignment, none overlapping another
    source, target = places[:num], places[num:]
    expected = arena.copy()
    for a, b in zip(source, target, strict=True):
        expected[b : b + num_bytes] = arena[a : a + num_bytes]
    copy_records(arena, source, target, num_bytes)
    np.testing.assert_array_equal(arena, expected)


def test_one_source_may_go_to_several_places_and_the_arenas_ends_are_inside() -> None:
    arena = np.concatenate([random_bytes(10), np.zeros(30, np.uint8)])
    copy_records(arena, ints(0, 0), ints(10, 30), 10)
    np.testing.assert_array_equal(arena[30:], arena[:10])
    np.testing.assert_array_equal(arena[10:20], arena[:10])
    copy_records(arena, ints(), ints(), 10)
    copy_records(arena, ints(40), ints(40), 0)  # nothing, at the very end


def test_bad_moves_are_refused_and_nothing_is_copied() -> None:
    arena = random_bytes(4096)
    before = arena.copy()
    largest, smallest = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for outside in (-1, 4096 - 99, 4096, largest, largest - 50, smallest):
        with pytest.raises(IndexError, match="outside of the arena"):
            copy_records(arena, ints(0, outside), ints(200, 400), 100)
        with pytest.raises(IndexError, match="outside of the arena"):
            copy_records(arena, ints(200, 400), ints(0, outside), 100)
    with pytest.raises(IndexError, match="outside of the arena"):
        copy_records(arena, ints(0), ints(0), 4097)
    with pytest.raises(ValueError, match="negative"):
        copy_records(arena, ints(0), ints(200), -1)
    with pytest.raises(ValueError, match="differ in length"):
        copy_records(arena, ints(0, 100), ints(200), 100)
    np.testing.assert_array_equal(arena, before)


def _frozen(arena: np.ndarray) -> np.ndarray:
    arena.flags.writeable = False
    return arena


@pytest.mark.parametrize(
    "call",
    [
        lambda: copy_records(np.zeros(64, np.int8), ints(0), ints(32), 8),
        lambda: copy_records(np.zeros((8, 8), np.uint8), ints(0), ints(32), 8),
        lambda: copy_records(np.zeros(128, np.uint8)[::2], ints(0), ints(32), 8),
        lambda: copy_records(_frozen(np.zeros(64, np.uint8)), ints(0), ints(32), 8),
        lambda: copy_records(np.zeros(64, np.uint8), ints(0).astype(np.int32), ints(32), 8),
        lambda: copy_records(np.zeros(64, np.uint8), ints(0), np.zeros(1), 8),
        lambda: copy_records(np.zeros(64, np.uint8), ints(0, 1, 2, 3)[::2], ints(32, 40), 8),
        lambda: first_bad_record(np.zeros(64, np.uint8), ints(0).astype(np.uint64), 8, np.ones(1, np.uint64)),
        lambda: first_bad_record(np.zeros(64, np.uint8), ints(0), 8, ints(1)),
        lambda: first_bad_record(np.zeros(64, np.int8), ints(0), 8, np.ones(1, np.uint64)),
    ],
)
def test_other_dtypes_shapes_and_strides_are_refused_not_converted(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        call()


# -- checking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: f"{v.hidden_size}-{v.dtype}-{len(v.vectors)}")
def test_right_records_pass_and_any_flipped_bit_is_found(layout: BundleLayout) -> None:
    arena, offsets = scatter(layout, 20)
    end, weights = layout.checksum_offset, checksum_weights(layout)
    assert first_bad_record(arena, offsets, end, weights) == -1
    rng = np.random.default_rng(5)
    for at in (0, end - 1, end, end + 7, *rng.integers(0, end + 8, 20).tolist()):  # the stored checksum too
        index = int(rng.integers(0, 20))
        byte, bit = offsets[index] + at, np.uint8(1 << int(rng.integers(0, 8)))
        arena[byte] ^= bit
        assert first_bad_record(arena, offsets, end, weights) == index
        arena[byte] ^= bit
    assert first_bad_record(arena, offsets, end, weights) == -1


def test_the_first_of_several_is_told_and_zeros_do_not_pass() -> None:
    layout = BundleLayout.make(48, True, BundleDtype.BF16)
    arena, offsets = scatter(layout, 50)
    end, weights = layout.checksum_offset, checksum_weights(layout)
    for index in (40, 17, 31):
        arena[offsets[index] : offsets[index] + layout.record_bytes] = 0  # a hole in a file
    assert first_bad_record(arena, offsets, end, weights) == 17
    assert first_bad_record(arena, offsets[18:], end, weights) == 31 - 18
    assert first_bad_record(arena, offsets[41:], end, weights) == -1
    assert first_bad_record(arena, ints(), end, weights) == -1


def test_two_exchanged_words_are_found() -> None:
    layout = BundleLayout.make(576, True, BundleDtype.BF16)
    arena, offsets = scatter(layout, 1)
    words = arena[offsets[0] : offsets[0] + layout.checksum_offset].copy().view(np.uint64)
    words[[3, 200]] = words[[200, 3]]
    arena[offsets[0] : offsets[0] + layout.checksum_offset] = words.view(np.uint8)
    assert first_bad_record(arena, offsets, layout.checksum_offset, checksum_weights(layout)) == 0


def test_records_outside_of_the_arena_and_other_weights_are_refused() -> None:
    layout = BundleLayout.make(48, True, BundleDtype.BF16)
    arena, offsets = scatter(layout, 3)
    end, weights = layout.checksum_offset, checksum_weights(layout)
    last = arena.size - layout.record_bytes
    assert first_bad_record(arena, ints(last), end, weights) in (-1, 0)  # inside to the last byte
    for outside in (-1, last + 1, arena.size, np.iinfo(np.int64).max, np.iinfo(np.int64).min):
        with pytest.raises(IndexError, match="outside of the arena"):
            first_bad_record(arena, ints(int(offsets[0]), int(outside)), end, weights)
    for wrong in (end - 8, end + 8, end + 1, -8, 0):
        with pytest.raises(ValueError, match="weights: one for each 8 bytes"):
            first_bad_record(arena, offsets, wrong, weights)


def test_another_thread_runs_while_records_are_moved() -> None:
    arena = np.zeros(64 << 20, np.uint8)
    half = arena.size // 2
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1

    def ticks_within_a_move() -> int:
        before = ticks[0]
        copy_records(arena, ints(0), ints(half), half)  # some milliseconds
        return ticks[0] - before

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        assert any(ticks_within_a_move() > 100 for _ in range(50))  # a few can fall between the lines
    finally:
        stop.set()
        thread.join()
