"""Decode of a large shape with the sets of a trace, against its floor and the reference policy: figures from counts.

Knows a model by what it counts (`Traced`), the trace and the ceilings; not how a step is made.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Protocol

from benchmarks.gpu_floors import Bandwidths, floor_s
from benchmarks.gpu_results import Figures
from benchmarks.traces import Replay
from cache.stats import Subtractable

WARM_TOKENS, TOKENS = 48, 80


@dataclass(frozen=True, slots=True)
class Counted(Subtractable):
    """Since the model was made: neurons of the steps' unions, those resident, and bytes of records read from either
    memory (a neuron that an activation silences reads no down vector); layers that overflowed; records swapped in; and
    those that came early, whose bytes count as if they had come when they were wanted, or not at all."""

    lookups: int
    hits: int
    missed_bytes: int
    hit_bytes: int
    overflow: int
    swapped: int
    fetched: int = 0
    fetched_hits: int = 0


class Traced(Protocol):
    """A large shape whose sets a trace decides. fixed_bytes: of GPU memory that every step reads besides records:
    attention, head, predictor; keys and values of the context are added to them."""

    fixed_bytes: int
    slots_per_layer: tuple[int, ...]

    def decode(self, num_steps: int) -> list[float]:
        """Seconds of each step, the last ones included in what is counted."""

    def counted(self) -> Counted: ...


def measure_decode(
    model: Traced, replay: Replay, record_bytes: int, ceilings: Figures, rows: int = 1, tokens: int = TOKENS
) -> Figures:
    """After a warm-up, in which the hot set settles on the text. Means over the same steps, swaps included.

    What the reference policy misses is added by benchmarks/gpu_reference.py, where no GPU waits for it.
    """
    model.decode(WARM_TOKENS)
    before = model.counted()
    times = model.decode(tokens)
    moved = model.counted() - before
    step_s, bandwidths = statistics.fmean(times), Bandwidths.of(ceilings, record_bytes)
    missed, resident = moved.missed_bytes / tokens, model.fixed_bytes + moved.hit_bytes / tokens
    floor = floor_s(missed, resident, bandwidths)
    return {
        "rows": rows,
        "tokens_per_s": rows / step_s,
        "s_per_step": step_s,
        "s_per_step_median": statistics.median(times),
        "floor_s": floor,
        "over_floor": step_s / floor,
        "active_share": moved.lookups / tokens / (replay.num_layers * replay.num_neurons),
        "slots_per_layer": list(model.slots_per_layer),
        "warm_steps": WARM_TOKENS,
        "steps": tokens,
        "misses_per_step": (moved.lookups - moved.hits) / tokens,
        "missed_bytes_per_step": missed,
        "resident_bytes_per_step": resident,
        "link_bytes_per_s": missed / step_s,
        "link_share": missed / step_s / ceilings["pinned_copy_bytes_per_s"],
        "overflow": moved.overflow,
        "swapped_per_step": moved.swapped / tokens,
        "fetched_per_step": moved.fetched / tokens,
        "fetched_hits_per_step": moved.fetched_hits / tokens,
    }


def measure_ahead(plain: Traced, ahead: Traced, rounds: int = 5, steps: int = 24) -> Figures:
    """The same steps without and with reading ahead, by turns, since links drift; the rounds' medians, and their mean
    ratio."""
    for model in (plain, ahead):
        model.decode(WARM_TOKENS)
    before = ahead.counted()
    pairs = [[statistics.median(model.decode(steps)) for model in (plain, ahead)] for _ in range(rounds)]
    moved, num = ahead.counted() - before, rounds * steps
    return {
        "s_per_step_without": [one for one, _ in pairs],
        "s_per_step_with": [two for _, two in pairs],
        "times_faster": statistics.fmean(one / two for one, two in pairs),
        "misses_per_step": (moved.lookups - moved.hits) / num,
        "fetched_per_step": moved.fetched / num,
        "fetched_hits_per_step": moved.fetched_hits / num,
    }


def measure_dense(model: Traced, ffn_bytes: int, ceilings: Figures, tokens: int = 32) -> Figures:
    """Every weight is read by every step, out of GPU memory; held against the bandwidth of a read kernel."""
    model.decode(8)
    step_s = statistics.median(model.decode(tokens))
    bound_s = (model.fixed_bytes + ffn_bytes) / max(ceilings["read_bytes_per_s"].values())
    return {"tokens_per_s": 1 / step_s, "s_per_step": step_s, "bound_s": bound_s, "share_of_bound": bound_s / step_s}
