"""The results of benchmarks/gpu.py on disk: every step is written at once, and what has been measured is kept.

One JSON file, replaced as a whole. Knows names, figures and a clock, not what is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Results:
    """`steps`: figures by name, with the seconds that they took; `errors`: tracebacks by name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Figures:
        if not self._path.is_file():
            return {"machine": {}, "runs": [], "steps": {}, "errors": {}}
        found: Figures = json.loads(self._path.read_text(encoding="utf-8"))
        return found

    def write(self, data: Figures) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, self._path)

    def has(self, name: str) -> bool:
        return name in self.read()["steps"]

    def step(self, name: str, measure: Callable[[], Figures], deadline_s: float = float("inf")) -> Figures | None:
        """Measures and keeps; what is there already is not measured again. None where it failed or time is up
        (`deadline_s` of time.monotonic): the next step runs all the same."""
        data = self.read()
        if name in data["steps"]:
            found: Figures = data["steps"][name]
            return found
        if time.monotonic() > deadline_s:
            say(f"{name}: no time left")
            return None
        begin = time.monotonic()
        try:
            figures = measure()
        except Exception:
            traceback.print_exc()
            self._keep("errors", name, {"traceback": traceback.format_exc()[-2000:]})
            return None
        figures |= {"measured_in_s": round(time.monotonic() - begin, 2)}
        self._keep("steps", name, figures)
        say(f"{name}: {json.dumps(figures)[:600]}")
        return figures

    def _keep(self, what: str, name: str, figures: Figures) -> None:
        data = self.read()
        data["errors"].pop(name, None)
        data[what][name] = figures
        self.write(data)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
