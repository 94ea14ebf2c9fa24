"""What the teacher's texts begin with, and the windows of given texts. Knows token ids; not who continues them.

Half of the texts begin with an opener (the head of a chat up to where the user speaks: the model writes the question
too, as in Magpie, arXiv 2406.08464), half continue a few tokens of the given texts; without texts, a random token.
All is a function of a seed. Shapes: S windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.teacher import FREE

_CONTINUED = (8, 64)  # tokens of a text that are given, from and to


@dataclass(frozen=True, slots=True)
class Prompts:
    """openers: token ids of each; text: all given texts, int64 [N], perhaps empty; any token id is below vocab_size."""

    openers: tuple[tuple[int, ...], ...]
    text: torch.Tensor
    vocab_size: int

    @classmethod
    def make(cls, openers: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], vocab_size: int) -> Prompts:
        joined = torch.tensor([i for text in texts for i in text], dtype=torch.int64)
        return cls(tuple(tuple(o) for o in openers if o), joined, vocab_size)

    def forced(self, num: int, length: int, seed: int) -> torch.Tensor:
        """Beginnings of `num` texts, int64 [S, T]: token ids first, FREE after them."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.full((num, length), FREE, dtype=torch.int64)
        for row in rows:
            start = self._beginning(length, generator)
            row[: start.numel()] = start
        return rows

    def _beginning(self, length: int, generator: torch.Generator) -> torch.Tensor:
        if self.openers and _draw(2, generator) == 0:
            opener = torch.tensor(self.openers[_draw(len(self.openers), generator)])
            return opener[: length - 1]
        low, high = _CONTINUED
        given = min(low + _draw(high - low, generator), length // 2, self.text.numel())
        if given:
            start = _draw(self.text.numel() - given + 1, generator)
            return self.text[start : start + given]
        return torch.tensor([_draw(self.vocab_size, generator)])

    def windows(self, num: int, length: int, seed: int) -> torch.Tensor:
        """Random windows of the texts, int64 [S, T]; the texts must have `length` tokens."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(self.text.numel() - length + 1, (num,), generator=generator)
        return self.text[starts[:, None] + torch.arange(length)]


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))
