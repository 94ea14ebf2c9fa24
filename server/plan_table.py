"""A memory plan as a table for people. Knows the plan's fields, not how they were found."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from cache.budget import format_size
from runtime.forecast import Forecast
from runtime.plan import Plan


def plan_table(plan: Plan) -> Table:
    """Bytes by tier and use, and what they buy."""
    table = Table(
        title=f"Memory plan: {format_size(plan.budget_bytes)} ({escape(plan.budget_source)})", title_justify="left"
    )
    for name, justify in (("tier", "left"), ("use", "left"), ("size", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    remarks = {
        "slots": f"{100 * plan.ffn_cache_share:.0f} % of the FFN's {format_size(plan.ffn_bytes)}",
        "kv": f"{plan.kv_blocks * plan.block_size} tokens; longest context {plan.max_model_len}",
    }
    for use, num_bytes in plan.uses().items():
        table.add_row("cpu", use, format_size(num_bytes), remarks.get(use, ""))
    table.add_row(
        "cpu",
        "unused",
        format_size(plan.unused_bytes),
        f"smallest budget that works: {format_size(plan.smallest_budget_bytes)}",
    )
    table.add_row("disk", "home", format_size(plan.disk_bytes), "packed model, beside the checkpoint")
    table.caption, table.caption_justify = " ".join(escape(note) for note in plan.notes) or None, "left"
    return table


def forecast_line(expected: Forecast | None) -> str:
    """What the plan should decode at, in a sentence."""
    if expected is None:
        return "Expected speed: unknown until the model is packed (coldstream prepare)."
    token = f"{1e3 / expected.tokens_per_s:.3g} ms"
    reads = f"{format_size(int(expected.read_bytes))} in {expected.num_requests:.0f} requests"
    return (
        f"Expected: {expected.tokens_per_s:.3g} tokens/s for one sequence. A token finds {expected.hit_share:.0%} of "
        f"its neurons in memory and reads {reads}: {expected.disk_s * 1e3:.3g} ms of its {token}."
    )
