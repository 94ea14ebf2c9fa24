"""What a GPU's errors mean: one request's, the end of the process, or a sentence for who loads a model.

Knows drivers' exceptions and flags, not what was computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cache.budget import format_size
from cache.errors import ColdstreamError, DeviceLostError
from runtime.batch import Cancelled

_OF_A_REQUEST = (ColdstreamError, Cancelled, torch.OutOfMemoryError)


@contextmanager
def device_checked(device: torch.device) -> Iterator[None]:
    """DeviceLostError where an error of the body has left a GPU that answers no more: an illegal address and the like
    spoil the whole process. Launchers raise plain errors, so that the device itself is asked."""
    try:
        yield
    except _OF_A_REQUEST:
        raise
    except Exception as error:
        if device.type != "cuda":
            raise
        try:
            torch.cuda.synchronize(device)
        except Exception:
            what = f"the GPU does not answer any more ({first_line(error)})"
            raise DeviceLostError(f"{what}; only a new process can use it again") from error
        raise


@contextmanager
def load_errors(budget_bytes: int) -> Iterator[None]:
    """ColdstreamError with the way out where the driver refuses while a model is loaded within so many bytes of GPU
    memory, or a kernel asks for more than the GPU's processors have. Other errors pass."""
    try:
        yield
    except Exception as error:  # the allocator's, the driver's and Triton's
        if type(error).__name__ == "OutOfResources":  # of Triton, which a host without a GPU need not have
            what = f"a kernel of this model is too large for this GPU ({first_line(error)})"
            raise ColdstreamError(f"{what}: say --device cpu") from error
        if not isinstance(error, RuntimeError) or "CUDA" not in str(error):
            raise
        raise ColdstreamError(
            f"the GPU failed while the model was loaded ({first_line(error)}): --gpu-memory "
            f"{format_size(budget_bytes)} is planned, and {_free()} are free now; say a smaller --gpu-memory, or "
            f"--device cpu"
        ) from error


def first_line(error: BaseException) -> str:
    """Of its message: what follows are hints for programmers."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _free() -> str:
    try:
        return format_size(torch.cuda.mem_get_info()[0])
    except (RuntimeError, AssertionError):  # it tells no more
        return "nobody knows how many bytes"
