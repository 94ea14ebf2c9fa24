"""`coldstream bench` accounts for the tier that computes, and for what comes into it from the one below."""

from __future__ import annotations

import pytest

from cache.stats import CacheSnapshot, TierSnapshot, TransferSnapshot
from runtime.bench import _account

DISK = TransferSnapshot(bytes=4000, needed_bytes=3000, requests=8, seconds=1.0, stall_seconds=0.5)
LINK = TransferSnapshot(bytes=800, needed_bytes=800, requests=40)
CPU, GPU = TierSnapshot(lookups=10, hits=4, misses=6), TierSnapshot(lookups=100, hits=60, misses=40)


@pytest.mark.parametrize(
    ("cache", "tier", "lookups", "read", "requests"),
    [
        (CacheSnapshot({"cpu": CPU}, {("disk", "cpu"): DISK}), "cpu", 10, 1000, 2),
        (CacheSnapshot({"gpu": GPU}, {("cpu", "gpu"): LINK}), "gpu", 100, 200, 10),
        (CacheSnapshot({"cpu": CPU, "gpu": GPU}, {("disk", "cpu"): DISK, ("cpu", "gpu"): LINK}), "gpu", 100, 200, 10),
    ],
)
def test_the_fastest_tier_is_accounted_for(
    cache: CacheSnapshot, tier: str, lookups: int, read: float, requests: float
) -> None:
    found = _account(cache, 4, 0)
    assert cache.fastest == tier
    assert (found["lookups"], found["bytes_read_per_token"], found["requests_per_token"]) == (lookups, read, requests)
