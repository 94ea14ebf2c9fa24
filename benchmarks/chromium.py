"""One headless Chromium, driven over WebDriver's HTTP, so that looking at a page needs no package beside httpx.

Debian: apt-get install chromium chromium-driver. Knows pages and elements, not what is on them.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of a reference to an element, by the specification


def is_installed() -> bool:
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Chromium:
    """A browser with a profile of its own, a context manager. Raises RuntimeError for what the driver refuses."""

    def __init__(self, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        self._profile = tempfile.TemporaryDirectory()
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port()}", timeout=60)
        flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"]
        flags += [f"window-size={width},{height}", f"user-data-dir={self._profile.name}"]
        flags += ["force-dark-mode"] if dark else []
        options = {"binary": shutil.which("chromium"), "args": flags}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self._session = f"/session/{self._send('POST', '/session', wanted)['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._send("DELETE", self._session)
        self._http.close()
        self._driver.terminate()
        self._driver.wait(20)
        assert self._driver.stdout is not None
        self._driver.stdout.close()
        self._profile.cleanup()

    def open(self, url: str) -> None:
        self._send("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a function returns in the page."""
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What is shown of the last element that matches; empty when none does."""
        found = self.run("return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText ?? ''", selector)
        return str(found)

    def type(self, selector: str, text: str) -> None:
        """Keys as a person presses them; \\ue007 is Enter, \\ue00c Escape."""
        self._send("POST", f"{self._element(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._send("POST", f"{self._element(selector)}/click", {})

    def screenshot(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self._send("GET", f"{self._session}/screenshot"))

    def console(self) -> list[str]:
        """What the page's scripts and the browser complained of since the last call."""
        entries = self._send("POST", f"{self._session}/se/log", {"type": "browser"})
        return [str(entry["message"]) for entry in entries]

    def _element(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        return f"{self._session}/element/{self._send('POST', f'{self._session}/element', body)[_ELEMENT]}"

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise RuntimeError("chromedriver ended before it listened")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self._http.request(method, path, json=body)
        value = response.json()["value"]
        if response.is_error:
            raise RuntimeError(f"{path}: {value['error']}: {value['message']}")
        return value


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """The first value of `condition` that is true. Raises TimeoutError that says what was waited for."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.05)
    return value
