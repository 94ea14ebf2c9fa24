"""What one step hands to the model, and what the model counts. Plain data: knows neither requests nor text.

Shapes: N rows (new tokens) of the batch, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from cache.stats import Subtractable

BatchKind = Literal["prefill", "decode", "score"]
LogitsKind = Literal["none", "last", "all"]


class Cancelled(Exception):
    """Raised by `check` between layers: nobody waits for this step any more."""


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence's rows of a batch: `length` new tokens from position `start`, their KV in `blocks`."""

    blocks: np.ndarray  # int32 [num_blocks], the whole block table of the sequence
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """prefill and score: N rows of one sequence; decode: N = B rows, one a sequence.

    prefill is computed densely, decode and score with the sparse semantics, row by row. `logits`: of no row, of the
    last row of every sequence, or of all rows.
    """

    kind: BatchKind
    token_ids: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int64 [N]
    sequences: tuple[SequenceView, ...]  # B of them, their lengths add up to N
    logits: LogitsKind


@dataclass(frozen=True, slots=True)
class ModelCounters(Subtractable):
    """What the model has counted since it was loaded. `steps` by kind: sparse, dense, prefill."""

    steps: dict[str, int] = field(default_factory=dict)
    active_neurons: int = 0  # true output magnitude at or above epsilon, among those computed
    predicted_neurons: int = 0
    overflow: int = 0
    predicted_rows: int = 0  # (row, layer) pairs that a predictor was asked about
    switched: int = 0  # layers of sparse steps that were streamed because that was quicker than reading the union
