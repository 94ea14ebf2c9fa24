"""The quality contract: the largest CETT whose perplexity is at most so much above dense, measured while packing.

All candidates go through the model together, as tracks, a layer in memory at a time, each on its own inputs and with
the real predictor, nothing pinned; the text is none that sketches or thresholds have seen. After "CETT-PPL-1%" of
Sparsing Law (arXiv 2411.02335). Knows tracks and likelihoods; not files, and not how a layer was tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from runtime.checkpoint import Checkpoint
from runtime.model import rms_norm
from runtime.sparsity import block_error, cett_at_increase
from runtime.streams import Track, embed
from runtime.tune import TunedLayer

CANDIDATES = (0.02, 0.03, 0.05, 0.1, 0.2)  # CETTs that are measured; between them it is interpolation
_CHUNK = 128  # rows of logits at once
_HEAD_ROWS = 16384  # of the output matrix
_HOPELESS = 0.15  # median relative error of the residual beyond which a candidate is given up: no percent, but many


@dataclass(slots=True)
class _Candidate:
    """One CETT: its place among the targets, its track (None: given up), and what it took of each layer."""

    cett: float
    target: int
    track: Track | None
    taken: list[float] = field(default_factory=list)


class Contract:
    """Carries dense and every candidate through the layers, and compares them at the end. tokens [S, T]."""

    def __init__(self, checkpoint: Checkpoint, tokens: torch.Tensor, targets: Sequence[float], cetts: Sequence[float]):
        self._checkpoint, self._tokens = checkpoint, tokens
        hidden = embed(checkpoint, tokens)
        self._dense = Track(hidden)
        self._candidates = [_Candidate(c, list(targets).index(c), Track(hidden)) for c in cetts]

    def step(self, tuned: TunedLayer) -> None:
        """All tracks through one layer."""
        self._dense.step(tuned.layer)
        for candidate in self._candidates:
            if candidate.track is not None:
                self._step(candidate, candidate.track, tuned)

    def _step(self, candidate: _Candidate, track: Track, tuned: TunedLayer) -> None:
        track.step(tuned.layer, _rule(tuned, candidate.target))
        error = (track.hidden - self._dense.hidden).norm(dim=-1) / self._dense.hidden.norm(dim=-1)
        if float(error.median()) > _HOPELESS:
            candidate.track = None

    def measure(self) -> list[dict[str, Any]]:
        """Perplexity of dense, then of each candidate: paired increase over dense in percent, its standard error over
        blocks of neighbouring tokens; `increase_percent` None for one that was given up."""
        head = _head(self._checkpoint)
        dense = self._nll(self._dense, head)
        rows: list[dict[str, Any]] = [{"cett": 0.0, "perplexity": float(np.exp(dense.mean()))}]
        for candidate in self._candidates:
            rows.append({"cett": candidate.cett, **self._compare(candidate, dense, head)})
        return rows

    def _compare(self, candidate: _Candidate, dense: np.ndarray, head: _Head) -> dict[str, Any]:
        if candidate.track is None:
            return {"increase_percent": None}
        nll = self._nll(candidate.track, head)
        ratio = float(np.exp((nll - dense).mean()))
        return {
            "perplexity": float(np.exp(nll.mean())),
            "increase_percent": 100 * (ratio - 1),
            "standard_error_percent": 100 * ratio * block_error(nll - dense),
            "taken_share": float(np.mean(candidate.track.kept_shares)),
        }

    def _nll(self, track: Track, head: _Head) -> np.ndarray:
        """Of every token but a window's first, float64 [N]."""
        parts = []
        for window, ids in zip(track.hidden, self._tokens, strict=True):
            rows = zip(window[:-1].split(_CHUNK), ids[1:].split(_CHUNK), strict=True)
            parts += [F.cross_entropy(head(x), wanted, reduction="none") for x, wanted in rows]
        return np.asarray(torch.cat(parts).double().numpy())


def _rule(tuned: TunedLayer, target: int) -> Any:
    """What a track keeps of the layer; None: all of it."""
    if not tuned.found.tau[target]:
        return None

    def kept(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        mask = tuned.kept(x, target)
        if mask is None:
            raise RuntimeError("a layer that is read whole has no rule")
        return mask

    return kept


def choose_cett(rows: Sequence[dict[str, Any]], max_increase_percent: float) -> float:
    """The largest CETT whose increase and its standard error stay within the limit, by interpolation; 0: none does."""
    measured = rows[1:]
    increases = [
        np.inf if r["increase_percent"] is None else r["increase_percent"] + r["standard_error_percent"]
        for r in measured
    ]
    return cett_at_increase([r["cett"] for r in measured], increases, max_increase_percent)


class _Head:
    """Final norm and output matrix; what is multiplied is fp32, widened from the stored dtype a part at a time."""

    def __init__(self, norm: torch.Tensor, matrix: torch.Tensor, eps: float) -> None:
        self._norm, self._matrix, self._eps = norm, matrix, eps

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        x = rms_norm(hidden, self._norm, self._eps)
        return torch.cat([x @ part.float().T for part in torch.split(self._matrix, _HEAD_ROWS)], dim=-1)


def _head(checkpoint: Checkpoint) -> _Head:
    config = checkpoint.config
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    norm = checkpoint.load("model.norm.weight").float()
    return _Head(norm, checkpoint.load(name), config.rms_norm_eps)
