"""The runs of benchmarks/disk.py as one table, one JSON object and one plot. Knows its rows, measures nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

Run = dict[str, Any]
_ALL_BYTES = 11 << 30  # where there was no limit

TARGETS = {  # ours over llama.cpp on the same weights and limit
    ("bf16 3GiB", "llama.cpp bf16 3GiB"): 5.0,
    ("bf16 3GiB, what is active", "llama.cpp bf16 3GiB"): 5.0,
    ("bf16 4GiB", "llama.cpp bf16 4GiB"): 8.0,
    ("bf16 4GiB, what is active", "llama.cpp bf16 4GiB"): 8.0,
    ("int8 3GiB", "llama.cpp bf16 3GiB"): 10.0,
    ("int8 3GiB, what is active", "llama.cpp bf16 3GiB"): 10.0,
    ("bf16, all in memory", "llama.cpp bf16, all in memory"): 2.0,
}
_COLUMNS = (
    ("tokens/s", "tokens_per_s", "{:.3g}"),
    ("hits", "hit_rate", "{:.0%}"),
    ("MB read", "read_bytes_per_token", "{:.0f}"),
    ("reads", "requests_per_token", "{:.0f}"),
    ("needed/read", "needed_share", "{:.0%}"),
    ("disk, of its pace", "disk_share", "{:.0%}"),
    ("waiting", "disk_seconds_share", "{:.0%}"),
    ("CPU busy", "cpu_busy", "{:.0%}"),
    ("misses/reference", "misses_to_reference", "{:.2f}"),
    ("active/taken/reuse", "shares", "{}"),
    ("others' CPU", "others_busy", "{:.0%}"),
)


def write_report(runs: Sequence[Run], out: Path) -> Run:
    """Medians over the rounds, printed as Markdown, written to `out` with the plot beside it."""
    rows = list(medians(runs))
    found = {
        "benchmark": "disk",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "rows": rows,
        "ratios": list(ratios(rows)),
        "plan": list(plan_errors(rows)),
        "prompt": prompt_share(rows),
    }
    print("\n".join(table(found)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if any(row["stage"] in ("sweep", "ablation") for row in rows):
        plot(rows, out.with_suffix(".png"))
    return {key: found[key] for key in ("benchmark", "date", "machine", "ratios", "plan", "prompt")}


def medians(runs: Sequence[Run]) -> Iterator[Run]:
    """One row a case: the median over its rounds of every number."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for one in runs:
        groups.setdefault((one["stage"], one["name"]), []).append(one)
    pace = disk_pace(runs)
    for (stage, name), group in groups.items():
        good = [one for one in group if "failed" not in one]
        good = [one for one in good if not disturbed(one)] or good
        row: Run = {"stage": stage, "name": name, "rounds": len(good)}
        if not good:
            yield row | {"failed": group[-1]["failed"]}
            continue
        row |= {
            key: middle([one[key] for one in good]) for key in good[0] if key not in ("stage", "name", "round", "time")
        }
        yield row | _derived(row, pace)


def disturbed(run: Run) -> bool:
    """Whether other processes took so much of the processors that the figure is theirs; interrupts alone take 0.2."""
    return float(run.get("others_busy", 0.0)) > 0.35


def middle(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: middle([v[key] for v in values]) for key in values[0]}
    if isinstance(values[0], bool) or not isinstance(values[0], (int, float)):
        return values[-1]
    return statistics.median(values)


