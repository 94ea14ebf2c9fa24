"""The budget is kept, by the kernel's own word: the real default model in a memory cgroup as large as --memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.memory_budget import COMMAND, ROOT, TEXT, drive, prepare, serving, smallest_budget
from benchmarks.memory_cgroup import MemoryCgroup, NoCgroup

MIB = 1 << 20
NUM_REQUESTS = 24
FLAGS = ("--ffn-cache", "30%", "--max-model-len", "256")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def packed(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, its thresholds found on a short text: they do not matter here."""
    directory = tmp_path_factory.mktemp("memory-budget")
    text = directory / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return prepare(str(smollm2_gguf), directory / "packed", "--calibration", str(text))


@pytest.fixture(scope="session")
def smallest(packed: Path) -> int:
    return smallest_budget([str(packed), *FLAGS])


@pytest.fixture
def cgroups() -> None:
    """Skips where memory cgroups cannot be made."""
    try:
        with MemoryCgroup(64 * MIB):
            pass
    except NoCgroup as error:
        pytest.skip(f"memory cgroup: {error}")


@pytest.mark.usefixtures("cgroups")
def test_a_cgroup_kills_what_takes_more() -> None:
    """The measuring device itself: a process that takes twice the limit does not live, and the counter says so."""
    with MemoryCgroup(64 * MIB) as cgroup:
        command = cgroup.command([COMMAND[0], "-c", "b = bytearray(128 << 20); b[::4096] = b[::4096]"])
        assert subprocess.run(command, timeout=60).returncode == -9
        assert cgroup.counters().oom_kills == 1
        assert cgroup.counters().peak_bytes >= 60 * MIB


@pytest.mark.usefixtures("cgroups")
def test_the_smallest_budget_works_and_is_kept(packed: Path, smallest: int, tmp_path: Path) -> None:
    """Requests of eight kinds, four at a time: full contexts, scored prompts, choices, streams left early."""
    answer_all([str(packed), *FLAGS], smallest, tmp_path / "serve.log")


@pytest.mark.usefixtures("cgroups")
def test_neurons_that_lie_in_what_prompts_need_are_gone_in_time(packed: Path, tmp_path: Path) -> None:
    """As many slots as fit, and between prompts more than those."""
    arguments = [str(packed), "--mode", "sparse", "--max-model-len", "256"]
    answer_all(arguments, smallest_budget(arguments), tmp_path / "serve.log")


def answer_all(arguments: list[str], smallest: int, log: Path) -> None:
    with serving(arguments, smallest, log) as served:
        assert served.cgroup.limit_bytes == smallest
        assert served.max_model_len == 256
        outcome = drive(served, NUM_REQUESTS, TEXT.read_text(encoding="utf-8")[:20_000])
        output = log.read_text(errors="replace")
        assert outcome.exit_code is None, output
        assert outcome.counters.oom_kills == 0, output
        assert outcome.answered == NUM_REQUESTS, (outcome, output)
    assert outcome.held_peak_bytes <= smallest
    # the promise is not kept by asking for far too much either: shared libraries, 110 MiB, are charged to whom they
    # were first read for, perhaps not to this group
    assert outcome.held_peak_bytes >= 0.6 * smallest, outcome


def test_a_budget_too_small_is_refused_before_loading(packed: Path, smallest: int) -> None:
    below = smallest // MIB - 1
    start = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "serve", str(packed), *FLAGS, "--memory", f"{below}MiB", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1
    assert f"--memory {below}MiB is too small" in said
    assert f"the smallest that works is --memory {smallest // MIB}MiB" in said
    assert "ready" not in said
    assert time.monotonic() - start < 60
