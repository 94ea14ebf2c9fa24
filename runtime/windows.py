"""Calibration text as windows of tokens, each used for one purpose only: what is fitted is not judged by the same text.

Knows texts and token ids; not what a model makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache.errors import ColdstreamError, UnsupportedError
from runtime.tokenizer import Tokenizer

WINDOW = 512  # tokens of a window: each is a text of its own
_SHORTEST = 128  # of a window, when the text is short
_STATISTICS, _THRESHOLDS, _VALIDATION = 9, 2, 7  # windows


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows [S, T] by purpose, spread over the whole text and drawn once, always alike.

    statistics: sketches, order, frequencies. thresholds: CETT. validation: perplexity, the contract.
    """

    statistics: torch.Tensor
    thresholds: torch.Tensor
    validation: torch.Tensor

    @property
    def length(self) -> int:
        return self.statistics.shape[1]

    def sizes(self) -> dict[str, int]:
        """Tokens of each."""
        return {name: getattr(self, name).numel() for name in ("statistics", "thresholds", "validation")}


def split_windows(tokenizer: Tokenizer, text: Path, vocab_size: int) -> Windows:
    """Raises ColdstreamError when the text is missing, short, or not the model's."""
    ids = read_ids(tokenizer, text, vocab_size)
    wanted = _STATISTICS + _THRESHOLDS + _VALIDATION
    length = max(_SHORTEST, min(WINDOW, ids.numel() // wanted))
    num = min(wanted, ids.numel() // length)
    starts = np.linspace(0, ids.numel() - length, num).astype(int)
    windows = torch.stack([ids[s : s + length] for s in starts])
    drawn = torch.from_numpy(np.random.default_rng(0).permutation(num))
    thresholds = max(1, num * _THRESHOLDS // wanted)
    validation = max(1, num * _VALIDATION // wanted)
    for_thresholds, for_validation, rest = drawn.tensor_split([thresholds, thresholds + validation])
    return Windows(windows[rest], windows[for_thresholds], windows[for_validation])


def read_text(flag: str, path: Path) -> str:
    """What is in the text file that `flag` names. ColdstreamError with both where that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ColdstreamError(f"{flag} {path}: not UTF-8, at byte {error.start}") from error
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise ColdstreamError(f"{flag} {path}: {reason}") from error


def read_ids(tokenizer: Tokenizer, text: Path, vocab_size: int) -> torch.Tensor:
    """Token ids of a calibration text, int64 [N], N at least WINDOW. Raises ColdstreamError."""
    ids = torch.tensor(tokenizer.encode(read_text("--calibration", text), add_special=False), dtype=torch.int64)
    if ids.numel() < WINDOW:
        raise ColdstreamError(f"--calibration {text}: {ids.numel()} tokens, at least {WINDOW} are needed")
    if int(ids.max()) >= vocab_size:
        raise UnsupportedError(
            f"the tokenizer has token {int(ids.max())}, the model's vocabulary ends at {vocab_size - 1}"
        )
    return ids
