"""`coldstream load`: many streamed completions at a time, and what a client sees of them. Knows the wire, not models.

Prompts are pseudo-random words, cut to an exact number of tokens by the server's own tokenizer, each another one, so
that none is found in a cache by its beginning. Every request decodes greedily to its last token (`ignore_eos`). Time to
first token (TTFT): from sending to the first text; inter-token latency (ITL): between two chunks, each a token unless a
character spans several.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clients.chat import UnreachableError
from clients.client import DEFAULT_URL, APIError, AsyncClient

DEFAULT_TOKENS = 64
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_WORDS = (
    *(
        "river",
        "stone",
        "window",
        "garden",
        "letter",
        "winter",
        "music",
        "paper",
        "silver",
        "morning",
        "engine",
        "bridge",
    ),
    *("candle", "forest", "harbour", "island", "journey", "kitchen", "ladder", "market", "needle", "orchard"),
    *("pocket", "quarry", "ribbon", "shadow", "thunder", "umbrella", "valley", "wagon", "yellow", "zero"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """requests: in all; concurrency: under way at once; tokens: of each prompt, and to be generated for it."""

    requests: int
    concurrency: int
    prompt_tokens: int
    tokens: int
    seed: int = 0


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; seconds since it was sent. error: a status, or what broke."""

    chunk_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def run_load(url: str = DEFAULT_URL, api_key: str | None = None, *, plan: Plan) -> dict[str, Any]:
    """Asks the server all that the plan says, and returns the figures. Raises UnreachableError."""
    try:
        return asyncio.run(_run(url, api_key, plan))
    except APIError as error:
        raise UnreachableError(f"--url {url}: the server refuses: {error}") from error
    except (httpx.HTTPError, httpx.InvalidURL, LookupError) as error:
        raise UnreachableError(f"--url {url}: no coldstream server can be reached there ({error})") from error


async def _run(url: str, api_key: str | None, plan: Plan) -> dict[str, Any]:
    async with AsyncClient(url, api_key) as client:
        card = (await client.models())[0]
        prompts = iter(await _prompts(client, plan))
        samples: list[Sample] = []
        started_s = time.perf_counter()
        await asyncio.gather(*(_worker(client, prompts, plan, samples) for _ in range(plan.concurrency)))
        wall_s = time.perf_counter() - started_s
    return {"url": url, "model": card["id"], "concurrency": plan.concurrency, **figures(samples, wall_s)}


async def _prompts(client: AsyncClient, plan: Plan) -> list[list[int]]:
    """Token ids, prompt_tokens each. A word is at least a token, so that as many words are enough."""
    rng = random.Random(plan.seed)
    out = []
    for _ in range(plan.requests):
        text = " ".join(rng.choices(_WORDS, k=plan.prompt_tokens))
        out.append((await client.tokenize(text))[: plan.prompt_tokens])
    return out


async def _worker(client: AsyncClient, prompts: Iterator[list[int]], plan: Plan, samples: list[Sample]) -> None:
    for prompt in prompts:  # shared: whoever is free takes the next
        samples.append(await ask(client, prompt, plan.tokens))


async def ask(client: AsyncClient, prompt: Sequence[int], tokens: int) -> Sample:
    """One streamed completion, timed. What fails is in the sample."""
    sample, started_s = Sample(), time.perf_counter()
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    try:
        async for chunk in client.stream_completions(prompt, **options):
            if any(choice["text"] for choice in chunk["choices"]):
                sample.chunk_s.append(time.perf_counter() - started_s)
            sample.usage = chunk.get("usage") or sample.usage
            sample.cost = chunk.get("coldstream") or sample.cost
    except APIError as error:
        sample.error = "stream" if error.status is None else str(error.status)
    except httpx.HTTPError as error:
        sample.error = type(error).__name__
    sample.end_s = time.perf_counter() - started_s
    return sample


def figures(samples: Sequence[Sample], wall_s: float) -> dict[str, Any]:
    """What the samples say together; seconds, and quantiles of them. Latencies are of requests that went well."""
    good = [sample for sample in samples if sample.error is None]
    generated = sum(sample.usage.get("completion_tokens", 0) for sample in good)
    read = sum(sum(sample.cost.get("bytes_read", {}).values()) for sample in good)
    lookups, hits = (sum(sample.cost.get(name, 0) for sample in good) for name in ("cache_lookups", "cache_hits"))
    gaps = [b - a for sample in good for a, b in zip(sample.chunk_s, sample.chunk_s[1:], strict=False)]
    return {
        "requests": len(samples),
        "succeeded": len(good),
        "failed": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "wall_s": wall_s,
        "prompt_tokens": sum(sample.usage.get("prompt_tokens", 0) for sample in good),
        "completion_tokens": generated,
        "tokens_per_s": generated / wall_s if wall_s else 0.0,
        "ttft_s": quantiles([sample.chunk_s[0] for sample in good if sample.chunk_s]),
        "itl_s": quantiles(gaps),
        "e2e_s": quantiles([sample.end_s for sample in good]),
        "bytes_read_per_token": read / generated if generated else None,
        "cache_hit_rate": hits / lookups if lookups else None,
    }


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """By nearest rank; None without values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {name: ordered[round(q * last)] if ordered else None for name, q in _QUANTILES.items()}


def show(found: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title=escape(f"{found['model']} at {found['url']}, {found['concurrency']} at a time"))
    for name in ("", *_QUANTILES):
        table.add_column(name, justify="right" if name else "left")
    for name, words in (("ttft_s", "first token"), ("itl_s", "between tokens"), ("e2e_s", "whole request")):
        table.add_row(words, *(_milliseconds(found[name][key]) for key in _QUANTILES))
    console.print(table)
    failed = ", ".join(f"{count} x {reason}" for reason, count in found["failed"].items()) or "none"
    console.print(f"{found['succeeded']} of {found['requests']} requests in {found['wall_s']:.1f} s; failed: {failed}")
    console.print(f"{found['tokens_per_s']:.1f} tokens/s ({found['completion_tokens']} tokens)")
    if found["bytes_read_per_token"] is not None:
        hits = "" if found["cache_hit_rate"] is None else f", {found['cache_hit_rate']:.1%} of lookups hit"
        console.print(f"{found['bytes_read_per_token'] / 2**20:.2f} MiB read a token{hits}")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f} ms"
