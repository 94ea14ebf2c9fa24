"""The application over a real socket: uvicorn in a thread, on a free port (in-process transports buffer bodies)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from server.app import create_app
from server.async_engine import AsyncEngine, LoadedModel
from server.config import ServerConfig
from tests.fake_engine import FakeEngine, byte_tokenizer

MODEL = "tiny"
INFO: dict[str, object] = {
    "mode": "sparse",
    "cett": 0.1,
    "device": "cpu",
    "kernel": "generic",
    "io_engine": "pread+direct",
}


@dataclass
class LiveServer:
    url: str
    engine: FakeEngine
    front: AsyncEngine


class _Uvicorn(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextmanager
def live_server(
    engine: FakeEngine | None = None,
    loaded: bool = True,
    max_model_len: int | None = None,
    model: LoadedModel | None = None,
    **config: Any,
) -> Iterator[LiveServer]:
    """A server for the time of the block; `config` goes into ServerConfig. Ends with no request alive.

    `model` is served instead of the engine, where a test brings a real one.
    """
    engine = engine or FakeEngine(byte_tokenizer())
    model = model or LoadedModel(engine, engine.tokenizer, max_model_len or engine.max_model_len, INFO)
    front = AsyncEngine(model if loaded else None)
    app = create_app(front, ServerConfig(**({"served_model_name": MODEL, "version": "1.2.3"} | config)))
    options = uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    http = _Uvicorn(options)
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    assert http.listening.wait(20)
    try:
        yield LiveServer(f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}", engine, front)
    finally:
        http.should_exit = True
        thread.join(20)
        engine.join()
    assert not thread.is_alive()
