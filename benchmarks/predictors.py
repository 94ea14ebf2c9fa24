"""Predictors side by side on one model: bytes, recall, what they take, and perplexity beside the oracle's and dense.

For every predictor a threshold tau a layer is found on calibration tokens, on predicted scores, so that the CETT of
what is not taken, its misses included, meets the target (runtime/calibrate.py). With a pinned set H (the hottest share
of every layer, always computed) tau is found again, higher, so that the CETT of the whole meets it. Recall, taken share
and CETT are of held-out tokens, every `--every`-th layer on the dense model's inputs; perplexity runs all layers on the
sparse model's own. Sources of a predictor's input: `input` (the layer's own), `residual` (before its attention),
`ahead` (what the layer before had), each under this layer's norm.
    nice python benchmarks/predictors.py MODEL [--perplexity planes-1.69,planes-2]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.calibrate import Curve, LayerTail
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.config import ModelConfig
from runtime.ffn import DenseFFN
from runtime.layers import FFNWeights, full_attention, load_ffn, load_layer
from runtime.lowrank import make_low_rank, make_resident_gate, train_two_layer
from runtime.model import LayerWeights, rms_norm, rope_tables
from runtime.sketches import InputStatistics, LayerPredictor, PlaneSketch, make_group_sketch, make_plane_sketch
from runtime.tokenizer import Tokenizer

TEXTS = Path(__file__).parent.parent / "runtime" / "texts"
BUDGETS = (1.0, 1.2, 1.5, 2.0)
WINDOW = 512
SOURCES = ("input", "residual", "ahead")


@dataclass(frozen=True)
class Material:
    """A layer, and what it sees. Inputs by source, fp32 [N, D]; active bool [N, F] of the calibration tokens."""

    act: str
    ffn: FFNWeights
    calibration: dict[str, torch.Tensor]
    heldout: dict[str, torch.Tensor]
    active: torch.Tensor
    statistics: dict[str, InputStatistics] = field(default_factory=dict)

    def arrays(self) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        gate = None if self.ffn.gate is None else self.ffn.gate.numpy()
        return gate, self.ffn.up.numpy(), self.ffn.down.numpy()


Make = Callable[[Material, str], LayerPredictor]


def predictors() -> dict[str, Make]:
    """Every predictor by name; each makes itself from a layer's material and a source."""
    made: dict[str, Make] = {f"rows-{bits}": _rounded(bits, None) for bits in (4, 2, 1)}
    made["groups-2/64"] = _rounded(2, 64)
    made |= {f"planes-{bits:g}": _planes(bits) for bits in (1.0, 1.4, 1.69, 2.0, 2.5)}
    made["svd-128"] = lambda m, _: make_low_rank(m.act, *m.arrays(), 128)
    made["asvd-128"] = lambda m, s: make_low_rank(m.act, *m.arrays(), 128, m.statistics[s])
    made["asvd-32"] = lambda m, s: make_low_rank(m.act, *m.arrays(), 32, m.statistics[s])
    made["two-layer-128"] = lambda m, s: train_two_layer(m.calibration[s].numpy(), m.active.numpy(), 128)
    made["gate"] = _gate
    return made


def _rounded(bits: int, group: int | None) -> Make:
    return lambda m, _: make_group_sketch(m.act, *m.arrays(), bits, group)


def _planes(bits: float) -> Make:
    return lambda m, source: make_plane_sketch(m.act, *m.arrays(), m.statistics[source], bits)


def _gate(m: Material, source: str) -> LayerPredictor:
    gate, up, down = m.arrays()
    if gate is None:
        raise SystemExit("gate: this model has none; up is its gate")
    return make_resident_gate(m.act, gate, up, down, m.statistics[source])


@torch.no_grad()
def forward(
    checkpoint: Checkpoint, tokens: torch.Tensor, first: Sequence[np.ndarray] | None = None
) -> Iterator[tuple[FFNWeights, dict[str, torch.Tensor]]]:
    """The dense pass over windows [S, T]: each layer's FFN and its inputs by source, [S, T, D].

    first: of each layer, neurons that are computed first; then there is a source `begun` too, `ahead` with what those
    of the layer before have added.
    """
    config = checkpoint.config
    hidden = checkpoint.load("model.embed_tokens.weight")[tokens].float()
    cos, sin = rope_tables(config, tokens.shape[1])
    ahead = begun = hidden
    for i in range(config.num_hidden_layers):
        w = load_layer(checkpoint, i, torch.float32)
        middle = hidden + full_attention(config, w, hidden, cos, sin)
        streams = {"input": middle, "residual": hidden, "ahead": ahead} | ({} if first is None else {"begun": begun})
        inputs = {k: rms_norm(v, w.post_attention_layernorm, config.rms_norm_eps) for k, v in streams.items()}
        ffn = load_ffn(checkpoint, i)
        h = _ffn(config, ffn).neurons(inputs["input"])
        hidden, ahead = middle + h @ ffn.down, middle
        if first is not None:
            begun = middle + h[..., first[i]] @ ffn.down[first[i]]
        yield ffn, inputs


