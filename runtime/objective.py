"""What `coldstream sparsify` minimises: KL to the teacher's logits, and a count of the neurons that are in use.

Pure functions of tensors and numbers; knows neither layers nor steps. The count is soft, at an epsilon
that does not move with the step's own activations: sum of c^2 / (c^2 + epsilon^2) over contributions
c_i = |h_i| ||down_i||. So a neuron that is always on gains the others nothing, as it would with a ratio of norms
(L1/L2), where it lengthens the denominator. Shapes: N rows, D hidden, F neurons, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

TOP_SHARE = 0.25  # of a layer's contribution energy: what one neuron may hold before it costs
_LARGEST = 1e4  # a steered factor, and its inverse


class _HeadKl(torch.autograd.Function):
    """KL with the gradient made on the way forward, so that logits exist for one chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, chunk: int) -> torch.Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        rows_of = _compiled_kl_rows() if student.is_cuda else kl_rows
        for first in range(0, student.shape[0], chunk):
            rows = slice(first, first + chunk)
            divergence, difference = rows_of(student[rows], teacher[rows], head)
            total += divergence
            gradient[rows] = (difference @ head).float()
        ctx.save_for_backward(gradient.div_(student.shape[0]))
        return total / student.shape[0]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


def kl_rows(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of KL(teacher || student), and its gradient in the student's logits, [n, V] in the head's dtype."""
    log_s = F.log_softmax(F.linear(student.to(head.dtype), head).float(), dim=1)
    log_t = F.log_softmax(F.linear(teacher.to(head.dtype), head).float(), dim=1)
    p = log_t.exp()
    return (p * (log_t - log_s)).sum(), (log_s.exp() - p).to(head.dtype)


@cache
def _compiled_kl_rows() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Each logit is read from memory two or three times in place of about ten."""
    return torch.compile(kl_rows, dynamic=False)


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
    """Mean KL(teacher || student) in nats of the next token's distribution; differentiable in `student` alone.

    student, teacher fp32 [N, D]: what the head [V, D], which both share, multiplies. Memory: 5 x chunk x V x 4 bytes.
    """
    with torch.autocast(student.device.type, enabled=False):
        loss: torch.Tensor = _HeadKl.apply(student, teacher, head, chunk)  # type: ignore[no-untyped-call]
    return loss


class Pressed(NamedTuple):
    """A layer's neurons after the threshold, and scalars: soft count and share at or above epsilon (both of F), excess
    of the largest neuron's share of the contribution energy over TOP_SHARE."""

    h: torch.Tensor  # [N, F]
    soft: torch.Tensor
    active: torch.Tensor
    excess: torch.Tensor


def press(h: torch.Tensor, down_norm: torch.Tensor, epsilon: torch.Tensor, masked: bool) -> Pressed:
    """h [N, F], down_norm fp32 [F], epsilon fp32 scalar; masked: what is below epsilon is dropped, as when served."""
    contribution = h.float().abs() * down_norm
    energy = contribution.square()
    kept = contribution >= epsilon
    total = energy.sum(dim=0)
    return Pressed(
        h=torch.where(kept, h, torch.zeros_like(h)) if masked else h,
        soft=(energy / (energy + epsilon.square().clamp_min(1e-30))).mean(),
        active=(kept & (contribution > 0)).float().mean(),
        excess=F.relu(total.max() / total.sum().clamp_min(1e-30) - TOP_SHARE),
    )


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """||found - wanted||^2 / ||wanted||^2 over all elements."""
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)


def steered(factor: float, gain: float, measured: float, target: float) -> float:
    """A positive factor, grown where what is measured is above its target and shrunk where it is below.

    Integral control on logarithms, log factor += gain * log(measured / target), at most one e-fold a step: of a weight
    of pressure or of a threshold, more of which lowers what is measured.
    """
    step = max(-1.0, min(1.0, gain * math.log(max(measured, 1e-6) / target)))
    return min(max(factor * math.exp(step), 1 / _LARGEST), _LARGEST)
