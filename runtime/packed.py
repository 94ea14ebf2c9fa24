"""A packed model on disk: its manifest, its files, and what makes them invalid. Knows the format, not how it is made.

manifest.json          version, config, bundle layout, offset of every layer, checksums, the source's fingerprint
bundles.safetensors    layers.N.bundles uint8 [F, stride], data at a 4 KiB boundary
profile.safetensors    thresholds and frequencies for each CETT target, the order of the records
sketch.safetensors     what predicts the neurons of each layer that may be sparse
resident.safetensors   everything but the FFN; only when standalone, else it is read from the source checkpoint
tokenizer.json, tokenizer_info.json
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cache.bundle import BundleLayout
from cache.errors import FormatError, FormatKind
from cache.store import BundleFile
from runtime.config import ModelConfig
from runtime.open_file import open_file

FORMAT = "coldstream-packed"
VERSION = 3
MANIFEST, BUNDLES, PROFILE, SKETCH, RESIDENT = (
    "manifest.json",
    "bundles.safetensors",
    "profile.safetensors",
    "sketch.safetensors",
    "resident.safetensors",
)
_PIECE_BYTES = 1 << 20  # hashed at once
_ALIGN = 4096  # of the FFN region of the file: a page, and every device's block


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that a packed model was made from, and still reads its resident part from unless standalone."""

    path: str
    kind: str
    fingerprint: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SketchSize:
    """Bytes of a layer's sketch: a neuron's, and those that do not depend on how many there are."""

    row_bytes: int
    other_bytes: int

    @classmethod
    def of(cls, slices: Mapping[str, Any], prefix: str, num_neurons: int) -> SketchSize:
        """From the tensors of the file whose names begin with `prefix`."""
        rows = others = 0
        for name, part in slices.items():
            if name.startswith(prefix):
                shape = part.get_shape()
                num_bytes = math.prod(shape) * _ITEM_BYTES[part.get_dtype()]
                rows, others = (rows + num_bytes, others) if shape[0] == num_neurons else (rows, others + num_bytes)
        return cls(rows // num_neurons, others)


_ITEM_BYTES = {"U8": 1, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed model whose manifest has been read and whose files have been seen; nothing is loaded."""

    path: Path
    config: ModelConfig
    bundles: BundleFile
    source: Source
    standalone: bool
    contract: dict[str, Any]  # mode and CETT to serve with, and what was measured to choose them
    checksums: dict[str, str]  # sha256 of the small files
    calibration: dict[str, Any]  # text, its hash, tokens

    @property
    def cett(self) -> float:
        """The default target."""
        return float(self.contract["cett"])

    @property
    def mode(self) -> str:
        """What `auto` means: sparse, or dense where no layer is worth it."""
        return str(self.contract["mode"])

    def sparse_layers(self, cett: float) -> list[bool]:
        """Which layers are sparse at a CETT; the others are read whole."""
        starts = [row["sparse_from"] for row in self.contract["layers"]]
        return [start is not None and cett >= start for start in starts]

    def sketch_sizes(self, cett: float) -> list[SketchSize]:
        """Of the layers that are sparse at a CETT, from the file's header alone. Raises FormatError."""
        with _opened(self.path / SKETCH) as opened:
            shapes = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [
                SketchSize.of(shapes, f"layers.{i}.", self.config.intermediate_size)
                for i, sparse in enumerate(self.sparse_layers(cett))
                if sparse
            ]

    def read(self, file: str) -> dict[str, np.ndarray]:
        """All tensors of a small file, its checksum verified. Raises FormatError."""
        self.verify(file)
        with _opened(self.path / file) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def read_layers(self, file: str, wanted: Sequence[bool]) -> Iterator[dict[str, np.ndarray] | None]:
        """Of each wanted layer I the tensors `layers.I.*` of a small file, as they are asked for; None of another. The
        file's checksum is verified first. Raises FormatError."""
        self.verify(file)
        with _opened(self.path / file) as opened:
            names = list(opened.keys())
            for i, own in enumerate(wanted):
                prefix = f"layers.{i}."
                yield {n: opened.get_tensor(n) for n in names if n.startswith(prefix)} if own else None

    def verify(self, file: str, keep_pages: bool = True) -> None:
        """Reads a file whole and compares it with its checksum. Raises FormatError."""
        path = self.path / file
        if sha256(path, keep_pages) != self.checksums[file]:
            raise FormatError(FormatKind.BAD_CHECKSUM, f"{path}: the checksum is wrong; run `coldstream prepare` again")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Its tensors. FormatError naming the file and what is wrong: the format's own library takes every file that it may
    not read for one that is not there."""
    with open_file(path):
        try:
            with safe_open(path, "np") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise FormatError(FormatKind.BAD_HEADER, f"{path}: {error}") from error


def is_packed(path: Path) -> bool:
    """Whether there is a manifest. FormatError where that cannot be known."""
    try:
        return (path / MANIFEST).is_file()
    except OSError as error:
        raise _unreadable(error) from error


def open_packed(path: Path) -> Packed:
    """Reads the manifest and checks that its files are there and long enough. Raises FormatError."""
    try:
        return _open_packed(path)
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> FormatError:
    return FormatError(FormatKind.MISSING_FILE, f"{error.filename}: cannot be opened ({error.strerror})")


def _open_packed(path: Path) -> Packed:
    data = _read_manifest(path / MANIFEST)
    try:
        layout = BundleLayout.from_json(data["layout"])
        config = ModelConfig.from_json(data["config"])
        offsets = tuple(int(o) for o in data["layer_offsets"])
        source = Source(str(data["source"]["path"]), str(data["source"]["kind"]), list(data["source"]["fingerprint"]))
        contract = dict(data["contract"])
        _ = float(contract["cett"]), str(contract["mode"]), [row["sparse_from"] for row in contract["layers"]]
        packed = Packed(
            path=path,
            config=config,
            bundles=BundleFile(path / BUNDLES, layout, config.intermediate_size, offsets),
            source=source,
            standalone=bool(data["standalone"]),
            contract=contract,
            checksums={str(k): str(v) for k, v in data["checksums"].items()},
            calibration=dict(data["calibration"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            FormatKind.BAD_HEADER, f"{path / MANIFEST}: a field is missing or malformed ({error})"
        ) from error
    _check(packed)
    return packed


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatError(FormatKind.MISSING_FILE, f"{path}: not found; {path.parent} is not a packed model")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(FormatKind.BAD_MAGIC, f'{path}: "format" is not "{FORMAT}"')
    if data.get("version") != VERSION:
        found = data.get("version")
        raise FormatError(
            FormatKind.BAD_VERSION,
            f"{path}: version {found!r}, this coldstream reads {VERSION}; run `coldstream prepare` again",
        )
    return data


def _check(packed: Packed) -> None:
    manifest, layers = packed.path / MANIFEST, packed.config.num_hidden_layers
    layout = packed.bundles.layout
    if len(packed.bundles.layer_offsets) != layers:
        raise FormatError(
            FormatKind.BAD_SHAPE, f"{manifest}: {len(packed.bundles.layer_offsets)} layer offsets for {layers} layers"
        )
    if layout.hidden_size != packed.config.hidden_size or layout.gated != packed.config.gated:
        raise FormatError(FormatKind.BAD_SHAPE, f"{manifest}: the bundle layout is not that of the model's FFN")
    if min(packed.bundles.layer_offsets) < 0:
        raise FormatError(FormatKind.BAD_HEADER, f"{manifest}: a negative layer offset")
    if len(packed.contract["layers"]) != layers or packed.mode not in ("sparse", "dense"):
        raise FormatError(FormatKind.BAD_HEADER, f"{manifest}: the contract is not that of {layers} layers")
    for name in (PROFILE, SKETCH, *((RESIDENT,) if packed.standalone else ())):
        if name not in packed.checksums:
            raise FormatError(FormatKind.BAD_HEADER, f"{manifest}: no checksum of {name}")
        if not (packed.path / name).is_file():
            raise FormatError(FormatKind.MISSING_FILE, f"{packed.path / name}: the file is missing")
    packed.bundles.check()


def write_manifest(packed: Packed) -> None:
    """Writes manifest.json; the last file to be written, since a directory without one is not a model."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "config": packed.config.to_json(),
        "layout": packed.bundles.layout.to_json(),
        "layer_offsets": list(packed.bundles.layer_offsets),
        "source": {"path": packed.source.path, "kind": packed.source.kind, "fingerprint": packed.source.fingerprint},
        "standalone": packed.standalone,
        "contract": packed.contract,
        "checksums": packed.checksums,
        "calibration": packed.calibration,
    }
    (packed.path / MANIFEST).write_text(json.dumps(data, indent=1))


def bundle_header(num_layers: int, num_neurons: int, stride: int) -> tuple[bytes, tuple[int, ...]]:
    """The safetensors header of the bundle file, its data at a 4 KiB boundary, and each layer's offset."""
    shapes = [(f"layers.{i}.bundles", "U8", (num_neurons, stride), num_neurons * stride) for i in range(num_layers)]
    header = safetensors_header(shapes)
    return header, tuple(len(header) + i * num_neurons * stride for i in range(num_layers))


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The header of a safetensors file whose data follow in this order: (name, dtype, shape, bytes) of each tensor.

    Padded with spaces, which the format allows, so that the data begin at a 4 KiB boundary.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    end = 0
    for name, dtype, shape, num_bytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(entries).encode()
    padded = text + b" " * (-(len(text) + 8) % _ALIGN)
    return struct.pack("<Q", len(padded)) + padded


def sha256(path: Path, keep_pages: bool = True) -> str:
    """Hex digest of a file. keep_pages: of the page cache, as the file is read again; a large one should not fill it.

    Raises FormatError when it is missing, ColdstreamError when it cannot be read.
    """
    if not path.is_file():
        raise FormatError(FormatKind.MISSING_FILE, f"{path}: the file is missing")
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with open_file(path) as file:
        while num := file.readinto(piece):  # type: ignore[attr-defined]
            digest.update(piece[:num])
            if not keep_pages:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()
