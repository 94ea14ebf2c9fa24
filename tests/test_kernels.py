"""Every backend that runs here against float64 arithmetic written out below, and against its promises.

Knows the kernels' face only. Backends that this machine or build lacks are skipped by name.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from cache.bundle import BundleDtype, BundleLayout, pack_records, unpack_vector
from cache.errors import UnsupportedError
from runtime.kernels import NAMES, Kernels, select
from runtime.kernels.sketch import Sketch, dequantise_rows, make_sketch, quantise_rows
from runtime.sketches import PlaneMatrix, PlaneSketch, padded_bytes

CANARY = np.float32(-12345.5)
NATIVE = tuple(name for name in NAMES if name != "reference")


def choose(name: str, num_threads: int | None = None) -> Kernels:
    try:
        return select(name, num_threads)
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield choose(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield choose(request.param)


def relative_rmse(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / max(np.mean(expected**2), 1e-30)))


def activate(act: str, a: np.ndarray) -> np.ndarray:
    if act == "silu":
        return np.asarray(a / (1 + np.exp(-a)))
    return np.asarray(np.maximum(a, 0) ** (1 if act == "relu" else 2))


class Layer:
    """Random neurons packed into an arena at shuffled, unaligned places, with their float64 meaning beside."""

    def __init__(self, num: int, hidden: int, gated: bool, dtype: BundleDtype, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.layout = BundleLayout.make(hidden, gated, dtype)
        names = [v.name for v in self.layout.vectors]
        weights = {n: rng.normal(0, hidden**-0.5, (num, hidden)).astype(np.float32) for n in names}
        records = pack_records(self.layout, weights)[:, : self.layout.record_bytes]
        self.weights = {n: unpack_vector(self.layout, records, n).astype(np.float64) for n in names}
        step = self.layout.record_bytes + 3
        self.offsets = rng.permutation(num).astype(np.int64) * step + 1
        self.arena = np.full(num * step + 1, 0xFF, np.uint8)  # 0xFF.. is a NaN in every float format
        for offset, record in zip(self.offsets, records, strict=True):
            self.arena[offset : offset + self.layout.record_bytes] = record
        self.rng = rng

    def x(self, batch: int) -> np.ndarray:
        return self.rng.normal(0, 1, (batch, self.layout.hidden_size)).astype(np.float32)

    def poison(self, k: int) -> None:
        self.arena[self.offsets[k] : self.offsets[k] + self.layout.record_bytes] = 0xFF

    def coefficients(self, x: np.ndarray, act: str) -> np.ndarray:
        up = x.astype(np.float64) @ self.weights["up"].T  # [B, K]
        if not self.layout.gated:
            return activate(act, up)
        return np.asarray(activate(act, x.astype(np.float64) @ self.weights["gate"].T) * up)

    def expected(self, x: np.ndarray, mask: np.ndarray | None, act: str) -> np.ndarray:
        coefficients = self.coefficients(x, act)
        if mask is not None:
            coefficients = np.where(mask, coefficients, 0)
        return np.asarray(coefficients @ self.weights["down"])


def guarded(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """An array of canaries and the writable rows in its middle."""
    whole = np.full((rows + 2, columns), CANARY, np.float32)
    return whole, whole[1:-1]


def check_guards(whole: np.ndarray) -> None:
    assert (whole[0] == CANARY).all() and (whole[-1] == CANARY).all()


@pytest.mark.parametrize("dtype", list(BundleDtype))
@pytest.mark.parametrize(
    ("gated", "act"), [(True, "silu"), (True, "relu"), (True, "relu2"), (False, "relu2"), (False, "silu")]
)
def test_ffn_equals_float64(kernels: Kernels, dtype: BundleDtype, gated: bool, act: str) -> None:
    for hidden, num, batch in ((64, 40, 1), (131, 17, 3), (7, 5, 2), (1, 1, 1), (576, 70, 5)):
        layer = Layer(num, hidden, gated, dtype, seed=hidden)
        x = layer.x(batch)
        mask = layer.rng.random((batch, num)) < 0.6
        whole, out = guarded(batch, hidden)
        start = layer.rng.normal(0, 1, out.shape).astype(np.float32)
        out[:] = start
        kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, act, out)
        check_guards(whole)
        assert relative_rmse(out, start + layer.expected(x, mask, act)) < 2e-6


@pytest.mark.parametrize("batch", range(1, 17))
def test_ffn_every_batch_size(native: Kernels, batch: int) -> None:
    layer = Layer(33, 95, True, BundleDtype.BF16, seed=batch)
    x = layer.x(batch)
    mask = layer.rng.random((batch, 33)) < 0.5
    out = np.zeros((batch, 95), np.float32)
    kernels_mask = mask.view(np.uint8)  # bool and uint8 mean the same
    native.ffn(x, layer.arena, layer.offsets, kernels_mask, layer.layout, "silu", out)
    assert relative_rmse(out, layer.expected(x, mask, "silu")) < 2e-6


def test_ffn_wide_batch(kernels: Kernels) -> None:
    layer = Layer(12, 40, True, BundleDtype.INT8)
    x = layer.x(150)  # more rows than one panel
    mask = layer.rng.random((150, 12)) < 0.3
    out = np.zeros((150, 40), np.float32)
    kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "relu2", out)
    assert relative_rmse(out, layer.expected(x, mask, "relu2")) < 2e-6


def test_ffn_all_none_and_empty(kernels: Kernels) -> None:
    layer = Layer(50, 32, True, BundleDtype.FP32)
    x = layer.x(2)
    out = np.zeros((2, 32), np.float32)
    kernels.ffn(x, layer.arena, layer.offsets, None, layer.layout, "silu", out)
    assert relative_rmse(out, layer.expected(x, None, "silu")) < 2e-6
    before = out.copy()
    kernels.ffn(x, layer.arena, layer.offsets[:0], None, layer.layout, "silu", out)
    kernels.ffn(x, layer.arena, layer.offsets[:0], np.zeros((2, 0), bool), layer.layout, "silu", out)
    kernels.ffn(x, layer.arena, layer.offsets, np.zeros((2, 50), bool), layer.layout, "silu", out)
    kernels.ffn(x[:0], layer.arena, layer.offsets, None, layer.layout, "silu", out[:0])
    assert np.array_equal(out, before)


@pytest.mark.parametrize("dtype", list(BundleDtype))
def test_masked_nan_records_leave_no_trace(kernels: Kernels, dtype: BundleDtype) -> None:
    layer = Layer(30, 48, True, dtype)
    x = layer.x(3)
    mask = layer.rng.random((3, 30)) < 0.7
    mask[:, [0, 7, 29]] = False
    mask[1, 3] = False  # wanted by others, poisoned for row 1 only below
    clean, poisoned = np.zeros((3, 48), np.float32), np.zeros((3, 48), np.float32)
    kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", clean)
    for k in (0, 7, 29):
        layer.poison(k)
    kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", poisoned)
    assert np.array_equal(clean, poisoned)
    if dtype is not BundleDtype.INT8:
        mask[[0, 2], 3] = True
        layer.poison(3)
        kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", poisoned)
        assert np.isnan(poisoned[[0, 2]]).all() and np.isfinite(poisoned[1]).all()


def test_masked_records_are_not_read(native: Kernels) -> None:
    """The unwanted records lie in a page without permissions: reading one would kill the process."""
    layout = BundleLayout.make(512, True, BundleDtype.FP32)
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    arena = np.frombuffer(pages, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    hole = ctypes.c_void_p(arena.ctypes.data + 2 * mmap.PAGESIZE)
    assert libc.mprotect(hole, 2 * mmap.PAGESIZE, 0) == 0
    offsets = np.array([0, 2 * mmap.PAGESIZE, 0], np.int64)
    out = np.zeros((2, 512), np.float32)
    mask = np.array([[1, 0, 1], [1, 0, 0]], np.uint8)
    native.ffn(np.ones((2, 512), np.float32), arena, offsets, mask, layout, "silu", out)
    assert libc.mprotect(hole, 2 * mmap.PAGESIZE, 3) == 0
    assert (out == 0).all()


def at_page_end(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last one before a page without permissions."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    hole = ctypes.c_void_p(whole.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(hole, mmap.PAGESIZE, 0) == 0
    copy = whole[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


@pytest.mark.parametrize("hidden", [1, 7, 33, 130, 577])
def test_nothing_beyond_the_arrays_is_touched(native: Kernels, hidden: int) -> None:
    x = at_page_end(np.ones((3, hidden), np.float32))
    for dtype in BundleDtype:
        layer = Layer(5, hidden, True, dtype)
        out, end = at_page_end(np.zeros((3, hidden), np.float32)), layer.layout.checksum_offset
        arena = at_page_end(layer.arena[: layer.offsets.max() + end])
        tight = replace(layer.layout, record_bytes=end)  # the vectors end where the arena does
        native.ffn(x, arena, layer.offsets, None, tight, "silu", out)
        assert relative_rmse(out, layer.expected(x, None, "silu")) < 2e-6
    sketch = random_sketch(5, hidden, True)
    assert sketch.gate_codes is not None
    sketch = replace(sketch, gate_codes=at_page_end(sketch.gate_codes), up_codes=at_page_end(sketch.up_codes))
    native.sketch_scores(x, sketch, "silu", at_page_end(np.zeros((3, 5), np.float32)))
    for gated in (True, False):
        planes = random_planes(5, hidden, gated, "relu2", guard=at_page_end)
        native.plane_scores(x, planes, at_page_end(np.zeros((3, 5), np.float32)))
    for weight in (np.ones((5, hidden), np.float32), np.ones((5, hidden), np.uint16)):
        native.linear(x, at_page_end(weight), at_page_end(np.zeros((3, 5), np.float32)))
        kv = at_page_end(weight[:4].reshape(1, 4, 1, hidden))
        table = at_page_end(np.zeros(1, np.int32))
        native.paged_attention(x, kv, kv, table, 4, at_page_end(np.zeros((3, hidden), np.float32)), 1.0)


def test_zero_activation_adds_nothing(kernels: Kernels) -> None:
    layer = Layer(20, 33, True, BundleDtype.FP32)
    x = layer.x(1)
    dead = np.flatnonzero(layer.coefficients(x, "relu")[0] == 0)
    clean, poisoned = np.zeros((1, 33), np.float32), np.zeros((1, 33), np.float32)
    kernels.ffn(x, layer.arena, layer.offsets, None, layer.layout, "relu", clean)
    for k in dead:
        down = layer.offsets[k] + layer.layout.vector("up").offset
        layer.arena[down : down + 2 * 33 * 4] = 0xFF  # up and down are NaN, the gate is closed
    kernels.ffn(x, layer.arena, layer.offsets, None, layer.layout, "relu", poisoned)
    assert len(dead) > 0 and np.array_equal(clean, poisoned)


def test_nan_is_not_hidden(kernels: Kernels) -> None:
    for act in ("silu", "relu", "relu2"):
        layer = Layer(4, 33, True, BundleDtype.BF16)
        x, out = layer.x(1), np.zeros((1, 33), np.float32)
        layer.poison(2)
        kernels.ffn(x, layer.arena, layer.offsets, None, layer.layout, act, out)
        assert np.isnan(out).all()


@pytest.mark.parametrize("dtype", [BundleDtype.FP16, BundleDtype.INT8])
@pytest.mark.parametrize("gated", [True, False])
def test_active_neurons_are_counted_and_nothing_is_dropped(kernels: Kernels, gated: bool, dtype: BundleDtype) -> None:
    layer = Layer(60, 64, gated, dtype)
    x = layer.x(2)
    coefficients = np.abs(layer.coefficients(x, "silu"))
    middle = np.sort(coefficients.ravel())
    threshold = np.full(60, (middle[50] + middle[51]) / 2, np.float32)
    mask = np.ones((2, 60), bool)
    mask[0, :30] = False
    out = np.zeros((2, 64), np.float32)
    count = kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", out, threshold)
    assert count == int(((coefficients >= threshold) & mask).sum())
    assert kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", out) == int(mask.sum())
    assert relative_rmse(out, 2 * layer.expected(x, mask, "silu")) < 1e-5


@pytest.mark.parametrize("dtype", list(BundleDtype))
def test_ffn_row_depends_on_itself_only(kernels: Kernels, dtype: BundleDtype) -> None:
    layer = Layer(45, 130, True, dtype)
    x = layer.x(16)
    mask = layer.rng.random((16, 45)) < 0.5
    together = np.zeros((16, 130), np.float32)
    kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", together)
    for b in range(16):
        alone = np.zeros((1, 130), np.float32)
        kernels.ffn(x[b : b + 1], layer.arena, layer.offsets, mask[b : b + 1], layer.layout, "silu", alone)
        own = np.zeros((1, 130), np.float32)  # only its own records listed, in the same order
        kernels.ffn(x[b : b + 1], layer.arena, layer.offsets[mask[b]], None, layer.layout, "silu", own)
        assert np.array_equal(alone[0], together[b]) and np.array_equal(own, alone)


@pytest.mark.parametrize("name", NATIVE)
def test_threads_change_no_bit(name: str) -> None:
    kernels = choose(name, 1)
    layer = Layer(300, 200, True, BundleDtype.BF16)
    x = layer.x(5)
    mask = layer.rng.random((5, 300)) < 0.5
    sketch = make_sketch(layer.weights["gate"], layer.weights["up"], layer.weights["down"])
    planes = random_planes(300, 200, True, "silu")
    keys = layer.rng.normal(0, 1, (2, 40, 16, 3, 24)).astype(np.float32)
    table = np.arange(40, dtype=np.int32)[::-1].copy()
    results = []
    for threads in (1, 2, 3, 7):
        kernels.set_num_threads(threads)
        assert kernels.num_threads == threads
        ffn, scores = np.zeros((5, 200), np.float32), np.zeros((2, 5, 300), np.float32)
        linear, attention = np.zeros((5, 6000), np.float32), np.zeros((9, 24), np.float32)
        kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", ffn)
        kernels.sketch_scores(x, sketch, "silu", scores[0])
        kernels.plane_scores(x, planes, scores[1])
        kernels.linear(x, np.resize(layer.weights["up"].astype(np.float32), (6000, 200)), linear)
        kernels.paged_attention(np.resize(x, (9, 24)), keys[0], keys[1], table, 601, attention, 0.2)
        results.append((ffn, scores, linear, attention))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


FEW_THREADS = """
import mmap, resource
from pathlib import Path
import numpy as np
from runtime.kernels import select

