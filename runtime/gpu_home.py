"""The records of all neurons in main memory, registered so that a GPU's kernels and copies reach them by themselves.

Memory is mapped and then registered, since allocators of pinned memory round sizes up. Knows records and addresses.
Shapes: L layers, F neurons; a record is `stride` bytes.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch

from cache.arena import not_mapped
from cache.budget import format_size
from cache.bundle import BundleLayout
from cache.errors import ColdstreamError
from cache.stats import CacheSnapshot
from cache.store import BundleFile
from runtime.kernels.triton_copy import copy_records
from runtime.kernels.triton_neurons import Records

_MAPPED = 2  # cudaHostRegisterMapped


class GpuHome:
    """`records` uint8 [L, F, stride] on the CPU, zero until they are read. register: for a GPU, which must be there;
    ColdstreamError when the kernel or the driver refuses."""

    def __init__(self, num_layers: int, num_neurons: int, layout: BundleLayout, register: bool) -> None:
        self.layout = layout
        self.num_bytes = num_layers * num_neurons * layout.stride
        try:
            self._memory = mmap.mmap(-1, self.num_bytes)
        except OSError as error:
            raise not_mapped(self.num_bytes, error) from error
        array = np.frombuffer(self._memory, np.uint8).reshape(num_layers, num_neurons, layout.stride)
        self.records = torch.from_numpy(array)
        self._unregister = None
        if register:
            register_memory(self.records)
            self._unregister = weakref.finalize(self, unregister_memory, self.records)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, F, bytes of a record."""
        layers, neurons, stride = self.records.shape
        return layers, neurons, stride

    @property
    def words(self) -> torch.Tensor:
        """int32 [L F, words of a record]."""
        return self.records.view(-1, self.records.shape[2]).view(torch.int32)

    @property
    def registered(self) -> torch.Tensor:
        """All memory that the GPU reads, uint8."""
        return self.records

    def of_layer(self, layer: int, slab: torch.Tensor, table: torch.Tensor, resident: bool) -> Records:
        """What the kernels take: slab uint8 [S, stride], table int32 [F]."""
        return Records(self.records[layer], slab, table, self.layout, resident)

    def fill(self, neurons: torch.Tensor, slab: torch.Tensor, slots: torch.Tensor) -> None:
        """Records of neurons int64 [N, 2] (layer, neuron), N at least 1, into slots int64 [N] of slab [S, stride]."""
        flat = neurons[:, 0] * self.records.shape[1] + neurons[:, 1]
        copy_records(self.words, slab.view(torch.int32), flat, slots)

    def snapshot(self) -> CacheSnapshot:
        """Of tiers below main memory: none."""
        return CacheSnapshot()

    def read(self, file: BundleFile, layer: int) -> None:
        """One layer out of its file, checksums verified. Raises ReadError."""
        for start, records in file.pieces(layer):
            self.records[layer, start : start + records.shape[0]] = torch.from_numpy(records.copy())

    def close(self) -> None:
        """The GPU must be done with it. Once is enough, and it happens by itself at the latest when the object goes."""
        if self._unregister is not None:
            self._unregister()


def register_memory(memory: torch.Tensor) -> None:
    """Makes main memory readable for kernels and copies. ColdstreamError when the driver refuses."""
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _MAPPED))  # type: ignore[no-untyped-call]
    if error:
        what = f"{format_size(memory.nbytes)} of main memory cannot be registered for the GPU (CUDA error {error})"
        raise ColdstreamError(f"{what}: raise the limit of locked memory (ulimit -l), or say a smaller --memory")


def unregister_memory(memory: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
