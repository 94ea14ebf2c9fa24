"""A terminal chat against a server, streaming. Knows a console and a `Client`, not models."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from clients.client import DEFAULT_URL, APIError, Client

_HELP = "/new starts over, /system TEXT sets the system message, /quit or Ctrl-D leaves; Ctrl-C ends an answer."


class UnreachableError(Exception):
    """There is no server to talk to; one sentence that names the address."""


@dataclass
class Conversation:
    """The messages so far; `system` comes first when it is set."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]


def run_chat(url: str = DEFAULT_URL, api_key: str | None = None, console: Console | None = None) -> None:
    """Talks until the user leaves. Errors of the server are shown, and the talk goes on.

    Raises UnreachableError when there is no server to begin with, or it refuses.
    """
    console = console or Console(highlight=False)
    with _connect(url, api_key) as client:
        _greet(client, console, url)
        conversation = Conversation()
        while (line := _read(console)) is not None:
            if line.startswith("/"):
                if not _command(line, conversation, console):
                    return
            elif line:
                answer(client, conversation, line, console)


def answer(client: Client, conversation: Conversation, line: str, console: Console, **options: Any) -> None:
    """One turn: sends `line`, prints the answer as it comes, keeps both unless there was no answer at all."""
    conversation.turns.append({"role": "user", "content": line})
    parts: list[str] = []
    usage, started_s = None, time.perf_counter()
    try:
        for chunk in client.stream_chat(conversation.messages(), stream_options={"include_usage": True}, **options):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                parts.append(choice["delta"].get("content") or "")
                console.print(parts[-1], end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except (APIError, httpx.HTTPError) as error:
        _complain(console, error)
    console.print()
    _keep(conversation, "".join(parts))
    if usage is not None:
        seconds = time.perf_counter() - started_s
        tokens = usage["completion_tokens"]
        console.print(f"[dim]{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s[/dim]")


def _keep(conversation: Conversation, text: str) -> None:
    """A turn without an answer is forgotten: two user messages in a row are refused by many templates."""
    if text:
        conversation.turns.append({"role": "assistant", "content": text})
    else:
        conversation.turns.pop()


def _connect(url: str, api_key: str | None) -> Client:
    try:
        return Client(url, api_key)
    except httpx.InvalidURL as error:
        raise UnreachableError(f"--url {url}: not an address ({error})") from error


def _greet(client: Client, console: Console, url: str) -> None:
    try:
        name = client.models()[0]["id"]
    except APIError as error:
        raise UnreachableError(f"--url {url}: the server refuses: {error}") from error
    except (httpx.HTTPError, LookupError, TypeError) as error:
        raise UnreachableError(f"--url {url}: no coldstream server can be reached there ({error})") from error
    console.print(f"[bold]{escape(str(name))}[/bold] [dim]{_HELP}[/dim]")


def _read(console: Console) -> str | None:
    """One line of the user; None at the end."""
    try:
        return console.input("[bold green]> [/bold green]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _command(line: str, conversation: Conversation, console: Console) -> bool:
    """Runs a /command; False when the talk is over."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/new":
        conversation.turns.clear()
    elif name == "/system":
        conversation.system = rest.strip() or None
    else:
        console.print(f"[dim]{_HELP}[/dim]")
    return True


def _complain(console: Console, error: object) -> None:
    console.print("error:", style="red", end=" ")
    console.print(str(error), markup=False)
