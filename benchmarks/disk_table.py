"""The disk benchmark's decode in one short table, for the README.

python -m benchmarks.disk_table benchmarks/results/disk.json [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.readme import block, replace_block

_LIMITS = (("1.6 GiB", "{} 20 %"), ("3 GiB", "{} 3GiB"), ("4 GiB", "{} 4GiB"), ("6 GiB", "{} 6GiB"))
_KINDS = ("bf16", "int8", "llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0")


def table(found: dict[str, Any]) -> str:
    """Markdown: tokens/s by memory limit, ours and llama.cpp's; empty where nothing was run."""
    speeds = {row["name"]: row["tokens_per_s"] for row in found["rows"] if "tokens_per_s" in row}
    limits = [*_LIMITS, ("no limit", "{}, all in memory")]
    lines = [
        "| memory | ours, bf16 | ours, int8 | llama.cpp, bf16 | Q8_0 | Q4_0, which fits |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for title, name in limits:
        cells = [speeds.get(name.format(kind)) for kind in _KINDS]
        lines.append(f"| {title} | {' | '.join('' if c is None else f'{c:.3g}' for c in cells)} |")
    machine = found["machine"]
    note = (
        f"Tokens/s; {machine['cores']} cores, {found['date']}, Linux {machine['kernel']}; other work took part of the "
        "machine in some runs. Written by `python -m benchmarks.disk_table`, measured by `make bench-disk`."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    text = table(json.loads(options.result.read_text(encoding="utf-8")))
    print(block("disk", text))
    if options.readme is not None:
        replace_block(options.readme, "disk", text)


if __name__ == "__main__":
    main()
