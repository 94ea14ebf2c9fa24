"""The cpu tier over the disk tier: slots for records, a table that says who is in them, and the reads that fill them.

Knows layers, neuron ids and bytes; has never heard of tokens or tensors. One thread uses it (the engine's); `snapshot`
may be called from any thread. One arena holds everything that is computed with:

    | slots: num_slots x stride | spare slots | staging: where reads land |

so that a record is an offset of the arena, whether it stays or only passes through. Spare slots are lent: `give_back`
empties them and hands their memory to whoever needs it for a while.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.arena import drop_pages, new_arena
from cache.budget import smallest_staging_bytes
from cache.bundle import BundleLayout, checksum_weights
from cache.device_curve import DeviceCurve, cost_and_gap
from cache.errors import ReadError
from cache.policy import DecayedFrequency, choose_swaps
from cache.reader import Reader, ReaderInfo, ReadPlan, ReadVolume, plan_reads, volume_of_absent
from cache.records import copy_records, first_bad_record
from cache.stats import READ_SIZE_BOUNDS, CacheSnapshot, Histogram, TierSnapshot, TransferSnapshot
from cache.store import BundleFile

_PAGE = 4096
_PIECE_BYTES = 1 << 20  # of reads: what has arrived is checked and computed with while the rest is read
_MOST_PIECES = 8  # of a lease: more would cost calls, and hide nothing more
_TRIED = 1024  # records read ahead for a layer after which such guesses are given up when most were wrong
_PIECES_LEFT = 1  # of a lease's, when reads for the next layer are handed over behind them

_Room = tuple[int, int]  # a part of staging: offset in the arena, bytes


@dataclass(frozen=True, slots=True)
class Lease:
    """Records that may be computed with until `release`: `offsets` into the arena, one for each of `ids`.

    As a context manager it is released at the end of the block, or dropped, nothing admitted, when the block raises.
    """

    layer: int
    ids: np.ndarray  # int32 [K], ascending
    offsets: np.ndarray  # int64 [K]
    hit: np.ndarray  # bool [K]
    num_ready: int  # so many of the first ids were resident when asked: may be computed with at once
    cache: NeuronCache

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.cache.release(self)
        else:
            self.cache.drop(self)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neurons start..stop-1 of a streamed layer, contiguous in the arena from `offset`, stride apart."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Records that are being read before it is known whether they will be wanted."""

    layer: int
    ids: np.ndarray  # int32 [P], ascending
    offsets: np.ndarray  # int64 [P], where they land in the arena
    ticket: int
    room: _Room  # that they lie in


@dataclass(frozen=True, slots=True)
class _Hint:
    """What `prefetch` was asked for while a lease still waits for its own reads."""

    layer: int
    ids: np.ndarray  # int32 [P], ascending
    worth: np.ndarray | None  # [P]


@dataclass(slots=True)
class _Reading:
    """What a lease still waits for. early: of `ids`, which come ahead; num_arrived of these were there when asked."""

    ids: np.ndarray  # int32 [M], the absent ones
    early: np.ndarray  # bool [M]
    places: np.ndarray  # int64 [M], in the arena
    pieces: deque[tuple[int, slice]]  # reads of the others, in order: ticket, which of the others it brings
    ahead: _Ahead | None
    num_arrived: int


@dataclass(slots=True)
class _Counts:
    lookups: int = 0
    hits: int = 0
    insertions: int = 0
    evictions: int = 0
    read_bytes: int = 0
    needed_bytes: int = 0
    requests: int = 0
    read_s: float = 0.0
    stall_s: float = 0.0
    ahead_issued: int = 0  # records
    ahead_used: int = 0
    ahead_wasted: int = 0


@dataclass(frozen=True, slots=True)
class _Pending:
    """A chunk whose reads are under way."""

    chunk: Chunk
    ticket: int | None  # None: every record was resident
    resident: np.ndarray  # bool, for each neuron of the chunk


