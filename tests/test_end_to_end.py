"""The whole product: `coldstream serve` in a process of its own, a checkpoint on disk, the `openai` client in front.

The model is a tiny random one, with a context long enough that a request can be caught while it runs. `serve` packs it
first, into a cache directory, as it does for everybody.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import parser

pytestmark = pytest.mark.timeout(300)

MODEL = "tiny"
CONTEXT = 16384
WAIT_S = 60
HELLO = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Server:
    """A running server: its process, its address, what it has said so far."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]


@pytest.fixture(scope="module")
def checkpoint(tiny_relu2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ReLU² checkpoint with a long context (RoPE needs no weights for it)."""
    path = tmp_path_factory.mktemp("end-to-end") / "model"
    shutil.copytree(tiny_relu2.checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return path


@contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[Server]:
    """`coldstream serve` until the end of the block; ready at its start."""
    command = [str(Path(sys.executable).with_name("coldstream")), "serve", str(checkpoint), "--port", "0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_")}
    process = subprocess.Popen(
        [
            *command,
            "--served-model-name",
            MODEL,
            "--max-model-len",
            str(CONTEXT),
            "--ffn-cache",
            "20%",
            "--threads",
            "1",
            *flags,
        ],
        env=env | {"COLDSTREAM_CACHE_DIR": str(checkpoint.parent / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: None)
    try:
        url = _wait_until_ready(process, said)
        reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
        reader.start()
        yield Server(process, url, said)
    finally:
        process.kill()
        process.wait()
        if reader.ident is not None:
            reader.join(WAIT_S)
        if process.stdout is not None:
            process.stdout.close()


def _wait_until_ready(process: subprocess.Popen[str], said: list[str]) -> str:
    for line in process.stdout or ():
        said.append(line)
        if line.startswith("ready: "):
            return line.split()[1]
    raise AssertionError(f"ended before it was ready:\n{''.join(said)}")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as opened:
        yield opened


def metrics(server: Server) -> dict[str, float]:
    """Every sample by its name, without the prefix, and its labels: `transfer_bytes_total dst=cpu src=disk`."""
    families = parser.text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = (s for family in families for s in family.samples)
    return {
        " ".join([s.name.removeprefix("coldstream_"), *(f"{k}={s.labels[k]}" for k in sorted(s.labels))]): s.value
        for s in samples
    }


def until(server: Server, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Scrapes until the condition holds."""
    deadline = time.monotonic() + WAIT_S
    while not holds(found := metrics(server)):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    options = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}} | options
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def test_it_packed_the_checkpoint_first_and_says_so(server: Server, checkpoint: Path) -> None:
    said = "".join(server.said)
    assert "not packed yet" in said and str(checkpoint.parent / "cache") in said
    (packed,) = (checkpoint.parent / "cache").iterdir()
    assert (packed / "manifest.json").is_file()
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_streams_what_it_does_not_stream(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text and text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()
    assert 0 < whole.usage.completion_tokens <= 32
    assert whole.usage.prompt_tokens + whole.usage.completion_tokens == whole.usage.total_tokens
    assert len({c.id for c in chunks}) == 1


def test_completions_stream_what_they_do_not_stream(client: openai.OpenAI) -> None:
    whole = complete(client, "the sea")
    streamed = "".join(c.choices[0].text for c in complete(client, "the sea", stream=True))
    assert streamed == whole.choices[0].text
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"


def test_sampling_repeats_with_its_seed_only(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return str(complete(client, "once", temperature=1, seed=seed, max_tokens=48).choices[0].text)

    assert sample(7) == sample(7) != sample(8)


def test_answers_fit_their_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "mood": {"enum": ["glad", "sad"]},
        },
        "required": ["name", "age", "mood"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    ask: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "response_format": response_format}
    whole = client.chat.completions.create(**ask, n=3, seed=5)
    for choice in whole.choices:
        value = json.loads(choice.message.content or "")
        assert choice.finish_reason == "stop" and list(value) == ["name", "age", "mood"]
        assert len(value["name"]) <= 8 and value["age"] in range(100) and value["mood"] in ("glad", "sad")
    streamed = client.chat.completions.create(**ask, seed=6, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole.choices[1].message.content
    cut = client.chat.completions.create(**ask, seed=5, stop='", "age"').choices[0]
    text = whole.choices[0].message.content or ""
    assert cut.message.content == text[: text.index('", "age"')] and cut.finish_reason == "stop"
    free = client.chat.completions.create(**ask | {"response_format": {"type": "json_object"}, "max_tokens": 30})
    assert (free.choices[0].message.content or "").startswith("{")


def test_stop_is_not_in_the_text(client: openai.OpenAI) -> None:
    text = complete(client, "the sea", max_tokens=48).choices[0].text
    middle = next(i for i in range(len(text) // 2, len(text) - 4) if "�" not in text[i : i + 4])
    stop = text[middle : middle + 4]
    cut = complete(client, "the sea", max_tokens=48, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_text_does_not_depend_on_company(client: openai.OpenAI) -> None:
    prompts = [f"{word} " * (i + 1) for i, word in enumerate(("a", "ship", "of", "the", "line", "sails"))]
    alone = [complete(client, p, max_tokens=48).choices[0].text for p in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda p: complete(client, p, max_tokens=48).choices[0].text, prompts))
    assert together == alone


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="another", messages=HELLO)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)  # type: ignore[arg-type]
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, "long " * CONTEXT)
    assert long.value.code == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in long.value.message


def test_metrics_add_up(server: Server, client: openai.OpenAI) -> None:
    before = metrics(server)
    used = [complete(client, "the cold stream", max_tokens=n).usage for n in (8, 16, 40)]
    after = metrics(server)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    lookups, hits, misses = (moved[f"neuron_cache_{n}_total tier=cpu"] for n in ("lookups", "hits", "misses"))
    assert hits + misses == lookups and hits > 0 and misses > 0
    assert 0 < moved["needed_bytes_total"] <= moved["transfer_bytes_total dst=cpu src=disk"]
    assert moved["read_size_bytes_sum src=disk"] == moved["transfer_bytes_total dst=cpu src=disk"]
    assert moved["read_size_bytes_count src=disk"] > 0
    assert after["neuron_cache_used_bytes tier=cpu"] <= after["neuron_cache_capacity_bytes tier=cpu"]
    assert moved["prompt_tokens_total"] == sum(u.prompt_tokens for u in used)
    assert moved["generation_tokens_total"] == sum(u.completion_tokens for u in used) == 64
    assert moved["request_success_total finish_reason=length"] == 3
    assert moved["time_to_first_token_seconds_count"] == 3
    assert moved["steps_total kind=sparse"] == 64 - 3  # the first token of each comes out of prefill
    assert 0 < moved["active_neurons_total"] <= moved["predicted_neurons_total"] <= lookups


def test_a_client_that_leaves_frees_its_request(server: Server, client: openai.OpenAI) -> None:
    before = until(server, lambda m: m["num_requests_running"] == 0)
    stream = complete(client, "on and on", max_tokens=CONTEXT - 100, stream=True)
    for _ in range(3):
        next(stream)
    assert metrics(server)["num_requests_running"] == 1
    stream.close()
    after = until(server, lambda m: m["num_requests_running"] == 0)
    assert after["request_failure_total reason=cancelled"] == before["request_failure_total reason=cancelled"] + 1
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < CONTEXT / 2
    assert after["kv_used_bytes"] == 0
    assert complete(client, "and then").usage.completion_tokens == 24


def test_sigterm_cuts_what_runs_after_the_drain_time_and_exits_with_0(checkpoint: Path) -> None:
    with (
        serving(checkpoint, "--drain-timeout", "0.2") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client,
    ):
        stream = complete(client, "on and on", max_tokens=CONTEXT - 100, stream=True)
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            list(stream)  # says that it was cut: a stream that just ended would look whole
        assert running.process.wait(WAIT_S) == 0
    assert "Traceback" not in "".join(running.said)
