"""Two models side by side, from what `coldstream profile MODEL --out DIR` wrote: the README's small table.

    python -m benchmarks.profile_table benchmarks/results/profile/smollm2 benchmarks/results/profile/relu2 \
        [--readme README.md]

Prints the table; --readme replaces what stands between `<!-- profile:begin -->` and `<!-- profile:end -->` there.
Knows the figures' names in profile.json; measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.readme import block, replace_block

BLOCK = "profile"  # of the README
LOW, HIGH = 0.05, 0.2  # CETT
CACHED = 0.3  # of a layer
ACTIVATIONS = {"silu": "SwiGLU", "relu2": "ReLU²", "relu": "ReLU", "gelu": "GeGLU"}

Profile = dict[str, Any]


def table(profiles: list[Profile]) -> str:
    """Markdown: a column a model, a row a figure."""
    heads = [f"{p['model']}, {ACTIVATIONS.get(p['config']['hidden_act'], p['config']['hidden_act'])}" for p in profiles]
    lines = ["| | " + " | ".join(heads) + " |", "|---" + "|--:" * len(profiles) + "|"]
    for title, cell in ROWS:
        lines.append(f"| {title} | " + " | ".join(cell(p) for p in profiles) + " |")
    return "\n".join([*lines, "", note(profiles)])


def note(profiles: list[Profile]) -> str:
    first = profiles[0]
    tokens = " and ".join(str(p["sparsity"]["dense"]["tokens_scored"]) for p in profiles)
    active_tokens = min(first["scope"]["detail_tokens"], first["scope"]["tokens"])
    quick = " --quick" if all(p["quick"] for p in profiles) else ""
    return (
        f"`coldstream profile MODEL --out DIR{quick}`; perplexity on {tokens} tokens of `{first['text']}` (sha256 "
        f"`{first['text_sha256'][:12]}`), thresholds from {first['scope']['calibration_tokens']} tokens of another "
        f"text, active sets from {active_tokens}. Written by `python -m benchmarks.profile_table`."
    )


def at_cett(p: Profile, cett: float) -> Profile:
    return next(r for r in p["sparsity"]["rows"] if r["cett"] == cett)


def detail(p: Profile, cett: float) -> Profile:
    return next(d for d in p["affinity"] if d["cett"] == cett)


def sparsity(cett: float) -> Callable[[Profile], str]:
    def cell(p: Profile) -> str:
        row = at_cett(p, cett)
        error = row["increase_standard_error_percent"]
        return f"{row['active_share']:.1%}, {row['increase_percent']:+.2f} ± {error:.2f} %"

    return cell


def one_percent(p: Profile) -> str:
    one = p["sparsity"]["one_percent"]
    return f"{one['cett']:.3f}, {one['active_share']:.1%}" if "active_share" in one else f"{one['cett']:.3f}"


def reuse(p: Profile) -> str:
    d = detail(p, LOW)
    return f"{d['reuse']:.1%} ({d['independent_reuse']:.1%}), {d['union'][7]:.0%}"


def hits(p: Profile) -> str:
    d = detail(p, LOW)
    place = d["cache_shares"].index(CACHED)
    return " / ".join(f"{d['hit_rates'][name][place]:.0%}" for name in ("static", "lru", "ours", "belady"))


def skew(p: Profile) -> str:
    d = detail(p, LOW)
    return f"{d['skew'][d['skew_shares'].index(CACHED)]:.0%}"


def gap(p: Profile) -> str:
    d = detail(p, LOW)
    return f"{d['gap']:.3f} ({d['gap_hot'] - d['gap_average']:.3f})"


def predictor(name: str) -> Callable[[Profile], str]:
    def cell(p: Profile) -> str:
        row = next(
            (r for r in p["predictivity"] if (r["predictor"], r["source"], r["cett"]) == (name, "input", LOW)), None
        )
        if row is None:
            return ""
        by = {b["budget"]: b for b in row["budgets"]}
        recall = f"{by[1.0]['recall']:.0%} / {by[1.5]['recall']:.0%}"
        return f"{row['share_of_bf16_ffn']:.1%}: {recall}, {by[1.5]['over_oracle_percent']:+.1f} %"

    return cell


def lookahead(p: Profile) -> str:
    found = {r["source"]: r for r in p["predictivity"] if r["predictor"] == "exact" and r["cett"] == LOW}
    return " / ".join(f"{found[s]['budgets'][0]['recall']:.0%}" for s in ("residual", "ahead"))


def reads(p: Profile) -> str:
    """Reads a token: in the original order unmerged, merged over two neurons, and so in the order by co-activation."""
    d = detail(p, LOW)
    gaps, own = d["merge_gaps"], d["reads_a_token"]
    share = d["resident_shares"].index(CACHED)
    first, merged = (own["original"][share][gaps.index(g)][0] for g in (0, 2))
    return f"{first:,.0f} / {merged:,.0f} / {own['coactivation'][share][gaps.index(2)][0]:,.0f}"


ROWS: tuple[tuple[str, Callable[[Profile], str]], ...] = (
    ("dense perplexity", lambda p: f"{p['sparsity']['dense']['perplexity']:.2f}"),
    (f"active at CETT {LOW:g}, perplexity over dense", sparsity(LOW)),
    (f"active at CETT {HIGH:g}, perplexity over dense", sparsity(HIGH)),
    ("CETT at +1 % perplexity, active there", one_percent),
    (f"from here on at CETT {LOW:g}: reuse of adjacent tokens (if independent), union of 8 tokens", reuse),
    ("share of the activations by the hottest 30 %", skew),
    ("hit rate, 30 % of each layer cached: static / LRU / ours / Belady", hits),
    ("top-average co-activation gap (of it by skew alone)", gap),
    (
        "4-bit sketch: memory of the bf16 FFN; recall at 1.0x / 1.5x, perplexity over the oracle's at 1.5x",
        predictor("sketch4"),
    ),
    ("planes, 2 bits: the same", predictor("planes 2")),
    ("trained, Deja Vu's: the same", predictor("deja vu")),
    ("recall of the exact weights on the residual before attention / one layer ahead", lookahead),
    ("reads a token beside 30 % resident: each alone / merged over 2 neurons / so in co-activation order", reads),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", type=Path, help="folders that `coldstream profile` wrote")
    parser.add_argument("--readme", type=Path, help="file whose table between the markers is replaced")
    options = parser.parse_args()
    text = table([json.loads((p / "profile.json").read_text(encoding="utf-8")) for p in options.profiles])
    if options.readme is not None:
        replace_block(options.readme, BLOCK, text)
    print(block(BLOCK, text))


if __name__ == "__main__":
    main()
