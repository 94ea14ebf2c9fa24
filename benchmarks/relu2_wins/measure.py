"""The three questions of ReLU² Wins (arXiv 2402.03804) asked of each trained model, on the CPU.

    python benchmarks/relu2_wins/measure.py --models /tmp/relu2_wins/export --out /tmp/relu2_wins/measured

Thresholds come from calibration.u16, every figure from heldout.u16. Writes OUT/NAME.json for each model; what is there
already is kept, so that an interrupted run goes on. report.py makes the table and the plots from them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decoder import Decoder, load_export
from train import read_tokens

from runtime.affinity import independent_reuse, reuse, skew, union_shares
from runtime.calibrate import LayerTail, thresholds
from runtime.coactivation import coactivation_gap, joint_counts
from runtime.kernels.sketch import dequantise_rows, quantise_rows
from runtime.predictivity import predictivity
from runtime.sparsity import CETT_TARGETS, block_error, cett_at_increase

BUDGETS = (1.0, 1.5)
MIN_COUNT = 20  # tokens that a neuron must be active at to be asked for its partners


@dataclass(frozen=True)
class LayerView:
    """One layer at held-out or calibration text: S windows of T tokens."""

    x: torch.Tensor  # [S, T, D]
    h: torch.Tensor  # [S, T, F]
    down: torch.Tensor  # [F, D]
    gate: torch.Tensor | None  # [F, D]
    up: torch.Tensor  # [F, D]


def walk(model: Decoder, tokens: torch.Tensor, epsilon: Sequence[float] | None = None) -> Iterator[LayerView]:
    """The forward pass over windows [S, T], a layer at a time; neurons under epsilon (one a layer) are dropped."""
    length = tokens.shape[1]
    hidden = model.model.embed_tokens(tokens)
    for i, block in enumerate(model.model.layers):
        hidden = hidden + block.self_attn(block.input_layernorm(hidden), model.cos[:length], model.sin[:length])
        x = block.post_attention_layernorm(hidden)
        h = block.mlp.neurons(x)
        down = block.mlp.down_proj.weight.T.contiguous()
        if epsilon is not None:
            h = h.masked_fill(h.abs() * down.norm(dim=1) < epsilon[i], 0.0)
        hidden = hidden + h @ down
        gate = block.mlp.gate_proj
        yield LayerView(x, h, down, None if gate is None else gate.weight, block.mlp.up_proj.weight)
    model.last_hidden = hidden


def likelihoods(model: Decoder, rows: torch.Tensor, epsilon: Sequence[float] | None) -> np.ndarray:
    """Negative log-likelihood of every token of windows [S, T + 1] but the first ones, float64."""
    out = []
    for part in rows.split(4):
        for _ in walk(model, part[:, :-1], epsilon):
            pass
        logits = F.linear(model.model.norm(model.last_hidden), model.model.embed_tokens.weight)
        out.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(out).double().numpy()


# --- Predictors: scores fp32 [N, F] from inputs [N, D] ---


def sketch_scores(view: LayerView, x: torch.Tensor, act: Any) -> tuple[torch.Tensor, int]:
    """From 4-bit codes of gate and up, one scale a row, as runtime/kernels/sketch.py makes them; and their bytes."""
    rough, num_bytes = [], 0
    for weight in (view.gate, view.up):
        if weight is not None:
            codes, scale = quantise_rows(weight.numpy())
            rough.append(torch.from_numpy(dequantise_rows(codes, scale, weight.shape[1])))
            num_bytes += codes.nbytes + scale.nbytes
    return _magnitudes(rough, x, act, view.down), num_bytes


def low_rank_scores(
    view: LayerView, seen: torch.Tensor, x: torch.Tensor, act: Any, budget_bytes: int
) -> tuple[torch.Tensor, int]:
    """From the activation-aware SVD (error weighted by the inputs seen, [N, D]) at the rank that the sketch's bytes
    buy in 16 bits: the published low-rank form, without training."""
    moment = seen.T @ seen / len(seen) + 1e-5 * torch.eye(seen.shape[1])
    root = torch.linalg.cholesky(moment)
    weights = [w for w in (view.gate, view.up) if w is not None]
    rank = budget_bytes // (2 * sum(sum(w.shape) for w in weights))
    rough = []
    for weight in weights:
        u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
        right = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)  # v / root
        rough.append((u[:, :rank] * s[:rank]) @ right)
    return _magnitudes(rough, x, act, view.down), rank


def _magnitudes(weights: list[torch.Tensor], x: torch.Tensor, act: Any, down: torch.Tensor) -> torch.Tensor:
    h = act(x @ weights[0].T)
    if len(weights) > 1:
        h = h * (x @ weights[1].T)
    return h.abs() * down.norm(dim=1)


_ACTS = {"relu": F.relu, "silu": F.silu, "relu2": lambda z: F.relu(z).square()}


# --- One model ---


@torch.inference_mode()
def measure(model: Decoder, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    calibration = windows(read_tokens(data, "calibration"), model.shape.context, options.calibration)
    heldout = windows(read_tokens(data, "heldout"), model.shape.context, options.heldout)
    tails = [(v.x, LayerTail(v.h.flatten(0, 1), v.down)) for v in walk(model, calibration[:, :-1])]
    epsilon = np.stack([thresholds(tail, tail.magnitude, CETT_TARGETS) for _, tail in tails], axis=1)  # [C, L]
    dense = likelihoods(model, heldout, None)
    base = math.exp(dense.mean())
    layers = []
    for i, view in enumerate(walk(model, heldout[: options.affinity, :-1])):
        layers.append(layer_figures(view, tails[i][0].flatten(0, 1), epsilon[:, i], model, options))
        print(f"  layer {i}", flush=True)
    rows = []
    for c, cett in enumerate(CETT_TARGETS):
        nll = likelihoods(model, heldout, epsilon[c])
        value = math.exp(nll.mean())
        rows.append(
            {
                "cett": cett,
                "perplexity": value,
                "increase_percent": 100 * (value / base - 1),
                "increase_standard_error_percent": 100 * value / base * block_error(nll - dense),
                **mean_of([layer["rows"][c] for layer in layers]),
                "active_by_layer": [layer["rows"][c]["active"] for layer in layers],
            }
        )
        print(f"  CETT {cett}: {value:.2f} ({rows[-1]['increase_percent']:+.2f} %)", flush=True)
    return {
        "activation": model.activation,
        "non_embedding_parameters": model.num_non_embedding,
        "neurons_a_layer": layers[0]["neurons"],
        "heldout_tokens": dense.size,
        "calibration_tokens": calibration[:, :-1].numel(),
        "affinity_tokens": heldout[: options.affinity, :-1].numel(),
        "dense_perplexity": base,
        "dense_standard_error": base * block_error(dense),
        "cett_at_1_percent": cett_at_increase(CETT_TARGETS, [r["increase_percent"] for r in rows]),
        "nonzero": float(np.mean([layer["nonzero"] for layer in layers])),
        "largest_neuron_energy": [layer["largest_neuron_energy"] for layer in layers],
        "low_rank": layers[0]["low_rank"],
        "sketch_bytes_share": layers[0]["sketch_bytes_share"],
        "rows": rows,
    }


def layer_figures(
    view: LayerView, seen: torch.Tensor, epsilon: np.ndarray, model: Decoder, options: argparse.Namespace
) -> dict[str, Any]:
    """Reuse, gap, skew and recall of one layer at each CETT; recall on the first windows only."""
    tail = LayerTail(view.h.flatten(0, 1), view.down)
    few = options.recall * view.h.shape[1]
    small = LayerTail(view.h.flatten(0, 1)[:few], view.down)
    x, act = view.x.flatten(0, 1)[:few], _ACTS[model.model.layers[0].mlp.act]
    sketch, sketch_bytes = sketch_scores(view, x, act)
    low_rank, rank = low_rank_scores(view, seen, x, act, sketch_bytes)
    energy = tail.magnitude.square().sum(dim=0)
    rows = []
    for threshold in epsilon:
        active = tail.magnitude >= float(threshold)
        figures = affinity_figures(active.view(view.h.shape).numpy())
        for name, scores in (("sketch4", sketch), ("low_rank", low_rank)):
            for hit in predictivity(small, active[:few], scores, BUDGETS):
                figures[f"recall_{name}_{hit.budget:g}"] = hit.recall
                figures[f"cett_{name}_{hit.budget:g}"] = hit.cett
        rows.append(figures)
    weights = sum(w.numel() for w in (view.gate, view.up, view.down) if w is not None)
    return {
        "neurons": view.down.shape[0],
        "nonzero": float((view.h != 0).float().mean()),
        "largest_neuron_energy": float(energy.max() / energy.sum()),
        "low_rank": rank,
        "sketch_bytes_share": sketch_bytes / (2 * weights),
        "rows": rows,
    }


def affinity_figures(active: np.ndarray) -> dict[str, float]:
    """active bool [S, T, F]."""
    flat = active.reshape(-1, active.shape[-1])
    frequency = flat.mean(axis=0)
    gap = coactivation_gap(joint_counts(flat), len(flat), min_count=MIN_COUNT)
    union = union_shares(active, 8)
    hot = skew(frequency, (0.1, 0.3))
    return {
        "active": float(frequency.mean()),
        "reuse": reuse(active),
        "independent_reuse": independent_reuse(frequency),
        "union_8": union[-1],
        "skew_10": hot[0],
        "skew_30": hot[1],
        "coactivation_top": gap.top,
        "coactivation_average": gap.average,
        "coactivation_hot": gap.hot,
        "gap": gap.gap,
    }


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over layers; a figure that a layer does not have (nan) is left out of its mean."""
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def windows(tokens: np.ndarray, context: int, num: int) -> torch.Tensor:
    """Windows evenly spread over a text, int64 [num, context + 1]."""
    starts = np.linspace(0, len(tokens) - context - 1, num).astype(int)
    return torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--calibration", type=int, default=6, help="windows for the thresholds")
    parser.add_argument("--heldout", type=int, default=32, help="windows for perplexity")
    parser.add_argument("--affinity", type=int, default=6, help="of them, for reuse and co-activation")
    parser.add_argument("--recall", type=int, default=2, help="of them, for the predictors")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in sorted(options.models.iterdir()):
        path = options.out / f"{folder.name}.json"
        if (options.names and folder.name not in options.names) or path.is_file():
            continue
        print(folder.name, flush=True)
        found = measure(load_export(folder), options.data, options)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
