"""Keys and values of all sequences in blocks of one size, and who has which block.

Knows layers, blocks and slots (places of one token), not requests. `KVCache` holds the numbers and is allocated once;
`BlockManager` gives blocks out and takes them back. One thread uses both.
Shapes: T tokens, L layers, Hkv key/value heads, d head size.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.batch import Batch
from runtime.config import ModelConfig

BLOCK_SIZE = 16  # tokens


class KVCache:
    """keys and values [L, num_blocks, block_size, Hkv, d], fp32 or bf16, on the device (None: in main memory).

    Nothing is allocated after construction. The pages are zero, and of main memory become resident when first written.
    ValueError for another dtype or no block.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"keys and values are kept in float32 or bfloat16, not in {dtype}")
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache of {num_blocks} blocks of {block_size} tokens holds nothing")
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.block_bytes = KVCache.num_bytes(config, block_size, dtype)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def num_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of `num_tokens` slots over all layers; tokens are not rounded up to blocks."""
        per_token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 2 * per_token * num_tokens * dtype.itemsize

    def slots(self, batch: Batch) -> torch.Tensor:
        """Where the batch's new tokens go in every layer, int64 [N]: block * block_size + offset in the block."""
        parts = []
        for view in batch.sequences:
            position = np.arange(view.start, view.start + view.length)
            parts.append(
                view.blocks[position // self.block_size].astype(np.int64) * self.block_size + position % self.block_size
            )
        return torch.from_numpy(np.concatenate(parts))

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k and v [N, Hkv, d] at `slots` int64 [N], rounded to the cache's dtype."""
        for store, new in ((self.keys, k), (self.values, v)):
            flat = store[layer].flatten(0, 1)  # [num_blocks * block_size, Hkv, d], a view
            flat.index_copy_(0, slots.to(flat.device), new.to(self.dtype))

    def gather(self, layer: int, blocks: np.ndarray, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `num_tokens` keys and values of a sequence, [T, Hkv, d] each.

        Read-only and valid until the next write: a view where the blocks lie one behind the other, else a copy.
        """
        used = blocks[: -(-num_tokens // self.block_size)]
        return self._take(self.keys[layer], used, num_tokens), self._take(self.values[layer], used, num_tokens)

    def _take(self, store: torch.Tensor, blocks: np.ndarray, num_tokens: int) -> torch.Tensor:
        contiguous = bool((np.diff(blocks) == 1).all())
        first = int(blocks[0]) if blocks.size else 0
        index = torch.from_numpy(blocks.astype(np.int64))
        part = store[first : first + blocks.size] if contiguous else store[index.to(store.device)]
        return part.flatten(0, 1)[:num_tokens]

    def read_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """Bytes of the keys and values of some blocks, all layers: a copy, uint8 [blocks.size * block_bytes]."""
        index = torch.from_numpy(blocks.astype(np.int64)).to(self.keys.device)
        both = torch.stack((self.keys[:, index], self.values[:, index]))  # [2, L, n, block_size, Hkv, d]
        return both.cpu().view(torch.uint8).flatten().numpy()

    def write_blocks(self, blocks: np.ndarray, content: np.ndarray) -> None:
        """The inverse of `read_blocks`. ValueError for bytes of another number of blocks."""
        if content.size != blocks.size * self.block_bytes:
            raise ValueError(f"{content.size} bytes are not those of {blocks.size} blocks")
        index = torch.from_numpy(blocks.astype(np.int64)).to(self.keys.device)
        own = torch.from_numpy(content.copy()).view(self.dtype)
        both = own.view(2, self.keys.shape[0], blocks.size, *self.keys.shape[2:]).to(self.keys.device)
        self.keys[:, index], self.values[:, index] = both[0], both[1]

    def layer_arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """keys and values of one layer as numpy views [num_blocks, block_size, Hkv, d]: float32, or bf16 as uint16."""
        keys, values = self.keys[layer], self.values[layer]
        if self.dtype is torch.bfloat16:
            keys, values = keys.view(torch.uint16), values.view(torch.uint16)
        return keys.numpy(), values.numpy()


class BlockManager:
    """Who has which block: ask with `can_allocate`, take with `allocate`, give back with `free`.

    A block may be held several times, and be kept by a cache beside that. It is free when neither is the case.
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._holders = np.zeros(num_blocks, np.int32)
        self._kept = np.zeros(num_blocks, np.bool_)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return int(np.count_nonzero(self._holders))

    @property
    def num_idle(self) -> int:
        """Blocks that are kept and that nobody holds."""
        return int(np.count_nonzero(self._kept & (self._holders == 0)))

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.num_used - self.num_idle

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) <= self.num_free

    def allocate(self, num_tokens: int) -> np.ndarray:
        """int32 block table for `num_tokens`: the lowest free blocks, ascending, so that tables are mostly contiguous.

        RuntimeError when they are not free: ask `can_allocate` first.
        """
        if not self.can_allocate(num_tokens):
            raise RuntimeError(f"{num_tokens} tokens do not fit {self.num_free} free blocks")
        blocks = np.flatnonzero((self._holders == 0) & ~self._kept)[: self.blocks_for(num_tokens)]
        self._holders[blocks] = 1
        return blocks.astype(np.int32)

    def hold(self, blocks: np.ndarray) -> None:
        """Holds blocks that are held or kept once more. RuntimeError when one of them is free."""
        if not ((self._holders[blocks] > 0) | self._kept[blocks]).all():
            raise RuntimeError(f"blocks {blocks.tolist()} are not all in use")
        self._holders[blocks] += 1

    def free(self, blocks: np.ndarray) -> None:
        """Ends one hold. RuntimeError, and nothing is changed, when one of them is not held or is named twice."""
        if not (self._holders[blocks] > 0).all() or np.unique(blocks).size != blocks.size:
            raise RuntimeError(f"blocks {blocks.tolist()} are freed, but not all of them are in use")
        self._holders[blocks] -= 1

    def held(self, blocks: np.ndarray) -> bool:
        """Whether somebody holds any of them."""
        return bool((self._holders[blocks] > 0).any())

    def keep(self, blocks: np.ndarray) -> None:
        """They stay when nobody holds them any more, until `forget`. RuntimeError when one is kept already or free."""
        if self._kept[blocks].any() or not (self._holders[blocks] > 0).all():
            raise RuntimeError(f"blocks {blocks.tolist()} cannot be kept: one is kept already, or free")
        self._kept[blocks] = True

    def forget(self, blocks: np.ndarray) -> None:
        """The end of `keep`."""
        self._kept[blocks] = False
