"""What /openapi.json says beyond the bodies of requests: every status of every endpoint, with the shape of its answer.

Knows shapes; not how an answer comes about. benchmarks/fuzz_api.py holds a running server to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

Json = dict[str, Any]
Responses = dict[int | str, Json]

_TEXT, _COUNT, _SECONDS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0}
_NULLABLE = {"type": ["string", "null"]}
_MEANINGS = {
    400: "A parameter is not valid, or the prompt is too long.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full, or the request has waited for too long.",
    500: "The engine failed on this request; it serves others.",
    503: "The model is being loaded, or the server is draining.",
}
_RETRY = {429, 503}


def shape(required: Json, **optional: Json) -> Json:
    """The schema of an object."""
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def listing(item: Json) -> Json:
    return {"type": "array", "items": item}


ERROR = shape({"error": shape({"message": _TEXT, "type": _TEXT, "param": _NULLABLE, "code": _NULLABLE})})
_DETAILS = shape({"cached_tokens": _COUNT})
_COUNTS = {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}
_USAGE = shape({**_COUNTS, "prompt_tokens_details": _DETAILS})
_COST = shape(
    {
        "bytes_read": {"type": "object", "additionalProperties": _COUNT},
        "cache_lookups": _COUNT,
        "cache_hits": _COUNT,
        **dict.fromkeys(("stall_s", "queue_s", "prefill_s", "decode_s"), _SECONDS),
        "ignored_fields": listing(_TEXT),
    }
)
_REASON = {"enum": ["stop", "length"]}
_LOGPROBS = {"type": ["object", "null"]}


def _answer(kind: str, content: Json) -> Json:
    choice = shape({"index": _COUNT, "finish_reason": _REASON, "logprobs": _LOGPROBS, **content})
    head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
    return shape({**head, "choices": listing(choice), "usage": _USAGE, "coldstream": _COST})


COMPLETION = _answer("text_completion", {"text": _TEXT})
CHAT = _answer("chat.completion", {"message": shape({"role": {"const": "assistant"}, "content": _TEXT})})
MODEL = shape({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT}, max_model_len=_COUNT)
MODELS = shape({"object": {"const": "list"}, "data": listing(MODEL)})
TOKENS = shape({"tokens": listing(_COUNT), "count": _COUNT, "max_model_len": _COUNT})
PROMPT = shape({"prompt": _TEXT})
TOKENIZER = shape(
    {
        "vocab_size": _COUNT,
        "bos_token": _NULLABLE,
        "eos_token": _NULLABLE,
        "eos_token_ids": listing(_COUNT),
        "chat_template": _NULLABLE,
    }
)
HEALTH = shape({"status": {"const": "ok"}, "state": {"enum": ["loading", "ready", "draining"]}})
READY = shape({"status": {"const": "ready"}})
VERSION = shape({"version": _TEXT})
CACHE = shape({"tiers": {"type": "object"}, "transfers": listing({"type": "object"})})

_BODY = (400, 401, 404, 413, 429, 500, 503)


def responses(schema: Json, *statuses: int) -> Responses:
    """Of an endpoint that answers with JSON of this schema, or with one of the errors."""
    return {200: {"description": "OK", "content": {"application/json": {"schema": schema}}}, **_errors(statuses)}


def with_body(schema: Json, stream: bool = False) -> Responses:
    """As `responses`, for a POST; `stream`: may come as server-sent events too."""
    out = responses(schema, *_BODY)
    if stream:
        out[200]["content"]["text/event-stream"] = {}  # chunks, comments, [DONE]: no one schema fits them all
    return out


def text(*statuses: int) -> Responses:
    """Of an endpoint that answers with text."""
    content = {kind: {"schema": _TEXT} for kind in ("text/plain", "application/openmetrics-text")}
    return {200: {"description": "OK", "content": content}, **_errors(statuses)}


def _errors(statuses: Sequence[int]) -> Responses:
    return {status: _error(status) for status in statuses}


def _error(status: int) -> Json:
    retry = {"retry-after": {"schema": _TEXT, "description": "Seconds."}} if status in _RETRY else {}
    content = {"application/json": {"schema": ERROR}}
    return {"description": _MEANINGS[status], "content": content, **({"headers": retry} if retry else {})}


def install(app: FastAPI, model: str, needs_key: bool) -> None:
    """Makes /openapi.json say this, the one model's name, and nothing of the framework's own 422, a 400 here."""
    cached: Json = {}

    def openapi() -> Json:
        if not cached:
            cached.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            _drop_422(cached)
            _name_model(cached, model)
            if needs_key:
                cached.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                cached["security"] = [{"key": []}]
        return cached

    app.openapi = openapi  # type: ignore[method-assign]


def _drop_422(schema: Json) -> None:
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)


def _name_model(schema: Json, model: str) -> None:
    for body in schema["components"]["schemas"].values():
        if "model" in body.get("properties", {}):
            body["properties"]["model"] = {"enum": [model, None], "title": "Model"}
