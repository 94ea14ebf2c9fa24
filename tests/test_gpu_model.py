"""The GPU tier against the CPU's: the same models, settings and ids, through Triton's interpreter where no GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.budget import HostMemory
from runtime.batch import Batch, SequenceView
from runtime.gpu_plan import DeviceMemory, make_gpu_plan
from runtime.kernels import select
from runtime.load import LoadOptions, load, prepare
from runtime.plan import FfnCache, PlanOptions
from runtime.sparse import sparse_setup

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT, TOKENS = 12, 3


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
        self.blocks = np.arange(4, dtype=np.int32)

    def run(self, kind: str, ids: list[int], start: int, logits: str) -> torch.Tensor:
        positions = torch.arange(start, start + len(ids))
        view = SequenceView(self.blocks, start, len(ids))
        batch = Batch(kind, torch.tensor(ids), positions, (view,), logits)  # type: ignore[arg-type]
        out = self.model.forward_together([batch], self.kv, lambda: None)[0]
        assert out is not None
        return out


def gpu_side(packed_dir: Path, mode: str, percent: float, loaded: Any) -> Side:
    from runtime.gpu_load import make_gpu

    packed = loaded.packed
    config = loaded.model.config
    options = PlanOptions(
        dtype="fp32", mode=mode, ffn_cache=FfnCache(percent=percent), max_model_len=64, max_num_seqs=4
    )
    big = 1 << 40
    plan = make_gpu_plan(
        config, packed.bundles.layout, options, HostMemory(big, big, None, "MemAvailable"),
        DeviceMemory("GPU", big, big), 0, packed.sketch_sizes(packed.cett),
    )  # fmt: skip
    profile = packed.read("profile.safetensors")
    sparse = sparse_setup(packed, profile, packed.cett, plan.num_pinned, select()) if mode == "sparse" else None
    frequency = profile["frequency"][0] if sparse is None else sparse.frequency
    from runtime.load import _load_weights

    weights = _load_weights(packed, torch.float32, quiet)
    parts = make_gpu(packed, config, plan, sparse, frequency, plan.slots_per_layer, weights, DEVICE, quiet)
    return Side(parts.model, parts.kv, parts.slots)


@pytest.mark.parametrize(("mode", "percent"), [("dense", 40.0), ("exact", 40.0), ("sparse", 40.0), ("sparse", 0.0)])
def test_the_same_logits_as_on_the_cpu(packed: Path, mode: str, percent: float) -> None:
    loaded = load(
        str(packed),
        LoadOptions(
            mode=mode,
            dtype="fp32",
            ffn_cache=FfnCache(percent=percent),
            max_model_len=64,
            kernel="reference",
            threads=1,
        ),
        quiet,
    )
    cpu = Side(loaded.model, loaded.engine.kv, None)
    gpu = gpu_side(packed, mode, percent, loaded)
    ids = torch.randint(3, 300, (PROMPT + TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    a, b = (side.run("prefill", ids[:PROMPT], 0, "last") for side in (cpu, gpu))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    for at in range(PROMPT, PROMPT + TOKENS):
        a, b = (side.run("decode", [ids[at]], at, "last") for side in (cpu, gpu))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    loaded.close()
