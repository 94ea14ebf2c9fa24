"""One run of a packed model whose active sets are forced by a trace: tokens/s, bytes, and where the time goes.

    python -m benchmarks.forced decode PACKED --trace FILE --memory 3GiB [--tokens 48] [--policy lru] [--merge-gap 0]
    python -m benchmarks.forced prompt PACKED --trace FILE --memory 3GiB [--prompt-tokens 1024]

decode: one sequence at context 512, whose keys and values are zeros (they cost the same time), `--warm` tokens, then
the timed ones. prompt: time to the first token of a prompt. Prints one JSON object. benchmarks/disk.py runs it, in a
memory cgroup, beside the others. Knows the runtime from inside: it puts stopwatches round its parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.processors import cpu_seconds
from benchmarks.traces import SURE, Replay, ReplayPredictor, Trace, replay_on
from cache.budget import parse_size
from cache.errors import ColdstreamError
from cache.policy import DECAY, DecayedFrequency
from cache.stats import CacheSnapshot
from runtime.batch import Batch, BatchKind, SequenceView
from runtime.kernels import Kernels
from runtime.kv_cache import KVCache
from runtime.load import LOOKAHEADS, AdaptPredictor, Loaded, LoadOptions, load
from runtime.packed import open_packed
from runtime.predictor import Predictor
from runtime.replay import frequency

POLICIES = ("ours", "lfu", "lru", "static", "belady")
CONTEXT = 512


class Phases:
    """Seconds spent in parts of the runtime, each call timed; the parts do not contain each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)
        self.seconds.setdefault(name, 0.0)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)

    def clear(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def shares(self, total: float) -> dict[str, float]:
        known = {name: seconds / total for name, seconds in self.seconds.items()}
        return known | {"rest": 1 - sum(known.values())}


class Ranking:
    """A policy of the cache that keeps a table of scores, as `DecayedFrequency` does."""

    def __init__(self, scores: np.ndarray) -> None:
        self._scores, self._steps = scores, np.zeros(scores.shape[0], np.int64)

    def pin(self, layer: int, ids: np.ndarray) -> None:
        self._scores[layer, ids] = np.inf

    def touch(self, layer: int, ids: np.ndarray) -> None:
        """static: what was hottest in the profile stays."""

    def scores(self, layer: int) -> np.ndarray:
        return self._scores[layer]


class Recency(Ranking):
    """Least recently used goes first."""

    def touch(self, layer: int, ids: np.ndarray) -> None:
        self._steps[layer] += 1
        own = self._scores[layer]
        own[ids] = np.where(np.isinf(own[ids]), np.inf, self._steps[layer] + 1.0)


class Oracle(Ranking):
    """Belady: used again latest goes first. One sequence only."""

    def __init__(self, replay: Replay, num_tokens: int) -> None:
        super().__init__(np.zeros((replay.num_layers, replay.num_neurons)))
        self._next = [_next_uses(replay, i, num_tokens) for i in range(replay.num_layers)]  # int16 [T + 1, F] each
        for layer, following in enumerate(self._next):
            self._scores[layer] = -following[0].astype(np.float64)

    def touch(self, layer: int, ids: np.ndarray) -> None:
        self._steps[layer] += 1
        now = int(self._steps[layer])
        own = self._scores[layer]
        own[:] = np.where(np.isinf(own), np.inf, -self._next[layer][now].astype(np.float64))


def _next_uses(replay: Replay, layer: int, num_tokens: int) -> np.ndarray:
    """Row t: the first token from t on that takes each neuron."""
    out = np.full((num_tokens + 1, replay.num_neurons), np.iinfo(np.int16).max, np.int16)
    for token in range(num_tokens - 1, -1, -1):
        out[token] = np.where(replay.active(layer, token), token, out[token + 1])
    return out


def make_policy(name: str, prior: np.ndarray, replay: Replay, num_tokens: int) -> Any:
    if name == "ours":
        return DecayedFrequency(prior)
    if name == "lfu":
        return DecayedFrequency(prior * 1e-6, 0.98)
    if name == "belady":
        return Oracle(replay, num_tokens)
    return (Recency if name == "lru" else Ranking)(np.minimum(prior, 1.0).astype(np.float64))


def open_forced(options: argparse.Namespace, replay: Replay, made: list[ReplayPredictor]) -> Loaded:
    """The loaded model with the trace in its predictor's place (kept in `made`), unless it is served densely."""

    def adapt(own: Predictor | None, kernels: Kernels) -> Predictor:
        if own is None:
            raise SystemExit("--mode dense has no predictor to force")
        num_pinned = getattr(own, "_num_pinned", 0)
        calls = 2 if options.lookahead == "attention" else 1
        made.append(ReplayPredictor(replay, own.predict, own.num_bytes, calls, num_pinned))
        return made[0]

    return open_plain(options, None if options.mode == "dense" else adapt)


def open_plain(options: argparse.Namespace, adapt: AdaptPredictor | None = None) -> Loaded:
    wanted = LoadOptions(
        memory_bytes=None if options.memory is None else parse_size(options.memory),
        mode=options.mode,
        threads=options.threads,
        lookahead=options.lookahead,
        io_engine=options.io_engine,
        max_model_len=options.max_model_len,
        max_num_seqs=1,
    )
    return load(str(options.model), wanted, lambda what, share: None, adapt)


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of `tokens` decoded tokens after `warm` ones."""
    replay = replay_on(open_packed(options.model), forced_trace(options))
    made: list[ReplayPredictor] = []
    loaded = open_forced(options, replay, made)
    try:
        last = options.warm + options.tokens
        num_pinned = made[0]._num_pinned if made else 0
        if made and options.policy != "ours":
            _replace_policy(loaded, options.policy, replay, last, num_pinned)
        if options.merge_gap is not None:
            loaded.cache.merge_gap_bytes = options.merge_gap
        found = _timed_decode(loaded, options, made)
        if made:
            found |= replay.facts(options.warm, last)  # not the predictor's own, which count the pinned in
            found["reference_misses"] = reference_misses(loaded, replay, options.warm, last, num_pinned)
        return found | _about(loaded, options)
    finally:
        loaded.close()


def forced_trace(options: argparse.Namespace) -> Trace:
    """As much as a run needs, for it counts as the process's own memory, with the sets that are asked for in place of
    its own. SystemExit when it has none of those."""
    guesses = {"none": (), "attention": ("residual",), "layer": tuple(SURE)}[options.lookahead]
    trace = Trace.read(options.trace, ("active", *guesses)).first(options.warm + options.tokens)
    if options.sets == "active":
        if "active" not in trace.beside:
            raise SystemExit(f"--sets active: {options.trace} was not recorded from a packed model")
        trace = replace(trace, bits=trace.beside["active"])
    return trace


def _replace_policy(loaded: Loaded, name: str, replay: Replay, num_tokens: int, num_pinned: int) -> None:
    policy = make_policy(name, replay.frequency(), replay, num_tokens)
    for layer in range(replay.num_layers):
        policy.pin(layer, np.arange(num_pinned))
    loaded.cache._policy = policy


def _timed_decode(loaded: Loaded, options: argparse.Namespace, made: list[ReplayPredictor]) -> dict[str, Any]:
    kv, manager = loaded.new_kv()
    blocks = manager.allocate(CONTEXT + options.warm + options.tokens)
    phases = _watch(loaded, made[0] if made else None)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, loaded.packed.config.vocab_size, options.warm + options.tokens)
    times: list[float] = []
    for i, token in enumerate(ids.tolist()):
        if i == options.warm:
            phases.clear()
            before, cpu, own, start = loaded.cache.snapshot(), cpu_seconds(), time.process_time(), time.perf_counter()
        began = time.perf_counter()
        step(loaded, kv, blocks, [token], CONTEXT + i, "decode")
        times.append(time.perf_counter() - began)
    wall = time.perf_counter() - start
    busy, total = (b - a for a, b in zip(cpu, cpu_seconds(), strict=True))
    own = time.process_time() - own
    predicted = loaded.forecast()
    times = times[options.warm :]
    return {
        "tokens_per_s": options.tokens / wall,
        "s_per_token": statistics.median(times),
        "s_per_token_worst": max(times),
        "cpu_busy": busy / max(total, 1e-9),
        "own_cpu_s_per_token": own / options.tokens,
        "phases": phases.shares(wall),
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "predicted": predicted.to_json(),
        **account(loaded.cache.snapshot() - before, options.tokens, wall),
    }


def _watch(loaded: Loaded, predictor: ReplayPredictor | None) -> Phases:
    phases = Phases()
    ffn, cache = loaded.model._ffn, loaded.cache
    kernels = _Facade(loaded.model._kernels)
    loaded.model._kernels = kernels
    ffn._kernels = kernels
    for owner, method, name in (
        (kernels, "linear", "matrices"),
        (kernels, "paged_attention", "attention"),
        (kernels, "ffn", "neurons"),
        (cache, "begin", "look-up and submit"),
        (cache, "_wait", "waiting for the disk"),
        (cache, "_verify", "checksums"),
        (cache, "release", "admission"),
        (cache, "_follow_hint", "submit ahead"),
        (cache, "_submit_chunk", "submit of chunks"),
    ):
        phases.watch(owner, method, name)
    if predictor is not None:
        phases.watch(predictor, "predict", "predictor")
        phases.watch(predictor, "confidence", "guessing")
    return phases


class _Facade:
    """Kernels whose methods may be replaced; the native object's cannot."""

    def __init__(self, inner: Kernels) -> None:
        self.name, self.num_threads = inner.name, inner.num_threads
        self.linear, self.paged_attention, self.ffn = inner.linear, inner.paged_attention, inner.ffn


def account(moved: CacheSnapshot, tokens: int, wall: float) -> dict[str, float]:
    tier, disk = moved.tiers["cpu"], moved.transfers["disk", "cpu"]
    return {
        "hit_rate": tier.hits / max(1, tier.lookups),
        "misses": tier.misses,
        "read_bytes_per_token": disk.bytes / tokens,
        "needed_bytes_per_token": disk.needed_bytes / tokens,
        "requests_per_token": disk.requests / tokens,
        "mean_read_bytes": disk.bytes / max(1, disk.requests),
        "disk_bytes_per_s": disk.bytes / wall,
        "disk_seconds_share": disk.stall_seconds / wall,
        "prefetch_used_bytes": moved.prefetch_used_bytes,
        "prefetch_wasted_bytes": moved.prefetch_wasted_bytes,
    }


def reference_misses(loaded: Loaded, replay: Replay, warm: int, last: int, num_pinned: int) -> int:
    """Misses of the numpy policy alone, replayed over the same tokens with the same slots."""
    total = 0
    prior = replay.frequency().astype(np.float64)
    prior[:, :num_pinned] = np.inf
    for layer, num_slots in enumerate(loaded.cache.slots_per_layer):
        masks = [replay.active(layer, t) for t in range(last)]
        for mask in masks:
            mask[:num_pinned] = True
        steps = [np.flatnonzero(mask) for mask in masks]
        with np.errstate(invalid="ignore"):
            hits, early = (int(frequency(s, [num_slots], prior[layer], DECAY)[0]) for s in (steps, steps[:warm]))
        total += sum(s.size for s in steps[warm:]) - (hits - early)
    return total


def step(loaded: Loaded, kv: KVCache, blocks: np.ndarray, ids: list[int], first: int, kind: BatchKind) -> None:
    view = SequenceView(blocks, first, len(ids))
    positions = torch.arange(first, first + len(ids))
    wanted = "last" if kind == "decode" else "none"
    loaded.model.forward(Batch(kind, torch.tensor(ids), positions, (view,), wanted), kv, lambda: None)


def prompt(options: argparse.Namespace) -> dict[str, Any]:
    """Time to the first token of a prompt of random tokens: all its chunks, and the one step that makes a token."""
    replay = replay_on(open_packed(options.model), forced_trace(options))
    loaded = open_forced(options, replay, [])
    try:
        kv, manager = loaded.new_kv()
        blocks = manager.allocate(options.prompt_tokens + 1)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, loaded.packed.config.vocab_size, options.prompt_tokens).tolist()
        phases = _watch(loaded, None)
        before, start, cpu = loaded.cache.snapshot(), time.perf_counter(), cpu_seconds()
        size = loaded.plan.prefill_chunk
        for first in range(0, len(ids) - 1, size):
            some = ids[first : min(first + size, len(ids) - 1)]
            step(loaded, kv, blocks, some, first, "prefill")
        step(loaded, kv, blocks, ids[-1:], len(ids) - 1, "decode")
        wall = time.perf_counter() - start
        busy, total = (b - a for a, b in zip(cpu, cpu_seconds(), strict=True))
        found = {"first_token_s": wall, "cpu_busy": busy / max(total, 1e-9), "phases": phases.shares(wall)}
        moved = account(loaded.cache.snapshot() - before, 1, wall)
        return found | moved | {"prompt_tokens": len(ids)} | _about(loaded, options)
    finally:
        loaded.close()


