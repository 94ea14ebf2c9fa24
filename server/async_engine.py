"""The engine as the event loop sees it: requests in, events out of an `asyncio.Queue`; closing aborts.

Knows requests, events and whether a model is there yet; not text, and not HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, Self

from runtime.request import FinishReason, Request, TokenEvent
from server.errors import NotReadyError

if TYPE_CHECKING:
    from runtime.engine_stats import EngineSnapshot
    from runtime.tokenizer import Tokenizer


class EngineLike(Protocol):
    """What is asked of an engine (`runtime.engine.Engine`). Every method may be called from any thread.

    capacity: requests that run or wait at once, at most.
    """

    @property
    def capacity(self) -> int: ...

    def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> None: ...

    def abort(self, request_id: str, reason: FinishReason = ...) -> None: ...

    def snapshot(self) -> EngineSnapshot: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be asked. `info` is shown as it is in /health, /v1/models and `coldstream_info`."""

    engine: EngineLike
    tokenizer: Tokenizer
    max_model_len: int
    info: Mapping[str, object] = field(default_factory=dict)


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Readiness:
    """Where the server stands. Written by the thread that loads, read by the event loop; plain assignments only."""

    def __init__(self) -> None:
        self.state = State.LOADING
        self.stage = "starting"
        self.share = 0.0  # of the stage, 0..1

    def progress(self, stage: str, share: float) -> None:
        """Says how far loading is. Fit to be given to `runtime.load.load`."""
        self.stage, self.share = stage, share

    def sentence(self) -> str:
        """Why no request is taken, for the user."""
        if self.state is State.LOADING:
            return f"The model is being loaded ({self.stage}, {self.share:.0%}); try again later."
        return "The server is shutting down and takes no more requests."


class Generation:
    """The events of the requests behind one HTTP request, as (index of the request, event), in order of arrival.

    Everything is submitted at once, so that a refusal is known before an answer begins; raises as `Engine.submit`.
    `close` aborts what is not over; it must be called, and may be called twice.
    """

    def __init__(self, engine: EngineLike, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self._open: dict[int, str] = {}  # index -> request id
        try:
            for index, request in enumerate(requests):
                engine.submit(request, self._listener(index))
                self._open[index] = request.request_id
        except BaseException:
            self.close()
            raise

    def _listener(self, index: int) -> Callable[[TokenEvent], None]:
        def on_event(event: TokenEvent) -> None:  # in the engine's thread
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return on_event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenEvent]:
        if not self._open:
            raise StopAsyncIteration
        index, event = await self._queue.get()
        if event.finish_reason is not None:
            self._open.pop(index, None)
        return index, event

    def stop(self, index: int) -> None:
        """Ends one request as a success: its text is complete. Its last event is still to come."""
        if index in self._open:
            self._engine.abort(self._open[index], FinishReason.STOP)

    def close(self) -> None:
        """Aborts every request that is not over."""
        for request_id in self._open.values():
            self._engine.abort(request_id)
        self._open.clear()


class AsyncEngine:
    """An engine that may still be loading. `attach` makes it ready, `drain` makes it refuse; both from any thread."""

    def __init__(self, model: LoadedModel | None = None) -> None:
        self.readiness = Readiness()
        self._model: LoadedModel | None = None
        if model is not None:
            self.attach(model)

    def attach(self, model: LoadedModel) -> None:
        """The model is loaded, warm and its engine started. Keeps a drain that came in the meantime."""
        self._model = model
        if self.readiness.state is State.LOADING:
            self.readiness.state = State.READY

    def drain(self) -> None:
        """Requests are refused from now on; those that run go on."""
        self.readiness.state = State.DRAINING

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, once there is one, whether or not requests are taken."""
        return self._model

    def ready_model(self) -> LoadedModel:
        """The model, when requests are taken. Raises NotReadyError."""
        if self._model is None or self.readiness.state is not State.READY:
            raise NotReadyError(self.readiness.sentence())
        return self._model

    def generate(self, requests: Sequence[Request]) -> Generation:
        """Submits requests. Call it in the event loop. Raises NotReadyError, and as `Engine.submit`."""
        return Generation(self.ready_model().engine, requests)
