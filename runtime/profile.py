"""`coldstream profile`: the three questions of ReLU² Wins (arXiv 2402.03804), asked of any model, in numbers.

Sparsity against performance, predictivity, hardware affinity. One pass over the layers carries all variants of the
model with it (dense, one for each CETT, one for each predictor and budget), so that it runs where the model does not
fit: in memory are one layer, the hidden states of every variant, and bits of the active sets.
Thresholds come from the calibration text, everything that is reported from the held-out one.
Shapes: S windows, T tokens, L layers, F neurons, C targets.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from cache.bundle import BundleLayout
from cache.errors import ColdstreamError
from runtime import affinity, coactivation, replay
from runtime.calibrate import LayerTail, thresholds
from runtime.checkpoint import Checkpoint, check_tensors, open_checkpoint
from runtime.families import all_families, quick_families
from runtime.kernels import Kernels, select
from runtime.load import default_calibration, default_heldout
from runtime.model import rms_norm
from runtime.pack import Progress, bundle_dtype, calibration_tokens
from runtime.packed import is_packed, open_packed
from runtime.predictivity import (
    BUDGETS,
    SOURCES,
    Candidate,
    Family,
    Fitted,
    Hit,
    LayerSample,
    decode_microseconds,
    mean_hits,
    predictivity,
    top_scores,
)
from runtime.read_cost import read_cost
from runtime.safetensors_file import open_to_others
from runtime.sparsity import (
    CETT_TARGETS,
    Likelihood,
    block_error,
    cett_at_increase,
    compare,
    likelihood,
)
from runtime.streams import Layer, Rule, Seen, Track, embed, layers
from runtime.tokenizer import Tokenizer
from runtime.windows import read_text

JSON, STATISTICS = "profile.json", "statistics.safetensors"
DETAIL_CETTS = (0.05, 0.2)  # at which predictors and active sets are looked at
CACHE_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
SKEW_SHARES = (0.1, 0.2, 0.3, 0.5)
MERGE_GAPS = (0, 1, 2, 4, 8)  # neurons
RESIDENT_SHARES = (0.0, 0.3)  # of the hottest neurons, for the reads of the rest
LONGEST_UNION = 16
NUM_PARTNERS = 10
ALIGNMENT = 512  # bytes, of reads: the finest that devices have
_WINDOW = 1024  # tokens of context of the held-out text
_CHUNK = 128  # rows of logits at once
_MAX_INCREASE_PERCENT = 1.0


@dataclass(frozen=True, slots=True)
class Scope:
    """How much text each part gets, in tokens, and which predictor budgets are carried for perplexity."""

    tokens: int
    calibration_windows: int
    detail_tokens: int  # active sets
    judged_tokens: int  # recall and the like of predictors
    carried_tokens: int
    carried_budgets: tuple[float, ...]
    replay_tokens: int
    pool_tokens: int
    read_tokens: int


FULL = Scope(16_384, 8, 4096, 1024, 1024, BUDGETS, 2048, 1024, 512)
QUICK = Scope(4096, 4, 2048, 512, 1024, (1.0, 1.5), 512, 192, 64)


def profile(
    model: str,
    out: Path,
    text: Path | None,
    tokens: int | None,
    quick: bool,
    progress: Progress,
    families: Callable[[Kernels], Sequence[Family]] | None = None,
) -> dict[str, Any]:
    """Measures a model, writes profile.json and statistics.safetensors into `out`, returns what is in the former.

    text: held-out, the one that comes along unless given; tokens of it that perplexity is measured on. families: the
    predictors, None for those of the scope. Raises ColdstreamError.
    """
    begin = time.monotonic()
    scope = QUICK if quick else FULL
    path = text or default_heldout()
    checkpoint = open_checkpoint(_source(model))
    check_tensors(checkpoint)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    calibration = calibration_tokens(
        tokenizer, default_calibration(), checkpoint.config.vocab_size, scope.calibration_windows
    )
    heldout = _windows(tokenizer, path, tokens or scope.tokens, checkpoint.config.max_position_embeddings)
    made = (families or (quick_families if quick else all_families))(select())
    run = _Run(checkpoint, scope, calibration, heldout, made, progress)
    figures = {
        "model": Path(model).name,
        "config": _shown_config(checkpoint),
        "quick": quick,
        "text": path.name,
        "text_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scope": asdict(scope) | {"tokens": heldout.numel(), "calibration_tokens": run.calibration_tokens},
        **run.measure(),
        "seconds": time.monotonic() - begin,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    _write(out, figures, run.statistics())
    return figures


def _source(model: str) -> str:
    """A packed model is profiled at the checkpoint that it was made from."""
    path = Path(model)
    return open_packed(path).source.path if is_packed(path) else model


def _windows(tokenizer: Tokenizer, text: Path, tokens: int, longest: int) -> torch.Tensor:
    """Windows of a text from its beginning, int64 [S, T]."""
    ids = tokenizer.encode(read_text("--text", text), add_special=False)[:tokens]
    length = min(_WINDOW, longest, len(ids))
    if length < 2:
        raise ColdstreamError(f"--text {text}: {len(ids)} tokens, at least 2 are needed")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _shown_config(checkpoint: Checkpoint) -> dict[str, Any]:
    names = ("model_type", "hidden_act", "gated", "num_hidden_layers", "hidden_size", "intermediate_size")
    return {name: getattr(checkpoint.config, name) for name in names}


def _write(out: Path, figures: dict[str, Any], statistics: dict[str, np.ndarray]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(statistics, out / STATISTICS)
        open_to_others(out / STATISTICS)
        (out / JSON).write_text(json.dumps(rounded(figures), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ColdstreamError(f"--out {out}: cannot be written ({error.strerror or error})") from error


def rounded(value: Any) -> Any:
    """Floats to six significant digits, and what JSON cannot say (nan, infinity) as null."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


