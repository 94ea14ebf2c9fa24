"""Blocks of the README that scripts write: what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

Knows markers and text, not what is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path


def block(name: str, text: str) -> str:
    """The text with its markers around it."""
    return "\n".join([_begin(name), text, _end(name)])


def replace_block(path: Path, name: str, text: str) -> None:
    """Puts the text between the two markers of the file. Exits with a sentence when they are not there, once each."""
    begin, end = _begin(name), _end(name)
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        sys.exit(f"{path}: {begin} and {end} must be there once each, in this order")
    path.write_text(old[: old.index(begin)] + block(name, text) + old[old.index(end) + len(end) :], encoding="utf-8")


def _begin(name: str) -> str:
    return f"<!-- {name}:begin -->"


def _end(name: str) -> str:
    return f"<!-- {name}:end -->"
