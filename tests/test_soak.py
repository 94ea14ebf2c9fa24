"""The parts of benchmarks/soak.py that judge: what is restored, what counts as injected, when the books are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import Books, check_books, damaged, is_injected, scrape, shorter
from cache.errors import ReadError
from tests.live_server import live_server


@pytest.mark.parametrize("fault", [damaged, shorter])
def test_a_file_is_whole_again_after_a_fault(fault: object, tmp_path: Path) -> None:
    file = tmp_path / "ffn.bin"
    content = bytes(range(1, 251)) * 100
    file.write_bytes(content)
    assert callable(fault)
    with pytest.raises(KeyError), fault(file):
        assert file.read_bytes() != content
        raise KeyError
    assert file.read_bytes() == content


def test_only_errors_of_reads_are_injected_ones() -> None:
    assert is_injected(str(ReadError("ffn.bin", 0, 4096, "Input/output error")))
    assert not is_injected("The engine failed on this request (ValueError); the server's log has the details.")


def sound() -> dict[str, float]:
    """Counters of a server at rest, as /metrics says them."""
    with live_server() as server:
        found = scrape(server.url)
    names = [f"neuron_cache_{name}_total tier=cpu" for name in ("lookups", "hits", "misses")]
    assert set(names) < set(found)
    return found | {
        **dict(zip(names, (10.0, 4.0, 6.0), strict=True)),
        **{"kv_used_bytes": 0.0, "request_success_total finish_reason=stop": 3.0, "generation_tokens_total": 9.0},
        **{"e2e_request_latency_seconds_count": 3.0, "time_to_first_token_seconds_count": 3.0},
        **{"request_queue_time_seconds_count": 3.0, "request_failure_total reason=read_error": 1.0},
        **{"request_failure_total reason=queue_full": 2.0, "request_failure_total reason=wait_limit": 0.0},
    }


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, ""),
        ({"kv_used_bytes": 16.0}, "kv_used_bytes"),
        ({"num_requests_waiting": 1.0}, "num_requests_waiting"),
        ({"neuron_cache_hits_total tier=cpu": 5.0}, "lookups"),
        ({"generation_tokens_total": 8.0}, "tokens"),
        ({"e2e_request_latency_seconds_count": 2.0}, "histogram"),
        ({"request_failure_total reason=internal": 1.0}, "internal"),
        ({"request_failure_total reason=queue_full": 1.0}, "queue"),
        ({"request_failure_total reason=read_error": 0.0}, "faults"),
    ],
)
def test_books_that_do_not_add_up_are_wrong(changed: dict[str, float], word: str) -> None:
    after = sound()
    before = dict.fromkeys(after, 0.0)
    books = Books(completed=3, tokens=9, refused=2, faulted=1)
    check_books(books, before, after | changed)
    assert len(books.wrong) == (1 if changed else 0), books.wrong
    assert all(word in sentence for sentence in books.wrong)
