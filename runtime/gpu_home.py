"""The records of all neurons in main memory, registered so that a GPU's kernels and copies reach them by themselves.

Memory is mapped and then registered, since allocators of pinned memory round sizes up. Knows records and addresses.
Shapes: L layers, F neurons; a record is `stride` bytes.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch

from cache.bundle import BundleLayout
from cache.errors import ColdstreamError
from cache.store import BundleFile

_MAPPED = 2  # cudaHostRegisterMapped


class GpuHome:
    """`records` uint8 [L, F, stride] on the CPU, zero until they are read. register: for a GPU, which must be there;
    ColdstreamError when the driver refuses."""

    def __init__(self, num_layers: int, num_neurons: int, layout: BundleLayout, register: bool) -> None:
        self.layout = layout
        self.num_bytes = num_layers * num_neurons * layout.stride
        self._memory = mmap.mmap(-1, self.num_bytes)
        array = np.frombuffer(self._memory, np.uint8).reshape(num_layers, num_neurons, layout.stride)
        self.records = torch.from_numpy(array)
        self._unregister = None
        if register:
            error = int(torch.cuda.cudart().cudaHostRegister(self.records.data_ptr(), self.num_bytes, _MAPPED))  # type: ignore[no-untyped-call]
            if error:
                raise ColdstreamError(
                    f"{self.num_bytes} bytes of main memory cannot be registered (CUDA error {error})"
                )
            self._unregister = weakref.finalize(self, _unregister, self.records)

    def read(self, file: BundleFile, layer: int) -> None:
        """One layer out of its file, checksums verified. Raises ReadError."""
        for start, records in file.pieces(layer):
            self.records[layer, start : start + records.shape[0]] = torch.from_numpy(records.copy())

    def close(self) -> None:
        """The GPU must be done with it. Once is enough, and it happens by itself at the latest when the object goes."""
        if self._unregister is not None:
            self._unregister()


def _unregister(records: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(records.data_ptr())  # type: ignore[no-untyped-call]
