"""What evaluations and other clients depend on, with a real engine in this process behind a real socket.

lm-eval's `local-completions`: prompts of token ids, `echo`, `logprobs=1`, and the log-probabilities cut out of the
answer as its parser does; they must equal those computed from the model's logits, past engine, sampler and server.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch

from runtime.batch import Batch, SequenceView
from runtime.kv_cache import BLOCK_SIZE, BlockManager, KVCache
from runtime.load import Loaded, LoadOptions, load, prepare
from runtime.plan import FfnCache
from server.async_engine import LoadedModel
from tests.live_server import MODEL, live_server

CONTEXT = 256
USER = [{"role": "user", "content": "hello there"}]


@dataclass(frozen=True)
class Live:
    """A server, and the model behind it."""

    url: str
    loaded: Loaded


@pytest.fixture(scope="module", params=["sparse", "dense"])
def live(request: pytest.FixtureRequest, tiny_relu2: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    packed = packed_model(tiny_relu2, tmp_path_factory)
    options = LoadOptions(
        mode=request.param, dtype="fp32", threads=1, ffn_cache=FfnCache.parse("20%"), max_model_len=CONTEXT
    )
    loaded = load(str(packed), options, lambda stage, share: None)
    loaded.engine.start()
    model = LoadedModel(loaded.engine, loaded.tokenizer, CONTEXT, loaded.info)
    try:
        with live_server(model=model) as server:
            yield Live(server.url, loaded)
    finally:
        loaded.engine.shutdown(0)
        loaded.close()


def packed_model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conformance") / "packed"
    return prepare(str(tiny.checkpoint), out, tiny.text, None, "fp32", False, lambda stage, share: None)


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def random_ids(num: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 320), k=num)


def expected_scores(live: Live, ids: list[int]) -> torch.Tensor:
    """Log-softmax [T - 1, V] of the tokens after the first, straight from the model, in pieces of the engine's size."""
    kv = KVCache(live.loaded.model.config, CONTEXT // BLOCK_SIZE, BLOCK_SIZE, torch.float32)
    table = BlockManager(kv.num_blocks).allocate(len(ids))
    rows = []
    for start in range(0, len(ids), 128):
        part = ids[start : start + 128]
        view = SequenceView(table, start, len(part))
        positions = torch.arange(start, start + len(part))
        with torch.inference_mode():
            logits = live.loaded.model.forward(
                Batch("score", torch.tensor(part), positions, (view,), "all"), kv, lambda: None
            )
        assert logits is not None
        rows.append(logits)
    return torch.cat(rows).log_softmax(-1)[:-1]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lm_eval(choice: dict[str, Any], context_length: int, generated: int) -> tuple[float, bool]:
    """(log-likelihood, whether greedy decoding would say the same), as lm-eval's OpenAI parser reads a choice."""
    stop = len(choice["logprobs"]["token_logprobs"]) - generated
    scores = choice["logprobs"]["token_logprobs"][context_length:stop]
    tops = choice["logprobs"]["top_logprobs"][context_length:stop]
    return sum(scores), all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_gets_the_scores_of_the_models_logits(live: Live, max_tokens: int) -> None:
    contexts, lengths = [1, 7, 40, 150], [9, 30, 60, 200]
    prompts = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    greedy = expected_scores(live, prompts[0])
    for i in range(1, 6):  # a continuation that greedy decoding would say
        prompts[0][i] = int(greedy[i - 1].argmax())
        greedy = expected_scores(live, prompts[0])
    prompts[0] = prompts[0][:6]
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1}
    answer = httpx.post(f"{live.url}/v1/completions", json=body | {"seed": 1234, "echo": True}, timeout=60).json()
    for choice, ids, context in zip(answer["choices"], prompts, contexts, strict=True):
        rows = expected_scores(live, ids)
        targets = torch.tensor(ids[1:])
        each = rows.gather(1, targets[:, None])[:, 0]
        found = choice["logprobs"]["token_logprobs"]
        assert found[0] is None and len(found) == len(ids) + max_tokens
        assert torch.tensor(found[1 : len(ids)]).sub(each).abs().max() < 1e-4
        score, is_greedy = lm_eval(choice, context, max_tokens)
        assert score == pytest.approx(float(each[context - 1 :].sum()), abs=1e-3)
        assert is_greedy == bool((rows.argmax(1) == targets)[context - 1 :].all())
    assert lm_eval(answer["choices"][0], 1, max_tokens)[1] and not lm_eval(answer["choices"][3], 150, max_tokens)[1]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_a_text_is_scored_as_its_tokens_are(live: Live, client: openai.OpenAI) -> None:
    text = "the ship sailed\nout of the harbour"
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 0}
    of_text = client.completions.create(prompt=text, **asked).choices[0]
    of_ids = client.completions.create(prompt=live.loaded.tokenizer.encode(text), **asked).choices[0]
    assert of_text.logprobs is not None and of_ids.logprobs is not None
    assert of_text.text == of_ids.text == text
    assert of_text.logprobs.token_logprobs == of_ids.logprobs.token_logprobs


