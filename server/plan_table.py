"""A memory plan as a table for people. Knows the plan's fields, not how they were found."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from cache.budget import format_size
from runtime.forecast import Forecast
from runtime.gpu_forecast import GpuForecast
from runtime.gpu_plan import NOT_HERE, GpuPlan
from runtime.plan import Plan


def plan_table(plan: Plan | GpuPlan) -> Table:
    """Bytes by tier and use, and what they buy."""
    table = _gpu_table(plan) if isinstance(plan, GpuPlan) else _cpu_table(plan)
    table.add_row("disk", "home", format_size(plan.disk_bytes), "packed model, beside the checkpoint")
    table.caption, table.caption_justify = " ".join(escape(note) for note in plan.notes) or None, "left"
    return table


def _cpu_table(plan: Plan) -> Table:
    table = _table(f"{format_size(plan.budget_bytes)} ({plan.budget_source})")
    remarks = _remarks(plan)
    if plan.spare_bytes:
        remarks["scratch"] = f"between prompts another {100 * plan.spare_bytes / plan.ffn_bytes:.1f} % of the FFN"
    _add_tier(table, "cpu", plan.uses(), remarks, plan.unused_bytes, plan.smallest_budget_bytes)
    return table


def _gpu_table(plan: GpuPlan) -> Table:
    budgets = (
        f"GPU {format_size(plan.gpu_budget_bytes)} ({plan.gpu_budget_source}), "
        f"main memory {format_size(plan.memory_budget_bytes)} ({plan.memory_budget_source})"
    )
    table, uses, unused = _table(budgets), plan.uses(), plan.unused()
    remarks = _remarks(plan) | {"staging": f"prefill of up to {plan.prefill_chunk} rows"}
    _add_tier(table, "gpu", uses["gpu"], remarks, unused["gpu"], plan.smallest_gpu_bytes)
    below = 100 * sum(plan.memory_slots_per_layer) / (len(plan.slots_per_layer) * plan.num_neurons)
    kept = {"home": "all of the FFN", "slots": f"{below:.0f} % of the FFN, beside what the GPU keeps"}
    _add_tier(table, "cpu", uses["cpu"], kept, unused["cpu"], plan.smallest_memory_bytes)
    return table


def _table(budgets: str) -> Table:
    table = Table(title=f"Memory plan: {escape(budgets)}", title_justify="left")
    for name, justify in (("tier", "left"), ("use", "left"), ("size", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    return table


def _remarks(plan: Plan | GpuPlan) -> dict[str, str]:
    return {
        "slots": f"{100 * plan.ffn_cache_share:.0f} % of the FFN's {format_size(plan.ffn_bytes)}",
        "kv": f"{plan.kv_blocks * plan.block_size} tokens; longest context {plan.max_model_len}",
    }


def _add_tier(
    table: Table, tier: str, uses: dict[str, int], remarks: dict[str, str], unused_bytes: int, smallest_bytes: int
) -> None:
    for use, num_bytes in uses.items():
        table.add_row(tier, use, format_size(num_bytes), remarks.get(use, ""))
    table.add_row(
        tier, "unused", format_size(unused_bytes), f"smallest budget that works: {format_size(smallest_bytes)}"
    )


def forecast_line(expected: Forecast | GpuForecast | None, plan: Plan | GpuPlan) -> str:
    """What the plan should decode at, in a sentence."""
    if expected is None:
        if isinstance(plan, GpuPlan) and plan.device == NOT_HERE:
            return "Expected speed: not measured, since the GPU is not here."
        room = " and some GPU memory is free" if isinstance(plan, GpuPlan) else ""
        return f"Expected speed: unknown until the model is packed (coldstream prepare){room}."
    token, share = f"{1e3 / expected.tokens_per_s:.3g} ms", f"{expected.hit_share:.0%}"
    speed, reads = f"{expected.tokens_per_s:.3g} tokens/s", format_size(int(expected.read_bytes))
    if isinstance(expected, GpuForecast):
        found, read, waited_s = "on the GPU", f"{reads} from main memory", expected.link_s + expected.disk_s
        if expected.disk_bytes:
            read += f", {format_size(int(expected.disk_bytes))} of that from disk"
    else:
        found, read, waited_s = "in memory", f"{reads} in {expected.num_requests:.0f} requests", expected.disk_s
    return (
        f"Expected: {speed} for one sequence. A token finds {share} of its neurons {found} and reads {read}: "
        f"{waited_s * 1e3:.3g} ms of its {token}."
    )
