"""What a sketch's score is, once its sums are there: the end of both ways of making them."""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.kernels.triton_act import activated


@triton.jit  # type: ignore[untyped-decorator]
def _squared(z, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z)^2."""
    a = activated(z, ACT)
    return a * a


@triton.jit  # type: ignore[untyped-decorator]
def scored(  # type: ignore[no-untyped-def]
    gate, up, gate_scale, up_scale, norm, gate_noise, up_noise, ACT: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """How large a neuron's output is expected to be, of what the sketch says of gate (where there is one) and up: what
    goes through act is known up to its noise, and stands there as three points."""
    if GATED:
        centre, scale, noise = gate, gate_scale, gate_noise
        size = tl.sqrt(up * up + up_noise * up_noise) * up_scale
    else:
        centre, scale, noise, size = up, up_scale, up_noise, norm
    spread = 1.7320508075688772 * noise
    square = 0.6666666666666666 * _squared(centre * scale, ACT)
    square += 0.16666666666666666 * _squared((centre - spread) * scale, ACT)
    square += 0.16666666666666666 * _squared((centre + spread) * scale, ACT)
    return tl.sqrt(square) * size
