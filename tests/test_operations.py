"""What operators rely on, over a real socket: the log, origins, limits on waiting. Keys and bodies: test_server.py."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from runtime.request import FinishReason, Request, TokenEvent
from server import logs
from tests.fake_engine import FakeEngine, OnEvent, byte_tokenizer
from tests.live_server import live_server

PROMPT, KEY = "a secret question", "hush-hush"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The JSON log of the process, until the end of the test."""
    stream = io.StringIO()
    logs.set_up(as_json=True, stream=stream)
    yield stream
    for name in ("server", "runtime", "cache"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def entries(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_one_line_a_request_with_its_cost_and_no_secrets(log: io.StringIO) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
    with live_server(api_keys=frozenset({KEY})) as server:
        body = {"prompt": PROMPT, "n": 2, "max_tokens": 5}
        assert httpx.post(f"{server.url}/v1/completions?k={KEY}", json=body, headers=headers).status_code == 200
        httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True}, headers=headers)
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers | {"authorization": "Bearer wrong"})
        httpx.post(f"{server.url}/v1/completions", json=body | {"n": 0}, headers=headers)
        for path in ("/health", "/ready", "/metrics"):
            httpx.get(server.url + path, headers=headers)
    whole, streamed, unauthorized, bad = entries(log)
    assert (whole["level"], whole["message"], whole["request_id"]) == ("info", "request", "mine")
    assert (whole["method"], whole["path"], whole["status"]) == ("POST", "/v1/completions", 200)
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["outcome"]) == (len(PROMPT), 10, "length")
    assert (whole["bytes_read"], whole["cache_hits"], whole["cache_lookups"]) == ({"disk": 8192}, 14, 20)
    assert whole["seconds"] > 0 and {**streamed, "time": 0, "seconds": 0} == {**whole, "time": 0, "seconds": 0}
    assert (unauthorized["status"], bad["status"]) == (401, 400) and "outcome" not in bad
    for secret in (PROMPT, KEY, "wrong", "Hello"):
        assert secret not in log.getvalue()


def test_the_log_tells_how_a_request_ended(log: io.StringIO) -> None:
    with live_server(FakeEngine(byte_tokenizer(), fail_after=2)) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": True})
    with live_server(FakeEngine(byte_tokenizer(), gate=threading.Semaphore(0))) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, timeout=httpx.Timeout(30, read=0.2))
        server.engine.join()
    failed, left = entries(log)
    assert (failed["status"], failed["outcome"]) == (200, "read_error")
    assert (left["status"], left["outcome"]) == (499, "cancelled")


def test_text_lines_cannot_be_forged() -> None:
    record = logging.makeLogRecord(
        {"msg": "request", "levelname": "INFO", "fields": {"path": "/a\nb c", "n": 0.123456}}
    )
    line = logs.TextFormatter().format(record)
    assert line.endswith(' INFO request path="/a\\nb c" n=0.1235')


def test_an_exception_is_one_json_line() -> None:
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": (RuntimeError, error, error.__traceback__)})
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line and "boom" in json.loads(line)["exception"]


def test_pages_of_the_given_origins_may_ask() -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with live_server(cors_origins=("https://page.example",), api_keys=frozenset({KEY})) as server:
        url = f"{server.url}/v1/chat/completions"
        before = httpx.options(url, headers=asks | {"access-control-request-headers": "authorization,content-type"})
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in before.headers["access-control-allow-headers"]
        assert httpx.options(url, headers=asks | {"origin": "https://other.example"}).status_code == 400
        refused = httpx.post(url, json={}, headers={"origin": "https://page.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://page.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
    with live_server() as server:
        plain = httpx.get(f"{server.url}/v1/models", headers={"origin": "https://page.example"})
        assert "access-control-allow-origin" not in plain.headers


@pytest.mark.parametrize(
    ("failure", "status", "code"), [("wait_limit", 429, "wait_limit"), ("shutdown", 503, "not_ready")]
)
def test_what_the_engine_gives_up_for_want_of_time_may_be_tried_again(failure: str, status: int, code: str) -> None:
    with live_server(GivingUp(byte_tokenizer(), failure=failure)) as server:
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert response.status_code == status and int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == code
        streamed = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": True})
        last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
        assert streamed.status_code == 200 and last["error"]["code"] == code


class GivingUp(FakeEngine):
    """An engine that ends every request with one failure."""

    def __init__(self, *args: Any, failure: str) -> None:
        super().__init__(*args)
        self.reason = failure

    def submit(self, request: Request, on_event: OnEvent) -> None:
        event = TokenEvent(request.request_id, finish_reason=FinishReason.ERROR, error="No.", failure=self.reason)
        threading.Thread(target=on_event, args=(event,)).start()
