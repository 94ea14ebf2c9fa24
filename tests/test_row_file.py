"""Rows of a matrix in a file: the same as in memory, and a file that ends is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cache.errors import ReadError
from runtime.row_file import RowFile
from runtime.safetensors_file import open_safetensors
from runtime.tensor_entry import PLAIN_DTYPES


@pytest.mark.parametrize("name", PLAIN_DTYPES)
def test_rows_are_those_of_the_matrix(name: str, tmp_path: Path) -> None:
    matrix = torch.randn(50, 24).to(PLAIN_DTYPES[name])
    save_file({"before": torch.ones(7), "matrix": matrix}, tmp_path / "file")
    rows = RowFile(open_safetensors(tmp_path / "file").entries["matrix"], torch.bfloat16)
    for ids in ([3], [49, 0, 49, 7], []):
        wanted = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(rows[wanted], matrix.to(torch.bfloat16)[wanted])


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    save_file({"matrix": torch.randn(50, 24)}, tmp_path / "file")
    rows = RowFile(open_safetensors(tmp_path / "file").entries["matrix"], torch.float32)
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(4000)
    with pytest.raises(ReadError, match="ends at byte 4000"):
        rows[torch.tensor([0, 49])]
