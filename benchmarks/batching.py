"""What batching gives: tokens/s and bytes read a token at 1 to 16 streams, dense and sparse, with a small FFN cache.

    python -m benchmarks.batching MODEL [--ffn-cache 10%] [--streams 1 2 4 8 16] [--tokens 16] [--rounds 3]

Streams are windows of the held-out text, each prefilled and then decoded together, their tokens given in (greedy text
loops and flatters every cache). Variants take turns within each round; figures are medians over the rounds. `sparse`
chooses between reading the union apart and streaming, by step and by layer, what it tries for that included; `sparse
apart` may not choose. Prints a table, writes
benchmarks/results/batching.json, ends in one JSON line. Knows the runtime, not the server.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.device_curve import ReadCost
from cache.stats import CacheSnapshot
from runtime.batch import Batch, SequenceView
from runtime.kv_cache import KVCache
from runtime.load import Loaded, LoadOptions, default_heldout, load
from runtime.plan import FfnCache
from runtime.step_choice import StepChoice

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "batching.json"
PROMPT_TOKENS = 32
_FREE = ReadCost(0.0, 0.0, 0.0)  # with reads for nothing, a union is never dearer than the layer


@dataclass(frozen=True, slots=True)
class Variant:
    """A loaded model and how it may read."""

    name: str
    loaded: Loaded
    cost: ReadCost
    choice: StepChoice | None  # between the two ways of a sparse step


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run of `tokens` steps."""

    seconds: float
    moved: CacheSnapshot
    streamed_layers: int


def main() -> None:
    options = parse()
    variants = open_variants(options.model, options.ffn_cache, max(options.streams))
    try:
        result = measure(variants, options.streams, options.tokens, options.rounds)
    finally:
        for loaded in {id(v.loaded): v.loaded for v in variants}.values():
            loaded.close()
    result |= {"ffn_cache": str(options.ffn_cache), "model": Path(options.model).name}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--ffn-cache", type=FfnCache.parse, default=FfnCache.parse("10%"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def open_variants(model: str, ffn_cache: FfnCache, max_num_seqs: int) -> list[Variant]:
    """Dense, and sparse with and without the choice; the two sparse ones share one model."""

    def opened(mode: str) -> Loaded:
        options = LoadOptions(mode=mode, ffn_cache=ffn_cache, max_num_seqs=max_num_seqs, max_model_len=256)
        return load(model, options, lambda what, share: None)

    dense, sparse = opened("dense"), opened("sparse")
    return [
        Variant("dense", dense, dense.cache.read_cost, None),
        Variant("sparse", sparse, sparse.cache.read_cost, StepChoice()),
        Variant("sparse apart", sparse, _FREE, None),
    ]