kernels = select("auto", 2)
pages = int(Path("/proc/self/statm").read_text().split()[0])
stack = 8 << 20  # of a thread: a few fit
resource.setrlimit(resource.RLIMIT_STACK, (stack, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + int(4.5 * stack),) * 2)
kernels.set_num_threads(64)
out = np.zeros((1, 512), np.float32)
kernels.linear(np.ones((1, 8), np.float32), np.ones((512, 8), np.float32), out)
print(kernels.num_threads, float(out.sum()))
"""


def test_fewer_threads_than_wanted_compute_all_the_same(native: Kernels) -> None:
    done = subprocess.run([sys.executable, "-c", FEW_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads, total = done.stdout.split()
    assert 1 <= int(threads) < 64 and float(total) == 512 * 8


def test_many_short_calls(native: Kernels) -> None:
    """The pool's threads neither miss a round nor run one twice, awake or asleep."""
    native.set_num_threads(3)
    x, weight, out = np.ones((1, 8), np.float32), np.ones((64, 8), np.float32), np.zeros((1, 64), np.float32)
    for i in range(3000):
        x[:] = i
        native.linear(x, weight, out)
        assert (out == 8 * i).all()


def test_bad_offsets_are_index_errors(kernels: Kernels) -> None:
    layer = Layer(3, 16, True, BundleDtype.FP32)
    x, out = layer.x(1), np.full((1, 16), CANARY)
    most = layer.arena.shape[0] - layer.layout.record_bytes
    for bad in (-1, most + 1, 2**62, -(2**62)):
        offsets = np.array([0, bad], np.int64)
        with pytest.raises(IndexError, match="outside the arena"):
            kernels.ffn(x, layer.arena, offsets, np.array([[True, False]]), layer.layout, "silu", out)
    with pytest.raises(IndexError):
        kernels.ffn(x, layer.arena[:5], np.zeros(1, np.int64), None, layer.layout, "silu", out)
    assert (out == CANARY).all()


