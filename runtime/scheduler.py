"""Who runs next: first come, first served, admitted by the KV that a request can need at most.

Knows requests, tokens, chunks of prompts and blocks; not the model, not threads, not clocks. One thread uses it.
A step takes one token for all who decode, and chunks of as many prompts as its rows allow: the FFN is read once for all
of them. A chunk is what a prompt is computed in: its bounds depend on the request only, never on who else is there or
on how many chunks share a step, so that its numbers do not either, and whoever has the same tokens may have its KV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from runtime.batch import Batch, LogitsKind, SequenceView
from runtime.kv_cache import BlockManager
from runtime.prefix_cache import PrefixCache, chunk_keys
from runtime.request import FinishReason, Request, TokenEvent, TokenLogprob
from runtime.sampler import Sampler

SCORE_ROWS = 128  # rows of one scoring chunk, and of all in a step: their logits [128, V] are all there is in memory


@dataclass(slots=True)
class Account:
    """What a request has cost so far; seconds are wall time of the steps that it was in."""

    bytes_read: dict[str, int] = field(default_factory=dict)  # by source tier
    cache_lookups: int = 0
    cache_hits: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
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
    waits_since_s: float  # later than it arrived where others of its group were served meanwhile
    blocks: np.ndarray | None = None  # int32 block table; None while waiting
    keys: tuple[bytes, ...] = ()  # of the prompt's whole chunks, where they may be shared
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_counted: int = 0  # of the prompt, those that the statistics know of
    last_turn: int = 0  # the step that last took a chunk of the prompt
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
class PromptChunk:
    """Tokens start..start+length-1 of a prompt, computed by one call of everything."""

    sequence: Sequence
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Step:
    """What one run of the model computes: chunks of prompts, those of one prompt in order, and a token for each of
    `decoding`."""

    chunks: tuple[PromptChunk, ...]
    decoding: tuple[Sequence, ...]

    @property
    def prompts(self) -> tuple[Sequence, ...]:
        return tuple(dict.fromkeys(chunk.sequence for chunk in self.chunks))

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.prompts + self.decoding

    @property
    def num_prompt_rows(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def split(self) -> Iterator[Step]:
        """The same, each sequence in a step of its own."""
        for sequence in self.prompts:
            yield Step(tuple(chunk for chunk in self.chunks if chunk.sequence is sequence), ())
        for sequence in self.decoding:
            yield Step((), (sequence,))


def projected_tokens(request: Request) -> int:
    """Tokens that a request can hold at most."""
    return len(request.prompt_ids) + request.params.max_tokens


class Scheduler:
    """Waiting and running sequences and their blocks. `prefix`: where chunks of prompts are shared; None: nowhere."""

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, prefill_chunk: int, prefix: PrefixCache | None = None
    ) -> None:
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._prefix = prefix
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._turn = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        return sum(not s.prefilling for s in self._running)

    def add(self, sequence: Sequence) -> None:
        if self._prefix is not None and not sequence.scored:  # a scored prompt goes by the sparse semantics
            sequence.keys = chunk_keys(sequence.request.prompt_ids, self._prefill_chunk)
        self._waiting.append(sequence)

    def waiting_since_before(self, time_s: float, now_s: float) -> list[Sequence]:
        """Those that have waited since before `time_s`, oldest first. Beside a running one of its own group nobody
        has: its turn comes."""
        served = {s.request.group for s in self._running} - {""}
        for sequence in self._waiting:
            if sequence.request.group in served:
                sequence.waits_since_s = now_s
        return [sequence for sequence in self._waiting if sequence.waits_since_s < time_s]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence.blocks is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._blocks.free(sequence.blocks)
        sequence.blocks = None
        if self._prefix is not None:
            self._prefix.touch(sequence.keys)

    def admit(self) -> list[Sequence]:
        """Moves sequences from waiting to running while there is a place and KV for all they may need; returns those.

        The first in the queue is never overtaken.
        """
        admitted = []
        while self._waiting and len(self._running) < self._max_num_seqs:
            if not self._place(self._waiting[0]):
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _place(self, sequence: Sequence) -> bool:
        """Gives a sequence its blocks: what is shared, and room for all else that it may need, if there is that."""
        found = self._shared_blocks(sequence)
        self._blocks.hold(found)  # first, so that making room does not take them
        num_new = self._blocks.blocks_for(projected_tokens(sequence.request)) - found.size
        if not self._make_room(num_new):
            self._blocks.free(found)
            return False
        sequence.blocks = np.concatenate([found, self._blocks.allocate(num_new * self._blocks.block_size)])
        if self._prefix is not None and not sequence.scored:
            self._prefix.lookup_tokens += sequence.num_prompt
        self._skip(sequence, found.size * self._blocks.block_size)
        self._restore(sequence, sequence.blocks)
        return True

    def _restore(self, sequence: Sequence, blocks: np.ndarray) -> None:
        """Takes the next chunks from where they outlast the process, as far as they are there."""
        for key in self._usable_keys(sequence)[sequence.num_computed // self._prefill_chunk :]:
            first = sequence.num_computed // self._blocks.block_size
            own = blocks[first : first + self._prefill_chunk // self._blocks.block_size]
            if self._prefix is None or self._prefix.find(key) is not None or not self._prefix.restore(key, own):
                return
            self._skip(sequence, self._prefill_chunk)

    def _make_room(self, num_blocks: int) -> bool:
        """Frees kept blocks until `num_blocks` are free; False, and nothing is freed, when they are too few."""
        missing = num_blocks - self._blocks.num_free
        if missing > self._blocks.num_idle:
            return False
        if self._prefix is not None and missing > 0:
            self._prefix.evict(missing)
        return True

    def _shared_blocks(self, sequence: Sequence) -> np.ndarray:
        """Blocks of the longest beginning of the prompt that is in the prefix cache, int32."""
        found = [np.empty(0, np.int32)]
        for key in self._usable_keys(sequence):
            blocks = None if self._prefix is None else self._prefix.find(key)
            if blocks is None:
                break
            found.append(blocks)
        return np.concatenate(found)

    def _usable_keys(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Of the chunks that need not be computed: the last token's has to be, since its logits are wanted."""
        return sequence.keys[: (sequence.num_prompt - 1) // self._prefill_chunk]

    def _skip(self, sequence: Sequence, num_tokens: int) -> None:
        """The next tokens of the prompt are there."""
        sequence.num_computed += num_tokens
        sequence.account.cached_tokens += num_tokens
        if self._prefix is not None:
            self._prefix.hit_tokens += num_tokens

    def schedule(self, max_rows: int) -> Step | None:
        """The next step, None when nobody runs: at most `max_rows` rows of prompts, but one chunk at least."""
        chunks = tuple(self._choose_chunks(max_rows))
        decoding = tuple(s for s in self._running if not s.prefilling)
        return Step(chunks, decoding) if chunks or decoding else None

    def _choose_chunks(self, max_rows: int) -> list[PromptChunk]:
        """A chunk of each prompt, whoever waited longest for one first; what is left goes to the oldest prompts.

        A chunk that another prompt has in this step already is not computed twice: who needs it too comes next time.
        """
        prompts = [s for s in self._running if s.prefilling]
        for sequence in prompts:
            self._adopt(sequence)
        room = _Room(max_rows)
        ahead = {s: self._chunks_of(s) for s in prompts}
        for sequence in sorted(prompts, key=lambda s: s.last_turn):
            room.take(ahead[sequence], at_most=1)
        for sequence in prompts:
            room.take(ahead[sequence])
        self._turn += 1
        for chunk in room.chunks:
            chunk.sequence.last_turn = self._turn
        return room.chunks

    def _chunks_of(self, sequence: Sequence) -> deque[tuple[PromptChunk, bytes | None]]:
        """The chunks still to be computed, and the keys of those that may be shared."""
        size = SCORE_ROWS if sequence.scored else self._prefill_chunk
        out: deque[tuple[PromptChunk, bytes | None]] = deque()
        for start in range(sequence.num_computed, sequence.num_prompt, size):
            index = start // size
            key = sequence.keys[index] if index < len(sequence.keys) else None
            out.append((PromptChunk(sequence, start, min(size, sequence.num_prompt - start)), key))
        return out

    def _adopt(self, sequence: Sequence) -> None:
        """Takes over the next chunks where somebody else has computed them since this sequence was admitted."""
        if self._prefix is None or sequence.blocks is None:
            return
        for key in self._usable_keys(sequence)[sequence.num_computed // self._prefill_chunk :]:
            blocks = self._prefix.find(key)
            if blocks is None:
                return
            self._replace(sequence, sequence.num_computed, blocks)
            self._skip(sequence, self._prefill_chunk)

    def _replace(self, sequence: Sequence, start: int, blocks: np.ndarray) -> None:
        """Shared blocks in place of a sequence's own, from token `start`."""
        if sequence.blocks is None:
            raise RuntimeError(f"{sequence.request.request_id} has no blocks: it was not admitted")
        first = start // self._blocks.block_size
        own = sequence.blocks[first : first + blocks.size]
        self._blocks.hold(blocks)
        self._blocks.free(own)
        own[:] = blocks

    def computed(self, chunk: PromptChunk) -> None:
        """A chunk's keys and values are there; from now on whoever has the same tokens may have them."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.stop
        index = chunk.start // self._prefill_chunk
        if self._prefix is None or sequence.blocks is None or index >= len(sequence.keys):
            return
        key = sequence.keys[index]
        there = self._prefix.find(key)
        if there is not None:
            self._replace(sequence, chunk.start, there)
            return
        first = chunk.start // self._blocks.block_size
        self._prefix.put(key, sequence.blocks[first : first + chunk.length // self._blocks.block_size])


class _Room:
    """The rows that a step still has for prompts."""

    def __init__(self, max_rows: int) -> None:
        self.chunks: list[PromptChunk] = []
        self._rows, self._score_rows = max_rows, SCORE_ROWS
        self._claimed: set[bytes] = set()

    def take(self, ahead: deque[tuple[PromptChunk, bytes | None]], at_most: int | None = None) -> None:
        """Takes chunks from the left of `ahead` while they fit, one at least if the room is empty."""
        while ahead and at_most != 0:
            chunk, key = ahead[0]
            if key in self._claimed or not self._fits(chunk):
                return
            self.chunks.append(chunk)
            ahead.popleft()
            if key is not None:
                self._claimed.add(key)
            self._rows -= chunk.length
            self._score_rows -= chunk.length if chunk.sequence.scored else 0
            at_most = None if at_most is None else at_most - 1

    def _fits(self, chunk: PromptChunk) -> bool:
        if chunk.sequence.scored and chunk.length > self._score_rows:
            return False
        return chunk.length <= self._rows or not self.chunks


def make_batches(step: Step) -> list[Batch]:
    """The step as the model wants it: a batch for each chunk, then one for those who decode."""
    return [*map(_chunk_batch, step.chunks), *_decode_batches(step.decoding)]


def _chunk_batch(chunk: PromptChunk) -> Batch:
    sequence = chunk.sequence
    token_ids = torch.tensor(sequence.request.prompt_ids[chunk.start : chunk.stop])
    positions = torch.arange(chunk.start, chunk.stop)
    views = (_view(sequence, chunk.start, chunk.length),)
    return Batch("score" if sequence.scored else "prefill", token_ids, positions, views, _prompt_logits(chunk))


def _decode_batches(sequences: tuple[Sequence, ...]) -> Iterator[Batch]:
    """One batch, or none."""
    if sequences:
        token_ids = torch.tensor([s.last_token for s in sequences])
        positions = torch.tensor([s.num_computed for s in sequences])
        views = tuple(_view(s, s.num_computed, 1) for s in sequences)
        yield Batch("decode", token_ids, positions, views, "last")


def _view(sequence: Sequence, start: int, length: int) -> SequenceView:
    if sequence.blocks is None:
        raise RuntimeError(f"{sequence.request.request_id} has no blocks: it was not admitted")
    return SequenceView(sequence.blocks, start, length)


def _prompt_logits(chunk: PromptChunk) -> LogitsKind:
    """All when scoring; else the last row's, and only at the end of a prompt that is to be continued."""
    if chunk.sequence.scored:
        return "all"
    ends = chunk.stop == chunk.sequence.num_prompt
    return "last" if ends and chunk.sequence.request.params.max_tokens > 0 else "none"
