"""`Scrape`: what /metrics said at one moment, and `Interval`: how its counters grew between two.

Knows no meaning of names. Rates, shares and quantiles are PromQL's, so that a terminal and a dashboard agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from clients.client import APIError

PREFIX = "coldstream_"
Labels = frozenset[tuple[str, str]]
Series = dict[tuple[str, Labels], float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """Every sample of the server, by name without the prefix and by labels; `at_s` is monotonic."""

    at_s: float
    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, text: str, at_s: float) -> Self:
        """Of Prometheus' text format. Raises ValueError when it is none."""
        samples: Series = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())] = sample.value
        return cls(at_s, samples)

    def value(self, name: str, **labels: str) -> float | None:
        """The sample that has these labels and no other."""
        return self.samples.get((name, frozenset(labels.items())))

    def series(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """(labels, value) of every sample of a name."""
        return ((dict(labels), value) for (found, labels), value in self.samples.items() if found == name)


@dataclass(frozen=True, slots=True)
class Interval:
    """Two scrapes of one server, `before` perhaps of an earlier process: a counter that fell has begun anew."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        return self.after.at_s - self.before.at_s

    def increase(self, name: str, **labels: str) -> float:
        """Of the counter; 0 when it is not there."""
        return self._increase(name, frozenset(labels.items()))

    def rate(self, name: str, **labels: str) -> float:
        """Increase a second."""
        return self.increase(name, **labels) / self.seconds

    def share(self, part: str, whole: str, **labels: str) -> float | None:
        """Increase of one counter over that of another; None when the second stood still."""
        total = self.increase(whole, **labels)
        return self.increase(part, **labels) / total if total else None

    def quantile(self, name: str, q: float) -> float | None:
        """The q-quantile of what a histogram without labels observed; None when that is nothing.

        Linear within a bucket. In the last bucket (no upper bound) it is the largest bound, which is too small.
        """
        return histogram_quantile(q, self._buckets(name))

    def _buckets(self, name: str) -> list[tuple[float, float]]:
        """(upper bound, cumulative increase), by bound."""
        found = [k for k in self.after.samples if k[0] == f"{name}_bucket"]
        return sorted((float(dict(labels)["le"]), self._increase(key, labels)) for key, labels in found)

    def _increase(self, name: str, labels: Labels) -> float:
        now, then = (scrape.samples.get((name, labels), 0.0) for scrape in (self.after, self.before))
        return now - then if now >= then else now


def histogram_quantile(q: float, buckets: list[tuple[float, float]]) -> float | None:
    """As PromQL's, for buckets (upper bound, cumulative count) in order. None without observations."""
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = q * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower


class Scraper:
    """Asks one server for its metrics. Use it as a context manager."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 10.0) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def scrape(self) -> Scrape:
        """Raises APIError when the server refuses or is no coldstream, httpx.HTTPError when it is not there."""
        response = self._http.get("/metrics", headers={"accept": "text/plain"})
        if response.is_error:
            raise APIError(response.status_code, {"message": _message(response)})
        try:
            scrape = Scrape.parse(response.text, time.monotonic())
        except ValueError as error:
            raise APIError(response.status_code, {"message": f"/metrics cannot be read: {error}"}) from None
        if not any(True for _ in scrape.series("info")):
            raise APIError(response.status_code, {"message": f"{response.url} is not a coldstream server's"})
        return scrape


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code} from {response.url}"