def test_wrong_dtypes_are_type_errors(kernels: Kernels) -> None:
    layer = Layer(3, 16, True, BundleDtype.FP32)
    good = {"x": layer.x(1), "arena": layer.arena, "offsets": layer.offsets, "mask": np.ones((1, 3), bool)}
    wrong = [("x", np.float64), ("x", np.float16), ("arena", np.int8), ("offsets", np.int32), ("mask", np.int64)]
    out = np.full((1, 16), CANARY)
    for name, dtype in wrong:
        a = {**good, name: good[name].astype(dtype)}
        with pytest.raises(TypeError):
            kernels.ffn(a["x"], a["arena"], a["offsets"], a["mask"], layer.layout, "silu", out)
    with pytest.raises(TypeError):
        kernels.ffn(layer.x(1), layer.arena, layer.offsets, None, layer.layout, "silu", np.zeros((1, 16)))
    with pytest.raises(TypeError):
        kernels.ffn(layer.x(1), layer.arena, layer.offsets, None, layer.layout, "silu", out, np.zeros(3))
    with pytest.raises(TypeError):
        kernels.linear(good["x"], np.zeros((2, 16), np.int16), np.zeros((1, 2), np.float32))
    assert (out == CANARY).all()


def test_strided_and_readonly_arrays_are_refused(native: Kernels) -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones((4, 8), np.float32)
    out = np.zeros((2, 4), np.float32)
    for args in ((np.ones((8, 2), np.float32).T, weight, out), (x, weight, np.zeros((4, 2), np.float32).T)):
        with pytest.raises(TypeError):
            native.linear(*args)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        native.linear(x, weight, out)
    assert (out == 0).all()


