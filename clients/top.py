"""`coldstream top`: what a server does, from its /metrics alone. Knows names of metrics and a console, not models.

A frame is made of two scrapes; every rate, share and latency in it is of the time between them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clients.chat import UnreachableError
from clients.client import DEFAULT_URL, APIError
from clients.scrape import Interval, Scrape, Scraper

DEFAULT_INTERVAL_S = 2.0
_LATENCIES = {
    "ttft": ("first token", "time_to_first_token_seconds"),
    "itl": ("between tokens", "inter_token_latency_seconds"),
}
_NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Tier:
    """Slots of one tier. hit_rate: 0..1, None without lookups."""

    name: str
    capacity_bytes: float
    used_bytes: float
    lookups_per_s: float
    hit_rate: float | None


@dataclass(frozen=True, slots=True)
class Flow:
    """What crosses one border between tiers. busy: share of the time with a read under way, 0..1."""

    src: str
    dst: str
    bytes_per_s: float
    requests_per_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds; None when nothing was observed."""

    median_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """All that is shown. stall: by source, share of the time that the engine waited."""

    model: str
    mode: str
    io_engine: str
    seconds: float
    running: float
    waiting: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    failures_per_s: float
    tiers: tuple[Tier, ...]
    flows: tuple[Flow, ...]
    stall: dict[str, float]
    latencies: dict[str, Latency]
    memory_budget_bytes: dict[str, float]
    resident_bytes: float | None


def make_frame(interval: Interval) -> Frame:
    """Of two scrapes. While the model is loading there are no tiers and no flows."""
    now = interval.after
    info = next((labels for labels, _ in now.series("info")), {})
    return Frame(
        model=info.get("model", ""),
        mode=info.get("mode", ""),
        io_engine=info.get("io_engine", ""),
        seconds=interval.seconds,
        running=now.value("num_requests_running") or 0.0,
        waiting=now.value("num_requests_waiting") or 0.0,
        tokens_per_s=interval.rate("generation_tokens_total"),
        prompt_tokens_per_s=interval.rate("prompt_tokens_total"),
        failures_per_s=sum(interval.rate("request_failure_total", **x) for x, _ in now.series("request_failure_total")),
        tiers=tuple(_tiers(interval)),
        flows=tuple(_flows(interval)),
        stall={x["src"]: interval.rate("stall_seconds_total", **x) for x, _ in now.series("stall_seconds_total")},
        latencies={key: _latency(interval, name) for key, (_, name) in _LATENCIES.items()},
        memory_budget_bytes={labels["tier"]: value for labels, value in now.series("memory_budget_bytes")},
        resident_bytes=now.value("process_resident_memory_bytes"),
    )


def _tiers(interval: Interval) -> Iterator[Tier]:
    for labels, capacity in interval.after.series("neuron_cache_capacity_bytes"):
        yield Tier(
            name=labels["tier"],
            capacity_bytes=capacity,
            used_bytes=interval.after.value("neuron_cache_used_bytes", **labels) or 0.0,
            lookups_per_s=interval.rate("neuron_cache_lookups_total", **labels),
            hit_rate=interval.share("neuron_cache_hits_total", "neuron_cache_lookups_total", **labels),
        )


def _flows(interval: Interval) -> Iterator[Flow]:
    for labels, _ in interval.after.series("transfer_bytes_total"):
        rates = (interval.rate(f"transfer_{field}_total", **labels) for field in ("bytes", "requests", "seconds"))
        yield Flow(labels["src"], labels["dst"], *rates)


def _latency(interval: Interval, name: str) -> Latency:
    return Latency(interval.quantile(name, 0.5), interval.quantile(name, 0.95))


# --- on a console ---


