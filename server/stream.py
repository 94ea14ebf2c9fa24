"""From token events to pieces of text, and from chunks to the bytes of a stream. Knows text and stop strings.

`fold` turns the events of one HTTP request into pieces; whole answers and streamed ones are made of the same pieces, so
that their texts are equal. `frame` is the one function that writes server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.request import FinishReason, RequestAccount, TokenEvent, TokenLogprob
from runtime.tokenizer import IncrementalDecoder
from server.errors import GenerationError, from_coldstream, internal_error

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer
    from server.async_engine import Generation

logger = logging.getLogger(__name__)

DONE = "[DONE]"
_UTF8_BYTES = 4  # the longest character


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text that they were made of when there was one."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer's text. offset: characters before it."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice gains: text, the tokens that it begins with, perhaps the end."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens of a prompt that are read so far."""

    index: int
    done: int
    total: int


class StopMatcher:
    """Finds the first stop string in text that comes in parts; text that may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, final: bool = False) -> tuple[str, bool]:
        """(text that is certainly in the answer, whether a stop string came after it). `final`: no more text comes."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, but not all, of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Choice:
    """One choice of an answer while it grows.

    `continuing`: the text goes on from the prompt (completions), and does not start afresh (chat).
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        echo: bool = False,
        continuing: bool = False,
    ) -> None:
        self.index, self.prompt = index, prompt
        self.num_tokens = 0
        self.account: RequestAccount | None = None
        self.outcome = "cancelled"  # until it ends otherwise: a finish reason, or what failed
        self._tokenizer = tokenizer
        self._stops = StopMatcher(stops)
        self._echo = echo
        self._continuing = continuing
        self._finished = False
        self._tokens: list[Token] = []  # not given out yet
        self._length = self._given = 0  # characters decoded, and given out
        self._decoder = IncrementalDecoder(tokenizer, continuing=continuing)
        if continuing:
            for token_id in prompt.ids[-_UTF8_BYTES:]:  # the prompt may end within a character
                self._decoder.push(token_id)

    def take(self, event: TokenEvent) -> Piece | Progress | None:
        """What the event adds, if anything. Raises GenerationError when the engine gave the request up."""
        self.account = event.account or self.account
        if self._finished:  # a stop string was found; what the engine did before it heard of it is not ours
            return None
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.outcome = event.failure or "error"
            raise GenerationError(event.error or "The request was aborted.", event.failure)
        if event.token_id is None and event.finish_reason is None and event.prompt_logprobs is None:
            return Progress(self.index, event.prompt_tokens_done, len(self.prompt.ids))
        piece = self._grow(self._take_prompt(event), event)
        return piece if piece.text or piece.tokens or piece.finish_reason else None

    def _grow(self, echoed: str, event: TokenEvent) -> Piece:
        """The piece of an event that carries content, `echoed` before it."""
        final = event.finish_reason is not None
        text, stopped = self._stops.push(self._take_token(event), final)
        self._given += len(echoed) + len(text)
        self._finished = final or stopped
        tokens = self._release(everything=final and not stopped)
        reason = FinishReason.STOP if stopped else event.finish_reason
        if reason is not None:
            self.outcome = reason.value
        return Piece(self.index, echoed + text, tokens, None if reason is None else reason.value)

    def _take_prompt(self, event: TokenEvent) -> str:
        """The prompt's own text and tokens, once, when they are to be echoed."""
        if not self._echo:
            return ""
        self._echo = False
        decoder = IncrementalDecoder(self._tokenizer)
        text = ""
        logprobs = event.prompt_logprobs or (None,) * len(self.prompt.ids)
        for token_id, logprob in zip(self.prompt.ids, logprobs, strict=True):
            self._tokens.append(Token(token_id, len(text), logprob))
            text += decoder.push(token_id)
        text = text if self.prompt.text is None else self.prompt.text
        self._length = len(text)
        return text

    def _take_token(self, event: TokenEvent) -> str:
        """The text that the event's token completes; an end token is counted, but has none."""
        text = ""
        if event.token_id is not None:
            self.num_tokens += 1
            is_end = event.finish_reason is FinishReason.STOP
            if not is_end or self._continuing:  # lm-eval takes the last of a completion's logprobs for a made token
                self._tokens.append(Token(event.token_id, self._length, event.logprob))
            if not is_end:
                text = self._decoder.push(event.token_id)
        if event.finish_reason is not None:
            text += self._decoder.flush()
        self._length += len(text)
        return text

    def _release(self, everything: bool) -> tuple[Token, ...]:
        """The tokens whose text has begun to be given out."""
        out = [token for token in self._tokens if everything or token.offset < self._given]
        del self._tokens[: len(out)]
        return tuple(out)


async def fold(generation: Generation, choices: Sequence[Choice]) -> AsyncIterator[Piece | Progress]:
    """The pieces of all choices as they come; ends when the engine has ended every request."""
    async for index, event in generation:
        piece = choices[index].take(event)
        if isinstance(piece, Piece) and piece.finish_reason is not None and event.finish_reason is None:
            generation.stop(index)
        if piece is not None:
            yield piece


def join(index: int, pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason is not None]
    return Piece(index, text, tokens, reasons[-1] if reasons else None)


def frame(data: dict[str, Any] | str, comment: bool = False) -> bytes:
    """One server-sent event, or one comment line. JSON is written in ASCII: a line separator inside of a text (\\n, but
    U+2028 as well, on which some clients split) would end the event."""
    if comment:
        return f": {data}\n\n".encode()
    text = (
        data if isinstance(data, str) else json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    )
    return f"data: {text}\n\n".encode()


async def error_frame(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`frames`; when they fail, the error as the last frame, since the status has been sent long ago."""
    try:
        async for one in frames:
            yield one
    except GenerationError as error:
        yield frame(from_coldstream(error).body())
    except Exception:
        logger.exception("a stream failed")
        yield frame(internal_error().body())


async def with_pings(frames: AsyncIterator[bytes], interval_s: float) -> AsyncIterator[bytes]:
    """`frames`, with a comment line whenever nothing came for a while, so that nobody takes the line for dead."""
    while True:
        pending = asyncio.ensure_future(anext(frames, None))
        try:
            while not (await asyncio.wait({pending}, timeout=interval_s))[0]:
                yield frame("ping", comment=True)
        finally:
            pending.cancel()
        one = pending.result()
        if one is None:
            return
        yield one


class EventStream(StreamingResponse):
    """A streamed answer. `close` runs at the last byte, or when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(frames, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
