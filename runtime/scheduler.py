"""Who runs next: first come, first served, admitted by the KV that a request can need at most.

Knows requests, tokens and blocks; not the model, not threads, not clocks. One thread uses it.
Decoding is never starved: while somebody decodes, a prefill chunk and a decode step take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from runtime.batch import Batch, BatchKind, LogitsKind, SequenceView
from runtime.kv_cache import BlockManager
from runtime.request import FinishReason, Request, TokenEvent, TokenLogprob
from runtime.sampler import Sampler

SCORE_ROWS = 128  # rows of one scoring chunk: their logits [128, V] are all there is in memory


@dataclass(slots=True)
class Account:
    """What a request has cost so far; seconds are wall time of the steps that it was in."""

    bytes_read: dict[str, int] = field(default_factory=dict)  # by source tier
    cache_lookups: int = 0
    cache_hits: int = 0
    stall_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way through the engine. Only the engine's thread changes it."""

    request: Request
    on_event: Callable[[TokenEvent], None]
    sampler: Sampler
    arrived_s: float
    blocks: np.ndarray | None = None  # int32 block table; None while waiting
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_generated: int = 0
    last_token: int = -1
    last_token_s: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    ending: FinishReason | None = None  # asked to end by its consumer
    account: Account = field(default_factory=Account)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def scored(self) -> bool:
        """Whether the prompt's own log-probabilities are wanted: it is then scored instead of prefilled."""
        return self.request.params.prompt_logprobs is not None

    @property
    def prefilling(self) -> bool:
        return self.num_computed < self.num_prompt


@dataclass(frozen=True, slots=True)
class Step:
    """Rows for one run of the model: the next `length` tokens of each of `sequences`."""

    kind: BatchKind
    sequences: tuple[Sequence, ...]
    length: int = 1


def projected_tokens(request: Request) -> int:
    """Tokens that a request can hold at most."""
    return len(request.prompt_ids) + request.params.max_tokens


class Scheduler:
    """Waiting and running sequences and their blocks.

    Chunks of a prompt depend on the request only (`prefill_chunk` tokens, or SCORE_ROWS when it is scored), never on
    who else is there, so that its numbers do not either.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, prefill_chunk: int) -> None:
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._prefilled_last = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def arrived_before(self, time_s: float) -> list[Sequence]:
        """Those that wait since before `time_s`, oldest first."""
        return [sequence for sequence in self._waiting if sequence.arrived_s < time_s]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence.blocks is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._blocks.free(sequence.blocks)
        sequence.blocks = None

    def admit(self) -> list[Sequence]:
        """Moves sequences from waiting to running while there is a place and KV for all they may need; returns those.

        The first in the queue is never overtaken.
        """
        admitted = []
        while self._waiting and len(self._running) < self._max_num_seqs:
            num_tokens = projected_tokens(self._waiting[0].request)
            if not self._blocks.can_allocate(num_tokens):
                break
            sequence = self._waiting.popleft()
            sequence.blocks = self._blocks.allocate(num_tokens)
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    def schedule(self) -> Step | None:
        """The next step, None when nobody runs: the oldest prompt's next chunk, or one token for all who decode."""
        prefilling = next((s for s in self._running if s.prefilling), None)
        decoding = tuple(s for s in self._running if not s.prefilling)
        if prefilling is not None and not (decoding and self._prefilled_last):
            self._prefilled_last = True
            return self._prompt_step(prefilling)
        self._prefilled_last = False
        return Step("decode", decoding) if decoding else None

    def _prompt_step(self, sequence: Sequence) -> Step:
        kind: BatchKind = "score" if sequence.scored else "prefill"
        chunk = SCORE_ROWS if sequence.scored else self._prefill_chunk
        return Step(kind, (sequence,), min(chunk, sequence.num_prompt - sequence.num_computed))


def make_batch(step: Step) -> Batch:
    """The step as the model wants it."""
    views = tuple(_view(s, step.length) for s in step.sequences)
    if step.kind == "decode":
        token_ids = [s.last_token for s in step.sequences]
        positions = [s.num_computed for s in step.sequences]
        return Batch("decode", torch.tensor(token_ids), torch.tensor(positions), views, "last")
    sequence = step.sequences[0]
    start, end = sequence.num_computed, sequence.num_computed + step.length
    token_ids = list(sequence.request.prompt_ids[start:end])
    return Batch(step.kind, torch.tensor(token_ids), torch.arange(start, end), views, _prompt_logits(step))


def _view(sequence: Sequence, length: int) -> SequenceView:
    if sequence.blocks is None:
        raise RuntimeError(f"{sequence.request.request_id} has no blocks: it was not admitted")
    return SequenceView(sequence.blocks, sequence.num_computed, length)


def _prompt_logits(step: Step) -> LogitsKind:
    """All when scoring; else the last row's, and only at the end of a prompt that is to be continued."""
    sequence = step.sequences[0]
    if step.kind == "score":
        return "all"
    ends = sequence.num_computed + step.length == sequence.num_prompt
    return "last" if ends and sequence.request.params.max_tokens > 0 else "none"
