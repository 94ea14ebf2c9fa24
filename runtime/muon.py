"""Muon (Jordan et al. 2024; arXiv 2502.16982): a matrix's momentum, made orthogonal, is what it moves along.

Every direction that the gradients have moved a matrix in gets the same weight, however rare; scaled so that an update
is about as large as AdamW's at the same rate. Vectors go to AdamW. Knows named tensors; not what they are part of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from runtime.adamw import AdamW

MOMENTUM = 0.95
_RMS = 0.2  # of an update's elements over the rate, as AdamW's have
_COEFFICIENTS, _ROUNDS = (3.4445, -4.7750, 2.0315), 5
_GROUP = 30  # matrices of one shape made orthogonal at once


class Muon:
    """Updates parameters in place from their `grad`; the same methods as AdamW. One moment a matrix in `dtype`."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], weight_decay: float, dtype: torch.dtype) -> None:
        self._matrices = {n: p for n, p in parameters.items() if p.dim() == 2}
        self._vectors = AdamW({n: p for n, p in parameters.items() if p.dim() != 2}, weight_decay, dtype)
        self._momentum = {n: torch.zeros_like(p, dtype=dtype) for n, p in self._matrices.items()}
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with what `grad` holds; a parameter without one stays as it is."""
        self._vectors.step(lr)
        shapes: dict[torch.Size, list[str]] = {}
        for name, parameter in self._matrices.items():
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append(name)
        for names in shapes.values():
            for start in range(0, len(names), _GROUP):
                self._update(names[start : start + _GROUP], lr)

    def _update(self, names: list[str], lr: float) -> None:
        """Matrices of one shape. Nesterov's momentum."""
        parameters: list[torch.Tensor] = [self._matrices[n] for n in names]
        momentum = [self._momentum[n] for n in names]
        gradients = [p.grad.to(m.dtype) for p, m in zip(parameters, momentum, strict=True) if p.grad is not None]
        torch._foreach_mul_(momentum, MOMENTUM)
        torch._foreach_add_(momentum, gradients)
        ahead = torch._foreach_add(gradients, momentum, alpha=MOMENTUM)
        direction = orthogonal(torch.stack(ahead))
        scale = _RMS * math.sqrt(max(direction.shape[1:]))
        torch._foreach_mul_(parameters, 1 - lr * self._weight_decay)
        torch._foreach_add_(parameters, list(direction.to(parameters[0].dtype).unbind()), alpha=-lr * scale)

    def forget(self) -> None:
        """Moments and the number of steps as at the beginning."""
        self._vectors.forget()
        for moment in self._momentum.values():
            moment.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """The moments by name, for a file; `load_state` takes them back together with the number of steps."""
        return self._vectors.state() | {f"momentum.{n}": t for n, t in self._momentum.items()}

    @property
    def steps(self) -> int:
        return self._vectors.steps

    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """KeyError when a moment is missing."""
        self._vectors.load_state(state, steps)
        for name, moment in self._momentum.items():
            moment.copy_(state[f"momentum.{name}"])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of each U S V^T, [B, M, N]: Newton-Schulz, after which singular values lie between 0.7 and 1.2.

    In bf16 on cuda, as the result is no more exact than that; fp32 else.
    """
    a, b, c = _COEFFICIENTS
    x: torch.Tensor = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x
