"""Scores from a layer's plane sketch (`runtime.sketches`), and the mask of neurons that reach a threshold.

A row of codes says of each plane whether it is added or subtracted: a matrix of bits times a vector, which tensor cores
multiply once the bits are bytes of 0 and 1 and the vector is written in whole numbers, three digits of 256. Eight bits
of a byte become eight matrices. Sums are exact; the vector is rounded to 1 / 8,000,000 of what is largest in it. Where
products of bits are fast, the digits' bits are made instead, and `gluon_scores` counts them: the same sums.
Shapes: B rows, G groups of rows, K sketched neurons, F neurons, D hidden, R bytes of a row of codes; W bytes of the
codes of all matrices of a sketch (gate, where there is one, and up), which share buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from runtime.kernels.triton_act import ACTS
from runtime.kernels.triton_launch import after_others, by_bits, chained, compiled, laid_out
from runtime.kernels.triton_score import scored
from runtime.sketches import PlaneMatrix, PlaneSketch

_BYTES = 128  # of a row of codes at once
_NEURONS, _AHEAD = 64, 3  # of a program; tiles of their codes under way beside the one that is multiplied
_DIGIT_BYTES = 16  # whose planes a program writes in digits
_COLUMNS_AT_ONCE = 512  # of a row whose digits are made in bits
_WORD = 64  # neurons of a word of bits
_WORDS_AHEAD = 64  # of a gated row, that a program which counts bits has under way early
PLACES = 1 << 16  # that the decoder can be at within a layer
ROW_ALIGN = 16  # bytes of codes that a lane loads at once
_COLUMNS, _ROWS, _FACTS = 16, 4, 3  # of the vectors' side of a product; rows that share one; facts of a row


@dataclass(frozen=True, slots=True)
class DevicePlanes:
    """A PlaneMatrix where the GPU computes: dimension int32 and coefficient fp32 [R, 8] (bit b of byte r is plane
    8 r + b; past the last one the coefficient is zero), largest and whole fp32 [D] (of a dimension's coefficients the
    largest, and their sum), codes uint8 [K, R], rows that are padded to ROW_ALIGN bytes, scale fp32 [K] with `unit` in
    it, bias fp32 [K]."""

    dimension: torch.Tensor
    coefficient: torch.Tensor
    largest: torch.Tensor
    whole: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    noise: float

    @classmethod
    def of(cls, planes: PlaneMatrix, device: torch.device) -> DevicePlanes:
        dimension, coefficient = planes.planes()
        scale = planes.scale.astype(np.float32) * np.float32(planes.unit)
        largest, whole = np.zeros((2, planes.bits.size), np.float32)
        np.maximum.at(largest, dimension, np.abs(coefficient))
        np.add.at(whole, dimension, coefficient)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        width = -(-planes.codes.shape[1] // ROW_ALIGN) * ROW_ALIGN

        def by_bit(array: np.ndarray) -> torch.Tensor:
            padded = np.zeros(8 * width, array.dtype)
            padded[: array.size] = array
            return put(padded.reshape(-1, 8))

        return cls(
            by_bit(dimension.astype(np.int32)),
            by_bit(coefficient),
            put(largest),
            put(whole),
            put(np.pad(planes.codes, ((0, 0), (0, width - planes.codes.shape[1])))),
            put(scale),
            put(planes.bias.astype(np.float32)),
            planes.noise,
        )


class DeviceSketch:
    """A layer's PlaneSketch on the device; its rows are the neurons from `first` on, the ones before are pinned.

    dimension, coefficient [W, 8] of both matrices; largest [D] of both.
    """

    def __init__(self, sketch: PlaneSketch, device: torch.device) -> None:
        """ValueError when the sketched neurons are not the last ones of the layer."""
        self.act, self.num_neurons = sketch.act, sketch.num_neurons
        self.first = sketch.num_neurons - sketch.up.codes.shape[0]
        if sketch.neurons is not None and not (sketch.neurons == np.arange(self.first, sketch.num_neurons)).all():
            raise ValueError("the sketched neurons must be the last ones of the layer")
        self.gate = None if sketch.gate is None else DevicePlanes.of(sketch.gate, device)
        self.up = DevicePlanes.of(sketch.up, device)
        both = [self.up] if self.gate is None else [self.gate, self.up]
        self.dimension = torch.cat([p.dimension for p in both])
        self.coefficient = torch.cat([p.coefficient for p in both])
        self.largest = torch.stack([p.largest for p in both]).amax(0)
        norm = sketch.down_norm
        self.down_norm = None if norm is None else torch.from_numpy(norm.astype(np.float32)).to(device)

    @property
    def width(self) -> int:
        """W."""
        return self.dimension.shape[0]

    @property
    def num_bytes(self) -> int:
        """On the device: scales and biases are wider there than in the file."""
        planes = [self.up] if self.gate is None else [self.gate, self.up]
        own = [t for p in planes for t in (p.codes, p.scale, p.bias, p.whole)]
        shared = [self.dimension, self.coefficient, self.largest]
        return sum(t.nbytes for t in own + shared) + (0 if self.down_norm is None else self.down_norm.nbytes)


@dataclass(frozen=True, slots=True)
class Digits:
    """Scratch. digits int8 [G, 8, 16, W]: columns 3 b to 3 b + 2 are row b of a group, the highest digit first, or [B,
    24, W]: bit b of byte r of plane 8 d + i is bit i of the d-th digit, the lowest one first, of plane 8 r + b; facts
    fp32 [B, 3]: what a unit of the last digit is worth, and the sums of z of the first and of the second matrix."""

    digits: torch.Tensor
    facts: torch.Tensor

    @classmethod
    def make(cls, rows: int, width: int, device: torch.device) -> Digits:
        """For up to so many rows, and W up to `width`."""
        digits = torch.zeros(triton.cdiv(rows, _ROWS) * 8 * _COLUMNS * width, dtype=torch.int8, device=device)
        return cls(digits, torch.zeros(rows, _FACTS, device=device))

    @property
    def num_bytes(self) -> int:
        return self.digits.nbytes + self.facts.nbytes


@dataclass(frozen=True, slots=True)
class Trail:
    """What a layer's pass leaves for a guess at the next one: x fp32 [B, D] as it came; at int32 [1]: where the decoder
    is, the layer times PLACES, to which its FFN adds what is done of it."""

    x: torch.Tensor
    at: torch.Tensor
    layer: int


@dataclass(frozen=True, slots=True)
class Scoring:
    """What it takes to score one row's neurons: its digits, in bits; mask uint8 [1, F] gets what is wanted. given, of
    that shape: what is taken for it, whatever the scores say, which are made all the same."""

    sketch: DeviceSketch
    threshold: float
    digits: Digits
    mask: torch.Tensor
    given: torch.Tensor | None = None


@triton.jit(do_not_specialize=["begun"])  # type: ignore[untyped-decorator]
def _digits(  # type: ignore[no-untyped-def]
    x, norm, dimension, coefficient, largest, whole1, whole2, digits, facts, h, kept, at_layer, begun, eps,
    D: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr,
    TRAIL: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """z = (x normed)[dimension] * coefficient in digits, or in the digits' bits; x normed to h; the row's facts."""
    place, row = tl.program_id(0) * C + tl.arange(0, C), tl.program_id(1)
    bit, column = tl.arange(0, 8), tl.arange(0, WIDE)
    there = column < D
    inside = (place < WIDTH)[:, None] & (bit >= 0)[None, :]
    at = place[:, None] * 8 + bit[None, :]
    source, factor = tl.load(dimension + at, mask=inside, other=0), tl.load(coefficient + at, mask=inside, other=0.0)
    weight, most = tl.load(norm + column, mask=there, other=0.0), tl.load(largest + column, mask=there, other=0.0)
    factor *= tl.load(norm + source, mask=inside, other=0.0)
    alone = there & (tl.program_id(0) == 0)
    sum1, sum2 = tl.load(whole1 + column, mask=alone, other=0.0), tl.load(whole2 + column, mask=alone, other=0.0)
    after_others(CHAINED)
    first = tl.program_id(0) == 0
    if TRAIL:
        tl.store(at_layer, begun, mask=first)
    z = tl.load(x + row * D + source, mask=inside, other=0.0) * factor
    xs = tl.load(x + row * D + column, mask=there, other=0.0)
    if TRAIL:
        tl.store(kept + row * D + column, xs, mask=there & first)
    scale = tl.rsqrt(tl.sum(xs * xs, 0) / D + eps)
    xs *= weight
    unit = tl.maximum(tl.max(tl.abs(xs) * most, 0), 1e-30) / 8000000.0
    if tl.program_id(0) == 0:
        tl.store(h + row * D + column, xs * scale, mask=there)
        tl.store(facts + row * 3, unit * scale)
        tl.store(facts + row * 3 + 1, scale * tl.sum(xs * sum1, 0))
        tl.store(facts + row * 3 + 2, scale * tl.sum(xs * sum2, 0))
    number = (z / unit).to(tl.int32)
    low = ((number + 128) & 255) - 128
    number = (number - low) >> 8
    middle = ((number + 128) & 255) - 128
    high = (number - middle) >> 8
    if PLANES:
        number = ((high & 255) << 16) | ((middle & 255) << 8) | (low & 255)
        for i in tl.static_range(0, 24, 4):  # four planes at once, a byte of a word each
            spread = ((((number >> i) & 15) * 0x204081) & 0x01010101) << bit[None, :]
            word = tl.sum(spread, 1)
            for j in tl.static_range(4):
                to = digits + (row * 24 + i + j) * WIDTH + place
                tl.store(to, ((word >> (8 * j)) & 255).to(tl.int8), mask=place < WIDTH)
    else:
        to = digits + (((row // 4) * 8 + bit[None, :]) * 16 + 3 * (row % 4)) * WIDTH + place[:, None]
        tl.store(to, high.to(tl.int8), mask=inside)
        tl.store(to + WIDTH, middle.to(tl.int8), mask=inside)
        tl.store(to + 2 * WIDTH, low.to(tl.int8), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _codes(codes, ids, there, start: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """C bytes of neurons' codes [N, C]."""
    place = start + tl.arange(0, C)
    at = codes + ids.to(tl.int64)[:, None] * R + place[None, :]
    return tl.load(at, mask=there[:, None] & (place < R)[None, :], other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _first_codes(codes, ids, there, R: tl.constexpr, C: tl.constexpr, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first NUM of them."""
    tiles = ()
    for i in tl.static_range(NUM):
        tiles += (_codes(codes, ids, there, i * C, R, C),)  # type: ignore[assignment]
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def _of_bits(digits, start: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The digits [C, 16] of each of the eight bits of C bytes."""
    place, column, found = start + tl.arange(0, C), tl.arange(0, 16), ()
    inside = (place < R)[:, None] & (column < 16)[None, :]
    for bit in tl.static_range(8):
        at = (bit * 16 + column[None, :]) * WIDTH + place[:, None]
        found += (tl.load(digits + at, mask=inside, other=0),)  # type: ignore[assignment]
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _bit_of(byte, BIT: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 or 1, int8: of four bytes of a register at once, which the compiler does not find by itself."""
    if PACKED:
        return tl.inline_asm_elementwise(
            f"shr.b32 $0, $1, {BIT}; and.b32 $0, $0, 0x01010101;", "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return ((byte >> BIT) & 1).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def _multiplied(  # type: ignore[no-untyped-def]
    tiles, codes, ids, there, digits, R: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    T: tl.constexpr, REST: tl.constexpr, AHEAD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """int32 [N, 16]: of each neuron, the sums of digits where its bits are set; digits [8, 16, WIDTH]: its matrix's;
    tiles: the first AHEAD of the codes, of T, with REST bytes after them. While a tile is multiplied, the next one's
    digits are under way."""
    sums, of_bits = tl.zeros([N, 16], tl.int32), _of_bits(digits, 0, R, WIDTH, C)
    for i in tl.static_range(T):
        if i + 1 < T:
            of_bits += _of_bits(digits, (i + 1) * C, R, WIDTH, C)
        elif REST > 0:
            rest, of_rest = _codes(codes, ids, there, T * C, R, REST), _of_bits(digits, T * C, R, WIDTH, REST)
        if i + AHEAD < T:
            tiles += (_codes(codes, ids, there, (i + AHEAD) * C, R, C),)
        for bit in tl.static_range(8):
            sums = tl.dot(_bit_of(tiles[i], bit, PACKED), of_bits[8 * i + bit], sums, out_dtype=tl.int32)
    if REST > 0:
        for bit in tl.static_range(8):
            sums = tl.dot(_bit_of(rest, bit, PACKED), of_rest[bit], sums, out_dtype=tl.int32)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _put_together(sums, row: tl.constexpr):  # type: ignore[no-untyped-def]
    """The three digits of a row of the group as one number, fp32 [N]."""
    column = tl.arange(0, 16) - 3 * row
    worth = tl.where(column == 0, 65536.0, tl.where(column == 1, 256.0, tl.where(column == 2, 1.0, 0.0)))
    return tl.sum(sums.to(tl.float32) * worth[None, :], 1)


@triton.jit  # type: ignore[untyped-decorator]
def _masks(  # type: ignore[no-untyped-def]
    digits, facts, gate_codes, gate_scale, gate_bias, up_codes, up_scale, up_bias, norm, scores, mask, threshold,
    gate_noise, up_noise, num, first, num_neurons, rows, gate_bytes: tl.constexpr, up_bytes: tl.constexpr,
    WIDTH: tl.constexpr, N: tl.constexpr, C: tl.constexpr, GATE_T: tl.constexpr, GATE_REST: tl.constexpr,
    UP_T: tl.constexpr, UP_REST: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    SCORED: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    ids, group = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    there = ids < num
    up_ahead: tl.constexpr = min(AHEAD, UP_T)
    gate_ahead: tl.constexpr = min(AHEAD, GATE_T)
    up_tiles = _first_codes(up_codes, ids, there, up_bytes, C, up_ahead)
    own_up_scale, own_up_bias = (
        tl.load(up_scale + ids, mask=there, other=0.0),
        tl.load(up_bias + ids, mask=there, other=0.0),
    )
    own_scale, own_bias, own_norm = own_up_scale, own_up_bias, own_up_scale
    if GATED:
        own_scale, own_bias = (
            tl.load(gate_scale + ids, mask=there, other=0.0),
            tl.load(gate_bias + ids, mask=there, other=0.0),
        )
    else:
        own_norm = tl.load(norm + ids, mask=there, other=0.0)
    after_others(CHAINED)
    own = digits + group * 128 * WIDTH
    up_sums = _multiplied(
        up_tiles, up_codes, ids, there, own + WIDTH - up_bytes, up_bytes, WIDTH, N, C, UP_T, UP_REST, up_ahead, PACKED
    )
    if GATED:
        gate_tiles = _first_codes(gate_codes, ids, there, gate_bytes, C, gate_ahead)
        gate_sums = _multiplied(
            gate_tiles, gate_codes, ids, there, own, gate_bytes, WIDTH, N, C, GATE_T, GATE_REST, gate_ahead, PACKED
        )
    for i in tl.static_range(ROWS):
        row = group * 4 + i
        unit = 2.0 * tl.load(facts + row * 3)
        up = unit * _put_together(up_sums, i) - tl.load(facts + row * 3 + (2 if GATED else 1))
        up += own_up_bias
        gate = up
        if GATED:
            gate = unit * _put_together(gate_sums, i) - tl.load(facts + row * 3 + 1)
            gate += own_bias
        score = scored(gate, up, own_scale, own_up_scale, own_norm, gate_noise, up_noise, ACT, GATED)
        stored = there & (row < rows)
        if SCORED:
            tl.store(scores + row * num + ids, score, mask=stored)
        tl.store(mask + row * num_neurons + first + ids, (score >= threshold).to(tl.uint8), mask=stored)


def plane_masks(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    sketch: DeviceSketch,
    threshold: float,
    scratch: Digits,
    h: torch.Tensor,
    mask: torch.Tensor,
    scores: torch.Tensor | None = None,
    trail: Trail | None = None,
) -> None:
    """mask uint8 [B, F] of x fp32 [B, D] once it has passed an RMS norm: 1 where the score reaches the threshold, and
    for neurons that have no sketch nothing is written. h fp32 [B, D]: gets x normed. scores fp32 [B, K]: gets the
    scores. trail: gets x and where the decoder is, as soon as it is there."""
    bits, rows = by_bits(x), x.shape[0]
    make_digits(x, norm, eps, sketch, scratch, h, bits, trail)
    if bits:
        _score_bits(sketch, threshold, scratch, mask, scores, rows)
        return
    up, gate, width, num = sketch.up, sketch.gate, sketch.width, sketch.up.codes.shape[0]
    first = up if gate is None else gate
    sizes = first.codes.shape[1], up.codes.shape[1]
    (gate_tiles, gate_rest), (up_tiles, up_rest) = (_tiles(size) for size in sizes)
    _masks[(triton.cdiv(num, _NEURONS), triton.cdiv(rows, _ROWS))](
        scratch.digits, scratch.facts, first.codes, first.scale, first.bias, up.codes, up.scale, up.bias,
        up.scale if sketch.down_norm is None else sketch.down_norm, up.scale if scores is None else scores, mask,
        threshold, first.noise, up.noise, num, sketch.first, sketch.num_neurons, rows, *sizes, WIDTH=width, N=_NEURONS,
        C=_BYTES, GATE_T=gate_tiles, GATE_REST=gate_rest, UP_T=up_tiles, UP_REST=up_rest, ROWS=min(rows, _ROWS),
        ACT=ACTS[sketch.act], GATED=gate is not None, SCORED=scores is not None, PACKED=compiled(),
        AHEAD=_AHEAD, **chained(x),
    )  # fmt: skip


def make_digits(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    sketch: DeviceSketch,
    scratch: Digits,
    h: torch.Tensor,
    bits: bool,
    trail: Trail | None = None,
) -> None:
    """What the vectors' side of the products is, as digits or as their bits; see `plane_masks`."""
    (rows, hidden), width, up = x.shape, sketch.width, sketch.up
    first = up if sketch.gate is None else sketch.gate
    left = (h, h, 0) if trail is None else (trail.x, trail.at, trail.layer * PLACES)
    if bits and laid_out(x):
        from runtime.kernels.gluon_digits import BYTES, digits_in_bits

        digits_in_bits[(triton.cdiv(width, BYTES) + 1, rows)](
            x, norm, sketch.dimension, sketch.coefficient, sketch.largest, first.whole, up.whole, scratch.digits,
            scratch.facts, h, *left, eps, D=hidden, W=_COLUMNS_AT_ONCE, T=triton.cdiv(hidden, _COLUMNS_AT_ONCE),
            WIDTH=width, TRAIL=trail is not None, num_warps=4, **chained(x, early=True),
        )  # fmt: skip
        return
    _digits[(triton.cdiv(width, _DIGIT_BYTES), rows)](
        x, norm, sketch.dimension, sketch.coefficient, sketch.largest, first.whole, up.whole, scratch.digits,
        scratch.facts, h, *left, eps, D=hidden, WIDE=triton.next_power_of_2(hidden), WIDTH=width,
        C=_DIGIT_BYTES, PLANES=bits, TRAIL=trail is not None, **chained(x),
    )  # fmt: skip


def bits_of_wanted(scoring: Scoring, words: torch.Tensor) -> int:
    """The second half of `plane_masks` of a row; words int64: bit j of word i gets whether neuron 64 i + j of those
    that have a sketch is wanted. How many words that are."""
    num: int = scoring.sketch.up.codes.shape[0]
    _score_bits(scoring.sketch, scoring.threshold, scoring.digits, scoring.mask, None, 1, words, scoring.given)
    return -(-num // _WORD)


def _score_bits(
    sketch: DeviceSketch,
    threshold: float,
    scratch: Digits,
    mask: torch.Tensor,
    scores: torch.Tensor | None,
    rows: int,
    words: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> None:
    """The second half of `plane_masks` by products of bits; words and given as of `Scoring`."""
    from runtime.kernels.gluon_scores import score_bits

    up, gate, num = sketch.up, sketch.gate, sketch.up.codes.shape[0]
    first = up if gate is None else gate
    codes = [p.codes.view(torch.int32) for p in (first, up)]
    sizes = [c.shape[1] for c in codes]
    warps = 2 if rows == 1 else 1
    together = 16 * warps if words is None else _WORD  # a word's second half is there, too
    ahead = [min(_WORDS_AHEAD if gate is not None else 256, triton.cdiv(size, 16) * 16) for size in sizes]
    score_bits[(triton.cdiv(num, together) * (together // (16 * warps)), triton.cdiv(rows, _ROWS))](
        scratch.digits.view(torch.int32), scratch.facts, codes[0], first.scale, first.bias, codes[1], up.scale, up.bias,
        up.scale if sketch.down_norm is None else sketch.down_norm, up.scale if scores is None else scores, mask,
        mask if words is None else words.view(torch.int32), mask if given is None else given, threshold, first.noise,
        up.noise, num, sketch.first, sketch.num_neurons, rows, GATE=sizes[0], UP=sizes[1], WIDTH=sketch.width // 4,
        WARPS=warps, ROWS=min(rows, _ROWS), ACT=ACTS[sketch.act], GATED=gate is not None, SCORED=scores is not None,
        WORDS=words is not None, GIVEN=given is not None, UP_AHEAD=ahead[1], GATE_AHEAD=ahead[0], num_warps=warps,
        **chained(mask, early=words is not None),
    )  # fmt: skip


def _tiles(num_bytes: int) -> tuple[int, int]:
    """Whole tiles of a row of codes, and bytes of a small one after them: half of one, or a quarter."""
    tiles, rest = divmod(num_bytes, _BYTES)
    if tiles == 0 or rest > _BYTES // 2:
        return tiles + 1, 0
    return tiles, 0 if rest == 0 else max(_BYTES // 4, triton.next_power_of_2(rest))
