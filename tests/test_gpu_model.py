"""The GPU tier against the CPU's: the same models, settings and ids, through Triton's interpreter where no GPU is."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache.budget import HostMemory
from cache.bundle import BundleDtype, BundleLayout, pack_records
from cache.errors import DeviceLostError
from runtime.batch import Batch, SequenceView
from runtime.gpu_plan import DeviceMemory, make_gpu_plan
from runtime.kernels import select
from runtime.load import LoadOptions, load, prepare
from runtime.plan import FfnCache, PlanOptions
from runtime.sparse import sparse_setup

pytest.importorskip("triton")

from runtime.kernels.triton_launch import by_bits
from runtime.kernels.triton_neurons import SWAPPED

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
PROMPT, TOKENS = 12, 64 if CUDA else 2  # the interpreter is slow
RESIDENT = (0.0, 10.0, 50.0, 100.0) if CUDA else (40.0,)  # percent of the FFN


def quiet(what: str, share: float) -> None:
    """No progress."""


@pytest.fixture(scope="module", params=["relu2", "arcee"])
def packed(request: Any, tiny_relu2: Any, tiny_arcee: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = {"relu2": tiny_relu2, "arcee": tiny_arcee}[request.param]
    out = tmp_path_factory.mktemp("gpu") / "packed"
    return prepare(str(tiny.checkpoint), out, tiny.text, 0.2, "fp32", False, quiet)


class Side:
    """One of the two decoders, with a sequence of its own."""

    def __init__(self, model: Any, kv: Any, slots: Any) -> None:
        self.model, self.kv, self.slots = model, kv, slots
        self.blocks = np.arange(6, dtype=np.int32)

    def run(self, kind: str, ids: list[int], start: int, logits: str, blocks: np.ndarray | None = None) -> torch.Tensor:
        positions = torch.arange(start, start + len(ids))
        view = SequenceView(self.blocks if blocks is None else blocks, start, len(ids))
        return self._logits(Batch(kind, torch.tensor(ids), positions, (view,), logits))  # type: ignore[arg-type]

    def step(self, ids: list[int], starts: list[int], blocks: list[np.ndarray]) -> torch.Tensor:
        """A decode step of several sequences."""
        views = tuple(SequenceView(b, start, 1) for b, start in zip(blocks, starts, strict=True))
        return self._logits(Batch("decode", torch.tensor(ids), torch.tensor(starts), views, "last"))

    def _logits(self, batch: Batch) -> torch.Tensor:
        out = self.model.forward_together([batch], self.kv, lambda: None)[0]
        assert out is not None
        return out


def gpu_side(
    packed_dir: Path,
    mode: str,
    percent: float,
    loaded: Any,
    below: float | None = None,
    staging: int = 1 << 20,
    early: int = 0,
) -> Side:
    """below: percent of the FFN that main memory keeps of a home on disk. early: records that may come early."""
    from runtime.gpu_load import make_gpu

    packed = loaded.packed
    config = loaded.model.config
    options = PlanOptions(
        dtype="fp32", mode=mode, ffn_cache=FfnCache(percent=percent), max_model_len=96, max_num_seqs=4
    )
    big = 1 << 40
    plan = make_gpu_plan(
        config, packed.bundles.layout, options, HostMemory(big, big, None, "MemAvailable"),
        DeviceMemory("GPU", big, big), 0, packed.sketch_sizes(packed.cett),
    )  # fmt: skip
    plan = replace(plan, num_early=early)
    if below is not None:
        num = int(config.intermediate_size * below / 100)
        plan = replace(plan, memory_slots_per_layer=(num,) * config.num_hidden_layers, memory_staging_bytes=staging)
    profile = packed.read("profile.safetensors")
    sparse = sparse_setup(packed, profile, packed.cett, loaded.plan.num_pinned, select()) if mode == "sparse" else None
    frequency = profile["frequency"][0] if sparse is None else sparse.frequency
    from runtime.load import _load_weights

    weights = _load_weights(packed, torch.float32, quiet)
    parts = make_gpu(packed, config, plan, sparse, frequency, plan.slots_per_layer, weights, DEVICE, quiet)
    return Side(parts.model, parts.kv, parts.slots)


def cpu_side(packed_dir: Path, mode: str, percent: float) -> tuple[Any, Side]:
    """At the residency that the GPU will have: the pinned set follows it, and is part of what mode sparse means."""
    options = LoadOptions(
        mode=mode, device="cpu", dtype="fp32", ffn_cache=FfnCache(percent=percent), max_model_len=96, max_num_seqs=4,
        kernel="reference", threads=1,
    )  # fmt: skip
    loaded = load(str(packed_dir), options, quiet)
    assert loaded.info["device"] == "cpu"  # or a GPU would be held against itself
    return loaded, Side(loaded.model, loaded.engine.kv, None)


def some_ids(num: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("percent", RESIDENT)
@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_the_same_logits_and_greedy_text_as_on_the_cpu(packed: Path, mode: str, percent: float) -> None:
    loaded, cpu = cpu_side(packed, mode, percent)
    gpu = gpu_side(packed, mode, percent, loaded)
    a, b = (side.run("prefill", some_ids(PROMPT, 1), 0, "last") for side in (cpu, gpu))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    for at in range(PROMPT, PROMPT + TOKENS):
        assert a.argmax() == b.argmax()
        a, b = (side.run("decode", [int(a.argmax())], at, "last") for side in (cpu, gpu))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    if (mode, percent) == ("sparse", 100.0) and by_bits(torch.empty(0, device=DEVICE)):
        assert not gpu.slots.used.any()  # listed neurons are counted: these were found in the bits of their scores
    loaded.close()


@pytest.mark.parametrize("early", [32, 160] if CUDA else [32])
def test_what_comes_early_changes_no_number(packed: Path, monkeypatch: pytest.MonkeyPatch, early: int) -> None:
    monkeypatch.setattr("runtime.gpu_ahead._LEAST_BYTES", 1)
    monkeypatch.setattr("runtime.gpu_ahead.MARGIN", 1.0)
    loaded, _ = cpu_side(packed, "sparse", 10.0)
    plain, ahead = gpu_side(packed, "sparse", 10.0, loaded), gpu_side(packed, "sparse", 10.0, loaded, early=early)

    def same(what: str, *arguments: Any) -> int:
        """Bit by bit: only addresses differ. The likeliest token of the last row."""
        a, b = (getattr(side, what)(*arguments) for side in (plain, ahead))
        assert torch.equal(a, b)
        return int(a[-1].argmax())

    token = same("run", "prefill", some_ids(PROMPT, 1), 0, "last")
    for at in range(PROMPT, PROMPT + (24 if CUDA else 3)):
        token = same("run", "decode", [token], at, "last")
    before, after = plain.slots.snapshot(), ahead.slots.snapshot()
    one, two = (s.tiers["gpu"] for s in (before, after))
    assert two.lookups == one.lookups and 0 < after.prefetch_used_bytes <= after.prefetch_issued_bytes
    assert after.prefetch_used_bytes == (two.hits - one.hits) * ahead.slots.layout.stride
    others = [np.array([9, 2], np.int32), np.array([4, 11], np.int32), np.array([7, 5], np.int32)]
    for num in (2, 3, 2) if CUDA else (2,):  # of three rows nothing comes early
        issued = ahead.slots.snapshot().prefetch_issued_bytes
        same("step", some_ids(num, num), [0] * num, others[:num])
        assert (ahead.slots.snapshot().prefetch_issued_bytes > issued) == (num == 2)
    if CUDA:
        same("run", "score", some_ids(6, 21), 0, "all", np.array([0, 1], np.int32))
    same("run", "decode", [token], at + 1, "last")
    loaded.close()


@pytest.mark.parametrize("below", [None, 0.0], ids=["in memory", "on disk"])
def test_prompts_take_nothing_that_the_gpu_has_whole(packed: Path, below: float | None) -> None:
    loaded, cpu = cpu_side(packed, "dense", 100.0)
    gpu = gpu_side(packed, "dense", 100.0, loaded, below)
    ids = some_ids(PROMPT, 1)
    a, b = (side.run("prefill", ids, 0, "last") for side in (cpu, gpu))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    moved = gpu.slots.snapshot().transfers
    assert moved["cpu", "gpu"].bytes == 0 and (below is None or moved["disk", "cpu"].bytes == 0)
    loaded.close()


@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"] if CUDA else ["sparse"])
def test_batches_chunks_and_scored_texts_while_slots_move(packed: Path, mode: str) -> None:
    loaded, cpu = cpu_side(packed, mode, 40.0)
    gpu = gpu_side(packed, mode, 40.0, loaded)
    gpu.slots.interval = 1
    blocks = [np.array([9, 2], np.int32), np.array([4, 11], np.int32), np.array([7, 5], np.int32)]
    lengths = [5, 16, 9]

    def close(what: str, *arguments: Any) -> None:
        a, b = (getattr(side, what)(*arguments) for side in (cpu, gpu))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)

    for row, length in enumerate(lengths):  # each in two chunks
        ids = some_ids(length, row)
        close("run", "prefill", ids[:3], 0, "last", blocks[row])
        close("run", "prefill", ids[3:], 3, "last", blocks[row])
    for turn in range(2 if CUDA else 1):  # three rows of a graph for four, then one alone
        gpu.slots.used.random_(0, 1000)  # whatever was wanted: who has a slot must not matter
        close("step", some_ids(3, 10 + turn), [n + turn for n in lengths], blocks)
    close("run", "decode", some_ids(1, 20), lengths[1] + turn + 1, "last", blocks[1])
    close("run", "score", some_ids(6 if CUDA else 3, 21), 0, "all", np.array([0, 1], np.int32))
    assert mode == "dense" or int(gpu.slots.counters[SWAPPED]) > 0
    if mode == "sparse":
        assert gpu.model.counters().predicted_neurons == cpu.model.counters().predicted_neurons
        assert gpu.model.counters().predicted_rows == cpu.model.counters().predicted_rows
    loaded.close()


def test_layers_without_a_sketch_are_predicted_whole() -> None:
    from runtime.gpu_masks import PlaneMasks
    from runtime.gpu_model import GpuModel

    slots = SimpleNamespace(seen=lambda: [0, 0, 0, 0, 3, 50])
    model = object.__new__(GpuModel)
    model.config = SimpleNamespace(intermediate_size=100)  # type: ignore[assignment]
    model._ffn = SimpleNamespace(slots=slots, overflow=0, masks=PlaneMasks([None, None], [0, 0], 1, DEVICE))  # type: ignore[assignment]
    model._layers, model._rows, model._steps = [None] * 5, 4 * 5, Counter()  # type: ignore[list-item]
    assert model.counters().predicted_neurons == 50 + 4 * 2 * 100


def test_a_step_with_a_row_that_decodes_and_a_text_that_is_scored_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.gpu_model import GpuModel

    model = object.__new__(GpuModel)
    model._ffn, model._steps = SimpleNamespace(masks=object()), Counter()  # type: ignore[assignment]
    monkeypatch.setattr(model, "_prompts", lambda prompts, *others: [None] * len(prompts), raising=False)
    monkeypatch.setattr(model, "_decode", lambda *arguments: None, raising=False)
    kinds: Any = ("decode", "score", "prefill", "prefill")
    nothing = torch.zeros(1, dtype=torch.int64)
    model._together([Batch(k, nothing, nothing, (), "none") for k in kinds], None, lambda: None)  # type: ignore[arg-type]
    assert model._steps == {"sparse": 1, "prefill": 1}


@pytest.mark.parametrize("start", [0, 5])
def test_rows_attend_as_by_hand_and_no_key_is_repeated(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.gpu_model import F, attend_rows

    def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **others: Any) -> torch.Tensor:
        assert q.shape[1] == keys.shape[1] == 2 and "enable_gqa" not in others
        return plain(q, keys, values, **others)

    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    dice = torch.Generator().manual_seed(start)
    q, keys, values = (torch.randn(n, h, 8, generator=dice) for n, h in ((3, 6), (start + 3, 2), (start + 3, 2)))
    found = attend_rows(q, keys, values, start, 0.3)
    for row in range(3):
        for head in range(6):
            seen = slice(0, start + row + 1)
            weights = torch.softmax(keys[seen, head // 3] @ q[row, head] * 0.3, 0)
            torch.testing.assert_close(found[row, head], weights @ values[seen, head // 3])


def test_a_prompts_matrices_are_widened_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.gpu_ffn import GpuFFN, activation

    rng, most, seen = np.random.default_rng(0), 0, list[weakref.ref[torch.Tensor]]()
    layout = BundleLayout.make(16, True, BundleDtype.INT8)
    vectors = {v.name: rng.standard_normal((12, 16)).astype(np.float32) for v in layout.vectors}
    records, matrix = torch.from_numpy(pack_records(layout, vectors)), GpuFFN._matrix

    def widened(ffn: GpuFFN, *arguments: Any) -> torch.Tensor:
        nonlocal most
        found = matrix(ffn, *arguments)
        seen.append(weakref.ref(found))
        most = max(most, sum(r() is not None for r in seen))
        return found

    monkeypatch.setattr(GpuFFN, "_matrix", widened)
    ffn = object.__new__(GpuFFN)
    ffn._layout, ffn._gemm_dtype, ffn._act = layout, torch.float32, activation("silu")
    rows = [torch.from_numpy(rng.standard_normal((n, 16)).astype(np.float32)) for n in (3, 2)]
    outs = [torch.zeros_like(x) for x in rows]
    ffn._multiply(records, rows, outs)
    gate, up, down = (matrix(ffn, records, name) for name in ("gate", "up", "down"))
    for x, out in zip(rows, outs, strict=True):
        torch.testing.assert_close(out, (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down)
    assert most == 1


def test_a_step_that_leaves_the_gpu_lost_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.gpu_model import GpuModel

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model = object.__new__(GpuModel)
    model._device = torch.device("cuda")
    monkeypatch.setattr(model, "_together", refuse, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        model.forward_together([], None, lambda: None)  # type: ignore[arg-type]
