"""What `coldstream sparsify` made of the default model on a GPU, as a table and a plot, from the runs' own files.

    python -m benchmarks.sparsify_report [--readme README.md]

Reads benchmarks/results/sparsify/: relu2-gated.json is a finished run of benchmarks/sparsify_gpu.py,
relu2-pairs-interrupted.json the curve of one that was cut short; forms are compared at the last step that both have
measured. Writes bytes.png (bytes of active neurons a token against perplexity, for teacher and student).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.readme import replace_block

RESULTS = Path(__file__).resolve().parent / "results" / "sparsify"
LAYERS, HIDDEN, WIDTH = 30, 576, 1536  # of SmolLM2-135M


def megabytes(active: float, width: int, vectors: int) -> float:
    """Of a token's active neurons, bf16."""
    return active * width * vectors * HIDDEN * LAYERS * 2 / 1e6


def table(gated: dict[str, Any], pairs: dict[str, Any]) -> str:
    """Markdown: both forms after equally many tokens, then the finished run beside its teacher."""
    common = max({r["step"] for r in gated["curve"]} & {r["step"] for r in pairs["curve"]}, default=0)
    first, second = (next(r for r in run["curve"] if r["step"] == common) for run in (gated, pairs))
    lines = [
        "| | tokens seen | GPU minutes | active | MB of active neurons a token | perplexity, dense | as served |",
        "|---|---|---|---|---|---|---|",
        _row("gated ReLU², 1,536 neurons", first, megabytes(first["active_heldout"], WIDTH, 3)),
        _row("ReLU² without a gate, 3,072 neurons", second, megabytes(second["active_heldout"], 2 * WIDTH, 2)),
    ]
    return "\n".join([*lines, "", finished(gated)])


def finished(run: dict[str, Any]) -> str:
    """The end of a run in words."""
    result, teacher, checks = run["result"], run["teacher"], run["checks"]
    predicted = f"{result['perplexity_predicted']:.1f} ± {result['standard_error_predicted']:.1f}"
    tokens, largest = run["recipe"]["tokens"] / 1e6, 100 * max(teacher["top_shares"])
    return (
        f"The gated one at its end, after {tokens:.0f} M tokens, on 16,384 held-out ones: perplexity "
        f"{result['perplexity_dense']:.1f} dense and {predicted} with {100 * result['taken_heldout']:.1f} % of the "
        f"neurons, chosen by 4-bit sketches; the SwiGLU teacher {teacher['perplexity']:.1f} "
        f"({checks['prose_over_teacher_percent']:+.0f} %), on texts of its own writing "
        f"{checks['samples_over_teacher_percent']:+.0f} %. Largest share of one neuron in a layer's energy: "
        f"{100 * checks['largest_share_outside_layer_0']:.0f} %; in the teacher {largest:.0f} %."
    )


def _row(name: str, at: dict[str, Any], size: float) -> str:
    cells = [
        name,
        f"{at['tokens'] / 1e6:.0f} M",
        f"{at['seconds'] / 60:.1f}",
        f"{100 * at['active_heldout']:.1f} %",
        f"{size:.1f}",
        f"{at['perplexity_dense']:.1f}",
        f"{at['perplexity_served']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def plot(run: dict[str, Any], path: Path) -> None:
    """Perplexity against bytes, thresholds from an oracle."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, key in (("SwiGLU, as it comes", "curve_teacher"), ("gated ReLU², made from it", "curve_student")):
        points = run[key]
        sizes, values = [p["bytes"] / 1e6 for p in points], [p["perplexity"] for p in points]
        axes.errorbar(sizes, values, yerr=[p["standard_error"] for p in points], marker="o", label=name, capsize=2)
    axes.set_xlabel("active FFN neurons, MB a token (bf16)")
    axes.set_ylabel("perplexity of held-out prose")
    axes.set_ylim(25, 75)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, help="write the table between its markers there")
    options = parser.parse_args()
    gated, pairs = (json.loads((RESULTS / f"relu2-{n}.json").read_text()) for n in ("gated", "pairs-interrupted"))
    text = table(gated, pairs)
    print(text)
    plot(gated, RESULTS / "bytes.png")
    if options.readme is not None:
        replace_block(options.readme, "sparsify", text)


if __name__ == "__main__":
    main()
