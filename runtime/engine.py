"""The engine: one thread that owns the model. Requests go in, token events come out.

Knows tokens, steps and time; knows neither text nor HTTP, and not where weights live. All that crosses its border is
plain data (runtime/request.py), so that the thread can become a process. Commands arrive through one queue, which is
looked at before every layer of every step: a cancelled prefill stops within a layer. The thread sleeps when idle.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from cache.errors import (
    ColdstreamError,
    ContextLengthError,
    DeviceLostError,
    EngineStoppedError,
    QueueFullError,
    ReadError,
    RequestError,
)
from cache.stats import CacheSnapshot, TierSnapshot
from runtime.audit import Auditor, AuditSnapshot
from runtime.batch import Batch, Cancelled, ModelCounters
from runtime.config import ModelConfig
from runtime.constraint import ConstraintCompiler
from runtime.engine_stats import EngineSnapshot, EngineStats, FailureReason, MemoryLevels
from runtime.kv_cache import BlockManager, KVCache
from runtime.pace import Pace
from runtime.prefix_cache import Backing, PrefixCache
from runtime.request import FinishReason, Request, RequestAccount, TokenEvent, TokenLogprob
from runtime.sampler import Sampler, score_rows
from runtime.scheduler import Account, PromptChunk, Scheduler, Sequence, Step, make_batches, projected_tokens

__all__ = ["Engine", "EngineConfig", "EngineSnapshot", "MemoryLevels", "Model"]

logger = logging.getLogger(__name__)

PREFILL_CHUNK = 64  # tokens: a bf16 GEMM of so many rows is near its best; shorter chunks are found again more often
_AUDIT_EVERY = 64  # steps between audits while there is work
_SHUT_DOWN = "The server was shut down before this request was finished."


class Model(Protocol):
    """What the engine needs of a model. `counters` may be called from any thread."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def counters(self) -> Callable[[], ModelCounters]: ...

    def forward_together(
        self, batches: list[Batch], kv: KVCache, check: Callable[[], None]
    ) -> list[torch.Tensor | None]:
        """For each batch, fp32 logits of the rows that `batch.logits` names: the same as if it ran alone.

        A batch sees the keys and values of those before it. Calls `check` between layers; it may raise Cancelled.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits. max_queue: requests that may wait beyond the max_num_seqs that may run.

    prefill_chunk: tokens of a prompt that are computed as one, and with `prefix_cache` shared as one; prefill_rows: of
    all prompts in a step. max_wait_s: seconds that a request may wait for a place and KV; None: as long as it takes.
    """

    max_model_len: int
    max_num_seqs: int
    kv_blocks: int
    max_queue: int = 64
    max_wait_s: float | None = None
    prefill_chunk: int = PREFILL_CHUNK
    prefill_rows: int = 512
    prefix_cache: bool = True
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    reason: FinishReason


