"""The prefix cache on disk: a restart finds what was prefilled, another model does not, damage is survived, bytes are
bounded."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import ColdstreamError
from runtime.engine import Engine, EngineConfig
from runtime.kv_cache import KVCache
from runtime.prefix_store import PrefixStore
from tests.test_engine import BLOCK, CONFIG, Client, FakeModel, request

MODEL = "0123456789abcdef01234567"
CHUNK = 8  # tokens: two blocks
CHUNK_FILE = 24 + 2 * KVCache.num_bytes(CONFIG, BLOCK, torch.float32)
PROMPT = tuple(range(3, 33))  # three whole chunks, and six tokens


class Server:
    """An engine with a store, from start to end."""

    def __init__(self, directory: Path, model: str = MODEL, max_bytes: int = 1 << 20) -> None:
        self.model, kv = FakeModel(), KVCache(CONFIG, 64, BLOCK)
        config = EngineConfig(max_model_len=256, max_num_seqs=4, kv_blocks=64, block_size=BLOCK, prefill_chunk=CHUNK)
        self.store = PrefixStore(directory, model, kv, max_bytes)
        self.engine = Engine(self.model, kv, config, self.model.cache_snapshot, prefix_backing=self.store)

    def __enter__(self) -> Server:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown(0.0)

    def ask(self, prompt: tuple[int, ...] = PROMPT) -> int:
        """Whether the answer is right is checked; tokens of the prompt that were found are returned."""
        client = Client(self.engine, request("a", prompt))
        account = client.end().account
        assert account is not None and client.tokens == self.model.greedy(prompt, 4)
        return account.cached_tokens


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.kv"))


def test_a_restart_finds_what_was_prefilled(tmp_path: Path) -> None:
    with Server(tmp_path) as first:
        assert first.ask() == 0
        assert first.engine.snapshot().prefix_cache_restored_tokens == 0
    assert len(files(tmp_path)) == 3 and {path.stat().st_size for path in files(tmp_path)} == {CHUNK_FILE}
    with Server(tmp_path) as second:
        assert second.ask() == 24 and sum(len(b.token_ids) for b in second.model.batches if b.kind == "prefill") == 6
        assert second.ask() == 24  # now from memory
        snapshot = second.engine.snapshot()
        assert (snapshot.prefix_cache_restored_tokens, snapshot.prefix_cache_hit_tokens) == (24, 48)
        assert second.ask((*PROMPT[:16], 1, 1, 1, 1, 1, 1, 1, 1, 1)) == 16
    assert len(files(tmp_path)) == 4
    for path in (*files(tmp_path), files(tmp_path)[0].parent):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077  # it tells what was asked


def test_the_last_token_is_computed_even_if_all_is_there(tmp_path: Path) -> None:
    for expected in (0, 16):
        with Server(tmp_path) as server:
            assert server.ask(PROMPT[:24]) == expected


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.ask()
    with Server(tmp_path, "a" * 24) as server:
        assert server.ask() == 0


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "longer"])
def test_a_damaged_chunk_is_said_once_and_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Server(tmp_path) as server:
        server.ask()
    for path in files(tmp_path):
        whole = path.read_bytes()
        bad = {"cut": whole[:-1], "empty": b"", "longer": whole + b"x"}.get(damage, whole[:-5] + b"\xff" + whole[-4:])
        path.write_bytes(bad)
    with caplog.at_level(logging.WARNING), Server(tmp_path) as server:
        assert server.ask() == 0
        assert server.ask((9, *PROMPT)) == 0
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    with Server(tmp_path) as server:
        assert server.ask() == 24


def test_bytes_are_bounded_and_the_longest_unused_go(tmp_path: Path) -> None:
    with Server(tmp_path, max_bytes=4 * CHUNK_FILE) as server:
        server.ask()
        server.ask((9, *PROMPT))
        assert len(files(tmp_path)) == 4 and server.store.num_bytes == 4 * CHUNK_FILE
    for age, path in enumerate(files(tmp_path)):
        os.utime(path, (1000 - age, 1000 - age))
    oldest = files(tmp_path)[2:]
    with Server(tmp_path, "a" * 24, max_bytes=2 * CHUNK_FILE) as server:
        assert not set(oldest) & set(files(tmp_path)) and len(files(tmp_path)) == 2
        assert server.store.num_bytes == 2 * CHUNK_FILE


def test_a_chunk_that_somebody_removed_and_a_part_that_was_left_do_no_harm(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.ask()
    part = tmp_path / MODEL / f"{'ab' * 16}.{2**22 + 1}.part"  # beyond the largest number of a process
    part.write_bytes(b"half")
    os.utime(part, (1000, 1000))
    with Server(tmp_path) as server:
        assert not list(tmp_path.glob("*/*.part"))
        for path in files(tmp_path):
            path.unlink()
        assert server.ask() == 0
        assert len(files(tmp_path)) == 3


def test_what_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    name = "ab" * 16
    theirs = [
        tmp_path / "notes.kv",
        tmp_path / "films" / f"{name}.kv",
        tmp_path / "films" / f"{name}.17.part",
        tmp_path / MODEL / "big.kv",
        tmp_path / MODEL / "download.part",
        tmp_path / MODEL / f"{name}.x.part",
        tmp_path / MODEL / f"{name}.{os.getppid()}.part",  # somebody is writing it
    ]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * CHUNK_FILE)
        os.utime(path, (1000, 1000))
    fresh = tmp_path / MODEL / f"{name}.{2**22 + 1}.part"  # as is, perhaps, another container
    fresh.write_bytes(b"")
    with Server(tmp_path, max_bytes=CHUNK_FILE) as server:
        assert server.store.num_bytes == 0
        server.ask()
    assert all(path.exists() for path in (*theirs, fresh))


def test_a_chunk_that_goes_while_the_directory_is_read_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(tmp_path) as server:
        server.ask()
    stat_of, gone = Path.stat, files(tmp_path)[1]

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path == gone:
            path.unlink(missing_ok=True)
        return stat_of(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with Server(tmp_path) as server:
        assert server.store.num_bytes == 2 * CHUNK_FILE


def test_a_part_of_one_that_had_our_number_is_written_over(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.ask()
    kept = files(tmp_path)
    for path in kept:
        path.rename(path.with_suffix(f".{os.getpid()}.part"))
    with Server(tmp_path) as server:
        assert server.ask() == 0
    assert files(tmp_path) == kept


def test_a_disk_that_fails_is_said_once_and_requests_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.WARNING), Server(tmp_path) as server:
        assert server.ask() == 0
        assert server.ask() == 24  # from memory
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert not list(tmp_path.glob("*/*")) and server.store.num_bytes == 0


def test_a_directory_that_cannot_be_had_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(ColdstreamError, match=r"--prefix-cache-dir .*file"):
        PrefixStore(file, MODEL, KVCache(CONFIG, 2, BLOCK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_as_they_were(dtype: torch.dtype) -> None:
    kv = KVCache(CONFIG, 6, BLOCK, dtype)
    kv.keys.copy_(torch.randn(kv.keys.shape))
    kv.values.copy_(torch.randn(kv.values.shape))
    other = KVCache(CONFIG, 6, BLOCK, dtype)
    other.write_blocks(np.array([5, 0]), kv.read_blocks(np.array([3, 1], np.int32)))
    for ours, theirs in ((other.keys, kv.keys), (other.values, kv.values)):
        assert torch.equal(ours[:, 5], theirs[:, 3]) and torch.equal(ours[:, 0], theirs[:, 1])
        assert not ours[:, 1:5].any()
    with pytest.raises(ValueError, match="2 blocks"):
        other.write_blocks(np.array([5, 0]), np.zeros(7, np.uint8))