def test_echo_is_scored_alike_in_a_stream_and_in_company(live: Live) -> None:
    url, ids = f"{live.url}/v1/completions", [random_ids(90, seed) for seed in range(5)]
    body = {"max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1, "ignore_eos": True}

    def alone(prompt: list[int]) -> Any:
        return httpx.post(url, json=body | {"prompt": prompt}, timeout=60).json()["choices"][0]

    expected = [alone(prompt) for prompt in ids]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(alone, ids)) == expected
    raw = httpx.post(url, json=body | {"prompt": ids[0], "stream": True}, timeout=60).text
    events = [line[6:] for line in raw.splitlines() if line.startswith("data: {")]
    parts = [json.loads(event)["choices"][0]["logprobs"] for event in events]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for part in parts for entry in part[name]] == expected[0]["logprobs"][name]


def test_chat_logprobs_are_of_the_raw_logits(live: Live, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    plain = client.chat.completions.create(**asked, temperature=0).choices[0]
    assert plain.logprobs is not None and plain.logprobs.content is not None
    for entry in plain.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob
        assert entry.token == entry.top_logprobs[0].token
    biased = client.chat.completions.create(**asked, seed=3, top_p=0.9, presence_penalty=1).choices[0]
    assert biased.logprobs is not None and biased.logprobs.content is not None
    assert biased.logprobs.content[0].top_logprobs == plain.logprobs.content[0].top_logprobs


def test_every_option_at_once_repeats(client: openai.OpenAI) -> None:
    def text(seed: int) -> list[str]:
        choices = client.completions.create(
            model=MODEL,
            prompt=["the sea", "a ship"],
            n=2,
            max_tokens=20,
            seed=seed,
            temperature=1.3,
            top_p=0.95,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            stop=["zz", "qq"],
            logit_bias={"70": -100, "71": 5},
            extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "stop_token_ids": [319]},
        ).choices
        return [choice.text for choice in choices]

    assert text(5) == text(5) != text(6)


def test_frames_over_a_raw_socket(live: Live) -> None:
    body = json.dumps({"prompt": "a\nb", "stream": True, "max_tokens": 3, "echo": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection((urlsplit(live.url).hostname, urlsplit(live.url).port), timeout=60) as connection:
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        raw = b""
        while part := connection.recv(65536):
            raw += part
    headers, _, rest = raw.partition(b"\r\n\r\n")
    assert b"200 OK" in headers.splitlines()[0] and b"content-type: text/event-stream" in headers.lower()
    sizes_and_data = rest.split(b"\r\n")
    stream = b"".join(sizes_and_data[1::2])
    frames = stream.split(b"\n\n")
    assert frames[-1] == b"" and frames[-2] == b"data: [DONE]" and stream.isascii()
    datas = [json.loads(frame[6:]) for frame in frames[:-2] if frame.startswith(b"data: ")]
    assert all(b"\n" not in frame for frame in frames)
    assert "".join(d["choices"][0]["text"] for d in datas).startswith("a\nb")


def test_a_raw_disconnect_frees_what_it_held(live: Live) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": CONTEXT - 5, "ignore_eos": True, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    engine = live.loaded.engine
    before = engine.snapshot()
    with socket.create_connection((urlsplit(live.url).hostname, urlsplit(live.url).port), timeout=60) as connection:
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        until(lambda: engine.snapshot().generation_tokens > before.generation_tokens)
    until(lambda: engine.snapshot().num_requests_running == 0)
    after = engine.snapshot()
    ended = sum((after.success | after.failure).values()) - sum((before.success | before.failure).values())
    assert ended == 2 and after.failure["internal"] == 0
