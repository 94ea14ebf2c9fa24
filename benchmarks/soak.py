"""Soak: mixed load, clients that leave, bad requests, a full queue and faults of the disk, for a while; then the books.

A real `coldstream serve` (fault_server.py: with a door for faults) is asked by several clients at once, over loopback
only. Wrong is: a status that does not belong to the request; a 5xx that no injected fault explains; an answer after a
fault whose text differs from that before it; at the end, something still held (requests, KV, descriptors), resident
memory more than 5 % above its level after the first quarter, counters that do not add up, or another exit code than 0.
The last line is one JSON object.

    python -m benchmarks.soak --minutes 20 [--model MODEL]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client import parser

from benchmarks.serving import Served, serving
from runtime.packed import is_packed

CACHE = "COLDSTREAM_CACHE_DIR"
MAX_BODY, CONTEXT = 64 << 10, 512
QUEUE, RUNNING = 4, 4
FLAGS = ("--max-model-len", str(CONTEXT), "--max-num-seqs", str(RUNNING), "--max-queue", str(QUEUE))
LIMITS = ("--max-body", str(MAX_BODY), "--max-wait", "60", "--ffn-cache", "25%", "--drain-timeout", "5")
REFERENCE: dict[str, Any] = {"prompt": "The sea is", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
KEEP_ALIVE_S = 5  # uvicorn's
PROVOKE_S = 60  # within which some request must meet a fault
ANSWER_S = 120  # within which the next request must be answered: behind a full queue, and one that a slow disk has left
ALL = 1_000_000_000  # reads
GROWTH = 1.05  # of resident memory, after the first quarter
SAMPLE_S = 30  # between two looks at the resident memory
TIMEOUT_S = 180.0
TIMEOUT = httpx.Timeout(TIMEOUT_S)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
BAD_BODIES: tuple[bytes, ...] = (
    *(b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": 1}', b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "tools": [1]}'),
    b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}',
)


@dataclass
class Books:
    """What the clients saw. Everything is under the lock."""

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    completed: int = 0  # choices that ended well
    tokens: int = 0  # of those
    refused: int = 0  # requests that met a full queue
    faulted: int = 0  # requests that an injected fault ended
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str) -> None:
        with self.lock:
            self.seen[what] += 1

    def complain(self, sentence: str) -> None:
        with self.lock:
            self.wrong.append(sentence)
        print(f"WRONG: {sentence}", flush=True)

    def answered(self, usage: dict[str, Any], choices: int) -> None:
        with self.lock:
            self.completed += choices
            self.tokens += usage["completion_tokens"]


class Client:
    """One client that asks for something else each time, until it is told to stop."""

    def __init__(self, url: str, books: Books, seed: int, stop: threading.Event) -> None:
        self._url, self._books, self._stop = url, books, stop
        self._rng = random.Random(seed)
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT)
        self._vocab_size = self._http.get("/tokenizer_info").json()["vocab_size"]
        self._actions: dict[Callable[[], None], int] = {
            self.whole: 5,
            self.streamed: 5,
            self.scored: 3,
            self.schema: 2,
            self.leaves_a_stream: 5,
            self.leaves_unanswered: 3,
            self.bad_body: 4,
            self.oversized_prompt: 2,
            self.oversized_body: 1,
            self.unknown_model: 1,
            self.looks_round: 3,
            self.burst: 1,
        }

    def run(self) -> None:
        while not self._stop.is_set():
            action = self._rng.choices([*self._actions], [*self._actions.values()])[0]
            try:
                action()
            except Exception as error:  # a client must not fall silent: what it did not expect is a finding
                self._books.complain(f"{action.__name__}: {type(error).__name__} {error}")
            self._books.note(action.__name__)
        self._http.close()

    # --- what goes well ---

    def whole(self) -> None:
        body = {"prompt": self._words(), "n": self._rng.choice((1, 1, 2)), "max_tokens": self._rng.randint(1, 12)}
        self._post("/v1/completions", body)

    def scored(self) -> None:
        ids = self._rng.choices(range(100, min(5000, self._vocab_size)), k=self._rng.randint(2, 60))
        answer = self._post("/v1/completions", {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0})
        if answer is not None and len(answer["choices"][0]["logprobs"]["tokens"]) != len(ids):
            self._books.complain("scored: a log-probability is missing")

    def schema(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA | {"additionalProperties": False}}}
        messages = [{"role": "user", "content": self._words()}]
        answer = self._post("/v1/chat/completions", {"messages": messages, "max_tokens": 16, "response_format": form})
        if answer is not None and answer["choices"][0]["finish_reason"] == "stop":
            text = answer["choices"][0]["message"]["content"]
            if json.loads(text)["n"] not in range(10):
                self._books.complain(f"schema: {text!r} does not fit")

    def streamed(self) -> None:
        messages = [{"role": "user", "content": self._words()}]
        body = {"messages": messages, "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}}
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            text = response.read().decode()
        if response.status_code != 200:
            self._failed(response.status_code, text)
            return
        datas = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        last = json.loads(datas[-2] if datas[-1] == "[DONE]" else datas[-1])
        if "error" in last:
            waited = last["error"]["type"] == "rate_limit_error"  # said too late for a status
            self._failed(429 if waited else 500, json.dumps(last))
        else:
            self._books.answered(last["usage"], 1)

    def burst(self) -> None:
        """More than the queue takes, at once."""
        threads = [threading.Thread(target=self.whole_alone) for _ in range(RUNNING + QUEUE + 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def whole_alone(self) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT) as http:
            self._judge(http.post("/v1/completions", json={"prompt": "a burst of", "max_tokens": 8}))

    # --- who leaves ---

    def leaves_a_stream(self) -> None:
        body = {"prompt": self._words(), "max_tokens": 100, "stream": True, "ignore_eos": True}
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                self._failed(response.status_code, response.read().decode())
                return
            for _, _part in zip(range(self._rng.randint(1, 6)), response.iter_raw(), strict=False):
                pass

    def leaves_unanswered(self) -> None:
        body = json.dumps({"prompt": self._words(), "max_tokens": 50, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        raw = head.encode() + b"content-type: application/json\r\n\r\n" + body
        parts = urlsplit(self._url)
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
            connection.sendall(raw[: self._rng.choice((10, len(raw) - 5, len(raw)))])
            time.sleep(self._rng.random() / 2)

    # --- what is refused ---

    def bad_body(self) -> None:
        content = self._rng.choice(BAD_BODIES)
        self._expect(400, "/v1/completions", content=content, headers={"content-type": "application/json"})

    def oversized_prompt(self) -> None:
        answer = self._expect(400, "/v1/completions", json={"prompt": "word " * (2 * CONTEXT)})
        if answer.json()["error"]["code"] != "context_length_exceeded":
            self._books.complain(f"oversized_prompt: {answer.text[:200]}")

    def oversized_body(self) -> None:
        self._expect(413, "/v1/completions", content=b" " * (MAX_BODY + 1))

    def unknown_model(self) -> None:
        self._expect(404, "/v1/completions", json={"prompt": "a", "model": "no such"})

    def looks_round(self) -> None:
        for path in ("/health", "/ready", "/metrics", "/cache", "/v1/models", "/tokenizer_info"):
            response = self._http.get(path)
            if response.status_code != 200:
                self._books.complain(f"GET {path}: {response.status_code}")

    # --- judging ---

    def _words(self) -> str:
        return " ".join(
            self._rng.choices(("sea", "ship", "harbour", "wind", "sail", "storm"), k=self._rng.randint(1, 40))
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return self._judge(self._http.post(path, json=body))

    def _judge(self, response: httpx.Response) -> dict[str, Any] | None:
        if response.status_code != 200:
            self._failed(response.status_code, response.text)
            return None
        answer: dict[str, Any] = response.json()
        self._books.answered(answer["usage"], len(answer["choices"]))
        return answer

    def _failed(self, status: int, text: str) -> None:
        """A good request that failed: a full queue may, and a fault that was injected; nothing else."""
        self._books.note(f"status {status}")
        with self._books.lock:
            self._books.refused += status == 429
            self._books.faulted += status == 500
        if status != 429 and not (status == 500 and is_injected(text)):
            self._books.complain(f"{status}: {text[:300]}")

    def _expect(self, status: int, path: str, **request: Any) -> httpx.Response:
        response = self._http.post(path, **request)
        if response.status_code != status:
            self._books.complain(f"{response.status_code} instead of {status}: {response.text[:300]}")
        return response


def is_injected(text: str) -> bool:
    """Whether an error is that of a read; there are no others than those asked for."""
    return "failed: " in text and "reading " in text


class Faults:
    """Asks for one fault after the other, and for a right answer after each."""

    def __init__(self, served: Served, books: Books, home: Path) -> None:
        self._served, self._books, self._home = served, books, home
        self._http = httpx.Client(base_url=served.url, timeout=TIMEOUT)
        self._reference = self._text()
        self.happened: Counter[str] = Counter()

    def each(self) -> Iterator[Callable[[], None]]:
        """Endlessly, in turn."""
        while True:
            yield from (self.eio, self.short, self.corrupted, self.cut_off, self.slow)

    def run(self, until_s: float, pause_s: float) -> None:
        for fault in self.each():
            if time.monotonic() + pause_s > until_s:
                return
            time.sleep(pause_s)
            fault()
            self._check_next(fault.__name__)

    def close(self) -> None:
        self._http.close()

    def eio(self) -> None:
        """All reads fail until a request has. A few would not do: a step of several requests that fails is taken again
        by the request, and may go well then."""
        try:
            self._provoke("eio", lambda: self._served.tell(f"eio {ALL}"))
        finally:
            self._served.tell("eio 0")

    def short(self) -> None:
        """Reads that give less than was asked for are read on: nothing fails."""
        self._served.tell("short 20")
        self._last("short")

    def slow(self) -> None:
        """A disk that takes 5 ms more each time: nothing fails."""
        self._served.tell("slow 0.005")
        self._last("slow")
        self._served.tell("slow 0")

    def cut_off(self) -> None:
        """The neurons' file has become shorter."""
        with shorter(self._home):
            self._provoke("cut_off", lambda: None)

    def _last(self, name: str) -> None:
        time.sleep(3)
        self._check_next(f"{name}, while it lasts")
        self.happened[name] += 1

    def corrupted(self) -> None:
        """A stretch of the neurons' file holds nonsense for a while."""
        with damaged(self._home):
            self._provoke("corrupted", lambda: None)

    def _provoke(self, name: str, start: Callable[[], None]) -> None:
        """Until some request has met the fault, ours or another; what only met reads that nobody waits for any more (of
        a client that has left) is started again."""
        before = failures(self._served.url)
        deadline = time.monotonic() + PROVOKE_S
        while time.monotonic() < deadline:
            start()
            response = self._http.post("/v1/completions", json={**REFERENCE, "prompt": f"{time.monotonic()} is"})
            if response.status_code == 500 and not is_injected(response.text):
                self._books.complain(f"{name}: {response.text[:300]}")
            if failures(self._served.url) > before:
                self.happened[name] += 1
                return
        self._books.complain(f"{name}: no request failed of it")

    def _check_next(self, name: str) -> None:
        """The next right request is right; one that a rest of the fault meets, or a full queue, is asked again."""
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            text = self._text()
            if text is not None:
                if text != self._reference:
                    self._books.complain(f"after {name}: {text!r} instead of {self._reference!r}")
                return
            time.sleep(0.5)
        self._books.complain(f"after {name}: no answer within {ANSWER_S} s")

    def _text(self) -> str | None:
        response = self._http.post("/v1/completions", json=REFERENCE)
        if response.status_code not in (200, 429) and not is_injected(response.text):
            self._books.complain(f"reference: {response.status_code} {response.text[:300]}")
        return response.json()["choices"][0]["text"] if response.status_code == 200 else None


