"""One row's FFN where a layer's records all lie in slots: programs find their share of what is wanted in the bits that
scoring has left, and take it from gate and up to down, all of it under way at once.

No list is written, and shares differ by one neuron at most. Records on their way to shared memory take no registers, of
which the compiler would leave too few for all of them; layouts say who has what. What the programs add up is summed by
`triton_neurons`, in one order. Shapes: F neurons, D hidden, P programs, N neurons at once, M words of bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from runtime.kernels.triton_act import activated
from runtime.kernels.triton_launch import after_others


@gluon.jit
def _sum(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit
def _number_of(bits):  # type: ignore[no-untyped-def]
    """How many are set."""
    return gl.inline_asm_elementwise("popc.b64 $0, $1;", "=r,l", [bits], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _place_of(bits, rank):  # type: ignore[no-untyped-def]
    """The place of the bit that has `rank` set ones below it: by halves."""
    place = rank * 0
    for i in gl.static_range(6):
        below = _number_of(bits & ((1 << (32 >> i)) - 1))
        beyond = rank >= below
        place += gl.where(beyond, 32 >> i, 0)
        bits = gl.where(beyond, bits >> (32 >> i), bits)
        rank -= gl.where(beyond, below, 0)
    return place


@gluon.jit  # type: ignore[untyped-decorator]
def _found(  # type: ignore[no-untyped-def]
    words, own, before, after, k, first, NUM: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The k-th wanted neurons; the first ones are those before `first`. own: numbers of the words; before, after: how
    many are wanted before each word, and up to its end."""
    rest = k - first
    here = (before[None, :] <= rest[:, None]) & (rest[:, None] < after[None, :])
    packed = gl.sum(gl.where(here, own[None, :] * 64 + (rest[:, None] - before[None, :]), 0), 1)
    packed = gl.convert_layout(packed, layout)
    word = packed // 64
    neuron = first + word * 64 + _place_of(gl.load(words + word), packed % 64)
    k = gl.convert_layout(k, layout)
    return gl.where(k < first, k, gl.minimum(neuron, NUM - 1))


@gluon.jit  # type: ignore[untyped-decorator]
def _at(place, start, TYPE: gl.constexpr, ALIGN: gl.constexpr):  # type: ignore[no-untyped-def]
    """Where the vectors are that lie `start` bytes behind the addresses [N] of their records."""
    return gl.multiple_of((place + start).to(gl.pointer_type(TYPE)), ALIGN)


