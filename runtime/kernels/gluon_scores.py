"""The scores of `triton_masks` by products of bits: a row of codes as it lies in memory times the bits of the digits.

Tensor cores AND 256 bits of sixteen neurons with those of eight planes and count them. A digit's eight bits are the
eight columns of such a product, so that no bit is ever unpacked, and the sums are those of the digits: the integers are
the same. The order of the 256 bits is free as long as both sides share it: each lane loads sixteen bytes at once.
Layouts are explicit (Gluon), since an instruction of a whole warp must find its operands in the right lanes.
Shapes: as in `triton_masks`; rows of codes count in words of four bytes here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from runtime.kernels.triton_launch import after_others
from runtime.kernels.triton_score import scored


@gluon.jit  # type: ignore[untyped-decorator]
def _words(rows, ids, column, start: gl.constexpr, NUM: gl.constexpr, APART: gl.constexpr):  # type: ignore[no-untyped-def]
    """From `start` on sixteen of the NUM words of rows that lie APART words apart, four of them a lane."""
    at = rows + ids[:, None] * APART + (start + column)[None, :]
    if start + 16 <= NUM:
        found = gl.load(at)
    else:
        found = gl.load(at, mask=(start + column < NUM)[None, :] & (ids >= 0)[:, None], other=0)
    return found


@gluon.jit  # type: ignore[untyped-decorator]
def _fetched(codes, ids, column, FROM: gl.constexpr, TO: gl.constexpr, NUM: gl.constexpr):  # type: ignore[no-untyped-def]
    """Words FROM up to TO of `ids`' codes, sixteen at a time, all under way at once."""
    tiles = ()
    for start in gl.static_range(FROM, TO, 16):
        tiles += (_words(codes, ids, column, start, NUM, NUM),)  # type: ignore[assignment]
    return tiles


