"""One HTML page, and its plots as files, from what `profile` measured: a curve for each model.

Knows the figures' names, not how they were found. matplotlib (the extra `report`) is imported here only, when drawing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cache.errors import ColdstreamError

HTML = "profile.html"
Figures = dict[str, Any]  # what profile.json holds
_STYLES = ("-", "--", ":", "-.")
_COLOURS = ("k", *(f"C{i}" for i in range(10)), "gold")
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>coldstream profile</title>
<style>body{{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{padding:.2em .7em;text-align:right;border-bottom:1px solid #ccc}}
td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%;height:auto}}</style>
<h1>coldstream profile</h1>
{body}
</html>
"""


def can_draw() -> bool:
    """Whether the extra `report` is installed."""
    return find_spec("matplotlib") is not None


def write_report(profiles: Sequence[Figures], out: Path) -> Path:
    """Writes profile.html and its plots (SVG) into `out`; returns the page. ColdstreamError without matplotlib."""
    if not can_draw():
        raise ColdstreamError("the report needs matplotlib: pip install 'coldstream[report]'")
    plots = {name: _svg(draw, profiles) for name, (_, draw) in _PLOTS.items()}
    for name, svg in plots.items():
        (out / f"{name}.svg").write_text(svg, encoding="utf-8")
    parts = [_summary(profiles)]
    for name, (title, _) in _PLOTS.items():
        parts += [f"<h2>{escape(title)}</h2>", plots[name][plots[name].index("<svg") :]]
    parts += [_sparsity_table(p) + _predictor_table(p) for p in profiles]
    page = out / HTML
    page.write_text(_PAGE.format(body="\n".join(parts)), encoding="utf-8")
    return page