def run_top(
    url: str = DEFAULT_URL,
    api_key: str | None = None,
    interval_s: float = DEFAULT_INTERVAL_S,
    once: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Shows frame after frame until Ctrl-C, or one. as_json: one object a line, for programs.

    A server that goes away while it is watched is waited for. Raises UnreachableError when there is none to begin with.
    """
    console = console or Console(highlight=False)
    try:
        with Scraper(url, api_key) as scraper:
            first = _first(scraper, url)
            if once or as_json or not console.is_terminal:
                _print_frames(scraper, first, interval_s, once, as_json, console)
            else:
                _watch(scraper, first, interval_s, url, console)
    except KeyboardInterrupt:
        return
    except httpx.InvalidURL as error:
        raise UnreachableError(f"--url {url}: not an address ({error})") from error


def _first(scraper: Scraper, url: str) -> Scrape:
    try:
        return scraper.scrape()
    except APIError as error:
        raise UnreachableError(f"--url {url}: the server refuses: {error}") from error
    except httpx.HTTPError as error:
        raise UnreachableError(f"--url {url}: no coldstream server can be reached there ({error})") from error


def _print_frames(
    scraper: Scraper, before: Scrape, interval_s: float, once: bool, as_json: bool, console: Console
) -> None:
    """One frame below the other, for what is no terminal; a server that goes away ends it. Raises UnreachableError."""
    while True:
        time.sleep(interval_s)
        try:
            after = scraper.scrape()
        except (APIError, httpx.HTTPError) as error:
            raise UnreachableError(f"the server has gone: {error}") from error
        frame = make_frame(Interval(before, after))
        if as_json:
            console.file.write(json.dumps(asdict(frame)) + "\n")
            console.file.flush()
        else:
            console.print(render(frame))
        if once:
            return
        before = after


def _watch(scraper: Scraper, before: Scrape, interval_s: float, url: str, console: Console) -> None:
    """The whole screen, redrawn every interval."""
    waiting: RenderableType = Text(f"{url}: the first interval is under way …", style="dim")
    with Live(waiting, console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        shown: RenderableType = waiting
        while True:
            time.sleep(interval_s)
            try:
                after = scraper.scrape()
            except (APIError, httpx.HTTPError) as error:
                live.update(Group(Text(f"{url}: {error}; trying again", style="red"), shown), refresh=True)
                continue
            shown = Group(render(make_frame(Interval(before, after))), Text(f"{url}   Ctrl-C leaves", style="dim"))
            live.update(shown, refresh=True)
            before = after


def render(frame: Frame) -> RenderableType:
    """A frame as tables."""
    tables = (_tier_table(frame), _flow_table(frame), _latency_table(frame))
    return Group(_headline(frame), *(part for table in tables if table.row_count for part in ("", table)), "")


def _headline(frame: Frame) -> Text:
    parts = [escape(frame.model), *(part for part in (frame.mode, frame.io_engine) if part)]
    memory = [f"budget {tier} {binary(value)}" for tier, value in frame.memory_budget_bytes.items()]
    if frame.resident_bytes is not None:
        memory.append(f"process {binary(frame.resident_bytes)}")
    lines = (
        f"[bold]{parts[0]}[/bold] [dim]{', '.join(parts[1:])}; last {frame.seconds:.1f} s[/dim]",
        f"{frame.tokens_per_s:.1f} tokens/s, {frame.prompt_tokens_per_s:.1f} prompt tokens/s, "
        f"{frame.running:.0f} running, {frame.waiting:.0f} waiting, {frame.failures_per_s:.1f} failures/s",
        ", ".join(memory),
    )
    return Text.from_markup("\n".join(lines))


def _tier_table(frame: Frame) -> Table:
    table = _table("tier", "capacity", "used", "filled", "lookups/s", "hit rate")
    for tier in frame.tiers:
        filled = tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else None
        sizes = binary(tier.capacity_bytes), binary(tier.used_bytes)
        table.add_row(tier.name, *sizes, percent(filled), f"{tier.lookups_per_s:,.0f}", percent(tier.hit_rate))
    return table


def _flow_table(frame: Frame) -> Table:
    table = _table("transfer", "bytes/s", "requests/s", "bytes a request", "busy", "engine waits")
    for flow in frame.flows:
        each = binary(flow.bytes_per_s / flow.requests_per_s) if flow.requests_per_s else _NOTHING
        rates = f"{binary(flow.bytes_per_s)}/s", f"{flow.requests_per_s:,.0f}", each
        waits = percent(frame.stall.get(flow.src))
        table.add_row(f"{flow.src} → {flow.dst}", *rates, percent(flow.busy), waits)
    return table


def _latency_table(frame: Frame) -> Table:
    table = _table("latency", "median", "95th percentile")
    for key, latency in frame.latencies.items():
        table.add_row(_LATENCIES[key][0], *_cells(seconds, latency.median_s, latency.p95_s))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(first, min_width=14)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _cells(show: Callable[[Any], str], *values: Any) -> list[str]:
    return [show(value) for value in values]


def binary(value: float) -> str:
    """Bytes with the unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.1f} %"


def seconds(value: float | None) -> str:
    """Seconds, as milliseconds when they are few."""
    if value is None:
        return _NOTHING
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
