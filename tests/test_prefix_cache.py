"""The prefix cache: keys tell all tokens up to a chunk's end, blocks that a request holds are never taken."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.kv_cache import BlockManager
from runtime.prefix_cache import PrefixCache, chunk_keys


def test_a_key_tells_its_chunk_and_all_before_it() -> None:
    first = chunk_keys(range(20), 8)
    assert len(first) == 2 and len(set(first)) == 2 and all(len(key) == 16 for key in first)
    assert chunk_keys(tuple(range(16)), 8) == first and chunk_keys(range(7), 8) == ()
    changed = [99, *range(1, 20)]
    assert not set(chunk_keys(changed, 8)) & set(first)  # the second chunk's own tokens are the same
    assert chunk_keys([*range(8), *[1] * 8], 8)[0] == first[0]
    assert chunk_keys(range(20), 4)[1] != first[0]


@pytest.fixture
def blocks() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=4)


def put(cache: PrefixCache, blocks: BlockManager, key: bytes) -> np.ndarray:
    """A chunk that somebody has computed and let go of."""
    own = blocks.allocate(8)
    cache.put(key, own)
    blocks.free(own)
    return own


def test_what_is_put_is_found_and_stays(blocks: BlockManager) -> None:
    cache = PrefixCache(blocks, 8)
    own = put(cache, blocks, b"a")
    found = cache.find(b"a")
    assert found is not None and found.tolist() == own.tolist() and cache.find(b"b") is None
    assert (blocks.num_used, blocks.num_idle, blocks.num_free) == (0, 2, 6)
    blocks.hold(found)
    assert (blocks.num_used, blocks.num_idle, blocks.num_free) == (2, 0, 6)
    assert not blocks.can_allocate(7 * 4) and not set(blocks.allocate(6 * 4)) & set(own)
    with pytest.raises(RuntimeError, match="already"):
        cache.put(b"a", own)


def test_the_oldest_that_nobody_holds_is_evicted(blocks: BlockManager) -> None:
    cache = PrefixCache(blocks, 8)
    for key in (b"a", b"b", b"c", b"d"):
        put(cache, blocks, key)
    cache.touch([b"a", b"unknown"])
    held = cache.find(b"b")
    assert held is not None
    blocks.hold(held)
    cache.evict(1)  # a chunk is two blocks
    assert [cache.find(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, True, False, True]
    cache.evict(100)
    assert [cache.find(key) is not None for key in (b"a", b"b", b"c", b"d")] == [False, True, False, False]
    assert (blocks.num_used, blocks.num_idle, blocks.num_free) == (2, 0, 6)


def test_the_end_of_a_prompt_goes_before_its_beginning(blocks: BlockManager) -> None:
    """A chunk whose beginning is gone could not be found any more."""
    cache = PrefixCache(blocks, 8)
    for key in (b"1", b"2", b"3"):
        put(cache, blocks, key)
    cache.touch([b"1", b"2", b"3"])
    cache.evict(2)
    assert [cache.find(key) is not None for key in (b"1", b"2", b"3")] == [True, True, False]


def test_a_chunk_is_whole_blocks(blocks: BlockManager) -> None:
    with pytest.raises(ValueError, match="not whole blocks"):
        PrefixCache(blocks, 6)


def test_holds_are_counted(blocks: BlockManager) -> None:
    own = blocks.allocate(8)
    blocks.hold(own)
    blocks.free(own)
    assert blocks.num_used == 2 and blocks.held(own)
    blocks.free(own)
    assert blocks.num_used == 0 and not blocks.held(own)
    for wrong in (blocks.free, blocks.hold, blocks.keep):
        with pytest.raises(RuntimeError, match="blocks"):
            wrong(own)
