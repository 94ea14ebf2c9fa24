"""Our own clients against the server, over a real socket; the event decoder; the terminal chat; no torch."""

from __future__ import annotations

import asyncio
import io
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from clients import APIError, AsyncClient, Client
from clients.chat import Conversation, UnreachableError, answer, run_chat
from clients.sse import EventDecoder
from runtime.request import FinishReason
from tests.fake_engine import FakeEngine, byte_tokenizer
from tests.live_server import MODEL, LiveServer, live_server

HELLO = "Hello, world"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


def test_client_asks_everything(server: LiveServer) -> None:
    with Client(server.url) as client:
        assert client.completions("hi", max_tokens=5)["choices"][0]["text"] == "Hello"
        assert client.chat(USER)["choices"][0]["message"]["content"] == HELLO
        assert "".join(c["choices"][0]["text"] for c in client.stream_completions("hi")) == HELLO
        deltas = [c["choices"][0]["delta"].get("content", "") for c in client.stream_chat(USER)]
        assert "".join(deltas) == HELLO
        assert client.detokenize(client.tokenize("né")) == "né"
        assert [model["id"] for model in client.models()] == [MODEL]
        assert client.ready() and client.health()["state"] == "ready"


def test_async_client_asks_everything(server: LiveServer) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            assert (await client.completions("hi", max_tokens=5))["choices"][0]["text"] == "Hello"
            assert (await client.chat(USER))["choices"][0]["message"]["content"] == HELLO
            assert "".join([c["choices"][0]["text"] async for c in client.stream_completions("hi")]) == HELLO
            deltas = [c["choices"][0]["delta"].get("content", "") async for c in client.stream_chat(USER)]
            assert "".join(deltas) == HELLO
            assert await client.detokenize(await client.tokenize("né")) == "né"
            assert [model["id"] for model in await client.models()] == [MODEL]
            assert await client.ready() and (await client.health())["state"] == "ready"
            with pytest.raises(APIError):
                async for _ in client.stream_chat([]):
                    pass

    asyncio.run(run())


def test_errors_carry_what_the_server_said(server: LiveServer) -> None:
    with Client(server.url) as client:
        with pytest.raises(APIError, match="temperature") as bad:
            client.completions("hi", temperature=9)
        assert (bad.value.status, bad.value.param, bad.value.type) == (400, "temperature", "invalid_request_error")
        with pytest.raises(APIError) as streamed:
            next(client.stream_chat(USER, model="another"))
        assert (streamed.value.status, streamed.value.code) == (404, "model_not_found")


def test_error_within_a_stream_is_raised() -> None:
    with live_server(FakeEngine(byte_tokenizer(), fail_after=1)) as server, Client(server.url) as client:
        chunks = client.stream_completions("hi")
        assert next(chunks)["choices"][0]["text"] == "H"
        with pytest.raises(APIError, match="EIO") as error:
            next(chunks)
        assert error.value.status is None


def test_closing_a_stream_ends_the_request() -> None:
    engine = FakeEngine(byte_tokenizer(), gate=threading.Semaphore(1))
    with live_server(engine) as server, Client(server.url) as client:
        chunks = client.stream_completions("hi")
        assert next(chunks)["choices"][0]["text"] == "H"
        chunks.close()
        engine.join()
        assert [reason for _, reason in engine.aborts] == [FinishReason.ABORT]


def test_not_ready_and_key() -> None:
    with live_server(loaded=False, api_keys=frozenset({"secret"})) as server:
        with Client(server.url) as client:
            assert not client.ready() and client.health()["state"] == "loading"
            with pytest.raises(APIError) as error:
                client.models()
            assert error.value.status == 401
        with Client(server.url, api_key="secret") as client:
            assert client.models()[0]["id"] == MODEL


def test_event_decoder_does_not_care_how_bytes_are_cut() -> None:
    text = (
        'data: {"a":\u2028 1}\n\n: ping\n\ndata: one\r\ndata:two\r\n\r\nevent: x\rdata: ü\r\rid: 1\n\ndata: [DONE]\n\n'
    )
    raw = text.encode()
    expected = ['{"a":\u2028 1}', "one\ntwo", "ü", "[DONE]"]
    rng = random.Random(2)
    for _ in range(500):
        cuts = sorted(rng.sample(range(len(raw) + 1), rng.randint(0, 12)))
        decoder = EventDecoder()
        parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        assert [event for part in parts for event in decoder.push(part)] == expected


def test_chat_keeps_the_conversation_and_shows_the_speed(server: LiveServer) -> None:
    out = io.StringIO()
    conversation = Conversation(system="be brief")
    with Client(server.url) as client:
        answer(client, conversation, "[b]hi[/b]", Console(file=out))
        answer(client, conversation, "more", Console(file=out))
        assert [turn["role"] for turn in conversation.messages()] == ["system", *["user", "assistant"] * 2]
        assert conversation.turns[1]["content"] == HELLO and out.getvalue().count(HELLO) == 2
        assert f"{len(HELLO) + 1} tokens in" in out.getvalue()
        answer(client, conversation, "too hot", Console(file=out), temperature=9)
    assert "error: temperature" in out.getvalue() and len(conversation.turns) == 4


def test_run_chat_reads_until_the_end(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["/system be kind", "hello", "", "/new", "/what", "again", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    out = io.StringIO()
    run_chat(server.url, console=Console(file=out))
    assert out.getvalue().count(HELLO) == 2 and MODEL in out.getvalue() and next(lines) == "never"


def test_run_chat_without_a_server_says_so() -> None:
    for url in ("http://127.0.0.1:9", "nonsense", "http://[::1"):
        with pytest.raises(UnreachableError, match=re.escape(f"--url {url}: ")):
            run_chat(url, console=Console(file=io.StringIO()))


def test_run_chat_with_a_wrong_key_says_so() -> None:
    with live_server(api_keys=frozenset({"secret"})) as server, pytest.raises(UnreachableError, match="API key"):
        run_chat(server.url, "wrong", Console(file=io.StringIO()))


def test_clients_need_no_torch() -> None:
    code = (
        "import sys, clients, clients.chat, clients.load; sys.exit('torch' in sys.modules or 'server' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
