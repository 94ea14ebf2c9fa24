"""The vectors that decide what a ReLU-family FFN makes zero, read out of a bundle file to be kept in memory.

Knows records; not what the zeros are used for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cache.bundle import BundleDtype, BundleLayout, unpack_vector
from cache.store import BundleFile

_DTYPES: dict[BundleDtype, Any] = {
    BundleDtype.FP32: np.float32,
    BundleDtype.FP16: np.float16,
    BundleDtype.BF16: np.uint16,
    BundleDtype.INT8: np.float16,
}


def read_gates(file: BundleFile) -> Iterator[np.ndarray]:
    """Layer by layer the gate vectors (up where there is no gate) [F, D], as the records hold them: fp32, fp16, or bf16
    as uint16; int8 comes as fp16. Reads the whole file once, dropping its pages and keeping nothing. Raises ReadError.
    """
    file.check()
    for layer in range(file.num_layers):
        yield _read_layer(file, layer)


def _read_layer(file: BundleFile, layer: int) -> np.ndarray:
    out = np.empty((file.num_neurons, file.layout.hidden_size), _DTYPES[file.layout.dtype])
    for start, records in file.pieces(layer):
        out[start : start + records.shape[0]] = _vectors(file.layout, records)
    return out


def _vectors(layout: BundleLayout, records: np.ndarray) -> np.ndarray:
    name = "gate" if layout.gated else "up"
    if layout.dtype is BundleDtype.INT8:
        return unpack_vector(layout, records, name).astype(np.float16)
    v = layout.vector(name)
    raw = np.ascontiguousarray(records[:, v.offset : v.offset + layout.hidden_size * v.dtype.item_bytes])
    return raw.view(_DTYPES[layout.dtype])
