"""What /metrics says: names, sums and kinds, read back by Prometheus' own parser; one snapshot a scrape."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.samples import Sample

from runtime.request import Request, SamplingParams
from tests.fake_engine import FakeEngine, byte_tokenizer
from tests.live_server import LiveServer, live_server

# Everything that is exposed, by family: type and labels. A new metric has its line here.
FAMILIES: dict[str, tuple[str, set[str]]] = {
    "info": ("gauge", {"version", "model", "mode", "device", "kernel", "io_engine"}),
    "neuron_cache_lookups": ("counter", {"tier"}),
    "neuron_cache_hits": ("counter", {"tier"}),
    "neuron_cache_misses": ("counter", {"tier"}),
    "neuron_cache_evictions": ("counter", {"tier"}),
    "neuron_cache_insertions": ("counter", {"tier"}),
    "neuron_cache_capacity_bytes": ("gauge", {"tier"}),
    "neuron_cache_used_bytes": ("gauge", {"tier"}),
    "transfer_bytes": ("counter", {"src", "dst"}),
    "transfer_seconds": ("counter", {"src", "dst"}),
    "transfer_requests": ("counter", {"src", "dst"}),
    "read_size_bytes": ("histogram", {"src"}),
    "stall_seconds": ("counter", {"src"}),
    "prefetch_issued_bytes": ("counter", set()),
    "prefetch_used_bytes": ("counter", set()),
    "prefetch_wasted_bytes": ("counter", set()),
    "needed_bytes": ("counter", set()),
    "steps": ("counter", {"kind"}),
    "kv_used_bytes": ("gauge", set()),
    "prefix_cache_idle_bytes": ("gauge", set()),
    "prefix_cache_lookups_tokens": ("counter", set()),
    "prefix_cache_hits_tokens": ("counter", set()),
    "prefix_cache_restored_tokens": ("counter", set()),
    "overflow": ("counter", set()),
    "streamed_layers": ("counter", set()),
    "active_neurons": ("counter", set()),
    "predicted_neurons": ("counter", set()),
    "audit_tokens": ("counter", set()),
    "audit_true_positive": ("counter", set()),
    "audit_false_negative": ("counter", set()),
    "audit_dropped": ("counter", set()),
    "audit_read_bytes": ("counter", set()),
    "audit_ffn_relative_error": ("histogram", set()),
    "memory_budget_bytes": ("gauge", {"tier"}),
    "memory_used_bytes": ("gauge", {"tier", "use"}),
    "num_requests_running": ("gauge", set()),
    "num_requests_waiting": ("gauge", set()),
    "prompt_tokens": ("counter", set()),
    "generation_tokens": ("counter", set()),
    "request_success": ("counter", {"finish_reason"}),
    "request_failure": ("counter", {"reason"}),
    "time_to_first_token_seconds": ("histogram", set()),
    "inter_token_latency_seconds": ("histogram", set()),
    "e2e_request_latency_seconds": ("histogram", set()),
    "request_queue_time_seconds": ("histogram", set()),
}


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


def scrape_text(server: LiveServer) -> str:
    response = httpx.get(server.url + "/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    return response.text


def scrape(server: LiveServer) -> list[Sample]:
    return [s for family in parser.text_string_to_metric_families(scrape_text(server)) for s in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """The one sample of that name and those labels."""
    (found,) = [s.value for s in samples if s.name == f"coldstream_{name}" and s.labels == labels]
    return found


def test_names_types_and_labels_are_the_promised_ones(server: LiveServer) -> None:
    families = [
        f for f in parser.text_string_to_metric_families(scrape_text(server)) if f.name.startswith("coldstream_")
    ]
    found = {f.name.removeprefix("coldstream_"): (f.type, set(f.samples[0].labels) - {"le"}) for f in families}
    assert found == FAMILIES
    assert all(len(f.documentation.split()) > 2 and f.documentation.endswith(".") for f in families)


def test_the_process_is_measured_too(server: LiveServer) -> None:
    assert "process_resident_memory_bytes" in {sample.name for sample in scrape(server)}


def test_promtool_finds_nothing_to_complain_about(server: LiveServer) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool: not installed (apt-get install prometheus)")
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, input=scrape_text(server), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_cache_counters_are_the_snapshots(server: LiveServer) -> None:
    samples = scrape(server)
    lookups, hits, misses = (
        value(samples, f"neuron_cache_{n}_total", tier="cpu") for n in ("lookups", "hits", "misses")
    )
    assert (lookups, hits, misses) == (100, 70, 30) and hits + misses == lookups
    assert value(samples, "transfer_bytes_total", src="disk", dst="cpu") == 112_288
    assert value(samples, "transfer_requests_total", src="disk", dst="cpu") == 4
    assert value(samples, "transfer_seconds_total", src="disk", dst="cpu") == 0.75
    assert value(samples, "stall_seconds_total", src="disk") == 0.5
    assert value(samples, "needed_bytes_total") == 90_000
    assert value(samples, "memory_used_bytes", tier="cpu", use="slots") == 2048
    assert value(samples, "memory_budget_bytes", tier="cpu") == 1 << 30


def test_histograms_are_cumulative(server: LiveServer) -> None:
    samples = scrape(server)
    buckets = [s for s in samples if s.name == "coldstream_read_size_bytes_bucket"]
    assert [(s.labels["le"], s.value) for s in buckets] == [("4096.0", 3), ("8192.0", 3), ("+Inf", 4)]
    assert value(samples, "read_size_bytes_count", src="disk") == 4
    assert value(samples, "read_size_bytes_sum", src="disk") == 3 * 4096 + 100_000


def test_requests_and_refusals_are_counted_once(server: LiveServer) -> None:
    for _ in range(3):
        httpx.post(server.url + "/v1/completions", json={"prompt": "hi", "max_tokens": 4})
    httpx.post(server.url + "/v1/completions", json={"prompt": "hi", "stop": "lo", "max_tokens": 50})
    httpx.post(server.url + "/v1/completions", json={"prompt": "hi", "n": 0})
    httpx.post(server.url + "/v1/completions", json={"prompt": "hi", "model": "x"})
    server.engine.join()
    samples = scrape(server)
    assert value(samples, "request_success_total", finish_reason="length") == 3
    assert value(samples, "request_success_total", finish_reason="stop") == 1
    assert value(samples, "request_failure_total", reason="invalid_request") == 1
    assert value(samples, "request_failure_total", reason="model_not_found") == 1
    assert value(samples, "request_failure_total", reason="cancelled") == 0
    assert value(samples, "prompt_tokens_total") == 8
    assert value(samples, "generation_tokens_total") == server.engine.generated
    assert value(samples, "time_to_first_token_seconds_count") == 4


def test_what_the_engine_refused_is_not_counted_twice() -> None:
    gate = threading.Semaphore(0)
    with live_server(FakeEngine(byte_tokenizer(), max_live=1, gate=gate)) as server:
        server.engine.submit(Request("other", (1,), SamplingParams()), lambda event: None)
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "hi"}).status_code == 429
        assert value(scrape(server), "request_failure_total", reason="queue_full") == 1
        server.engine.abort("other")


def test_one_snapshot_a_scrape(server: LiveServer) -> None:
    before = server.engine.snapshots
    scrape(server)
    assert server.engine.snapshots == before + 1


def test_info_names_what_is_served(server: LiveServer) -> None:
    labels = {"version": "1.2.3", "model": "tiny", "mode": "sparse", "device": "cpu", "kernel": "generic"}
    labels["io_engine"] = "pread+direct"
    assert value(scrape(server), "info", **labels) == 1


def test_metrics_while_loading() -> None:
    with live_server(loaded=False) as server:
        httpx.post(server.url + "/v1/completions", json={"prompt": "hi"})
        samples = scrape(server)
        assert value(samples, "request_failure_total", reason="not_ready") == 1
        assert httpx.get(server.url + "/cache").status_code == 503


def test_openmetrics_when_asked(server: LiveServer) -> None:
    response = httpx.get(server.url + "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(response.text)}
    assert families["coldstream_neuron_cache_lookups"].type == "counter"


def test_cache_endpoint(server: LiveServer) -> None:
    answer = httpx.get(server.url + "/cache").json()
    assert answer["tiers"]["cpu"]["lookups"] == 100
    assert answer["transfers"][0]["src"] == "disk" and answer["transfers"][0]["bytes"] == 112_288
