"""Answers that fit a JSON schema: which tokens may come next. Knows schemas and the bytes of tokens, not requests.

The automaton is llguidance's (an Earley parser over a lexer of derivatives, the mask computed along the vocabulary's
trie): https://github.com/guidance-ai/llguidance. Shapes: V rows of the model's output.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from runtime.schema_grammar import SchemaError, grammar, limits, reason

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer


class Constraint:
    """Where one answer stands in its schema. Not for several threads at once."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> torch.Tensor:
        """bool [V]: the tokens that may come next; once the answer is complete, the end tokens alone.

        Raises SchemaError when the schema has grown too complex on the way.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))

    def advance(self, token_id: int) -> None:
        """Takes the token that was chosen. Raises SchemaError for one that was not allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SchemaError(f"The answer could not be held to its JSON schema: {reason(self._matcher.get_error())}")


class ConstraintCompiler:
    """Makes the constraints of one model. `compile` may be called from any thread.

    The first call builds the trie of the vocabulary (some tenths of a second and 100 bytes a token, then kept).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._lock = threading.Lock()
        self._trie: LLTokenizer | None = None

    def compile(self, schema: str) -> Constraint:
        """The constraint at its start. Raises SchemaError, also for a model that has no end token."""
        matcher = LLMatcher(self._built(), grammar(schema), log_level=0, limits=limits())
        if matcher.is_error():
            raise SchemaError(f"The JSON schema cannot be used: {reason(matcher.get_error())}")
        return Constraint(matcher, self._vocab_size)

    def _built(self) -> LLTokenizer:
        if not self._eos_ids:
            raise SchemaError("This model has no end token, so that no answer can be held to a schema.")
        with self._lock:
            if self._trie is None:
                words = TokenizerWrapper(_Words(self._tokenizer, self._vocab_size, self._eos_ids))
                self._trie = LLTokenizer(words, n_vocab=self._vocab_size, eos_token=list(self._eos_ids))
            return self._trie


class _Words:
    """A vocabulary as llguidance wants it: bytes of every token, rows that only pad the model's output left empty."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted({i for i in (*tokenizer.special_ids, *eos_ids) if i < vocab_size})
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special=False, allow_special=False)
