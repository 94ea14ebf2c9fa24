"""The engine around a tiny model that is made of arithmetic: scheduling, cancelling, draining, faults and accounts.

The fake model's logits depend on the tokens that it finds in the KV cache, so that a wrong block table shows. Where a
test needs the engine to be inside of a step, the model waits at a gate; nothing sleeps for luck.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import Queue
from typing import Any

import pytest
import torch

from cache.errors import ContextLengthError, EngineStoppedError, QueueFullError, ReadError, RequestError
from cache.stats import CacheSnapshot, TierSnapshot, TransferSnapshot
from runtime.batch import Batch, ModelCounters
from runtime.config import ModelConfig
from runtime.engine import Engine, EngineConfig, MemoryLevels
from runtime.gpu_errors import device_checked
from runtime.kv_cache import KVCache
from runtime.request import FinishReason, Request, SamplingParams, TokenEvent

WAIT_S = 20.0  # how long a test waits for what must happen; reached only when it fails
VOCAB, EOS, NUM_LAYERS, BLOCK = 64, 2, 3, 4

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    hidden_act="silu",
    gated=True,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    attention_bias=False,
    bos_token_id=1,
    eos_token_ids=(EOS,),
    dtype="fp32",
)


@dataclass
class Gate:
    """Stops the engine's thread once, before a layer of the first batch of its kind, and tells the test so."""

    layer: int
    when: Callable[[Batch], bool]
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_S)


class FakeModel:
    """Logits are a fixed random function of the sum of all tokens so far, read back from every layer's KV cache."""

    def __init__(self) -> None:
        self.config = CONFIG
        self.batches: list[Batch] = []
        self.steps: list[list[Batch]] = []
        self.layers_run = 0
        self.gates: list[Gate] = []
        self.fault: Callable[[Batch], Exception | None] = lambda batch: None
        self.reads = TransferSnapshot()
        self.tier = TierSnapshot()
        self.table = torch.randn(997, VOCAB, generator=torch.Generator().manual_seed(0))
        self.table[:, EOS] = -20.0

    def counters(self) -> ModelCounters:
        return ModelCounters({"decode": len(self.batches)}, 1, 2, 3)

    def cache_snapshot(self) -> CacheSnapshot:
        return CacheSnapshot({"cpu": self.tier}, {("disk", "cpu"): self.reads})

    def forward_together(
        self, batches: list[Batch], kv: KVCache, check: Callable[[], None]
    ) -> list[torch.Tensor | None]:
        self.batches += batches
        self.steps.append(batches)
        for layer in range(NUM_LAYERS):
            for batch in batches:
                self._pause(batch, layer)
            check()
            self.layers_run += 1
            for batch in batches:
                rows = batch.token_ids.float()[:, None, None].expand(-1, 1, 2)
                kv.write(layer, kv.slots(batch), rows, rows + layer)
            self._read(sum(len(batch.token_ids) for batch in batches))
        for batch in batches:
            error = self.fault(batch)
            if error is not None:
                raise error
        return [self._logits(batch, kv) for batch in batches]

    def _pause(self, batch: Batch, layer: int) -> None:
        for gate in self.gates:
            if gate.layer == layer and not gate.entered.is_set() and gate.when(batch):
                gate.wait()

    def _read(self, num_rows: int) -> None:
        r, t = self.reads, self.tier
        self.reads = replace(r, bytes=r.bytes + 1000 + num_rows, stall_seconds=r.stall_seconds + 0.25)
        self.tier = replace(t, lookups=t.lookups + 11, hits=t.hits + 4, misses=t.misses + 7)

    def _logits(self, batch: Batch, kv: KVCache) -> torch.Tensor | None:
        if batch.logits == "none":
            return None
        rows = []
        for view in batch.sequences:
            ends = range(view.start + 1, view.start + view.length + 1)
            for end in ends if batch.logits == "all" else ends[-1:]:
                sums = [int(kv.gather(layer, view.blocks, end)[0][:, 0, 0].sum()) for layer in range(NUM_LAYERS)]
                assert len(set(sums)) == 1
                rows.append(self.table[(sums[0] * 31 + end) % 997])
        return torch.stack(rows)

    def expected_logits(self, tokens: list[int]) -> torch.Tensor:
        """What the next token's logits must be after these."""
        return self.table[(sum(tokens) * 31 + len(tokens)) % 997]

    def greedy(self, prompt: tuple[int, ...], num: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num):
            tokens.append(int(self.expected_logits(tokens).argmax()))
        return tokens[len(prompt) :]


