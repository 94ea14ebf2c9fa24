"""The arithmetic that has to be fast, behind one face; `select` chooses who does it, once.

Knows records in an arena, sketches, weights and KV blocks as arrays; not layers, caches, files or requests.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np

from cache.bundle import BundleLayout
from cache.errors import UnsupportedError
from runtime.kernels.reference import ReferenceKernels
from runtime.kernels.sketch import Sketch
from runtime.sketches import PlaneSketch

NAMES = ("reference", "generic", "avx2", "avx512")


class Kernels(Protocol):
    """Numpy arrays in, results written into `out`, C-contiguous everywhere; nothing is converted or copied silently.

    A row's result depends on that row alone: never on its batch mates, never on the number of threads, bit for bit.
    A wrong dtype or stride is a TypeError, a wrong shape or name a ValueError, an offset outside its array an
    IndexError; `out` is untouched then. The GIL is dropped while computing. act: silu, relu or relu2 (relu squared).
    """

    @property
    def name(self) -> str: ...  # as in NAMES

    @property
    def num_threads(self) -> int: ...

    def set_num_threads(self, num_threads: int) -> None: ...

    def ffn(
        self,
        x: np.ndarray,
        arena: np.ndarray,
        offsets: np.ndarray,
        mask: np.ndarray | None,
        layout: BundleLayout,
        act: str,
        out: np.ndarray,
        threshold: np.ndarray | None = None,
    ) -> int:
        """out[b] += sum over k with mask[b, k] of act(gate_k . x_b) * (up_k . x_b) * down_k.

        Non-gated: act(up_k . x_b) * down_k. x float32 [B, D]; arena uint8 [N]; offsets int64 [K], bytes from the
        arena's start to each record, need not be aligned; mask bool or uint8 [B, K], None = all; out float32 [B, D].
        Returns how many of the (b, k) were active: their coefficient (what multiplies down_k) is not zero, and in size
        at least threshold[k], float32 [K], None = 0. It is counted only; nothing is left out because of it.
        A record that no row wants is not read; a coefficient of zero adds exactly nothing, whatever down_k holds.
        Neurons are added in the order of `offsets`.
        """

    def sketch_scores(self, x: np.ndarray, sketch: Sketch, act: str, out: np.ndarray) -> None:
        """Predicted output magnitude: out[b, i] = |act(gate_i . x_b) * (up_i . x_b)| * down_norm_i on sketched weights.

        Non-gated: |act(up_i . x_b)| * down_norm_i. x float32 [B, D]; out float32 [B, F], overwritten.
        """

    def plane_scores(self, x: np.ndarray, sketch: PlaneSketch, out: np.ndarray) -> None:
        """`PlaneSketch.predict` of the K neurons that the sketch covers: out float32 [B, K], overwritten.

        x float32 [B, D]. The compiled kernels add 16-bit integers: what x times a plane's coefficient is, in units of
        1/8160 of the row's largest. Their sums are exact, the rounding moves a score by less than a thousandth; a row
        with a NaN or an infinity has NaN scores. Nothing is kept between calls; scratch: 2 bytes a plane and row of x.
        """

    def linear(self, x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        """out = x @ weight.T with float32 sums. x float32 [B, D]; weight float32, float16 or bf16 (as uint16) [N, D].

        Made for few rows (B <= 16, where reading the weight is the price); more are computed, but a GEMM is faster.
        """

    def paged_attention(
        self,
        q: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        block_table: np.ndarray,
        num_tokens: int,
        out: np.ndarray,
        scale: float,
    ) -> None:
        """Attention of one sequence's newest token over its first `num_tokens` tokens (the new one included).

        q float32 [Hq, hd]; keys and values float32 or bf16 (as uint16) [num_blocks, block_size, Hkv, hd] of one layer;
        block_table int32 [n]; out float32 [Hq, hd], overwritten. Query head h reads kv head h // (Hq // Hkv).
        """


def select(name: str = "auto", num_threads: int | None = None) -> Kernels:
    """The kernels called `name`; auto: the best that is compiled and that this processor runs.

    num_threads: None = the processors this process may use (1 for reference). UnsupportedError when `name` is unknown,
    not compiled, or not runnable here.
    """
    if name != "auto" and name not in NAMES:
        raise UnsupportedError(f"there are no kernels called {name!r}; known are auto, {', '.join(NAMES)}")
    compiled = _compiled()
    if name == "reference" or (name == "auto" and not compiled):
        return ReferenceKernels()
    if name != "auto" and name not in compiled:
        reason = f"runnable here are {', '.join(compiled)}" if compiled else "the native module is not built"
        raise UnsupportedError(f"the kernels {name!r} cannot be used: {reason}")
    from runtime.kernels.native import NativeKernels

    threads = len(os.sched_getaffinity(0)) if num_threads is None else num_threads
    return NativeKernels(compiled[0] if name == "auto" else name, threads)


def _compiled() -> list[str]:
    """Names of the native backends that run here, best first; empty when the native module was not built."""
    try:
        from runtime.kernels.native import backends
    except ModuleNotFoundError:
        return []
    return backends()