def test_wrong_shapes_and_names_are_value_errors(kernels: Kernels) -> None:
    layer = Layer(3, 16, True, BundleDtype.FP32)
    x, out = layer.x(2), np.zeros((2, 16), np.float32)
    mask = np.ones((2, 3), bool)
    cases = [
        (x[:, :8].copy(), mask, "silu", out),
        (x, mask[:1], "silu", out),
        (x, mask[:, :2].copy(), "silu", out),
        (x, mask, "gelu", out),
        (x, mask, "silu", out[:1]),
    ]
    for wrong_x, wrong_mask, act, wrong_out in cases:
        with pytest.raises(ValueError):
            kernels.ffn(wrong_x, layer.arena, layer.offsets, wrong_mask, layer.layout, act, wrong_out)
    with pytest.raises(ValueError):
        kernels.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "silu", out, np.zeros(2, np.float32))
    with pytest.raises(ValueError):
        kernels.linear(x, np.zeros((4, 15), np.float32), np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError):
        kernels.set_num_threads(0)


# ---- sketch ----------------------------------------------------------------------------------------------------------


def random_sketch(num: int, hidden: int, gated: bool, seed: int = 0) -> Sketch:
    gate, up, down = np.random.default_rng(seed).normal(0, 0.1, (3, num, hidden)).astype(np.float32)
    return make_sketch(gate if gated else None, up, down)