@gluon.jit
def _counted(sums, low, high, planes):  # type: ignore[no-untyped-def]
    """sums + the bits that neurons (eight in `low`, eight in `high`) and planes share. In each lane: four words of
    either side, and the sums of one neuron of `low` and two planes, then of one of `high` and the same planes."""
    return gl.inline_asm_elementwise(
        """
        mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
            {$0, $1, $2, $3}, {$8, $12, $9, $13}, {$16, $17}, {$4, $5, $6, $7};
        mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
            {$0, $1, $2, $3}, {$10, $14, $11, $15}, {$18, $19}, {$0, $1, $2, $3};
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [sums, low, high, planes],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    low, high, codes, low_ids, high_ids, planes, plane, column, NUM: gl.constexpr, WIDTH: gl.constexpr,
    AHEAD: gl.constexpr, ROWS: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Of each row of a group, digit by digit, the sums of `_counted`; low, high: the first AHEAD words of the codes."""
    sums = ()
    for _ in gl.static_range(3 * ROWS):
        sums += (gl.zeros([low_ids.shape[0], 16], gl.int32, L),)  # type: ignore[assignment]
    low += _fetched(codes, low_ids, column, AHEAD, NUM, NUM)
    high += _fetched(codes, high_ids, column, AHEAD, NUM, NUM)
    for i in gl.static_range((NUM + 15) // 16):
        more = ()
        for j in gl.static_range(3 * ROWS):
            bits = _words(planes + 8 * j * WIDTH, plane, column, 16 * i, NUM, WIDTH)
            more += (_counted(sums[j], low[i], high[i], bits),)  # type: ignore[assignment]
        sums = more
    return sums


@gluon.jit  # type: ignore[untyped-decorator]
def _digit(sums, column, HIGH: gl.constexpr):  # type: ignore[no-untyped-def]
    """A digit's sum of each neuron of one half: of its planes the last one says the sign."""
    plane = (column // 4) * 2 + column % 2
    worth = gl.where(plane == 7, -128, 1 << plane)
    own = (column % 4 >= 2) if HIGH else (column % 4 < 2)
    return gl.sum(sums * gl.where(own, worth, 0)[None, :], 1).to(gl.float32)


@gluon.jit  # type: ignore[untyped-decorator]
def _number(sums, i: gl.constexpr, column, HIGH: gl.constexpr):  # type: ignore[no-untyped-def]
    """The three digits of a row of the group as one number."""
    lowest, middle = _digit(sums[3 * i], column, HIGH), _digit(sums[3 * i + 1], column, HIGH)
    return _digit(sums[3 * i + 2], column, HIGH) * 65536.0 + middle * 256.0 + lowest


@gluon.jit  # type: ignore[untyped-decorator]
def _stored(  # type: ignore[no-untyped-def]
    ids, gate, up, unit, gate_sum, up_sum, gate_scale, gate_bias, up_scale, up_bias, norm, scores, mask, threshold,
    gate_noise, up_noise, num, first, num_neurons, row, rows, ACT: gl.constexpr, GATED: gl.constexpr,
    SCORED: gl.constexpr,
):  # fmt: skip
    """The scores of half a program's neurons, as `triton_masks._masks` makes them; which of them are wanted."""
    up = unit * up - up_sum + up_bias
    if GATED:
        gate = unit * gate - gate_sum + gate_bias
    score = scored(gate, up, gate_scale, up_scale, norm, gate_noise, up_noise, ACT, GATED)
    there = (ids < num) & (row < rows)
    if SCORED:
        gl.store(scores + row * num + ids, score, mask=there)
    wanted = score >= threshold
    gl.store(mask + row * num_neurons + first + ids, wanted.to(gl.uint8), mask=there)
    return wanted & there


@gluon.jit  # type: ignore[untyped-decorator]
def score_bits(  # type: ignore[no-untyped-def]
    planes, facts, gate_codes, gate_scale, gate_bias, up_codes, up_scale, up_bias, norm, scores, mask, words, given,
    threshold, gate_noise, up_noise, num, first, num_neurons, rows, GATE: gl.constexpr, UP: gl.constexpr,
    WIDTH: gl.constexpr, WARPS: gl.constexpr, ROWS: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr,
    SCORED: gl.constexpr, WORDS: gl.constexpr, GIVEN: gl.constexpr, UP_AHEAD: gl.constexpr, GATE_AHEAD: gl.constexpr,
    CHAINED: gl.constexpr,
):  # fmt: skip
    """Of sixteen neurons a warp, and a group of ROWS rows: planes int32 [B, 24, WIDTH] (the lowest digit's first),
    codes int32 [K, UP], and [K, GATE] of the gate, whose planes come first; everything else as of `_masks`. WORDS, of
    one row and two warps: words int32, bit j of word i says whether neuron 32 i + j is wanted, or, where GIVEN, whether
    uint8 given [F] says so."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    half: gl.constexpr = 8 * WARPS
    of_lane = gl.arange(0, half, gl.SliceLayout(1, L))
    column = gl.arange(0, 16, gl.SliceLayout(0, L))
    group = gl.program_id(1)
    low_ids = gl.program_id(0) * (2 * half) + of_lane
    high_ids = low_ids + half
    low_from, high_from = gl.minimum(low_ids, num - 1), gl.minimum(high_ids, num - 1)
    up_low = _fetched(up_codes, low_from, column, 0, UP_AHEAD, UP)
    up_high = _fetched(up_codes, high_from, column, 0, UP_AHEAD, UP)
    gate_low, gate_high = (), ()
    low_scale, low_bias = gl.load(up_scale + low_from), gl.load(up_bias + low_from)
    high_scale, high_bias = gl.load(up_scale + high_from), gl.load(up_bias + high_from)
    low_gate_scale, low_gate_bias, low_norm = low_scale, low_bias, low_scale
    high_gate_scale, high_gate_bias, high_norm = high_scale, high_bias, high_scale
    if GATED:
        gate_low = _fetched(gate_codes, low_from, column, 0, GATE_AHEAD, GATE)
        gate_high = _fetched(gate_codes, high_from, column, 0, GATE_AHEAD, GATE)
        low_gate_scale, low_gate_bias = gl.load(gate_scale + low_from), gl.load(gate_bias + low_from)
        high_gate_scale, high_gate_bias = gl.load(gate_scale + high_from), gl.load(gate_bias + high_from)
    else:
        low_norm, high_norm = gl.load(norm + low_from), gl.load(norm + high_from)
    after_others(CHAINED)
    low_wanted, high_wanted = low_ids < num, high_ids < num
    own = planes + group * (4 * 24 * WIDTH)
    plane = of_lane % 8
    up_sums = _products(
        up_low, up_high, up_codes, low_from, high_from, own + (WIDTH - UP), plane, column, UP, WIDTH, UP_AHEAD, ROWS, L
    )
    gate_sums = up_sums
    if GATED:
        gate_sums = _products(
            gate_low, gate_high, gate_codes, low_from, high_from, own, plane, column, GATE, WIDTH, GATE_AHEAD, ROWS, L
        )
    for i in gl.static_range(ROWS):
        row = group * 4 + i
        unit = 2.0 * gl.load(facts + row * 3)
        gate_sum = gl.load(facts + row * 3 + 1)
        up_sum = gl.load(facts + row * 3 + 2)
        if not GATED:
            up_sum = gate_sum
        low_wanted = _stored(
            low_ids, _number(gate_sums, i, column, False), _number(up_sums, i, column, False), unit, gate_sum, up_sum,
            low_gate_scale, low_gate_bias, low_scale, low_bias, low_norm, scores, mask, threshold, gate_noise, up_noise,
            num, first, num_neurons, row, rows, ACT, GATED, SCORED,
        )  # fmt: skip
        high_wanted = _stored(
            high_ids, _number(gate_sums, i, column, True), _number(up_sums, i, column, True), unit, gate_sum, up_sum,
            high_gate_scale, high_gate_bias, high_scale, high_bias, high_norm, scores, mask, threshold, gate_noise,
            up_noise, num, first, num_neurons, row, rows, ACT, GATED, SCORED,
        )  # fmt: skip
    if WORDS:
        if GIVEN:
            low_wanted = gl.load(given + first + low_ids, mask=low_ids < num, other=0) != 0
            high_wanted = gl.load(given + first + high_ids, mask=high_ids < num, other=0) != 0
        bits = (low_wanted.to(gl.int32) << of_lane) | (high_wanted.to(gl.int32) << (of_lane + half))
        gl.store(words + gl.program_id(0), gl.sum(bits, 0))
