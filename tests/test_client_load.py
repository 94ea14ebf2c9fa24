"""`coldstream load`: figures from samples by hand, and a run against a live server."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from clients.chat import UnreachableError
from clients.load import Plan, Sample, figures, quantiles, run_load, show
from server.cli import app
from tests.fake_engine import FakeEngine, byte_tokenizer
from tests.live_server import MODEL, live_server


def sample(chunk_s: list[float], tokens: int, **cost: Any) -> Sample:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens}
    return Sample(chunk_s, chunk_s[-1] + 1, usage, {"bytes_read": {"disk": 100, "cpu": 1}, **cost})


def test_figures_of_samples_worked_out_by_hand() -> None:
    samples = [
        sample([1.0, 1.5, 2.5], 3, cache_lookups=10, cache_hits=4),
        sample([3.0, 3.25], 1, cache_lookups=10, cache_hits=8),
        Sample([9.0], 10.0, error="429"),
    ]
    found = figures(samples, wall_s=8.0)
    assert (found["requests"], found["succeeded"], found["failed"]) == (3, 2, {"429": 1})
    assert (found["prompt_tokens"], found["completion_tokens"], found["tokens_per_s"]) == (10, 4, 0.5)
    assert found["ttft_s"] == {"p50": 1.0, "p90": 3.0, "p99": 3.0}
    assert found["itl_s"] == {"p50": 0.5, "p90": 1.0, "p99": 1.0}
    assert found["e2e_s"]["p99"] == 4.25
    assert (found["bytes_read_per_token"], found["cache_hit_rate"]) == (202 / 4, 0.6)


def test_nothing_went_well() -> None:
    found = figures([Sample(error="ReadTimeout")], wall_s=1.0)
    assert found["tokens_per_s"] == 0 and found["bytes_read_per_token"] is None
    assert found["ttft_s"] == quantiles([]) == dict.fromkeys(("p50", "p90", "p99"))
    show({**found, "model": "m", "url": "u", "concurrency": 1}, Console(file=io.StringIO()))


def test_a_run_asks_as_planned() -> None:
    with live_server() as server:
        found = run_load(server.url, plan=Plan(requests=7, concurrency=3, prompt_tokens=20, tokens=5))
        asked = server.engine.requests
    assert (found["model"], found["succeeded"], found["failed"]) == (MODEL, 7, {})
    assert found["completion_tokens"] == 7 * 5 and found["prompt_tokens"] == 7 * 20
    assert [len(r.prompt_ids) for r in asked] == [20] * 7 and len({r.prompt_ids for r in asked}) == 7
    assert all(r.params.ignore_eos and r.params.temperature == 0 and r.params.max_tokens == 5 for r in asked)
    assert 0 < found["ttft_s"]["p50"] <= found["e2e_s"]["p50"] and found["bytes_read_per_token"] == 4096 / 5
    out = io.StringIO()
    show(found, Console(file=out, width=100))
    assert "7 of 7 requests" in out.getvalue() and "tokens/s" in out.getvalue()


def test_the_command_prints_json_and_fails_when_all_do() -> None:
    args = ["load", "--requests", "2", "--prompt-tokens", "3", "--tokens", "2", "--json"]
    with live_server() as server:
        done = CliRunner().invoke(app, [*args, "--url", server.url])
        assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["succeeded"] == 2
    with live_server(FakeEngine(byte_tokenizer(), fail_after=0)) as server:
        done = CliRunner().invoke(app, [*args, "--url", server.url])
        assert done.exit_code == 1 and json.loads(done.stdout.splitlines()[-1])["failed"] == {"stream": 2}


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(UnreachableError, match=r"--url http://127\.0\.0\.1:9: "):
        run_load("http://127.0.0.1:9", plan=Plan(1, 1, 1, 1))
