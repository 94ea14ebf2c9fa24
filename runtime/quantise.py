"""Weights of few bits, one scale a neuron: rounding, and training through it. Knows one matrix at a time.

Symmetric codes of 2^bits - 1 levels; the scale is the largest magnitude over the largest code, so that rounding what is
rounded changes nothing. Training goes straight through the rounding (arXiv 1308.3432).
"""

from __future__ import annotations

import torch


def codes(weight: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes fp32 as `weight`, scales with `dim` of size 1); one neuron's vector lies along `dim`."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=dim, keepdim=True).clamp_min(1e-12) / largest
    return (weight / scale).round().clamp(-largest, largest), scale


def rounded(weight: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The nearest matrix of so many bits; fp32."""
    found, scale = codes(weight, bits, dim)
    return found * scale


def straight_through(weight: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """`rounded`, whose gradient is the weight's own."""
    return weight + (rounded(weight, bits, dim) - weight).detach()
