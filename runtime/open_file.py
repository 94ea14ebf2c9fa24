"""A file that is read, and what goes wrong with it. Knows a path, not what is in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cache.errors import ColdstreamError, FormatError, FormatKind


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading. Whatever fails names it, so that it is not taken for an error of what is written
    meanwhile: FormatError(MISSING_FILE) when it cannot be opened, ColdstreamError when it cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise FormatError(FormatKind.MISSING_FILE, f"{path}: cannot be opened ({error.strerror})") from error
    with file:
        try:
            yield file
        except OSError as error:
            raise ColdstreamError(f"{path}: reading at byte {file.tell()} failed: {error.strerror or error}") from error
