"""The KV cache and its blocks: what is written is read back, what is taken comes back, and nothing is given twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.batch import Batch, SequenceView
from runtime.config import ModelConfig
from runtime.kv_cache import BlockManager, KVCache


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        hidden_act="silu",
        gated=True,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype="fp32",
    )


def batch_of(*views: SequenceView) -> Batch:
    num = sum(v.length for v in views)
    return Batch("prefill", torch.zeros(num, dtype=torch.int64), torch.zeros(num, dtype=torch.int64), views, "none")


def view(blocks: list[int], start: int, length: int) -> SequenceView:
    return SequenceView(np.array(blocks, np.int32), start, length)


def test_slots_follow_the_block_tables(config: ModelConfig) -> None:
    kv = KVCache(config, num_blocks=8, block_size=4)
    slots = kv.slots(batch_of(view([5, 2], 2, 4), view([7], 3, 1)))
    assert slots.dtype is torch.int64
    assert slots.tolist() == [22, 23, 8, 9, 31]


@pytest.mark.parametrize("blocks", [[2, 3, 4], [6, 0, 3]], ids=["contiguous", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_gathered(config: ModelConfig, blocks: list[int], dtype: torch.dtype) -> None:
    kv = KVCache(config, num_blocks=8, block_size=4, dtype=dtype)
    k, v = torch.randn(11, 2, 6), torch.randn(11, 2, 6)
    for start, length in ((0, 7), (7, 3), (10, 1)):  # chunks that end inside of blocks
        part = slice(start, start + length)
        kv.write(1, kv.slots(batch_of(view(blocks, start, length))), k[part], v[part])
    keys, values = kv.gather(1, np.array(blocks, np.int32), 11)
    assert torch.equal(keys, k.to(dtype)) and torch.equal(values, v.to(dtype))
    assert kv.keys[0].count_nonzero() == 0 and kv.values[2].count_nonzero() == 0  # other layers are untouched
    untouched = [b for b in range(8) if b not in blocks]
    assert kv.keys[1, untouched].count_nonzero() == 0


def test_contiguous_blocks_are_not_copied(config: ModelConfig) -> None:
    kv = KVCache(config, num_blocks=8, block_size=4)
    keys, _ = kv.gather(0, np.array([3, 4], np.int32), 6)
    assert keys.data_ptr() == kv.keys[0, 3].data_ptr() and keys.shape == (6, 2, 6)


def test_layer_arrays_are_views(config: ModelConfig) -> None:
    kv = KVCache(config, num_blocks=4, block_size=4, dtype=torch.bfloat16)
    kv.write(2, torch.tensor([5]), torch.full((1, 2, 6), 1.5), torch.full((1, 2, 6), -2.0))
    keys, values = kv.layer_arrays(2)
    assert keys.dtype == np.uint16 and keys.shape == (4, 4, 2, 6) and keys.flags.c_contiguous
    assert (keys[1, 1] == 0x3FC0).all() and (values[1, 1] == 0xC000).all()  # 1.5 and -2 in bf16
    assert np.shares_memory(keys, kv.layer_arrays(2)[0])


def test_num_bytes_is_what_is_allocated(config: ModelConfig) -> None:
    kv = KVCache(config, num_blocks=5, block_size=4, dtype=torch.bfloat16)
    held = kv.keys.nbytes + kv.values.nbytes
    assert held == KVCache.num_bytes(config, 20, torch.bfloat16) == 5 * kv.block_bytes == 2 * 3 * 20 * 2 * 6 * 2


def test_dtypes_and_sizes_that_cannot_be_are_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="float16"):
        KVCache(config, 4, 4, torch.float16)
    with pytest.raises(ValueError, match="0 blocks"):
        KVCache(config, 0, 4)


def test_blocks_are_given_once_and_taken_back() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    first, second = blocks.allocate(9), blocks.allocate(4)
    assert first.dtype == np.int32 and first.tolist() == [0, 1, 2] and second.tolist() == [3]
    assert blocks.num_used == 4 and blocks.can_allocate(8) and not blocks.can_allocate(9)
    blocks.free(first)
    assert blocks.allocate(17 - 4).tolist() == [0, 1, 2, 4]
    assert blocks.num_used == 5


def test_no_tokens_need_no_block() -> None:
    blocks = BlockManager(num_blocks=1, block_size=4)
    blocks.free(blocks.allocate(0))
    assert blocks.num_used == 0 and blocks.can_allocate(4) and not blocks.can_allocate(5)


def test_allocating_too_much_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    with pytest.raises(RuntimeError, match="13 tokens"):
        blocks.allocate(13)
    assert blocks.num_used == 0


@pytest.mark.parametrize("wrong", [[0, 1], [2], [0, 0]], ids=["freed before", "never out", "named twice"])
def test_a_double_free_raises_and_changes_nothing(wrong: list[int]) -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    blocks.free(blocks.allocate(8)[1:])  # 0 stays out
    with pytest.raises(RuntimeError, match="not all of them are in use"):
        blocks.free(np.array(wrong, np.int32))
    assert blocks.num_used == 1
