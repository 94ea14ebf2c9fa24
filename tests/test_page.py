"""The built-in page: its files over HTTP, and what it does in a headless Chromium (skipped by name without one)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.chromium import Chromium, is_installed, wait_for
from server.builtin_page import PATHS
from tests.fake_engine import FakeEngine, byte_tokenizer
from tests.live_server import LiveServer, live_server

PAGE = Path(__file__).resolve().parents[1] / "server" / "page"
ANSWER = ".turn.assistant:last-child"


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    if not is_installed():
        pytest.skip("chromium: not installed (apt-get install chromium chromium-driver)")
    with Chromium() as chromium:
        yield chromium


# --- files ---


def test_the_page_is_open_and_loads_nothing_from_elsewhere() -> None:
    with live_server(api_keys=frozenset({"k"})) as server:
        answers = {path: httpx.get(server.url + path) for path in PATHS}
    assert {answer.status_code for answer in answers.values()} == {200}
    assert all("default-src 'self'" in a.headers["content-security-policy"] for a in answers.values())
    assert [answers[p].headers["content-type"].split(";")[0] for p in sorted(PATHS)] == [
        *("text/html", "text/javascript", "text/css"),
    ]
    wanted = re.findall(r'(?:src|href)="([^"]*)"', answers["/"].text)
    assert {f"/{path}" for path in wanted if not path.startswith("data:")} == PATHS - {"/"}
    assert all("//" not in re.sub(r"^\s*//.*$|(?<=; )//.*$", "", a.text, flags=re.M) for a in answers.values())


def test_what_the_script_looks_for_is_on_the_page() -> None:
    script, page = ((PAGE / name).read_text(encoding="utf-8") for name in ("app.js", "index.html"))
    ids = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(ids) > 10 and ids <= set(re.findall(r'id="([\w-]+)"', page))
    assert set(re.findall(r'put\(\w+, "([\w-]+)"', script)) <= set(re.findall(r'data-is="([\w-]+)"', page))


def test_the_page_is_no_part_of_the_api(server: LiveServer) -> None:
    assert PATHS.isdisjoint(httpx.get(server.url + "/openapi.json").json()["paths"])


# --- in a browser ---


def show(browser: Chromium, server: LiveServer) -> None:
    browser.open(server.url + "/")
    wait_for(lambda: browser.text("#state") == "ready", "the page to find the server ready")


def ask(browser: Chromium, text: str) -> None:
    browser.type("#prompt", text + "\ue007")


def shown(browser: Chromium, selector: str, text: str) -> None:
    wait_for(lambda: text in browser.text(selector), f"{text!r} in {selector}: {browser.text(selector)!r}")


@pytest.mark.chromium
def test_an_answer_is_streamed_and_tiers_are_counted(browser: Chromium, server: LiveServer) -> None:
    server.engine.script = "Hello,\n<b>world</b> é"
    show(browser, server)
    wait_for(lambda: "tiny" in browser.text("#model"), "the model to be named")
    ask(browser, "hi")
    shown(browser, f"{ANSWER} .cost", "70.0 % hits")
    assert browser.text(f"{ANSWER} .text") == "Hello,\n<b>world</b> é"
    assert "4.0 KiB from disk" in browser.text(f"{ANSWER} .cost")
    wait_for(lambda: browser.text("#tokens") == str(server.engine.generated), "all tokens to be counted")
    assert browser.text('.tier [data-is="hits"]') == "70" and browser.text('.tier [data-is="lookups"]') == "100"
    assert browser.text('.flow [data-is="bytes"]') == "109.7 KiB" and browser.text("#budget") == "1.0 GiB"
    assert browser.console() == []


@pytest.mark.chromium
def test_the_talk_goes_on_and_begins_anew(browser: Chromium, server: LiveServer) -> None:
    show(browser, server)
    for line in ("one", "two"):
        ask(browser, line)
        wait_for(lambda: not browser.run("return document.getElementById('send').disabled"), "the answer's end")
    decode = server.engine.tokenizer.decode
    assert "[user]one\n[assistant]Hello, world\n[user]two\n" in decode(server.engine.requests[-1].prompt_ids)
    browser.click("#clear")
    ask(browser, "three")
    shown(browser, f"{ANSWER} .cost", "tokens")
    assert "[user]one" not in decode(server.engine.requests[-1].prompt_ids)


@pytest.mark.chromium
def test_stop_ends_the_request_on_the_server(browser: Chromium) -> None:
    engine = FakeEngine(byte_tokenizer(), gate=threading.Semaphore(0), prefill_chunk=4)
    with live_server(engine) as server:
        show(browser, server)
        ask(browser, "hi")
        progress = wait_for(
            lambda: browser.run(
                "const p = document.querySelector('.turn.assistant progress'); return p.hidden ? null : p.value / p.max"
            ),
            "the prompt's progress",
        )
        assert 0.5 < progress <= 1
        engine.gate.release(3)  # type: ignore[union-attr]
        shown(browser, f"{ANSWER} .text", "Hel")
        browser.click("#cancel")
        shown(browser, f"{ANSWER} .note", "(stopped)")
        assert engine.aborted.wait(20)
        assert browser.text(f"{ANSWER} .text") == "Hel"
        wait_for(lambda: not browser.run("return document.getElementById('send').disabled"), "the next question's turn")


@pytest.mark.chromium
def test_errors_are_shown(browser: Chromium) -> None:
    with live_server(FakeEngine(byte_tokenizer(), fail_after=3)) as server:
        show(browser, server)
        ask(browser, "hi")
        shown(browser, f"{ANSWER} .note", "reading 4096 bytes at offset 0 failed")
        assert browser.text(f"{ANSWER} .text") == "Hel"
        browser.run("Object.assign(document.getElementById('temperature'), {max: '', value: 7})")
        ask(browser, "again")
        shown(browser, f"{ANSWER} .note", "temperature: ")
    wait_for(lambda: browser.text("#state") == "unreachable", "the page to miss the server")


@pytest.mark.chromium
def test_a_key_is_asked_for_and_used(browser: Chromium) -> None:
    with live_server(api_keys=frozenset({"k"})) as server:
        show(browser, server)
        shown(browser, "#counters-error", "The API key is missing or wrong")
        ask(browser, "hi")
        shown(browser, f"{ANSWER} .note", "The API key is missing or wrong")
        browser.click("summary")
        browser.type("#key", "k")
        wait_for(lambda: browser.text("#counters-error") == "", "the counters")
        ask(browser, "hi")
        shown(browser, f"{ANSWER} .cost", "tokens")
        browser.console()


@pytest.mark.chromium
def test_a_loading_server_says_how_far_it_is(browser: Chromium) -> None:
    with live_server(loaded=False) as server:
        server.front.readiness.progress("packing", 0.43)
        browser.open(server.url + "/")
        shown(browser, "#state", "loading: packing 43 %")
        ask(browser, "hi")
        shown(browser, f"{ANSWER} .note", "The model is being loaded")