class _Run:
    """One profile under way. Keeps for every layer what the report and the packed model want of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scope: Scope,
        calibration: torch.Tensor,
        heldout: torch.Tensor,
        families: Sequence[Family],
        progress: Progress,
    ) -> None:
        _check_families(families)
        self._checkpoint, self._scope, self._progress = checkpoint, scope, progress
        self._calibration, self._heldout, self._families = calibration, heldout, families
        self._layout = BundleLayout.make(
            checkpoint.config.hidden_size, checkpoint.config.gated, bundle_dtype("auto", checkpoint)
        )
        self._epsilon: list[np.ndarray] = []  # [C] a layer
        self._active: list[np.ndarray] = []  # [C] a layer, share on the calibration text
        self._predictors = [_PredictorFigures(f, source) for f in families for source in f.sources]
        self._details = [_Detail(c, scope, self._layout) for c in DETAIL_CETTS]

    @property
    def calibration_tokens(self) -> int:
        return self._calibration.numel()

    def measure(self) -> dict[str, Any]:
        """All figures; also fills what `statistics` returns."""
        with torch.inference_mode():
            tracks = self._through_layers()
            carried = set(self._carried())
            scored = self._score({name: t.hidden for name, t in tracks.items()}, "scoring", carried)
            sparsity = self._sparsity(scored, tracks)
            dense = tracks["dense"].hidden
            del tracks
            sparsity["one_percent"] = self._one_percent(sparsity["rows"], dense)
        return {
            "sparsity": sparsity,
            "predictivity": self._predictivity(scored),
            "affinity": [d.figures(self._progress) for d in self._details],
        }

    def statistics(self) -> dict[str, np.ndarray]:
        """Arrays for the packed model: targets [C], epsilon and active [L, C]; for each detailed CETT frequency
        [L, F], partners and partner_share [L, F, P], order [L, F]."""
        found = {
            "targets": np.asarray(CETT_TARGETS),
            "epsilon": np.stack(self._epsilon),
            "active": np.stack(self._active),
        }
        for detail in self._details:
            found |= detail.arrays()
        return found

    def _through_layers(self) -> dict[str, Track]:
        calibration = Track(embed(self._checkpoint, self._calibration))
        hidden = embed(self._checkpoint, self._heldout)
        looked_at = Track(hidden[: _count(self._heldout, self._scope.detail_tokens)])
        tracks = {"dense": Track(hidden)} | {f"cett {c:g}": Track(hidden) for c in CETT_TARGETS}
        few = hidden[: _count(self._heldout, self._scope.carried_tokens)]
        tracks |= {name: Track(few) for name in self._carried()}
        longest = max(self._calibration.shape[1], self._heldout.shape[1])
        for whole in layers(self._checkpoint, longest):
            self._progress("profiling", whole.index / self._checkpoint.config.num_hidden_layers)
            layer = whole.at_length(self._calibration.shape[1])
            epsilon, fitted = self._calibrate(layer, calibration.dense_step(layer))
            layer = whole.at_length(self._heldout.shape[1])
            self._look(layer, looked_at.dense_step(layer), epsilon, fitted)
            for name, rule in self._rules(epsilon, fitted).items():
                tracks[name].step(layer, rule)
            del whole, layer, fitted, rule  # a layer's weights go before the next are read
        self._progress("profiling", 1.0)
        return tracks

    def _carried(self) -> list[str]:
        return [
            _carried_name(f.name, cett, budget)
            for f in self._families
            if f.carried
            for cett in DETAIL_CETTS
            for budget in self._scope.carried_budgets
        ]

    def _calibrate(self, layer: Layer, seen: Seen) -> tuple[np.ndarray, dict[str, Fitted]]:
        tail = LayerTail(seen.h, layer.ffn.down)
        epsilon = thresholds(tail, tail.magnitude, CETT_TARGETS)
        self._epsilon.append(epsilon)
        self._active.append(np.asarray([float((tail.magnitude >= e).float().mean()) for e in epsilon], np.float32))
        active = tuple(tail.magnitude >= float(epsilon[d.index]) for d in self._details)
        for detail, sets in zip(self._details, active, strict=True):
            detail.calibrate(sets.numpy())
        sample = LayerSample(layer.index, layer.config.hidden_act, layer.ffn, seen.inputs, active)
        return epsilon, {f.name: Fitted(f, sample) for f in self._families}

    def _look(self, layer: Layer, seen: Seen, epsilon: np.ndarray, fitted: dict[str, Fitted]) -> None:
        """Active sets and predictors on the held-out text, along the dense model."""
        tail = LayerTail(seen.h, layer.ffn.down)
        sets = [tail.magnitude >= float(epsilon[d.index]) for d in self._details]
        for detail, active in zip(self._details, sets, strict=True):
            detail.look(active.view(-1, self._heldout.shape[1], active.shape[1]).numpy())
        rows = slice(self._scope.judged_tokens)
        few = LayerTail(seen.h[rows], layer.ffn.down)
        for figures in self._predictors:
            x = seen.inputs[figures.source][rows]
            for i, active in enumerate(sets):
                candidate = fitted[figures.family.name].of(figures.source, i)
                figures.add(i, candidate, predictivity(few, active[rows], candidate.score(x), BUDGETS), x[:1])

    def _rules(self, epsilon: np.ndarray, fitted: dict[str, Fitted]) -> dict[str, Rule | None]:
        rules: dict[str, Rule | None] = {"dense": None}
        rules |= {f"cett {c:g}": _at_least(float(e)) for c, e in zip(CETT_TARGETS, epsilon, strict=True)}
        for family in self._families:
            if not family.carried:
                continue
            for i, detail in enumerate(self._details):
                candidate = fitted[family.name].of("input", i)
                for budget in self._scope.carried_budgets:
                    rule = _budgeted(candidate, float(epsilon[detail.index]), budget)
                    rules[_carried_name(family.name, detail.cett, budget)] = rule
        return rules

    def _score(
        self, hidden: dict[str, torch.Tensor], stage: str, briefly: Collection[str] = ()
    ) -> dict[str, Likelihood]:
        """Likelihoods of every track; each has the first windows of the text, `dense` all of them. Those named in
        `briefly` are not compared with dense's distribution."""
        config = self._checkpoint.config
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = self._checkpoint.load(name).float().T  # [D, V]
        norm = self._checkpoint.load("model.norm.weight").float()
        num, length = self._heldout.shape
        # made beforehand: small arrays that live on between logits would keep the heap from giving those back
        found = {k: Likelihood.empty(v.shape[0] * (length - 1), k in briefly) for k, v in hidden.items()}
        for window in range(num):
            self._progress(stage, window / num)
            for first in range(0, length - 1, _CHUNK):
                rows = slice(first, min(first + _CHUNK, length - 1))
                targets = self._heldout[window, rows.start + 1 : rows.stop + 1]
                dense: torch.Tensor | None = None
                for key, states in hidden.items():  # dense comes first
                    if window >= states.shape[0]:
                        continue
                    logits = rms_norm(states[window, rows], norm, config.rms_norm_eps) @ head
                    dense = torch.log_softmax(logits, dim=1) if dense is None else dense
                    at = window * (length - 1) + first
                    found[key].put(at, likelihood(logits, None if key in briefly else dense, targets))
        self._progress(stage, 1.0)
        return found

    def _sparsity(self, scored: dict[str, Likelihood], tracks: dict[str, Track]) -> dict[str, Any]:
        dense = scored["dense"].nll
        value = math.exp(dense.mean())
        rows = []
        for i, cett in enumerate(CETT_TARGETS):
            name = f"cett {cett:g}"
            shares = tracks[name].kept_shares
            rows.append(
                {
                    "cett": cett,
                    **compare(dense, scored[name]),
                    "active_share": float(np.mean(shares)),
                    "active_share_layers": shares,
                    "epsilon_layers": [float(e[i]) for e in self._epsilon],
                }
            )
        return {
            "dense": {
                "perplexity": value,
                "standard_error": value * block_error(dense),
                "tokens_scored": int(dense.size),
            },
            "rows": rows,
        }

    def _one_percent(self, rows: list[dict[str, Any]], dense: torch.Tensor) -> dict[str, Any]:
        """The CETT that costs one percent of perplexity: interpolated, then run."""
        cett = cett_at_increase([r["cett"] for r in rows], [r["increase_percent"] for r in rows], _MAX_INCREASE_PERCENT)
        if cett <= 0:
            return {"cett": 0.0}
        calibration = Track(embed(self._checkpoint, self._calibration))
        sparse = Track(embed(self._checkpoint, self._heldout))
        longest = max(self._calibration.shape[1], self._heldout.shape[1])
        for layer in layers(self._checkpoint, longest):
            self._progress("checking", layer.index / self._checkpoint.config.num_hidden_layers)
            seen = calibration.dense_step(layer.at_length(self._calibration.shape[1]))
            tail = LayerTail(seen.h, layer.ffn.down)
            epsilon = thresholds(tail, tail.magnitude, (cett,))
            sparse.step(layer.at_length(self._heldout.shape[1]), _at_least(float(epsilon[0])))
            del layer
        scored = self._score({"dense": dense, "sparse": sparse.hidden}, "checking the likelihood")
        found = compare(scored["dense"].nll, scored["sparse"])
        return {"cett": cett, **found, "active_share": float(np.mean(sparse.kept_shares))}

    def _predictivity(self, scored: dict[str, Likelihood]) -> list[dict[str, Any]]:
        rows = []
        for figures in self._predictors:
            for i, cett in enumerate(DETAIL_CETTS):
                budgets = mean_hits(figures.hits[i])
                for row in budgets:
                    found = scored.get(_carried_name(figures.family.name, cett, row["budget"]))
                    if found is not None and figures.source == "input":
                        row |= self._beside_oracle(found, scored, cett)
                rows.append({"cett": cett, **figures.to_json(i, self._layout, self._checkpoint), "budgets": budgets})
        return rows

    def _beside_oracle(self, found: Likelihood, scored: dict[str, Likelihood], cett: float) -> dict[str, float]:
        """Perplexity with a predictor; dense and the oracle on the same tokens beside it."""
        num = found.nll.size
        oracle = scored[f"cett {cett:g}"].nll[:num]
        return {
            **compare(scored["dense"].nll[:num], found),
            "perplexity_dense": math.exp(scored["dense"].nll[:num].mean()),
            "perplexity_oracle": math.exp(oracle.mean()),
            "over_oracle_percent": 100 * math.expm1(found.nll.mean() - oracle.mean()),
        }


