"""Is the budget kept? `coldstream serve` in a memory cgroup equal to its --memory, while requests of all kinds come in.

    python -m benchmarks.memory_budget [MODEL ...] [--requests 200] [--modes sparse dense] [--ffn-cache 30%]

Each MODEL (the default one without any) is packed outside the cgroup unless it is packed already. Then, mode by mode:
asks `serve` for the smallest budget (by a refusal), serves in a cgroup of exactly that, sends requests, reads the
kernel's counters. A line for each run, one JSON line at the end, and the same in benchmarks/results. Needs a memory
cgroup that children can be made in. Exit code 1 when a server was killed or a request not answered.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.memory_cgroup import CgroupCounters, MemoryCgroup
from runtime.load import default_model
from runtime.packed import is_packed

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory_budget.json"
TEXT = ROOT / "runtime" / "texts" / "heldout.txt"
COMMAND = (sys.executable, "-c", "from server.cli import main; main()")
AT_ONCE = 4
_SAMPLE_S = 0.05
_START_S = 300
_REQUEST_S = 300


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready, inside its cgroup."""

    url: str
    name: str
    max_model_len: int
    process: subprocess.Popen[bytes]
    cgroup: MemoryCgroup


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has shown. answered: requests with status 200 and a complete body."""

    answered: int
    refused: dict[int, int]
    exit_code: int | None  # None: alive at the end, as it should be
    counters: CgroupCounters
    held_peak_bytes: int  # sampled; pages that the kernel cannot take back
    seconds: float


def smallest_budget(arguments: list[str], limit_bytes: int | None = None) -> int:
    """The smallest budget in bytes, as `coldstream serve` names it when it refuses 1 MiB. RuntimeError otherwise."""
    command = [*COMMAND, "serve", *arguments, "--memory", "1MiB", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=_START_S)
    found = re.search(r"the\s+smallest\s+that\s+works\s+is\s+--memory\s+(\d+)MiB", done.stdout + done.stderr)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"serve --memory 1MiB was not refused:\n{done.stdout}{done.stderr}")
    return int(found[1]) << 20


@contextmanager
def serving(arguments: list[str], memory_bytes: int, log: Path) -> Iterator[Served]:
    """`coldstream serve` with --memory and a cgroup of the same size; what it prints goes to `log`.

    Raises NoCgroup; RuntimeError, with the output, when it ends before it is ready.
    """
    with MemoryCgroup(memory_bytes) as cgroup, log.open("wb") as output:
        command = [*COMMAND, "serve", *arguments, "--memory", str(memory_bytes), "--port", "0"]
        process = subprocess.Popen(
            cgroup.command(command), cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield _ready(process, cgroup, log)
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """This environment without options for coldstream; wide lines, so that what it says is in one piece."""
    return {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_")} | {"COLUMNS": "200"}


def _ready(process: subprocess.Popen[bytes], cgroup: MemoryCgroup, log: Path) -> Served:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        found = re.search(r"ready: (http://\S+) serves", log.read_text(errors="replace"))
        if found is not None:
            card = httpx.get(f"{found[1]}/v1/models").json()["data"][0]
            return Served(found[1], card["id"], card["max_model_len"], process, cgroup)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    counters = cgroup.counters()
    raise RuntimeError(f"not ready (exit code {process.poll()}, {counters}):\n{log.read_text(errors='replace')}")


class _Sampler:
    """Reads what the cgroup holds again and again in a thread of its own, and keeps the largest."""

    def __init__(self, cgroup: MemoryCgroup) -> None:
        self.peak_bytes = 0
        self._cgroup = cgroup
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._cgroup.counters().held_bytes)


def drive(served: Served, num_requests: int, text: str) -> Outcome:
    """Sends requests of all kinds, `AT_ONCE` at a time."""
    start = time.monotonic()
    with _Sampler(served.cgroup) as sampler, httpx.Client(base_url=served.url, timeout=_REQUEST_S) as client:
        ids = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
        send = _Requests(client, served, ids).send
        with ThreadPoolExecutor(AT_ONCE) as pool:
            statuses = list(pool.map(send, range(num_requests)))
    refused = {s: statuses.count(s) for s in sorted(set(statuses)) if s != 200}
    return Outcome(
        answered=statuses.count(200),
        refused=refused,
        exit_code=served.process.poll(),
        counters=served.cgroup.counters(),
        held_peak_bytes=sampler.peak_bytes,
        seconds=time.monotonic() - start,
    )


class _Requests:
    """Request number i, its kind by turns. ids: tokens of a text that is longer than any context."""

    def __init__(self, client: httpx.Client, served: Served, ids: list[int]) -> None:
        self._client, self._served, self._ids = client, served, ids
        self._kinds: tuple[Callable[[int], int], ...] = (
            self._short_chat,
            self._full_context,
            self._streamed,
            self._scored,
            self._choices,
            self._full_context_streamed,
            self._penalties,
            self._left_early,
        )

    def send(self, i: int) -> int:
        """The status; 0 when the connection broke."""
        try:
            return self._kinds[i % len(self._kinds)](i)
        except httpx.HTTPError:
            return 0

    def _prompt(self, i: int, length: int) -> list[int]:
        start = (i * 997) % max(1, len(self._ids) - length)
        return self._ids[start : start + length]

    def _short_chat(self, i: int) -> int:
        return self._post("chat/completions", messages=[{"role": "user", "content": f"Say {i}."}], max_tokens=8)

    def _full_context(self, i: int) -> int:
        return self._post("completions", prompt=self._prompt(i, self._served.max_model_len - 8), max_tokens=8)

    def _full_context_streamed(self, i: int) -> int:
        prompt = self._prompt(i, self._served.max_model_len - 8)
        return self._stream(prompt=prompt, max_tokens=8, temperature=1.0, top_p=0.9, seed=i)

    def _streamed(self, i: int) -> int:
        return self._stream(prompt=self._prompt(i, 32), max_tokens=32, stream_options={"include_usage": True})

    def _scored(self, i: int) -> int:
        """The prompt's own log-probabilities: logits of all its rows."""
        prompt = self._prompt(i, self._served.max_model_len - 1)
        return self._post("completions", prompt=prompt, max_tokens=1, echo=True, logprobs=20)

    def _choices(self, i: int) -> int:
        return self._post("completions", prompt=self._prompt(i, 48), max_tokens=8, n=4, logprobs=20, seed=i)

    def _penalties(self, i: int) -> int:
        return self._post(
            "completions",
            prompt=self._prompt(i, 64),
            max_tokens=16,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
            top_k=40,
        )

    def _left_early(self, i: int) -> int:
        return self._stream(prompt=self._prompt(i, self._served.max_model_len // 2), max_tokens=64, leave_after=4)

    def _post(self, path: str, **body: Any) -> int:
        answer = self._client.post(f"/v1/{path}", json={"model": self._served.name, **body})
        answer.json()
        return answer.status_code

    def _stream(self, *, leave_after: int | None = None, **body: Any) -> int:
        whole = {"model": self._served.name, "stream": True, **body}
        last = ""
        with self._client.stream("POST", "/v1/completions", json=whole) as answer:
            for number, line in enumerate(filter(None, answer.iter_lines())):
                last = line
                if leave_after is not None and number >= leave_after:
                    return answer.status_code
            return answer.status_code if last == "data: [DONE]" or answer.status_code != 200 else 0


def prepare(model: str, out: Path, *arguments: str) -> Path:
    """`coldstream prepare`, in a process of its own. RuntimeError with its output when it fails."""
    command = [*COMMAND, "prepare", model, "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"coldstream prepare {model}:\n{done.stdout}{done.stderr}")
    return out


def measure(packed: Path, mode: str, ffn_cache: str, num_requests: int, log: Path) -> dict[str, Any]:
    """One run at the smallest budget, as a flat dict."""
    arguments = [str(packed), "--mode", mode, *(() if ffn_cache == "auto" else ("--ffn-cache", ffn_cache))]
    budget = smallest_budget(arguments)
    with serving(arguments, budget, log) as served:
        outcome = drive(served, num_requests, TEXT.read_text(encoding="utf-8")[:60_000])
        limit = served.cgroup.limit_bytes
        resident = resident_peak_bytes(served.process.pid) if outcome.exit_code is None else 0
    flat = asdict(outcome)
    counters = flat.pop("counters")
    return {
        "model": packed.name,
        "mode": mode,
        "ffn_cache": ffn_cache,
        "max_model_len": served.max_model_len,
        "requests": num_requests,
        "smallest_bytes": budget,
        "limit_bytes": limit,
        "resident_peak_bytes": resident,
        **counters,
        **flat,
        "kept": outcome.exit_code is None and not counters["oom_kills"] and outcome.answered == num_requests,
    }


def resident_peak_bytes(pid: int) -> int:
    """Largest RSS so far; pages of shared libraries that another cgroup has been charged for are in it too."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def machine() -> dict[str, str]:
    """What the figures were seen on."""
    cpu = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"model name\s*: (.*)", cpu)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": f"{names[0] if names else platform.machine()} x {os.cpu_count()}",
        "kernel": platform.release(),
        "commit": commit.stdout.strip(),
    }


def line(run: dict[str, Any]) -> str:
    """A run for people."""
    sizes = {k: f"{run[f'{k}_bytes'] >> 20} MiB" for k in ("limit", "peak", "held_peak", "resident_peak")}
    told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in sizes.items())
    return (
        f"{run['model']} {run['mode']}: {'kept' if run['kept'] else 'NOT KEPT'}; {told}, failcnt {run['failures']}, "
        f"{run['oom_kills']} killed, {run['answered']} of {run['requests']} answered in {run['seconds']:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--modes", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--ffn-cache", default="30%", help="auto: as much as fits")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for model in options.models or [default_model()]:
            packed = Path(model) if is_packed(Path(model)) else prepare(model, Path(directory) / Path(model).stem)
            for mode in options.modes:
                run = measure(packed, mode, options.ffn_cache, options.requests, Path(directory) / "serve.log")
                print(line(run), flush=True)
                runs.append(run)
    result = {"benchmark": "memory_budget", **machine(), "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if all(run["kept"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
