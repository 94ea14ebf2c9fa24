"""`Server`: the process behind `coldstream serve`, from the socket to the exit code.

Listens first, so that /health answers while the model is loaded in a thread of its own; on SIGTERM or SIGINT refuses
new requests, lets running ones end within the drain timeout, and leaves with 0. Knows threads and signals, not routes.
"""

from __future__ import annotations

import json
import logging
import shlex
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console
from rich.markup import escape

from cache.errors import ColdstreamError
from server.app import create_app
from server.arenas import limit_arenas
from server.async_engine import AsyncEngine, LoadedModel
from server.config import ServerConfig
from server.load_bar import LoadBar
from server.plan_table import plan_table
from server.settings import Settings, api_keys, load_options, pack_options, plan_options

if TYPE_CHECKING:
    from runtime.load import Loaded

logger = logging.getLogger(__name__)

_FLUSH_S = 5  # connections get this long to take what was written, once no request runs any more
_BACKLOG = 2048


class _Stopped(BaseException):
    """Ends loading from within: the server is to go away. No Exception, so that nobody takes it for a failure."""


class _Uvicorn(uvicorn.Server):
    """uvicorn that asks `Server` what a signal means; listens on until told that it may leave."""

    def __init__(self, config: uvicorn.Config, owner: Server) -> None:
        super().__init__(config)
        self._owner = owner

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._owner.stop()


class Server:
    """One model over HTTP. Construct, `run` once in the main thread."""

    def __init__(self, model: str, settings: Settings, console: Console) -> None:
        self._model, self._settings, self._console = model, settings, console
        self._name = settings.served_model_name or display_name(model)
        self._engine = AsyncEngine()
        self._stopping = threading.Event()
        self._loaded: Loaded | None = None
        self._failure: BaseException | None = None
        self._url = ""
        config = ServerConfig(
            self._name, api_keys(settings), cors_origins=settings.cors_origin, max_body_bytes=settings.max_body
        )
        self._needs_key = bool(config.api_keys)
        app = create_app(self._engine, config)
        options = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_FLUSH_S
        )
        self._http = _Uvicorn(options, self)

    def run(self) -> int:
        """Serves until a signal; returns the exit code. Raises ColdstreamError when the model cannot be loaded."""
        limit_arenas()
        listener = listen(self._settings.host, self._settings.port)
        self._url = url_of(self._settings.host, listener.getsockname()[1])
        self._say(f"listening on {self._url}; loading {self._model}")
        loader = threading.Thread(target=self._load, name="load", daemon=True)
        before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
        for sig in before:
            signal.signal(sig, self._http.handle_exit)  # from the first moment; uvicorn installs the same one itself
        loader.start()
        try:
            self._http.run(sockets=[listener])
        finally:
            listener.close()
            self._end(loader)
            for sig, handler in before.items():
                signal.signal(sig, handler)
        if self._failure is not None:
            raise self._failure
        return 0

    def stop(self) -> None:
        """Drains and leaves; called once more, leaves at once. Returns without waiting: it runs inside a signal."""
        timeout_s = 0.0 if self._stopping.is_set() else self._settings.drain_timeout
        self._stopping.set()
        self._engine.drain()
        threading.Thread(target=self._drain, args=(timeout_s,), name="drain", daemon=True).start()

    def _drain(self, timeout_s: float) -> None:
        if self._loaded is not None:
            self._say(f"draining: up to {timeout_s:g} s for running requests")
            self._loaded.engine.shutdown(timeout_s)
        self._http.should_exit = True

    def _load(self) -> None:
        """In a thread: plan, pack when needed, load, announce. Whatever goes wrong is raised by `run`."""
        try:
            self._load_model()
        except _Stopped:
            pass
        except BaseException as error:
            self._failure = error
            self._http.should_exit = True

    def _load_model(self) -> None:
        from runtime.load import load, open_plan

        self._progress("importing", 1.0)
        options = plan_options(self._settings), pack_options(self._settings)
        plan = open_plan(self._model, *options)  # refuses a budget before anything is packed
        if self._settings.log_format == "json":
            logger.info("memory plan", extra={"fields": {"plan": plan.to_json()}})
        else:
            self._console.print(plan_table(plan))
        with LoadBar(self._console) as bar:
            loaded = load(
                self._model, load_options(self._settings), lambda stage, share: self._progress(stage, share, bar)
            )
        loaded.engine.start(self._engine_failed)
        self._loaded = loaded
        self._engine.attach(LoadedModel(loaded.engine, loaded.tokenizer, loaded.plan.max_model_len, loaded.info))
        if not self._stopping.is_set():
            self._announce(loaded)

    def _say_unused(self, info: Mapping[str, object]) -> None:
        """What was asked for and cannot be had in the mode that the model is served in."""
        if self._settings.audit_rate and (info["mode"] != "sparse" or info["device"] != "cpu"):
            here = f"this is mode {info['mode']} on {info['device']}"
            self._say(f"--audit-rate has no effect: audits are made in mode sparse on a CPU; {here}")

    def _engine_failed(self) -> None:
        """In the engine's thread, which is at its end: a server that can serve nothing any more leaves with 1, so that
        whoever supervises it starts another."""
        self._engine.drain()
        self._failure = ColdstreamError("the engine has ended because of an error of its own; the log above has it")
        self._http.should_exit = True

    def _progress(self, stage: str, share: float, bar: LoadBar | None = None) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._engine.readiness.progress(stage, share)
        if bar is not None:
            if stage == "packing" and bar.is_new(stage):
                self._say(f"{self._model} is not packed yet: packing it into {_cache_directory()}, once")
            bar.update(stage, share)

    def _announce(self, loaded: Loaded) -> None:
        known = ", ".join(f"{k} {v}" for k, v in loaded.info.items() if k in ("mode", "cett", "kernel", "io_engine"))
        self._say_unused(loaded.info)
        ready = f"ready: {self._url} serves {self._name} ({known})"
        if self._settings.log_format == "text":
            ready += f"; try:\n{example_request(self._url, self._name, self._needs_key)}"
        self._say(ready)

    def _end(self, loader: threading.Thread) -> None:
        self._stopping.set()
        loader.join(self._settings.drain_timeout)  # ends at its next report; else the process takes it along
        if self._loaded is not None:
            self._loaded.engine.shutdown(0.0)
            self._loaded.close()

    def _say(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. ColdstreamError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ColdstreamError(f"--host {host} --port {port}: {error.strerror or error}") from None


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds the server."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


def display_name(model: str) -> str:
    """The model's name in the API: a hub id as it is, a directory's name, a file's name without its ending."""
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


def example_request(url: str, name: str, needs_key: bool) -> str:
    """A request to paste into a shell."""
    body = {"model": name, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}
    key = ' -H "authorization: Bearer $COLDSTREAM_API_KEY"' if needs_key else ""
    curl = f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key}"
    return f"{curl} \\\n    -d {shlex.quote(json.dumps(body))}"


def _cache_directory() -> Path:
    from runtime.load import cache_directory

    return cache_directory()
