"""AdamW (arXiv 1711.05101) with moments in fp32 or bf16: half the memory, where a model's moments would not fit.

The second moment's decay is 0.95, so that a step changes it by more than bf16's rounding. The same as torch.optim.AdamW
with fp32 moments. Knows named tensors; not what they are part of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

BETAS = (0.9, 0.95)
_EPS = 1e-8
_GROUP = 8  # tensors updated at once: of bf16 moments so many are fp32 at a time


class AdamW:
    """Updates parameters in place from their `grad`. Weight decay is for matrices alone."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], weight_decay: float, dtype: torch.dtype) -> None:
        self._parameters = dict(parameters)
        self._weight_decay = weight_decay
        self._first = {n: torch.zeros_like(p, dtype=dtype) for n, p in parameters.items()}
        self._second = {n: torch.zeros_like(p, dtype=dtype) for n, p in parameters.items()}
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with what `grad` holds; a parameter without one stays as it is."""
        self._steps += 1
        names = [n for n, p in self._parameters.items() if p.grad is not None]
        for start in range(0, len(names), _GROUP):
            self._update(names[start : start + _GROUP], lr)

    def _update(self, names: list[str], lr: float) -> None:
        parameters: list[torch.Tensor] = [self._parameters[n] for n in names]
        gradients = [p.grad for p in parameters if p.grad is not None]
        first, second = ([moments[n].float() for n in names] for moments in (self._first, self._second))
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        for name, a, b in zip(names, first, second, strict=True):
            if self._first[name].dtype != torch.float32:
                self._first[name].copy_(a)
                self._second[name].copy_(b)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, math.sqrt(1 - BETAS[1] ** self._steps))
        torch._foreach_add_(scale, _EPS)
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.mul_(1 - lr * self._weight_decay)
        torch._foreach_addcdiv_(parameters, first, scale, -lr / (1 - BETAS[0] ** self._steps))

    def forget(self) -> None:
        """Moments and the number of steps as at the beginning."""
        for moment in (*self._first.values(), *self._second.values()):
            moment.zero_()
        self._steps = 0

    def state(self) -> dict[str, torch.Tensor]:
        """The moments by name, for a file; `load_state` takes them back together with the number of steps."""
        return {f"first.{n}": t for n, t in self._first.items()} | {f"second.{n}": t for n, t in self._second.items()}

    @property
    def steps(self) -> int:
        return self._steps

    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """KeyError when a moment is missing."""
        for own, prefix in ((self._first, "first."), (self._second, "second.")):
            for name, moment in own.items():
                moment.copy_(state[prefix + name])
        self._steps = steps
