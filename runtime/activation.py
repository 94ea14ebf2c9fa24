"""Activation functions of FFNs by the names that configurations give them. Knows one number at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """silu, relu, or relu2 (relu squared, ReLU² Wins, arXiv 2402.03804)."""
    return _ACTIVATIONS[name]