@gluon.jit  # type: ignore[untyped-decorator]
def _room(TYPE: gl.constexpr, N: gl.constexpr, W: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Shared memory for N vectors, W numbers of each at a time."""
    tiles = ()
    for _ in gl.static_range(T):
        tiles += (gl.allocate_shared_memory(TYPE, [N, W], gl.SwizzledSharedLayout(8, 1, 1, [1, 0])),)  # type: ignore[assignment]
    return tiles


@gluon.jit  # type: ignore[untyped-decorator]
def _begun(room, pointer, there, column, D: gl.constexpr, W: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The vectors at pointer [N] are on their way to shared memory."""
    for i in gl.static_range(T):
        mask = there[:, None] & (i * W + column < D)[None, :]
        async_copy.async_copy_global_to_shared(room[i], pointer[:, None] + (i * W + column)[None, :], mask=mask)


@gluon.jit  # type: ignore[untyped-decorator]
def _times(room, kept, N: gl.constexpr, W: gl.constexpr, T: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]
    """x [D] times the vectors, fp32 [N]."""
    sums = gl.zeros([N, W], gl.float32, layout)
    for i in gl.static_range(T):
        sums += room[i].load(layout).to(gl.float32) * kept[i].load(layout)
    return gl.sum(sums, 1)


@gluon.jit
def _scale(place, start, there):  # type: ignore[no-untyped-def]
    """The scale of a record's vector."""
    return gl.load((place + start).to(gl.pointer_type(gl.float32)), mask=there, other=0.0)


@gluon.jit  # type: ignore[untyped-decorator]
def _with(sums, wanted, factor, pointer, column, D: gl.constexpr, W: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """sums, and factors [N] times the vectors at pointer [N], which are all under way at once; only those wanted are
    read."""
    tiles, more = (), ()
    for i in gl.static_range(T):
        mask = wanted[:, None] & (i * W + column < D)[None, :]
        tiles += (gl.load(pointer[:, None] + (i * W + column)[None, :], mask=mask, other=0),)  # type: ignore[assignment]
    for i in gl.static_range(T):
        more += (sums[i] + gl.sum(factor[:, None] * tiles[i].to(gl.float32), 0),)  # type: ignore[assignment]
    return more


@gluon.jit  # type: ignore[untyped-decorator]
def wanted_added(  # type: ignore[no-untyped-def]
    words, x, live, table, active_at, slab, partial, found, first, stride, num_words, NUM: gl.constexpr,
    M: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr, COUNTED: gl.constexpr, SCALED: gl.constexpr,
    GATE_AT: gl.constexpr, UP_AT: gl.constexpr, DOWN_AT: gl.constexpr, GATE_SCALE: gl.constexpr,
    UP_SCALE: gl.constexpr, DOWN_SCALE: gl.constexpr, TYPE: gl.constexpr, ALIGN: gl.constexpr, D: gl.constexpr,
    N: gl.constexpr, W: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr, VEC: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """partial[program] fp32 [D]: what every P-th wanted neuron adds for the row x fp32 [D], normed; found int32 [P, 4]:
    how many these are, those whose factor is not zero, and those that are active. words int64: bit j of word i is
    neuron first + 64 i + j, those before `first` are wanted as well."""
    ABOVE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])  # a warp has whole vectors
    BELOW: gl.constexpr = gl.BlockedLayout([1, VEC], [1, 32], [1, WARPS], [1, 0])  # a thread has all of its columns
    SEARCH: gl.constexpr = gl.BlockedLayout([1, M // 32], [1, 32], [WARPS, 1], [1, 0])  # each warp has all words
    OF_ABOVE: gl.constexpr = gl.SliceLayout(1, ABOVE)
    program, apart = gl.program_id(0), gl.num_programs(0)
    above, below = gl.arange(0, W, gl.SliceLayout(0, ABOVE)), gl.arange(0, W, gl.SliceLayout(0, BELOW))
    own, lane = gl.arange(0, M, gl.SliceLayout(0, SEARCH)), gl.arange(0, N, gl.SliceLayout(1, SEARCH))
    along = gl.arange(0, M, gl.BlockedLayout([M // 32], [32], [WARPS], [0]))
    kept, ups = _room(gl.float32, 1, W, T), _room(TYPE, N, W, T)
    gates = ups
    if GATED:
        gates = _room(TYPE, N, W, T)
    base = slab + gl.load(table).to(gl.int64) * stride
    alive = gl.load(live) != 0
    after_others(CHAINED)
    one = gl.arange(0, 1, gl.SliceLayout(1, BELOW))
    _begun(kept, x + one, one == 0, below, D, W, T)
    number = _number_of(gl.load(words + along, mask=along < num_words, other=0))
    up_to = gl.associative_scan(number, 0, _sum)
    total = gl.where(alive, first + gl.max(up_to, 0), 0)
    after = gl.convert_layout(up_to, gl.SliceLayout(0, SEARCH), assert_trivial=True)
    before = gl.convert_layout(up_to - number, gl.SliceLayout(0, SEARCH), assert_trivial=True)
    survived, active, wanted = gl.zeros([N], gl.int32, OF_ABOVE), gl.zeros([N], gl.int32, OF_ABOVE), program * 0
    sums = ()
    for _ in gl.static_range(T):
        sums += (gl.zeros([W], gl.float32, gl.SliceLayout(0, BELOW)),)  # type: ignore[assignment]
    start = program
    while start < total:
        k = start + apart * lane
        neuron = _found(words, own, before, after, k, first, NUM, OF_ABOVE)
        there = gl.convert_layout(k, OF_ABOVE) < total
        record = base + neuron.to(gl.int64) * stride
        _begun(ups, _at(record, UP_AT, TYPE, ALIGN), there, above, D, W, T)
        if GATED:
            _begun(gates, _at(record, GATE_AT, TYPE, ALIGN), there, above, D, W, T)
        async_copy.commit_group()
        if COUNTED:
            least = gl.load(active_at + neuron, mask=there, other=0.0)
        downs = gl.convert_layout(neuron, gl.SliceLayout(1, BELOW))
        async_copy.wait_group(0)
        up = _times(ups, kept, N, W, T, ABOVE)
        if SCALED:
            up *= _scale(record, UP_SCALE, there)
        z = up
        if GATED:
            z = _times(gates, kept, N, W, T, ABOVE)
            if SCALED:
                z *= _scale(record, GATE_SCALE, there)
        z = activated(z, ACT)
        value = gl.where(z == 0, 0.0, z * up) if GATED else z
        value = gl.where(there, value, 0.0)
        wanted += gl.minimum((total - start + apart - 1) // apart, N)
        survived += (value != 0).to(gl.int32)
        if COUNTED:
            active += ((gl.abs(value) >= least) & (value != 0)).to(gl.int32)
        factor = gl.convert_layout(value, gl.SliceLayout(1, BELOW))
        other = base + downs.to(gl.int64) * stride
        survives = factor != 0
        if SCALED:
            factor *= _scale(other, DOWN_SCALE, survives)
        sums = _with(sums, survives, factor, _at(other, DOWN_AT, TYPE, ALIGN), below, D, W, T)
        start += apart * N
    for i in gl.static_range(T):
        gl.store(partial + program * D + i * W + below, sums[i], mask=i * W + below < D)
    gl.store(found + program * 4, wanted)
    gl.store(found + program * 4 + 1, gl.sum(survived, 0))
    if COUNTED:
        gl.store(found + program * 4 + 2, gl.sum(active, 0))