@dataclass(frozen=True, slots=True)
class _Begun:
    """The first chunks, one or two, of a layer whose stream has not been asked for yet."""

    layer: int
    half: int  # of staging, where the first lies; the other is for the second
    pending: tuple[_Pending, ...]


class NeuronCache:
    """Slots of the cpu tier, filled from a bundle file.

    slots_per_layer: how many records of each layer may stay. staging_bytes: where reads land; a set of misses that does
    not fit makes `acquire` return None. frequency: share of tokens [L, F] that used a neuron in the profile; it ranks
    the neurons until the cache has seen its own. curve: of the file's device; it says which gaps are worth reading to
    save a request. spare_per_layer: slots beside those, until `give_back`. lookahead: a quarter of staging is for
    `prefetch`, unless a set of misses needs all of it. Costs: slots + staging + 4 bytes a neuron.
    """

    tier = "cpu"

    def __init__(
        self,
        file: BundleFile,
        slots_per_layer: Sequence[int],
        staging_bytes: int,
        frequency: np.ndarray,
        *,
        io_engine: str = "auto",
        queue_depth: int = 256,
        curve: DeviceCurve | None = None,
        lookahead: bool = False,
        spare_per_layer: Sequence[int] | None = None,
    ) -> None:
        file.check()
        self.file = file
        self.layout: BundleLayout = file.layout
        stride = self.layout.stride
        self._slots_per_layer = np.minimum(np.asarray(slots_per_layer, np.int64), file.num_neurons)
        spare = (
            np.zeros(file.num_layers, np.int64) if spare_per_layer is None else np.asarray(spare_per_layer, np.int64)
        )
        self._spare_per_layer = np.minimum(spare, file.num_neurons - self._slots_per_layer)
        self._base = np.concatenate([[0], np.cumsum(self._slots_per_layer)])  # first slot of each layer
        self._num_own = int(self._base[-1])  # the others are spare
        self._spare_base = self._num_own + np.concatenate([[0], np.cumsum(self._spare_per_layer)])
        self._has_spare = bool(self._spare_per_layer.any())
        num_slots = int(self._spare_base[-1])
        self._staging = -(-num_slots * stride // _PAGE) * _PAGE
        self._staging_bytes = max(staging_bytes, smallest_staging_bytes(self.layout)) // _PAGE * _PAGE
        self.arena = new_arena(self._staging + self._staging_bytes)
        self._weights = checksum_weights(self.layout)
        self._slot_of = np.full((file.num_layers, file.num_neurons), -1, np.int32)
        self._owner = np.full(num_slots, -1, np.int32)
        self._used = np.zeros(file.num_layers, np.int64)
        self._policy = DecayedFrequency(frequency)
        self._counts = _Counts()
        self._read_sizes = Histogram(READ_SIZE_BOUNDS)
        self._under_way: dict[int, np.ndarray] = {}  # ticket -> bytes of each of its reads
        self._leases = 0
        self._file_bytes = file.path.stat().st_size
        ahead_bytes = self._staging_bytes // 4 // _PAGE * _PAGE if lookahead else 0
        self._whole: _Room = (self._staging, self._staging_bytes)  # for what has it for itself
        self._demanded: _Room = (self._staging, self._staging_bytes - ahead_bytes)
        self._speculated: _Room = (self._staging + self._staging_bytes - ahead_bytes, ahead_bytes)
        half = ahead_bytes // 2 // _PAGE * _PAGE
        self._halves: tuple[_Room, _Room] = (self._speculated[0], half), (self._speculated[0] + half, half)
        self._most_ahead = queue_depth  # records: what is not under way when its layer is asked for came no earlier
        self._tried = np.zeros((2, file.num_layers), np.int64)  # records read ahead of a lease's end; those used
        self._ahead: _Ahead | None = None
        self._hint: _Hint | None = None
        self._leased: _Room | None = None  # beyond `_demanded`, what the lease that is out has records in
        self._reading: _Reading | None = None  # of the lease that is out
        self._begun: _Begun | None = None
        self._reader = Reader(file.path, self.arena, landing=self._whole, engine=io_engine, queue_depth=queue_depth)
        self.read_cost, self.merge_gap_bytes = cost_and_gap(curve, self._reader.info.engine)

    @property
    def reader_info(self) -> ReaderInfo:
        return self._reader.info

    @property
    def slots_per_layer(self) -> list[int]:
        """Now: with the spare ones, unless they are given back."""
        return [self._slots(layer).size for layer in range(self.file.num_layers)]

    @property
    def staging_bytes(self) -> int:
        return self._staging_bytes

    def resident(self, layer: int) -> np.ndarray:
        """Ids of the layer's neurons that are in slots, ascending."""
        return np.flatnonzero(self._slot_of[layer] >= 0).astype(np.int32)

    # -- spare slots ------------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Empties the spare slots and gives the kernel their memory, until `take_back`. No lease may be out."""
        if not self._has_spare:
            return
        self._one_user()
        self._take_begun(-1)  # it counts on who was resident
        self._has_spare = False
        for layer in range(self.file.num_layers):
            spare = slice(self._spare_base[layer], self._spare_base[layer + 1])
            gone = self._owner[spare][self._owner[spare] >= 0]
            self._slot_of[layer, gone] = -1
            self._used[layer] -= gone.size
            self._counts.evictions += gone.size
        self._owner[self._num_own :] = -1
        with contextlib.suppress(OSError):  # locked memory stays where it is, and is somebody else's promise
            drop_pages(self.arena, self._num_own * self.layout.stride, self._staging)

    def take_back(self) -> None:
        """The spare slots may be used again; they fill with what is read from now on."""
        self._has_spare = bool(self._spare_per_layer.any())

    def _slots(self, layer: int) -> np.ndarray:
        """Of the layer, int64, ascending."""
        own = np.arange(self._base[layer], self._base[layer + 1])
        if not self._has_spare:
            return own
        return np.concatenate([own, np.arange(self._spare_base[layer], self._spare_base[layer + 1])])

    # -- sparse: some neurons of a layer ---------------------------------------------------------------------------

    def acquire(self, layer: int, ids: np.ndarray) -> Lease | None:
        """Makes the records of `ids` (int32 [K], ascending, unique) readable and returns where they are.

        Blocks until the misses are read: `begin` and `complete` in one. None when they do not fit staging: nothing was
        counted, take the dense path. Raises ReadError.
        """
        lease = self.begin(layer, ids)
        if lease is None:
            return None
        try:
            self.complete(lease)
        except ReadError:
            self.drop(lease)
            raise
        return lease

    def begin(self, layer: int, ids: np.ndarray) -> Lease | None:
        """Submits the reads that `ids` need and returns at once; what `prefetch` has begun is not read again.

        Until `complete` only the first `num_ready` records may be computed with. The slots keep their records until
        `release`; at most one lease is out. None when the misses do not fit staging.
        """
        self._one_user()
        self._take_begun(-1)
        ahead = self._take_ahead(layer)
        self._leased = (0, 0) if ahead is None else ahead.room
        slots = self._slot_of[layer, ids]
        hit = slots >= 0
        missed = ids[~hit]
        offsets = slots.astype(np.int64) * self.layout.stride
        num_ready = ids.size
        if missed.size or ahead is not None:
            reading = self._start(layer, missed, ahead)
            if reading is None:
                self._leased = None
                return None
            self._reading = reading
            offsets[~hit] = reading.places
            num_ready = int(np.argmin(hit)) if missed.size else ids.size
        self._leases += 1
        return Lease(layer, ids, offsets, hit, num_ready, self)

    def complete(self, lease: Lease) -> None:
        """Waits for the lease's reads and checks them; then all its records may be computed with.

        Raises ReadError; the lease is then to be dropped. Once a lease, and not beside `arrivals`.
        """
        for _ in self.arrivals(lease):
            pass

    def arrivals(self, lease: Lease) -> Iterator[int]:
        """`complete` by and by: yields how many of the first records may be computed with by now, at last all.

        Records are checked as they come, while others are still being read. To be taken to its end. Raises ReadError.
        """
        reading, num_late = self._reading, 0
        if reading is not None:
            yield from self._arrive(lease, reading)
            self._reading = None
            num_late = reading.ids.size - reading.num_arrived
            self._counts.needed_bytes += reading.num_arrived * self.layout.record_bytes
        self._count_lookups(lease.ids.size, num_late)
        yield lease.ids.size

    def _arrive(self, lease: Lease, reading: _Reading) -> Iterator[int]:
        missed, late = np.flatnonzero(~lease.hit), np.flatnonzero(~reading.early)
        if reading.ahead is not None:
            self._finish_ahead(lease.layer, reading)
            lease.offsets[missed] = reading.places
        while reading.pieces:
            ticket, some = reading.pieces.popleft()
            self._wait(ticket)
            if len(reading.pieces) <= _PIECES_LEFT:
                self._follow_hint()
            self._verify(lease.layer, reading.ids[late[some]], reading.places[late[some]])
            if some.stop < late.size:
                yield int(missed[late[some.stop]])

    def prefetch(self, layer: int, ids: np.ndarray, worth: np.ndarray | None = None) -> None:
        """Starts reading the absent ones of `ids` (int32 [K], ascending, unique), which `acquire` of this layer will
        probably be asked for next. A hint: nothing depends on it but time and counters, and it never blocks on them.

        While a lease of another layer is out, what that waits for comes first, and a layer whose guesses were mostly
        wrong is given up. worth, [K]: of more than the reader's queue takes, those of most worth are read; None: all.
        What an earlier hint asked for and nobody acquired is waited for and counted as wasted; a set too large for its
        part of staging is not read. RuntimeError without `lookahead`, and while a stream is out.
        """
        if not self._speculated[1]:
            raise RuntimeError("the cache was made without lookahead")
        if self._leased is None:
            self._one_user()
        self._hint = _Hint(layer, ids, worth)
        if self._reading is None or len(self._reading.pieces) <= _PIECES_LEFT:
            self._follow_hint()

    def _follow_hint(self) -> None:
        """Starts reading what the hint asks for, if there is one."""
        hint, self._hint = self._hint, None
        if hint is None:
            return
        self._take_begun(-1)
        self._take_ahead(-1)
        room = self._speculated
        if self._leased is not None:
            free = [half for half in self._halves if not _overlap(half, self._leased)]
            tried, used = self._tried[:, hint.layer]
            if not free:
                return
            if tried >= _TRIED and 2 * used < tried:
                self._tried[0, hint.layer] -= 1  # to be tried once more when enough steps have gone by
                return
            room = free[0]
        absent = self._worthiest(hint)
        plan = self._plan(hint.layer, absent, room) if absent.size else None
        if plan is None:
            return
        self._counts.ahead_issued += absent.size
        ticket = self._submit(plan, plan.arena_offsets)
        self._ahead = _Ahead(hint.layer, absent, plan.record_offsets, ticket, room)

    def _worthiest(self, hint: _Hint) -> np.ndarray:
        absent = self._slot_of[hint.layer, hint.ids] < 0
        ids: np.ndarray = hint.ids[absent]
        if hint.worth is None or ids.size <= self._most_ahead:
            return ids
        best = np.argpartition(-hint.worth[absent], self._most_ahead)[: self._most_ahead]
        return np.asarray(ids[np.sort(best)])

    def release(self, lease: Lease) -> None:
        """Ends the lease; what was read and scores better than what is resident moves into slots."""
        if self._reading is not None:
            raise RuntimeError("complete the lease first, or drop it")
        self._leases -= 1
        self._leased = None
        self._policy.touch(lease.layer, lease.ids)
        missed = np.flatnonzero(~lease.hit)
        if missed.size:
            self._admit(lease.layer, lease.ids[missed], lease.offsets[missed])

    def drop(self, lease: Lease) -> None:
        """Ends the lease of a step that failed; what was read is forgotten, what is being read is waited for."""
        self._leases -= 1
        self._leased = self._hint = None
        reading, self._reading = self._reading, None
        if reading is None:
            return
        if reading.ahead is not None:
            self._settle(reading.ahead, 0)
        for ticket, _ in reading.pieces:
            with contextlib.suppress(ReadError):
                self._wait(ticket)

    def volumes(self, layer: int, ids: np.ndarray) -> tuple[ReadVolume, ReadVolume]:
        """What `acquire` of `ids` would read now, and what `stream` would."""
        return self._volume(layer, ids), self._volume(layer, None)

    def _volume(self, layer: int, ids: np.ndarray | None) -> ReadVolume:
        record, alignment = self.layout.record_bytes, self._reader.info.alignment
        slots, stride = self._slot_of[layer], self.layout.stride
        return volume_of_absent(slots, ids, stride, record, alignment, self.merge_gap_bytes)

    # -- dense: a whole layer, in order -----------------------------------------------------------------------------

    def stream(self, layer: int, following: int | None = None) -> Generator[Chunk, None, None]:
        """The whole layer in chunks of ascending ids; the next chunk is read while the caller computes with this one.

        following: the layer that will be streamed next, if that is known; its first two chunks are then read ahead.
        A chunk is valid until the next one is asked for. Chunks depend on the staging size only, never on what is
        resident, so that sums over them do not either. Slots are used, not changed. Close the generator to stop early.
        Raises ReadError.
        """
        self._one_user()
        self._take_ahead(-1)
        begun = self._take_begun(layer)
        if self._in_order(layer):
            self._count_lookups(self.file.num_neurons, 0)
            first = int(self._base[layer])
            for start, stop in self._chunk_bounds():
                yield Chunk(start, stop, (first + start) * self.layout.stride)
            return
        self._leases += 1
        bounds = self._chunk_bounds()
        first = 0 if begun is None else begun.half
        under_way = deque([self._submit_chunk(layer, *bounds[0], first)] if begun is None else begun.pending)
        try:
            for i in range(len(bounds)):
                if i + 1 < len(bounds) and len(under_way) < 2:  # where it goes was computed with: done with
                    under_way.append(self._submit_chunk(layer, *bounds[i + 1], (first + i + 1) % 2))
                current = under_way.popleft()
                self._finish_chunk(layer, current)
                if i + 1 == len(bounds) and following is not None:  # not before: the disk would give to both
                    self._begin_stream(following, (first + i + 1) % 2)
                yield current.chunk
            self._begin_second()
        finally:
            self._leases -= 1
            for left in under_way:  # closed early: the buffer must come to rest
                self._abandon(left)

    def pin(self, layer: int, ids: np.ndarray) -> None:
        """These neurons never leave the slots that `warm` gives them. At most as many as the layer has slots."""
        if ids.size > self._slots_per_layer[layer]:
            raise ValueError(f"{ids.size} neurons of layer {layer} do not fit its {self._slots_per_layer[layer]} slots")
        self._policy.pin(layer, ids)

    def warm(self, layer: int) -> None:
        """Fills the layer's slots with the neurons that the policy ranks highest. Raises ReadError."""
        self._take_begun(-1)
        self._take_ahead(-1)
        size = self._slots(layer).size
        best = np.argsort(-self._policy.scores(layer), kind="stable")[:size]
        ids = np.sort(best[self._slot_of[layer, best] < 0]).astype(np.int32)
        step = max(1, self._staging_bytes // 2 // self.layout.stride)
        for start in range(0, ids.size, step):
            part = ids[start : start + step]
            plan = self._plan(layer, part, self._whole) or self._plan(layer, part, self._whole, merge_gap=0)
            if plan is None:  # every record apart from its neighbours: alignment can double the bytes
                raise RuntimeError("half of staging holds no reads of a quarter of it")
            self._read(plan)
            self._verify(layer, part, plan.record_offsets)
            self._insert(layer, part, plan.record_offsets, self._free_slots(layer, part.size))

    # -- numbers ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> CacheSnapshot:
        """All counters now."""
        c, stride = self._counts, self.layout.stride
        tier = TierSnapshot(
            lookups=c.lookups,
            hits=c.hits,
            misses=c.lookups - c.hits,
            insertions=c.insertions,
            evictions=c.evictions,
            capacity_bytes=sum(self.slots_per_layer) * stride,
            used_bytes=int(self._used.sum()) * stride,
        )
        moved = TransferSnapshot(c.read_bytes, c.needed_bytes, c.requests, c.read_s, c.stall_s)
        return CacheSnapshot(
            {self.tier: tier},
            {("disk", self.tier): moved},
            {"disk": self._read_sizes.snapshot()},
            prefetch_issued_bytes=c.ahead_issued * self.layout.record_bytes,
            prefetch_used_bytes=c.ahead_used * self.layout.record_bytes,
            prefetch_wasted_bytes=c.ahead_wasted * self.layout.record_bytes,
        )

    def close(self) -> None:
        """Waits for reads under way and closes the file. The arena is freed with the object."""
        self._reader.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _one_user(self) -> None:
        if self._leases:
            raise RuntimeError("a lease or a stream is still out: release it first")

    def _count_lookups(self, lookups: int, misses: int) -> None:
        self._counts.lookups += lookups
        self._counts.hits += lookups - misses
        self._counts.needed_bytes += misses * self.layout.record_bytes

    def _take_ahead(self, layer: int) -> _Ahead | None:
        """What is being read ahead for `layer`, taken over by the caller; another layer's is waited for and dropped."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.layer == layer:
            return ahead
        self._settle(ahead, 0)
        return None

    def _settle(self, ahead: _Ahead, num_used: int) -> bool:
        """Waits for what was read ahead; whether it is there. A failure is nobody's error: it may not be wanted."""
        self._tried[:, ahead.layer] += ahead.ids.size, num_used
        try:
            self._wait(ahead.ticket)
        except ReadError:
            self._counts.ahead_wasted += ahead.ids.size
            return False
        self._counts.ahead_used += num_used
        self._counts.ahead_wasted += ahead.ids.size - num_used
        return True

    def _start(self, layer: int, ids: np.ndarray, ahead: _Ahead | None) -> _Reading | None:
        """Submits reads of the absent `ids`, but for those that come ahead. None when they do not fit staging."""
        early = np.zeros(ids.size, bool) if ahead is None else np.isin(ids, ahead.ids, assume_unique=True)
        late = ids[~early]
        plan = self._plan(layer, late, self._demanded)
        if plan is None and ahead is None and self._speculated[1]:
            self._leased = self._whole
            plan = self._plan(layer, late, self._whole)
        if plan is None:
            room = self._whole if ahead is None else self._demanded
            plan = self._plan(layer, late, room, merge_gap=0)
        if plan is None and ahead is not None:
            self._settle(ahead, 0)
            self._leased = (0, 0)
            return self._start(layer, ids, None)
        if plan is None:
            return None
        places = np.empty(ids.size, np.int64)
        places[~early] = plan.record_offsets
        num_arrived = 0
        if ahead is not None:
            places[early] = ahead.offsets[np.searchsorted(ahead.ids, ids[early])]
            num_arrived = int(np.count_nonzero(early)) if self._reader.done(ahead.ticket) else 0
        return _Reading(ids, early, places, self._submit_in_pieces(plan), ahead, num_arrived)

    def _finish_ahead(self, layer: int, reading: _Reading) -> None:
        """Waits for what comes ahead and checks what is wanted of it. Raises ReadError."""
        ahead, reading.ahead = reading.ahead, None
        if ahead is None:
            return
        there, wanted = self._settle(ahead, int(np.count_nonzero(reading.early))), reading.ids[reading.early]
        if not there and wanted.size:  # read it again, where it was to land
            plan = self._plan(layer, wanted, ahead.room)
            if plan is None:
                raise RuntimeError("a part of what was read ahead does not fit where all of it did")
            self._read(plan)
            reading.places[reading.early] = plan.record_offsets
        self._verify(layer, wanted, reading.places[reading.early])

    def _plan(self, layer: int, ids: np.ndarray, room: _Room, merge_gap: int | None = None) -> ReadPlan | None:
        return plan_reads(
            self.file.starts(layer, ids),
            self.layout.record_bytes,
            alignment=self._reader.info.alignment,
            merge_gap_bytes=self.merge_gap_bytes if merge_gap is None else merge_gap,
            staging_offset=room[0],
            staging_bytes=room[1],
        )

    def _read(self, plan: ReadPlan) -> None:
        self._wait(self._submit(plan, plan.arena_offsets))

    def _submit(self, plan: ReadPlan, arena_offsets: np.ndarray) -> int:
        return self._send(plan.offsets, plan.lengths, arena_offsets)

    def _submit_in_pieces(self, plan: ReadPlan) -> deque[tuple[int, slice]]:
        """(ticket, which of the plan's records it brings), one after another."""
        places = plan.arena_offsets
        return deque(
            (self._send(plan.offsets[reads], plan.lengths[reads], places[reads]), records)
            for reads, records in plan.pieces(_PIECE_BYTES, _MOST_PIECES)
        )

    def _send(self, offsets: np.ndarray, lengths: np.ndarray, arena_offsets: np.ndarray) -> int:
        ticket = self._reader.submit(offsets, lengths, arena_offsets)
        self._under_way[ticket] = np.minimum(lengths, self._file_bytes - offsets)  # the last may be short
        return ticket

    def _wait(self, ticket: int) -> None:
        self._account(ticket, stalls_since=time.perf_counter())

    def _account(self, ticket: int, stalls_since: float | None) -> None:
        """Waits, and counts what came: bytes and sizes together, so that they add up whatever is under way."""
        sizes = self._under_way.pop(ticket)
        result = self._reader.wait(ticket)
        self._read_sizes.observe_all(sizes)
        c = self._counts
        c.read_bytes += result.num_bytes
        c.requests += result.num_requests
        c.read_s += result.seconds
        if stalls_since is not None:
            c.stall_s += time.perf_counter() - stalls_since

    def _verify(self, layer: int, ids: np.ndarray, offsets: np.ndarray) -> None:
        """Raises ReadError for the first record whose checksum is wrong: damaged bytes are never computed with."""
        bad = first_bad_record(self.arena, offsets, self.layout.checksum_offset, self._weights)
        if bad >= 0:
            start = int(self.file.starts(layer, ids[bad : bad + 1])[0])
            reason = f"wrong checksum (layer {layer}, neuron {int(ids[bad])})"
            raise ReadError(str(self.file.path), start, self.layout.record_bytes, reason)

    def _admit(self, layer: int, ids: np.ndarray, offsets: np.ndarray) -> None:
        own = self._slots(layer)
        if not own.size:
            return
        free = own.size - int(self._used[layer])
        scores = self._policy.scores(layer)
        residents = self._owner[own]
        taken = np.flatnonzero(residents >= 0)
        admit, evict = choose_swaps(scores[ids], scores[residents[taken]], free)
        slots = self._free_slots(layer, admit.size - evict.size)
        if evict.size:
            freed = own[taken[evict]]
            self._slot_of[layer, self._owner[freed]] = -1
            self._owner[freed] = -1
            self._used[layer] -= evict.size
            self._counts.evictions += evict.size
            slots = np.concatenate([slots, freed])
        self._insert(layer, ids[admit], offsets[admit], slots)

    def _free_slots(self, layer: int, num: int) -> np.ndarray:
        if num <= 0:
            return np.empty(0, np.int64)
        own = self._slots(layer)
        return np.asarray(own[self._owner[own] < 0][:num])

    def _insert(self, layer: int, ids: np.ndarray, offsets: np.ndarray, slots: np.ndarray) -> None:
        copy_records(self.arena, offsets, slots * self.layout.stride, self.layout.record_bytes)
        self._slot_of[layer, ids] = slots
        self._owner[slots] = ids
        self._used[layer] += ids.size
        self._counts.insertions += ids.size

    def _in_order(self, layer: int) -> bool:
        """Whether the layer is resident as a whole and in order, so that its slots are one chunk."""
        if self._slots_per_layer[layer] < self.file.num_neurons or self._used[layer] < self.file.num_neurons:
            return False
        first = int(self._base[layer])
        return bool((self._owner[first : first + self.file.num_neurons] == np.arange(self.file.num_neurons)).all())

    def _chunk_bounds(self) -> list[tuple[int, int]]:
        """(start, stop) of the chunks of a layer: as long as half of staging allows, less slack."""
        slack = 2 * _PAGE
        step = max(1, (self._staging_bytes // 2 // _PAGE * _PAGE - slack) // self.layout.stride)
        last = self.file.num_neurons
        return [(start, min(start + step, last)) for start in range(0, last, step)]

    def _submit_chunk(self, layer: int, start: int, stop: int, half: int) -> _Pending:
        ids = np.arange(start, stop, dtype=np.int32)
        resident = self._slot_of[layer, start:stop] >= 0
        first = int(self.file.starts(layer, ids[:1])[0])
        align = self._reader.info.alignment
        base = self._staging + half * (self._staging_bytes // 2 // _PAGE * _PAGE)
        offset = base + first % align  # congruent with the file, so that reads land in place
        chunk = Chunk(start, stop, offset)
        missed = ids[~resident]
        if not missed.size:
            return _Pending(chunk, None, resident)
        plan = self._plan(layer, missed, self._whole)
        if plan is None:
            raise RuntimeError("half of staging holds less than a chunk")
        in_place = plan.offsets - (first - first % align) + base
        return _Pending(chunk, self._submit(plan, in_place), resident)

    def _finish_chunk(self, layer: int, pending: _Pending) -> None:
        """Waits for the chunk's reads, checks them, and copies in what is resident."""
        chunk, stride = pending.chunk, self.layout.stride
        ids = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        places = chunk.offset + np.arange(ids.size) * stride
        hits, missed = pending.resident, ~pending.resident
        self._count_lookups(ids.size, int(np.count_nonzero(missed)))
        if pending.ticket is not None:
            self._wait(pending.ticket)
            self._verify(layer, ids[missed], places[missed])
        if hits.any():  # after the reads: those are aligned outward and may have overwritten neighbours
            slots = self._slot_of[layer, ids[hits]].astype(np.int64)
            copy_records(self.arena, slots * stride, places[hits], self.layout.record_bytes)

    def _begin_stream(self, layer: int, half: int) -> None:
        """Starts reading the first chunk of a layer into a half of staging that nobody uses."""
        if not self._in_order(layer):
            self._begun = _Begun(layer, half, (self._submit_chunk(layer, *self._chunk_bounds()[0], half),))

    def _begin_second(self) -> None:
        """Starts reading the second chunk of a layer that was begun, now that nobody uses the other half either."""
        begun, bounds = self._begun, self._chunk_bounds()
        if begun is not None and len(bounds) > 1:
            second = self._submit_chunk(begun.layer, *bounds[1], 1 - begun.half)
            self._begun = _Begun(begun.layer, begun.half, (*begun.pending, second))

    def _take_begun(self, layer: int) -> _Begun | None:
        """The begun stream of `layer`, taken over by the caller; another layer's is waited for and dropped."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        if begun.layer == layer:
            return begun
        for pending in begun.pending:
            num_read = int(np.count_nonzero(~pending.resident))
            self._counts.ahead_issued += num_read  # what was foreseen and came is no speculation
            self._counts.ahead_wasted += num_read
            self._abandon(pending)
        return None

    def _abandon(self, pending: _Pending) -> None:
        """Waits until a chunk that nobody wants has come to rest. A failure is nobody's error."""
        if pending.ticket is not None:
            with contextlib.suppress(ReadError):
                self._account(pending.ticket, stalls_since=None)


def _overlap(a: _Room, b: _Room) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]
