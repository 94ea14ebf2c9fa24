"""The prefix cache's chunks on disk, so that a server that starts again need not prefill what the last one knew.

Knows keys, blocks and files; not tokens. `model` names everything that keys and values depend on beside the tokens. A
directory for each model, a file for each chunk, named by its key:

    magic 8 | blake2b of the rest 16 | keys | values

A file is written under another name first and renamed, so that it is there as a whole or not at all; what is damaged
nevertheless is said once, removed, and computed again. The engine's thread writes: a chunk of 64 tokens is some
megabytes, milliseconds beside the second or so that its prefill has taken. Nothing of it stays in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cache.errors import ColdstreamError
from runtime.kv_cache import KVCache

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 1 << 30
_MAGIC = b"cskv\x00\x00\x00\x01"
_HASH_BYTES = 16
_HEAD_BYTES = len(_MAGIC) + _HASH_BYTES
_ENDING, _PART = ".kv", ".part"
_HOME = re.compile(r"[0-9a-f]{24}")
_FILE = re.compile(rf"[0-9a-f]{{32}}({re.escape(_ENDING)}|\.[0-9]+{re.escape(_PART)})")
_STALE_S = 60.0  # a chunk is written in milliseconds


class PrefixStore:
    """At most `max_bytes` of files below `directory`, of all models together; those used longest ago go first.

    model: 24 hexadecimal digits. Files of other names are left alone, and not counted.
    Others must not be able to read what prompts said: directories and files are the user's own. Raises ColdstreamError
    for a directory that cannot be had. make_memory: called before a chunk, or two, are held in memory.
    """

    def __init__(
        self,
        directory: Path,
        model: str,
        kv: KVCache,
        max_bytes: int = DEFAULT_BYTES,
        make_memory: Callable[[], None] | None = None,
    ) -> None:
        self._make_memory = make_memory
        self._home, self._kv, self._max_bytes = directory / model, kv, max_bytes
        self._warned = self._failed = False
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files = _files(directory)  # path -> bytes, oldest use first
        except OSError as error:
            raise ColdstreamError(f"--prefix-cache-dir {directory}: {error.strerror or error}") from None
        self._num_bytes = sum(self._files.values())
        self._make_room(0)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def save(self, key: bytes, blocks: np.ndarray) -> None:
        """Keeps a chunk's keys and values, in place of what may lie there: that was of no use.

        A disk that fails is said once, and nothing is kept any more.
        """
        path = self._path(key)
        if self._failed:
            return
        if path in self._files:
            self._remove(path)
        self._hold()
        content = self._kv.read_blocks(blocks).data
        part = path.with_suffix(f".{os.getpid()}{_PART}")
        try:
            self._make_room(_HEAD_BYTES + len(content))
            part.unlink(missing_ok=True)  # of one that was killed and had our number, as in a container
            with open(part, "xb", opener=_private) as file:
                file.write(_MAGIC + _hash(content))
                file.write(content)
            part.replace(path)
        except OSError as error:
            logger.warning("%s: %s; prompts are no longer kept on disk", self._home, error.strerror or error)
            self._failed = True
            with contextlib.suppress(OSError):
                part.unlink()
            return
        self._files[path] = _HEAD_BYTES + len(content)
        self._num_bytes += self._files[path]

    def load(self, key: bytes, blocks: np.ndarray) -> bool:
        """Writes a chunk into `blocks`, if it is kept and whole; else False, and what the blocks hold is as before."""
        path = self._path(key)
        if path not in self._files:
            return False
        self._hold()
        try:
            content = path.read_bytes()
            os.utime(path)  # for the order of the next start
        except OSError:  # somebody else has removed it
            self._forget(path)
            return False
        body = memoryview(content)[_HEAD_BYTES:]
        whole = len(body) == self._kv.block_bytes * blocks.size
        if not whole or content[:_HEAD_BYTES] != _MAGIC + _hash(body):
            self._damaged(path)
            return False
        self._files.move_to_end(path)
        self._kv.write_blocks(blocks, np.frombuffer(body, np.uint8))
        return True

    def _path(self, key: bytes) -> Path:
        return self._home / f"{key.hex()}{_ENDING}"

    def _hold(self) -> None:
        if self._make_memory is not None:
            self._make_memory()

    def _damaged(self, path: Path) -> None:
        if not self._warned:
            logger.warning("%s is damaged: ignored and removed, like others of its kind from now on", path)
        self._warned = True
        self._remove(path)

    def _make_room(self, num_bytes: int) -> None:
        for path in list(self._files):
            if self._num_bytes + num_bytes <= self._max_bytes:
                return
            self._remove(path)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # gone already, or not ours to remove
            path.unlink()
        self._forget(path)

    def _forget(self, path: Path) -> None:
        self._num_bytes -= self._files.pop(path)


def _files(directory: Path) -> OrderedDict[Path, int]:
    """The chunks of all models with their bytes, oldest use first. Removes what a writer that was killed has left."""
    found = []
    for path in _own(directory):
        with contextlib.suppress(FileNotFoundError):  # another server on the same directory made room
            stat = path.stat()
            if path.suffix == _ENDING:
                found.append((stat, path))
            elif _is_stale(path, stat.st_mtime):
                path.unlink()
    found.sort(key=lambda entry: entry[0].st_mtime)
    return OrderedDict((path, stat.st_size) for stat, path in found)


def _own(directory: Path) -> Iterator[Path]:
    """Files that a store has written, by their names. The directory may hold what is somebody else's."""
    for home in directory.iterdir():
        if _HOME.fullmatch(home.name) and home.is_dir():
            yield from (path for path in home.iterdir() if _FILE.fullmatch(path.name))


def _is_stale(part: Path, modified: float) -> bool:
    """Whether nobody is writing it: neither a process here, nor, as far as its age tells, one of another container."""
    pid = int(part.suffixes[0][1:])
    alive = pid != os.getpid() and Path("/proc", str(pid)).exists()
    return not alive and time.time() - modified > _STALE_S


def _hash(content: memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
