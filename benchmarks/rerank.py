"""How often a static hot set must be ranked anew, on a trace: misses over those of the policy that inserts at once.

    python -m benchmarks.rerank --trace FILE [--shape afm-4.5b] [--tokens 192] [--layers 0 20] [--favour 1.25]

The GPU's slots change only between replays of a graph: every N tokens the neurons are ranked by their decayed counts
and swapped; who has a slot counts `--favour` times as much, since a swap costs bytes. Against the reference (decayed
frequency, at once) and against a hot set that never changes: misses, and how many records a token and layer are copied
for the swaps, which the reference has read anyway. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.gpu_floors import steps_of
from benchmarks.make_checkpoint import SHAPES
from benchmarks.traces import Replay, Trace
from cache.policy import DecayedFrequency
from runtime.replay import frequency, static

EVERY, SHARES, DECAY, WARM_TOKENS = (1, 4, 8, 16, 32, 64), (0.1, 0.2, 0.4), 0.98, 32
Steps = list[np.ndarray]


def reranked(steps: Steps, slots: int, prior: np.ndarray, every: int, favour: float = 1.0) -> tuple[int, float]:
    """(misses after the warm-up, records swapped a token) of a set that is ranked anew every so many tokens."""
    policy = DecayedFrequency(prior[None].astype(np.float64), DECAY)
    resident, misses, swapped = _best(policy.scores(0), slots), 0, 0
    for token, ids in enumerate(steps):
        if token >= WARM_TOKENS:
            misses += int(np.count_nonzero(~resident[ids]))
        policy.touch(0, ids)
        if (token + 1) % every == 0:
            new = _best(np.where(resident, favour, 1.0) * policy.scores(0), slots)
            swapped, resident = swapped + int(np.count_nonzero(new & ~resident)), new
    return misses, swapped / len(steps)


def _best(scores: np.ndarray, slots: int) -> np.ndarray:
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores, kind="stable")[:slots]] = True
    return chosen


def reference(steps: Steps, slots: int, prior: np.ndarray) -> int:
    """Misses after the warm-up of the policy that decides at every token."""
    hits = [int(frequency(s, [slots], prior.astype(np.float64), DECAY)[0]) for s in (steps, steps[:WARM_TOKENS])]
    return sum(s.size for s in steps[WARM_TOKENS:]) - (hits[0] - hits[1])


def compare(replay: Replay, share: float, layers: list[int], num_tokens: int, favour: float = 1.0) -> dict[str, float]:
    """Misses of each way over the reference's, and swaps; means over some layers."""
    slots, prior = int(replay.num_neurons * share), replay.frequency()
    of_layer = {i: steps_of(replay, i, 0, WARM_TOKENS + num_tokens) for i in layers}
    base = sum(reference(steps, slots, prior[i]) for i, steps in of_layer.items())
    fixed = sum(
        sum(s.size for s in steps[WARM_TOKENS:]) - int(static(steps[WARM_TOKENS:], [slots], prior[i])[0])
        for i, steps in of_layer.items()
    )
    found = {"slots": share, "static": fixed / base}
    for every in EVERY:
        results = [reranked(steps, slots, prior[i], every, favour) for i, steps in of_layer.items()]
        found[f"every {every}"] = sum(misses for misses, _ in results) / base
        found[f"swapped at {every}"] = float(np.mean([swapped for _, swapped in results]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="afm-4.5b")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--favour", type=float, default=1.0)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 20])
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    replay = Replay(Trace.read(options.trace), shape.num_hidden_layers, shape.intermediate_size)
    rows = [compare(replay, share, options.layers, options.tokens, options.favour) for share in SHARES]
    for row in rows:
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print(json.dumps({"trace": options.trace.name, "shape": options.shape, "favour": options.favour, "rows": rows}))


if __name__ == "__main__":
    main()
