"""Offline decode, measured: what `coldstream bench` runs. Knows the engine's parts and a clock.

The tokens are those of a held-out text, given in (teacher forcing), not sampled: greedy text of a small model loops,
and a loop flatters every cache.
"""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.errors import ColdstreamError
from cache.stats import CacheSnapshot
from runtime.batch import Batch, SequenceView
from runtime.forecast import Forecast
from runtime.gpu_forecast import GpuForecast
from runtime.kv_cache import KVCache
from runtime.load import Loaded, LoadOptions, default_heldout, load
from runtime.pack import Progress
from runtime.windows import read_text


def bench(
    model: str, options: LoadOptions, prompt_tokens: int, tokens: int, text: Path | None, progress: Progress
) -> dict[str, Any]:
    """Prefills `prompt_tokens` of the text, decodes the next `tokens` one by one; the figures as one flat dict.

    Raises ColdstreamError when text or context are too short.
    """
    loaded = load(model, options, progress)
    try:
        return measure(loaded, prompt_tokens, tokens, text or default_heldout())
    finally:
        loaded.close()


def measure(loaded: Loaded, prompt_tokens: int, tokens: int, text: Path) -> dict[str, Any]:
    """As `bench`, on a loaded model whose engine is not started."""
    ids = _text_tokens(loaded, text, prompt_tokens + tokens)
    kv, manager = loaded.new_kv()
    blocks = manager.allocate(prompt_tokens + tokens)
    prefill_s = _prefill(loaded, kv, blocks, ids[:prompt_tokens])
    before = loaded.cache.snapshot()
    io_before = process_read_bytes()
    times = [_decode(loaded, kv, blocks, ids[p], p) for p in range(prompt_tokens, prompt_tokens + tokens)]
    moved = loaded.cache.snapshot() - before
    predicted = loaded.forecast()  # now, so that it finds the machine as the tokens did
    return {
        **_predicted(predicted, statistics.median(times)),
        "tokens_per_s": 1 / statistics.median(times),
        "s_per_token_median": statistics.median(times),
        "prefill_s": prefill_s,
        **_account(moved, tokens, io_before),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "text": text.name,
        "ffn_bytes": loaded.packed.bundles.layer_bytes * loaded.packed.bundles.num_layers,
        "slot_bytes": loaded.cache.snapshot().tiers[moved.fastest].capacity_bytes,
        **{
            k: loaded.info[k]
            for k in ("mode", "cett", "device", "kernel", "io_engine", "dtype", "bundles", "predictor")
        },
    }


def _predicted(found: Forecast | GpuForecast | None, median_s: float) -> dict[str, float | None]:
    """None each where the machine could not be measured."""
    if found is None:
        return dict.fromkeys(("predicted_tokens_per_s", "prediction_error", "predicted_read_bytes_per_token"))
    return {
        "predicted_tokens_per_s": found.tokens_per_s,
        "prediction_error": found.tokens_per_s * median_s - 1,
        "predicted_read_bytes_per_token": found.read_bytes,
    }


def _account(moved: CacheSnapshot, tokens: int, io_before: int) -> dict[str, float]:
    """Of the fastest tier, and of what came into it from below."""
    name = moved.fastest
    tier, came = moved.tiers[name], [t for (_, into), t in moved.transfers.items() if into == name]
    return {
        "hits": tier.hits,
        "lookups": tier.lookups,
        "bytes_read_per_token": sum(t.bytes for t in came) / tokens,
        "needed_bytes_per_token": sum(t.needed_bytes for t in came) / tokens,
        "requests_per_token": sum(t.requests for t in came) / tokens,
        "stall_s_per_token": sum(t.stall_seconds for t in came) / tokens,
        "kernel_bytes_read_per_token": (process_read_bytes() - io_before) / tokens,
    }


def process_read_bytes() -> int:
    """Bytes that the kernel fetched from storage for this process (/proc/self/io, read_bytes)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise ColdstreamError("/proc/self/io has no read_bytes")


def _text_tokens(loaded: Loaded, text: Path, num: int) -> list[int]:
    if num > loaded.plan.max_model_len:
        raise ColdstreamError(
            f"--prompt-tokens and --tokens: {num} together, the context is {loaded.plan.max_model_len}"
        )
    ids = loaded.tokenizer.encode(read_text("--text", text), add_special=False)
    if len(ids) < num:
        raise ColdstreamError(f"--text {text}: {len(ids)} tokens, {num} are needed")
    return ids[:num]


def _prefill(loaded: Loaded, kv: KVCache, blocks: np.ndarray, ids: list[int]) -> float:
    start = time.perf_counter()
    step = loaded.plan.prefill_chunk
    for first in range(0, len(ids), step):
        _run(loaded, kv, blocks, ids[first : first + step], first, "prefill")
    return time.perf_counter() - start


def _decode(loaded: Loaded, kv: KVCache, blocks: np.ndarray, token: int, position: int) -> float:
    start = time.perf_counter()
    _run(loaded, kv, blocks, [token], position, "decode")
    return time.perf_counter() - start


def _run(loaded: Loaded, kv: KVCache, blocks: np.ndarray, ids: list[int], first: int, kind: Any) -> None:
    batch = Batch(
        kind=kind,
        token_ids=torch.tensor(ids),
        positions=torch.arange(first, first + len(ids)),
        sequences=(SequenceView(blocks, first, len(ids)),),
        logits="last" if kind == "decode" else "none",
    )
    loaded.model.forward(batch, kv, lambda: None)
