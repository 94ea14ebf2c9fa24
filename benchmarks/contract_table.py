"""What `benchmarks.contract` found for one model or more, in one short table for the README.

python -m benchmarks.contract_table benchmarks/results/contract_*.json [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.readme import block, replace_block


def _is_sparse(result: dict[str, Any]) -> bool:
    return len(result["quality"]["rows"]) > 1


def _increase(result: dict[str, Any]) -> str:
    if not _is_sparse(result):
        return "0"
    dense, sparse = result["quality"]["rows"]
    error = 100 * sparse["increase_standard_error"] / dense["perplexity"]
    return f"+{sparse['increase_percent']:.2f} ± {error:.2f} %"


def _http(result: dict[str, Any]) -> str:
    http = result["http"]
    return f"{http['perplexity']:.3f} for {http['perplexity_of_the_runtime']:.3f}"


_TITLES = {
    "served": lambda r: (
        f"sparse, CETT {r['contract']['cett']:g}" if _is_sparse(r) else "dense: sparse saves too little"
    ),
    "unseen tokens through the engine": lambda r: f"{r['quality']['tokens_scored']:,}",
    "perplexity over dense, paired": _increase,
    "the same over HTTP, first windows": _http,
    "read a token, of dense streaming": lambda r: f"{100 * r['decode']['bytes_share']:.1f} %",
    "seconds a token, of dense streaming": lambda r: f"{r['decode']['time_ratio']:.2f}",
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, a column a model."""
    lines = [f"| | {' | '.join(r['model'] for r in results)} |", f"|---|{'--:|' * len(results)}"]
    lines += [f"| {title} | {' | '.join(cell(r) for r in results)} |" for title, cell in _TITLES.items()]
    first = results[0]
    note = (
        f"Both modes with {100 * first['ffn_share']:.0f} % of the FFN's bytes in memory, the predictor's among them; "
        f"tokens of `{first['quality']['text']}`, ± standard error; {first['date'][:10]}. "
        "Written by `python -m benchmarks.contract_table`, measured by `python -m benchmarks.contract`."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    text = table([json.loads(path.read_text(encoding="utf-8")) for path in options.results])
    print(block("contract", text))
    if options.readme is not None:
        replace_block(options.readme, "contract", text)


if __name__ == "__main__":
    main()
