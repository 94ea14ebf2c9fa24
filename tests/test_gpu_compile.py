"""The GPU's kernels go through Triton's compiler and its assembler for compute capability 9.0; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
BROKEN = """
import torch, triton, triton.language as tl
from benchmarks import gpu_compile

@triton.jit
def unknown_width(x, n):
    tl.store(x + tl.arange(0, n), 1.0)

gpu_compile.cases = lambda: [("broken", lambda: unknown_width[(1,)](torch.zeros(4), 7))]
raise SystemExit(gpu_compile.run(90))
"""


def compiled(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one has Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_kernel_compiles(tmp_path: Path) -> None:
    done = compiled(["-m", "benchmarks.gpu_compile"], tmp_path)
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert [c for c in calls if c["error"]] == []
    assert len(calls) > 30 and done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob("*.cubin"))  # assembled, not only parsed


def test_a_kernel_that_does_not_compile_is_found(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"  # Triton reads a kernel's source from its file
    script.write_text(BROKEN)
    done = compiled([str(script)], tmp_path / "cache")
    assert done.returncode == 1
    assert "arange" in json.loads(done.stdout)["error"]
