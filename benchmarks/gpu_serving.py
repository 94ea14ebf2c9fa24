"""The real models over HTTP on the GPU: texts against those of the CPU tier, and the metrics under load."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks.gpu_parts import PROMPTS, SERVED, TEXTS, completion, completions
from benchmarks.gpu_results import Figures
from benchmarks.gpu_tiers import memory_below
from benchmarks.memory_budget import resident_peak_bytes
from benchmarks.serving import serving
from clients.load import Plan, run_load
from clients.scrape import Interval, Scrape, Scraper

LOAD = Plan(requests=16, concurrency=4, prompt_tokens=32, tokens=64)
_SCRAPE_EVERY_S = 0.1
_COUNTERS = ("lookups", "hits", "misses", "insertions", "evictions")


def http(work: Path, name: str, below: bool = False) -> Figures:
    """One packed model served with 20 % of its FFN on the GPU. below: and with its home on disk."""
    expected = json.loads((work / TEXTS).read_text(encoding="utf-8"))[name]["completions"]
    arguments, memory = ["--device", "cuda", *SERVED], None
    if below:
        memory = memory_below(work / name, arguments)
        arguments += ["--memory", str(memory)]
    with serving([str(work / name), *arguments]) as served:
        found = completions(served.url)
        turns = [turn(served.url, p, b) for p, a, b in zip(PROMPTS, found, expected, strict=True) if a != b]
        load = under_load(served.url)
        health = httpx.get(f"{served.url}/health").json()
        peak = resident_peak_bytes(served.process.pid)
    return {
        "memory_budget_bytes": memory,
        "memory_peak_bytes": peak,
        "texts": len(found),
        "texts_equal": sum(a == b for a, b in zip(found, expected, strict=True)),
        "first_difference": next(([a, b] for a, b in zip(found, expected, strict=True) if a != b), None),
        "turns": turns,
        "health": health,
        **load,
        "exit_code": served.process.returncode,
    }


def turn(url: str, prompt: str, expected: str) -> Figures:
    """Where the text leaves the one that was expected: the token, and the two most likely ones with their logprobs."""
    found, text = completion(url, prompt, logprobs=2)["logprobs"], ""
    for token, likely in zip(found["tokens"], found["top_logprobs"], strict=True):
        if not expected.startswith(text + token):
            return {"token": token, "logprobs": likely}
        text += token
    return {}


def under_load(url: str) -> Figures:
    """The load's own figures, and what the metrics, scraped all the while, say of the GPU's tier."""
    scrapes: list[Scrape] = []
    done = threading.Event()

    def watch() -> None:
        with Scraper(url) as scraper:
            while not done.is_set():
                scrapes.append(scraper.scrape())
                done.wait(_SCRAPE_EVERY_S)
            scrapes.append(scraper.scrape())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        load = run_load(url, plan=LOAD)
    finally:
        done.set()
        thread.join()
    return {"load": load, "metrics": gpu_metrics(scrapes)}


def gpu_metrics(scrapes: list[Scrape]) -> Figures:
    """Increases over all scrapes, and whether any counter ever fell."""
    whole = Interval(scrapes[0], scrapes[-1])
    names = [f"neuron_cache_{c}_total" for c in _COUNTERS]
    fell = sum(
        (b.value(n, tier="gpu") or 0) < (a.value(n, tier="gpu") or 0) for a, b in pairwise(scrapes) for n in names
    )
    return {
        "scrapes": len(scrapes),
        "fell": fell,
        **{c: whole.increase(n, tier="gpu") for c, n in zip(_COUNTERS, names, strict=True)},
        "transfer_bytes": whole.increase("transfer_bytes_total", src="cpu", dst="gpu"),
        "disk_bytes": whole.increase("transfer_bytes_total", src="disk", dst="cpu"),
        "stall_s": whole.increase("stall_seconds_total", src="disk"),
        "budget_bytes": scrapes[-1].value("memory_budget_bytes", tier="gpu"),
        "capacity_bytes": scrapes[-1].value("neuron_cache_capacity_bytes", tier="gpu"),
    }