def measure(variants: list[Variant], streams: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Figures of each variant and number of streams, as one dict for JSON."""
    text = default_heldout().read_text(encoding="utf-8")
    ids = variants[0].loaded.tokenizer.encode(text, add_special=False)
    samples: dict[tuple[str, int], list[Sample]] = {(v.name, n): [] for v in variants for n in streams}
    for _ in range(rounds):
        for num in streams:
            for variant in variants:
                samples[variant.name, num].append(run(variant, _windows(ids, num, PROMPT_TOKENS + tokens)))
    info = variants[0].loaded.info
    return {
        "rows": [_row(name, num, some, tokens) for (name, num), some in samples.items()],
        "tokens": tokens,
        "rounds": rounds,
        "prompt_tokens": PROMPT_TOKENS,
        "ffn_bytes": variants[0].loaded.plan.ffn_bytes,
        "cett": variants[-1].loaded.info["cett"],
        "io_engine": info["io_engine"],
        "kernel": info["kernel"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],  # of other work too: above the number of cores, trust bytes, not times
        "date": datetime.now(UTC).date().isoformat(),
    }


def run(variant: Variant, texts: list[list[int]]) -> Sample:
    """Prefills the beginnings of the streams, then times the steps of all of them together."""
    loaded = variant.loaded
    loaded.cache.read_cost = variant.cost
    loaded.model._ffn.choice = variant.choice
    num_tokens = len(texts[0])
    kv, manager = loaded.new_kv()
    tables = [manager.allocate(num_tokens) for _ in texts]
    prompts = [_prompt(ids[:PROMPT_TOKENS], blocks) for ids, blocks in zip(texts, tables, strict=True)]
    loaded.model.forward_together(prompts, kv, lambda: None)
    before, switched, start = loaded.cache.snapshot(), loaded.model.counters().switched, time.perf_counter()
    for position in range(PROMPT_TOKENS, num_tokens):
        _step(loaded, kv, texts, tables, position)
    seconds = time.perf_counter() - start
    return Sample(seconds, loaded.cache.snapshot() - before, loaded.model.counters().switched - switched)


def _windows(ids: list[int], num: int, length: int) -> list[list[int]]:
    """Windows of a text, far from each other."""
    starts = np.linspace(0, len(ids) - length - 1, num).astype(int)
    return [ids[start : start + length] for start in starts]


def _prompt(ids: list[int], blocks: np.ndarray) -> Batch:
    view = SequenceView(blocks, 0, len(ids))
    return Batch("prefill", torch.tensor(ids), torch.arange(len(ids)), (view,), "none")


def _step(loaded: Loaded, kv: KVCache, texts: list[list[int]], tables: list[np.ndarray], position: int) -> None:
    token_ids = torch.tensor([ids[position] for ids in texts])
    positions = torch.full((len(texts),), position)
    views = tuple(SequenceView(blocks, position, 1) for blocks in tables)
    loaded.model.forward(Batch("decode", token_ids, positions, views, "last"), kv, lambda: None)


def _row(name: str, num: int, samples: list[Sample], tokens: int) -> dict[str, Any]:
    made = num * tokens
    disk = [s.moved.transfers["disk", "cpu"] for s in samples]
    tiers = [s.moved.tiers["cpu"] for s in samples]
    return {
        "variant": name,
        "streams": num,
        "tokens_per_s": statistics.median(made / s.seconds for s in samples),
        "bytes_per_token": statistics.median(d.bytes / made for d in disk),
        "requests_per_token": statistics.median(d.requests / made for d in disk),
        "stall_share": statistics.median(d.stall_seconds / s.seconds for d, s in zip(disk, samples, strict=True)),
        "hit_rate": statistics.median(t.hits / max(1, t.lookups) for t in tiers),
        "streamed_layers_per_step": statistics.median(s.streamed_layers / tokens for s in samples),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a number of streams and variant; gains over one stream of the same variant; of `sparse`, the
    pace beside the faster of the two that may not choose."""
    one = {r["variant"]: r["tokens_per_s"] for r in result["rows"] if r["streams"] == min(_streams(result))}
    pace = {(r["variant"], r["streams"]): r["tokens_per_s"] for r in result["rows"]}
    names = ("variant", "streams", "tokens/s", "gain", "of the faster", "MB/token", "requests/token", "waiting")
    lines = [f"| {' | '.join(names)} | streamed layers/step |", "|---" * (len(names) + 1) + "|"]
    for r in result["rows"]:
        faster = max(pace["dense", r["streams"]], pace["sparse apart", r["streams"]])
        cells = [
            r["variant"],
            str(r["streams"]),
            f"{r['tokens_per_s']:.2f}",
            f"{r['tokens_per_s'] / one[r['variant']]:.1f}",
            f"{r['tokens_per_s'] / faster:.2f}" if r["variant"] == "sparse" else "",
            f"{r['bytes_per_token'] / 1e6:.2f}",
            f"{r['requests_per_token']:.0f}",
            f"{r['stall_share']:.0%}",
            f"{r['streamed_layers_per_step']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _streams(result: dict[str, Any]) -> list[int]:
    return [r["streams"] for r in result["rows"]]


if __name__ == "__main__":
    main()
