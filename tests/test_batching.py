"""Company changes nothing: what runs together gives, bit for bit, what it gives alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from cache.device_curve import ReadCost
from cache.reader import ReadVolume, plan_reads, volume
from runtime.batch import Batch, BatchKind, LogitsKind, SequenceView
from runtime.load import Loaded, LoadOptions, load, prepare
from runtime.plan import FfnCache
from runtime.read_cost import reading_seconds
from runtime.request import FinishReason, Request, SamplingParams, TokenEvent
from runtime.step_choice import StepChoice, _Known

MODES = ("dense", "sparse")


def quiet(what: str, share: float) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def packed(tiny_relu2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batching") / "packed"
    return prepare(str(tiny_relu2.checkpoint), out, tiny_relu2.text, 0.15, "fp32", False, quiet)


@pytest.fixture(params=MODES)
def loaded(request: pytest.FixtureRequest, packed: Path) -> Iterator[Loaded]:
    options = LoadOptions(mode=request.param, dtype="fp32", ffn_cache=FfnCache.parse("20%"), max_num_seqs=20)
    model = load(str(packed), options, quiet)
    yield model
    model.close()


def part(kind: BatchKind, ids: list[int], start: int, blocks: np.ndarray, logits: LogitsKind) -> Batch:
    view = SequenceView(blocks, start, len(ids))
    return Batch(kind, torch.tensor(ids), torch.arange(start, start + len(ids)), (view,), logits)


def random_ids(num: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_batches_that_run_together_equal_those_that_run_alone(loaded: Loaded) -> None:
    """Two chunks of one prompt, a short prompt, a scored one and decoded rows: in one pass, and one after the other."""
    kv, blocks = loaded.new_kv()
    long, short, scored, mate = (blocks.allocate(n) for n in (70, 9, 33, 20))
    ids = random_ids(70, 1)
    batches = [
        part("prefill", ids[:40], 0, long, "none"),
        part("prefill", ids[40:], 40, long, "last"),
        part("prefill", random_ids(9, 2), 0, short, "last"),
        part("score", random_ids(33, 3), 0, scored, "all"),
        part("decode", [7], 19, mate, "last"),
    ]
    before = part("prefill", random_ids(19, 4), 0, mate, "none")
    model = loaded.model
    model.forward(before, kv, lambda: None)
    alone = [model.forward(b, kv, lambda: None) for b in batches]
    written = kv.keys.clone()
    kv.keys[:, long[:4]] = 7.0  # so that what is not written again shows
    together = model.forward_together(batches, kv, lambda: None)
    assert alone[0] is None and together[0] is None
    for one, other in zip(alone[1:], together[1:], strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    assert torch.equal(written[:, long[:4]], kv.keys[:, long[:4]])


def test_a_decoded_row_does_not_depend_on_how_many_there_are(loaded: Loaded) -> None:
    """Up to and beyond the number of rows from which GEMMs would pay."""
    kv, blocks = loaded.new_kv()
    tables = [blocks.allocate(12) for _ in range(20)]
    for i, table in enumerate(tables):
        loaded.model.forward(part("prefill", random_ids(11, i), 0, table, "none"), kv, lambda: None)
    alone = [loaded.model.forward(part("decode", [5], 11, t, "last"), kv, lambda: None) for t in tables]
    for num in (2, 16, 20):
        views = tuple(SequenceView(t, 11, 1) for t in tables[:num])
        batch = Batch("decode", torch.full((num,), 5), torch.full((num,), 11), views, "last")
        rows = loaded.model.forward(batch, kv, lambda: None)
        assert rows is not None
        for row, one in zip(rows, alone, strict=False):
            assert one is not None and torch.equal(row, one[0])


def test_one_pass_reads_the_ffn_once(loaded: Loaded) -> None:
    kv, blocks = loaded.new_kv()
    tables = [blocks.allocate(20) for _ in range(4)]
    batches = [part("prefill", random_ids(20, i), 0, t, "last") for i, t in enumerate(tables)]

    def read(some: list[Batch]) -> int:
        before = loaded.cache.snapshot()
        loaded.model.forward_together(some, kv, lambda: None)
        return (loaded.cache.snapshot() - before).transfers["disk", "cpu"].bytes

    assert read(batches) == read(batches[:1]) > 0


def test_reading_apart_and_streaming_give_the_same_numbers(packed: Path) -> None:
    """Whichever the disk is said to prefer."""
    loaded = serve(packed, "sparse", start=False)
    kv, blocks = loaded.new_kv()
    tables = [blocks.allocate(12) for _ in range(3)]
    for i, table in enumerate(tables):
        loaded.model.forward(part("prefill", random_ids(11, i), 0, table, "none"), kv, lambda: None)
    views = tuple(SequenceView(t, 11, 1) for t in tables)
    batch = Batch("decode", torch.full((3,), 5), torch.full((3,), 11), views, "last")
    found, switched = [], []
    loaded.cache.merge_gap_bytes = 0
    for cost in (ReadCost(0, 0, 1.0), ReadCost(0, 1.0, 0)):  # bytes are dear, requests are dear
        loaded.cache.read_cost = cost
        before = loaded.model.counters().switched
        found.append(loaded.model.forward(batch, kv, lambda: None))
        switched.append(loaded.model.counters().switched - before)
    ffn = loaded.model._ffn
    ffn.choice = StepChoice(lambda: 0.0)
    ffn.choice._by_rows[2] = _Known(streams=True)
    for _ in range(2):  # the second time all is begun ahead
        before = loaded.model.counters().switched
        found.append(loaded.model.forward(batch, kv, lambda: None))
        switched.append(loaded.model.counters().switched - before)
    first = found[0]
    assert first is not None and all(other is not None and torch.equal(first, other) for other in found[1:])
    layers = loaded.model.config.num_hidden_layers
    assert switched == [0, layers, layers, layers]
    loaded.close()


def test_a_row_alone_reads_apart_unless_that_is_far_slower(packed: Path) -> None:
    loaded = serve(packed, "sparse", start=False)
    kv, blocks = loaded.new_kv()
    table = blocks.allocate(12)
    loaded.model.forward(part("prefill", random_ids(11, 0), 0, table, "none"), kv, lambda: None)
    alone = Batch("decode", torch.full((1,), 5), torch.full((1,), 11), (SequenceView(table, 11, 1),), "last")
    ffn = loaded.model._ffn
    ffn.choice = StepChoice(lambda: 0.0)
    ffn.choice._by_rows[1] = _Known(streams=True)  # what company has found is nothing to a row alone
    times, switched = (1.5, 3.0), []
    for slower in times:
        ffn._reading_seconds = lambda layer, ids, slower=slower: (slower, 1.0)
        before = loaded.model.counters().switched
        loaded.model.forward(alone, kv, lambda: None)
        switched.append(loaded.model.counters().switched - before)
    assert switched == [0, loaded.model.config.num_hidden_layers]
    loaded.close()


# -- requests of an engine ------------------------------------------------------------------------------------------

SYSTEM = tuple(random_ids(150, 100))  # what many prompts begin with: two chunks and a bit


def prompts() -> list[Request]:
    """Sixteen seeded requests, half of them with the same beginning; greedy, sampled, penalised, scored."""
    out = []
    for i in range(16):
        own = tuple(random_ids(1 + 13 * (i % 7), i))
        params = SamplingParams(
            max_tokens=8 + i % 5,
            temperature=float(i % 3) / 2,
            seed=i,
            ignore_eos=True,
            frequency_penalty=0.3 * (i % 2),
            num_logprobs=1,
            prompt_logprobs=0 if i % 8 == 5 else None,
        )
        out.append(Request(f"r{i}", SYSTEM + own if i % 2 else own, params))
    return out


def events_of(queue: Queue[TokenEvent]) -> list[TokenEvent]:
    events = [queue.get(timeout=60)]
    while events[-1].finish_reason is None:
        events.append(queue.get(timeout=60))
    assert events[-1].finish_reason is FinishReason.LENGTH, events[-1].error
    return events


def answer(events: list[TokenEvent]) -> list[object]:
    """Tokens and log-probabilities, to the last bit."""
    scored = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
    return [*((e.token_id, e.logprob) for e in events if e.token_id is not None), scored]


def ask(loaded: Loaded, requests: list[Request]) -> list[list[TokenEvent]]:
    """Submits all at once; their events in the order of `requests`."""
    queues: list[Queue[TokenEvent]] = [Queue() for _ in requests]
    for request, queue in zip(requests, queues, strict=True):
        loaded.engine.submit(request, queue.put)
    return [events_of(queue) for queue in queues]


def serve(packed: Path, mode: str, start: bool = True, **options: Any) -> Loaded:
    cache = FfnCache.parse("20%")
    model = load(str(packed), LoadOptions(mode=mode, dtype="fp32", ffn_cache=cache, **options), quiet)
    if start:
        model.engine.start()
    return model


@pytest.mark.parametrize("mode", MODES)
def test_sixteen_at_once_in_any_order_give_what_each_gives_alone(mode: str, packed: Path) -> None:
    alone_model = serve(packed, mode, max_num_seqs=1, prefix_cache=False)
    alone = {r.request_id: answer(ask(alone_model, [r])[0]) for r in prompts()}
    alone_model.engine.shutdown(0)
    alone_model.close()
    loaded = serve(packed, mode, max_num_seqs=16)
    found = []
    for seed in (1, 2):
        requests = prompts()
        random.Random(seed).shuffle(requests)
        events = ask(loaded, requests)
        assert {r.request_id: answer(e) for r, e in zip(requests, events, strict=True)} == alone
        accounts = [e[-1].account for e in events]
        found.append(sum(a.cached_tokens for a in accounts if a is not None))
    snapshot = loaded.engine.snapshot()
    loaded.engine.shutdown(0)
    loaded.close()
    assert found[1] > found[0] > 0 and snapshot.prefix_cache_hit_tokens == sum(found)
    assert snapshot.kv_used_bytes == 0


# -- read apart or streamed ------------------------------------------------------------------------------------------


def test_a_volume_is_what_the_planned_reads_come_to() -> None:
    rng = np.random.default_rng(0)
    for gap in (0, 3000, 20_000):
        starts = 4096 + 1728 * np.sort(rng.choice(4000, 300, replace=False)).astype(np.int64)
        plan = plan_reads(starts, 1728, alignment=512, merge_gap_bytes=gap, staging_offset=0, staging_bytes=1 << 40)
        assert plan is not None
        found = volume(starts, 1728, 512, gap)
        assert found.num_requests == pytest.approx(plan.offsets.size, rel=0.1)
        assert found.num_bytes == pytest.approx(plan.num_bytes, rel=0.1)
    assert volume(starts[:0], 1728, 512, 0) == ReadVolume(0, 0)


def test_reading_is_priced_by_requests_and_bytes() -> None:
    cost = ReadCost(batch_s=1e-4, request_s=1e-5, byte_s=1e-9)
    whole = ReadVolume(4, 10_000_000)  # 10 ms
    apart_s, whole_s = reading_seconds(ReadVolume(100, 400_000), whole, 10_000_000, cost)
    assert 1.5e-3 < apart_s < 1.6e-3 and 10e-3 < whole_s < 11e-3
    apart_s, whole_s = reading_seconds(ReadVolume(1500, 6_000_000), whole, 10_000_000, cost)
    assert apart_s > 21e-3 > whole_s
    apart_s, whole_s = reading_seconds(ReadVolume(0, 0), ReadVolume(0, 0), 10_000_000, cost)
    assert apart_s == 0 < whole_s  # all there: nothing is quicker
    apart_s, whole_s = reading_seconds(ReadVolume(100, 400_000), ReadVolume(2, 500_000), 500_000_000, cost)
    assert apart_s < whole_s  # much to copy


class Clock:
    """Time that passes as each way takes it."""

    def __init__(self, by_layer_s: float, streamed_s: float) -> None:
        self.now, self.seconds = 0.0, {False: by_layer_s, True: streamed_s}
        self.choice = StepChoice(lambda: self.now)

    def steps(self, num: int, rows: int = 8, hopeful: bool = True) -> list[bool]:
        """Which of the steps were streamed."""
        found = []
        for _ in range(num):
            self.choice.begin(rows)
            found.append(self.choice.streams)
            self.now += self.seconds[self.choice.streams]
            self.choice.end(hopeful)
        return found


@pytest.mark.parametrize(("streamed_s", "streams"), [(0.5, True), (0.97, False), (2.0, False)])
def test_the_quicker_way_is_taken_after_both_were_tried(streamed_s: float, streams: bool) -> None:
    clock = Clock(1.0, streamed_s)
    assert clock.steps(6) == [False] * 3 + [True] * 3
    assert clock.steps(64) == [streams] * 64
    assert clock.steps(3) == [not streams] * 3  # tried again
    assert clock.steps(64) == [streams] * 64
    clock.seconds = {streams: 9.0, not streams: 1.0}  # another disk
    assert sum(clock.steps(300)) > 200 if not streams else sum(clock.steps(300)) < 100


def test_what_is_hopeless_is_never_tried_and_other_numbers_of_rows_are_known_apart() -> None:
    clock = Clock(1.0, 0.1)
    assert not any(clock.steps(300, rows=1, hopeful=False))
    assert clock.steps(7, rows=16)[-1] and clock.steps(2, rows=17) == [True, True] and not clock.steps(1, rows=1)[0]


def test_a_step_that_was_cut_is_not_timed() -> None:
    clock = Clock(1.0, 2.0)
    clock.choice.begin(8)
    clock.now += 100.0  # cancelled
    assert clock.steps(6) == [False] * 3 + [True] * 3 and clock.steps(64) == [False] * 64