def disk_pace(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """(read sizes, fio's bytes a second) of the reader stage; empty where it has not run."""
    rows = next((one["rows"] for one in runs if one["stage"] == "reader" and "rows" in one), [])
    return [r["read_bytes"] for r in rows], [r["fio_bytes_per_s"] for r in rows]


def _derived(row: Run, pace: tuple[list[float], list[float]]) -> Run:
    if "read_bytes_per_token" not in row:
        return {}
    found: Run = {}
    if row["read_bytes_per_token"]:
        found["needed_share"] = row["needed_bytes_per_token"] / row["read_bytes_per_token"]
    if pace[0] and row["mean_read_bytes"]:
        at = float(np.interp(np.log(row["mean_read_bytes"]), np.log(pace[0]), pace[1]))
        found |= {"disk_pace_bytes_per_s": at, "disk_share": row["disk_bytes_per_s"] / at}
    if row.get("reference_misses"):
        found["misses_to_reference"] = row["misses"] / row["reference_misses"]
    if "active_share" in row:
        found["shares"] = " / ".join(f"{100 * row[k]:.0f} %" for k in ("active_share", "taken_share", "reuse"))
    return found


def ratios(rows: Sequence[Run]) -> Iterator[Run]:
    speed = {
        row["name"]: row["tokens_per_s"]
        for row in rows
        if row["stage"] in ("decode", "whole") and "tokens_per_s" in row
    }
    for (ours, theirs), target in TARGETS.items():
        if ours in speed and theirs in speed:
            ratio = speed[ours] / speed[theirs]
            yield {"ours": ours, "theirs": theirs, "ratio": ratio, "target": target, "met": ratio >= target}


def plan_errors(rows: Sequence[Run]) -> Iterator[Run]:
    """plan's tokens/s over bench's, less one."""
    named = {row["name"]: row for row in rows if row["stage"] in ("plan", "decode") and "failed" not in row}
    for name, row in named.items():
        bench = named.get(name.replace("plan ", "bf16 "))
        said = (row.get("expected") or {}).get("tokens_per_s")
        if name.startswith("plan ") and bench is not None and said:
            error = said / bench["tokens_per_s"] - 1
            measured = bench["tokens_per_s"]
            yield {
                "memory": name.removeprefix("plan "),
                "plan": said,
                "bench": measured,
                "error": error,
                "met": abs(error) <= 0.3,
            }


def prompt_share(rows: Sequence[Run]) -> Run | None:
    """The larger of streaming and multiplying alone, over what a prompt took."""
    named = {row["name"]: row for row in rows if row["stage"] == "prompt" and "failed" not in row}
    short, whole = named.get("prompt 40 %"), named.get("prompt, all in memory")
    largest = max(
        (p for row in rows if row["stage"] == "reader" for p in [r["fio_bytes_per_s"] for r in row["rows"]]), default=0
    )
    if short is None or whole is None or not largest:
        return None
    stream_s, multiply_s = short["read_bytes_per_token"] / largest, whole["first_token_s"]
    share = max(stream_s, multiply_s) / short["first_token_s"]
    return {
        "first_token_s": short["first_token_s"],
        "stream_s": stream_s,
        "multiply_s": multiply_s,
        "share": share,
        "target": 0.8,
        "met": share >= 0.8,
    }


def table(found: Run) -> Iterator[str]:
    yield from _reader_table(found)
    yield from _kernel_table(found)
    for stage in ("decode", "whole", "plan", "ablation", "sweep"):
        rows = [row for row in found["rows"] if row["stage"] == stage and not row["name"].startswith("plan ")]
        if not rows:
            continue
        yield f"\n### {stage}\n"
        yield f"| | {' | '.join(title for title, _, _ in _COLUMNS)} |"
        yield f"|---|{'--:|' * len(_COLUMNS)}"
        for row in rows:
            yield f"| {row['name']} | {' | '.join(_cells(row))} |"
    yield from _notes(found)


def _reader_table(found: Run) -> Iterator[str]:
    for row in found["rows"]:
        if row["stage"] != "reader" or "failed" in row:
            continue
        yield "\n### reader, depth 64\n"
        yield "| read | fio | io_uring | of fio | pread threads | of fio |"
        yield "|---|--:|--:|--:|--:|--:|"
        for r in row["rows"]:
            speeds = [f"{r[f'{way}_bytes_per_s'] / 1e9:.2f} GB/s" for way in ("fio", "io_uring", "pread")]
            shares = [f"{r[f'{way}_share']:.0%}" for way in ("io_uring", "pread")]
            cells = [f"{r['read_bytes'] >> 10} KiB", speeds[0], speeds[1], shares[0], speeds[2], shares[1]]
            yield f"| {' | '.join(cells)} |"


def _kernel_table(found: Run) -> Iterator[str]:
    for row in found["rows"]:
        if row["stage"] != "kernels" or "failed" in row:
            continue
        yield "\n### kernels\n"
        yield "| | threads | GB/s | of the ceiling | best | target |"
        yield "|---|--:|--:|--:|--:|--:|"
        for c in row["cases"]:
            target = "" if c["target"] is None else f"{c['target']:.0%}"
            cells = [
                c["name"],
                str(c["threads"]),
                f"{c['gb_per_s']:.1f}",
                f"{c['share']:.0%}",
                f"{c['best_share']:.0%}",
            ]
            yield f"| {' | '.join([*cells, target])} |"


def _cells(row: Run) -> Iterator[str]:
    if "failed" in row:
        yield row["failed"]
        yield from [""] * (len(_COLUMNS) - 1)
        return
    for _, key, form in _COLUMNS:
        value = row.get(key)
        scale = 1e-6 if key == "read_bytes_per_token" else 1
        yield "" if value is None else form.format(value if isinstance(value, str) else value * scale)


def _notes(found: Run) -> Iterator[str]:
    yield ""
    for r in found["ratios"]:
        yield f"{r['ours']} over {r['theirs']}: {r['ratio']:.1f} (target {r['target']:g})"
    for p in found["plan"]:
        yield f"plan at {p['memory']}: {p['plan']:.2f} tokens/s, bench {p['bench']:.2f} ({p['error']:+.0%})"
    if found["prompt"]:
        p = found["prompt"]
        parts = f"streaming {p['stream_s']:.1f}, multiplying {p['multiply_s']:.1f}"
        yield f"1,024-token prompt: {p['first_token_s']:.1f} s; {parts}: {p['share']:.0%}"


def machine() -> Run:
    """Without names: cores, memory, kernel."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30)),
        "kernel": platform.release().split("-")[0],
    }


def plot(rows: Sequence[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    _plot_sweep(axes[0], rows)
    named = [(r["name"], r["tokens_per_s"]) for r in rows if r["stage"] == "ablation" and "tokens_per_s" in r]
    axes[1].barh([n for n, _ in named][::-1], [v for _, v in named][::-1], color="tab:blue")
    axes[1].set_xlabel("tokens/s at 4 GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_sweep(axes: Any, rows: Sequence[Run]) -> None:
    """Every run that had a limit, and those that had none at the right edge."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (
            row["stage"] in ("decode", "plan", "whole", "sweep")
            and "tokens_per_s" in row
            and "active" not in row["name"]
        ):
            system = re.sub(r",? (all in memory|[0-9]+(GiB| %))$", "", row["name"])
            lines.setdefault(system, []).append((row.get("limit_bytes", _ALL_BYTES) / 1e9, row["tokens_per_s"]))
    for name, points in lines.items():
        label = name if name.startswith(("llama.cpp", "accelerate")) else f"coldstream {name}"
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="memory, GB; the model in bf16 has 8.4", ylabel="tokens/s", yscale="log")
    if lines:
        axes.legend(fontsize=8)
