"""Prometheus: one snapshot of the engine per scrape, as metric families under the names that dashboards know.

Holds no counter of its own (refusals that the engine never saw are counted in errors.Refusals); knows no HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cache.stats import CacheSnapshot, HistogramSnapshot, TierSnapshot, TransferSnapshot
from server.async_engine import AsyncEngine
from server.errors import Refusals

if TYPE_CHECKING:
    from runtime.audit import AuditSnapshot
    from runtime.engine_stats import EngineSnapshot
    from server.config import ServerConfig

Labelled = Mapping[Any, float]  # by label values, a tuple


class Metrics(Collector):
    """The collector of one server, and its registry."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, refusals: Refusals) -> None:
        self._engine, self._config, self._refusals = engine, config, refusals
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """(content, content type) for the Accept header of a scraper: Prometheus' text format, or OpenMetrics."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not need a model."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield _gauge(
            "info", "What is served and how; always 1.", {tuple(self._info().values()): 1.0}, tuple(self._info())
        )
        model = self._engine.loaded
        if model is None:
            yield _failures(self._refusals.counts)
            return
        snapshot = model.engine.snapshot()
        yield _failures(Counter(snapshot.failure) + self._refusals.counts, snapshot.failure)
        yield from _requests(snapshot)
        yield from _latencies(snapshot)
        yield from _model(snapshot)
        yield from _cache(snapshot.cache)
        yield from _memory(snapshot)

    def cache_json(self) -> dict[str, Any]:
        """What /cache shows. Raises NotReadyError while there is no model."""
        model = self._engine.loaded or self._engine.ready_model()
        cache = model.engine.snapshot().cache
        return {
            "tiers": {name: asdict(tier) for name, tier in cache.tiers.items()},
            "transfers": [{"src": s, "dst": d, **asdict(t)} for (s, d), t in cache.transfers.items()],
        }

    def _info(self) -> dict[str, str]:
        model = self._engine.loaded
        info = {} if model is None else model.info
        known = {name: str(info.get(name, "")) for name in ("mode", "device", "kernel", "io_engine")}
        return {"version": self._config.version, "model": self._config.served_model_name, **known}


def _failures(counts: Mapping[str, int], known: Iterable[str] = ()) -> Metric:
    """`known` reasons are shown at 0 too."""
    values = {**dict.fromkeys(known, 0), **counts}
    return _counter("request_failure", "Requests that failed or were refused, by reason.", _one(values), ("reason",))


def _requests(snapshot: EngineSnapshot) -> Iterator[Metric]:
    yield _counter(
        "request_success", "Requests that were answered to their end.", _one(snapshot.success), ("finish_reason",)
    )
    looked_up, hit = snapshot.prefix_cache_lookup_tokens, snapshot.prefix_cache_hit_tokens
    yield _counter("prefix_cache_lookups_tokens", "Tokens of prompts that were looked for.", _single(looked_up))
    yield _counter("prefix_cache_hits_tokens", "Of those, what others had computed already.", _single(hit))
    restored = _single(snapshot.prefix_cache_restored_tokens)
    yield _counter("prefix_cache_restored_tokens", "Of those, what came from disk.", restored)
    yield _gauge("num_requests_running", "Requests that are being computed.", _single(snapshot.num_requests_running))
    yield _gauge("num_requests_waiting", "Requests in the queue.", _single(snapshot.num_requests_waiting))
    yield _counter("prompt_tokens", "Tokens of prompts that were read.", _single(snapshot.prompt_tokens))
    yield _counter(
        "generation_tokens", "Tokens generated, those that end a text included.", _single(snapshot.generation_tokens)
    )


def _latencies(snapshot: EngineSnapshot) -> Iterator[Metric]:
    for name, text, histogram in (
        ("time_to_first_token_seconds", "From arrival to the first token.", snapshot.time_to_first_token),
        ("inter_token_latency_seconds", "Between two tokens of a request.", snapshot.inter_token_latency),
        ("e2e_request_latency_seconds", "From arrival to the end, successes only.", snapshot.e2e_request_latency),
        ("request_queue_time_seconds", "From arrival to the start of prefill.", snapshot.queue_time),
    ):
        yield _histogram(name, text, {(): histogram})


def _model(snapshot: EngineSnapshot) -> Iterator[Metric]:
    yield _counter("steps", "Passes through the model, by kind.", _one(snapshot.steps), ("kind",))
    yield _counter("active_neurons", "Neurons computed, over tokens and layers.", _single(snapshot.active_neurons))
    yield _counter("predicted_neurons", "Neurons the predictor named.", _single(snapshot.predicted_neurons))
    yield _counter("overflow", "Layers computed densely as too many neurons were active.", _single(snapshot.overflow))
    switched = _single(snapshot.switched)
    yield _counter("streamed_layers", "Layers of sparse steps that were read whole since that was quicker.", switched)
    yield from _audit(snapshot.audit)
    yield _gauge("kv_used_bytes", "KV cache that running requests hold.", _single(snapshot.kv_used_bytes))
    idle = snapshot.prefix_cache_idle_bytes
    yield _gauge("prefix_cache_idle_bytes", "KV cache kept for prompts that may come again.", _single(idle))


def _audit(audit: AuditSnapshot) -> Iterator[Metric]:
    yield _counter(
        "audit_tokens", "Rows of single layers that were sampled and computed densely too.", _single(audit.tokens)
    )
    yield _counter(
        "audit_true_positive", "Truly active neurons of audited rows that were taken.", _single(audit.true_positive)
    )
    yield _counter(
        "audit_false_negative",
        "Truly active neurons of audited rows that were not taken.",
        _single(audit.false_negative),
    )
    yield _counter("audit_dropped", "Audit samples that were dropped, as too many waited.", _single(audit.dropped))
    yield _counter(
        "audit_read_bytes", "Bytes read for audits, past the cache and its counters.", _single(audit.read_bytes)
    )
    yield _histogram(
        "audit_ffn_relative_error",
        "Relative error of the FFN's output beside dense, audited rows.",
        {(): audit.relative_error},
    )


def _cache(cache: CacheSnapshot) -> Iterator[Metric]:
    for field, text in (
        ("lookups", "Neurons asked for: one a step, layer and neuron of the batch's union."),
        ("hits", "Lookups that found the neuron resident."),
        ("misses", "Lookups that had to read the neuron."),
        ("evictions", "Neurons that lost their slot."),
        ("insertions", "Neurons that got a slot."),
    ):
        yield _counter(f"neuron_cache_{field}", text, _by_tier(cache.tiers, field), ("tier",))
    for field, text in (
        ("capacity_bytes", "Size of the tier's slots for neurons."),
        ("used_bytes", "Bytes of slots that hold a neuron."),
    ):
        yield _gauge(f"neuron_cache_{field}", text, _by_tier(cache.tiers, field), ("tier",))
    yield from _transfers(cache.transfers)
    sizes = {(src,): histogram for src, histogram in cache.read_sizes.items()}
    yield _histogram("read_size_bytes", "Sizes of the read requests, by the tier that was read.", sizes, ("src",))
    yield _counter("prefetch_issued_bytes", "Bytes read ahead.", _single(cache.prefetch_issued_bytes))
    yield _counter("prefetch_used_bytes", "Bytes read ahead and used.", _single(cache.prefetch_used_bytes))
    yield _counter("prefetch_wasted_bytes", "Bytes read ahead for nothing.", _single(cache.prefetch_wasted_bytes))


def _transfers(transfers: Mapping[tuple[str, str], TransferSnapshot]) -> Iterator[Metric]:
    for field, text in (
        ("bytes", "Bytes that crossed between tiers, aligned outward."),
        ("seconds", "Time with at least one read between the tiers under way."),
        ("requests", "Read requests between tiers."),
    ):
        values = {pair: getattr(transfer, field) for pair, transfer in transfers.items()}
        yield _counter(f"transfer_{field}", text, values, ("src", "dst"))
    stalls: dict[tuple[str], float] = {}
    for (src, _), transfer in transfers.items():
        stalls[(src,)] = stalls.get((src,), 0.0) + transfer.stall_seconds
    yield _counter("stall_seconds", "Time the engine waited for reads.", stalls, ("src",))
    needed = sum(transfer.needed_bytes for transfer in transfers.values())
    yield _counter("needed_bytes", "Of the bytes read, those that were computed with.", _single(needed))


def _memory(snapshot: EngineSnapshot) -> Iterator[Metric]:
    yield _gauge(
        "memory_budget_bytes",
        "Memory that all of the process may take, by tier.",
        _one(snapshot.memory_budget_bytes),
        ("tier",),
    )
    yield _gauge(
        "memory_used_bytes",
        "Memory that the plan gives to each use, by tier.",
        snapshot.memory_used_bytes,
        ("tier", "use"),
    )


def _by_tier(tiers: Mapping[str, TierSnapshot], field: str) -> Labelled:
    return {(name,): getattr(tier, field) for name, tier in tiers.items()}


def _one(values: Mapping[str, float]) -> Labelled:
    return {(label,): value for label, value in values.items()}


def _single(value: float) -> Labelled:
    return {(): value}


def _counter(name: str, text: str, values: Labelled, labels: tuple[str, ...] = ()) -> Metric:
    family = CounterMetricFamily(f"coldstream_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _gauge(name: str, text: str, values: Labelled, labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(f"coldstream_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, values: Mapping[Any, HistogramSnapshot], labels: tuple[str, ...] = ()) -> Metric:
    family = HistogramMetricFamily(f"coldstream_{name}", text, labels=labels)
    for key, histogram in values.items():
        family.add_metric(key, _buckets(histogram), histogram.sum)
    return family


def _buckets(histogram: HistogramSnapshot) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, the last one +Inf."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    total, out = 0, []
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        out.append((bound, float(total)))
    return out
