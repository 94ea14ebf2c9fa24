"""A student as it will be served: thresholds at which a given share of the neurons is active, and what that costs.

Thresholds are those of `runtime.calibrate`: one CETT for all layers, here the one whose mean active share is asked for.
Knows a decoder in memory and token ids; not training.
Shapes: S windows, T tokens, N rows, L layers, F neurons, C CETTs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from runtime.activation import activation
from runtime.calibrate import LayerTail, thresholds
from runtime.kernels.sketch import dequantise_rows, make_sketch
from runtime.sparsity import block_error
from runtime.student import DRELU, Decoder, Ffn, Visit

CETTS = tuple(0.005 * 2 ** (i / 2) for i in range(15))  # 0.005 to 0.64
_SCORED = 2048  # tokens whose logits exist at once
Scores = Callable[[torch.Tensor], torch.Tensor]  # x [N, D] -> predicted magnitudes [N, F]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of every layer, at one CETT. epsilon fp32 [L]: what a neuron's (predicted) magnitude must reach; share: mean over
    layers of the neurons that reach it."""

    cett: float
    epsilon: tuple[float, ...]
    share: float


def measure_thresholds(
    decoder: Decoder,
    tokens: torch.Tensor,
    cetts: Sequence[float],
    centred: bool = False,
    scores: list[Scores] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds float32 [L, C] for ascending CETTs on tokens [S, T], and the mean share of neurons that reach them.

    scores: a predictor for each layer; the true magnitudes without. Memory: one layer's activations of the tokens.
    """
    epsilon: list[np.ndarray] = []  # [C] a layer
    shares: list[list[float]] = []

    def visit(layer: int, ffn: Ffn, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            tail = LayerTail(h.float(), ffn.down().float().T, centred)
            found = tail.magnitude if scores is None else scores[layer](x)
            epsilon.append(thresholds(tail, found, cetts))
        shares.append([_share(found, float(e), scores is None) for e in epsilon[-1]])
        return h

    with torch.no_grad():
        decoder.hidden(tokens, visit)
    return np.stack(epsilon), np.asarray(shares).mean(axis=0)


def _share(magnitude: torch.Tensor, epsilon: float, true: bool) -> float:
    """Of neurons at or above epsilon; of true magnitudes only those that are not zero."""
    reached = magnitude >= epsilon
    return float((reached & (magnitude > 0) if true else reached).float().mean())


def find_thresholds(
    decoder: Decoder, tokens: torch.Tensor, share: float, centred: bool = False, scores: list[Scores] | None = None
) -> Thresholds:
    """The CETT at which `share` of the neurons is active on tokens [S, T], and its thresholds.

    Between two CETTs of the grid by interpolation on logarithms; a share out of the grid's reach gives its end.
    """
    epsilon, shares = measure_thresholds(decoder, tokens, CETTS, centred, scores)
    return _at_share(epsilon, shares, share)


def _at_share(epsilon: np.ndarray, shares: np.ndarray, share: float) -> Thresholds:
    """epsilon [L, C]; shares [C], falling with CETT."""
    logs, wanted = np.log(np.maximum(shares, 1e-9))[::-1], math.log(share)  # ascending
    place = float(np.interp(wanted, logs, np.arange(len(CETTS), dtype=np.float64)[::-1]))
    left = min(int(place), len(CETTS) - 2)
    part = place - left
    low, high = (np.log(np.maximum(epsilon[:, left + i], 1e-30)) for i in (0, 1))
    cett = CETTS[left] * (CETTS[left + 1] / CETTS[left]) ** part
    found = np.exp((1 - part) * low + part * high)
    at = float(np.exp(np.interp(place, np.arange(len(CETTS)), logs[::-1])))
    return Thresholds(cett, tuple(np.where(epsilon[:, left] > 0, found, 0.0).tolist()), at)


def serve_rule(found: Thresholds, scores: list[Scores] | None = None, counts: list[float] | None = None) -> Visit:
    """A `Visit` that drops what does not reach its threshold. counts: gets each layer's share of neurons kept."""

    def visit(layer: int, ffn: Ffn, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            magnitude = h.float().abs() * ffn.down_norm() if scores is None else scores[layer](x)
        kept = magnitude >= found.epsilon[layer]
        if counts is not None:
            counts.append(_share(magnitude, found.epsilon[layer], scores is None))
        return torch.where(kept, h, torch.zeros_like(h))

    return visit


def sketch_scores(decoder: Decoder) -> list[Scores]:
    """A predictor for every layer, on the decoder's device: gate and up at 4 bits (`runtime.kernels.sketch`).

    The engine's own sketches are smaller and find less: its figures are those of `coldstream perplexity`.
    """
    return [_scores(block.mlp, decoder.config.hidden_act) for block in decoder.blocks]


def _scores(ffn: Ffn, act: str) -> Scores:
    gate = None if ffn.gate_proj is None else ffn.gate_proj.weight
    rows = [None if w is None else w.detach().float().cpu().numpy() for w in (gate, ffn.up_proj.weight)]
    down = ffn.down_proj.weight.detach().float()
    if rows[1] is None:
        raise ValueError("an FFN has up")
    sketch = make_sketch(rows[0], rows[1], np.ascontiguousarray(down.T.cpu().numpy()))
    up = torch.from_numpy(dequantise_rows(sketch.up_codes, sketch.up_scale, sketch.hidden_size)).to(down.device)
    norm = down.norm(dim=0)
    first = activation("relu" if act == DRELU else act)
    if sketch.gate_codes is None or sketch.gate_scale is None:
        return lambda x: first(x.float() @ up.T).abs() * norm
    gates = torch.from_numpy(dequantise_rows(sketch.gate_codes, sketch.gate_scale, sketch.hidden_size)).to(down.device)
    second = F.relu if act == DRELU else torch.abs
    return lambda x: first(x.float() @ gates.T).abs() * second(x.float() @ up.T) * norm


@torch.no_grad()
def perplexity(decoder: Decoder, tokens: torch.Tensor, visit: Visit | None = None) -> tuple[float, float]:
    """(perplexity, its standard error) of windows [S, T], each a text of its own."""
    parts = []
    for windows in torch.split(tokens, max(1, _SCORED // tokens.shape[1])):
        logits = decoder.logits(windows, visit)[:, :-1].flatten(0, 1)
        parts.append(F.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none").double().cpu())
    nll = torch.cat(parts).numpy()
    value = math.exp(nll.mean())
    return value, value * block_error(nll)


@torch.no_grad()
def top_shares(decoder: Decoder, tokens: torch.Tensor) -> list[float]:
    """The largest neuron's share of each layer's contribution energy, sum of ||n_i||^2 over tokens [S, T]."""
    found: list[float] = []

    def visit(layer: int, ffn: Ffn, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        energy = (h.float() * ffn.down_norm()).square().sum(dim=0)
        found.append(float(energy.max() / energy.sum().clamp_min(1e-30)))
        return h

    decoder.hidden(tokens, visit)
    return found
