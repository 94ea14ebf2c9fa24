"""The cache over a real file: bytes are right, counters add up, budgets hold, damage is an error."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.bundle import BundleDtype, BundleLayout, pack_records, unpack_vector
from cache.device_curve import DeviceCurve, Point
from cache.errors import FormatError, ReadError
from cache.neuron_cache import Lease, NeuronCache, smallest_staging_bytes
from cache.store import BundleFile

LAYERS, NEURONS, HIDDEN = 3, 700, 96


@pytest.fixture
def file(tmp_path: Path) -> BundleFile:
    layout = BundleLayout.make(HIDDEN, True, BundleDtype.FP32)
    path = tmp_path / "bundles"
    with path.open("wb") as out:
        out.write(b"h" * 4096)
        for layer in range(LAYERS):
            out.write(pack_records(layout, vectors(layer)).tobytes())
    size = NEURONS * layout.stride
    return BundleFile(path, layout, NEURONS, tuple(4096 + i * size for i in range(LAYERS)))


def vectors(layer: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(layer)
    return {n: rng.standard_normal((NEURONS, HIDDEN), np.float32) for n in ("gate", "up", "down")}


def make(file: BundleFile, slots: int, staging: int = 0, **options: Any) -> NeuronCache:
    frequency = np.tile(np.linspace(0.9, 0.0, NEURONS), (LAYERS, 1))
    return NeuronCache(file, [slots] * LAYERS, staging or smallest_staging_bytes(file.layout), frequency, **options)


def read_back(cache: NeuronCache, offsets: np.ndarray, name: str) -> np.ndarray:
    stride = cache.layout.stride
    records = (
        np.stack([cache.arena[o : o + stride] for o in offsets]) if offsets.size else np.empty((0, stride), np.uint8)
    )
    return unpack_vector(cache.layout, records, name)


def check_lease(cache: NeuronCache, layer: int, ids: np.ndarray) -> int:
    """Acquires, compares every byte that would be computed with, releases; the number of hits."""
    lease = cache.acquire(layer, ids)
    assert lease is not None
    for name, expected in vectors(layer).items():
        np.testing.assert_array_equal(read_back(cache, lease.offsets, name), expected[ids])
    hits = int(lease.hit.sum())
    cache.release(lease)
    return hits


@pytest.mark.parametrize("engine", ["auto", "pread", "buffered"])
@pytest.mark.parametrize("slots", [0, 1, 50, NEURONS])
def test_every_record_is_right_whatever_is_resident(file: BundleFile, slots: int, engine: str) -> None:
    cache = make(file, slots, io_engine=engine)
    rng = np.random.default_rng(9)
    lookups = hits = 0
    for step in range(30):
        for layer in range(LAYERS):
            ids = np.flatnonzero(rng.random(NEURONS) < (0.0 if step == 3 else 0.15)).astype(np.int32)
            hits += check_lease(cache, layer, ids)
            lookups += ids.size
    tier = cache.snapshot().tiers["cpu"]
    assert (tier.lookups, tier.hits, tier.misses) == (lookups, hits, lookups - hits)
    assert tier.insertions - tier.evictions == sum(cache.resident(i).size for i in range(LAYERS))
    assert tier.used_bytes <= tier.capacity_bytes == slots * LAYERS * file.layout.stride
    cache.close()


@pytest.mark.parametrize("slots", [0, 50, NEURONS])
@pytest.mark.parametrize("warm", [False, True])
def test_a_stream_is_the_whole_layer_in_order(file: BundleFile, slots: int, warm: bool) -> None:
    cache = make(file, slots)
    if warm:
        for layer in range(LAYERS):
            cache.warm(layer)
    else:
        check_lease(cache, 1, np.arange(0, NEURONS, 7, dtype=np.int32))
    before = cache.snapshot().tiers["cpu"]
    resident = cache.resident(1).size
    seen = 0
    for chunk in cache.stream(1):
        assert chunk.start == seen
        seen = chunk.stop
        offsets = chunk.offset + np.arange(chunk.stop - chunk.start) * file.layout.stride
        for name, expected in vectors(1).items():
            np.testing.assert_array_equal(read_back(cache, offsets, name), expected[chunk.start : chunk.stop])
    assert seen == NEURONS
    moved = cache.snapshot().tiers["cpu"] - before
    assert (moved.lookups, moved.hits) == (NEURONS, resident)
    cache.close()


def test_chunks_do_not_depend_on_what_is_resident(file: BundleFile) -> None:
    cold, warm = make(file, 300), make(file, 300)
    warm.warm(0)
    bounds = [[(c.start, c.stop) for c in cache.stream(0)] for cache in (cold, warm)]
    assert bounds[0] == bounds[1]


def test_warm_fills_the_slots_with_what_the_profile_ranks_first(file: BundleFile) -> None:
    cache = make(file, 40)
    cache.warm(2)
    assert cache.resident(2).tolist() == list(range(40))
    assert check_lease(cache, 2, np.arange(60, dtype=np.int32)) == 40


def test_what_is_used_often_replaces_what_is_not(file: BundleFile) -> None:
    cache = make(file, 40)
    cache.warm(0)
    used = np.arange(500, 540, dtype=np.int32)
    for _ in range(200):
        check_lease(cache, 0, used)
    assert cache.resident(0).tolist() == used.tolist()
    assert check_lease(cache, 0, used) == 40


def test_misses_that_do_not_fit_staging_are_refused_without_a_trace(tmp_path: Path) -> None:
    layout = BundleLayout.make(1024, True, BundleDtype.FP32)
    rng = np.random.default_rng(0)
    data = {n: rng.standard_normal((256, 1024), np.float32) for n in ("gate", "up", "down")}
    path = tmp_path / "large"
    path.write_bytes(pack_records(layout, data).tobytes())
    cache = NeuronCache(BundleFile(path, layout, 256, (0,)), [4], smallest_staging_bytes(layout), np.zeros((1, 256)))
    before = cache.snapshot()
    assert cache.acquire(0, np.arange(256, dtype=np.int32)) is None
    assert cache.snapshot() == before
    assert check_lease_values(cache, data, np.arange(0, 256, 9, dtype=np.int32))


def check_lease_values(cache: NeuronCache, data: dict[str, np.ndarray], ids: np.ndarray) -> bool:
    lease = cache.acquire(0, ids)
    assert lease is not None
    np.testing.assert_array_equal(read_back(cache, lease.offsets, "down"), data["down"][ids])
    cache.release(lease)
    return True


def test_bytes_read_cover_the_bytes_needed(file: BundleFile) -> None:
    cache = make(file, 20)
    rng = np.random.default_rng(5)
    for _ in range(20):
        check_lease(cache, 0, np.flatnonzero(rng.random(NEURONS) < 0.1).astype(np.int32))
    for _ in cache.stream(1):
        pass
    snapshot = cache.snapshot()
    moved, sizes = snapshot.transfers["disk", "cpu"], snapshot.read_sizes["disk"]
    assert moved.needed_bytes == snapshot.tiers["cpu"].misses * file.layout.record_bytes
    assert 0 < moved.needed_bytes <= moved.bytes
    assert sizes.sum == moved.bytes
    assert moved.stall_seconds > 0 and moved.seconds > 0


def test_a_damaged_record_is_an_error_and_the_next_request_is_right(file: BundleFile) -> None:
    with file.path.open("r+b") as out:
        out.seek(file.layer_offsets[1] + 33 * file.layout.stride + 5)
        out.write(b"\xff\x00\xff")
    cache = make(file, 50)
    with pytest.raises(ReadError, match=r"checksum.*layer 1, neuron 33"):
        cache.acquire(1, np.array([3, 33, 60], np.int32))
    with pytest.raises(ReadError, match="neuron 33"):
        for _ in cache.stream(1):
            pass
    assert 33 not in cache.resident(1)
    check_lease(cache, 1, np.array([3, 60], np.int32))
    check_lease(cache, 0, np.array([33], np.int32))


def test_a_file_that_shrinks_is_an_error(file: BundleFile) -> None:
    cache = make(file, 10)
    with file.path.open("r+b") as out:
        out.truncate(file.layer_offsets[2])
    with pytest.raises(ReadError, match="bundles"):
        cache.acquire(2, np.array([699], np.int32))
    check_lease(cache, 0, np.array([5], np.int32))


def test_a_short_or_absent_file_is_refused_at_once(file: BundleFile) -> None:
    with file.path.open("r+b") as out:
        out.truncate(file.layer_offsets[2] + 100)
    with pytest.raises(FormatError, match="bundles"):
        make(file, 10)
    file.path.unlink()
    with pytest.raises(FormatError, match="missing"):
        make(file, 10)


def test_a_stream_closed_early_leaves_a_cache_that_works(file: BundleFile) -> None:
    cache = make(file, 10)
    stream = cache.stream(0)
    next(stream)
    with pytest.raises(RuntimeError, match="release"):
        cache.acquire(0, np.array([1], np.int32))
    stream.close()
    check_lease(cache, 0, np.array([1], np.int32))


def test_one_lease_at_a_time(file: BundleFile) -> None:
    cache = make(file, 10)
    lease = cache.acquire(0, np.array([1], np.int32))
    assert lease is not None
    with pytest.raises(RuntimeError, match="release"):
        cache.acquire(0, np.array([2], np.int32))
    cache.release(lease)


def test_the_device_curve_decides_which_gaps_are_read(file: BundleFile) -> None:
    """Records of 1.2 KB, every sixth: the gap is read where requests are dear, and not where bytes are."""
    ids = np.arange(0, NEURONS, 6, dtype=np.int32)
    read: dict[str, tuple[int, int]] = {}
    for name, request_s, byte_s in (("dear requests", 1e-4, 1e-9), ("dear bytes", 1e-9, 1e-4)):
        points = tuple(Point(s, d, d * (request_s + s * byte_s)) for s in (4096, 65536) for d in (1, 64))
        cache = make(file, 0, curve=DeviceCurve("", {"pread+buffered": points}), io_engine="buffered")
        check_lease(cache, 0, ids)
        moved = cache.snapshot().transfers["disk", "cpu"]
        read[name] = moved.requests, moved.bytes
    assert read["dear requests"][0] == 1 < read["dear bytes"][0]
    assert read["dear requests"][1] > read["dear bytes"][1]


# -- lookahead --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "pread", "buffered"])
def test_what_was_read_ahead_is_right_and_adds_up(file: BundleFile, engine: str) -> None:
    """Guesses of all kinds: right, wrong, for another layer, followed by a stream, not followed at all."""
    cache = make(file, 40, io_engine=engine, lookahead=True)
    rng = np.random.default_rng(3)
    for step in range(60):
        layer = step % LAYERS
        ids = np.flatnonzero(rng.random(NEURONS) < 0.1).astype(np.int32)
        kept = rng.random(ids.size) < rng.choice([0.0, 0.8, 1.0])
        guess = np.union1d(ids[kept], np.flatnonzero(rng.random(NEURONS) < 0.02)).astype(np.int32)
        cache.prefetch(layer if step % 5 else (layer + 1) % LAYERS, guess)
        if step % 7 == 3:
            for chunk in cache.stream(layer):
                offsets = chunk.offset + np.arange(chunk.stop - chunk.start) * file.layout.stride
                np.testing.assert_array_equal(
                    read_back(cache, offsets, "up"), vectors(layer)["up"][chunk.start : chunk.stop]
                )
        check_lease(cache, layer, ids)
    found = cache.snapshot()
    assert found.prefetch_used_bytes > found.prefetch_wasted_bytes / 2 > 0
    assert found.prefetch_issued_bytes == found.prefetch_used_bytes + found.prefetch_wasted_bytes
    moved = found.transfers["disk", "cpu"]
    assert moved.needed_bytes + found.prefetch_wasted_bytes <= moved.bytes
    cache.close()


def test_a_right_guess_is_read_once(file: BundleFile) -> None:
    ids = np.arange(5, 300, 40, dtype=np.int32)
    plain, ahead = make(file, 0), make(file, 0, lookahead=True)
    ahead.prefetch(1, ids)
    for cache in (plain, ahead):
        check_lease(cache, 1, ids)
    volumes = [cache.snapshot().transfers["disk", "cpu"] for cache in (plain, ahead)]
    assert volumes[0].bytes == volumes[1].bytes and volumes[0].needed_bytes == volumes[1].needed_bytes
    assert ahead.snapshot().prefetch_used_bytes == ids.size * file.layout.record_bytes


def test_a_failed_guess_costs_nobody_an_error(file: BundleFile) -> None:
    cache = make(file, 0, lookahead=True)
    ids = np.array([3, 33, 60], np.int32)
    for found in (ids, np.array([100], np.int32)):  # the guess was right: read again; it was wrong: nothing happens
        cache._reader.inject("eio", 0, 3)
        cache.prefetch(0, ids)
        check_lease(cache, 0, found)
    snapshot = cache.snapshot()
    assert snapshot.prefetch_used_bytes == 0
    assert snapshot.prefetch_wasted_bytes == snapshot.prefetch_issued_bytes == 6 * file.layout.record_bytes


def test_a_late_read_that_fails_leaves_no_read_under_way(file: BundleFile) -> None:
    cache = make(file, 0, lookahead=True)
    cache.prefetch(0, np.array([3], np.int32))
    assert cache._ahead is not None
    while not cache._reader.done(cache._ahead.ticket):  # so that it is the late one that fails
        pass
    cache._reader.inject("eio", 0, 1)
    with pytest.raises(ReadError):
        cache.acquire(0, np.array([3, 600], np.int32))
    check_lease(cache, 0, np.array([3, 600], np.int32))
    cache.prefetch(2, np.array([4], np.int32))
    cache.close()  # with a guess under way: it is waited for


def test_guesses_are_bounded_and_need_a_cache_made_for_them(file: BundleFile) -> None:
    with pytest.raises(RuntimeError, match="without lookahead"):
        make(file, 0).prefetch(0, np.array([1], np.int32))
    cache = make(file, 0, lookahead=True)
    cache.prefetch(0, np.arange(NEURONS, dtype=np.int32))  # a layer is more than a quarter of staging
    assert cache.snapshot().prefetch_issued_bytes == 0
    stream = cache.stream(0)
    next(stream)
    with pytest.raises(RuntimeError, match="release"):
        cache.prefetch(1, np.array([2], np.int32))
    stream.close()


@pytest.mark.parametrize("engine", ["auto", "pread", "buffered"])
@pytest.mark.parametrize("slots", [0, 40])
def test_reads_behind_a_lease_are_right_and_add_up(
    file: BundleFile, engine: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer after layer, each guessed at while the one before is out: rightly, wrongly, for another, dropped."""
    monkeypatch.setattr("cache.neuron_cache._PIECE_BYTES", 8 << 10)
    monkeypatch.setattr("cache.neuron_cache._TRIED", 1 << 30)
    cache = make(file, slots, io_engine=engine, lookahead=True)
    rng = np.random.default_rng(4)
    sets = [np.flatnonzero(rng.random(NEURONS) < 0.08).astype(np.int32) for _ in range(91)]
    for step, (ids, following) in enumerate(pairwise(sets)):
        layer = step % LAYERS
        lease = cache.begin(layer, ids)
        assert lease is not None
        guess = np.union1d(following[rng.random(following.size) < 0.7], rng.integers(0, NEURONS, 5)).astype(np.int32)
        cache.prefetch((layer + 1 + (step % 9 == 8)) % LAYERS, guess, rng.random(guess.size))
        if step % 11 == 10:
            cache.drop(lease)
            continue
        cache.complete(lease)
        for name, expected in vectors(layer).items():
            np.testing.assert_array_equal(read_back(cache, lease.offsets, name), expected[ids])
        cache.release(lease)
    check_lease(cache, 0, sets[-1])
    found = cache.snapshot()
    assert found.prefetch_used_bytes > 2 * found.prefetch_wasted_bytes > 0
    assert found.prefetch_issued_bytes == found.prefetch_used_bytes + found.prefetch_wasted_bytes
    cache.close()


