"""A home on disk for a GPU: main memory holds some records, registered, and of the others those that a step wants.

`NeuronCache` reads and keeps them; its arena is registered with the driver, so that kernels read records where they
are. `where` tells the kernels the address of each record that a step wants and the GPU does not hold. Knows addresses
and leases, not tokens.
Shapes: L layers, F neurons, S slots.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cache.device_curve import DeviceCurve
from cache.neuron_cache import Lease, NeuronCache
from cache.stats import CacheSnapshot
from cache.store import BundleFile
from runtime.gpu_home import register_memory, unregister_memory
from runtime.kernels.triton_neurons import Records


class DiskHome:
    """where int64 [F] on the device. slots_per_layer and staging_bytes: in main memory, see `NeuronCache`."""

    words = None  # no place where all records lie

    def __init__(
        self,
        file: BundleFile,
        slots_per_layer: Sequence[int],
        staging_bytes: int,
        device: torch.device,
        io_engine: str = "auto",
        curve: DeviceCurve | None = None,
    ) -> None:
        file.check()
        self.file, self.layout, self._device = file, file.layout, device
        self._slots, self._staging_bytes = slots_per_layer, staging_bytes
        self._reading = {"io_engine": io_engine, "curve": curve}
        self.where = torch.zeros(file.num_neurons, dtype=torch.int64, device=device)
        self._given = torch.zeros(file.num_neurons, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.cache: NeuronCache = None  # type: ignore[assignment]  # `open` makes it
        self.on_gpu = np.zeros((file.num_layers, file.num_neurons), bool)
        self._lease: Lease | None = None
        self._unregister: Callable[[], object] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, F, bytes of a record."""
        return self.file.num_layers, self.file.num_neurons, self.layout.stride

    @property
    def registered(self) -> torch.Tensor:
        """All memory that the GPU reads, uint8; of a home that is open."""
        return torch.from_numpy(self.cache.arena)

    def of_layer(self, layer: int, slab: torch.Tensor, table: torch.Tensor, resident: bool) -> Records:
        """What the kernels take: slab uint8 [S, stride], table int32 [F]."""
        return Records(slab, slab, table, self.layout, resident, self.where)

    def fill(self, neurons: torch.Tensor, slab: torch.Tensor, slots: torch.Tensor) -> None:
        """Records of neurons int64 [N, 2] (layer, neuron) into slots int64 [N] of slab uint8 [S, stride], out of the
        file, checksums verified. Raises ReadError."""
        of, to = neurons.cpu().numpy(), slots.cpu()
        for layer in np.unique(of[:, 0]).tolist():
            own = np.flatnonzero(of[:, 0] == layer)
            ids = of[own, 1]
            for start, records in self.file.pieces(layer):
                some = np.flatnonzero((ids >= start) & (ids < start + records.shape[0]))
                if some.size:
                    picked = torch.from_numpy(records[ids[some] - start])
                    slab[to[own[some]].to(self._device)] = picked.to(self._device)
                if start + records.shape[0] > ids.max():
                    break

    def open(self, on_gpu: np.ndarray, frequency: np.ndarray, progress: Callable[[str, float], None]) -> None:
        """Fills main memory with what is needed most, frequency [L, F], beside what is on_gpu, bool [L, F]. Raises
        ReadError, ColdstreamError when memory cannot be registered."""
        self.on_gpu = on_gpu
        wanted = np.where(on_gpu, 0.0, frequency).astype(np.float32)
        self.cache = NeuronCache(self.file, self._slots, self._staging_bytes, wanted, **self._reading)  # type: ignore[arg-type]
        if self._device.type == "cuda":
            arena = torch.from_numpy(self.cache.arena)
            register_memory(arena)
            self._unregister = weakref.finalize(self, unregister_memory, arena)
        for layer in range(self.file.num_layers):
            progress("warming", layer / self.file.num_layers)
            self.cache.warm(layer)
        progress("warming", 1.0)

    def bring(self, layer: int, wanted: np.ndarray) -> bool:
        """Waits until the records of `wanted`, bool [F], that the GPU lacks are in main memory, and says in `where` at
        which addresses, until `settle`. False when they do not fit staging: nothing was read. Raises ReadError.

        What the GPU was given to do before must be done.
        """
        self.settle()
        ids = np.flatnonzero(wanted & ~self.on_gpu[layer]).astype(np.int32)
        lease = self.cache.acquire(layer, ids)
        if lease is None:
            return False
        self._lease = lease
        self._given.numpy()[ids] = self.cache.arena.ctypes.data + lease.offsets
        self.where.copy_(self._given, non_blocking=True)
        return True

    def settle(self) -> None:
        """The GPU is done with what `bring` brought: the best of it stays in main memory."""
        lease, self._lease = self._lease, None
        if lease is not None:
            self.cache.release(lease)

    def snapshot(self) -> CacheSnapshot:
        return self.cache.snapshot()

    def close(self) -> None:
        """The GPU must be done with it. Once is enough."""
        self.cache.close()
        if self._unregister is not None:
            self._unregister()