@contextmanager
def shorter(path: Path) -> Iterator[None]:
    """A file that ends in its middle, and is whole again at the end of the block."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        rest = file.read()
        try:
            os.truncate(path, size // 2)
            yield
        finally:
            _overwrite(file, size // 2, rest)


@contextmanager
def damaged(path: Path, num_bytes: int = 32 << 20) -> Iterator[None]:
    """The middle of a file overwritten, and restored at the end of the block."""
    size = path.stat().st_size
    start, length = size // 4, min(num_bytes, size // 2)
    with path.open("r+b") as file:
        file.seek(start)
        before = file.read(length)
        try:
            _overwrite(file, start, bytes(length))
            yield
        finally:
            _overwrite(file, start, before)


def _overwrite(file: Any, start: int, content: bytes) -> None:
    file.seek(start)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


# --- the server from outside ---


def scrape(url: str) -> dict[str, float]:
    """Every sample by its name and labels, without the prefix."""
    families = parser.text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=TIMEOUT).text)
    return {
        " ".join([s.name.removeprefix("coldstream_"), *(f"{k}={v}" for k, v in sorted(s.labels.items()))]): s.value
        for family in families
        for s in family.samples
    }


def failures(url: str) -> float:
    return scrape(url)["request_failure_total reason=read_error"]


def total(metrics: dict[str, float], name: str) -> float:
    """Of a family over all its labels."""
    return sum(value for key, value in metrics.items() if key.split()[0] == name)


def process_levels(pid: int) -> tuple[int, int]:
    """(resident bytes, open descriptors)."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


