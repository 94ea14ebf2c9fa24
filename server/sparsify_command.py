"""The command `coldstream sparsify`: a sparse ReLU-family model out of a dense one.

Knows flags and words for people; what needs PyTorch is imported when it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.load_bar import LoadBar
from server.openers import openers
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from runtime.distill import Report


def run_sparsify(model: str, settings: Settings, texts: Sequence[Path], console: Console) -> None:
    """Trains a student of `model` and writes it to --out, with its figures, its profile and its card.

    console: for people. Standard output gets the figures, as a table or as JSON. Raises SettingsError without --out,
    ColdstreamError for what the runtime cannot do. Of several processes (torchrun) the first one speaks.
    """
    if settings.out is None:
        raise SettingsError("--out is missing: name a directory for the model")
    from runtime.load import default_calibration, default_heldout
    from runtime.profile import profile
    from runtime.sparsify import DEFAULT_TOKENS, SparsifyOptions, sparsify

    options = SparsifyOptions(
        act=settings.act,
        gated=settings.gated,
        attention=settings.attention,
        tokens=settings.tokens or DEFAULT_TOKENS,
        active=settings.active,
        texts=tuple(texts),
        device=settings.device,
        resume=settings.resume,
    )
    first = os.environ.get("RANK", "0") == "0"
    with LoadBar(console if first else Console(quiet=True)) as bar:
        figures = sparsify(
            model,
            settings.out,
            options,
            openers,
            (default_calibration(), default_heldout()),
            _Reporter(bar, console).show,
            lambda made, report: profile(str(made), report, None, None, True, bar.update),
        )
    if not first:
        return
    hint = _how_to_serve(settings.act, figures["result"])
    console.print(f"written: {escape(str(settings.out))}; {hint}", highlight=False, soft_wrap=True)
    if settings.as_json:
        typer.echo(json.dumps(figures))
    else:
        Console().print(sparsify_table(figures))


def _how_to_serve(act: str, result: dict[str, Any]) -> str:
    """What to do with it: the CETT at which the share that was trained for is active."""
    from runtime.calibrate import CETT_GRID

    if act == "drelu":
        return "its model_type is llama_drelu, which no class of transformers computes, nor coldstream"
    cett, most = result["cett"], CETT_GRID[-1]
    if cett > most:
        return f"its share of neurons is that of CETT {cett:.3f}, more than {most:g}: train longer, or for more neurons"
    return f"at --cett {cett:.3f} its share of neurons is active"


class _Reporter:
    """A bar for each phase, and a line with the figures whenever held-out text was measured."""

    def __init__(self, bar: LoadBar, console: Console) -> None:
        self._bar, self._console = bar, console
        self._shown: tuple[float | None, ...] = (None, None)

    def show(self, report: Report) -> None:
        self._bar.update("training", report.step / report.steps)
        figures = (report.perplexity, report.perplexity_served)
        if figures == self._shown or os.environ.get("RANK", "0") != "0":
            return
        self._shown = figures
        self._console.print(report_line(report), highlight=False, markup=False, soft_wrap=True)


def report_line(report: Report) -> str:
    """One line for people."""
    active = "" if report.active != report.active else f", active {100 * report.active:.1f} %"
    loss = "error" if report.phase == "layers" else "KL"
    return (
        f"{report.phase} {report.step}/{report.steps}: {loss} {report.kl:.4f}{active}, perplexity "
        f"{report.perplexity or 0:.2f} dense, {report.perplexity_served or 0:.2f} served, "
        f"{report.tokens_per_s:,.0f} tokens/s, {report.eta_s / 60:.0f} min left"
    )


def sparsify_table(figures: dict[str, Any]) -> Table:
    """Teacher and student on held-out text."""
    result, teacher = figures["result"], figures["teacher"]
    title = f"{teacher['name']}: perplexity of {figures['heldout']}, {figures['seconds'] / 60:.1f} min"
    table = Table(title=escape(title), title_justify="left")
    for name in ("model", "perplexity", "over the original", "neurons"):
        table.add_column(name, justify="left" if name == "model" else "right")
    rows = [
        ("original", teacher["perplexity"], 1.0),
        ("student, dense", result["perplexity_dense"], 1.0),
        ("student, thresholds", result["perplexity_served"], result["active_heldout"]),
        ("student, 4-bit sketches", result["perplexity_predicted"], result["taken_heldout"]),
    ]
    for name, value, share in rows:
        over = 100 * (value / teacher["perplexity"] - 1)
        table.add_row(name, f"{value:.3f}", f"{over:+.1f} %", f"{100 * share:.1f} %")
    return table
