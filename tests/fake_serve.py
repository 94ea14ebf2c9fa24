"""A process for test_serve.py: `coldstream` with a runtime that loads nothing, slowly, badly or never, as told."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cache.budget import HostMemory
from cache.bundle import BundleDtype, BundleLayout
from cache.errors import FormatError, FormatKind
from runtime.config import ModelConfig
from runtime.plan import Plan, PlanOptions, make_plan

CONFIG = ModelConfig(
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "gated": True},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "max_position_embeddings": 256},
    **{
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_ids": (),
        "dtype": "fp32",
    },
)


class FakeEngine:
    """Says what was done to it; runs no request. fails: breaks down once it has started."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def start(self, on_failure: Callable[[], None]) -> None:
        print("engine started", flush=True)
        if self._fails:
            threading.Timer(0.2, on_failure).start()

    def shutdown(self, drain_timeout_s: float) -> None:
        print(f"engine shut down within {drain_timeout_s:g} s", flush=True)


def open_plan(model: str, options: PlanOptions, pack_options: object = None) -> Plan:
    host = HostMemory(8 << 30, 6 << 30, None, "MemAvailable")
    mode = "sparse" if options.mode == "auto" else options.mode
    layout = BundleLayout.make(64, True, BundleDtype.BF16)
    return make_plan(CONFIG, layout, replace(options, mode=mode), host, 200 << 20)


def load(model: str, options: Any, progress: Callable[[str, float], None]) -> Any:
    gate = Path(model)
    while gate.name == "slow" and not gate.exists():  # until the test makes the file
        progress("packing", 0.5)
        time.sleep(0.01)
    if gate.name == "broken":
        raise FormatError(FormatKind.TRUNCATED, f"{model}: ends early")
    progress("warming", 1.0)
    plan = open_plan(model, PlanOptions())
    info = {
        "mode": "dense" if gate.name == "dense" else "sparse",
        "cett": 0.1,
        "kernel": "fake",
        "io_engine": "fake",
        "device": "cpu",
    }
    return SimpleNamespace(
        engine=FakeEngine(gate.name == "frail"), tokenizer=None, plan=plan, info=info, close=lambda: print("closed")
    )


def main() -> None:
    fake = types.ModuleType("runtime.load")
    fake.__dict__.update(
        open_plan=open_plan,
        load=load,
        cache_directory=lambda: Path("CACHE"),
        default_calibration=lambda: Path("CALIBRATION"),
        LoadOptions=SimpleNamespace,
    )
    sys.modules["runtime.load"] = fake
    from server.cli import main as command

    command()


if __name__ == "__main__":
    main()
