"""`Client` and `AsyncClient`: the endpoints of a coldstream server as methods, answers as plain dicts.

Know paths, errors and streams; options of a request are passed on as they are, so that a new one needs no new client.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self

import httpx

from clients.sse import DONE, EventDecoder

Json = dict[str, Any]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(
    600.0, connect=10.0
)  # seconds between two bytes: an answer that is not streamed is slow


class APIError(Exception):
    """The server answered with an error, or ended a stream with one. `status` is None in the second case."""

    def __init__(self, status: int | None, error: Json) -> None:
        super().__init__(str(error.get("message", error)))
        self.status = status
        self.type, self.param, self.code = (error.get(name) for name in ("type", "param", "code"))


class Client:
    """Blocking. Use it as a context manager, or call `close`. Raises APIError, and httpx.HTTPError of the transport."""

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, timeout: httpx.Timeout | float = DEFAULT_TIMEOUT
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(api_key), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def completions(self, prompt: Prompt, **options: Any) -> Json:
        return self._post("/v1/completions", {"prompt": prompt, **options})

    def chat(self, messages: Sequence[Json], **options: Any) -> Json:
        return self._post("/v1/chat/completions", {"messages": messages, **options})

    def stream_completions(self, prompt: Prompt, **options: Any) -> Iterator[Json]:
        """Chunks as they come. Closing the iterator ends the request on the server."""
        return self._stream("/v1/completions", {"prompt": prompt, **options})

    def stream_chat(self, messages: Sequence[Json], **options: Any) -> Iterator[Json]:
        """Chunks as they come. Closing the iterator ends the request on the server."""
        return self._stream("/v1/chat/completions", {"messages": messages, **options})

    def tokenize(self, prompt: str, **options: Any) -> list[int]:
        return list(self._post("/tokenize", {"prompt": prompt, **options})["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._post("/detokenize", {"tokens": list(tokens)})["prompt"])

    def models(self) -> list[Json]:
        return list(_answer(self._http.get("/v1/models"))["data"])

    def health(self) -> Json:
        return _answer(self._http.get("/health"))

    def ready(self) -> bool:
        """Whether requests are taken. Raises APIError for anything but yes and not yet."""
        return _is_ready(self._http.get("/ready"))

    def _post(self, path: str, body: Json) -> Json:
        return _answer(self._http.post(path, json=body))

    def _stream(self, path: str, body: Json) -> Iterator[Json]:
        decoder = EventDecoder()
        with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
                _answer(response)
            for part in response.iter_bytes():
                for event in decoder.push(part):
                    if event == DONE:
                        return
                    yield _chunk(event)
        raise _cut_off()


class AsyncClient:
    """As `Client`, for asyncio."""

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, timeout: httpx.Timeout | float = DEFAULT_TIMEOUT
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(api_key), timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def completions(self, prompt: Prompt, **options: Any) -> Json:
        return await self._post("/v1/completions", {"prompt": prompt, **options})

    async def chat(self, messages: Sequence[Json], **options: Any) -> Json:
        return await self._post("/v1/chat/completions", {"messages": messages, **options})

    def stream_completions(self, prompt: Prompt, **options: Any) -> AsyncIterator[Json]:
        """Chunks as they come. Closing the iterator ends the request on the server."""
        return self._stream("/v1/completions", {"prompt": prompt, **options})

    def stream_chat(self, messages: Sequence[Json], **options: Any) -> AsyncIterator[Json]:
        """Chunks as they come. Closing the iterator ends the request on the server."""
        return self._stream("/v1/chat/completions", {"messages": messages, **options})

    async def tokenize(self, prompt: str, **options: Any) -> list[int]:
        return list((await self._post("/tokenize", {"prompt": prompt, **options}))["tokens"])

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return str((await self._post("/detokenize", {"tokens": list(tokens)}))["prompt"])

    async def models(self) -> list[Json]:
        return list(_answer(await self._http.get("/v1/models"))["data"])

    async def health(self) -> Json:
        return _answer(await self._http.get("/health"))

    async def ready(self) -> bool:
        """Whether requests are taken. Raises APIError for anything but yes and not yet."""
        return _is_ready(await self._http.get("/ready"))

    async def _post(self, path: str, body: Json) -> Json:
        return _answer(await self._http.post(path, json=body))

    async def _stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        decoder = EventDecoder()
        async with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            if response.is_error:
                await response.aread()
                _answer(response)
            async for part in response.aiter_bytes():
                for event in decoder.push(part):
                    if event == DONE:
                        return
                    yield _chunk(event)
        raise _cut_off()


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def _answer(response: httpx.Response) -> Json:
    """The JSON object of a response. Raises APIError, also for what some proxy on the way answered."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {"message": f"HTTP {response.status_code} from {response.url}: {response.text[:200]}"}
    raise APIError(response.status_code, error)


def _is_ready(response: httpx.Response) -> bool:
    if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
        _answer(response)
    return response.is_success


def _chunk(event: str) -> Json:
    chunk: Json = json.loads(event)
    if "error" in chunk:
        raise APIError(None, chunk["error"])
    return chunk


def _cut_off() -> APIError:
    return APIError(None, {"message": f"The stream ended without {DONE}; the server has gone."})
