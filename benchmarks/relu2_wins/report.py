"""The table and the three plots of the comparison, from what measure.py and train.py wrote.

    python benchmarks/relu2_wins/report.py --work /tmp/relu2_wins --results benchmarks/results/relu2_wins

Reads WORK/measured/NAME.json and WORK/NAME.json (the training), NAME being relu, reglu, swiglu, relu2; writes
results.json, table.md and three plots into RESULTS. Figures at equal loss are interpolated between the CETT targets
measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from runtime.sparsity import cett_at_increase

NAMES = {"relu": "ReLU", "reglu": "ReGLU", "swiglu": "SwiGLU", "relu2": "ReLU²"}
COLOURS = {"relu": "tab:blue", "reglu": "tab:green", "swiglu": "tab:orange", "relu2": "tab:red"}
SLACK = 1.01  # equal loss: this times the worst dense perplexity
TABLE_CETTS = (0.05, 0.1, 0.2)
_COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("increase_percent", "above dense", "{:+.2f} %"),
    ("active", "active", "{:.1%}"),
    ("reuse", "reuse", "{:.1%}"),
    ("independent_reuse", "if independent", "{:.1%}"),
    ("gap", "gap", "{:.3f}"),
    ("recall_sketch4_1", "recall sketch 1.0x", "{:.1%}"),
    ("recall_sketch4_1.5", "1.5x", "{:.1%}"),
    ("recall_low_rank_1", "low rank 1.0x", "{:.1%}"),
    ("recall_low_rank_1.5", "1.5x", "{:.1%}"),
)


def at_perplexity(model: dict[str, Any], wanted: float) -> dict[str, float]:
    """A row between the measured ones at which perplexity is `wanted`, and its CETT, found as the runtime finds the
    CETT at +1 % (`measured`: whether the wanted one lies between them); the other figures on the logarithm of CETT."""
    rows = model["rows"]
    cetts, increases = [row["cett"] for row in rows], [row["increase_percent"] for row in rows]
    percent = 100 * (wanted / model["dense_perplexity"] - 1)
    cett = min(max(cett_at_increase(cetts, increases, percent), cetts[0]), cetts[-1])
    keys = [k for k, v in rows[0].items() if isinstance(v, float) and k not in ("cett", "perplexity")]
    found = {k: float(np.interp(math.log(cett), np.log(cetts), [row[k] for row in rows])) for k in keys}
    found |= {"perplexity": wanted, "increase_percent": percent}
    return {"cett": cett, "measured": increases[0] <= percent <= increases[-1], **found}


def with_equal_loss(models: dict[str, dict[str, Any]]) -> float:
    """Adds to each model the rows at +1 % of its own perplexity and at the common one; returns the latter."""
    common = SLACK * max(model["dense_perplexity"] for model in models.values())
    for model in models.values():
        model["at_1_percent"] = at_perplexity(model, 1.01 * model["dense_perplexity"])
        model["at_equal_loss"] = at_perplexity(model, common)
    return common


def table(models: dict[str, dict[str, Any]], common: float) -> str:
    """Markdown: one block of four rows a condition."""
    conditions: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for cett in TABLE_CETTS:
        conditions.append((f"CETT {cett:g}", {n: _row(m, cett) for n, m in models.items()}))
    conditions.append(("own dense +1 %", {n: m["at_1_percent"] for n, m in models.items()}))
    conditions.append((f"equal loss, {common:.2f}", {n: m["at_equal_loss"] for n, m in models.items()}))
    lines = [
        "| at | activation | CETT | " + " | ".join(title for _, title, _ in _COLUMNS) + " |",
        "|---" * (3 + len(_COLUMNS)) + "|",
    ]
    for title, rows in conditions:
        for name, row in rows.items():
            cells = [style.format(row[key]) for key, _, style in _COLUMNS]
            edge = "" if row.get("measured", True) else "*"
            lines.append(f"| {title} | {NAMES[name]} | {row['cett']:.3g}{edge} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _row(model: dict[str, Any], cett: float) -> dict[str, Any]:
    return next(row for row in model["rows"] if row["cett"] == cett)


def dense_table(models: dict[str, dict[str, Any]], runs: dict[str, Any], other: dict[str, Any]) -> str:
    """Markdown: the models as they are; held-out losses of other seeds beside them."""
    lines = [
        "| activation | neurons a layer | non-embedding parameters | held-out loss (of another seed) | exactly zero |"
        " CETT at +1 % | hottest neuron's share of energy, worst layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in models.items():
        loss = f"{runs[name]['heldout_nll']:.4f}"
        if name in other:
            loss += f" ({other[name]['heldout_nll']:.4f})"
        lines.append(
            f"| {NAMES[name]} | {m['neurons_a_layer']} | {m['non_embedding_parameters'] / 1e6:.2f} M | {loss} | "
            f"{1 - m['nonzero']:.1%} | {m['cett_at_1_percent']:.3f} | {max(m['largest_neuron_energy']):.1%} |"
        )
    return "\n".join(lines) + "\n"


# --- Plots ---


def plots(models: dict[str, dict[str, Any]], common: float, out: Path) -> None:
    """sparsity.png, recall.png, affinity.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, m in models.items():
        active = [100 * row["active"] for row in m["rows"]]
        style = {"color": COLOURS[name], "marker": "o", "label": NAMES[name]}
        axes[0].plot(active, [row["perplexity"] for row in m["rows"]], **style)
        axes[0].axhline(m["dense_perplexity"], color=COLOURS[name], lw=0.6, ls=":")
        axes[1].plot(active, [max(row["increase_percent"], 0.01) for row in m["rows"]], **style)
    axes[0].axhline(common, color="gray", lw=0.8, ls="--")
    dense = [m["dense_perplexity"] for m in models.values()]
    axes[0].set(ylim=(min(dense) * 0.99, max(dense) * 1.25), ylabel="held-out perplexity (dotted: dense)")
    axes[1].set(yscale="log", ylabel="perplexity above its own dense, %")
    axes[1].axhline(1, color="gray", lw=0.8, ls="--")
    for axis in axes:
        axis.set(xscale="log", xlabel="active neurons, %")
    _finish(figure, axes, out / "sparsity.png", "Sparsity against perplexity (points: CETT 0.02 to 0.5)")

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, predictor, title in zip(axes, ("sketch4", "low_rank"), ("4-bit sketch", "low rank"), strict=True):
        for name, m in models.items():
            cett = [row["cett"] for row in m["rows"]]
            for budget, line in (("1", "-"), ("1.5", "--")):
                recall = [100 * row[f"recall_{predictor}_{budget}"] for row in m["rows"]]
                label = NAMES[name] if budget == "1" else None
                axis.plot(cett, recall, line, color=COLOURS[name], marker="o", ms=3, label=label)
        axis.set(xlabel="CETT", ylabel="recall, %", title=f"{title} of the same bytes")
    _finish(figure, axes, out / "recall.png", "Recall of the active set (solid: budget 1.0x, dashed: 1.5x)")

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, m in models.items():
        active = [100 * row["active"] for row in m["rows"]]
        style = {"color": COLOURS[name], "marker": "o", "label": NAMES[name]}
        axes[0].plot(active, [100 * row["reuse"] for row in m["rows"]], **style)
        axes[0].plot(active, [100 * row["independent_reuse"] for row in m["rows"]], ":", color=COLOURS[name])
        axes[1].plot(active, [row["gap"] for row in m["rows"]], **style)
    axes[0].set(xscale="log", xlabel="active neurons, %", ylabel="reuse of adjacent tokens, % (dotted: if independent)")
    axes[1].set(xscale="log", xlabel="active neurons, %", ylabel="top-average co-activation gap")
    _finish(figure, axes, out / "affinity.png", "Reuse and co-activation")


