"""A stand-in for `runtime.engine.Engine`, without a model: it says a script, token by token, from a thread of its own.

Has the engine's face (submit, abort, snapshot) and its manners: events come from another thread, in order, the last one
with a reason and an account. Tests can hold it between two tokens (`gate`) and wait until it has seen an abort.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from cache.errors import ColdstreamError, ContextLengthError, QueueFullError, RequestError
from cache.stats import CacheSnapshot, Histogram, TierSnapshot, TransferSnapshot
from runtime.audit import AuditSnapshot
from runtime.engine_stats import LATENCY_BOUNDS, EngineSnapshot
from runtime.request import FinishReason, Request, RequestAccount, TokenEvent, TokenLogprob
from runtime.tokenizer import Tokenizer

OnEvent = Callable[[TokenEvent], None]

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ACCOUNT = RequestAccount({"disk": 4096}, cache_lookups=10, cache_hits=7, stall_s=0.5, prefill_s=0.25, decode_s=1.0)


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """One token a byte (so that characters and stop strings span tokens), `<s>` and `</s>`. `template` for chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return Tokenizer(inner, BOS, (256 + 1,), template)


@dataclass
class FakeEngine:
    """Says `script` to every request, then the end token, unless a test fills `scripts` by prompt.

    fail_after: raise an error after so many tokens. max_live: more requests are refused. gate: when set, one permit is
    taken before every token, so that a test decides when the next one comes.
    """

    tokenizer: Tokenizer
    script: str = "Hello, world"
    scripts: dict[str, str] = field(default_factory=dict)
    max_model_len: int = 256
    max_live: int = 64
    fail_after: int | None = None
    prefill_chunk: int = 1000
    gate: threading.Semaphore | None = None

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.aborts: list[tuple[str, FinishReason]] = []
        self.aborted = threading.Event()
        self.waiting = threading.Event()  # set while a request waits at the gate
        self.success: Counter[str] = Counter(stop=0, length=0)
        self.failure: Counter[str] = Counter(cancelled=0, read_error=0)
        self.generated = self.prompted = self.snapshots = 0
        self._first = Histogram(LATENCY_BOUNDS)
        self._live: dict[str, FinishReason | None] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    # --- the face of the engine ---

    @property
    def capacity(self) -> int:
        return self.max_live

    def submit(self, request: Request, on_event: OnEvent) -> None:
        wanted = len(request.prompt_ids) + request.params.max_tokens
        if not request.prompt_ids:
            raise RequestError("The prompt holds no tokens.")
        if wanted > self.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {wanted}."
            )
        with self._lock:
            if len(self._live) >= self.max_live:
                self.failure["queue_full"] += 1
                raise QueueFullError("The queue is full.")
            self._live[request.request_id] = None
            self.requests.append(request)
        thread = threading.Thread(target=self._run, args=(request, on_event), daemon=True)
        self._threads.append(thread)
        thread.start()

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        with self._lock:
            if request_id not in self._live:
                return
            self._live[request_id] = self._live[request_id] or reason
            self.aborts.append((request_id, reason))
        self.aborted.set()
        if self.gate is not None:
            self.gate.release()

    def snapshot(self) -> EngineSnapshot:
        self.snapshots += 1
        with self._lock:
            return EngineSnapshot(
                cache=fake_cache_snapshot(),
                steps={"sparse": self.generated, "dense": 0, "prefill": len(self.requests)},
                active_neurons=11,
                predicted_neurons=13,
                overflow=2,
                switched=5,
                audit=AuditSnapshot(tokens=3, true_positive=40, false_negative=2),
                kv_used_bytes=4096,
                prefix_cache_idle_bytes=2048,
                prefix_cache_lookup_tokens=100,
                prefix_cache_hit_tokens=60,
                prefix_cache_restored_tokens=20,
                num_requests_running=len(self._live),
                num_requests_waiting=0,
                prompt_tokens=self.prompted,
                generation_tokens=self.generated,
                success=dict(self.success),
                failure=dict(self.failure),
                time_to_first_token=self._first.snapshot(),
                inter_token_latency=Histogram(LATENCY_BOUNDS).snapshot(),
                e2e_request_latency=Histogram(LATENCY_BOUNDS).snapshot(),
                queue_time=Histogram(LATENCY_BOUNDS).snapshot(),
                memory_budget_bytes={"cpu": 1 << 30},
                memory_used_bytes={("cpu", "kv"): 1024, ("cpu", "slots"): 2048},
            )

    def join(self) -> None:
        """Waits for every request to be over. AssertionError when one is not."""
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    @property
    def num_live(self) -> int:
        with self._lock:
            return len(self._live)

    # --- one request ---

    def _run(self, request: Request, on_event: OnEvent) -> None:
        try:
            last = self._speak(request, on_event)
        except ColdstreamError as error:
            last = TokenEvent(
                request.request_id, finish_reason=FinishReason.ERROR, error=str(error), failure="read_error"
            )
        assert last.finish_reason is not None
        with self._lock:
            del self._live[request.request_id]
            if last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                self.success[last.finish_reason] += 1
            else:
                self.failure["cancelled" if last.finish_reason is FinishReason.ABORT else "read_error"] += 1
        on_event(replace(last, account=ACCOUNT))

    def _speak(self, request: Request, on_event: OnEvent) -> TokenEvent:
        """Sends all events but the last, and returns that one."""
        name, params = request.request_id, request.params
        for done in range(self.prefill_chunk, len(request.prompt_ids), self.prefill_chunk):
            on_event(TokenEvent(name, prompt_tokens_done=done))
        scored = self._scored(request)
        with self._lock:
            self.prompted += len(request.prompt_ids)
        if params.max_tokens == 0:
            return TokenEvent(name, prompt_logprobs=scored, finish_reason=FinishReason.LENGTH)
        if scored is not None:
            on_event(TokenEvent(name, prompt_logprobs=scored, prompt_tokens_done=len(request.prompt_ids)))
        ids = self._script_ids(request)
        for count, token_id in enumerate(ids, 1):
            reason = self._wait(name)
            if reason is not None:
                return TokenEvent(name, finish_reason=reason)
            if self.fail_after is not None and count > self.fail_after:
                raise ColdstreamError("/model/ffn.bin: reading 4096 bytes at offset 0 failed: EIO")
            event = TokenEvent(name, token_id, self._logprob(token_id, params.num_logprobs))
            self._count(count == 1)
            if token_id in self.tokenizer.eos_ids and not params.ignore_eos:
                return replace(event, finish_reason=FinishReason.STOP)
            if count == params.max_tokens:
                return replace(event, finish_reason=FinishReason.LENGTH)
            on_event(event)
        raise AssertionError("the script is endless")

    def _script_ids(self, request: Request) -> Sequence[int]:
        """The script's tokens and the end token, over and over."""
        prompt = self.tokenizer.decode(request.prompt_ids)
        ids = self.tokenizer.encode(self.scripts.get(prompt, self.script), add_special=False)
        return (ids + list(self.tokenizer.eos_ids)) * max(1, request.params.max_tokens)

    def _wait(self, name: str) -> FinishReason | None:
        """Waits at the gate; the reason to end, when somebody has aborted."""
        if self.gate is not None:
            self.waiting.set()
            assert self.gate.acquire(timeout=30)
        with self._lock:
            return self._live[name]

    def _count(self, first: bool) -> None:
        with self._lock:
            self.generated += 1
            if first:
                self._first.observe(0.02)

    def _scored(self, request: Request) -> tuple[TokenLogprob | None, ...] | None:
        top = request.params.prompt_logprobs
        if top is None:
            return None
        return (None, *(self._known(token_id, top) for token_id in request.prompt_ids[1:]))

    def _logprob(self, token_id: int, top: int | None) -> TokenLogprob | None:
        return None if top is None else self._known(token_id, top)

    def _known(self, token_id: int, top: int) -> TokenLogprob:
        """-id/100; the likeliest tokens are 0, 1, 2 and so on."""
        return TokenLogprob(token_id, -token_id / 100, tuple((i, -0.5 - i) for i in range(top)))


def fake_cache_snapshot() -> CacheSnapshot:
    """Numbers that fit together: hits + misses = lookups."""
    sizes = Histogram((4096.0, 8192.0))
    sizes.observe(4096, 3)
    sizes.observe(100_000)
    return CacheSnapshot(
        tiers={"cpu": TierSnapshot(100, 70, 30, 25, 20, 1 << 20, 1 << 19)},
        transfers={("disk", "cpu"): TransferSnapshot(112_288, 90_000, 4, 0.75, 0.5)},
        read_sizes={"disk": sizes.snapshot()},
    )
