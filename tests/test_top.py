"""`coldstream top` over a live server: frames are the differences of two scrapes; quantiles as PromQL's; no torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from clients.chat import UnreachableError
from clients.scrape import Interval, Scrape, Scraper, histogram_quantile
from clients.top import binary, make_frame, percent, render, run_top, seconds
from tests.live_server import LiveServer, live_server

ROOT = Path(__file__).resolve().parents[1]
BEFORE = """
coldstream_info{model="m",mode="sparse",io_engine="io_uring"} 1
coldstream_neuron_cache_capacity_bytes{tier="cpu"} 4096
coldstream_neuron_cache_used_bytes{tier="cpu"} 1024
coldstream_neuron_cache_lookups_total{tier="cpu"} 1000
coldstream_neuron_cache_hits_total{tier="cpu"} 100
coldstream_transfer_bytes_total{src="disk",dst="cpu"} 1000
coldstream_transfer_requests_total{src="disk",dst="cpu"} 10
coldstream_transfer_seconds_total{src="disk",dst="cpu"} 1
coldstream_stall_seconds_total{src="disk"} 1
coldstream_generation_tokens_total 50
coldstream_num_requests_running 3
coldstream_num_requests_waiting 2
"""
AFTER = """
coldstream_info{model="m",mode="sparse",io_engine="io_uring"} 1
coldstream_neuron_cache_capacity_bytes{tier="cpu"} 4096
coldstream_neuron_cache_used_bytes{tier="cpu"} 2048
coldstream_neuron_cache_lookups_total{tier="cpu"} 1400
coldstream_neuron_cache_hits_total{tier="cpu"} 400
coldstream_transfer_bytes_total{src="disk",dst="cpu"} 9000
coldstream_transfer_requests_total{src="disk",dst="cpu"} 14
coldstream_transfer_seconds_total{src="disk",dst="cpu"} 3
coldstream_stall_seconds_total{src="disk"} 2
coldstream_generation_tokens_total 90
coldstream_num_requests_running 1
coldstream_num_requests_waiting 0
coldstream_inter_token_latency_seconds_bucket{le="0.1"} 10
coldstream_inter_token_latency_seconds_bucket{le="0.2"} 40
coldstream_inter_token_latency_seconds_bucket{le="+Inf"} 40
"""


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


def interval(before: str, after: str, seconds: float = 4.0) -> Interval:
    return Interval(Scrape.parse(before, 10.0), Scrape.parse(after, 10.0 + seconds))


def shown(width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, highlight=False), out


def test_a_frame_is_of_the_time_between_two_scrapes() -> None:
    frame = make_frame(interval(BEFORE, AFTER))
    (tier,) = frame.tiers
    assert (tier.name, tier.capacity_bytes, tier.used_bytes) == ("cpu", 4096, 2048)
    assert (tier.lookups_per_s, tier.hit_rate) == (100, 0.75)
    (flow,) = frame.flows
    assert (flow.src, flow.dst, flow.bytes_per_s, flow.requests_per_s, flow.busy) == ("disk", "cpu", 2000, 1, 0.5)
    assert frame.stall == {"disk": 0.25} and frame.tokens_per_s == 10
    assert (frame.running, frame.waiting) == (1, 0)
    assert frame.latencies["itl"].median_s == pytest.approx(0.1 + 0.1 * (20 - 10) / 30)
    assert frame.latencies["ttft"].median_s is None


def test_nothing_asked_is_no_hit_rate() -> None:
    assert make_frame(interval(AFTER, AFTER)).tiers[0].hit_rate is None


def test_a_counter_that_fell_began_anew() -> None:
    frame = make_frame(interval(AFTER, BEFORE))
    assert frame.tokens_per_s == 50 / 4 and frame.tiers[0].hit_rate == 0.1


@pytest.mark.parametrize(
    ("q", "expected"), [(0.25, 0.05), (0.5, 0.1), (0.625, 0.15), (0.95, 0.2), (1.0, 0.2)]
)  # by hand: 2 of 4 below 0.1, 1 to 0.2, 1 above
def test_quantiles_are_those_of_promql(q: float, expected: float) -> None:
    buckets = [(0.1, 2.0), (0.2, 3.0), (float("inf"), 4.0)]
    assert histogram_quantile(q, buckets) == pytest.approx(expected)


def test_no_observation_has_no_quantile() -> None:
    assert histogram_quantile(0.5, []) is None
    assert histogram_quantile(0.5, [(0.1, 0.0), (float("inf"), 0.0)]) is None


def test_once_shows_tiers_and_rates_of_a_live_server(server: LiveServer) -> None:
    console, out = shown()
    asking = threading.Timer(0.05, lambda: httpx.post(server.url + "/v1/completions", json={"prompt": "hi"}))
    asking.start()
    run_top(server.url, interval_s=0.5, once=True, console=console)
    asking.join()
    text = out.getvalue()
    assert re.match(r"tiny sparse, pread\+direct; last \d+\.\d s\n", text)
    assert "cpu" in text and "1.0 MiB" in text and "512.0 KiB" in text and "50.0 %" in text
    assert "disk → cpu" in text and "budget cpu 1.0 GiB" in text
    assert "0.0 tokens/s" not in text


def test_json_is_one_object_a_frame_and_needs_no_torch(server: LiveServer) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom server.cli import main\n"
        f"sys.argv = ['coldstream', 'top', '--once', '--json', '--interval', '0.1', '--url', {server.url!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    frame = json.loads(done.stdout)
    assert frame["model"] == "tiny" and frame["tiers"][0]["capacity_bytes"] == 1 << 20


def test_without_a_model_there_is_a_frame_all_the_same() -> None:
    with live_server(loaded=False) as server, Scraper(server.url) as scraper:
        frame = make_frame(Interval(scraper.scrape(), scraper.scrape()))
        console, out = shown()
        console.print(render(frame))
        assert frame.tiers == () and "0.0 tokens/s" in out.getvalue()


def test_a_key_is_needed_and_sent() -> None:
    with live_server(api_keys=frozenset({"k"})) as server:
        console, out = shown()
        run_top(server.url, "k", 0.05, once=True, console=console)
        assert "tiny" in out.getvalue()
        with pytest.raises(UnreachableError, match="refuses: The API key is missing or wrong"):
            run_top(server.url, None, 0.05, once=True, console=console)


def test_a_page_that_is_no_metrics_is_told_apart(server: LiveServer) -> None:
    with pytest.raises(UnreachableError, match=r"refuses: Not Found\."):
        run_top(server.url + "/v1/", interval_s=0.05, once=True)
    with pytest.raises(UnreachableError, match="not an address"):
        run_top("http://\x00", once=True)


def test_a_server_that_goes_away_ends_the_frames() -> None:
    with live_server() as server, Scraper(server.url) as scraper:
        before = scraper.scrape()
    assert before.value("num_requests_running") == 0
    with pytest.raises(UnreachableError, match="no coldstream server can be reached"):
        run_top(server.url, interval_s=0.05)


def test_units() -> None:
    assert [binary(x) for x in (0, 1023, 1536, 3 << 30, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
    assert [seconds(x) for x in (None, 0.0123, 2.34)] == ["-", "12 ms", "2.3 s"]
    assert [percent(x) for x in (None, 0.5)] == ["-", "50.0 %"]


def test_a_terminal_is_redrawn_and_a_server_that_goes_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, height=40, force_terminal=True, highlight=False)
    sleeps = 0

    with live_server() as server:

        def sleep(_: float) -> None:
            nonlocal sleeps
            sleeps += 1
            if sleeps == 2:
                monkeypatch.setattr(Scraper, "scrape", gone)
            if sleeps == 3:
                raise KeyboardInterrupt

        def gone(_: Scraper) -> Scrape:
            raise httpx.ConnectError("Connection refused")

        monkeypatch.setattr("clients.top.time.sleep", sleep)
        run_top(server.url, console=console)  # Ctrl-C ends it without a word
        monkeypatch.undo()
    text = out.getvalue()
    assert "disk → cpu" in text and "Connection refused; trying again" in text