def _ffn(config: ModelConfig, ffn: FFNWeights) -> DenseFFN:
    return DenseFFN(config.hidden_act, ffn.gate, ffn.up, ffn.down)


def threshold(tail: LayerTail, scores: torch.Tensor, pinned: torch.Tensor, target: float) -> float:
    """The largest tau at which dropping what is neither pinned nor scored tau leaves the target CETT; 0: none does."""
    finite = scores[:, ~pinned]
    finite = finite[torch.isfinite(finite) & (finite > 0)]
    if not finite.numel():
        return 0.0
    high = float(finite.max()) * 1.01
    curve = Curve(lambda t: tail.cett((scores >= t) | pinned), max(float(finite.min()), high * 1e-9), high)
    return curve.threshold(target)


@dataclass
class Tuned:
    """One predictor of one layer with its thresholds; `without` the pinned set and beside it."""

    predictor: LayerPredictor | None  # None: the oracle
    tau: float
    pinned: torch.Tensor
    found: dict[str, float]


@torch.no_grad()
def scores_of(predictor: LayerPredictor | None, ffn: DenseFFN, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if predictor is None:
        magnitude: torch.Tensor = ffn.neurons(x).abs() * down.norm(dim=1)
        return magnitude
    return torch.from_numpy(predictor.predict(x.numpy()))


def tune(
    m: Material,
    ffn: DenseFFN,
    tails: tuple[LayerTail, LayerTail],
    predictor: LayerPredictor | None,
    source: str,
    pinned: torch.Tensor,
    rows: torch.Tensor,
    target: float,
) -> Tuned:
    """tau on the calibration rows, figures on the held-out ones. tails: (calibration rows, held-out)."""
    tau = threshold(
        tails[0], scores_of(predictor, ffn, m.ffn.down, m.calibration[source][rows]), pinned, target
    )  # predicted, [N, F]
    kept = (scores_of(predictor, ffn, m.ffn.down, m.heldout[source]) >= tau) | pinned
    full = 3 if m.ffn.gate is not None else 2
    found = {
        "streamed": float((kept & ~pinned).float().mean()),
        "cett": tails[1].cett(kept),
        "bytes": 0.0 if predictor is None else predictor.num_bytes / (full * 2 * m.ffn.up.numel()),
    }
    return Tuned(predictor, tau, pinned, found)


def recalls(scores: torch.Tensor, active: torch.Tensor) -> list[float]:
    """Share of the active neurons among the best-scored k, k = each budget times a token's number of active ones."""
    order = scores.argsort(dim=1, descending=True)
    hits = active.gather(1, order).cumsum(dim=1)  # [N, F]
    counts = active.sum(dim=1)
    out = []
    for budget in BUDGETS:
        k = (counts * budget).ceil().long().clamp(1, active.shape[1]) - 1
        out.append(float(hits.gather(1, k[:, None]).sum() / counts.sum().clamp_min(1)))
    return out


@dataclass
class Study:
    """Settings, and what was found: rows[name], figures layer by layer; tuned[name][layer] for perplexity."""

    options: argparse.Namespace
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tuned: dict[str, dict[int, Tuned]] = field(default_factory=dict)

    def add(self, name: str, layer: int, tuned: Tuned, recall: list[float], seconds: float) -> None:
        row = tuned.found | {f"recall_{b:g}": r for b, r in zip(BUDGETS, recall, strict=True)} | {"make_s": seconds}
        self.rows.setdefault(name, []).append(row)
        self.tuned.setdefault(name, {})[layer] = tuned


def study_layer(study: Study, layer: int, m: Material, wanted: dict[str, tuple[Make, str]]) -> None:
    o = study.options
    config_ffn = DenseFFN(m.act, m.ffn.gate, m.ffn.up, m.ffn.down)
    rows = torch.linspace(0, m.calibration["input"].shape[0] - 1, o.threshold_tokens).long()
    tails = (
        LayerTail(config_ffn.neurons(m.calibration["input"][rows]), m.ffn.down),
        LayerTail(config_ffn.neurons(m.heldout["input"]), m.ffn.down),
    )
    none = torch.zeros(m.ffn.up.shape[0], dtype=torch.bool)
    epsilon = threshold(tails[0], tails[0].magnitude, none, o.cett)
    everywhere = config_ffn.neurons(m.calibration["input"]).abs() * m.ffn.down.norm(dim=1) >= epsilon
    m.active.copy_(everywhere)
    pinned = none.clone()
    pinned[everywhere.float().mean(dim=0).argsort(descending=True)[: round(o.pinned * none.numel())]] = True
    active = tails[1].magnitude >= epsilon
    both = (("", none), (f"+H{100 * o.pinned:.0f}", pinned))
    for suffix, fixed in both:
        tuned = tune(m, config_ffn, tails, None, "input", fixed, rows, o.cett)
        study.add("oracle" + suffix, layer, tuned, recalls(tails[1].magnitude, active), 0.0)
    for name, (make, source) in wanted.items():
        begin = time.perf_counter()
        predictor = make(m, source)
        seconds = time.perf_counter() - begin
        recall = recalls(scores_of(predictor, config_ffn, m.ffn.down, m.heldout[source]), active)
        for suffix, fixed in both[1:] if o.only_pinned else both:
            if suffix and isinstance(predictor, PlaneSketch):
                predictor = predictor.without(fixed.numpy())  # what is always computed needs no sketch
            tuned = tune(m, config_ffn, tails, predictor, source, fixed, rows, o.cett * o.margin)
            study.add(name + suffix, layer, tuned, recall, seconds)


def study_all(study: Study, checkpoint: Checkpoint, calibration: torch.Tensor, heldout: torch.Tensor) -> None:
    o = study.options
    chosen = o.perplexity.split(",") if o.perplexity else []
    known = predictors()
    wanted = {n: (known[n], "input") for n in (o.predictors.split(",") if o.predictors else known)}
    wanted |= {f"{o.lookahead}:{s}": (known[o.lookahead], s) for s in SOURCES[1:] if o.lookahead}
    for i, (ffn, inputs) in enumerate(forward(checkpoint, torch.cat([calibration, heldout]))):
        here = wanted if i % o.every == 0 else {n: w for n, w in wanted.items() if n in chosen}
        split = {k: (v[: len(calibration)], v[len(calibration) :]) for k, v in inputs.items()}
        m = Material(
            checkpoint.config.hidden_act,
            ffn,
            {k: v[0].flatten(0, 1) for k, v in split.items()},
            {k: v[1].flatten(0, 1) for k, v in split.items()},
            torch.zeros(calibration.numel(), ffn.up.shape[0], dtype=torch.bool),
        )
        for source in {s for _, s in here.values()}:
            m.statistics[source] = InputStatistics.of(m.calibration[source].numpy())
        study_layer(study, i, m, here)
        print(f"layer {i}: {len(here)} predictors", flush=True)


@torch.no_grad()
def perplexity(
    checkpoint: Checkpoint, tokens: torch.Tensor, tuned: dict[int, Tuned] | None
) -> tuple[np.ndarray, float, float]:
    """Negative log-likelihoods on windows [S, T] under the sparse semantics (None: dense), streamed and taken share."""
    config = checkpoint.config
    embedding = checkpoint.load("model.embed_tokens.weight").float()
    hidden = embedding[tokens]
    cos, sin = rope_tables(config, tokens.shape[1])
    shares = []
    for i in range(config.num_hidden_layers):
        w: LayerWeights = load_layer(checkpoint, i, torch.float32)
        hidden = hidden + full_attention(config, w, hidden, cos, sin)
        x = rms_norm(hidden, w.post_attention_layernorm, config.rms_norm_eps)
        ffn = load_ffn(checkpoint, i)
        h = _ffn(config, ffn).neurons(x.flatten(0, 1))  # [N, F]
        if tuned is not None:
            t = tuned[i]
            kept = (scores_of(t.predictor, _ffn(config, ffn), ffn.down, x.flatten(0, 1)) >= t.tau) | t.pinned
            shares.append((float((kept & ~t.pinned).float().mean()), float(kept.float().mean())))
            h = h.masked_fill(~kept, 0.0)
        hidden = hidden + (h @ ffn.down).view_as(hidden)
    hidden = rms_norm(hidden, checkpoint.load("model.norm.weight").float(), config.rms_norm_eps)
    head = checkpoint.load("lm_head.weight").float() if "lm_head.weight" in checkpoint.names() else embedding
    nll = [
        torch.nn.functional.cross_entropy(logits_in @ head.T, wanted, reduction="none")
        for window, ids in zip(hidden, tokens, strict=True)
        for logits_in, wanted in zip(torch.split(window[:-1], 128), torch.split(ids[1:], 128), strict=True)
    ]
    streamed, taken = np.mean(shares, axis=0) if shares else (1.0, 1.0)
    return torch.cat(nll).double().numpy(), float(streamed), float(taken)


def perplexities(study: Study, checkpoint: Checkpoint, tokens: torch.Tensor) -> list[dict[str, Any]]:
    o = study.options
    suffixes = ("", f"+H{100 * o.pinned:.0f}") if not o.only_pinned else (f"+H{100 * o.pinned:.0f}",)
    names = ["dense", "oracle", f"oracle+H{100 * o.pinned:.0f}"]
    names += [n + s for n in (o.perplexity.split(",") if o.perplexity else []) for s in suffixes]
    out: list[dict[str, Any]] = []
    losses: dict[str, np.ndarray] = {}
    for name in names:
        nll, streamed, taken = perplexity(checkpoint, tokens, None if name == "dense" else study.tuned[name])
        losses[name] = nll
        row = {"name": name, "perplexity": math.exp(nll.mean()), "streamed": streamed, "taken": taken}
        if name not in ("dense", "oracle"):
            difference = nll - losses["oracle"]
            blocks = [b.mean() for b in np.array_split(difference, 16)]
            row["over_oracle_percent"] = 100 * math.expm1(difference.mean())
            row["over_oracle_error_percent"] = 100 * float(np.std(blocks, ddof=1)) / 4
        if name != "dense":
            row["bytes"] = float(np.mean([t.found["bytes"] for t in study.tuned[name].values()]))
        out.append(row)
        print(json.dumps(row), flush=True)
    return out


def windows(tokenizer: Tokenizer, name: str, num: int, phase: float = 0.0) -> torch.Tensor:
    """Windows of a text that comes with coldstream, int64 [num, WINDOW]: one a num-th of it, `phase` of the way in.

    The first phase is for calibration, recall and choosing; perplexity is taken half way, on other tokens.
    """
    ids = tokenizer.encode((TEXTS / name).read_text(encoding="utf-8"), add_special=False)
    starts = ((np.arange(num) + phase) * (len(ids) - WINDOW) / num).astype(int)
    return torch.tensor([ids[s : s + WINDOW] for s in starts])


def table(study: Study) -> list[dict[str, Any]]:
    """Means over the layers that every predictor was looked at."""
    every, out = study.options.every, []
    for name, tuned in study.tuned.items():
        kept = [row for layer, row in zip(tuned, study.rows[name], strict=True) if layer % every == 0]
        mean = {key: float(np.mean([row[key] for row in kept])) for key in kept[0]}
        out.append({"name": name} | mean)
    return out


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'predictor':28} bytes  recall at {BUDGETS}        streamed  CETT held out")
    for r in rows:
        recall = " ".join(f"{100 * r[f'recall_{b:g}']:5.1f}" for b in BUDGETS)
        print(f"{r['name']:28} {100 * r['bytes']:5.2f}  {recall}  {100 * r['streamed']:9.2f}  {r['cett']:.4f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cett", type=float, default=0.05)
    parser.add_argument("--margin", type=float, default=1.0, help="a predictor's target as a share of the CETT")
    parser.add_argument("--pinned", type=float, default=0.2, help="share of every layer that is always computed")
    parser.add_argument("--every", type=int, default=3, help="layers between two that all predictors are looked at")
    parser.add_argument("--predictors", default="", help="names, comma-separated; none: all")
    parser.add_argument("--perplexity", default="planes-1.69", help="names to run through the whole model")
    parser.add_argument("--only-pinned", action="store_true", help="predictors with the pinned set alone")
    parser.add_argument("--lookahead", default="planes-2", help="predictor to try from the earlier inputs; '': none")
    parser.add_argument("--calibration-windows", type=int, default=16, help=f"of {WINDOW} tokens")
    parser.add_argument("--threshold-tokens", type=int, default=1536)
    parser.add_argument("--heldout-windows", type=int, default=2, help="for recall and CETT")
    parser.add_argument("--perplexity-windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    study = Study(options)
    calibration = windows(tokenizer, "calibration.txt", options.calibration_windows)
    study_all(study, checkpoint, calibration, windows(tokenizer, "heldout.txt", options.heldout_windows))
    rows = table(study)
    show(rows)
    found = perplexities(study, checkpoint, windows(tokenizer, "heldout.txt", options.perplexity_windows, 0.5))
    settings = {k: v for k, v in vars(options).items() if k != "model"}
    print(json.dumps({"model": Path(options.model).name, "settings": settings, "layers": rows, "perplexity": found}))


if __name__ == "__main__":
    main()