@pytest.mark.parametrize(("gated", "act"), [(True, "silu"), (True, "relu2"), (False, "relu2"), (False, "relu")])
def test_sketch_scores_equal_float64(kernels: Kernels, gated: bool, act: str) -> None:
    for num, hidden, batch in ((1, 1, 1), (5, 7, 2), (70, 129, 4), (33, 576, 9), (200, 64, 1), (0, 16, 2)):
        sketch = random_sketch(num, hidden, gated, seed=hidden)
        x = np.random.default_rng(num).normal(0, 1, (batch, hidden)).astype(np.float32)
        up = x.astype(np.float64) @ dequantise_rows(sketch.up_codes, sketch.up_scale, hidden).astype(np.float64).T
        expected = activate(act, up)
        if sketch.gate_codes is not None and sketch.gate_scale is not None:
            gate = dequantise_rows(sketch.gate_codes, sketch.gate_scale, hidden).astype(np.float64)
            expected = activate(act, x.astype(np.float64) @ gate.T) * up
        whole, out = guarded(batch, num)
        kernels.sketch_scores(x, sketch, act, out)
        check_guards(whole)
        if num:
            assert relative_rmse(out, np.abs(expected) * sketch.down_norm) < 2e-6


def test_sketch_row_depends_on_itself_only(native: Kernels) -> None:
    sketch = random_sketch(90, 200, True)
    x = np.random.default_rng(1).normal(0, 1, (7, 200)).astype(np.float32)
    together = np.zeros((7, 90), np.float32)
    native.sketch_scores(x, sketch, "silu", together)
    for b in range(7):
        alone = np.zeros((1, 90), np.float32)
        native.sketch_scores(x[b : b + 1], sketch, "silu", alone)
        assert np.array_equal(alone[0], together[b])


