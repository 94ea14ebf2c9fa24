"""The GPU tier against the CPU's: the same models, settings and ids, through Triton's interpreter where no GPU is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.budget import HostMemory
from cache.errors import DeviceLostError
from runtime.batch import Batch, SequenceView
from runtime.gpu_plan import DeviceMemory, make_gpu_plan
from runtime.kernels import select
from runtime.load import LoadOptions, load, prepare
from runtime.plan import FfnCache, PlanOptions
from runtime.sparse import sparse_setup

pytest.importorskip("triton")

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
    packed_dir: Path, mode: str, percent: float, loaded: Any, below: float | None = None, staging: int = 1 << 20
) -> Side:
    """below: percent of the FFN that main memory keeps of a home on disk."""
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
    assert int(gpu.slots.counters[SWAPPED]) > 0
    if mode == "sparse":
        assert gpu.model.counters().predicted_neurons == cpu.model.counters().predicted_neurons
        assert gpu.model.counters().predicted_rows == cpu.model.counters().predicted_rows
    loaded.close()


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
