"""The exceptions of coldstream, one tree for all packages (the lowest package owns it).

ColdstreamError
├── FormatError       a model on disk cannot be trusted or read; `kind` is a closed list
├── UnsupportedError  a model, file type or option that this version does not run; the message names it
├── BudgetError       the memory promised is too small; carries the smallest budget that works
├── ReadError         the disk did not give the bytes asked for
├── DeviceLostError   the GPU answers no more; only a new process can use it
└── RequestError      one request cannot be served
    ├── QueueFullError       too many requests are waiting
    ├── ContextLengthError   prompt and answer do not fit the context
    └── EngineStoppedError   the engine is loading, draining or gone

Every message is one sentence that names the file, flag or field, fit to be shown to a user as it is.
"""

from __future__ import annotations

from enum import StrEnum


class ColdstreamError(Exception):
    """Base of all errors that are shown to a user without a traceback."""


class FormatKind(StrEnum):
    """What can be wrong with a file. A closed list: tests cover each."""

    MISSING_FILE = "missing_file"
    MISSING_TENSOR = "missing_tensor"
    TRUNCATED = "truncated"
    BAD_MAGIC = "bad_magic"
    BAD_VERSION = "bad_version"
    BAD_HEADER = "bad_header"
    BAD_SHAPE = "bad_shape"
    BAD_CHECKSUM = "bad_checksum"
    SOURCE_CHANGED = "source_changed"


class FormatError(ColdstreamError):
    """A file of a model is missing, damaged, of another version, or not what it says."""

    def __init__(self, kind: FormatKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class UnsupportedError(ColdstreamError):
    """The file is sound, but this version does not run what it holds."""


class BudgetError(ColdstreamError):
    """A memory budget that cannot be kept. `smallest_bytes` is the smallest that would work."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class ReadError(ColdstreamError):
    """A read from the home tier failed or came back short."""

    def __init__(self, path: str, offset: int, num_bytes: int, reason: str) -> None:
        super().__init__(f"{path}: reading {num_bytes} bytes at offset {offset} failed: {reason}")
        self.path, self.offset, self.num_bytes, self.reason = path, offset, num_bytes, reason


class DeviceLostError(ColdstreamError):
    """The GPU answers no more: nothing that this process is asked for can be computed."""


class RequestError(ColdstreamError):
    """One request cannot be served; the server itself is well."""


class QueueFullError(RequestError):
    """Too many requests are waiting."""


class ContextLengthError(RequestError):
    """Prompt and answer do not fit the model's context."""


class EngineStoppedError(RequestError):
    """The engine does not take requests: it is loading, draining or gone."""
