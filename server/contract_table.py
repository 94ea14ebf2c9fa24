"""What `prepare` found, as tables for people: perplexity by CETT, the choice, and each layer. Knows the manifest."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table

from cache.budget import format_size


def contract_tables(contract: dict[str, Any], ffn_bytes: int, tokens: dict[str, int]) -> Group:
    """ffn_bytes: all records; tokens: of the calibration text, by purpose."""
    return Group(_measured(contract, tokens), _layers(contract), _sentence(contract, ffn_bytes))


def show_contract(console: Console, contract: dict[str, Any], ffn_bytes: int, tokens: dict[str, int]) -> None:
    console.print(contract_tables(contract, ffn_bytes, tokens), highlight=False)


def _measured(contract: dict[str, Any], tokens: dict[str, int]) -> Table:
    used = ", ".join(f"{num} for {purpose}" for purpose, num in tokens.items())
    table = Table(title=f"Perplexity with the predictor, nothing pinned (tokens: {used})", title_justify="left")
    for name in ("CETT", "perplexity", "over dense", "taken"):
        table.add_column(name, justify="right")
    for row in contract["measured"]:
        increase = row.get("increase_percent", 0.0)
        if increase is None:
            table.add_row(f"{row['cett']:g}", "", "given up: far beyond", "")
            continue
        error = f" ± {row['standard_error_percent']:.2f}" if "standard_error_percent" in row else ""
        taken = f"{100 * row['taken_share']:.1f} %" if "taken_share" in row else "all"
        over = f"{increase:+.2f}{error} %" if error else ""
        table.add_row(f"{row['cett']:g}" if row["cett"] else "dense", f"{row['perplexity']:.3f}", over, taken)
    return table


def _layers(contract: dict[str, Any]) -> Table:
    share = contract["bytes_moved"]["at_cache_share"]
    table = Table(title=f"Layers at CETT {contract['cett']:g}", title_justify="left")
    for name in ("layer", "", "active", "taken", f"read, {100 * share:.0f} % in memory", "sketch"):
        table.add_column(name, justify="left" if not name else "right")
    for i, row in enumerate(contract["layers"]):
        table.add_row(
            str(i),
            "sparse" if row["sparse"] else "dense",
            f"{100 * row['active']:.1f} %",
            f"{100 * row['taken']:.1f} %",
            f"{100 * row['moved']:.1f} %",
            format_size(row["sketch_bytes"]) if row["sparse"] else "",
        )
    return table


def _sentence(contract: dict[str, Any], ffn_bytes: int) -> str:
    moved = contract["bytes_moved"]
    sizes = [format_size(int(moved[name] * ffn_bytes)) for name in ("sparse", "dense")]
    where = f"with {100 * moved['at_cache_share']:.0f} % of the FFN in memory"
    if contract["mode"] == "dense":
        return f"served densely: sparse would read {sizes[0]} a token {where}, dense reads {sizes[1]}"
    limit = contract["max_ppl_increase_percent"]
    why = "as asked for" if limit is None else f"at most {limit:g} % above dense, its standard error counted"
    return f"served at CETT {contract['cett']:.3g} ({why}): {sizes[0]} a token {where}, dense {sizes[1]}"