class Client:
    """Collects the events of one request."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self._queue: Queue[TokenEvent] = Queue()
        self.events: list[TokenEvent] = []
        engine.submit(request, self._queue.put)

    def next(self) -> TokenEvent:
        event = self._queue.get(timeout=WAIT_S)
        self.events.append(event)
        return event

    def end(self) -> TokenEvent:
        """Waits for the last event and returns it."""
        while not self.events or self.events[-1].finish_reason is None:
            self.next()
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return [e.token_id for e in self.events if e.token_id is not None]

    @property
    def extra(self) -> bool:
        return not self._queue.empty()


def request(name: str, prompt: tuple[int, ...] = (5, 6, 7), **params: Any) -> Request:
    return Request(name, prompt, SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params}))


class Bench:
    """A model and an engine around it."""

    def __init__(self, **limits: Any) -> None:
        config = {"max_model_len": 256, "max_num_seqs": 4, "kv_blocks": 64, "prefill_chunk": 8, "prefill_rows": 8}
        config |= limits
        self.model = FakeModel()
        kv = KVCache(CONFIG, config["kv_blocks"], BLOCK)
        memory = MemoryLevels({"cpu": 100}, {("cpu", "kv"): 40})
        self.engine = Engine(
            self.model, kv, EngineConfig(block_size=BLOCK, **config), self.model.cache_snapshot, memory
        )

    def client(self, *args: Any, **params: Any) -> Client:
        return Client(self.engine, request(*args, **params))

    def stop_at(self, layer: int = 0, when: Callable[[Batch], bool] = lambda batch: True) -> Gate:
        """The next step that `when` is true of stops before `layer` until the gate is opened."""
        gate = Gate(layer, when)
        self.model.gates.append(gate)
        return gate

    def wait_until_stopped(self) -> None:
        """Until a shutdown that another thread has begun is seen; needs a live request `0`."""
        while True:
            try:
                self.client("0")
            except EngineStoppedError:
                return
            except RequestError:
                continue

    def kinds(self) -> list[str]:
        return [b.kind for b in self.model.batches]


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    """Makes started engines; at the end each must be empty: no request, no KV."""
    benches: list[Bench] = []

    def make_one(**limits: Any) -> Bench:
        benches.append(Bench(**limits))
        benches[-1].engine.start()
        return benches[-1]

    yield make_one
    for bench in benches:
        for gate in bench.model.gates:
            gate.opened.set()
        bench.engine.shutdown(WAIT_S)
        snapshot = bench.engine.snapshot()
        assert snapshot.kv_used_bytes == 0
        assert (snapshot.num_requests_running, snapshot.num_requests_waiting) == (0, 0)


Make = Callable[..., Bench]


def decodes(num: int) -> Callable[[Batch], bool]:
    """Of a decode step of `num` sequences."""
    return lambda batch: batch.kind == "decode" and len(batch.sequences) == num


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_the_models(make: Make) -> None:
    bench = make()
    client = bench.client("a", (5, 6, 7), max_tokens=20)
    last = client.end()
    assert client.tokens == bench.model.greedy((5, 6, 7), 20)
    assert last.finish_reason is FinishReason.LENGTH and last.token_id is not None and not client.extra
    assert [e.finish_reason for e in client.events[:-1]] == [None] * 19


def test_many_requests_at_once_get_their_own_tokens(make: Make) -> None:
    bench = make(max_num_seqs=3, kv_blocks=24)
    prompts = [tuple(range(3, 4 + 5 * i)) for i in range(8)]
    gate = bench.stop_at()
    clients = [bench.client(str(i), p, max_tokens=6 + i) for i, p in enumerate(prompts)]
    gate.opened.set()
    for i, client in enumerate(clients):
        assert client.end().finish_reason is FinishReason.LENGTH
        assert client.tokens == bench.model.greedy(prompts[i], 6 + i)
    assert max(len(b.sequences) for b in bench.model.batches) > 1


def test_an_end_token_is_carried_and_counted(make: Make) -> None:
    bench = make()
    bench.model.table[:, EOS] = 50.0
    client = bench.client("a", max_tokens=9)
    assert client.end().finish_reason is FinishReason.STOP and client.tokens == [EOS]
    assert bench.engine.snapshot().generation_tokens == 1
    ignored = bench.client("b", max_tokens=9, ignore_eos=True)
    assert ignored.end().finish_reason is FinishReason.LENGTH and ignored.tokens == [EOS] * 9


def test_stop_token_ids_stop(make: Make) -> None:
    bench = make()
    tokens = bench.model.greedy((5, 6, 7), 20)
    client = bench.client("a", max_tokens=20, ignore_eos=True, stop_token_ids=frozenset({tokens[3]}))
    assert client.end().finish_reason is FinishReason.STOP
    assert client.tokens == tokens[: tokens.index(tokens[3]) + 1]


def test_seeded_sampling_does_not_depend_on_batch_mates(make: Make) -> None:
    params = {"temperature": 1.0, "seed": 11, "max_tokens": 15, "frequency_penalty": 0.5}
    alone = make().client("a", tuple(range(3, 30)), **params)
    alone.end()
    bench = make()
    gate = bench.stop_at()
    mates = [bench.client(f"m{i}", (4,) * (1 + 9 * i), temperature=1.0, max_tokens=40, seed=i) for i in range(3)]
    among = bench.client("a", tuple(range(3, 30)), **params)
    gate.opened.set()
    for client in (among, *mates):
        client.end()
    assert among.tokens == alone.tokens and len(among.tokens) == 15
    assert any(len(b.sequences) > 2 for b in bench.model.batches)


def test_logprobs_come_with_the_tokens(make: Make) -> None:
    bench = make()
    client = bench.client("a", max_tokens=3, num_logprobs=2)
    client.end()
    tokens = [5, 6, 7]
    for event in client.events:
        assert event.logprob is not None and event.token_id is not None
        expected = torch.log_softmax(bench.model.expected_logits(tokens), 0)
        assert event.logprob.logprob == pytest.approx(expected[event.token_id].item(), abs=1e-5)
        assert [i for i, _ in event.logprob.top] == expected.topk(2).indices.tolist()
        tokens.append(event.token_id)


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_prompt_chunks_depend_on_the_request_only(make: Make) -> None:
    bench = make()
    client = bench.client("a", tuple(range(3, 23)), max_tokens=1)
    client.end()
    assert [(b.kind, len(b.token_ids), b.logits) for b in bench.model.batches] == [
        ("prefill", 8, "none"),
        ("prefill", 8, "none"),
        ("prefill", 4, "last"),
    ]
    assert torch.cat([b.positions for b in bench.model.batches]).tolist() == list(range(20))
    assert [(e.token_id is None, e.prompt_tokens_done) for e in client.events] == [(True, 8), (True, 16), (False, 20)]


def test_the_prompts_logprobs_are_scored_in_chunks(make: Make) -> None:
    bench = make(kv_blocks=128, max_model_len=400)
    prompt = tuple(3 + i * i % 50 for i in range(300))
    client = bench.client("a", prompt, max_tokens=2, prompt_logprobs=1)
    client.end()
    assert [(b.kind, len(b.token_ids)) for b in bench.model.batches[:3]] == [
        ("score", 128),
        ("score", 128),
        ("score", 44),
    ]
    given = [e.prompt_logprobs for e in client.events if e.prompt_logprobs is not None]
    assert len(given) == 1 and len(given[0]) == 300 and given[0][0] is None
    assert next(
        e.prompt_logprobs is not None for e in client.events if e.prompt_tokens_done == 300
    )  # before the tokens
    for i, score in enumerate(given[0][1:], start=1):
        expected = torch.log_softmax(bench.model.expected_logits(list(prompt[:i])), 0)
        assert score is not None and score.token_id == prompt[i]
        assert score.logprob == pytest.approx(expected[prompt[i]].item(), abs=1e-5)
        assert [j for j, _ in score.top] == [int(expected.argmax())]
    assert client.tokens == bench.model.greedy(prompt, 2)


@pytest.mark.parametrize("num_prompt", [1, 128, 129])
def test_scoring_works_at_the_edges_of_chunks(make: Make, num_prompt: int) -> None:
    client = make().client("a", (3,) * num_prompt, max_tokens=0, prompt_logprobs=0)
    last = client.end()
    assert last.finish_reason is FinishReason.LENGTH and last.token_id is None
    assert last.prompt_logprobs is not None and len(last.prompt_logprobs) == num_prompt


def test_no_tokens_asked_is_a_success_without_tokens(make: Make) -> None:
    bench = make()
    client = bench.client("a", max_tokens=0)
    last = client.end()
    assert (last.finish_reason, last.token_id, last.prompt_tokens_done) == (FinishReason.LENGTH, None, 3)
    assert bench.model.batches[0].logits == "none"
    snapshot = bench.engine.snapshot()
    assert snapshot.success == {"stop": 0, "length": 1} and snapshot.generation_tokens == 0


def test_decoding_goes_on_beside_a_long_prompt(make: Make) -> None:
    bench = make()
    gate = bench.stop_at(when=decodes(1))
    decoding = bench.client("a", max_tokens=60)
    assert gate.entered.wait(WAIT_S)
    start = len(bench.model.steps)  # the step at the gate is a decode step
    long = bench.client("b", (4,) * 80, max_tokens=1)  # ten chunks
    gate.opened.set()
    long.end()
    kinds = [[b.kind for b in step] for step in bench.model.steps[start:]]
    assert kinds[:10] == [["prefill", "decode"]] * 10
    decoding.end()
    assert decoding.tokens == bench.model.greedy((5, 6, 7), 60)


def test_prompts_share_a_step_and_none_waits_for_a_long_one(make: Make) -> None:
    """A chunk of each prompt first; what is left of the rows goes to the oldest."""
    bench = make(prefill_rows=32, max_num_seqs=3)
    gate = bench.stop_at()
    first = bench.client("0", (9,), max_tokens=1)  # so that the others arrive together
    assert gate.entered.wait(WAIT_S)
    long = bench.client("a", tuple(range(3, 63)), max_tokens=2)  # eight chunks, the last of four tokens
    short = [bench.client(str(i), tuple(range(i, i + 6)), max_tokens=2) for i in (7, 8)]
    gate.opened.set()
    for client in (first, long, *short):
        client.end()
        assert client.tokens == bench.model.greedy(client.request.prompt_ids, len(client.tokens))
    steps = [[(b.kind, len(b.token_ids)) for b in step] for step in bench.model.steps[1:]]
    assert steps[0] == [("prefill", 8), ("prefill", 6), ("prefill", 6), ("prefill", 8)]  # the last: the long one again
    assert steps[1] == [("prefill", 8)] * 4 + [("decode", 2)]
    assert steps[2] == [("prefill", 8), ("prefill", 4)] and steps[3] == [("decode", 1)]


def test_prompts_take_turns_when_there_is_room_for_one_chunk(make: Make) -> None:
    bench = make(prefill_rows=8)
    gate = bench.stop_at()
    clients = [bench.client(n, (i,) * 24, max_tokens=1) for i, n in enumerate("abc", start=5)]
    gate.opened.set()
    for client in clients:
        client.end()
    assert [int(b.token_ids[0]) for b in bench.model.batches] == [5, 6, 7] * 3


def test_scored_rows_of_a_step_are_bounded(make: Make) -> None:
    bench = make(prefill_rows=500, kv_blocks=256, max_num_seqs=8)
    gate = bench.stop_at()
    first = bench.client("0", (9,), max_tokens=1)
    assert gate.entered.wait(WAIT_S)
    clients = [bench.client(str(i), (3 + i,) * 60, max_tokens=0, prompt_logprobs=0) for i in range(1, 6)]
    gate.opened.set()
    for client in (first, *clients):
        assert client.end().finish_reason is FinishReason.LENGTH
    assert [sum(len(b.token_ids) for b in step) for step in bench.model.steps] == [1, 120, 120, 60]


# -- prompts that begin alike ----------------------------------------------------------------------------------------


def prefilled(bench: Bench) -> int:
    return sum(len(b.token_ids) for b in bench.model.batches if b.kind == "prefill")


def cached(client: Client) -> int:
    account = client.end().account
    assert account is not None
    return account.cached_tokens


def test_a_prompt_that_begins_like_another_is_computed_from_where_they_part(make: Make) -> None:
    bench = make()
    common = tuple(range(3, 23))  # two chunks and a half
    first = bench.client("a", (*common, 30), max_tokens=5)
    assert cached(first) == 0
    second = bench.client("b", (*common, 31, 32), max_tokens=5)
    assert cached(second) == 16 and prefilled(bench) == 21 + 6
    assert first.tokens == bench.model.greedy((*common, 30), 5)
    assert second.tokens == bench.model.greedy((*common, 31, 32), 5)
    snapshot = bench.engine.snapshot()
    assert (snapshot.prefix_cache_lookup_tokens, snapshot.prefix_cache_hit_tokens) == (43, 16)
    assert snapshot.prompt_tokens == 43
    block_bytes = BLOCK * 2 * NUM_LAYERS * 2 * 4
    assert (snapshot.kv_used_bytes, snapshot.prefix_cache_idle_bytes) == (0, 4 * block_bytes)


def test_the_last_token_is_always_computed(make: Make) -> None:
    bench = make()
    prompt = tuple(range(3, 19))  # two whole chunks
    for name, found in (("a", 0), ("b", 8)):
        client = bench.client(name, prompt, max_tokens=3)
        assert cached(client) == found and client.tokens == bench.model.greedy(prompt, 3)


def test_prompts_that_come_together_are_computed_once(make: Make) -> None:
    bench = make(prefill_rows=64)
    gate = bench.stop_at()
    prompt = tuple(range(3, 30))
    clients = [bench.client(str(i), (*prompt, i), max_tokens=4) for i in range(5, 9)]
    gate.opened.set()
    assert sum(cached(c) for c in clients) == 3 * 24 and prefilled(bench) == 24 + 4 * 4
    for client in clients:
        assert client.tokens == bench.model.greedy(client.request.prompt_ids, 4)


def test_what_was_decoded_or_scored_is_not_shared(make: Make) -> None:
    bench = make()
    prompt = tuple(range(3, 12))
    first = bench.client("a", prompt, max_tokens=20)
    first.end()
    turn = bench.client("b", (*prompt, *first.tokens, 5), max_tokens=1)
    assert cached(turn) == 8  # of the prompt only, though the answer's KV was there
    scored = bench.client("c", (6,) * 20, max_tokens=0, prompt_logprobs=0)
    assert cached(scored) == 0
    assert cached(bench.client("d", (6,) * 20, max_tokens=1)) == 0
    assert cached(bench.client("e", (6,) * 20, max_tokens=0, prompt_logprobs=0)) == 0
    assert bench.engine.snapshot().prefix_cache_lookup_tokens == 9 + 30 + 20


def test_what_is_kept_gives_way_to_requests(make: Make) -> None:
    """KV that is only kept never makes a request wait; the prompt used last stays longest."""
    bench = make(kv_blocks=10)  # 40 tokens
    one, two = tuple(range(3, 12)), tuple(range(13, 22))
    for name, prompt in (("a", one), ("b", two), ("c", one)):  # 3 blocks each, 2 of them kept
        bench.client(name, prompt, max_tokens=1).end()
    large = bench.client("d", (2,) * 4, max_tokens=28)  # 8 blocks: one chunk has to go
    assert large.end().finish_reason is FinishReason.LENGTH
    assert cached(bench.client("e", one, max_tokens=1)) == 8
    assert cached(bench.client("f", two, max_tokens=1)) == 0
    whole = bench.client("g", (2,) * 12, max_tokens=28)
    assert whole.end().finish_reason is FinishReason.LENGTH and whole.tokens == bench.model.greedy((2,) * 12, 28)


def test_blocks_that_are_shared_are_not_needed_twice(make: Make) -> None:
    bench = make(kv_blocks=10)
    gate = bench.stop_at(when=decodes(1))
    prompt = tuple(range(3, 20))
    first = bench.client("a", prompt, max_tokens=7)  # 6 blocks
    assert gate.entered.wait(WAIT_S)
    second = bench.client("b", prompt, max_tokens=7)  # 6 blocks, 4 of them shared
    gate.opened.set()
    assert cached(second) == 16 and first.end().finish_reason is FinishReason.LENGTH
    assert first.tokens == second.tokens == bench.model.greedy(prompt, 7)
    assert max(len(b.sequences) for b in bench.model.batches) == 2


def test_a_prompt_that_was_cut_leaves_what_it_had_computed(make: Make) -> None:
    bench = make()
    prompt = tuple(range(3, 43))
    gate = bench.stop_at(when=lambda batch: int(batch.positions[0]) == 16)
    client = bench.client("a", prompt, max_tokens=5)
    assert gate.entered.wait(WAIT_S)
    bench.engine.abort("a")
    gate.opened.set()
    assert client.end().finish_reason is FinishReason.ABORT
    again = bench.client("b", prompt, max_tokens=5)
    assert cached(again) == 16 and again.tokens == bench.model.greedy(prompt, 5)


def test_without_a_prefix_cache_nothing_is_shared(make: Make) -> None:
    bench = make(prefix_cache=False)
    for name in "ab":
        assert cached(bench.client(name, (4,) * 30, max_tokens=2)) == 0
    snapshot = bench.engine.snapshot()
    assert prefilled(bench) == 60 and snapshot.prefix_cache_idle_bytes == snapshot.prefix_cache_lookup_tokens == 0


# -- admission -------------------------------------------------------------------------------------------------------


def test_admission_goes_by_the_kv_that_may_be_needed(make: Make) -> None:
    bench = make(kv_blocks=10)  # 40 tokens
    gate = bench.stop_at()
    first = bench.client("a", (3,) * 10, max_tokens=10)  # 5 blocks
    assert gate.entered.wait(WAIT_S)
    second = bench.client("b", (3,) * 10, max_tokens=14)  # 6 blocks: must wait
    third = bench.client("c", (3,) * 4, max_tokens=4)  # 2 blocks: would fit, but does not overtake
    snapshot = bench.engine.snapshot()
    assert (snapshot.num_requests_running, snapshot.num_requests_waiting) == (1, 2)
    assert snapshot.kv_used_bytes == 5 * BLOCK * 2 * NUM_LAYERS * 2 * 4
    gate.opened.set()
    for client in (first, second, third):
        assert client.end().finish_reason is FinishReason.LENGTH
    assert max(len(b.sequences) for b in bench.model.batches) == 2  # second and third together, never with the first


def test_what_can_never_fit_is_refused(make: Make) -> None:
    bench = make(max_model_len=30, kv_blocks=64)
    assert bench.client("a", (3,) * 10, max_tokens=20).end().finish_reason is FinishReason.LENGTH
    with pytest.raises(ContextLengthError, match=r"maximum context length is 30 tokens\. However, .* 31 tokens"):
        bench.client("b", (3,) * 10, max_tokens=21)
    small = make(max_model_len=256, kv_blocks=4)
    with pytest.raises(ContextLengthError, match="is 16 tokens"):
        small.client("c", (3,) * 10, max_tokens=7)
    assert small.engine.snapshot().failure["context_length"] == 1


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ((), {}, "no tokens"),
        ((3, VOCAB), {}, "token id outside"),
        ((-1,), {}, "token id outside"),
        ((3,), {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ((3,), {"max_tokens": -1}, "max_tokens"),
    ],
)
def test_requests_without_sense_are_refused(make: Make, prompt: tuple[int, ...], params: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make().client("a", prompt, **params)


def test_the_queue_is_bounded(make: Make) -> None:
    bench = make(max_num_seqs=1, max_queue=2)
    gate = bench.stop_at()
    clients = [bench.client(str(i)) for i in range(3)]
    assert gate.entered.wait(WAIT_S)
    with pytest.raises(QueueFullError, match="queue is full"):
        bench.client("d")
    gate.opened.set()
    assert [c.end().finish_reason for c in clients] == [FinishReason.LENGTH] * 3
    assert bench.client("d").end().finish_reason is FinishReason.LENGTH  # there is room again
    snapshot = bench.engine.snapshot()
    assert snapshot.failure["queue_full"] == 1 and snapshot.success["length"] == 4


def test_what_waits_for_too_long_is_given_up(make: Make) -> None:
    bench = make(max_num_seqs=1, max_wait_s=0.05)
    gate = bench.stop_at()
    running, waiting = bench.client("a"), bench.client("b")
    assert gate.entered.wait(WAIT_S)
    time.sleep(0.06)  # the limit itself; nothing is raced: the engine stands at the gate
    gate.opened.set()
    end = waiting.end()
    assert (end.finish_reason, end.failure) == (FinishReason.ERROR, "wait_limit") and "0.05 s" in (end.error or "")
    assert waiting.tokens == [] and running.end().finish_reason is FinishReason.LENGTH
    assert bench.client("c").end().finish_reason is FinishReason.LENGTH
    assert bench.engine.snapshot().failure["wait_limit"] == 1


def test_none_is_given_up_beside_another_of_its_group(make: Make) -> None:
    bench = make(max_num_seqs=1, max_wait_s=0.05)
    gates = [bench.stop_at() for _ in range(2)]
    first, second, stranger = (
        Client(bench.engine, replace(request(name, max_tokens=4), group=group))
        for name, group in (("a", "batch"), ("b", "batch"), ("c", ""))
    )
    for gate in gates:
        assert gate.entered.wait(WAIT_S)
        time.sleep(0.06)  # longer than the limit
        gate.opened.set()
    assert stranger.end().failure == "wait_limit"
    assert first.end().finish_reason is FinishReason.LENGTH and second.end().finish_reason is FinishReason.LENGTH


def test_an_engine_that_breaks_says_so_and_fails_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, failed = Bench(), threading.Event()
    monkeypatch.setattr(bench.engine, "_admit", lambda: 1 / 0)
    bench.engine.start(failed.set)
    end = bench.client("a").end()
    assert (end.finish_reason, end.failure) == (FinishReason.ERROR, "shutdown") and failed.wait(WAIT_S)
    with pytest.raises(EngineStoppedError):
        bench.client("b")
    bench.engine.shutdown(0.0)


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "lost"])
def test_an_engine_whose_gpu_is_lost_ends_and_one_whose_gpu_answers_goes_on(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: torch.device) -> None:
        if not answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    bench, failed = Bench(), threading.Event()
    forward, bad = bench.model.forward_together, 13

    def checked(batches: list[Batch], *others: Any) -> list[torch.Tensor | None]:
        with device_checked(torch.device("cuda")):
            return forward(batches, *others)

    monkeypatch.setattr(bench.model, "forward_together", checked)
    bench.model.fault = lambda batch: RuntimeError("Triton Error") if bad in batch.token_ids.tolist() else None
    gate = bench.stop_at()
    bench.engine.start(failed.set)
    clients = [bench.client("a", max_tokens=9), bench.client("b", (bad, 14))]
    gate.opened.set()
    good, end = (client.end() for client in clients)
    assert end.finish_reason is FinishReason.ERROR and end.failure == "internal" and end.error is not None
    assert ("does not answer any more (Triton Error)" in end.error) == (not answers)
    assert good.finish_reason is (FinishReason.LENGTH if answers else FinishReason.ERROR)
    bench.engine.shutdown(WAIT_S)
    assert failed.is_set() == (not answers)


@pytest.mark.parametrize("error", [ReadError("model.bin", 0, 1, "gone"), torch.OutOfMemoryError("too much")])
def test_errors_of_one_request_ask_the_gpu_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("asked"))
    with pytest.raises(type(error)), device_checked(torch.device("cuda")):
        raise error


def test_an_engine_that_is_shut_down_has_not_failed() -> None:
    bench, failed = Bench(), threading.Event()
    bench.engine.start(failed.set)
    bench.engine.shutdown(WAIT_S)
    assert not failed.is_set()


def test_a_schema_needs_a_compiler(make: Make) -> None:
    with pytest.raises(RequestError, match="JSON schema"):
        make().client("a", json_schema="{}")


def test_an_id_is_served_once_at_a_time(make: Make) -> None:
    bench = make()
    gate = bench.stop_at()
    client = bench.client("a")
    with pytest.raises(RequestError, match="id a"):
        bench.client("a")
    gate.opened.set()
    client.end()
    bench.client("a").end()


# -- cancelling ------------------------------------------------------------------------------------------------------


def test_an_abort_stops_a_prefill_within_one_layer(make: Make) -> None:
    bench = make()
    gate = bench.stop_at(layer=1)
    client = bench.client("a", (4,) * 100, max_tokens=5)
    assert gate.entered.wait(WAIT_S)
    bench.engine.abort("a")
    bench.engine.abort("a")  # twice is once
    gate.opened.set()
    last = client.end()
    assert last.finish_reason is FinishReason.ABORT and last.account is not None
    assert bench.model.layers_run == 1 and len(bench.model.batches) == 1
    assert bench.engine.snapshot().kv_used_bytes == 0
    assert bench.engine.snapshot().failure["cancelled"] == 1
    assert last.account.bytes_read == {"disk": 1008}  # what one layer read is on its account


def test_an_abort_in_a_batch_spares_the_mates(make: Make) -> None:
    bench = make()
    start, gate = bench.stop_at(), bench.stop_at(layer=1, when=decodes(2))
    clients = [bench.client(n, (5, 6, i), max_tokens=30) for i, n in enumerate("ab", start=7)]
    start.opened.set()
    assert gate.entered.wait(WAIT_S)
    bench.engine.abort("a")
    gate.opened.set()
    assert clients[0].end().finish_reason is FinishReason.ABORT
    assert clients[1].end().finish_reason is FinishReason.LENGTH
    assert clients[1].tokens == bench.model.greedy((5, 6, 8), 30)


def test_an_abort_while_queued_does_not_wait_for_the_step(make: Make) -> None:
    bench = make(max_num_seqs=1)
    gate = bench.stop_at(layer=0)
    running, queued = bench.client("a"), bench.client("b")
    assert gate.entered.wait(WAIT_S)
    bench.engine.abort("b")
    gate.opened.set()
    last = queued.end()
    assert last.finish_reason is FinishReason.ABORT and queued.events == [last] and last.prompt_tokens_done == 0
    assert running.end().finish_reason is FinishReason.LENGTH
    assert all(len(b.sequences) == 1 for b in bench.model.batches) and bench.kinds().count("prefill") == 1


def test_an_abort_because_of_a_stop_string_is_a_success(make: Make) -> None:
    bench = make()
    gate = bench.stop_at(when=decodes(1))
    client = bench.client("a", max_tokens=200)
    assert gate.entered.wait(WAIT_S)
    bench.engine.abort("a", FinishReason.STOP)
    gate.opened.set()
    assert client.end().finish_reason is FinishReason.STOP
    snapshot = bench.engine.snapshot()
    assert snapshot.success["stop"] == 1 and snapshot.failure["cancelled"] == 0


def test_aborting_what_is_over_or_unknown_does_nothing(make: Make) -> None:
    bench = make()
    client = bench.client("a")
    client.end()
    bench.engine.abort("a")
    bench.engine.abort("nobody")
    assert bench.client("b").end().finish_reason is FinishReason.LENGTH and not client.extra


def test_closing_the_generator_aborts(make: Make) -> None:
    bench = make()
    events = bench.engine.generate(request("a", max_tokens=250))
    gate = bench.stop_at(when=decodes(1))
    assert next(events).token_id is not None
    events.close()  # type: ignore[attr-defined]
    gate.opened.set()
    assert bench.client("b", max_tokens=1).end().finish_reason is FinishReason.LENGTH
    snapshot = bench.engine.snapshot()
    assert snapshot.failure["cancelled"] == 1 and snapshot.generation_tokens == 1 + 1


def test_the_generator_gives_what_submit_gives(make: Make) -> None:
    bench = make()
    events = list(bench.engine.generate(request("a", max_tokens=7)))
    assert [e.token_id for e in events] == bench.model.greedy((5, 6, 7), 7)
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_a_consumer_that_raises_is_gone_and_hurts_nobody(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    bench = make()
    gate = bench.stop_at()

    def broken(event: TokenEvent) -> None:
        raise RuntimeError("the loop is closed")

    bench.engine.submit(request("a", max_tokens=200), broken)
    mate = bench.client("b", max_tokens=10)
    gate.opened.set()
    assert mate.end().finish_reason is FinishReason.LENGTH
    bench.engine.shutdown(WAIT_S)
    assert bench.engine.snapshot().failure["cancelled"] == 1
    assert "the consumer of request a failed" in caplog.text


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_read_error_fails_the_requests_of_that_step_only(make: Make) -> None:
    bench = make()
    bench.model.fault = lambda batch: (
        ReadError("model.bin", 4096, 512, "Input/output error") if 13 in batch.token_ids.tolist() else None
    )
    good, bad = bench.client("a", max_tokens=20), bench.client("b", (13, 14), max_tokens=20)
    last = bad.end()
    assert last.finish_reason is FinishReason.ERROR
    assert last.error == "model.bin: reading 512 bytes at offset 4096 failed: Input/output error"
    assert good.end().finish_reason is FinishReason.LENGTH
    assert good.tokens == bench.model.greedy((5, 6, 7), 20)
    assert bench.engine.snapshot().failure["read_error"] == 1


def test_a_step_that_fails_fails_only_the_requests_that_fail_alone(make: Make) -> None:
    bench = make()
    bad = bench.model.greedy((5, 6, 7), 3)[-1]  # a token that only the first of them decodes
    assert bad not in bench.model.greedy((5, 6, 8), 30)
    bench.model.fault = lambda batch: (
        ReadError("model.bin", 0, 1, "gone") if batch.kind == "decode" and bad in batch.token_ids.tolist() else None
    )
    gate = bench.stop_at()
    clients = [bench.client(str(i), (5, 6, i), max_tokens=30) for i in (7, 8)]
    gate.opened.set()
    assert [c.end().finish_reason for c in clients] == [FinishReason.ERROR, FinishReason.LENGTH]
    assert clients[1].tokens == bench.model.greedy((5, 6, 8), 30)
    assert any(len(b.sequences) == 2 for b in bench.model.batches)
    bench.model.fault = lambda batch: ReadError("model.bin", 0, 1, "gone")
    gate = bench.stop_at()
    clients = [bench.client(n) for n in "ab"]
    gate.opened.set()
    assert [c.end().finish_reason for c in clients] == [FinishReason.ERROR] * 2
    bench.model.fault = lambda batch: None
    assert bench.client("c").end().finish_reason is FinishReason.LENGTH


def test_any_other_exception_is_internal_and_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    bench = make()
    bench.model.fault = lambda batch: ZeroDivisionError("secret") if batch.kind == "decode" else None
    last = bench.client("a").end()
    assert last.finish_reason is FinishReason.ERROR and last.error is not None
    assert "ZeroDivisionError" in last.error and "secret" not in last.error and "secret" in caplog.text
    bench.model.fault = lambda batch: None
    assert bench.client("b").end().finish_reason is FinishReason.LENGTH
    snapshot = bench.engine.snapshot()
    assert snapshot.failure["internal"] == 1 and snapshot.success["length"] == 1


def test_a_row_that_cannot_be_sampled_fails_alone(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    bench = make()
    good, bad = (5, 6, 7), (13, 14)
    bench.model.table[(sum(bad) * 31 + 2) % 997] = float("nan")
    clients = [bench.client("a", good, max_tokens=9), bench.client("b", bad)]
    assert clients[1].end().finish_reason is FinishReason.ERROR
    assert clients[0].end().finish_reason is FinishReason.LENGTH and "not numbers" in caplog.text


# -- life and numbers ------------------------------------------------------------------------------------------------


def test_requests_are_taken_between_start_and_shutdown_only() -> None:
    bench = Bench()
    with pytest.raises(EngineStoppedError, match="not started"):
        bench.client("a")
    bench.engine.start()
    bench.client("a").end()
    bench.engine.shutdown(0)
    with pytest.raises(EngineStoppedError, match="draining or stopped"):
        bench.client("b")
    bench.engine.shutdown(0)  # twice is once
    assert bench.engine.snapshot().failure["stopped"] == 2
    Bench().engine.shutdown(0)  # never started


def test_an_idle_engine_sleeps_and_wakes(make: Make) -> None:
    bench = make()
    for i in range(3):
        bench.client(str(i)).end()
    assert len(bench.model.batches) == 3 * 4  # one prefill and three decode steps each, nothing in between


def test_shutdown_drains(make: Make) -> None:
    bench = make(max_num_seqs=2)
    gate = bench.stop_at()
    clients = [bench.client(str(i), max_tokens=8) for i in range(5)]
    assert gate.entered.wait(WAIT_S)
    stopper = threading.Thread(target=bench.engine.shutdown, args=(WAIT_S,))
    stopper.start()
    bench.wait_until_stopped()
    gate.opened.set()
    stopper.join(WAIT_S)
    assert not stopper.is_alive()
    assert [c.end().finish_reason for c in clients] == [FinishReason.LENGTH] * 5


def test_shutdown_cuts_at_its_deadline_within_one_layer(make: Make) -> None:
    bench = make(max_num_seqs=1)
    gate = bench.stop_at(layer=1)
    clients = [bench.client(str(i), (4,) * 100, max_tokens=100) for i in range(2)]
    assert gate.entered.wait(WAIT_S)
    stopper = threading.Thread(target=bench.engine.shutdown, args=(0.0,))
    stopper.start()
    bench.wait_until_stopped()
    gate.opened.set()
    stopper.join(WAIT_S)
    assert [c.end().finish_reason for c in clients] == [FinishReason.ERROR] * 2
    assert "shut down" in (clients[0].end().error or "") and bench.model.layers_run == 1
    assert bench.engine.snapshot().failure["shutdown"] == 2


def test_counters_add_up(make: Make) -> None:
    bench = make(max_num_seqs=3)
    before = bench.engine.snapshot()
    clients = [bench.client(str(i), (3,) * (1 + 5 * i), max_tokens=5 + i) for i in range(6)]
    ends = [c.end() for c in clients]
    spent = bench.engine.snapshot() - before
    accounts = [e.account for e in ends if e.account is not None]
    assert len(accounts) == 6
    assert spent.prompt_tokens == sum(1 + 5 * i for i in range(6))
    assert spent.generation_tokens == sum(len(c.tokens) for c in clients) == sum(5 + i for i in range(6))
    assert spent.success == {"stop": 0, "length": 6} and sum(spent.failure.values()) == 0
    assert sum(spent.time_to_first_token.counts) == sum(spent.queue_time.counts) == 6
    assert sum(spent.inter_token_latency.counts) == spent.generation_tokens - 6
    assert sum(spent.e2e_request_latency.counts) == 6
    assert sum(a.bytes_read["disk"] for a in accounts) == spent.cache.transfers["disk", "cpu"].bytes > 0
    assert sum(a.cache_lookups for a in accounts) == spent.cache.tiers["cpu"].lookups > 0
    assert sum(a.cache_hits for a in accounts) == spent.cache.tiers["cpu"].hits > 0
    assert sum(a.stall_s for a in accounts) == pytest.approx(spent.cache.transfers["disk", "cpu"].stall_seconds)
    assert all(a.prefill_s > 0 and a.decode_s > 0 and a.queue_s >= 0 for a in accounts)


def test_requests_are_charged_for_the_tier_that_computes(make: Make) -> None:
    bench = make()

    def snapshot() -> CacheSnapshot:
        tier = bench.model.tier
        return CacheSnapshot({"gpu": tier, "cpu": TierSnapshot(lookups=tier.misses, hits=tier.misses // 2)})

    bench.engine._cache_snapshot = snapshot
    account = bench.client("a").end().account
    assert account is not None
    assert (account.cache_lookups, account.cache_hits) == (bench.model.tier.lookups, bench.model.tier.hits)


def test_threads_that_submit_and_abort_at_odds_lose_nothing(make: Make) -> None:
    bench = make(max_num_seqs=3, kv_blocks=24)
    ends: list[FinishReason | None] = []

    def use(worker: int) -> None:
        for i in range(12):
            client = bench.client(f"{worker}-{i}", (3,) * (1 + 7 * worker), max_tokens=1 + 3 * i)
            if i % 3 == worker % 3:
                bench.engine.abort(client.request.request_id)
            ends.append(client.end().finish_reason)
            bench.engine.snapshot()

    workers = [threading.Thread(target=use, args=(w,)) for w in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT_S)
    snapshot = bench.engine.snapshot()
    assert len(ends) == 72 and set(ends) <= {FinishReason.LENGTH, FinishReason.ABORT}
    assert ends.count(FinishReason.LENGTH) == snapshot.success["length"] >= 48
    assert ends.count(FinishReason.ABORT) == snapshot.failure["cancelled"] == sum(snapshot.failure.values())


def test_the_snapshot_carries_the_levels_below(make: Make) -> None:
    snapshot = make().engine.snapshot()
    assert snapshot.memory_budget_bytes == {"cpu": 100} and snapshot.memory_used_bytes == {("cpu", "kv"): 40}
    assert (snapshot.steps, snapshot.active_neurons, snapshot.predicted_neurons, snapshot.overflow) == (
        {"decode": 0},
        1,
        2,
        3,
    )


def test_a_config_that_is_not_the_caches_is_refused() -> None:
    model = FakeModel()
    config = EngineConfig(max_model_len=8, max_num_seqs=1, kv_blocks=4, block_size=BLOCK)
    with pytest.raises(ValueError, match="kv_blocks 4"):
        Engine(model, KVCache(CONFIG, 5, BLOCK), config, model.cache_snapshot)
