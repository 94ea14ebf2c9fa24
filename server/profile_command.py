"""The command `coldstream profile`: what a model's sparsity is good for, in numbers and plots.

Knows flags and words for people; what needs PyTorch is imported when it runs.
"""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.load_bar import LoadBar
from server.settings import Settings, SettingsError


def run_profile(model: str, settings: Settings, quick: bool, console: Console) -> None:
    """Measures `model` into --out: profile.json, statistics.safetensors, and the page where matplotlib is installed.

    console: for people. Standard output gets the figures, as a table or as JSON. Raises SettingsError without --out,
    ColdstreamError for what the runtime cannot do.
    """
    if settings.out is None:
        raise SettingsError("--out is missing: name a directory for the report")
    from runtime.profile import profile, rounded
    from runtime.report import can_draw, write_report

    with LoadBar(console) as bar:
        figures = rounded(profile(model, settings.out, settings.text, settings.tokens, quick, bar.update))
    if can_draw():
        shown = write_report([figures], settings.out)
        console.print(f"report: {escape(str(shown))}", highlight=False, soft_wrap=True)
    else:
        console.print("no page and no plots: matplotlib is absent (pip install 'coldstream\\[report]')")
    if settings.as_json:
        typer.echo(json.dumps(figures))
    else:
        Console().print(profile_table(figures))


def profile_table(figures: dict[str, Any]) -> Table:
    """Sparsity against performance, and the CETT that costs one percent."""
    dense = figures["sparsity"]["dense"]
    title = f"{figures['model']}: dense perplexity {dense['perplexity']:.3f} on {dense['tokens_scored']} tokens"
    table = Table(title=escape(title), title_justify="left")
    for name in ("CETT", "active", "perplexity", "over dense", "KL", "same top-1"):
        table.add_column(name, justify="right")
    for row in figures["sparsity"]["rows"]:
        table.add_row(*_cells(row))
    one = figures["sparsity"]["one_percent"]
    if "perplexity" in one:
        table.add_section()
        table.add_row(*_cells(one))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = row["increase_standard_error_percent"]
    return (
        f"{row['cett']:.3g}",
        f"{100 * row['active_share']:.1f} %",
        f"{row['perplexity']:.3f}",
        f"{row['increase_percent']:+.2f} %" + ("" if error is None else f" ± {error:.2f}"),
        f"{row['kl']:.4f}",
        f"{100 * row['same_top1']:.1f} %",
    )
