"""Hold a built image to what is said of it: its size, its user, no compiler, ready, an answer, a scrape, SIGTERM.

    python -m benchmarks.image [--tag coldstream:local] [--volume HOST:INSIDE]... [--json JSON] [-- COMMAND...]

Runs it with buildah in chroot isolation, which needs root and no container engine; the network is the host's. Debian's
`prometheus` scrapes it. COMMAND: of the image, in place of its own (`serve`). --volume: a directory that the container
may read, e.g. a packed model, since packing takes minutes. Exits with 1 and says what is wrong. The last line of
standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.dashboard import Expression, ask, prometheus

ENGINE = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}  # as the image was built
PACKING_S = 3600  # a model is packed first, on a busy host
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "ld", "make")
QUESTION = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 24, "temperature": 0}
LONG = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 400, "stream": True}
HITS = Expression("hits", "coldstream_neuron_cache_hits_total", "{{tier}}")


def buildah(*arguments: str) -> str:
    env = os.environ | ENGINE
    return subprocess.run(["buildah", *arguments], env=env, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def container(tag: str) -> Iterator[str]:
    name = buildah("from", tag)
    try:
        yield name
    finally:
        buildah("rm", name)


def file_figures(name: str) -> dict[str, Any]:
    """What its files tell: bytes of all, and the compilers among them."""
    root = Path(buildah("mount", name))
    try:
        num_bytes = int(
            subprocess.run(["du", "-sb", root], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        there = [c for c in COMPILERS if any((root / where / c).exists() for where in ("usr/bin", "usr/local/bin"))]
    finally:
        buildah("umount", name)
    return {"bytes": num_bytes, "compilers": there}


@contextmanager
def running(name: str, volumes: Sequence[str], command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The image's command under way, and where it listens."""
    port = _free_port()
    run = ["buildah", "run", "--isolation", "chroot", "--env", f"COLDSTREAM_PORT={port}"]
    run += [f"--volume={volume}:ro" for volume in volumes]
    process = subprocess.Popen([*run, name, "--", "coldstream", *(command or ["serve"])], env=os.environ | ENGINE)
    try:
        yield process, f"127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.kill(served_pid(process.pid), signal.SIGKILL)
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def served_pid(ancestor: int) -> int:
    """The descendant of a process that has no children: what runs inside."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    pid = ancestor
    while pid in parents:
        pid = max(parents[pid])
    return pid


def wait_until_ready(process: subprocess.Popen[bytes], address: str) -> float:
    started = time.monotonic()
    while process.poll() is None and time.monotonic() < started + PACKING_S:
        try:
            if httpx.get(f"http://{address}/ready", timeout=30).status_code == 200:
                return time.monotonic() - started
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise SystemExit(f"the container was not ready (exit code {process.poll()})")


def user_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("Uid:")[1].split()[0])


def scraped(address: str, url: str) -> dict[str, float]:
    """Hits by tier, as a Prometheus has them after it saw an answer."""
    start_s = time.time()
    time.sleep(5)
    return {tier: points[-1][1] for tier, points in ask(url, HITS, start_s, time.time()).items()}


def stopped(process: subprocess.Popen[bytes], address: str) -> dict[str, Any]:
    """SIGTERM during a stream: how the stream ended, the exit code, the seconds."""
    with httpx.stream("POST", f"http://{address}/v1/chat/completions", json=LONG, timeout=300) as response:
        lines = response.iter_lines()
        next(lines)
        start = time.monotonic()
        os.kill(served_pid(process.pid), signal.SIGTERM)
        rest = "\n".join(lines)
    code = process.wait(120)
    end = "finished" if "[DONE]" in rest else "cut with an error" if '"error"' in rest else "cut without a word"
    return {"stream": end, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}


def look(tag: str, volumes: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    with container(tag) as name:
        found = {"tag": tag, **file_figures(name)}
        with running(name, volumes, command) as (process, address), prometheus(address) as url:
            found["ready_s"] = round(wait_until_ready(process, address), 1)
            found["uid"] = user_of(served_pid(process.pid))
            health = httpx.get(f"http://{address}/health", timeout=30).json()
            found |= {name: health[name] for name in ("mode", "io_engine", "kernel")}
            answer = httpx.post(f"http://{address}/v1/chat/completions", json=QUESTION, timeout=600).json()
            found["answer"] = answer["choices"][0]["message"]["content"]
            found["hits"] = scraped(address, url)
            found["sigterm"] = stopped(process, address)
    return found


def wrong(found: dict[str, Any]) -> list[str]:
    """What should not be."""
    checks = {
        "runs as root": found["uid"] == 0,
        "holds a compiler": bool(found["compilers"]),
        "gave an empty answer": not found["answer"],
        "was not scraped": not any(found["hits"].values()),
        "did not end with 0": found["sigterm"]["exit_code"] != 0,
        "cut the stream without a word": found["sigterm"]["stream"] == "cut without a word",
    }
    return [what for what, so in checks.items() if so]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="coldstream:local")
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    found = look(arguments.tag, arguments.volume, arguments.command)
    found["wrong"] = wrong(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    if found["wrong"]:
        raise SystemExit(f"the image {', '.join(found['wrong'])}")


if __name__ == "__main__":
    main()