def _about(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    plan, names = loaded.plan, ("mode", "kernel", "io_engine", "bundles", "threads", "pinned_share")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        **{name: loaded.info[name] for name in names},
        "memory_bytes": plan.budget_bytes,
        "slot_share": plan.ffn_cache_share,
        "staging_bytes": plan.staging_bytes,
        "merge_gap_bytes": loaded.cache.merge_gap_bytes,
        "vocab_size": loaded.packed.config.vocab_size,
        "peak_rss_bytes": int(status["VmHWM"].split()[0]) << 10,
        "context": CONTEXT,
        "policy": options.policy,
        "sets": options.sets,
        "lookahead": options.lookahead,
        "tokens": options.tokens,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["decode", "prompt"])
    parser.add_argument("model", type=Path, help="a packed model, of random weights for instance")
    parser.add_argument("--trace", type=Path, required=True, help="of benchmarks/traces.py")
    parser.add_argument(
        "--sets", default="taken", choices=["taken", "active"], help="by the predictor, or truly active"
    )
    parser.add_argument("--memory", help="as in `coldstream serve`")
    parser.add_argument("--mode", default="sparse", choices=["dense", "sparse"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--io-engine", default="auto", choices=["auto", "io_uring", "pread", "buffered"])
    parser.add_argument("--lookahead", default="layer", choices=LOOKAHEADS)
    parser.add_argument("--policy", default="ours", choices=POLICIES)
    parser.add_argument("--merge-gap", type=int, help="bytes; unless given, what the device curve says")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--warm", type=int, default=16, help="tokens decoded before those that are timed")
    parser.add_argument("--tokens", type=int, default=48)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    run: Callable[[argparse.Namespace], dict[str, Any]] = decode if options.verb == "decode" else prompt
    try:
        print(json.dumps(run(options)))
    except ColdstreamError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
