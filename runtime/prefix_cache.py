"""Keys and values of prompts that may come again: whole chunks, found by all the tokens up to their end.

Knows chunks, keys and blocks; not requests. Who puts a chunk in vouches that its numbers depend on its tokens only
(it was prefilled densely, as a chunk of this size); then whoever finds it computes what it would have computed anyway.
One thread uses it; the counters may be read by any.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from runtime.kv_cache import BlockManager

_KEY_BYTES = 16


def chunk_keys(token_ids: Sequence[int], chunk_tokens: int) -> tuple[bytes, ...]:
    """A key for each whole chunk: a hash of its tokens and of the key before it, so of all tokens up to its end."""
    keys = []
    key = b""
    for start in range(0, len(token_ids) - chunk_tokens + 1, chunk_tokens):
        tokens = np.asarray(token_ids[start : start + chunk_tokens], "<i8").tobytes()
        key = hashlib.blake2b(key + tokens, digest_size=_KEY_BYTES).digest()
        keys.append(key)
    return tuple(keys)


class Backing(Protocol):
    """Where chunks outlast this process. `load` fills the blocks, or leaves them and says False."""

    def save(self, key: bytes, blocks: np.ndarray) -> None: ...

    def load(self, key: bytes, blocks: np.ndarray) -> bool: ...


class PrefixCache:
    """Chunks in the order of their last use. Their blocks are marked as kept; those that nobody holds may be evicted.

    Costs nothing beside the KV cache that there is: it lives in blocks that no request needs now. backing: gets what is
    put, and is asked by `restore`.
    """

    def __init__(self, blocks: BlockManager, chunk_tokens: int, backing: Backing | None = None) -> None:
        if chunk_tokens % blocks.block_size:
            raise ValueError(f"a chunk of {chunk_tokens} tokens is not whole blocks of {blocks.block_size}")
        self._blocks, self._backing, self._chunk_tokens = blocks, backing, chunk_tokens
        self._chunks: OrderedDict[bytes, np.ndarray] = OrderedDict()  # oldest use first
        self.lookup_tokens = self.hit_tokens = 0  # of prompts that were admitted; of those, what was found
        self.restored_tokens = 0  # of what was found, what came from the backing

    def find(self, key: bytes) -> np.ndarray | None:
        """The chunk's blocks, int32; hold them (`BlockManager.hold`) before anything else is asked of the cache."""
        return self._chunks.get(key)

    def put(self, key: bytes, blocks: np.ndarray) -> None:
        """Keeps a chunk that is not there yet; its blocks are held by the caller."""
        if key in self._chunks:
            raise RuntimeError("this chunk is in the prefix cache already")
        self._blocks.keep(blocks)
        self._chunks[key] = blocks.copy()
        if self._backing is not None:
            self._backing.save(key, blocks)

    def restore(self, key: bytes, blocks: np.ndarray) -> bool:
        """Fills blocks that the caller holds with a chunk that is not there, and keeps it, if the backing has it."""
        if self._backing is None or not self._backing.load(key, blocks):
            return False
        self._blocks.keep(blocks)
        self._chunks[key] = blocks.copy()
        self.restored_tokens += self._chunk_tokens
        return True

    def touch(self, keys: Iterable[bytes]) -> None:
        """The chunks of a prompt, in its order, have been used: a chunk is never younger than the one before it."""
        for key in reversed(tuple(keys)):
            if key in self._chunks:
                self._chunks.move_to_end(key)

    def evict(self, num_blocks: int) -> None:
        """Frees at least so many blocks, oldest chunks first, or all that nobody holds."""
        for key, blocks in list(self._chunks.items()):
            if num_blocks <= 0:
                return
            if not self._blocks.held(blocks):
                del self._chunks[key]
                self._blocks.forget(blocks)
                num_blocks -= blocks.size
