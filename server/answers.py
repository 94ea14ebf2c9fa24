"""The two dialects of an answer, completions and chat: pieces of text to OpenAI's JSON objects, whole or in chunks.

Knows field names and shapes; not events, and not connections.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.request import RequestAccount
from server.stream import Choice, Piece, Token, join

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

Json = dict[str, Any]
_LOWEST_LOGPROB = -9999.0  # JSON has no -inf


class Answer:
    """What completions and chat share. num_top: alternatives per token; None: log-probabilities are not asked for."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(
        self,
        model: str,
        choices: Sequence[Choice],
        num_prompt_tokens: int,
        tokenizer: Tokenizer,
        num_top: int | None = None,
        include_usage: bool = False,
        ignored_fields: Sequence[str] = (),
    ) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model, self.choices = model, choices
        self.num_prompt_tokens = num_prompt_tokens
        self.include_usage = include_usage
        self._tokenizer, self._num_top = tokenizer, num_top
        self._ignored = list(ignored_fields)
        self._untold = bool(self._ignored)  # a stream's first chunk has to say so

    # --- whole ---

    def body(self, pieces: Sequence[Piece]) -> Json:
        """The answer in one piece, choices in their order."""
        own = [[piece for piece in pieces if piece.index == i] for i in range(len(self.choices))]
        choices = [self._whole_choice(join(i, some)) for i, some in enumerate(own)]
        return {**self._head(self.whole_object, choices), **self._cost()}

    # --- in chunks ---

    def opening(self) -> list[Json]:
        """The chunks before any text."""
        return []

    def chunks(self, piece: Piece) -> list[Json]:
        raise NotImplementedError

    def usage_chunk(self) -> Json:
        return {**self._head(self.chunk_object, []), **self._cost()}

    def log_fields(self) -> Json:
        """What the log says of the request: how its choices ended, tokens, bytes, hits, seconds."""
        accounts = [choice.account for choice in self.choices if choice.account is not None]
        return {
            "outcome": ",".join(sorted({choice.outcome for choice in self.choices})),
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self._cached_tokens(),
            "completion_tokens": sum(choice.num_tokens for choice in self.choices),
            **(account_json(accounts) if accounts else {}),  # unknown when the client has left
        }

    def _whole_choice(self, piece: Piece) -> Json:
        raise NotImplementedError

    def _chunk(self, choices: list[Json]) -> Json:
        """One chunk. The first one tells the ignored fields too: clients take one without a choice for usage."""
        told = {"coldstream": {"ignored_fields": self._ignored}} if self._untold else {}
        self._untold = False
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(self.chunk_object, choices), **usage, **told}

    def _head(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _cost(self) -> Json:
        completion = sum(choice.num_tokens for choice in self.choices)
        accounts = [choice.account for choice in self.choices if choice.account is not None]
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
        }
        return {"usage": usage, "coldstream": {**account_json(accounts), "ignored_fields": self._ignored}}

    def _cached_tokens(self) -> int:
        """Of the prompts' tokens, those found in the prefix cache. Choices of one prompt share what the first computes,
        so that the least of them says what was there before."""
        found: dict[int, int] = {}
        for choice in self.choices:
            if choice.account is not None:
                own, prompt = choice.account.cached_tokens, id(choice.prompt)
                found[prompt] = min(own, found.get(prompt, own))
        return sum(found.values())

    def _token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no text on their own are spelt out, as OpenAI's completions do."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionAnswer(Answer):
    """object `text_completion`, whole and in chunks."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def chunks(self, piece: Piece) -> list[Json]:
        return [self._chunk([self._whole_choice(piece)])]

    def _whole_choice(self, piece: Piece) -> Json:
        logprobs = None if self._num_top is None else self._logprobs(piece.tokens)
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Json:
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [None if t.logprob is None else _finite(t.logprob.logprob) for t in tokens],
            "tokens": [self._token_text(token.token_id) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens, and the chosen one even when it is not among them."""
        if token.logprob is None:
            return None
        chosen = (token.token_id, token.logprob.logprob)
        return {self._token_text(i): _finite(value) for i, value in (chosen, *reversed(token.logprob.top))}


class ChatAnswer(Answer):
    """objects `chat.completion` and `chat.completion.chunk`."""

    prefix = "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        first = {"role": "assistant", "content": ""}
        return [self._chunk([self._delta(choice.index, first)]) for choice in self.choices]

    def chunks(self, piece: Piece) -> list[Json]:
        out = []
        if piece.text or piece.tokens:
            logprobs = self._logprobs(piece.tokens)
            out.append(self._chunk([self._delta(piece.index, {"content": piece.text}, logprobs=logprobs)]))
        if piece.finish_reason is not None:
            out.append(self._chunk([self._delta(piece.index, {}, finish_reason=piece.finish_reason)]))
        return out

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _whole_choice(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if self._num_top is None:
            return None
        known = [(token, token.logprob) for token in tokens if token.logprob is not None]
        return {
            "content": [
                {
                    **self._entry(token.token_id, logprob.logprob),
                    "top_logprobs": [self._entry(i, value) for i, value in logprob.top[: self._num_top]],
                }
                for token, logprob in known
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._token_text(token_id), "bytes": list(raw), "logprob": _finite(logprob)}


def account_json(accounts: Sequence[RequestAccount]) -> Json:
    """What the choices cost together; bytes by the tier that they came from, seconds added up."""
    bytes_read: Counter[str] = Counter()
    for account in accounts:
        bytes_read.update(account.bytes_read)
    return {
        "bytes_read": dict(bytes_read),
        "cache_lookups": sum(a.cache_lookups for a in accounts),
        "cache_hits": sum(a.cache_hits for a in accounts),
        "stall_s": sum(a.stall_s for a in accounts),
        "queue_s": sum(a.queue_s for a in accounts),
        "prefill_s": sum(a.prefill_s for a in accounts),
        "decode_s": sum(a.decode_s for a in accounts),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