def _svg(draw: Callable[[Any, Sequence[Figures]], None], profiles: Sequence[Figures]) -> str:
    """A figure as SVG, the same for the same figures: no date, fixed ids."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "coldstream", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, profiles)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _label(figures: Figures) -> str:
    return f"{figures['model']} ({figures['config']['hidden_act']})"


def _draw_sparsity(figure: Any, profiles: Sequence[Figures]) -> None:
    increase, curve, depth = figure.subplots(1, 3)
    for i, p in enumerate(profiles):
        rows, colour = p["sparsity"]["rows"], f"C{i}"
        active = [100 * r["active_share"] for r in rows]
        increase.plot([r["cett"] for r in rows], [r["increase_percent"] for r in rows], "o-", color=colour)
        curve.plot(active, [r["perplexity"] for r in rows], "o-", color=colour, label=_label(p))
        curve.axhline(p["sparsity"]["dense"]["perplexity"], color=colour, linestyle=":")
        for row in rows[1:4]:
            shares = [100 * s for s in row["active_share_layers"]]
            depth.plot(shares, color=colour, alpha=1.2 - 2 * min(row["cett"], 0.5) - 0.1)
    increase.axhline(1, color="grey", linestyle=":")
    increase.set(xlabel="CETT", ylabel="perplexity over dense, %", yscale="symlog")
    curve.set(xlabel="active neurons, %", ylabel="perplexity (dotted: dense)", yscale="log")
    depth.set(xlabel="layer", ylabel="active neurons, % (CETT 0.05, 0.1, 0.2)")
    curve.legend()


def _draw_predictors(figure: Any, profiles: Sequence[Figures]) -> None:
    """At the lowest CETT looked at: recall on the own input, perplexity against bytes, and what lookahead loses."""
    recall, price, lookahead = figure.subplots(1, 3)
    for i, p in enumerate(profiles):
        rows = [r for r in p["predictivity"] if r["cett"] == p["affinity"][0]["cett"]]
        names = list(dict.fromkeys(r["predictor"] for r in rows))
        for row in rows:
            style = {"color": _COLOURS[names.index(row["predictor"]) % len(_COLOURS)]}
            style["linestyle"] = _STYLES[i % len(_STYLES)]
            budgets, label = row["budgets"], row["predictor"] if i == 0 else None
            if row["source"] == "input":
                xs = [b["budget"] for b in budgets]
                recall.plot(xs, [100 * b["recall"] for b in budgets], label=label, **style)
                _draw_price(price, row, f"{_label(p)}", style["color"], "osv^"[i % 4])
            else:
                marker = "o" if row["source"] == "residual" else "s"
                xs = [b["budget"] for b in budgets]
                lookahead.plot(xs, [100 * b["recall"] for b in budgets], marker, ms=4, **style)
    recall.set(xlabel="budget, times the active set", ylabel="recall, %")
    price.set(xlabel="memory, % of the bf16 FFN", ylabel="perplexity over the oracle, %", xscale="log", yscale="symlog")
    lookahead.set(xlabel="budget (circles: residual before attention,\nsquares: a layer ahead)", ylabel="recall, %")
    if any(p["predictivity"] for p in profiles):
        recall.legend(fontsize=7)


def _draw_price(axis: Any, row: dict[str, Any], label: str, colour: str, marker: str) -> None:
    """A point a budget at which perplexity was measured, smaller ones for larger budgets."""
    for b in row["budgets"]:
        if "over_oracle_percent" in b:
            x, y = 100 * row["share_of_bf16_ffn"], b["over_oracle_percent"]
            axis.plot(x, y, marker, color=colour, ms=8 / b["budget"], label=label)


def _draw_affinity(figure: Any, profiles: Sequence[Figures]) -> None:
    union, skew, gap = figure.subplots(1, 3)
    for i, p in enumerate(profiles):
        for detail, style in zip(p["affinity"], _STYLES, strict=False):
            label = f"{_label(p)}, CETT {detail['cett']:g}"
            line = {"color": f"C{i}", "linestyle": style}
            union.plot(range(1, len(detail["union"]) + 1), [100 * u for u in detail["union"]], label=label, **line)
            skew.plot([100 * s for s in detail["skew_shares"]], [100 * s for s in detail["skew"]], **line)
            gap.plot([layer["gap"] for layer in detail["layers"]], **line)
    union.set(xlabel="tokens", ylabel="union of active sets, % of the layer")
    skew.set(xlabel="hottest neurons, %", ylabel="share of the activations, %")
    gap.set(xlabel="layer", ylabel="top-average co-activation gap")
    union.legend(fontsize=7)


def _draw_cache(figure: Any, profiles: Sequence[Figures]) -> None:
    layer, pool, reads = figure.subplots(1, 3)
    for i, p in enumerate(profiles):
        detail, style = p["affinity"][0], _STYLES[i % len(_STYLES)]
        shares = [100 * s for s in detail["cache_shares"]]
        for axis, key in ((layer, "hit_rates"), (pool, "pool_hit_rates")):
            for j, (name, rates) in enumerate(detail[key].items()):
                label = f"{_label(p)}: {name}"
                axis.plot(shares, [100 * r for r in rates], color=f"C{j}", linestyle=style, label=label)
        for j, (name, by_share) in enumerate(detail["reads_a_token"].items()):
            points = by_share[-1]
            reads.plot(
                [b / 2**20 for _, b in points], [r for r, _ in points], "o", color=f"C{j}", linestyle=style, label=name
            )
    layer.set(xlabel="cache, % of each layer", ylabel="hit rate, %")
    pool.set(xlabel="one pool, % of the FFN", ylabel="hit rate, %")
    reads.set(xlabel="MiB read a token", ylabel="reads a token (merge gaps, left to right)", yscale="log")
    layer.legend(fontsize=6)
    reads.legend(fontsize=7)


_PLOTS: dict[str, tuple[str, Callable[[Any, Sequence[Figures]], None]]] = {
    "sparsity": ("Sparsity against performance", _draw_sparsity),
    "predictivity": ("Predictivity", _draw_predictors),
    "affinity": ("Hardware affinity: active sets", _draw_affinity),
    "cache": ("Hardware affinity: caches and reads", _draw_cache),
}


def _summary(profiles: Sequence[Figures]) -> str:
    header = ("model", "activation", "dense perplexity", "CETT at +1 %", "measured there", "active there", "text")
    rows = []
    for p in profiles:
        one = p["sparsity"]["one_percent"]
        measured = f"{one['increase_percent']:+.2f} %" if "increase_percent" in one else ""
        active = _percent(one.get("active_share"))
        text = f"{p['sparsity']['dense']['tokens_scored']} tokens of {p['text']}{', quick' if p['quick'] else ''}"
        dense = f"{p['sparsity']['dense']['perplexity']:.2f} ± {p['sparsity']['dense']['standard_error']:.2f}"
        rows.append((p["model"], p["config"]["hidden_act"], dense, f"{one['cett']:.3f}", measured, active, text))
    return _table(header, rows)


def _sparsity_table(p: Figures) -> str:
    header = ("CETT", "active", "perplexity", "over dense", "KL", "same top-1")
    rows = [
        (
            f"{r['cett']:g}",
            _percent(r["active_share"]),
            f"{r['perplexity']:.2f}",
            f"{r['increase_percent']:+.2f} ± {r['increase_standard_error_percent'] or 0:.2f} %",
            f"{r['kl']:.3f}",
            _percent(r["same_top1"]),
        )
        for r in p["sparsity"]["rows"]
    ]
    return f"<h2>{escape(_label(p))}</h2>" + _table(header, rows)


def _predictor_table(p: Figures) -> str:
    made = ("predictor", "reads", "CETT", "of bf16 FFN", "µs a layer", "budget")
    header = (*made, "recall", "precision", "energy", "resulting CETT", "perplexity", "over oracle")
    rows = []
    for r in p["predictivity"]:
        own = (r["predictor"], r["source"], f"{r['cett']:g}", _percent(r["share_of_bf16_ffn"]))
        for b in r["budgets"]:
            shares = (_percent(b["recall"]), _percent(b["precision"]), _percent(b["energy"]), f"{b['cett']:.3f}")
            carried = (
                (f"{b['perplexity']:.2f}", f"{b['over_oracle_percent']:+.2f} %") if "perplexity" in b else ("", "")
            )
            rows.append((*own, f"{r['microseconds_a_layer']:.0f}", f"{b['budget']:g}", *shares, *carried))
    return _table(header, rows) if rows else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
