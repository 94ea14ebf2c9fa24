"""`create_app`: the HTTP application, made of its parts. Knows no model; loading and the process are the command's.

What guards every request (key, size of the body, request id) is one plain ASGI layer: it sees the connection itself,
so that a disconnect reaches whoever streams.
"""

from __future__ import annotations

import hmac
import time
import uuid

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import openapi
from server.async_engine import AsyncEngine
from server.builtin_page import PATHS as PAGE_PATHS
from server.builtin_page import make_page_router
from server.config import ServerConfig
from server.errors import Refusals, body_too_large, install_handlers, internal_error, invalid_api_key
from server.logs import log_request
from server.metrics import Metrics
from server.routes import ANSWER, make_router

__all__ = ["ServerConfig", "create_app"]

OPEN_PATHS = frozenset({"/health", "/ready"}) | PAGE_PATHS
_MAX_REQUEST_ID = 128


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The application. `engine` may be without a model yet: /health answers, the rest says 503 until `attach`."""
    app = FastAPI(title="coldstream", version=config.version, docs_url=None, redoc_url=None)
    refusals = Refusals()
    install_handlers(app, refusals)
    app.include_router(make_router(engine, config, Metrics(engine, config, refusals)))
    openapi.install(app, config.served_model_name, needs_key=bool(config.api_keys))
    app.include_router(make_page_router())
    app.add_middleware(Gate, config=config, refusals=refusals)
    if config.cors_origins:  # outside of the gate: a browser asks first, without a key, and must be able to read errors
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


class Gate:
    """Names every request, asks for the key, and limits the body, before anything is parsed."""

    def __init__(self, app: ASGIApp, config: ServerConfig, refusals: Refusals) -> None:
        self._app, self._config, self._refusals = app, config, refusals
        self._keys = tuple(key.encode() for key in config.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id, started_s = _request_id(headers), time.perf_counter()
        sender = _Sender(send, request_id)
        try:
            await self._answer(scope, headers, receive, sender)
        finally:
            answer = scope.get(ANSWER)
            log_request(
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=sender.status,
                seconds=time.perf_counter() - started_s,
                cost={} if answer is None else answer.log_fields(),
            )

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, sender: _Sender) -> None:
        limit_bytes = self._config.max_body_bytes
        if scope["path"] not in OPEN_PATHS and not self._may_pass(headers):
            await self._refusals.answer(invalid_api_key())(scope, receive, sender)
        elif _content_length(headers) > limit_bytes:
            await self._refusals.answer(body_too_large(limit_bytes))(scope, receive, sender)
        else:
            await self._pass(scope, _limited(receive, limit_bytes), receive, sender)

    async def _pass(self, scope: Scope, limited: Receive, receive: Receive, sender: _Sender) -> None:
        """Runs the application. What nobody foresaw is answered here, under the request's id, and raised again."""
        try:
            await self._app(scope, limited, sender)
        except Exception:
            if sender.status is None:
                error = internal_error()
                error.reason = None  # the handler behind counts it, and finds the answer on its way
                await self._refusals.answer(error)(scope, receive, sender)
            raise

    def _may_pass(self, headers: Headers) -> bool:
        """Compares with every key, in constant time, so that the time tells nothing."""
        if not self._keys:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(found)


def _content_length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _limited(receive: Receive, limit_bytes: int) -> Receive:
    """`receive`, that raises when a body without a declared length grows too large."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit_bytes:
            raise body_too_large(limit_bytes)
        return message

    return limited


def _request_id(headers: Headers) -> str:
    """The client's own id when it is printable ASCII of a sensible length, else a new one."""
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= _MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex


class _Sender:
    """`send` that names the answer and notes its status (None: nothing was sent yet)."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)