def wait_until_idle(url: str) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = scrape(url)
        if found["num_requests_running"] + found["num_requests_waiting"] == 0:
            return found
        time.sleep(0.2)
    return scrape(url)


def check_books(books: Books, before: dict[str, float], after: dict[str, float]) -> None:
    """Whether the server's counters agree with each other and with what the clients saw."""
    for name in ("num_requests_running", "num_requests_waiting", "kv_used_bytes"):
        if after[name]:
            books.complain(f"{name} is {after[name]} at the end")
    for tier in {key.split("tier=")[1] for key in after if key.startswith("neuron_cache_lookups_total")}:
        lookups, hits, misses = (after[f"neuron_cache_{k}_total tier={tier}"] for k in ("lookups", "hits", "misses"))
        if lookups != hits + misses:
            books.complain(f"{tier}: {lookups} lookups, but {hits} hits and {misses} misses")
    spent = {
        name: total(after, name) - total(before, name) for name in ("request_success_total", "generation_tokens_total")
    }
    if spent["request_success_total"] < books.completed or spent["generation_tokens_total"] < books.tokens:
        books.complain(f"clients had {books.completed} choices and {books.tokens} tokens, the server counts {spent}")
    ended = after["time_to_first_token_seconds_count"]
    if after["e2e_request_latency_seconds_count"] != total(after, "request_success_total"):
        books.complain("the latency histogram does not count the successes")
    if ended > after["request_queue_time_seconds_count"]:
        books.complain("more first tokens than admitted requests")
    if after.get("request_failure_total reason=internal", 0.0):
        books.complain("there were internal failures")
    if (
        after["request_failure_total reason=queue_full"]
        < books.refused - after["request_failure_total reason=wait_limit"]
    ):
        books.complain("clients met a full queue more often than the server counts")
    if after["request_failure_total reason=read_error"] < books.faulted:
        books.complain("clients met more faults than the server counts")


