"""Server-sent events as OpenAI's API uses them: bytes in, the data of each event out. Knows framing, not JSON."""

from __future__ import annotations

from collections.abc import Iterator

DONE = "[DONE]"


class EventDecoder:
    """Decodes a stream that arrives in parts of any size. Comments and fields other than `data` are skipped.

    Lines are split on bytes: only CR, LF and CRLF end one, not what `str.splitlines` takes for line ends besides.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, part: bytes) -> Iterator[str]:
        """The data of the events that this part completes."""
        text = self._rest + part
        complete = text.endswith(b"\n")  # a CR at the end may be half of a CRLF
        lines = text.splitlines()
        self._rest = b"" if complete or not lines else self._tail(text)
        for line in lines if complete else lines[:-1]:
            event = self._line(line)
            if event is not None:
                yield event

    @staticmethod
    def _tail(text: bytes) -> bytes:
        """The last line with its ending, as far as it has come."""
        return text.splitlines(keepends=True)[-1]

    def _line(self, line: bytes) -> str | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        if not self._data:
            return None
        event = b"\n".join(self._data).decode("utf-8", "replace")
        self._data = []
        return event
