"""What the engine counts, and the one snapshot of it. Knows requests and seconds, not tensors and not HTTP.

Counters are written by the engine's thread, and by submitting threads for what is refused; one lock guards them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cache.stats import CacheSnapshot, Histogram, HistogramSnapshot, Subtractable
from runtime.audit import AuditSnapshot
from runtime.request import FinishReason

LATENCY_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)  # seconds: a token can take one millisecond or minutes


class FailureReason(StrEnum):
    """Why a request had no success. The first three never entered the queue."""

    QUEUE_FULL = "queue_full"
    CONTEXT_LENGTH = "context_length"
    STOPPED = "stopped"
    WAIT_LIMIT = "wait_limit"  # no place or no KV for too long
    CANCELLED = "cancelled"  # by its consumer
    READ_ERROR = "read_error"
    INTERNAL = "internal"
    SHUTDOWN = "shutdown"  # cut at the end of the drain time


@dataclass(frozen=True, slots=True)
class MemoryLevels:
    """The plan's memory: budget by tier, use by (tier, use). Levels, fixed at load."""

    budget_bytes: Mapping[str, int] = field(default_factory=dict)
    used_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineSnapshot(Subtractable):
    """Everything that the engine and what is below it count, at one moment.

    Requests that are running or waiting and bytes that are in use or idle are levels: a difference holds their change.
    """

    cache: CacheSnapshot
    steps: dict[str, int]  # by kind: sparse, dense, prefill
    active_neurons: int
    predicted_neurons: int
    overflow: int
    switched: int  # layers of sparse steps that were streamed because that was quicker
    audit: AuditSnapshot
    kv_used_bytes: int  # held by requests
    prefix_cache_idle_bytes: int  # kept in case that a prompt comes again, held by none
    prefix_cache_lookup_tokens: int  # of the prompts that were admitted
    prefix_cache_hit_tokens: int  # of those, what need not be computed
    prefix_cache_restored_tokens: int  # of those, what came from disk
    num_requests_running: int
    num_requests_waiting: int
    prompt_tokens: int
    generation_tokens: int
    success: dict[str, int]  # by finish reason: stop, length
    failure: dict[str, int]  # by FailureReason
    time_to_first_token: HistogramSnapshot  # seconds, as the others; all requests that had a token
    inter_token_latency: HistogramSnapshot
    e2e_request_latency: HistogramSnapshot  # successes only
    queue_time: HistogramSnapshot  # all requests that were admitted
    memory_budget_bytes: dict[str, int]  # by tier
    memory_used_bytes: dict[tuple[str, str], int]  # by (tier, use)


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """The part of a snapshot that this module counts itself."""

    prompt_tokens: int
    generation_tokens: int
    success: dict[str, int]
    failure: dict[str, int]
    time_to_first_token: HistogramSnapshot
    inter_token_latency: HistogramSnapshot
    e2e_request_latency: HistogramSnapshot
    queue_time: HistogramSnapshot


class EngineStats:
    """Plain counters behind one lock. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompt_tokens = self._generation_tokens = 0
        self._success: Counter[str] = Counter({FinishReason.STOP.value: 0, FinishReason.LENGTH.value: 0})
        self._failure: Counter[str] = Counter({reason.value: 0 for reason in FailureReason})
        self._first_token = Histogram(LATENCY_BOUNDS)
        self._inter_token = Histogram(LATENCY_BOUNDS)
        self._e2e = Histogram(LATENCY_BOUNDS)
        self._queue = Histogram(LATENCY_BOUNDS)

    def admitted(self, queue_s: float) -> None:
        with self._lock:
            self._queue.observe(queue_s)

    def prompt_processed(self, num_tokens: int) -> None:
        with self._lock:
            self._prompt_tokens += num_tokens

    def token(self, seconds: float, first: bool) -> None:
        """One token was generated, `seconds` after the last one or, the first, after the request arrived."""
        with self._lock:
            self._generation_tokens += 1
            (self._first_token if first else self._inter_token).observe(seconds)

    def succeeded(self, reason: FinishReason, seconds: float) -> None:
        with self._lock:
            self._success[reason.value] += 1
            self._e2e.observe(seconds)

    def failed(self, reason: FailureReason) -> None:
        with self._lock:
            self._failure[reason.value] += 1

    def totals(self) -> RequestTotals:
        with self._lock:
            return RequestTotals(
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
                success=dict(self._success),
                failure=dict(self._failure),
                time_to_first_token=self._first_token.snapshot(),
                inter_token_latency=self._inter_token.snapshot(),
                e2e_request_latency=self._e2e.snapshot(),
                queue_time=self._queue.snapshot(),
            )