def _finish(figure: Any, axes: Any, path: Path, title: str) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


# --- Results ---


def training(work: Path) -> dict[str, Any]:
    """The training of each model, its log thinned to some thirty points."""
    found = {}
    for name in (n for n in NAMES if (work / f"{n}.json").is_file()):
        run = json.loads((work / f"{name}.json").read_text())
        log = run.pop("log")
        run["log"] = [*log[:: max(1, len(log) // 30)], log[-1]]
        found[name] = run
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="of train.py and measure.py")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--other-seed", type=Path, help="of another run of train.py, for its held-out losses")
    parser.add_argument("--trained-on", default="one NVIDIA H100", help="the machine, in words")
    parser.add_argument("--measured-on", default=f"{platform.machine()}, fp32, CPU", help="likewise")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    paths = {name: options.work / "measured" / f"{name}.json" for name in NAMES}
    models = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    if missing := NAMES.keys() - models.keys():
        print(f"not measured yet: {', '.join(sorted(missing))}")
    common = with_equal_loss(models)
    runs = training(options.work)
    other = training(options.other_seed) if options.other_seed else {}
    text = dense_table(models, runs, other) + "\n" + table(models, common)
    (options.results / "table.md").write_text(text)
    plots(models, common, options.results)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "trained_on": options.trained_on,
        "measured_on": options.measured_on,
        "equal_loss_perplexity": common,
        "training": runs,
        "other_seed": {name: {k: v for k, v in run.items() if k != "log"} for name, run in other.items()},
        "models": models,
    }
    (options.results / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