def test_a_guess_behind_a_lease_is_no_longer_than_the_queue(file: BundleFile) -> None:
    cache = make(file, 0, lookahead=True, queue_depth=4)
    lease = cache.begin(0, np.array([1, 600], np.int32))
    assert lease is not None
    ids = np.arange(0, 700, 70, dtype=np.int32)
    cache.prefetch(1, ids, np.array([9, 1, 8, 2, 7, 3, 6, 4, 5, 0], np.float32))
    with lease:
        cache.complete(lease)
    assert cache._ahead is not None
    np.testing.assert_array_equal(cache._ahead.ids, ids[[0, 2, 4, 6]])
    check_lease(cache, 1, ids)
    assert cache.snapshot().prefetch_used_bytes == 4 * file.layout.record_bytes
    cache.close()


def test_a_layer_whose_guesses_are_wrong_is_given_up(file: BundleFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.neuron_cache._TRIED", 8)
    cache = make(file, 0, lookahead=True)
    issued = []
    for guess in ([600, 610, 620, 630], [600, 601, 3], *([[3, 4]] * 4)):  # wrong but for layer 1's second
        for layer in range(LAYERS):
            lease = cache.begin(layer, np.array([3, 4], np.int32))
            assert lease is not None
            with lease:
                if layer < 2:
                    cache.prefetch(layer + 1, np.sort(np.array([3, 4] if layer else guess, np.int32)))
                cache.complete(lease)
        issued.append(cache.snapshot().prefetch_issued_bytes // file.layout.record_bytes)
    # Layer 2 goes on; layer 1 is given up after nine of which three came, and tried again two steps later.
    assert np.diff(issued).tolist() == [5, 4, 2, 2, 4]
    cache.close()


def test_what_was_guessed_gives_way_to_a_set_that_needs_its_room(file: BundleFile) -> None:
    cache = make(file, 0, lookahead=True)
    cache._demanded = (cache._staging, 64 << 10)
    ids = np.arange(0, NEURONS, 3, dtype=np.int32)
    cache.prefetch(0, ids[:1])
    check_lease(cache, 0, ids)
    assert cache.snapshot().prefetch_wasted_bytes == file.layout.record_bytes
    with lease_of(cache, 1, ids[:2]) as lease:  # nothing is left of it
        cache.prefetch(2, ids[:2])
        cache.complete(lease)
    check_lease(cache, 2, ids[:2])
    assert cache.snapshot().prefetch_used_bytes == 2 * file.layout.record_bytes
    cache.close()


def test_a_set_that_needs_all_of_staging_gets_it_beside_guesses(file: BundleFile) -> None:
    """What lookahead keeps for itself never makes a set too large."""
    cache = make(file, 0, lookahead=True)
    cache._demanded = (cache._staging, 64 << 10)
    ids = np.arange(0, NEURONS, 3, dtype=np.int32)
    lease = cache.begin(0, ids)
    assert lease is not None
    cache.prefetch(1, ids[:2])  # has no place now
    with lease:
        cache.complete(lease)
        np.testing.assert_array_equal(read_back(cache, lease.offsets, "up"), vectors(0)["up"][ids])
    assert cache.snapshot().prefetch_issued_bytes == 0
    check_lease(cache, 1, ids[:2])
    with lease_of(cache, 1, ids[:2]) as lease:
        cache.prefetch(2, ids[:2])  # and now it has
        cache.complete(lease)
    assert cache.snapshot().prefetch_issued_bytes == 2 * file.layout.record_bytes
    cache.close()


def lease_of(cache: NeuronCache, layer: int, ids: np.ndarray) -> Lease:
    lease = cache.begin(layer, ids)
    assert lease is not None
    return lease


# -- begin and complete -----------------------------------------------------------------------------------------------


def test_what_is_ready_at_once_is_right_before_the_rest_is_read(file: BundleFile) -> None:
    cache = make(file, 40)
    cache.warm(1)  # the first 40
    ids = np.arange(0, 300, 7, dtype=np.int32)
    lease = cache.begin(1, ids)
    assert lease is not None and lease.num_ready == 6
    expected = vectors(1)["down"][ids]
    np.testing.assert_array_equal(read_back(cache, lease.offsets[:6], "down"), expected[:6])
    with pytest.raises(RuntimeError, match="complete"):
        cache.release(lease)
    cache.complete(lease)
    np.testing.assert_array_equal(read_back(cache, lease.offsets, "down"), expected)
    cache.release(lease)
    tier = cache.snapshot().tiers["cpu"]
    assert (tier.lookups, tier.hits) == (ids.size, 6)
    whole = cache.begin(1, np.arange(3, dtype=np.int32))
    assert whole is not None and whole.num_ready == 3


def test_a_lease_dropped_before_it_is_complete_leaves_a_cache_that_works(file: BundleFile) -> None:
    cache = make(file, 0, lookahead=True)
    ids = np.array([3, 33, 600], np.int32)
    cache.prefetch(0, ids[:2])
    with pytest.raises(ZeroDivisionError):
        lease = cache.begin(0, ids)
        assert lease is not None
        with lease:
            raise ZeroDivisionError
    assert check_lease(cache, 0, ids) == 0
    cache.close()


@pytest.mark.parametrize("engine", ["auto", "pread", "buffered"])
@pytest.mark.parametrize("guessed", [0, 30])
def test_what_has_arrived_is_right_while_the_rest_is_read(
    file: BundleFile, engine: str, guessed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.neuron_cache._PIECE_BYTES", 8 << 10)
    cache = make(file, 40, io_engine=engine, lookahead=True)
    cache.warm(1)
    ids = np.arange(0, NEURONS, 9, dtype=np.int32)
    cache.prefetch(1, ids[:guessed])
    lease = cache.begin(1, ids)
    assert lease is not None
    expected, seen = vectors(1)["up"][ids], [lease.num_ready]
    for there in cache.arrivals(lease):
        np.testing.assert_array_equal(read_back(cache, lease.offsets[:there], "up"), expected[:there])
        seen.append(there)
    assert seen == sorted(seen) and seen[-1] == ids.size and len(seen) > 4
    cache.release(lease)
    assert cache.snapshot().tiers["cpu"].hits >= 5
    cache.close()


@pytest.mark.parametrize("nth", [0, 1])
def test_a_piece_that_fails_leaves_no_read_under_way(
    file: BundleFile, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.neuron_cache._PIECE_BYTES", 1 << 10)
    cache = make(file, 0)
    ids = np.array([3, 300, 600], np.int32)
    cache._reader.inject("eio", nth, 1)
    with pytest.raises(ReadError):
        cache.acquire(0, ids)
    check_lease(cache, 0, ids)
    cache.close()


# -- one stream after another -----------------------------------------------------------------------------------------


def test_bytes_and_sizes_of_reads_add_up_while_some_are_under_way(file: BundleFile) -> None:
    cache = make(file, 0)
    for following in (1, None):
        list(cache.stream(0, following))  # the first leaves reads of layer 1 under way
        found = cache.snapshot()
        assert found.read_sizes["disk"].sum == found.transfers["disk", "cpu"].bytes > 0
    cache.close()


def test_a_stream_that_was_foreseen_is_read_once_and_right(file: BundleFile) -> None:
    """Right and wrong foresight, streams closed early, leases between: bytes are right and counters add up."""
    cache = make(file, 40)
    cache.warm(0)
    for step, (layer, following) in enumerate([(0, 1), (1, 2), (2, 0), (0, None), (1, 2), (0, 1), (1, 2), (2, None)]):
        with contextlib.closing(cache.stream(layer, following)) as chunks:
            for chunk in chunks:
                offsets = chunk.offset + np.arange(chunk.stop - chunk.start) * file.layout.stride
                found, expected = read_back(cache, offsets, "up"), vectors(layer)["up"][chunk.start : chunk.stop]
                np.testing.assert_array_equal(found, expected)
                if step == 3:
                    break
        if step == 6:
            check_lease(cache, 1, np.arange(0, NEURONS, 50, dtype=np.int32))
    found = cache.snapshot()
    assert found.prefetch_issued_bytes == found.prefetch_wasted_bytes > 0 == found.prefetch_used_bytes
    assert found.tiers["cpu"].lookups <= 8 * NEURONS + NEURONS // 50
    cache.close()


def test_a_foreseen_stream_that_fails_is_an_error_for_whoever_asks(file: BundleFile) -> None:
    cache = make(file, 0)
    for wanted in (1, 2):  # foreseen, and another one
        num_chunks = len(list(cache.stream(0)))
        cache._reader.inject("eio", num_chunks, 1)
        list(cache.stream(0, following=1))
        if wanted == 1:
            with pytest.raises(ReadError):
                list(cache.stream(1))
        assert sum(chunk.stop - chunk.start for chunk in cache.stream(wanted)) == NEURONS
    cache.close()


def test_spare_slots_are_given_back_with_their_memory_and_fill_again(file: BundleFile) -> None:
    cache = make(file, 50, spare_per_layer=[100, 0, 700])
    stride, rng = file.layout.stride, np.random.default_rng(3)
    assert cache.slots_per_layer == [150, 50, NEURONS]
    for layer in range(LAYERS):
        cache.warm(layer)
    assert [cache.resident(layer).size for layer in range(LAYERS)] == [150, 50, NEURONS]
    everyone = np.arange(NEURONS, dtype=np.int32)
    assert check_lease(cache, 2, everyone) == NEURONS
    chunks = [(c.start, c.stop) for c in cache.stream(2, following=0)]
    assert chunks == [(c.start, c.stop) for c in cache.stream(0, following=1)]  # now the first of layer 1 is begun
    lease = cache.acquire(0, everyone[:5])
    assert lease is not None
    with pytest.raises(RuntimeError, match="still out"):
        cache.give_back()
    cache.release(lease)
    before = cache.snapshot().tiers["cpu"]
    cache.give_back()
    cache.give_back()  # nothing is left to give
    given = cache.snapshot().tiers["cpu"]
    assert cache.slots_per_layer == [50] * LAYERS == [cache.resident(layer).size for layer in range(LAYERS)]
    assert given.used_bytes == given.capacity_bytes == 150 * stride < before.used_bytes
    assert given.evictions - before.evictions == 100 + 650
    spare = cache.arena[-(-150 * stride // 4096) * 4096 : 900 * stride // 4096 * 4096]
    assert not spare.any()  # gone pages read as zeros
    for layer in range(LAYERS):
        check_lease(cache, layer, np.flatnonzero(rng.random(NEURONS) < 0.2).astype(np.int32))
        assert cache.resident(layer).size == 50
    cache.take_back()
    for _ in range(4):
        for layer in range(LAYERS):
            check_lease(cache, layer, np.flatnonzero(rng.random(NEURONS) < 0.3).astype(np.int32))
    assert [cache.resident(layer).size for layer in (0, 1)] == [150, 50] and cache.resident(2).size > 300
    for layer in range(LAYERS):
        for chunk in cache.stream(layer):
            places = chunk.offset + np.arange(chunk.stop - chunk.start) * stride
            np.testing.assert_array_equal(
                read_back(cache, places, "up"), vectors(layer)["up"][chunk.start : chunk.stop]
            )
    cache.close()


def test_a_cache_without_spare_slots_gives_nothing(file: BundleFile) -> None:
    cache = make(file, 50)
    cache.warm(0)
    cache.give_back()
    cache.take_back()
    assert cache.slots_per_layer == [50] * LAYERS and cache.resident(0).size == 50
    cache.close()
