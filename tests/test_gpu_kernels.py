"""The GPU's kernels against the numpy reference: on a GPU where there is one, else by Triton's interpreter.

Slots that nobody may read, and homes of neurons that have a slot, are poisoned with NaN.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.kernels import random_sketch
from cache.bundle import BundleDtype, BundleLayout, pack_records
from runtime.kernels.reference import ReferenceKernels
from runtime.model import apply_rope, rms_norm
from runtime.sketches import InputStatistics, PlaneSketch, make_plane_sketch

pytest.importorskip("triton")

from runtime.kernels import triton_launch
from runtime.kernels.triton_attention import Splits, attend
from runtime.kernels.triton_copy import copy_records
from runtime.kernels.triton_gates import gate_masks
from runtime.kernels.triton_inputs import FIELDS, inputs
from runtime.kernels.triton_masks import PLACES, DeviceSketch, Digits, Scoring, Trail, make_digits, plane_masks
from runtime.kernels.triton_matvec import matvec, norm_rows
from runtime.kernels.triton_neurons import (
    ACTIVE,
    DOWN_HITS,
    DOWN_MISSES,
    HITS,
    LOOKUPS,
    NUM_COUNTERS,
    PREDICTED,
    Records,
    Scratch,
    add_ffn,
    add_scored,
    add_whole,
    scores_itself,
)

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, NEURONS, SLOTS = 24, 150, 40
WAYS = (False, True) if DEVICE.type == "cuda" else (False,)  # off and on: what only a GPU has beside the kernels here


def put(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def pinned(array: np.ndarray) -> torch.Tensor:
    """Main memory that the kernels reach."""
    found = torch.from_numpy(array)
    return found.pin_memory() if DEVICE.type == "cuda" else found


def random_records(rng: np.random.Generator, layout: BundleLayout) -> np.ndarray:
    vectors = {v.name: rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32) for v in layout.vectors}
    return pack_records(layout, vectors)


def poisoned(records: np.ndarray, hot: np.ndarray, layout: BundleLayout) -> Records:
    """The records of `hot` in slots, all others at home; every other byte is 255, which is NaN or -1."""
    home, slots = records.copy(), np.full((SLOTS + 2, layout.stride), 255, np.uint8)
    home[hot] = 255
    slots[: hot.size] = records[hot]
    table = np.full(records.shape[0], -1, np.int32)
    table[hot] = np.arange(hot.size)
    return Records(pinned(home), put(slots), put(table), layout)


@pytest.mark.parametrize("act", ["relu2", "relu", "silu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", list(BundleDtype))
def test_neurons_from_slots_and_home(dtype: BundleDtype, gated: bool, act: str) -> None:
    rng = np.random.default_rng(0)
    layout = BundleLayout.make(HIDDEN, gated, dtype)
    records = random_records(rng, layout)
    hot = rng.permutation(NEURONS)[:SLOTS]
    x, mask = np.zeros((4, HIDDEN), np.float32), (rng.random((4, NEURONS)) < 0.3).astype(np.uint8)
    x[:3] = rng.standard_normal((3, HIDDEN))
    least = np.full(NEURONS, 0.5, np.float32)
    out, used = torch.ones(4, HIDDEN, device=DEVICE), torch.zeros(NEURONS, dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
    scratch, live = Scratch.make(4, NEURONS, HIDDEN, DEVICE), put(np.array([1, 1, 1, 0]))
    where = poisoned(records, hot, layout)
    add_ffn(put(x), where, act, put(mask), put(least), out, scratch, used, counters, live)
    wanted = np.ones((3, HIDDEN), np.float32)
    own = mask[:3].astype(bool)
    offsets = np.arange(NEURONS) * layout.stride
    active = ReferenceKernels().ffn(x[:3], records.reshape(-1), offsets, own, layout, act, wanted, least)
    np.testing.assert_allclose(out[:3].cpu().numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert (out[3] == 1).all()  # padding
    union = own.any(axis=0)
    seen = counters.tolist()
    assert (seen[LOOKUPS], seen[HITS]) == (union.sum(), union[hot].sum())
    assert (seen[ACTIVE], seen[PREDICTED]) == (active, own.sum())
    np.testing.assert_array_equal(np.flatnonzero(union), scratch.ids[: union.sum()].cpu().numpy())
    h = scratch.h.view(4, NEURONS)[:3, : union.sum()].cpu().numpy()
    survivors = np.flatnonzero(union)[(h != 0).any(axis=0)]
    resident = np.isin(survivors, hot)
    assert (seen[DOWN_HITS], seen[DOWN_MISSES]) == (resident.sum(), (~resident).sum())
    np.testing.assert_array_equal(used.cpu().numpy(), union)


@pytest.mark.parametrize("by_address", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", list(BundleDtype))
def test_few_rows_list_their_neurons_themselves(dtype: BundleDtype, rows: int, by_address: bool) -> None:
    rng = np.random.default_rng(7)
    layout = BundleLayout.make(HIDDEN, True, dtype)
    records = random_records(rng, layout)
    hot = rng.permutation(NEURONS)[:SLOTS]
    x, mask = rng.standard_normal((rows, HIDDEN)).astype(np.float32), rng.random((rows, NEURONS)) < 0.3
    least = np.full(NEURONS, 0.5, np.float32)
    out, used = torch.ones(rows, HIDDEN, device=DEVICE), torch.zeros(NEURONS, dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
    both, scratch = poisoned(records, hot, layout), Scratch.make(rows, NEURONS, HIDDEN, DEVICE)
    where = both
    if by_address:
        addresses = both.home.data_ptr() + torch.arange(NEURONS, device=DEVICE) * layout.stride
        addresses[torch.from_numpy(hot)] = 0  # nobody asks for these
        where = Records(both.slab, both.slab, both.table, layout, where=addresses)
    live = put(np.ones(rows, np.int64))
    add_ffn(put(x), where, "relu", put(mask.astype(np.uint8)), put(least), out, scratch, used, counters, live)
    wanted = np.ones((rows, HIDDEN), np.float32)
    offsets = np.arange(NEURONS) * layout.stride
    active = ReferenceKernels().ffn(x, records.reshape(-1), offsets, mask, layout, "relu", wanted, least)
    np.testing.assert_allclose(out.cpu().numpy(), wanted, rtol=1e-4, atol=1e-4)
    union, seen = mask.any(axis=0), counters.tolist()
    assert (seen[LOOKUPS], seen[HITS]) == (union.sum(), union[hot].sum())
    assert (seen[ACTIVE], seen[PREDICTED]) == (active, mask.sum())
    assert 0 < seen[DOWN_HITS] < seen[HITS] and 0 < seen[DOWN_MISSES] < seen[LOOKUPS] - seen[HITS]
    np.testing.assert_array_equal(used.cpu().numpy(), union)


@pytest.mark.parametrize("num", [1200, 1202])  # counted four at a time, and one by one
def test_a_list_of_many_blocks(num: int) -> None:
    rng = np.random.default_rng(8)
    layout = BundleLayout.make(8, False, BundleDtype.FP32)
    records = pack_records(layout, {v.name: np.ones((num, 8), np.float32) for v in layout.vectors})
    mask = (rng.random((4, num)) < 0.2).astype(np.uint8)
    used, scratch = torch.zeros(num, dtype=torch.int32, device=DEVICE), Scratch.make(4, num, 8, DEVICE)
    counters, x = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    live, where = put(np.array([1, 0, 1, 1])), poisoned(records, np.arange(0), layout)
    add_ffn(x, where, "relu", put(mask), None, torch.zeros_like(x), scratch, used, counters, live)
    union = np.flatnonzero(mask[[0, 2, 3]].any(axis=0))
    assert int(scratch.count) == union.size == int(counters[LOOKUPS])
    np.testing.assert_array_equal(scratch.ids[: union.size].cpu().numpy(), union)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", list(BundleDtype))
def test_one_row_and_a_layer_whose_records_all_lie_in_slots(dtype: BundleDtype, gated: bool) -> None:
    rng = np.random.default_rng(9)
    layout = BundleLayout.make(HIDDEN, gated, dtype)
    records = random_records(rng, layout)
    first = 3  # slots of the layer before
    slab = np.full((first + NEURONS + 1, layout.stride), 255, np.uint8)
    slab[first : first + NEURONS] = records
    where = Records(put(slab), put(slab), put(np.arange(first, first + NEURONS, dtype=np.int32)), layout, resident=True)
    x, norm = torch.from_numpy(rng.standard_normal((1, HIDDEN)).astype(np.float32)), torch.rand(HIDDEN) + 0.5
    wanted = x.numpy().copy()
    offsets = np.arange(NEURONS) * layout.stride
    ReferenceKernels().ffn(rms_norm(x, norm, 1e-5).numpy(), records.reshape(-1), offsets, None, layout, "relu2", wanted)
    scratch, counters = Scratch.make(1, NEURONS, HIDDEN, DEVICE), torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    counters, out = counters.to(DEVICE), x.to(DEVICE)
    for live, expected in ((1, wanted), (0, wanted)):  # padding adds nothing
        add_whole(out, norm.to(DEVICE), 1e-5, where, "relu2", out, scratch, counters, put(np.array([live])))
        np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=1e-4, atol=1e-3)
    assert counters.tolist()[:2] == [NEURONS, NEURONS] and counters[DOWN_MISSES] == 0 < counters[DOWN_HITS] < NEURONS


def test_sums_do_not_depend_on_slots() -> None:
    rng = np.random.default_rng(1)
    layout = BundleLayout.make(HIDDEN, True, BundleDtype.FP32)
    records = random_records(rng, layout)
    x, mask = rng.standard_normal((2, HIDDEN)).astype(np.float32), (rng.random((2, NEURONS)) < 0.3).astype(np.uint8)
    found = []
    for hot in (np.arange(0), np.arange(SLOTS)):
        out, scratch = torch.zeros(2, HIDDEN, device=DEVICE), Scratch.make(2, NEURONS, HIDDEN, DEVICE)
        used = torch.zeros(NEURONS, dtype=torch.int32, device=DEVICE)
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
        where = poisoned(records, hot, layout)
        add_ffn(put(x), where, "relu2", put(mask), None, out, scratch, used, counters, put(np.ones(2, np.int64)))
        found.append(out.cpu())
    assert torch.equal(*found)


def test_a_whole_layer_needs_no_mask() -> None:
    layout = BundleLayout.make(HIDDEN, False, BundleDtype.BF16)
    rng = np.random.default_rng(5)
    vectors = {v.name: rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32) for v in layout.vectors}
    records, x = pack_records(layout, vectors), rng.standard_normal((1, HIDDEN)).astype(np.float32)
    out, scratch = torch.zeros(1, HIDDEN, device=DEVICE), Scratch.make(1, NEURONS, HIDDEN, DEVICE)
    used, counters = (
        torch.zeros(NEURONS, dtype=torch.int32, device=DEVICE),
        torch.zeros(NUM_COUNTERS, dtype=torch.int64),
    )
    counters = counters.to(DEVICE)
    where = poisoned(records, np.arange(30, 60), layout)
    add_ffn(put(x), where, "relu2", None, None, out, scratch, used, counters, put(np.ones(1, np.int64)))
    wanted = np.zeros((1, HIDDEN), np.float32)
    ReferenceKernels().ffn(x, records.reshape(-1), np.arange(NEURONS) * layout.stride, None, layout, "relu2", wanted)
    np.testing.assert_allclose(out.cpu().numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert counters.tolist()[:2] == [NEURONS, 30]


@pytest.mark.parametrize("hidden", [HIDDEN, 720])  # codes of 11 bytes, and of 153: a tile and a quarter of one
@pytest.mark.parametrize("num_pinned", [0, 20])
@pytest.mark.parametrize("act", ["relu2", "silu"])
@pytest.mark.parametrize("gated", [True, False])
def test_plane_masks(gated: bool, act: str, num_pinned: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)

    def weight() -> np.ndarray:
        return (rng.standard_normal((70, hidden)) * (HIDDEN / hidden) ** 0.5).astype(np.float32)

    statistics = InputStatistics.of(rng.standard_normal((300, hidden)).astype(np.float32) + 0.2)
    whole = make_plane_sketch(act, weight() if gated else None, weight(), weight(), statistics, 1.69)
    sketch = whole.without(np.arange(70) < num_pinned) if num_pinned else whole
    rows = 4 if DEVICE.type == "cpu" else 16
    x, norm = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((rows, hidden), hidden))
    normed = rms_norm(x, norm, 1e-5)
    wanted = np.empty((rows, 70 - num_pinned), np.float32)
    ReferenceKernels().plane_scores(normed.numpy(), sketch, wanted)
    ordered = np.sort(wanted.ravel())
    threshold, there = float(ordered[35 * rows] + ordered[35 * rows + 1]) / 2, DeviceSketch(sketch, DEVICE)
    first: dict[int, torch.Tensor] = {}
    for bits, laid_out in [(False, False), (True, False), (True, True)] if DEVICE.type == "cuda" else [(False, False)]:
        monkeypatch.setattr(triton_launch, "BITS", bits)
        monkeypatch.setattr(triton_launch, "LAID_OUT", laid_out)
        for num in {4, rows} if DEVICE.type == "cpu" else {1, 4, rows}:
            mask, scores = (
                torch.full((num, 70), 7, dtype=torch.uint8, device=DEVICE),
                put(np.empty_like(wanted[:num])),
            )
            digits, h = Digits.make(num, there.width, DEVICE), torch.empty(num, hidden, device=DEVICE)
            plane_masks(x[:num].to(DEVICE), norm.to(DEVICE), 1e-5, there, threshold, digits, h, mask, scores)
            torch.testing.assert_close(h.cpu(), normed[:num], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(scores.cpu().numpy(), wanted[:num], rtol=1e-4, atol=1e-5 * wanted.max())
            np.testing.assert_array_equal(mask[:, num_pinned:].cpu().numpy(), wanted[:num] >= threshold)
            assert (mask[:, :num_pinned] == 7).all()
            bounds = {"rtol": 1e-6, "atol": 0.0}
            if laid_out:  # sums over the whole row are made in another order
                bounds = {"rtol": 1e-4, "atol": 1e-5 * float(wanted.max())}
            torch.testing.assert_close(first.setdefault(num, scores), scores, **bounds)


@pytest.mark.parametrize("laid_out", WAYS)
def test_a_pass_leaves_its_trail(laid_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "LAID_OUT", laid_out)
    rng, rows = np.random.default_rng(5), 2
    made = random_sketch(rng, HIDDEN, NEURONS, 1.7, True)
    there, x = DeviceSketch(made, DEVICE), torch.randn(rows, HIDDEN, device=DEVICE)
    trail = Trail(torch.zeros_like(x), torch.full((1,), -1, dtype=torch.int32, device=DEVICE), 3)
    mask = torch.empty(rows, NEURONS, dtype=torch.uint8, device=DEVICE)
    digits, norm = Digits.make(rows, there.width, DEVICE), torch.rand(HIDDEN, device=DEVICE)
    plane_masks(x, norm, 1e-5, there, 0.0, digits, torch.empty_like(x), mask, trail=trail)
    assert torch.equal(trail.x, x) and int(trail.at) == 3 * PLACES


SCORED = [(dtype, *shape) for dtype in BundleDtype for shape in ((HIDDEN, 150, 0), (576, 1536, 40))]
SCORED += [(BundleDtype.BF16, 2560, 13000, 0), (BundleDtype.BF16, 4096, 6500, 7)]


@pytest.mark.skipif(
    not triton_launch.by_bits(torch.empty(0, device=DEVICE)),
    reason="products of bits are for GPUs that are quick at them",
)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("dtype", "hidden", "num", "num_pinned"), SCORED)
def test_neurons_that_are_scored_where_they_are_added_up(
    dtype: BundleDtype, hidden: int, num: int, num_pinned: int, gated: bool
) -> None:
    torch.manual_seed(11)
    rng, layout = np.random.default_rng(11), BundleLayout.make(hidden, gated, dtype)
    vectors = {v.name: (torch.randn(num, hidden) * hidden**-0.5).numpy() for v in layout.vectors}
    slab = put(np.concatenate([np.full((3, layout.stride), 255, np.uint8), pack_records(layout, vectors)]))
    records = Records(slab, slab, torch.arange(3, 3 + num, dtype=torch.int32, device=DEVICE), layout, resident=True)
    made, neurons = random_sketch(rng, hidden, num - num_pinned, 1.7, gated), np.arange(num_pinned, num)
    there = DeviceSketch(PlaneSketch("relu2", made.gate, made.up, num, made.down_norm, neurons), DEVICE)
    x, norm = torch.randn(1, hidden).to(DEVICE), torch.rand(hidden, device=DEVICE) + 0.5
    scratch, digits = Scratch.make(1, num, hidden, DEVICE), Digits.make(1, there.width, DEVICE)
    mask, scores = torch.ones(1, num, dtype=torch.uint8, device=DEVICE), torch.zeros(1, num - num_pinned, device=DEVICE)
    h, least, used = torch.empty_like(x), torch.full((num,), 0.02, device=DEVICE), torch.zeros_like(records.table)
    plane_masks(x, norm, 1e-5, there, 0.0, digits, h, mask, scores)
    some, given = float(scores.quantile(0.8)), (torch.rand(1, num, device=DEVICE) < 0.1).to(torch.uint8)
    given[:, :num_pinned] = 1
    assert scores_itself(x, records)
    for threshold, told, live in (
        (some, None, 1),
        (torch.inf, None, 1),
        (-1.0, None, 1),
        (some, given, 1),
        (-1.0, None, 0),
    ):
        plane_masks(x, norm, 1e-5, there, threshold, digits, h, mask)
        outs, counters = [x.clone() for _ in range(2)], torch.zeros(2, NUM_COUNTERS, dtype=torch.int64, device=DEVICE)
        alive, wanted = torch.tensor([live], device=DEVICE), mask if told is None else told
        own = torch.ones_like(mask)
        scoring = Scoring(there, threshold, digits, own, told)
        add_scored(h, scoring, records, "relu2", least, outs[0], scratch, counters[0], alive)
        assert torch.equal(own, mask)
        add_ffn(h, records, "relu2", wanted, least, outs[1], scratch, used, counters[1], alive)
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
        assert counters[0].tolist() == counters[1].tolist()


def test_records_that_shared_memory_cannot_take_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.kernels.triton_neurons.by_bits", lambda x: True)
    monkeypatch.setattr("runtime.kernels.triton_neurons.laid_out", lambda x: True)

    def scored(hidden: int, gated: bool, dtype: BundleDtype, rows: int = 1, resident: bool = True) -> bool:
        layout, none = BundleLayout.make(hidden, gated, dtype), torch.empty(0)
        return scores_itself(torch.empty(rows, hidden), Records(none, none, none, layout, resident))

    assert scored(4096, True, BundleDtype.BF16) and scored(4096, False, BundleDtype.FP32)
    assert not scored(4096, True, BundleDtype.FP32) and not scored(4104, False, BundleDtype.BF16)
    assert not scored(50, True, BundleDtype.INT8) and not scored(25, False, BundleDtype.BF16)  # copies too short
    assert not scored(64, True, BundleDtype.BF16, rows=2) and not scored(64, True, BundleDtype.BF16, resident=False)


@pytest.mark.parametrize("laid_out", WAYS)
@pytest.mark.parametrize("hidden", [50, 720])
def test_bits_are_those_of_the_digits(hidden: int, laid_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "LAID_OUT", laid_out)
    rng, rows = np.random.default_rng(10), 2
    gate, up, down = (rng.standard_normal((9, hidden)).astype(np.float32) for _ in range(3))
    statistics = InputStatistics.of(rng.standard_normal((200, hidden)).astype(np.float32))
    there = DeviceSketch(make_plane_sketch("relu", gate, up, down, statistics, 1.69), DEVICE)
    x, norm, width = (
        put(rng.standard_normal((rows, hidden)).astype(np.float32)),
        torch.ones(hidden, device=DEVICE),
        there.width,
    )
    found = []
    for bits in (False, True):
        scratch = Digits.make(rows, width, DEVICE)
        make_digits(x, norm, 1e-5, there, scratch, torch.empty_like(x), bits)
        found.append(scratch.digits.cpu().numpy())
    digits = found[0][: 8 * 16 * width].reshape(8, 16, width)[:, : 3 * rows].transpose(1, 2, 0)  # [3 B, W, 8]
    planes = found[1][: rows * 24 * width].view(np.uint8).reshape(rows, 3, 8, width)
    spread = np.unpackbits(planes, axis=3, bitorder="little").reshape(rows, 3, 8, width, 8)
    worth = np.array([1, 2, 4, 8, 16, 32, 64, -128])
    numbers = np.einsum("bdiwk,i->bdwk", spread.astype(np.int64), worth)
    np.testing.assert_array_equal(numbers[:, ::-1].reshape(3 * rows, width, 8), digits)
    assert np.abs(digits).max() > 100


def test_gate_masks() -> None:
    rng = np.random.default_rng(3)
    x, gates = rng.standard_normal((2, HIDDEN)).astype(np.float32), put(rng.standard_normal((70, HIDDEN)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kept = gates.to(dtype)
        mask = torch.full((2, 70), 7, dtype=torch.uint8, device=DEVICE)
        gate_masks(put(x), kept, mask)
        wanted = put(x).double() @ kept.double().T > 0
        assert torch.equal(mask == 1, wanted)


@pytest.mark.parametrize("laid_out", WAYS)
@pytest.mark.parametrize("hidden", [300, 2560] if DEVICE.type == "cuda" else [300])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_times_few_rows(
    dtype: torch.dtype, rows: int, hidden: int, laid_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "LAID_OUT", laid_out)
    torch.manual_seed(6)
    x, weight = torch.randn(rows, hidden), torch.randn(70, hidden).to(dtype)
    norm, bias = torch.rand(hidden), torch.randn(70)
    given = [t.to(DEVICE) for t in (x, weight, norm, bias)]
    out = torch.ones(rows, 70, device=DEVICE)
    matvec(given[0], given[1], out, given[2], 1e-5, given[3], added=True)
    wanted, most = rms_norm(x, norm, 1e-5) @ weight.float().T + bias + 1, 1e-4 if hidden == 300 else 2e-4
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-4, atol=most)
    matvec(given[0], given[1], out)
    torch.testing.assert_close(out.cpu(), x @ weight.float().T, rtol=1e-4, atol=most)
    normed = torch.empty_like(given[0])
    norm_rows(given[0], given[2], 1e-5, normed)
    torch.testing.assert_close(normed.cpu(), rms_norm(x, norm, 1e-5), rtol=1e-5, atol=1e-6)


def test_attention_over_pages() -> None:
    torch.manual_seed(4)
    rows, heads, kv_heads, size, page, length = 4, 6, 2, 8, 16, 96
    pages = length // page
    keys, values = (torch.randn(rows, length, kv_heads, size) for _ in range(2))
    tables = torch.randperm(30)[: pages * rows].view(rows, pages)
    positions = torch.tensor([0, 5, 90, 31])
    stores = [torch.full((30, page, kv_heads, size), torch.nan) for _ in range(2)]
    for store, given in zip(stores, (keys, values), strict=True):
        store[tables.flatten()] = given.view(pages * rows, page, kv_heads, size)
    cos, sin = torch.randn(2, length, size // 2)
    slots = tables[torch.arange(rows), positions // page] * page + positions % page
    slots[3] = -1  # writes nothing
    qkv = torch.randn(rows, heads + 2 * kv_heads, size)
    rotated = apply_rope(qkv[:, : heads + kv_heads], cos[positions], sin[positions])
    own = torch.arange(rows), positions
    for store in stores:  # the own token is not there yet
        store.view(-1, kv_heads, size)[slots[:3]] = torch.nan
    keys[own], values[own] = rotated[:, heads:], qkv[:, heads + kv_heads :]
    out, scratch = torch.empty(rows, heads, size, device=DEVICE), Splits.make(rows, heads, size, DEVICE)
    on = [t.to(DEVICE) for t in (qkv, cos, sin, positions, slots)]
    k, v = (s.to(DEVICE) for s in stores)
    for _ in range(2):  # the second time, what arrived must be as it was
        attend(*on, k, v, tables.to(DEVICE), scratch, out, size**-0.5)
        for row, position in enumerate(positions.tolist()):
            k1, v1 = (t[row, : position + 1].repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
            weight = torch.softmax(torch.einsum("hd,thd->ht", rotated[row, :heads], k1) * size**-0.5, dim=1)
            torch.testing.assert_close(out[row].cpu(), torch.einsum("ht,thd->hd", weight, v1), rtol=1e-4, atol=1e-5)
    for store, there, fresh in zip(stores, (k, v), (keys, values), strict=True):
        store.view(-1, kv_heads, size)[slots[:3]] = fresh[own][:3]
        torch.testing.assert_close(there.cpu(), store, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_inputs_of_a_step() -> None:
    given = torch.arange(3 * (FIELDS + 5)).view(3, FIELDS + 5)
    given[:, 0] = torch.tensor([6, 0, 2])
    embedding = torch.randn(7, 24).to(torch.bfloat16)
    fields, tables = torch.zeros(FIELDS, 3, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    made = [t.to(DEVICE) for t in (embedding, fields, tables, torch.zeros(3, 24))]
    inputs(given.pin_memory() if DEVICE.type == "cuda" else given, *made)
    assert torch.equal(made[1].cpu(), given[:, :FIELDS].T) and torch.equal(made[2].cpu(), given[:, FIELDS:])
    assert torch.equal(made[3].cpu(), embedding[given[:, 0]].float())


def test_copies_of_records() -> None:
    source = pinned(np.arange(60, dtype=np.int32).reshape(20, 3))
    target = torch.zeros(5, 3, dtype=torch.int32, device=DEVICE)
    copy_records(source, target, torch.tensor([7, 0], device=DEVICE), torch.tensor([4, 1], device=DEVICE))
    assert torch.equal(target[[4, 1]].cpu(), source[[7, 0]]) and not target[[0, 2, 3]].any()