def check_exit(served: Served, books: Books) -> float:
    """SIGTERM during a stream: drained or cut in time, exit code 0. Returns the seconds that it took."""
    body = {"prompt": "on and on", "max_tokens": CONTEXT - 20, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=TIMEOUT) as response:
        lines = response.iter_lines()
        next(lines)
        start = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        rest = "\n".join(lines)
    if "[DONE]" not in rest and '"error"' not in rest:
        books.complain("the stream was cut without a word")
    if served.process.wait(60) != 0:
        books.complain(f"exit code {served.process.returncode}")
    return time.monotonic() - start


def touch_all(url: str) -> None:
    """Prompts as long as the context, as many at once as run, other tokens each time: KV, the arena and the scratch
    memory have been written once, and what is resident afterwards grows by a leak only."""

    def ask(seed: int) -> None:
        ids = random.Random(seed).choices(range(100, 5000), k=CONTEXT - 8)
        body = {"prompt": ids, "max_tokens": 4, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=5 * TIMEOUT_S).raise_for_status()

    for turn in range(2):
        threads = [threading.Thread(target=ask, args=(turn * RUNNING + i,)) for i in range(RUNNING)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Levels:
    """Resident bytes of a process by the second, from a thread of its own, until the block's end."""

    def __init__(self, pid: int) -> None:
        self.series: list[tuple[int, int]] = []
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        start = time.monotonic()
        while True:
            self.series.append((round(time.monotonic() - start), process_levels(self._pid)[0]))
            if self._stop.wait(SAMPLE_S):
                return

    def __enter__(self) -> Levels:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def clients(url: str, books: Books, num: int, seed: int) -> Iterator[None]:
    """`num` clients at work for the time of the block."""
    stop = threading.Event()
    threads = [threading.Thread(target=Client(url, books, seed + i, stop).run) for i in range(num)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def soak(served: Served, seconds: float, num_clients: int, seed: int) -> dict[str, Any]:
    """Runs it all against a server that is ready."""
    books = Books()
    served.tell("home")
    touch_all(served.url)
    before, (_, descriptors) = scrape(served.url), process_levels(served.process.pid)
    faults = Faults(served, books, _home(served))
    end_s, pause_s = time.monotonic() + seconds, max(3.0, seconds / 60)
    with Levels(served.process.pid) as levels, clients(served.url, books, num_clients, seed):
        faults.run(end_s - 0.75 * seconds, pause_s)
        early_bytes, _ = process_levels(served.process.pid)
        faults.run(end_s, pause_s)
    faults.close()
    after = wait_until_idle(served.url)
    time.sleep(2 * KEEP_ALIVE_S)
    late_bytes, late_descriptors = process_levels(served.process.pid)
    check_books(books, before, after)
    if late_bytes > GROWTH * early_bytes:
        books.complain(f"resident memory grew from {early_bytes} to {late_bytes} bytes")
    if late_descriptors > descriptors:
        books.complain(f"{late_descriptors} descriptors are open, {descriptors} were before")
    exit_s = check_exit(served, books)
    if "Traceback" in "".join(served.said):
        books.complain("the server's log holds a traceback")
    return {
        "seconds": seconds,
        "clients": num_clients,
        "asked": dict(sorted(books.seen.items())),
        "completed_choices": books.completed,
        "completion_tokens": books.tokens,
        "queue_full": books.refused,
        "faulted": books.faulted,
        "faults": dict(faults.happened),
        "resident_bytes": [early_bytes, late_bytes],
        "resident_series": levels.series,
        "descriptors": [descriptors, late_descriptors],
        "exit_s": round(exit_s, 2),
        "wrong": books.wrong,
    }


def _home(served: Served) -> Path:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for line in served.said:
            if line.startswith("home: "):
                return Path(line.removeprefix("home: ").strip())
        time.sleep(0.1)
    raise RuntimeError("the server did not say where the neurons' file is")


@contextmanager
def own_model(model: str | None) -> Iterator[list[str]]:
    """The model to serve for the time of the block: what is damaged here is a copy that nobody else reads."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory(prefix="coldstream-soak-") as directory:
        os.environ[CACHE] = directory
        try:
            if model is not None and is_packed(Path(model)):
                model = str(shutil.copytree(model, Path(directory) / Path(model).name))
            yield [] if model is None else [model]
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before


def main() -> int:
    options = _options()
    with own_model(options.model) as model, serving([*model, *FLAGS, *LIMITS], "benchmarks.fault_server") as served:
        found = soak(served, 60 * options.minutes, options.clients, options.seed)
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


def _options() -> argparse.Namespace:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--minutes", type=float, default=20.0)
    own.add_argument("--model", help="checkpoint, or packed model, which is copied; the default model, unless given")
    own.add_argument("--clients", type=int, default=6)
    own.add_argument("--seed", type=int, default=1)
    return own.parse_args()


if __name__ == "__main__":
    sys.exit(main())
