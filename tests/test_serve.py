"""The life of a serving process: health while loading, readiness, what it prints, signals, refusals, exit codes.

Each test runs `coldstream serve` in a process of its own, over a runtime that loads nothing (fake_serve.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import httpx
import pytest

from server.serve import display_name, url_of

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 30


class Process:
    """A running `coldstream serve --port 0` whose output is read as it comes."""

    def __init__(self, model: Path, *args: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "tests.fake_serve", "serve", str(model), "--port", "0", *args]
        env = {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_")}
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.seen: list[str] = []
        self._lines: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stdout = self.popen.stdout
        if stdout is not None:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)

    def expect(self, pattern: str) -> re.Match[str]:
        """Reads on to the first line that matches."""
        while True:
            line = self._lines.get(timeout=WAIT_S)
            if line is None:
                raise AssertionError(f"ended before {pattern!r}:\n{''.join(self.seen)}")
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found

    def end(self) -> tuple[int, str]:
        """(exit code, all output), once the process has ended by itself."""
        code = self.popen.wait(WAIT_S)
        while (line := self._lines.get(timeout=WAIT_S)) is not None:
            self.seen.append(line)
        return code, "".join(self.seen)


@contextmanager
def serving(model: Path, *args: str) -> Iterator[Process]:
    process = Process(model, *args)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()
        process._reader.join()
        if process.popen.stdout is not None:
            process.popen.stdout.close()


def test_health_answers_while_loading_and_ready_only_after(tmp_path: Path) -> None:
    with serving(tmp_path / "slow") as process:
        url = process.expect(r"listening on (http://127\.0\.0\.1:\d+)")[1]
        process.expect("packing it into CACHE")
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        (tmp_path / "slow").touch()
        process.expect("engine started")
        process.expect(f"ready: {url} serves ")
        process.expect(f"curl {url}/v1/chat/completions")
        assert httpx.get(f"{url}/ready").status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        code, output = process.end()
    assert code == 0, output
    assert "engine shut down within 30 s" in output
    assert "closed" in output
    assert "Memory plan" in output


def test_a_server_whose_engine_has_broken_leaves_with_1(tmp_path: Path) -> None:
    with serving(tmp_path / "frail") as process:
        process.expect("engine started")
        code, output = process.end()
    assert code == 1 and "the engine has ended because of an error of its own" in output
    assert "engine shut down" in output and "closed" in output and "Traceback" not in output


def test_an_audit_rate_that_has_no_effect_is_said(tmp_path: Path) -> None:
    for mode, said in (("dense", True), ("sparse", False)):
        with serving(tmp_path / mode, "--audit-rate", "0.5") as process:
            process.expect("ready: ")
            process.popen.send_signal(signal.SIGTERM)
            _, output = process.end()
        assert ("--audit-rate has no effect" in output) == said


def test_sigterm_while_loading_leaves_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "slow") as process:
        process.expect("packing: 50 %")
        process.popen.send_signal(signal.SIGTERM)
        code, output = process.end()
    assert code == 0, output
    assert "engine started" not in output
    assert "Traceback" not in output


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    with serving(tmp_path / "broken") as process:
        code, output = process.end()
    assert code == 1
    assert output.rstrip().endswith("broken: ends early")
    assert "Traceback" not in output


def test_a_budget_too_small_is_refused_before_loading(tmp_path: Path) -> None:
    with serving(tmp_path / "good", "--memory", "10MiB") as process:
        code, output = process.end()
    assert code == 1
    assert "--memory" in output.splitlines()[-1]
    assert "engine started" not in output


def test_drain_timeout_and_key(tmp_path: Path) -> None:
    with serving(
        tmp_path / "good", "--drain-timeout", "2.5", "--api-key", "k", "--served-model-name", "name"
    ) as process:
        url = process.expect(r"ready: (http://\S+) serves name")[1]
        assert "k" not in process.expect("curl")[0].split("authorization")[-1].split()
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer k"}).status_code == 200
        process.popen.send_signal(signal.SIGINT)
        code, output = process.end()
    assert code == 0, output
    assert "engine shut down within 2.5 s" in output


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        serving(tmp_path / "good", "--port", str(taken.getsockname()[1])) as process,
    ):
        code, output = process.end()
    assert code == 1
    assert output.count("\n") == 1
    assert "--port" in output


def test_json_log_is_json_from_the_first_line_to_the_last(tmp_path: Path) -> None:
    with serving(tmp_path / "good", "--log-format", "json", "--api-key", "hush") as process:
        url = process.expect(r"ready: (http://[^ ]+) serves")[1]
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer hush"}).status_code == 200
        process.expect('"/v1/models"')
        process.popen.send_signal(signal.SIGTERM)
        code, output = process.end()
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert code == 0, output
    others = [line for line in output.splitlines() if not line.startswith("{")]
    assert {line.split()[0] for line in others} <= {"engine", "closed"}, output  # what the fake runtime prints
    assert any("plan" in line for line in lines) and "hush" not in output
    with serving(tmp_path / "broken", "--log-format", "json") as process:
        code, output = process.end()
    last = json.loads(output.splitlines()[-1])
    assert code == 1 and last["level"] == "error" and last["message"].endswith("broken: ends early")


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("example", "http://example:1")],
)
def test_url_of(host: str, url: str) -> None:
    assert url_of(host, 1) == url


def test_display_name(tmp_path: Path) -> None:
    (tmp_path / "Some-1.5B.Q4_1.gguf").touch()
    assert display_name(str(tmp_path / "Some-1.5B.Q4_1.gguf")) == "Some-1.5B.Q4_1"
    assert display_name(f"{tmp_path}/") == tmp_path.name
    assert display_name("org/name") == "org/name"
