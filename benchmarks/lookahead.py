"""What guesses of the next layer's set are worth, when only confident ones are read: a table, nothing is timed.

    python -m benchmarks.lookahead PACKED [--tokens 400] [--warm 100] [--cett 0.05]

A neuron is guessed when its score, predicted from an earlier input, is at least `margin` times the layer's threshold.
Inputs, each under the next layer's norm: `ahead`, the residual before this layer's FFN; `begun`, that and what the
pinned neurons add to it, which are computed while the others are read; `residual`, with the whole FFN, known only when
all has been read. Sets of the packed model's predictor on held-out text, forced on layers of --neurons as
benchmarks/traces.py does, with slots for some shares. Printed, of what is absent: the share of the misses that is
guessed, what is guessed in vain for each miss, and the reads of both parts for each read of one. Knows predictors and
policies; not files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.predictors import TEXTS, forward
from benchmarks.traces import Replay, Trace, wrong
from cache.bundle import BundleDtype, BundleLayout
from cache.policy import DecayedFrequency
from cache.reader import volume
from runtime.checkpoint import open_checkpoint
from runtime.kernels import Kernels, select
from runtime.packed import PROFILE, Packed, open_packed
from runtime.predictor import PlanePredictor
from runtime.sparse import sparse_setup
from runtime.tokenizer import Tokenizer

MARGINS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SOURCES = ("ahead", "begun", "residual")
BUDGETS = {"3 GiB": (0.104, 0.1), "4 GiB": (0.266, 0.2)}  # slots and pinned, shares of the neurons (AFM-4.5B, bf16)
_SURE = 2.0  # the margin at which a layer's guesses must be right more often than wrong, or there are none
_HIDDEN, _ALIGNMENT, _GAP = 2560, 4096, 12 << 10  # of AFM-4.5B's records and their reads


@torch.no_grad()
def record(packed: Packed, tokens: torch.Tensor, cett: float, pinned: float) -> Trace:
    """Sets taken, and beside them those guessed, `source margin`; pinned: share of a layer that is computed first."""
    checkpoint, profile, kernels = open_checkpoint(packed.source.path), packed.read(PROFILE), select()
    predictor = (sparse := sparse_setup(packed, profile, cett, 0, kernels)).predictor
    num_neurons = profile["order"].shape[1]
    first = profile["order"][:, : round(pinned * num_neurons)].astype(np.int64)
    bits: dict[str, list[np.ndarray]] = {}
    own = np.empty(0, bool)
    for layer, (_, inputs) in enumerate(forward(checkpoint, tokens[None], first)):
        for source, margins in {"input": (1.0,), **dict.fromkeys(SOURCES, MARGINS)}.items():
            scores = _scores(predictor, layer, inputs[source][0].contiguous().numpy(), num_neurons, kernels)
            tau = predictor.thresholds[layer]
            given_up = source != "input" and (not layer or wrong(scores >= _SURE * tau, own))
            for margin in margins:
                taken = (scores >= margin * tau) & (not given_up)  # of the first layer there are no guesses
                own = taken if source == "input" else own
                bits.setdefault(f"{source} {margin:g}", []).append(np.packbits(taken, axis=1, bitorder="little"))
    sets = {name: np.stack(layers) for name, layers in bits.items()}
    return Trace(sets.pop("input 1"), np.minimum(sparse.frequency, 1).astype(np.float32), sets)


def _scores(predictor: PlanePredictor, layer: int, x: np.ndarray, num_neurons: int, kernels: Kernels) -> np.ndarray:
    """[T, F]; infinite where the layer is read whole."""
    sketch = predictor.sketches[layer]
    out = np.full((x.shape[0], num_neurons), np.inf, np.float32)
    if sketch is not None:
        kernels.plane_scores(x, sketch, out)
    return out


def steps(
    replay: Replay, layer: int, slots: int, pinned: int, last: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Token by token: which neurons are absent when it comes, and which of those it takes; bool [F] each."""
    prior = replay.frequency()[layer].astype(np.float64)
    policy = DecayedFrequency(prior[None])
    policy.pin(0, np.arange(pinned))
    for token in range(last):
        ranks = policy.scores(0)
        absent = np.ones(prior.size, bool)
        absent[np.argpartition(-ranks, slots)[:slots]] = False
        taken = replay.active(layer, token)
        yield token, absent, absent & taken
        policy.touch(0, np.flatnonzero(taken))


def reads(mask: np.ndarray, layout: BundleLayout) -> np.ndarray:
    """Requests and bytes of reading these neurons."""
    found = volume(np.flatnonzero(mask) * layout.stride, layout.record_bytes, _ALIGNMENT, _GAP)
    return np.array([found.num_requests, found.num_bytes], np.float64)


def table(trace: Trace, options: argparse.Namespace, budget: str) -> list[dict[str, float | str]]:
    """A row for each source and margin, sums over some layers and all tokens after the first ones."""
    layout = BundleLayout.make(_HIDDEN, False, BundleDtype.BF16)
    slots, pinned = (round(share * options.neurons) for share in BUDGETS[budget])
    replay = Replay(trace, options.layers, options.neurons)
    found = {name: np.zeros(6) for name in trace.beside}
    misses, plain, num = 0, np.zeros(2), 0
    for layer in range(options.layers):
        for token, absent, missed in steps(replay, layer, slots, pinned, trace.num_tokens):
            if token < options.warm:
                continue
            num += 1
            misses += int(np.count_nonzero(missed))
            plain += reads(missed, layout)
            for name in trace.beside:
                guessed = absent & replay.active(layer, token, name)
                early, late = reads(guessed, layout), reads(missed & ~guessed, layout)
                counts = np.count_nonzero(guessed & missed), np.count_nonzero(guessed & ~missed)
                found[name] += [*counts, *early, *(early + late)]
    head = {"budget": budget, "misses": misses / num, "requests": plain[0] / num, "megabytes": plain[1] / num / 1e6}
    rows: list[dict[str, float | str]] = [head]
    for name, f in found.items():
        source, margin = name.split()
        shares = {"covered": f[0] / misses, "in_vain": f[1] / misses, "early_requests": f[2] / num}
        rows.append(
            {"source": source, "margin": float(margin), **shares}
            | {"requests": f[4] / plain[0], "bytes": f[5] / plain[1], "early_bytes": f[3] / plain[1]}
        )
    return rows


def show(rows: list[dict[str, float | str]]) -> str:
    head, *rest = rows
    lines = ["{budget}: {misses:.0f} misses a layer and token, {requests:.0f} reads, {megabytes:.1f} MB".format(**head)]
    lines += [
        "| from | margin | misses guessed | in vain | reads early | reads | bytes |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    form = "| {source} | {margin:g} | {covered:.0%} | {in_vain:.1%} | {early_requests:.0f} | {requests:.2f} |"
    form += " {bytes:.2f} |"
    return "\n".join([*lines, *(form.format(**row) for row in rest)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="a packed ReLU² model, its checkpoint where it was")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--warm", type=int, default=100)
    parser.add_argument("--cett", type=float, default=0.05)
    parser.add_argument("--neurons", type=int, default=18_432)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    packed = open_packed(options.packed)
    ids = Tokenizer.from_dir(packed.path).encode((TEXTS / "heldout.txt").read_text(encoding="utf-8"), add_special=False)
    tables = []
    for budget, (_, pinned) in BUDGETS.items():
        trace = record(packed, torch.tensor(ids[: options.tokens]), options.cett, pinned)
        tables.append(table(trace, options, budget))
        print(show(tables[-1]), flush=True)
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
