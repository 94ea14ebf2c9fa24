"""The README's block on the GPU tier, from what benchmarks/gpu.py measured. Measures nothing.

    python -m benchmarks.gpu_table benchmarks/results/gpu.json [--readme README.md]

What was not measured has no row. Bytes and bandwidths are in powers of 1000.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_results import Figures
from benchmarks.readme import block, replace_block

BLOCK = "gpu"  # of the README
SHAPES = {"afm-4.5b": "AFM-4.5B, ReLU²", "llama-7b": "Llama-7B, ReGLU"}
RESIDENCIES = (0, 10, 20, 40, 100)


def table(data: Figures) -> str:
    """Markdown: decode by residency, then what stands beside it, then where it was measured."""
    steps = data["steps"]
    parts = ["\n".join(decode_rows(steps)), "\n".join(f"* {line}" for line in beside(steps)), footnote(data)]
    return "\n\n".join(part for part in parts if part)


def decode_rows(steps: Figures) -> Iterator[str]:
    found = [(s, p, steps[f"{s} decode {p} %"]) for s in SHAPES for p in RESIDENCIES if f"{s} decode {p} %" in steps]
    if not found:
        return
    yield "| shape | FFN on the GPU | active | tokens/s | over its floor | misses, of the reference's | of the link |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for shape, percent, f in found:
        misses = "" if f.get("misses_over_reference") is None else f"{f['misses_over_reference']:.2f}"
        link = "" if f["missed_bytes_per_step"] == 0 else f"{f['link_share']:.0%}"
        yield (
            f"| {SHAPES[shape]} | {percent} % | {f['active_share']:.1%} | {f['tokens_per_s']:.0f} | "
            f"{f['over_floor']:.2f}x | {misses} | {link} |"
        )


def beside(steps: Figures) -> Iterator[str]:
    """What the decode rows are to be held against, a sentence each."""
    yield from _peers(steps)
    yield from _dense(steps)
    yield from _batches(steps)
    yield from _ahead(steps)
    if (p := steps.get("afm-4.5b prefill")) is not None:
        larger = max(p["stream_s"], p["gemm_s"])
        yield (
            f"Prefill of {p['rows']} tokens: {p['seconds'] * 1e3:.0f} ms, where the link alone takes "
            f"{p['stream_s'] * 1e3:.0f} ms and the products alone {p['gemm_s'] * 1e3:.0f} ms: "
            f"{larger / p['seconds']:.0%} of the larger."
        )
    if (t := steps.get("afm-4.5b three tiers")) is not None:
        yield (
            f"Home on disk, main memory at {t['ffn_in_memory_percent']} % of the FFN, {t['ffn_on_gpu_percent']} % on "
            f"the GPU: {t['tokens_per_s']:.1f} tokens/s, {t['stall_share']:.0%} of the time waiting for the disk "
            f"({t['disk_bytes_per_step'] / 1e6:.0f} MB a token at {t['disk_bytes_per_s'] / 1e9:.2f} GB/s; "
            f"{t['gpu_hit_share']:.0%} found on the GPU, {t['memory_hit_share']:.0%} of the rest in main memory)."
        )
    yield from _served(steps)
    for name in ("tests", "tests of kernels and slots"):
        if (t := steps.get(name)) is not None:
            counts = f"{t['passed']} passed, {t['failed']} failed, {t['skipped']} skipped"
            yield f"`pytest -m gpu`{name.removeprefix('tests')}: {counts}."


def _peers(steps: Figures) -> Iterator[str]:
    ours = steps.get("afm-4.5b decode 20 %")
    for name, what in (
        ("afm-4.5b streaming 20 %", "whole layers streamed from registered memory"),
        ("accelerate", "`accelerate` CPU offload with transformers"),
    ):
        if name in steps and ours is not None:
            speed = steps[name]["tokens_per_s"]
            times = ours["tokens_per_s"] / speed
            yield f"Under the cap of the 20 % row: {what}, {speed:.3g} tokens/s; ours {times:.0f}x that."


def _dense(steps: Figures) -> Iterator[str]:
    if (d := steps.get("afm-4.5b dense 100 %")) is None:
        return
    sparse = steps.get("afm-4.5b decode 100 %")
    against = "" if sparse is None else f"; sparse {sparse['tokens_per_s']:.0f}"
    plain = steps.get("afm-4.5b plain dense graph")
    if plain is not None:
        against += f"; a dense graph of plain PyTorch {plain['tokens_per_s']:.0f} ({plain['share_of_bound']:.0%})"
    yield (
        f"Everything resident: our dense CUDA graph {d['tokens_per_s']:.0f} tokens/s, {d['share_of_bound']:.0%} of "
        f"what the bandwidth allows{against}."
    )


def _batches(steps: Figures) -> Iterator[str]:
    rows = [(1, steps.get("afm-4.5b decode 20 %")), *((b, steps.get(f"afm-4.5b batch {b}")) for b in (4, 16))]
    known = [(b, f) for b, f in rows if f is not None]
    if len(known) > 1:
        each = (f"{b}: {f['tokens_per_s']:.0f} ({f['missed_bytes_per_step'] / b / 1e6:.0f} MB)" for b, f in known)
        yield f"Batches at 20 %, tokens/s in all (bytes over the link a token): {', '.join(each)}."


def _ahead(steps: Figures) -> Iterator[str]:
    """In rounds by turns with the same step that reads nothing ahead."""
    found = [(p, steps.get(f"afm-4.5b reading ahead {p} %")) for p in (20, 40)]
    said = [f"{f['times_faster']:.2f}x the speed at {p} %" for p, f in found if f is not None]
    if (f := steps.get("afm-4.5b reading ahead 40 %, sets as predicted")) is not None:
        right = f["fetched_hits_per_step"] / max(f["fetched_per_step"], 1e-9)
        said.append(
            f"{f['times_faster']:.2f}x at 40 % with what the predictor takes ({right:.0%} of the guesses wanted)"
        )
    if said:
        yield f"The surest of the next layer fetched while the link is idle, over the same without: {', '.join(said)}."


def _served(steps: Figures) -> Iterator[str]:
    for name, title in (("swiglu", "SwiGLU"), ("relu2", "ReLU²")):
        for below in ("", " from disk"):
            if (h := steps.get(f"http {name}{below}")) is not None:
                on_disk = " and its home on disk" if below else ""
                budget, kept = h.get("memory_budget_bytes"), ""
                if budget:
                    kept = f"; at most {h['memory_peak_bytes'] / 2**20:.0f} of `--memory {budget / 2**20:.0f}MiB`"
                yield (
                    f"SmolLM2-135M, {title}, over HTTP with 20 % of its FFN on the GPU{on_disk}: {h['texts_equal']} of "
                    f"{h['texts']} greedy texts as on the CPU; {h['load']['tokens_per_s']:.0f} tokens/s for "
                    f"{h['load']['concurrency']} at once, metrics scraped {h['metrics']['scrapes']} times "
                    f"meanwhile{kept}."
                )


def footnote(data: Figures) -> str:
    """Machine, day, commit and ceilings."""
    last, ceilings = data["runs"][-1], data["steps"].get("ceilings")
    gpu = data["steps"].get("machine", {}).get("gpu", "GPU")
    found = f"{gpu}, {last['started'][:10]}, commit `{last['commit'][:12]}`"
    if ceilings is not None:
        zero = max(ceilings["zero_copy_bytes_per_s"].values())
        found += (
            f"; measured in the run: pinned copy {ceilings['pinned_copy_bytes_per_s'] / 1e9:.1f} GB/s, kernels reading "
            f"main memory {zero / 1e9:.1f}, GPU memory {max(ceilings['read_bytes_per_s'].values()) / 1e9:.0f}"
        )
    for commit, names in older(data["steps"], last["commit"]).items():
        found += f"; of commit `{commit[:12]}`: {', '.join(names)}"
    what = "Floor: bytes missed and bytes resident over those bandwidths"
    return f"{found}. {what}. Written by `python -m benchmarks.gpu_table`."


def older(steps: Figures, last: str) -> dict[str, list[str]]:
    """By commit, the steps that another commit than the last one measured; profiles are not shown."""
    found: dict[str, list[str]] = {}
    for name, figures in steps.items():
        commit = figures.get("commit", last)
        if commit != last and not name.startswith("profile "):
            found.setdefault(commit, []).append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="gpu.json")
    parser.add_argument("--readme", type=Path, help="file whose block between the markers is replaced")
    options = parser.parse_args()
    text = table(json.loads(options.results.read_text(encoding="utf-8")))
    if options.readme is not None:
        replace_block(options.readme, BLOCK, text)
    print(block(BLOCK, text))


if __name__ == "__main__":
    main()
