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
BROKEN = 75  # exit code of a process whose CUDA context no longer works: what failed is noted, the rest needs another


class Results:
    """`steps`: figures by name, with the seconds that they took and their commit; `errors`: tracebacks by name."""

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
        """Measures and keeps; what is there already is not measured again. None where it failed, now or before, or time
        is up (`deadline_s` of time.monotonic): the next step runs all the same. SystemExit(BROKEN) when the GPU's
        context failed with it."""
        data = self.read()
        if name in data["errors"]:
            return None
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
            if context_is_broken():
                sys.exit(BROKEN)
            return None
        commit = data["runs"][-1]["commit"] if data["runs"] else ""
        figures |= {"measured_in_s": round(time.monotonic() - begin, 2), "commit": commit}
        self._keep("steps", name, figures)
        say(f"{name}: {json.dumps(figures)[:600]}")
        return figures

    def _keep(self, what: str, name: str, figures: Figures) -> None:
        data = self.read()
        data["errors"].pop(name, None)
        data[what][name] = figures
        self.write(data)


def context_is_broken() -> bool:
    """Whether this process uses a GPU and no longer can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
