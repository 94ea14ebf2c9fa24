"""Errors on the wire: every refusal and failure in OpenAI's body, `{"error": {message, type, param, code}}`.

Knows statuses and wordings; not how requests are served. What the engine has not counted itself is counted here, for
`coldstream_request_failure_total`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cache.errors import ColdstreamError, ContextLengthError, EngineStoppedError, QueueFullError, RequestError

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
_QUEUE_RETRY_S, _READY_RETRY_S = 1, 5


class NotReadyError(EngineStoppedError):
    """The server is loading its model or draining; the engine was not asked."""


class GenerationError(ColdstreamError):
    """The engine gave a request up, and has counted that; the message is for the user, `failure` is the engine's word
    for what happened (`runtime.engine_stats.FailureReason`)."""

    def __init__(self, message: str, failure: str | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class ApiError(HTTPException):
    """An answer that is an error. `reason` labels the counter; None: the engine has counted it already."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.type, self.param, self.code, self.reason = type, param, code, reason

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}}


def invalid_parameter(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, reason="invalid_request")


def unsupported_parameter(param: str) -> ApiError:
    message = f"{param} is not supported by this server."
    return ApiError(400, message, param=param, code="unsupported_parameter", reason="invalid_request")


def model_not_found(name: str) -> ApiError:
    message = f"The model {name!r} does not exist; GET /v1/models says which one does."
    return ApiError(404, message, param="model", code="model_not_found", reason="model_not_found")


def invalid_api_key() -> ApiError:
    message = "The API key is missing or wrong; send it as `Authorization: Bearer KEY`."
    headers = {"www-authenticate": "Bearer"}
    return ApiError(
        401, message, type="authentication_error", code="invalid_api_key", reason="unauthorized", headers=headers
    )


def body_too_large(limit_bytes: int) -> ApiError:
    message = f"The request body is larger than {limit_bytes} bytes."
    return ApiError(413, message, code="request_too_large", reason="body_too_large")


def not_ready(message: str) -> ApiError:
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code="not_ready",
        reason="not_ready",
        headers={"retry-after": str(_READY_RETRY_S)},
    )


def _try_later(message: str, code: str) -> ApiError:
    """429 of the engine, which has counted it."""
    headers = {"retry-after": str(_QUEUE_RETRY_S)}
    return ApiError(429, message, type="rate_limit_error", code=code, headers=headers)


def internal_error() -> ApiError:
    return ApiError(
        500, "The server failed on this request; its log has the details.", type="server_error", reason="internal"
    )


def from_coldstream(error: ColdstreamError) -> ApiError:
    """The answer to an error of the layers below, which have counted it."""
    message = str(error)
    match error:
        case NotReadyError():
            return not_ready(message)
        case QueueFullError():
            return _try_later(message, "queue_full")
        case GenerationError(failure="wait_limit"):
            return _try_later(message, "wait_limit")
        case GenerationError(failure="shutdown"):
            unavailable = not_ready(message)
            unavailable.reason = None
            return unavailable
        case EngineStoppedError():
            unavailable = not_ready(message)
            unavailable.reason = None
            return unavailable
        case ContextLengthError():
            return ApiError(400, message, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, message, reason="invalid_request")
    return ApiError(500, message, type="server_error")


def from_validation(errors: Sequence[Any]) -> ApiError:
    """Of several complaints the first, which names its field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid_parameter(f"The request body is not valid JSON: {first.get('ctx', {}).get('error', '')}.")
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return invalid_parameter("The request body must be a JSON object, sent with `Content-Type: application/json`.")
    message = str(first["msg"]).removeprefix("Value error, ")
    return invalid_parameter(f"{'.'.join(path)}: {message[:1].lower()}{message[1:]}", path[0])


def from_http(error: HTTPException) -> ApiError:
    """What the framework refuses: unknown paths, methods, bodies that cannot be read."""
    if isinstance(error, ApiError):
        return error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    reason = code or "invalid_request"
    return ApiError(error.status_code, f"{error.detail}.", code=code, reason=reason, headers=error.headers)


class Json(JSONResponse):
    """JSON that can always be sent: half of a surrogate pair, which JSON may carry and UTF-8 may not, stays escaped."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


class Refusals:
    """Counts refusals that the engine never saw, by reason. Used from the event loop only."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def answer(self, error: ApiError) -> Json:
        """The response to an error, counted."""
        if error.reason is not None:
            self.counts[error.reason] += 1
        return Json(error.body(), error.status_code, headers=error.headers)


def install_handlers(app: FastAPI, refusals: Refusals) -> None:
    """Makes every error of `app` leave in OpenAI's body."""

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusals.answer(from_http(error))

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refusals.answer(from_validation(error.errors()))

    async def on_coldstream(_: Request, error: Exception) -> Response:
        assert isinstance(error, ColdstreamError)
        return refusals.answer(from_coldstream(error))

    async def on_anything(_: Request, error: Exception) -> Response:
        return refusals.answer(internal_error())  # the framework raises `error` again, which brings it into the log

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(ColdstreamError, on_coldstream)
    app.add_exception_handler(Exception, on_anything)
