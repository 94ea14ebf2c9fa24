"""Scripts replace their own block of the README and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme import block, replace_block


def test_only_the_block_of_that_name_changes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n" + block("one", "old") + "\nb\n" + block("two", "kept") + "\n", encoding="utf-8")
    replace_block(path, "one", "new\nlines")
    replace_block(path, "one", "new\nlines")  # again gives the same
    expected = "a\n<!-- one:begin -->\nnew\nlines\n<!-- one:end -->\nb\n<!-- two:begin -->\nkept\n<!-- two:end -->\n"
    assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("text", ["none", block("x", "a") * 2, "<!-- x:end -->\n<!-- x:begin -->"])
def test_markers_that_are_not_there_once_in_order_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"<!-- x:begin --> and <!-- x:end --> must be there once each"):
        replace_block(path, "x", "new")
    assert path.read_text(encoding="utf-8") == text
