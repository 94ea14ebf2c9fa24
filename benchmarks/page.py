"""Look at the built-in page over a real model: ask, watch the counters, take a picture.

    python -m benchmarks.page [--url URL] [--shot PNG] [--json JSON] [-- SERVE...]

Starts `coldstream serve` unless --url names a server. Fails when no answer came, or when a counter of a tier stayed 0.
Needs Debian's chromium and chromium-driver. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.chromium import Chromium, is_installed, wait_for
from benchmarks.serving import serving

QUESTION, SECOND = "Why is the sky blue?", "Tell me a story about a lighthouse and the sea."
ANSWER = ".turn.assistant:last-child"
COUNTERS = {
    "hits": '.tier [data-is="hits"]',
    "lookups": '.tier [data-is="lookups"]',
    "bytes": '.flow [data-is="bytes"]',
}


def look(url: str, shot: Path | None, tokens: int) -> dict[str, Any]:
    """What the page showed after one answer; the picture is taken while the second one is under way."""
    with Chromium(1180, 960) as browser:
        browser.open(f"{url}/")
        wait_for(lambda: browser.text("#state") == "ready", "the server to be ready")
        browser.run(f"document.getElementById('max-tokens').value = {tokens}")
        browser.run("document.getElementById('temperature').value = 0")
        browser.type("#prompt", QUESTION + "\ue007")
        parts = _lengths(browser)
        wait_for(lambda: browser.text(f"{ANSWER} .cost"), "the answer's cost", 300)
        answer, cost = browser.text(f"{ANSWER} .text"), browser.text(f"{ANSWER} .cost")
        browser.type("#prompt", SECOND + "\ue007")
        wait_for(lambda: len(browser.text(f"{ANSWER} .text")) > 80, "the second answer to be under way", 300)
        if shot is not None:
            shot.write_bytes(browser.screenshot())
        counters = {name: browser.text(selector) for name, selector in COUNTERS.items()}
        figures = {name: browser.text(f"#{name}") for name in ("model", "tokens", "token-rate", "resident", "budget")}
        complaints = browser.console()
    return {"answer": answer, "lengths": parts, "cost": cost, **counters, **figures, "complaints": complaints}


def _lengths(browser: Chromium) -> list[int]:
    """Lengths of the answer as it grew: more than one, or it was not streamed."""
    lengths: list[int] = []

    def grew() -> bool:
        length = len(browser.text(f"{ANSWER} .text"))
        if length and length not in lengths:
            lengths.append(length)
        return len(lengths) >= 5 or bool(browser.text(f"{ANSWER} .cost"))  # the cost comes at its end

    wait_for(grew, "an answer that grows, or ends", 300)
    return lengths


def check(seen: dict[str, Any]) -> None:
    """Raises SystemExit for what should not be."""
    zero = [name for name in COUNTERS if not re.match("[1-9]", seen[name])]
    if len(seen["lengths"]) < 2:
        raise SystemExit(f"the page failed: the answer {seen['answer']!r} came at once, or nobody looked in time")
    if zero or not seen["answer"] or seen["complaints"]:
        raise SystemExit(f"the page failed: zero {zero}, complaints {seen['complaints']}, answer {seen['answer']!r}")


def _chromium_version() -> str:
    return subprocess.run(["chromium", "--version"], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
    else:
        with serving(arguments.serve) as served:
            yield served.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--shot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("serve", nargs="*", help="of `coldstream serve`: the model and options")
    arguments = parser.parse_args()
    if not is_installed():
        raise SystemExit("chromium or chromedriver is missing (Debian: apt-get install chromium chromium-driver)")
    with _server(arguments) as url:
        seen = {"chromium": _chromium_version(), **look(url, arguments.shot, arguments.tokens)}
    check(seen)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