def test_quantise_rows() -> None:
    rng = np.random.default_rng(3)
    for num, hidden in ((3, 1), (9, 31), (1030, 16)):
        w = rng.normal(0, 1, (num, hidden)).astype(np.float32)
        codes, scale = quantise_rows(w)
        assert codes.shape == (num, (hidden + 1) // 2) and codes.dtype == np.uint8 and scale.dtype == np.float32
        got = dequantise_rows(codes, scale, hidden)
        largest = np.abs(w).max(axis=1) / 7
        plain = np.clip(np.rint(w / largest[:, None]), -7, 7) * largest[:, None]
        errors = ((got - w) ** 2).sum(axis=1), ((plain - w) ** 2).sum(axis=1)
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all()  # the search is never worse than max|w| / 7
        if hidden % 2:
            assert (codes[:, -1] >> 4 == 8).all()  # the pad is a zero
    w = rng.normal(0, 1, (64, 576)).astype(np.float32)
    assert relative_rmse(dequantise_rows(*quantise_rows(w), 576), w) < 0.12  # 4 bits of a normal distribution
    codes, scale = quantise_rows(np.zeros((2, 4), np.float32))
    assert (dequantise_rows(codes, scale, 4) == 0).all() and np.isfinite(scale).all()


def test_nibble_order() -> None:
    codes, scale = quantise_rows(np.array([[7, -7, 3]], np.float32))
    assert scale[0] == 1 and codes.tolist() == [[15 | 1 << 4, 11 | 8 << 4]]


def test_sketch_checks_its_shapes() -> None:
    sketch = random_sketch(6, 10, True)
    assert sketch.num_bytes == 2 * 6 * 5 + 3 * 6 * 4
    with pytest.raises(ValueError, match="neither"):
        Sketch(sketch.gate_codes, None, sketch.up_codes, sketch.up_scale, sketch.down_norm, 10)
    with pytest.raises(ValueError, match="codes"):
        Sketch(None, None, sketch.up_codes, sketch.up_scale, sketch.down_norm, 12)
    with pytest.raises(ValueError, match="norm"):
        Sketch(None, None, sketch.up_codes, sketch.up_scale, sketch.down_norm[:2], 10)


# ---- planes ----------------------------------------------------------------------------------------------------------

Guard = Callable[[np.ndarray], np.ndarray]


def random_planes(num: int, hidden: int, gated: bool, act: str, seed: int = 0, guard: Guard = np.copy) -> PlaneSketch:
    """Any bits are codes: a sketch of nothing in particular, dimensions of 0 to 6 bits, noise as large as a row."""
    rng = np.random.default_rng(seed)

    def matrix() -> PlaneMatrix:
        bits = rng.integers(0, 7, hidden).astype(np.uint8)
        planes = rng.random((num, int(bits.sum()))) < 0.5
        codes = np.zeros((num, padded_bytes(planes.shape[1])), np.uint8)
        codes[:, : (planes.shape[1] + 7) // 8] = np.packbits(planes, axis=1, bitorder="little")
        step, scale = rng.uniform(0.1, 2, hidden).astype(np.float16), rng.uniform(0.1, 1, num).astype(np.float16)
        bias = rng.normal(0, 1, num).astype(np.float16)
        parts = (guard(a) for a in (bits, step, codes, scale, bias))
        return PlaneMatrix(*parts, unit=0.03, noise=hidden**0.5)

    norms = guard(rng.uniform(0.5, 2, num).astype(np.float16))
    return PlaneSketch(act, matrix() if gated else None, matrix(), num, None if gated else norms)


def plane_rows(planes: PlaneMatrix, x: np.ndarray, largest_z: float | None) -> np.ndarray:
    """directions . x + bias, float64 [B, K], from the definition; z rounded to units of its largest over largest_z."""
    dimension, coefficient = planes.planes()
    signs = np.unpackbits(planes.codes, axis=1, count=dimension.size, bitorder="little") * 2.0 - 1
    z = x[:, dimension].astype(np.float64) * coefficient
    if largest_z is not None:
        unit = np.maximum(np.abs(z).max(axis=1, keepdims=True, initial=0), 1e-30) / largest_z
        z = np.rint(z / unit) * unit
    return np.asarray(z @ signs.T + planes.bias)


def plane_scores(sketch: PlaneSketch, x: np.ndarray, largest_z: float | None) -> np.ndarray:
    inner = sketch.gate or sketch.up
    centre, scale = plane_rows(inner, x, largest_z), inner.scale.astype(np.float64) * inner.unit
    points = [activate(sketch.act, (centre + sd * inner.noise) * scale) ** 2 for sd in (-(3**0.5), 0, 3**0.5)]
    expected = np.sqrt(points[0] / 6 + points[1] * 2 / 3 + points[2] / 6)
    if sketch.gate is None:
        return np.asarray(expected * sketch.down_norm)
    up = sketch.up
    return np.asarray(expected * np.hypot(plane_rows(up, x, largest_z), up.noise) * (up.scale * np.float64(up.unit)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ["silu", "relu", "relu2"])
def test_plane_scores_equal_float64(kernels: Kernels, gated: bool, act: str) -> None:
    largest_z = None if kernels.name == "reference" else 8160.0
    for num, hidden, batch in ((1, 1, 1), (5, 7, 2), (33, 129, 4), (31, 10, 3), (70, 576, 5), (200, 64, 1), (0, 16, 2)):
        sketch = random_planes(num, hidden, gated, act, seed=hidden)
        x = np.random.default_rng(num).normal(0, 1, (batch, hidden)).astype(np.float32)
        whole, out = guarded(batch, num)
        kernels.plane_scores(x, sketch, out)
        check_guards(whole)
        if num:
            assert relative_rmse(out, plane_scores(sketch, x, largest_z)) < 2e-5
            assert relative_rmse(out, sketch.predict(x)) < 2e-3  # what rounding z may do


def test_plane_scores_without_the_pinned(kernels: Kernels) -> None:
    sketch = random_planes(50, 40, True, "relu2")
    pinned = np.arange(50) % 3 == 0
    x = np.random.default_rng(0).normal(0, 1, (2, 40)).astype(np.float32)
    every, rest = np.zeros((2, 50), np.float32), np.zeros((2, 33), np.float32)
    kernels.plane_scores(x, sketch, every)
    kernels.plane_scores(x, sketch.without(pinned), rest)
    np.testing.assert_allclose(rest, every[:, ~pinned], rtol=1e-5)


def test_plane_row_depends_on_itself_only(native: Kernels) -> None:
    for gated in (True, False):
        sketch = random_planes(90, 200, gated, "relu2")
        x = np.random.default_rng(1).normal(0, 1, (7, 200)).astype(np.float32)
        x[3] *= -50
        together = np.zeros((7, 90), np.float32)
        native.plane_scores(x, sketch, together)
        for b in range(7):
            alone = np.zeros((1, 90), np.float32)
            native.plane_scores(x[b : b + 1], sketch, alone)
            assert np.array_equal(alone[0], together[b])


def test_planes_of_nothing_and_of_what_is_not_finite(native: Kernels) -> None:
    x = np.ones((4, 33), np.float32)
    x[1], x[2, 32], x[3, 0] = 0, np.nan, np.inf
    for gated in (True, False):
        sketch = random_planes(40, 33, gated, "relu2", seed=1)
        assert all(planes.bits[[0, 32]].all() for planes in (sketch.gate, sketch.up) if planes is not None)
        out = np.zeros((4, 40), np.float32)
        native.plane_scores(x, sketch, out)
        assert np.isfinite(out[:2]).all() and np.isnan(out[2:]).all()
        assert relative_rmse(out[1:2], sketch.predict(x[1:2])) < 1e-6  # bias and noise alone


def test_planes_check_their_arrays(kernels: Kernels) -> None:
    sketch = random_planes(6, 10, True, "relu2")
    x, out = np.zeros((2, 10), np.float32), np.full((2, 6), CANARY)
    for wrong_x, wrong_out in ((x[:, :9].copy(), out), (x, out[:, :5].copy()), (x, out[:1])):
        with pytest.raises(ValueError):
            kernels.plane_scores(wrong_x, sketch, wrong_out)
    with pytest.raises(TypeError):
        kernels.plane_scores(x.astype(np.float64), sketch, out)
    with pytest.raises(TypeError):
        kernels.plane_scores(x, sketch, out.astype(np.float64))
    with pytest.raises(ValueError, match="gelu"):
        kernels.plane_scores(x, PlaneSketch("gelu", sketch.gate, sketch.up, 6), out)
    assert (out == CANARY).all()


# ---- linear ----------------------------------------------------------------------------------------------------------


def to_bf16(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bf16 bits (truncated) as uint16 and the float64 values they stand for."""
    bits = (a.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_linear_equals_float64(kernels: Kernels, dtype: str) -> None:
    rng = np.random.default_rng(5)
    for num, hidden in ((1, 1), (33, 77), (100, 576)):
        w = rng.normal(0, 1, (num, hidden)).astype(np.float32)
        weight, exact = to_bf16(w) if dtype == "bf16" else (w, w.astype(np.float64))
        if dtype == "fp16":
            weight = w.astype(np.float16)
            exact = weight.astype(np.float64)
        x = rng.normal(0, 1, (16, hidden)).astype(np.float32)
        whole, out = guarded(16, num)
        kernels.linear(x, weight, out)
        check_guards(whole)
        assert relative_rmse(out, x.astype(np.float64) @ exact.T) < 2e-6
        for batch in range(1, 16):
            whole, part = guarded(batch, num)
            kernels.linear(x[:batch], weight, part)
            check_guards(whole)
            assert np.array_equal(part, out[:batch])


def test_fp16_bits_are_all_understood(native: Kernels) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    out = np.zeros((1, 1 << 16), np.float32)
    native.linear(np.ones((1, 1), np.float32), bits, out)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(out[0], bits[:, 0].astype(np.float32), equal_nan=True)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    group = q.shape[0] // k.shape[1]
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        scores = k[:, head // group] @ q[head].astype(np.float64) * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // group] / weights.sum()
    return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 255, 256, 257, 700])
def test_attention_equals_float64(kernels: Kernels, dtype: str, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    for heads, kv_heads, head_dim in ((9, 3, 64), (4, 4, 20), (8, 1, 33)):
        kv = rng.normal(0, 2, (2, 50, 16, kv_heads, head_dim)).astype(np.float32)
        stored, exact = to_bf16(kv) if dtype == "bf16" else (kv, kv.astype(np.float64))
        table = rng.permutation(50)[: -(-num_tokens // 16)].astype(np.int32)
        stored[:, np.setdiff1d(np.arange(50), table)] = 0xFFFF if dtype == "bf16" else np.nan  # not ours to read
        k, v = (a[table].reshape(-1, kv_heads, head_dim)[:num_tokens] for a in exact)
        q = rng.normal(0, 2, (heads, head_dim)).astype(np.float32)
        whole, out = guarded(heads, head_dim)
        kernels.paged_attention(q, stored[0], stored[1], table, num_tokens, out, 0.37)
        check_guards(whole)
        assert relative_rmse(out, attention(q, k, v, 0.37)) < 5e-6


def test_attention_survives_large_scores(kernels: Kernels) -> None:
    kv = np.zeros((2, 2, 16, 1, 8), np.float32)
    kv[0, 0, :, 0, 0] = np.arange(16) * 1000
    kv[1, 0, :, 0, 3] = np.arange(16)
    out = np.zeros((1, 8), np.float32)
    kernels.paged_attention(np.ones((1, 8), np.float32), kv[0], kv[1], np.zeros(1, np.int32), 16, out, 1.0)
    assert out[0].tolist() == [0, 0, 0, 15, 0, 0, 0, 0]


def test_attention_checks_its_table(kernels: Kernels) -> None:
    kv = np.zeros((4, 16, 2, 8), np.float32)
    q, out = np.zeros((4, 8), np.float32), np.zeros((4, 8), np.float32)
    for table in ([0, 4], [-1, 0]):
        with pytest.raises(IndexError):
            kernels.paged_attention(q, kv, kv, np.array(table, np.int32), 17, out, 1.0)
    kernels.paged_attention(q, kv, kv, np.array([0, 4], np.int32), 16, out, 1.0)  # the second block is not used
    for tokens in (0, 33):
        with pytest.raises(ValueError):
            kernels.paged_attention(q, kv, kv, np.array([0, 1], np.int32), tokens, out, 1.0)
    with pytest.raises(TypeError):
        kernels.paged_attention(q, kv, kv, np.array([0, 1]), 16, out, 1.0)
    with pytest.raises(TypeError):
        kernels.paged_attention(q, kv, kv.view(np.uint16)[..., :8].copy(), np.zeros(1, np.int32), 16, out, 1.0)
    with pytest.raises(ValueError):
        kernels.paged_attention(q[:3], kv, kv, np.zeros(1, np.int32), 16, out[:3], 1.0)


@pytest.mark.parametrize("name", NATIVE)
def test_read_through_reads_everything_once(name: str) -> None:
    kernels = choose(name, 3)
    from runtime.kernels.native import NativeKernels

    assert isinstance(kernels, NativeKernels)
    step = 256
    data = np.ones((5 << 20) // step * step, np.uint8)
    words = data.view(np.int32).sum(dtype=np.int64)
    assert (kernels.read_through(data) - words) % (1 << 32) == 0
    data[:4] = 0  # the first word counts, and so does the last
    data[-4:] = 0
    assert (kernels.read_through(data) - words + 2 * 0x01010101) % (1 << 32) == 0
    assert kernels.read_through(data[:0]) == 0


@pytest.mark.parametrize("name", NATIVE)
def test_read_records_reads_each_once(name: str) -> None:
    kernels = choose(name, 3)
    from runtime.kernels.native import NativeKernels

    assert isinstance(kernels, NativeKernels)
    data = np.random.default_rng(0).integers(0, 256, 300 * 768, np.uint8)
    for num in (0, 1, 3, 4, 5, 150):
        offsets = np.random.default_rng(num).permutation(300)[:num].astype(np.int64) * 768
        words = sum(int(data[at : at + 512].view(np.int32).sum(dtype=np.int64)) for at in offsets)
        assert (kernels.read_records(data, offsets, 512) - words) % (1 << 32) == 0
    with pytest.raises(ValueError, match="outside"):
        kernels.read_records(data, np.array([data.size - 256], np.int64), 512)


def test_select() -> None:
    assert select("reference").name == "reference"
    assert select().name in NAMES
    with pytest.raises(UnsupportedError, match="'neon'"):
        select("neon")


@pytest.mark.parametrize("dtype", list(BundleDtype))
@pytest.mark.parametrize("rows", [1, 3])
def test_native_sums_made_in_pieces_are_those_made_at_once(native: Kernels, dtype: BundleDtype, rows: int) -> None:
    """Bit for bit: what is resident may be computed while the rest is read."""
    num, hidden = 53, 97
    layer = Layer(num, hidden, True, dtype)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    mask = rng.random((rows, num)) < 0.6
    whole = np.zeros_like(x)
    native.ffn(x, layer.arena, layer.offsets, mask, layer.layout, "relu2", whole)
    for cut in (0, 1, 8, 21, 52, num):
        pieces = np.zeros_like(x)
        for some in (slice(0, cut), slice(cut, num)):
            own = np.ascontiguousarray(mask[:, some])
            native.ffn(x, layer.arena, layer.offsets[some], own, layer.layout, "relu2", pieces)
        np.testing.assert_array_equal(pieces, whole)
