"""The endpoints, thin: check the model's name, make a job, hand it to the engine, send what comes back.

Knows paths and statuses; what a body means is in schemas and job, how an answer looks in answers, how it
flows in stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from server import openapi
from server.answers import Answer
from server.async_engine import AsyncEngine, Generation, LoadedModel, State
from server.errors import Json, invalid_parameter, model_not_found, not_ready
from server.job import Job, chat_job, completion_job, tokenize
from server.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from server.stream import DONE, EventStream, Piece, Progress, error_frame, fold, frame, with_pings

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.metrics import Metrics

ANSWER = "coldstream.answer"  # in the ASGI scope, for the log
_DISCONNECTED = 499  # nobody reads it; the log does


def make_router(engine: AsyncEngine, config: ServerConfig, metrics: Metrics) -> APIRouter:
    """All endpoints of one server."""
    router = APIRouter()
    _add_generation(router, engine, config)
    _add_models(router, engine, config)
    _add_tokens(router, engine, config)
    _add_operation(router, engine, config, metrics)
    return router


def _add_generation(router: APIRouter, engine: AsyncEngine, config: ServerConfig) -> None:
    @router.post("/v1/completions", responses=openapi.with_body(openapi.COMPLETION, stream=True))
    async def completions(body: CompletionBody, request: Request) -> Response:
        model = _model_for(body, engine, config)
        job = await run_in_threadpool(completion_job, body, model, config.served_model_name)
        return await _respond(job, engine.generate(job.requests), request, body.stream, config)

    @router.post("/v1/chat/completions", responses=openapi.with_body(openapi.CHAT, stream=True))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        model = _model_for(body, engine, config)
        job = await run_in_threadpool(chat_job, body, model, config.served_model_name)
        return await _respond(job, engine.generate(job.requests), request, body.stream, config)


def _add_models(router: APIRouter, engine: AsyncEngine, config: ServerConfig) -> None:
    created = int(time.time())

    def card() -> dict[str, Any]:
        model = engine.loaded
        known = {} if model is None else {"max_model_len": model.max_model_len, "coldstream": _semantics(model)}
        return {
            "id": config.served_model_name,
            "object": "model",
            "created": created,
            "owned_by": "coldstream",
            **known,
        }

    @router.get("/v1/models", responses=openapi.responses(openapi.MODELS, 401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @router.get("/v1/models/{name:path}", responses=openapi.responses(openapi.MODEL, 401, 404))
    async def model(name: str) -> dict[str, Any]:
        if name != config.served_model_name:
            raise model_not_found(name)
        return card()


def _add_tokens(router: APIRouter, engine: AsyncEngine, config: ServerConfig) -> None:
    @router.post("/tokenize", responses=openapi.with_body(openapi.TOKENS))
    async def tokenize_text(body: TokenizeBody) -> dict[str, Any]:
        model = _model_for(body, engine, config)
        tokens = await run_in_threadpool(tokenize, body, model.tokenizer)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": model.max_model_len}

    @router.post("/detokenize", responses=openapi.with_body(openapi.PROMPT))
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        tokenizer = _model_for(body, engine, config).tokenizer
        if max(body.tokens, default=0) >= tokenizer.vocab_size:
            raise invalid_parameter(f"tokens: an id is not below {tokenizer.vocab_size}", "tokens")
        text = await run_in_threadpool(tokenizer.decode, body.tokens, body.skip_special_tokens)
        return {"prompt": text}

    @router.get("/tokenizer_info", responses=openapi.responses(openapi.TOKENIZER, 401, 503))
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = engine.ready_model().tokenizer
        return {
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "eos_token_ids": list(tokenizer.eos_ids),
            "chat_template": tokenizer.chat_template,
        }


def _add_operation(router: APIRouter, engine: AsyncEngine, config: ServerConfig, metrics: Metrics) -> None:
    readiness = engine.readiness

    @router.get("/health", responses=openapi.responses(openapi.HEALTH))
    async def health() -> dict[str, Any]:
        info = {} if engine.loaded is None else dict(engine.loaded.info)
        loading = {"stage": readiness.stage, "share": readiness.share} if readiness.state is State.LOADING else {}
        return {"status": "ok", "state": readiness.state.value, **loading, **info}

    @router.get("/ready", responses=openapi.responses(openapi.READY, 503))
    async def ready() -> dict[str, Any]:
        if readiness.state is not State.READY:
            refusal = not_ready(readiness.sentence())
            refusal.reason = None  # a probe is no request that failed
            raise refusal
        return {"status": "ready"}

    @router.get("/version", responses=openapi.responses(openapi.VERSION, 401))
    async def version() -> dict[str, Any]:
        return {"version": config.version}

    @router.get("/metrics", response_class=PlainTextResponse, responses=openapi.text(401))
    async def metrics_text(request: Request) -> Response:
        content, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": media_type})

    @router.get("/cache", responses=openapi.responses(openapi.CACHE, 401, 503))
    async def cache() -> dict[str, Any]:
        return metrics.cache_json()


def _model_for(body: Body, engine: AsyncEngine, config: ServerConfig) -> LoadedModel:
    """The model, when the body asks for it or for none. Raises ApiError, NotReadyError."""
    if body.model is not None and body.model != config.served_model_name:
        raise model_not_found(body.model)
    return engine.ready_model()


def _semantics(model: LoadedModel) -> dict[str, Any]:
    """How results are computed. Decode and scoring (echo with logprobs) follow the mode; prefill is always dense."""
    mode = model.info.get("mode")
    return {**model.info, "prefill": "dense", "scoring": mode, "decode": mode}


async def _respond(job: Job, generation: Generation, request: Request, stream: bool, config: ServerConfig) -> Response:
    """The answer, whole or as a stream; in both cases the end of the connection ends the generation."""
    request.scope[ANSWER] = job.answer
    pieces = fold(generation, job.choices)
    if stream:
        frames = error_frame(_frames(job.answer, pieces))
        return EventStream(with_pings(frames, config.ping_interval_s), generation.close)
    try:
        return await _whole(job.answer, pieces, request)
    finally:
        generation.close()


async def _frames(answer: Answer, pieces: AsyncIterator[Piece | Progress]) -> AsyncIterator[bytes]:
    for chunk in answer.opening():
        yield frame(chunk)
    async for piece in pieces:
        if isinstance(piece, Progress):
            yield frame(f"prefill {piece.done}/{piece.total}", comment=True)
            continue
        for chunk in answer.chunks(piece):
            yield frame(chunk)
    if answer.include_usage:
        yield frame(answer.usage_chunk())
    yield frame(DONE)


async def _whole(answer: Answer, pieces: AsyncIterator[Piece | Progress], request: Request) -> Response:
    """All pieces as one body, unless the client goes away first. Raises GenerationError."""
    collecting = asyncio.ensure_future(_collect(pieces))
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=_DISCONNECTED)
        return Json(answer.body(collecting.result()))
    finally:
        collecting.cancel()
        leaving.cancel()


async def _collect(pieces: AsyncIterator[Piece | Progress]) -> list[Piece]:
    return [piece async for piece in pieces if isinstance(piece, Piece)]


async def _disconnected(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
