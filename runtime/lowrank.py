"""Low-rank predictors: the published baselines that the sketches are measured against.

`LowRank`: gate and up as products of rank r, by SVD, or by SVD in the metric of the inputs (activation-aware: ASVD,
arXiv 2312.05821, in the exact form of SVD-LLM, arXiv 2403.07378). `TwoLayer`: Linear(D, r), Linear(r, F) trained to
tell active from not, with the loss of Deja Vu (arXiv 2310.17157) weighted for recall. `ResidentGate`: the exact gate.
Each is a `runtime.sketches.LayerPredictor`. Weights are kept in fp16 (the gate in fp32 for research, counted as fp16).
Shapes: B and N rows, F neurons, D hidden, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch

from runtime.sketches import InputStatistics, activate

_BATCH = 256
_DAMPING = 1e-4


class LowRank:
    """gate ~ gate_left gate_right, up ~ up_left up_right; left [F, r], right [r, D], float16; gate None: not gated."""

    def __init__(
        self, act: str, gate: tuple[np.ndarray, np.ndarray] | None, up: tuple[np.ndarray, np.ndarray], norms: np.ndarray
    ) -> None:
        self.act = act
        self._gate = None if gate is None else (gate[0].astype(np.float16), gate[1].astype(np.float16))
        self._up = (up[0].astype(np.float16), up[1].astype(np.float16))
        self._norms = norms.astype(np.float16)

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in self.to_arrays("").values())

    def predict(self, x: np.ndarray) -> np.ndarray:
        up = _product(x, self._up)
        if self._gate is None:
            return np.asarray(np.abs(activate(self.act, up)) * self._norms.astype(np.float32))
        return np.asarray(
            np.abs(activate(self.act, _product(x, self._gate)) * up) * self._norms.astype(np.float32), np.float32
        )

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        arrays = {"up_left": self._up[0], "up_right": self._up[1], "norms": self._norms}
        if self._gate is not None:
            arrays |= {"gate_left": self._gate[0], "gate_right": self._gate[1]}
        return {prefix + name: array for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str, act: str) -> Self:
        """What `to_arrays` gave; KeyError when one is missing."""
        gated = f"{prefix}gate_left" in arrays
        gate = (arrays[prefix + "gate_left"], arrays[prefix + "gate_right"]) if gated else None
        return cls(act, gate, (arrays[prefix + "up_left"], arrays[prefix + "up_right"]), arrays[prefix + "norms"])


def make_low_rank(
    act: str,
    gate: np.ndarray | None,
    up: np.ndarray,
    down: np.ndarray,
    rank: int,
    statistics: InputStatistics | None = None,
) -> LowRank:
    """By SVD; with statistics, the product that errs least on such inputs. float32 gate, up, down [F, D]."""
    norms = np.linalg.norm(down, axis=1)
    return LowRank(
        act, None if gate is None else _factors(gate, rank, statistics), _factors(up, rank, statistics), norms
    )


def _factors(weight: np.ndarray, rank: int, statistics: InputStatistics | None) -> tuple[np.ndarray, np.ndarray]:
    """Best rank-r product for E||(W - AB) x||²: SVD of W L, L the Cholesky factor of E[x x^T]."""
    if statistics is None:
        left, size, right = np.linalg.svd(weight, full_matrices=False)
        return left[:, :rank] * size[:rank], right[:rank]
    moment = statistics.second_moment.astype(np.float64)
    moment += _DAMPING * moment.diagonal().mean() * np.eye(moment.shape[0])
    lower = np.linalg.cholesky(moment)
    left, size, right = np.linalg.svd(weight @ lower, full_matrices=False)
    root = np.sqrt(size[:rank])  # shared between the sides, so that fp16 holds both
    return left[:, :rank] * root, root[:, None] * np.linalg.solve(lower.T, right[:rank].T).T


def _product(x: np.ndarray, factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    left, right = factors
    return np.asarray((x @ right.astype(np.float32).T) @ left.astype(np.float32).T)


class TwoLayer:
    """Score sigmoid(second first x): the estimated chance that a neuron is active; first [r, D], second [F, r] fp16."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self._first, self._second = first.astype(np.float16), second.astype(np.float16)

    @property
    def num_bytes(self) -> int:
        return self._first.nbytes + self._second.nbytes

    def predict(self, x: np.ndarray) -> np.ndarray:
        logits = _product(x, (self._second, self._first))
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -60, 15))), np.float32)  # 15: fp32 must keep an order

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        return {prefix + "first": self._first, prefix + "second": self._second}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Self:
        """What `to_arrays` gave; KeyError when one is missing."""
        return cls(arrays[prefix + "first"], arrays[prefix + "second"])


def train_two_layer(
    x: np.ndarray, active: np.ndarray, rank: int, epochs: int = 12, rate: float = 2e-3, seed: int = 0
) -> TwoLayer:
    """Deja Vu's predictor for inputs [N, D] and labels bool [N, F]: no activation between the layers, AdamW.

    Loss: binary cross entropy, the active ones weighted 1 - w, the others w, w = their density + 0.005 (as its code).
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(active)
    hidden, neurons = x.shape[1], active.shape[1]
    first = (torch.randn(rank, hidden, generator=generator) / hidden**0.5).requires_grad_()
    second = (torch.randn(neurons, rank, generator=generator) / rank**0.5).requires_grad_()
    optimiser = torch.optim.AdamW([first, second], lr=rate, weight_decay=0.01)
    steps = epochs * -(-x.shape[0] // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    share = float(labels.float().mean()) + 0.005
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(x.shape[0], generator=generator), _BATCH):
            wanted = labels[rows].float()
            weight = wanted * (1 - share) + (1 - wanted) * share
            logits = (inputs[rows] @ first.T) @ second.T
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, weight)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return TwoLayer(first.detach().numpy(), second.detach().numpy())


class ResidentGate:
    """The gate exactly, up by its mean size: score |act(gate x)| E|up x| ||down||. gate [F, D], counted at 2 bytes."""

    def __init__(self, act: str, gate: np.ndarray, weight: np.ndarray) -> None:
        self.act, self._gate, self._weight = act, gate, weight.astype(np.float32)

    @property
    def num_bytes(self) -> int:
        return self._gate.size * 2 + self._weight.nbytes

    def predict(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(activate(self.act, x @ self._gate.T)) * self._weight)

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        return {prefix + "gate": self._gate, prefix + "weight": self._weight}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str, act: str) -> Self:
        """What `to_arrays` gave; KeyError when one is missing."""
        return cls(act, arrays[prefix + "gate"], arrays[prefix + "weight"])


def make_resident_gate(
    act: str, gate: np.ndarray, up: np.ndarray, down: np.ndarray, statistics: InputStatistics
) -> ResidentGate:
    """Of a gated FFN: what is left to guess of a neuron is only up's size, and its mean is known."""
    size = np.sqrt(np.maximum(np.einsum("fd,fd->f", up @ statistics.second_moment, up), 0))
    return ResidentGate(act, gate, size * np.linalg.norm(down, axis=1))
