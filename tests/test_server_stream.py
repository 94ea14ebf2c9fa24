"""Streams over a real socket: framing, keep-alive, order of chunks, disconnects; and the parts that make them."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from runtime.request import FinishReason
from server.stream import Piece, StopMatcher, frame, join, with_pings
from tests.fake_engine import FakeEngine, byte_tokenizer
from tests.live_server import LiveServer, live_server

NASTY = 'a\nb\r\n\r\ndata: x\u2028y\x85z\x0b"\\ 日本 🧊'
PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(FakeEngine(byte_tokenizer(), script=NASTY, scripts={"hello": "Hello, world"})) as live:
        yield live


@pytest.fixture
def gated() -> Iterator[LiveServer]:
    """A server whose engine gives a token only when the test lets it."""
    with live_server(FakeEngine(byte_tokenizer(), gate=threading.Semaphore(0)), ping_interval_s=0.05) as live:
        yield live


def body(path: str, **options: Any) -> dict[str, Any]:
    asked = {"prompt": "hi"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "hi"}]}
    return {**asked, "max_tokens": 100, **options}


def events(raw: str) -> list[str]:
    """The data of every frame; each frame is one line, `data: ` before it, an empty line after it."""
    assert raw.endswith("\n\n")
    frames = [one for one in raw[:-2].split("\n\n") if not one.startswith(":")]
    assert all(one.startswith("data: ") and "\n" not in one and "\r" not in one for one in frames)
    return [one.removeprefix("data: ") for one in frames]


def stream(server: LiveServer, path: str, **options: Any) -> list[dict[str, Any]]:
    """All chunks of a stream that ends as it should."""
    response = httpx.post(server.url + path, json={**body(path), "stream": True, **options})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in own)


# --- framing ---


@pytest.mark.parametrize("path", PATHS)
def test_line_ends_in_the_text_survive_and_texts_are_equal(server: LiveServer, path: str) -> None:
    chunks = stream(server, path)
    assert text_of(chunks) == NASTY
    whole = httpx.post(server.url + path, json=body(path)).json()["choices"][0]
    assert (whole.get("text") or whole["message"]["content"]) == NASTY


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [1, 3])
def test_every_choice_ends_once_and_ids_stay(server: LiveServer, path: str, n: int) -> None:
    chunks = stream(server, path, n=n)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    for index in range(n):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["stop"]
        assert text_of(chunks, index) == NASTY
        if path == PATHS[1]:
            assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}


def test_usage_is_null_but_in_the_last_chunk(server: LiveServer) -> None:
    *chunks, last = stream(server, PATHS[0], stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    num_tokens = len(NASTY.encode()) + 1
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == num_tokens
    assert last["coldstream"]["bytes_read"] == {"disk": 4096}
    assert all("usage" not in chunk for chunk in stream(server, PATHS[0]))


def test_ignored_fields_are_told_first(server: LiveServer) -> None:
    for path in PATHS:
        chunks = stream(server, path, zzz=1, stream_options={"also": 2})
        assert chunks[0]["coldstream"] == {"ignored_fields": ["stream_options.also", "zzz"]}
        assert all(chunk["choices"] for chunk in chunks), "clients take a chunk without a choice for usage"
        assert not any("coldstream" in chunk for chunk in chunks[1:])


def test_stop_string_is_never_sent_even_in_part(server: LiveServer) -> None:
    chunks = stream(server, PATHS[0], prompt="hello", stop=["lo, wo"])
    assert text_of(chunks) == "Hel" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert text_of(stream(server, PATHS[0], prompt="hello", stop=["world!!"])) == "Hello, world"


def test_logprobs_of_chunks_add_up_to_those_of_the_whole(server: LiveServer) -> None:
    for path, asked in ((PATHS[0], {"logprobs": 1, "echo": True}), (PATHS[1], {"logprobs": True, "top_logprobs": 1})):
        parts = [c["choices"][0]["logprobs"] for c in stream(server, path, **asked) if c["choices"][0]["logprobs"]]
        whole = httpx.post(server.url + path, json=body(path, **asked)).json()["choices"][0]["logprobs"]
        for name in whole.keys() - {"refusal"}:
            assert [entry for part in parts for entry in part[name]] == whole[name]


def test_prefill_is_told_in_comments() -> None:
    with live_server(FakeEngine(byte_tokenizer(), prefill_chunk=4)) as server:
        raw = httpx.post(server.url + PATHS[0], json={"prompt": "0123456789", "stream": True}).text
    assert [line for line in raw.splitlines() if line.startswith(":")] == [": prefill 4/10", ": prefill 8/10"]
    assert text_of([json.loads(event) for event in events(raw)[:-1]]) == "Hello, world"


def test_error_in_the_middle_is_the_last_frame() -> None:
    with live_server(FakeEngine(byte_tokenizer(), fail_after=2)) as server:
        response = httpx.post(server.url + PATHS[0], json=body(PATHS[0], stream=True, n=2))
        assert response.status_code == 200
        *chunks, last = (json.loads(event) for event in events(response.text))
        assert chunks and "EIO" in last["error"]["message"] and last["error"]["type"] == "server_error"
        server.engine.join()
        assert server.engine.num_live == 0  # the other choice was given up too


# --- slow tokens, clients that leave ---


def test_first_chunks_come_before_the_last_token_is_made_and_pings_between(gated: LiveServer) -> None:
    assert gated.engine.gate is not None
    with httpx.stream("POST", gated.url + PATHS[1], json=body(PATHS[1], stream=True)) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines)[6:])["choices"][0]["delta"]["role"] == "assistant"
        assert [next(lines), next(lines), next(lines)] == ["", ": ping", ""]
        gated.engine.gate.release()
        token = next(line for line in lines if line.startswith("data"))
        assert json.loads(token[6:])["choices"][0]["delta"] == {"content": "H"}
        assert gated.engine.generated == 1
        gated.engine.gate.release(100)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("streamed", [True, False])
def test_client_that_leaves_aborts_its_request(gated: LiveServer, path: str, streamed: bool) -> None:
    client = httpx.Client(timeout=httpx.Timeout(30))
    if streamed:
        with client.stream("POST", gated.url + path, json=body(path, stream=True, n=2)) as response:
            next(response.iter_raw())
            assert gated.engine.waiting.wait(10)
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(gated.url + path, json=body(path, n=2), timeout=httpx.Timeout(30, read=0.2))
    client.close()
    gated.engine.join()  # the engine never gave a token, so only an abort ends these
    assert {reason for _, reason in gated.engine.aborts} == {FinishReason.ABORT}
    assert len({name for name, _ in gated.engine.aborts}) == 2
    assert gated.engine.num_live == 0 and gated.engine.failure["cancelled"] == 2


# --- parts ---


def test_stop_matcher_agrees_with_a_search_in_the_whole_text() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        matcher, out, hit = StopMatcher(stops), "", False
        for char in text:
            part, hit = matcher.push(char)
            out += part
            if hit:
                break
        if not hit:
            out += matcher.push("", final=True)[0]
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        # letter by letter the stop that is complete first counts; of those that end together, the one that began first
        first = min(ends, default=None)
        expected = text if first is None else text[: min(text[:first].find(s) for s in stops if s in text[:first])]
        assert (out, hit) == (expected, first is not None)


def test_stop_matcher_holds_back_no_more_than_it_must() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a <") == ("a ", False)
    assert matcher.push("b") == ("<b", False)
    assert matcher.push("</e") == ("", False)
    assert matcher.push("nd> more") == ("", True)


def test_pieces_join_to_one() -> None:
    assert join(2, [Piece(2, "a"), Piece(2, "b", (), "length")]) == Piece(2, "ab", (), "length")


def test_frame_is_ascii_and_one_line() -> None:
    raw = frame({"text": NASTY})
    assert raw.isascii() and raw.startswith(b"data: ") and raw.endswith(b"\n\n")
    assert len(raw[:-2].decode().splitlines()) == 1
    assert json.loads(raw[6:]) == {"text": NASTY}
    assert frame("[DONE]") == b"data: [DONE]\n\n" and frame("ping", comment=True) == b": ping\n\n"


def test_pings_do_not_disturb_what_is_awaited_and_end_with_it() -> None:
    async def slow(go: asyncio.Event) -> AsyncIterator[bytes]:
        yield b"1"
        await go.wait()
        yield b"2"

    async def run() -> list[bytes]:
        go, out = asyncio.Event(), []
        async for one in with_pings(slow(go), 0.001):
            out.append(one)
            if out.count(b": ping\n\n") == 3:
                go.set()
        return out

    out = asyncio.run(run())
    assert out[0] == b"1" and out[-1] == b"2" and set(out[1:-1]) == {b": ping\n\n"} and len(out) >= 5


def test_cancelling_pings_cancels_what_is_awaited() -> None:
    closed = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            await asyncio.Event().wait()
            yield b"never"
        finally:
            closed.append(True)

    async def run() -> None:
        task = asyncio.ensure_future(anext(with_pings(endless(), 60)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert closed == [True]