class Engine:
    """Serves requests of one model, several at a time.

    Requests fail alone: what goes wrong in a step ends the requests of that step with an ERROR event, and the engine
    lives on. ValueError when config and `kv` do not agree.
    """

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        config: EngineConfig,
        cache_snapshot: Callable[[], CacheSnapshot],
        memory: MemoryLevels | None = None,
        auditor: Auditor | None = None,
        constraints: ConstraintCompiler | None = None,
        prefix_backing: Backing | None = None,
    ) -> None:
        if (kv.num_blocks, kv.block_size) != (config.kv_blocks, config.block_size):
            raise ValueError(
                f"kv_blocks {config.kv_blocks} x block_size {config.block_size} is not the KV cache's "
                f"{kv.num_blocks} x {kv.block_size}"
            )
        self._model, self._config = model, config
        self.kv = kv
        self._cache_snapshot = cache_snapshot
        self._memory = memory or MemoryLevels()
        self._auditor = auditor
        self._constraints = constraints
        self._steps_since_audit = 0
        self._blocks = BlockManager(kv.num_blocks, kv.block_size)
        chunk = config.prefill_chunk
        self._prefix = PrefixCache(self._blocks, chunk, prefix_backing) if config.prefix_cache else None
        self._scheduler = Scheduler(self._blocks, config.max_num_seqs, config.prefill_chunk, self._prefix)
        self._pace = Pace(config.prefill_chunk, config.prefill_rows)
        self._stats = EngineStats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._on_failure: Callable[[], None] | None = None
        self._step_now: Step | None = None
        # shared with other threads, under _wake:
        self._wake = threading.Condition()
        self._inbox: deque[Sequence | _Abort] = deque()
        self._live: dict[str, Sequence] = {}
        self._accepting = False
        self._deadline_s: float | None = None  # once set: the thread ends when done, at that time at the latest

    # -- any thread -------------------------------------------------------------------------------------------------

    def start(self, on_failure: Callable[[], None] | None = None) -> None:
        """Starts the thread; requests are taken from now on. RuntimeError when called twice.

        on_failure: called by the thread, once, if it ends because of an error of its own; nothing is served after that.
        """
        self._on_failure = on_failure
        with self._wake:
            self._thread.start()
            self._accepting = True

    @property
    def capacity(self) -> int:
        """Requests that run or wait at once, at most."""
        return self._config.max_num_seqs + self._config.max_queue

    def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> None:
        """Queues a request. `on_event` is called from the engine's thread, in order, and must not block.

        Raises QueueFullError, ContextLengthError, EngineStoppedError, or RequestError for what makes no sense.
        """
        self._check_request(request)
        sampler = Sampler(request.params, request.prompt_ids, self._model.config.vocab_size, self._constraints)
        now_s = time.perf_counter()
        sequence = Sequence(request, on_event, sampler, now_s, now_s)
        with self._wake:
            self._check_open(request.request_id)
            self._live[request.request_id] = sequence
            self._inbox.append(sequence)
            self._wake.notify()

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a request early: within a layer while its prompt is read or it runs alone, else within a step.

        Its last event carries `reason`; STOP is for a consumer that found a stop string, and counts as success.
        A request that is unknown or already over is let be.
        """
        with self._wake:
            if request_id in self._live:
                self._inbox.append(_Abort(request_id, reason))
                self._wake.notify()

    def generate(self, request: Request) -> Iterator[TokenEvent]:
        """The events of one request, as an iterator that blocks; closing it aborts the request. Raises as `submit`."""
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.abort(request.request_id)

    def shutdown(self, drain_timeout_s: float) -> None:
        """Takes no more requests, finishes what it has within `drain_timeout_s`, cuts the rest, and joins the thread.

        What is cut ends with an ERROR event. May be called again, and with a shorter time by another thread.
        """
        deadline_s = time.perf_counter() + drain_timeout_s
        with self._wake:
            self._accepting = False
            self._deadline_s = deadline_s if self._deadline_s is None else min(self._deadline_s, deadline_s)
            self._wake.notify()
            started = self._thread.ident is not None
        if started:
            self._thread.join()

    def snapshot(self) -> EngineSnapshot:
        """All counters now."""
        model, totals = self._model.counters(), self._stats.totals()
        with self._wake:
            running = self._scheduler.num_running
            waiting = max(0, len(self._live) - running)
        return EngineSnapshot(
            cache=self._cache_snapshot(),
            steps=dict(model.steps),
            active_neurons=model.active_neurons,
            predicted_neurons=model.predicted_neurons,
            overflow=model.overflow,
            switched=model.switched,
            audit=AuditSnapshot() if self._auditor is None else self._auditor.snapshot(),
            kv_used_bytes=self._blocks.num_used * self.kv.block_bytes,
            prefix_cache_idle_bytes=self._blocks.num_idle * self.kv.block_bytes,
            prefix_cache_lookup_tokens=0 if self._prefix is None else self._prefix.lookup_tokens,
            prefix_cache_hit_tokens=0 if self._prefix is None else self._prefix.hit_tokens,
            prefix_cache_restored_tokens=0 if self._prefix is None else self._prefix.restored_tokens,
            num_requests_running=running,
            num_requests_waiting=waiting,
            prompt_tokens=totals.prompt_tokens,
            generation_tokens=totals.generation_tokens,
            success=totals.success,
            failure=totals.failure,
            time_to_first_token=totals.time_to_first_token,
            inter_token_latency=totals.inter_token_latency,
            e2e_request_latency=totals.e2e_request_latency,
            queue_time=totals.queue_time,
            memory_budget_bytes=dict(self._memory.budget_bytes),
            memory_used_bytes=dict(self._memory.used_bytes),
        )

    def _check_request(self, request: Request) -> None:
        """What can be said of a request before it is queued."""
        prompt, params, vocab_size = request.prompt_ids, request.params, self._model.config.vocab_size
        if not prompt:
            raise RequestError("The prompt holds no tokens.")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise RequestError(f"The prompt holds a token id outside of 0..{vocab_size - 1}.")
        if any(not 0 <= token_id < vocab_size for token_id in params.logit_bias):
            raise RequestError(f"logit_bias names a token id outside of 0..{vocab_size - 1}.")
        if params.json_schema is not None and self._constraints is None:
            raise RequestError("This engine cannot hold answers to a JSON schema.")
        if params.max_tokens < 0:
            raise RequestError(f"max_tokens is {params.max_tokens}; it must be 0 or more.")
        self._check_length(request)

    def _check_length(self, request: Request) -> None:
        limit = min(self._config.max_model_len, self._blocks.num_blocks * self._blocks.block_size)
        wanted, prompt = projected_tokens(request), len(request.prompt_ids)
        if wanted > limit:
            self._stats.failed(FailureReason.CONTEXT_LENGTH)
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted} tokens "
                f"({prompt} in the prompt, {wanted - prompt} for the completion). Please reduce the length of either."
            )

    def _check_open(self, request_id: str) -> None:
        """Whether the queue takes one more; the caller holds the lock."""
        if not self._accepting:
            self._stats.failed(FailureReason.STOPPED)
            raise EngineStoppedError("The engine does not take requests: it is not started, draining or stopped.")
        if request_id in self._live:
            raise RequestError(f"A request with the id {request_id} is already being served.")
        if len(self._live) >= self.capacity:
            self._stats.failed(FailureReason.QUEUE_FULL)
            raise QueueFullError(
                f"The queue is full: {len(self._live)} requests are running or waiting. Try again later."
            )

    # -- the engine's thread ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        failed: Callable[[], None] | None = None
        try:
            while self._await_work():
                self._step()
        except Exception:
            logger.exception("the engine's thread ends because of an error of its own")
            failed = self._on_failure
        finally:
            self._cut()
        if failed is not None:
            failed()

    def _await_work(self) -> bool:
        """Sleeps until there is something to do, audits done first; False when it is time to end."""
        while self._is_idle() and self._audit():
            pass
        with self._wake:
            while not self._has_work() and self._deadline_s is None:
                self._wake.wait()
            return self._has_work() and not self._past_deadline()

    def _is_idle(self) -> bool:
        with self._wake:
            return not self._has_work() and self._deadline_s is None

    def _audit(self) -> bool:
        """Runs one audit that waits; False when none does. One that fails is logged and forgotten: it serves nobody."""
        if self._auditor is None:
            return False
        self._steps_since_audit = 0
        try:
            return self._auditor.run_one()
        except Exception as error:
            logger.error("an audit failed: %s", error, exc_info=None if isinstance(error, ColdstreamError) else error)
            return True

    def _has_work(self) -> bool:
        return bool(self._inbox) or self._scheduler.num_running + self._scheduler.num_waiting > 0

    def _past_deadline(self) -> bool:
        return self._deadline_s is not None and time.perf_counter() >= self._deadline_s

    def _step(self) -> None:
        """One step: receive commands, admit, schedule, run the model, collect tokens."""
        self._receive()
        self._admit()
        self._expire()
        step = self._scheduler.schedule(self._pace.rows(self._scheduler.num_decoding > 0))
        if step is None:
            return
        with contextlib.suppress(
            Cancelled
        ):  # who asked for it is ended below, at the end of the drain time by the loop
            self._run_step(step)
        for sequence in step.sequences:
            self._end_if_asked(sequence)
        self._steps_since_audit += 1
        if self._steps_since_audit >= _AUDIT_EVERY:  # under constant load there is no idle time
            self._audit()

    def _receive(self) -> None:
        """Takes the commands that have come in. Touches nothing of the step that is running but the `ending` marks."""
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, Sequence):
                self._scheduler.add(command)
                continue
            sequence = self._live.get(command.request_id)
            if sequence is None:
                continue
            sequence.ending = sequence.ending or command.reason
            if self._step_now is None or sequence not in self._step_now.sequences:
                self._end_if_asked(sequence)

    def _admit(self) -> None:
        now_s = time.perf_counter()
        for sequence in self._scheduler.admit():
            sequence.account.queue_s = now_s - sequence.arrived_s
            self._stats.admitted(sequence.account.queue_s)

    def _expire(self) -> None:
        """Gives up what has waited for too long, so that its client may try elsewhere."""
        limit_s = self._config.max_wait_s
        if limit_s is None:
            return
        now_s = time.perf_counter()
        for sequence in self._scheduler.waiting_since_before(now_s - limit_s, now_s):
            message = f"No place was free for this request within {limit_s:g} s. Try again later."
            self._finish(sequence, FinishReason.ERROR, failure=FailureReason.WAIT_LIMIT, error=message)

    def _run_step(self, step: Step) -> None:
        """Runs the model and takes what it gives. A step that fails is tried again by the request: each fails alone."""
        try:
            logits = self._forward(step)
        except Cancelled:
            raise
        except DeviceLostError as error:  # nobody else would fare better: the thread ends
            self._fail(step.sequences, error)
            raise
        except Exception as error:
            alone = list(step.split())
            if len(alone) == 1:
                self._fail(step.sequences, error)
                return
            for part in alone:
                self._run_step(part)
            return
        try:
            self._collect(step, logits)
        except Exception as error:
            self._fail(step.sequences, error)

    def _forward(self, step: Step) -> list[torch.Tensor | None]:
        """Runs the model and charges the step's requests for it, whatever came of it."""
        before, start_s = self._cache_snapshot(), time.perf_counter()
        self._step_now = step
        try:
            return self._model.forward_together(make_batches(step), self.kv, self._check)
        finally:
            self._step_now = None
            spent, seconds = self._cache_snapshot() - before, time.perf_counter() - start_s
            charge(step, spent, seconds)
            if step.chunks:
                self._pace.observe(step.num_prompt_rows, seconds, stall_seconds(spent))

    def _check(self) -> None:
        """Called by the model between layers. Raises Cancelled when nobody waits for this step any more."""
        self._receive()
        step = self._step_now
        if self._past_deadline() or (step is not None and all(s.ending is not None for s in step.sequences)):
            raise Cancelled

    def _collect(self, step: Step, logits: list[torch.Tensor | None]) -> None:
        """What a step that went well has given: prompt log-probabilities, progress, tokens."""
        last: dict[Sequence, torch.Tensor | None] = {}
        for chunk, rows in zip(step.chunks, logits[: len(step.chunks)], strict=True):
            if chunk.sequence.scored:
                self._score(chunk, _wanted(rows))
            self._scheduler.computed(chunk)
            last[chunk.sequence] = rows
        for sequence, rows in last.items():
            self._collect_prompt(sequence, rows)
        if step.decoding:
            for sequence, row in zip(step.decoding, _wanted(logits[-1]), strict=True):
                sequence.num_computed += 1
                self._take_token(sequence, row)

    def _collect_prompt(self, sequence: Sequence, logits: torch.Tensor | None) -> None:
        """After the chunks of one prompt; `logits` are those of the last."""
        self._stats.prompt_processed(sequence.num_computed - sequence.num_counted)
        sequence.num_counted = sequence.num_computed
        self._prompt_progress(sequence)
        if not sequence.prefilling and sequence.request.params.max_tokens > 0:
            self._take_token(sequence, _wanted(logits)[-1])

    def _score(self, chunk: PromptChunk, logits: torch.Tensor) -> None:
        """Keeps the log-probabilities of the prompt's tokens that rows `logits` [length, V] predict."""
        sequence = chunk.sequence
        targets = sequence.request.prompt_ids[chunk.start + 1 : chunk.stop + 1]  # the last row's is not the prompt's
        num_top = sequence.request.params.prompt_logprobs or 0
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)  # nothing predicts the first token
        if targets:
            sequence.prompt_logprobs += score_rows(logits[: len(targets)], targets, num_top)

    def _prompt_progress(self, sequence: Sequence) -> None:
        if sequence.ending is not None:
            return
        if not sequence.prefilling and sequence.request.params.max_tokens == 0:
            self._finish(sequence, FinishReason.LENGTH)
        elif sequence.prefilling or sequence.scored:
            self._emit(
                sequence,
                TokenEvent(
                    sequence.request.request_id,
                    prompt_logprobs=self._scored_prompt(sequence),
                    prompt_tokens_done=sequence.num_computed,
                ),
            )

    def _scored_prompt(self, sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
        return tuple(sequence.prompt_logprobs) if sequence.scored and not sequence.prefilling else None

    def _take_token(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Samples from logits [V]; a row that cannot be sampled fails alone."""
        if sequence.ending is not None:
            return
        try:
            token_id, logprob = sequence.sampler.sample(logits)
        except Exception as error:
            self._fail((sequence,), error)
            return
        self._count_token(sequence, token_id)
        reason = self._reason_to_end(sequence)
        if reason is not None:
            self._finish(sequence, reason, token_id=token_id, logprob=logprob)
            return
        done = sequence.num_prompt
        self._emit(sequence, TokenEvent(sequence.request.request_id, token_id, logprob, prompt_tokens_done=done))

    def _count_token(self, sequence: Sequence, token_id: int) -> None:
        now_s, first = time.perf_counter(), sequence.num_generated == 0
        self._stats.token(now_s - (sequence.arrived_s if first else sequence.last_token_s), first)
        sequence.last_token, sequence.last_token_s = token_id, now_s
        sequence.num_generated += 1

    def _reason_to_end(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.request.params
        is_end = not params.ignore_eos and sequence.last_token in self._model.config.eos_token_ids
        if is_end or sequence.last_token in params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.num_generated >= params.max_tokens else None

    def _end_if_asked(self, sequence: Sequence) -> None:
        if sequence.ending is not None and self._is_live(sequence):
            self._finish(sequence, sequence.ending)

    def _is_live(self, sequence: Sequence) -> bool:
        return self._live.get(sequence.request.request_id) is sequence

    def _fail(self, sequences: tuple[Sequence, ...], error: Exception) -> None:
        """Ends requests because of an error: its sentence when it has one for users, else a traceback in the log."""
        message = str(error)
        if not isinstance(error, ColdstreamError):
            logger.error("a step failed", exc_info=error)
            message = f"The engine failed on this request ({type(error).__name__}); the server's log has the details."
        reason = FailureReason.READ_ERROR if isinstance(error, ReadError) else FailureReason.INTERNAL
        for sequence in sequences:
            if self._is_live(sequence):
                self._finish(sequence, FinishReason.ERROR, failure=reason, error=message)

    def _cut(self) -> None:
        """The end of the thread: no more requests, and those that are left fail."""
        with self._wake:
            self._accepting = False
        self._receive()
        for sequence in list(self._live.values()):
            self._finish(sequence, FinishReason.ERROR, failure=FailureReason.SHUTDOWN, error=_SHUT_DOWN)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_id: int | None = None,
        logprob: TokenLogprob | None = None,
        failure: FailureReason = FailureReason.CANCELLED,
        error: str | None = None,
    ) -> None:
        """Frees what the request holds, counts it, and only then says so: who sees the last event sees it done."""
        with self._wake:
            self._scheduler.remove(sequence)
            del self._live[sequence.request.request_id]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._stats.succeeded(reason, time.perf_counter() - sequence.arrived_s)
        else:
            self._stats.failed(failure)
        scored = self._scored_prompt(sequence) if sequence.request.params.max_tokens == 0 else None
        self._emit(
            sequence,
            TokenEvent(
                sequence.request.request_id,
                token_id,
                logprob,
                prompt_logprobs=scored,
                prompt_tokens_done=min(sequence.num_computed, sequence.num_prompt),
                finish_reason=reason,
                account=RequestAccount(**asdict(sequence.account)),
                error=error,
                failure=failure.value if reason is FinishReason.ERROR else None,
            ),
        )

    def _emit(self, sequence: Sequence, event: TokenEvent) -> None:
        """Hands an event over; a consumer that fails is a consumer that is gone."""
        try:
            sequence.on_event(event)
        except Exception:
            logger.exception("the consumer of request %s failed", sequence.request.request_id)
            sequence.ending = sequence.ending or FinishReason.ABORT


def charge(step: Step, spent: CacheSnapshot, seconds: float) -> None:
    """Adds what a step cost to its requests: counts divided evenly without loss, seconds whole.

    The remainder of a division goes to the first requests of the step, so that accounts add up to the counters.
    """
    for sequence in step.prompts:
        sequence.account.prefill_s += seconds
    for sequence in step.decoding:
        sequence.account.decode_s += seconds
    accounts = [s.account for s in step.sequences]
    for account in accounts:
        account.stall_s += stall_seconds(spent) / len(accounts)
    for (source, _), transfer in spent.transfers.items():
        for account, share in _shares(accounts, transfer.bytes):
            account.bytes_read[source] = account.bytes_read.get(source, 0) + share
    tier = spent.tiers.get(spent.fastest, TierSnapshot())  # lower ones are asked again for what it lacks
    for account, share in _shares(accounts, tier.lookups):
        account.cache_lookups += share
    for account, share in _shares(accounts, tier.hits):
        account.cache_hits += share


def stall_seconds(spent: CacheSnapshot) -> float:
    return sum(t.stall_seconds for t in spent.transfers.values())


def _shares(accounts: list[Account], total: int) -> Iterator[tuple[Account, int]]:
    each, rest = divmod(total, len(accounts))
    for i, account in enumerate(accounts):
        yield account, each + (i < rest)


def _wanted(logits: torch.Tensor | None) -> torch.Tensor:
    if logits is None:
        raise RuntimeError("the model gave no logits although the batch asked for them")
    return logits
