"""What crosses the engine's border: plain, picklable messages. Knows tokens, not text and not HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, or the consumer found a stop string
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy. The server validates ranges; the engine trusts them."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None  # None: not asked; 0: only the chosen token's
    prompt_logprobs: int | None = None  # as above, for the prompt's own tokens (echo); scored with the sparse semantics
    json_schema: str | None = None  # JSON text of a schema that the answer has to fit


@dataclass(frozen=True, slots=True)
class Request:
    """group: what requests that belong together have in common; while one of them runs, none is given up waiting."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    group: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token and of its likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestAccount:
    """What one request cost. Reads of a batch are divided evenly over the requests in it."""

    bytes_read: Mapping[str, int] = field(default_factory=dict)  # by source tier
    cache_lookups: int = 0
    cache_hits: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    stall_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One thing that happened to a request, in order: progress of prefill, a token, the end.

    The last event has `finish_reason` and `account`; it may carry a token too (an end token is carried, so that it is
    counted; its text is empty). When the reason is ERROR, `error` is a sentence for the user, and `failure` one of
    `engine_stats.FailureReason`.
    """

    request_id: str
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = (
        None  # once, before the first token; the first entry is None
    )
    prompt_tokens_done: int = 0
    finish_reason: FinishReason | None = None
    account: RequestAccount | None = None
    error: str | None = None
    failure: str | None = None