def _check_families(families: Sequence[Family]) -> None:
    for f in families:
        if not f.sources or not set(f.sources) <= set(SOURCES) or (f.carried and "input" not in f.sources):
            raise ValueError(f"predictor {f.name}: sources are of {SOURCES}, and what is carried has `input`")
    if len({f.name for f in families}) < len(families):
        raise ValueError("two predictors have the same name")


def _carried_name(predictor: str, cett: float, budget: float) -> str:
    return f"{predictor} at cett {cett:g}, budget {budget:g}"


def _count(windows: torch.Tensor, tokens: int) -> int:
    """How many windows hold so many tokens, at least one."""
    return min(windows.shape[0], max(1, tokens // windows.shape[1]))


def _at_least(epsilon: float) -> Rule:
    return lambda x, magnitude: magnitude >= epsilon


def _budgeted(candidate: Candidate, epsilon: float, budget: float) -> Rule:
    """The predictor's best, so many times as many as are truly active in the row."""
    return lambda x, magnitude: top_scores(candidate.score(x), (magnitude >= epsilon).sum(dim=1), budget)


class _PredictorFigures:
    """One predictor from one input through all layers, at each detailed CETT."""

    def __init__(self, family: Family, source: str) -> None:
        self.family, self.source = family, source
        self.hits: list[list[list[Hit]]] = [[] for _ in DETAIL_CETTS]  # [cett][layer][budget]
        self._num_bytes = 0
        self._microseconds: list[float] = []

    def add(self, cett: int, candidate: Candidate, hits: list[Hit], x: torch.Tensor) -> None:
        """A layer's hits at one CETT, and a row x [1, D] to take the time with."""
        self.hits[cett].append(hits)
        if cett == 0:  # of equal size and speed at all
            self._num_bytes += candidate.num_bytes
            self._microseconds.append(decode_microseconds(candidate.decode or candidate.score, x))

    def to_json(self, cett: int, layout: BundleLayout, checkpoint: Checkpoint) -> dict[str, Any]:
        config = checkpoint.config
        weights = config.num_hidden_layers * config.intermediate_size * config.hidden_size * len(layout.vectors)
        return {
            "predictor": self.family.name,
            "source": self.source,
            "num_bytes": self._num_bytes,
            "share_of_bf16_ffn": self._num_bytes / (2 * weights),
            "microseconds_a_layer": float(np.median(self._microseconds)),
            "recall_layers": [layer[0].recall for layer in self.hits[cett]],
        }


class _Detail:
    """Active sets at one CETT, layer after layer."""

    def __init__(self, cett: float, scope: Scope, layout: BundleLayout) -> None:
        self.cett, self.index = cett, CETT_TARGETS.index(cett)
        self._scope, self._layout = scope, layout
        self._counts: np.ndarray | None = None  # [F, F] of the layer under way, on the calibration text
        self._calibration_tokens = 0
        self._frequency: list[np.ndarray] = []  # [F] a layer, on the calibration text
        self._orders: list[np.ndarray] = []
        self._partners: list[tuple[np.ndarray, np.ndarray]] = []
        self._layers: list[dict[str, Any]] = []
        self._steps: list[list[np.ndarray]] = []  # for the pool

    def calibrate(self, active: np.ndarray) -> None:
        """A layer's sets on the calibration text, bool [N, F]: what prepare would know."""
        self._calibration_tokens = active.shape[0]
        self._counts = coactivation.joint_counts(active)
        self._frequency.append(active.mean(axis=0, dtype=np.float32))
        num_hot = round(max(RESIDENT_SHARES) * active.shape[1])
        self._orders.append(coactivation.coactivation_order(self._counts, num_hot))
        self._partners.append(coactivation.top_partners(self._counts, NUM_PARTNERS))

    def look(self, active: np.ndarray) -> None:
        """The same layer's sets on held-out windows, bool [S, T, F]: what is reported."""
        rows = active.reshape(-1, active.shape[2])
        own = rows.mean(axis=0, dtype=np.float64)
        gap = coactivation.coactivation_gap(coactivation.joint_counts(rows), rows.shape[0], NUM_PARTNERS)
        steps = [np.flatnonzero(row).astype(np.int32) for row in rows[: self._scope.replay_tokens]]
        capacities = [round(s * rows.shape[1]) for s in CACHE_SHARES]
        self._layers.append(
            {
                "active_share": float(own.mean()),
                "reuse": affinity.reuse(active),
                "independent_reuse": affinity.independent_reuse(own),
                "union": affinity.union_shares(active, LONGEST_UNION),
                "skew": affinity.skew(own, SKEW_SHARES),
                "gap": gap.gap,
                "gap_top": gap.top,
                "gap_average": gap.average,
                "gap_hot": gap.hot,
                "hit_rates": replay.hit_rates(steps, rows.shape[1], capacities, self._frequency[-1]),
                "reads": self._reads(steps[: self._scope.read_tokens]),
            }
        )
        self._steps.append(steps[: self._scope.pool_tokens])

    def _reads(self, steps: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        """Reads and bytes a token, [resident share][gap][2] for each order of the bundles."""
        hottest = coactivation.frequency_order(self._frequency[-1])
        orders = {
            "original": np.arange(hottest.size),
            "frequency": hottest,
            "coactivation": self._orders[-1],
        }
        found: dict[str, list[Any]] = {name: [] for name in orders}
        for share in RESIDENT_SHARES:
            cold = np.ones(hottest.size, bool)
            cold[hottest[: round(share * hottest.size)]] = False
            misses = [ids[cold[ids]] for ids in steps]
            for name, order in orders.items():
                found[name].append(read_cost(misses, order, self._layout, MERGE_GAPS, ALIGNMENT).tolist())
        return found

    def figures(self, progress: Progress) -> dict[str, Any]:
        """Means over layers (reads and bytes: sums, they are a token's), the layers themselves, and the pool."""
        progress(f"replaying one pool at CETT {self.cett:g}", 0.0)
        num_layers, size = len(self._layers), self._frequency[0].size
        capacities = [round(s * size * num_layers) for s in CACHE_SHARES]
        pool = replay.pool_hit_rates(self._steps, size, capacities, np.stack(self._frequency))
        progress(f"replaying one pool at CETT {self.cett:g}", 1.0)
        mean = _mean([{k: v for k, v in layer.items() if k != "reads"} for layer in self._layers])
        reads = _mean([layer["reads"] for layer in self._layers])
        return {
            "cett": self.cett,
            "cache_shares": list(CACHE_SHARES),
            "skew_shares": list(SKEW_SHARES),
            "merge_gaps": list(MERGE_GAPS),
            "resident_shares": list(RESIDENT_SHARES),
            "alignment": ALIGNMENT,
            "stride": self._layout.stride,
            **mean,
            "pool_hit_rates": pool,
            "reads_a_token": {k: (np.asarray(v) * num_layers).tolist() for k, v in reads.items()},
            "layers": [{k: v for k, v in layer.items() if k not in ("reads", "union")} for layer in self._layers],
        }

    def arrays(self) -> dict[str, np.ndarray]:
        prefix = f"cett_{self.cett:g}."
        return {
            f"{prefix}frequency": np.stack(self._frequency),
            f"{prefix}partners": np.stack([p[0] for p in self._partners]),
            f"{prefix}partner_share": np.stack([p[1] for p in self._partners]),
            f"{prefix}order": np.stack(self._orders).astype(np.int32),
        }


def _mean(layers: Sequence[Any]) -> Any:
    """The same structure with every number averaged over the layers that have it."""
    if isinstance(layers[0], dict):
        return {k: _mean([layer[k] for layer in layers]) for k in layers[0]}
    values = np.asarray(layers, np.float64)
    finite = np.isfinite(values)
    total, num = np.where(finite, values, 0.0).sum(axis=0), finite.sum(axis=0)
    return np.where(num > 0, total / np.maximum(num, 1), np.nan).tolist()
