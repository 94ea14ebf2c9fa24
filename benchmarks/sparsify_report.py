"""What `coldstream sparsify` made of the default model on GPUs, as a table, two plots and a card, from the runs' files.

    python -m benchmarks.sparsify_report [--readme README.md]

Reads benchmarks/results/sparsify/, all written by benchmarks/sparsify_gpu.py: short-FORM.json are short runs of each
form, with the same settings, on one GPU each; relu2-pairs.json is the long one; evaluate.json, where it is there, has
what its command of that name says of it. Writes bytes.png (bytes of active neurons a token against perplexity, for
teacher and student), minutes.png (perplexity against GPU minutes) and MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.readme import replace_block
from benchmarks.sparsify_gpu import BASE_MODEL, LICENCE
from runtime.student_checkpoint import CARD, card

RESULTS = Path(__file__).resolve().parent / "results" / "sparsify"
LAYERS, HIDDEN, WIDTH = 30, 576, 1536  # of SmolLM2-135M
FORMS = {
    "gated": "gated ReLU²",
    "attention": "gated ReLU², attention trained too",
    "reglu": "ReGLU (gated ReLU)",
    "pairs": "ReLU² without a gate",
}
LITERATURE = "heldout.txt"


def megabytes(active: float, gated: bool) -> float:
    """Of a token's active neurons, bf16: three vectors each, or two of twice as many neurons."""
    return active * WIDTH * (3 if gated else 4) * HIDDEN * LAYERS * 2 / 1e6


def table(short: dict[str, dict[str, Any]], long: dict[str, Any], evaluated: dict[str, Any]) -> str:
    """Markdown: the forms after equally many tokens, and the long run; then that one in words."""
    lines = [
        "| | tokens | GPU min | active | MB a token | prose, dense | served | over SwiGLU | literature | own texts |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(name, short[form]) for form, name in FORMS.items()),
        _row("**ReLU² without a gate, attention trained too**", long),
    ]
    return "\n".join([*lines, "", finished(long, evaluated)])


def _row(name: str, run: dict[str, Any]) -> str:
    """Of a run's end, neurons chosen by 4-bit sketches."""
    result, recipe = run["result"], run["recipe"]
    cells = [
        name,
        f"{recipe['tokens'] / 1e6:.0f} M",
        f"{run['seconds'] * run['processes'] / 60:.1f}",
        f"{100 * result['taken_heldout']:.1f} %",
        f"{megabytes(result['taken_heldout'], recipe['gated']):.1f}",
        f"{result['perplexity_dense']:.2f}",
        f"{result['perplexity_predicted']:.2f} ± {result['standard_error_predicted']:.2f}",
        f"{run['checks']['prose_over_teacher_percent']:+.1f} %",
        f"{run['others'][LITERATURE]['over_teacher_percent']:+.1f} %",
        f"{run['checks']['samples_over_teacher_percent']:+.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def finished(run: dict[str, Any], evaluated: dict[str, Any]) -> str:
    """The end of the long run in words."""
    teacher, samples = run["teacher"], run["samples"]
    top, largest = 100 * run["checks"]["largest_share_outside_layer_0"], 100 * max(teacher["top_shares"])
    return (
        f"Perplexities of 16,384 tokens of {run['heldout']}, SwiGLU: {teacher['perplexity']:.2f} ± "
        f"{teacher['standard_error']:.2f}. On the teacher's own texts ({samples['perplexity_teacher']:.2f}) the long "
        f"run has {samples['perplexity_dense']:.2f} dense, {samples['perplexity_served']:.2f} with thresholds and "
        f"{samples['perplexity_predicted']:.2f} by sketches{_at_more(evaluated)}. Largest share of one neuron in a "
        f"layer's energy: {top:.0f} %; in the teacher {largest:.0f} %."
    )


def _at_more(evaluated: dict[str, Any]) -> str:
    """On other texts of the teacher's, with as many neurons as were asked for."""
    if not evaluated:
        return ""
    at = evaluated["samples"]["active 0.08"]
    return (
        f"; on more of them, with {100 * at['taken_heldout']:.1f} % of the neurons, {at['over_teacher_percent']:+.1f} %"
    )


def plots(run: dict[str, Any], evaluated: dict[str, Any]) -> None:
    """bytes.png, thresholds from an oracle; minutes.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, key in (("SwiGLU, as it comes", "curve_teacher"), ("ReLU², made from it", "curve_student")):
        points = run[key]
        sizes, values = [p["bytes"] / 1e6 for p in points], [p["perplexity"] for p in points]
        axes.errorbar(sizes, values, yerr=[p["standard_error"] for p in points], marker="o", label=name, capsize=2)
    axes.set_xlabel("active FFN neurons, MB a token (bf16)")
    _finish(figure, axes, "bytes.png")

    figure, axes = pyplot.subplots(figsize=(6, 4))
    minutes = [p["seconds"] * run["processes"] / 60 for p in run["curve"]]
    for name, key in (("dense", "perplexity_dense"), ("thresholds in place", "perplexity_served")):
        axes.plot(minutes, [p[key] for p in run["curve"]], marker="o", label=name)
    if evaluated:
        axes.axhline(
            evaluated["curve"]["perplexity_teacher"], color="grey", linestyle="--", label="SwiGLU, as it comes"
        )
    axes.set_xlabel(f"GPU minutes ({run['processes']} x {run['device'].removeprefix('NVIDIA ')})")
    _finish(figure, axes, "minutes.png")


def _finish(figure: Any, axes: Any, name: str) -> None:
    axes.set_ylabel("perplexity of held-out prose")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, help="write the table between its markers there")
    options = parser.parse_args()
    short = {form: _read(f"short-{form}") for form in FORMS}
    long = _read("relu2-pairs")
    evaluated = _read("evaluate") if (RESULTS / "evaluate.json").is_file() else {}
    text = table(short, long, evaluated)
    print(text)
    plots(long, evaluated)
    (RESULTS / CARD).write_text(card(long, BASE_MODEL, LICENCE), encoding="utf-8")
    if options.readme is not None:
        replace_block(options.readme, "sparsify", text)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
