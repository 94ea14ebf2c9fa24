"""The GPU tier against its ceilings, its peers and the CPU tier: the acceptance of the tier, in short runs.

    python -m benchmarks.traces record RELU2 --tokens 320 --active 0.3333 --out .gpu/trace-third.npz      # here
    python -m benchmarks.traces record PACKED --tokens 640 --sets active --beside early --out .gpu/trace-relu2.npz
    python -m benchmarks.traces record PACKED --tokens 640 --beside early --out .gpu/trace-taken.npz
    python -m benchmarks.gpu_parts split --out .gpu --work DIR
    bash benchmarks/gpu_there.sh "$OUT" COMMIT 520 ceilings afm dense accelerate llama tiers http tests         # there
    python -m benchmarks.gpu_reference benchmarks/results/gpu.json --parts .gpu                           # here again
    python -m benchmarks.gpu_table benchmarks/results/gpu.json --readme README.md

Groups run in the order of their worth (`profile` tells where a step's time goes), each in a process of its own, so that
one that breaks leaves the others a sound GPU. Every step is written to OUT/gpu.json at once; a run begins with what
--previous holds (a file that an earlier run wrote) and measures what is missing, as far as --seconds go. The last line
is one JSON object. Weights of the large shapes are random and made on the GPU, the sets that are computed come from
traces (benchmarks/traces.py) of what is active, in one step of what the predictor takes; floors are bytes that the run
counted over bandwidths that it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_results import BROKEN, Figures, Results, say

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 49152
_MARK = "mark.gpu"
TEST_S = 150  # that one of the GPU's tests may take
END_S = 3.0  # of --seconds: for the last line


def ceilings_group(options: argparse.Namespace, results: Results) -> None:
    from benchmarks.gpu_ceilings import ceilings, overheads

    results.step("overheads", overheads)
    results.step("machine", machine)
    results.step("ceilings", ceilings)


def machine() -> Figures:
    """The GPU and what computes on it, for people. Asked in a group: who starts them has no context on the GPU."""
    import torch

    found: Figures = {"python": sys.version.split()[0], "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
        found["processors"] = properties.multi_processor_count
    return found


def dense_group(options: argparse.Namespace, results: Results) -> None:
    from benchmarks.gpu_dense import dense_graph, streaming
    from benchmarks.gpu_shapes import shape_plan, weight_cap
    from benchmarks.make_checkpoint import SHAPES

    shape, ceilings = SHAPES["afm-4.5b"], results.read()["steps"]["ceilings"]
    cap = weight_cap(shape_plan(shape, VOCAB_SIZE, 20))
    results.step("afm-4.5b plain dense graph", lambda: dense_graph(shape, VOCAB_SIZE, ceilings))
    results.step("afm-4.5b streaming 20 %", lambda: streaming(shape, VOCAB_SIZE, cap))


def afm_group(options: argparse.Namespace, results: Results) -> None:
    large_shape("afm-4.5b", options, results, batches=(4, 16))


def profile_group(options: argparse.Namespace, results: Results) -> None:
    """Of the AFM-4.5B shape: where a step's time goes, with a fifth of the FFN resident and with all of it."""
    import torch

    from benchmarks.gpu_product import ProductTraced, make_home
    from benchmarks.gpu_profile import measure_profile
    from benchmarks.gpu_reference import TRACES
    from benchmarks.gpu_shapes import shape_plan
    from benchmarks.make_checkpoint import SHAPES
    from benchmarks.traces import Replay, Trace
    from cache.bundle import BundleDtype, BundleLayout

    shape = SHAPES["afm-4.5b"]
    layout = BundleLayout.make(shape.hidden_size, shape.gated, BundleDtype.BF16)
    replay = Replay(Trace.read(options.parts / TRACES["afm-4.5b"]), shape.num_hidden_layers, shape.intermediate_size)
    home = make_home(shape, layout)

    def make(percent: int, mode: str) -> ProductTraced:
        plan = shape_plan(shape, VOCAB_SIZE, percent, mode=mode)
        sets = replay if mode == "sparse" else None
        return ProductTraced(shape, VOCAB_SIZE, home, plan, sets, ahead=False)  # which waits beside an FFN all its time

    for percent, mode in ((100, "sparse"), (20, "sparse"), (100, "dense")):
        results.step(f"profile {mode} {percent} %", partial(measure_profile, partial(make, percent, mode)))
        torch.cuda.empty_cache()


def llama_group(options: argparse.Namespace, results: Results) -> None:
    large_shape("llama-7b", options, results)


def large_shape(name: str, options: argparse.Namespace, results: Results, batches: tuple[int, ...] = ()) -> None:
    """Decode at every residency, 20 % first; with `batches` also those, dense with all resident, and a prefill."""
    import torch

    from benchmarks.gpu_decode import measure_ahead, measure_decode, measure_dense
    from benchmarks.gpu_prefill import measure_prefill
    from benchmarks.gpu_product import ProductTraced, make_home
    from benchmarks.gpu_reference import TAKEN, TRACES
    from benchmarks.gpu_shapes import shape_plan, weight_cap
    from benchmarks.make_checkpoint import SHAPES
    from benchmarks.traces import EARLY, Replay, Trace
    from cache.bundle import BundleDtype, BundleLayout

    shape, ceilings = SHAPES[name], results.read()["steps"]["ceilings"]
    layout = BundleLayout.make(shape.hidden_size, shape.gated, BundleDtype.BF16)
    replay = Replay(Trace.read(options.parts / TRACES[name]), shape.num_hidden_layers, shape.intermediate_size)
    begin = time.monotonic()
    home = make_home(shape, layout)
    say(f"{name}: home of {home.num_bytes / 1e9:.1f} GB in {time.monotonic() - begin:.1f} s")

    def decode(percent: int, rows: int) -> Figures:
        plan = shape_plan(shape, VOCAB_SIZE, percent, num_seqs=rows)
        model = ProductTraced(shape, VOCAB_SIZE, home, plan, replay, rows)
        found = measure_decode(model, replay, layout.stride, ceilings, rows)
        return found | {"ffn_on_gpu_percent": percent, "gpu_budget_bytes": weight_cap(plan)}

    def ahead(percent: int, sets: Replay) -> Figures:
        plan = shape_plan(shape, VOCAB_SIZE, percent)
        made = [ProductTraced(shape, VOCAB_SIZE, home, plan, sets, ahead=way) for way in (False, True)]
        return measure_ahead(*made)

    def dense() -> Figures:
        plan = shape_plan(shape, VOCAB_SIZE, 100, mode="dense")
        return measure_dense(ProductTraced(shape, VOCAB_SIZE, home, plan, None), home.num_bytes, ceilings)

    def prefill() -> Figures:
        plan = shape_plan(shape, VOCAB_SIZE, 20)
        model = ProductTraced(shape, VOCAB_SIZE, home, plan, replay)
        return measure_prefill(model.prefill, shape, home.num_bytes, ceilings)

    def step(what: str, measure: Callable[[], Figures]) -> None:
        results.step(f"{name} {what}", measure, options.deadline - 5)
        torch.cuda.empty_cache()

    step("decode 20 %", partial(decode, 20, 1))
    if batches:
        step("dense 100 %", dense)
    step("decode 100 %", partial(decode, 100, 1))
    step("decode 10 %", partial(decode, 10, 1))
    step("decode 40 %", partial(decode, 40, 1))
    step("decode 0 %", partial(decode, 0, 1))
    for rows in batches:
        step(f"batch {rows}", partial(decode, 20, rows))
    if EARLY in replay.trace.beside:
        for percent in (20, 40):
            step(f"reading ahead {percent} %", partial(ahead, percent, replay))
    if batches:
        step("prefill", prefill)
        taken = Replay(Trace.read(options.parts / TAKEN), shape.num_hidden_layers, shape.intermediate_size)
        step("reading ahead 40 %, sets as predicted", partial(ahead, 40, taken))


def tiers_group(options: argparse.Namespace, results: Results) -> None:
    """The AFM-4.5B shape with its home on disk."""
    from benchmarks.gpu_reference import TRACES
    from benchmarks.gpu_tiers import measure_tiers, tiers_plan, write_file
    from benchmarks.make_checkpoint import SHAPES
    from benchmarks.traces import Replay, Trace
    from cache.bundle import BundleDtype, BundleLayout

    shape = SHAPES["afm-4.5b"]
    layout = BundleLayout.make(shape.hidden_size, shape.gated, BundleDtype.BF16)
    options.work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    file = write_file(shape, layout, options.work / "afm-4.5b.bundles")
    say(f"home on disk written in {time.monotonic() - begin:.1f} s")
    replay = Replay(Trace.read(options.parts / TRACES["afm-4.5b"]), shape.num_hidden_layers, shape.intermediate_size)
    plan = tiers_plan(shape, VOCAB_SIZE, 20)
    measure = partial(measure_tiers, shape, VOCAB_SIZE, file, plan, replay)
    results.step("afm-4.5b three tiers", measure, options.deadline)


def accelerate_group(options: argparse.Namespace, results: Results) -> None:
    from benchmarks.gpu_peers import accelerate_offload
    from benchmarks.gpu_shapes import shape_plan, weight_cap
    from benchmarks.make_checkpoint import SHAPES

    shape = SHAPES["afm-4.5b"]
    cap = weight_cap(shape_plan(shape, VOCAB_SIZE, 20))
    results.step("accelerate", lambda: accelerate_offload(shape, VOCAB_SIZE, cap))


def http_group(options: argparse.Namespace, results: Results) -> None:
    from benchmarks.gpu_parts import NAMES, join
    from benchmarks.gpu_serving import http

    models = options.work / "models"
    if missing := join(options.parts, models)["missing"]:
        say(f"http: {missing} parts of the models are missing")
        return
    for below in (False, True):
        for name in reversed(NAMES):
            what = f"http {name}{' from disk' if below else ''}"
            results.step(what, partial(http, models, name, below), options.deadline)


def tests_group(options: argparse.Namespace, results: Results) -> None:
    results.step("tests", gpu_tests, options.deadline)


def gpu_tests() -> Figures:
    """`pytest -m gpu` of the files that have such tests (others may want packages that are not there), counted. Each
    test is shown as it ends, so that one that hangs names itself."""
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py")) if _MARK in p.read_text()]
    options = ["-p", "no:cacheprovider", "--durations=12"]
    if find_spec("xdist"):  # most of the time goes into compiling kernels
        options += ["-v", "-p", "no:benchmark", "-n", "12"]
    if find_spec("pytest_timeout"):
        options.append(f"--timeout={TEST_S}")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *options, *files]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # the CPU's side of twelve tests at once
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread
    ) as tests:
        assert tests.stdout is not None
        lines = [line for line in tests.stdout if print(line, end="", file=sys.stderr, flush=True) is None]
    return {"command": " ".join(["python3", *command[1:]]), "exit_code": tests.returncode, **counted("".join(lines))}


def counted(output: str) -> Figures:
    """What pytest's last line counts: "3 passed, 1 skipped, 400 deselected in 2.1s"."""
    last = output.strip().splitlines()[-1].strip("= ") if output.strip() else ""
    words = last.partition(" in ")[0].split(", ")
    pairs = [word.split(" ") for word in words if word.split(" ")[0].isdigit()]
    return {"passed": 0, "failed": 0, "skipped": 0} | {name: int(num) for num, name, *_ in pairs} | {"line": last}


Group = Callable[[argparse.Namespace, Results], None]
GROUPS: dict[str, tuple[Group, float]] = {  # by worth; seconds that a group needs at least
    "ceilings": (ceilings_group, 15),
    "profile": (profile_group, 25),
    "afm": (afm_group, 40),
    "dense": (dense_group, 20),
    "accelerate": (accelerate_group, 25),
    "llama": (llama_group, 40),
    "tiers": (tiers_group, 60),
    "http": (http_group, 60),
    "tests": (tests_group, 30),
}


# -- the run ----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Figures:
    """All groups, as far as the time goes."""
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    if options.previous is not None and options.previous.is_file() and not path.is_file():
        shutil.copyfile(options.previous, path)
    results = Results(path)
    data = results.read()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    data["errors"] = {}  # of earlier runs: they are tried again
    data["runs"].append({"started": now, "commit": options.commit})
    results.write(data)
    for name, (_, least_s) in GROUPS.items():
        left = options.seconds - END_S - (time.monotonic() - started)
        if options.only and name not in options.only:
            continue
        if left < least_s:
            say(f"{name}: {left:.0f} s are left, {least_s:.0f} are needed")
            continue
        in_process_of_its_own(name, options, left)
    data = results.read()
    data["runs"][-1]["seconds"] = round(time.monotonic() - started, 1)
    results.write(data)
    return data


def in_process_of_its_own(name: str, options: argparse.Namespace, seconds: float) -> None:
    arguments = ["--group", name, "--seconds", f"{seconds:.0f}", "--out", options.out, "--work", options.work]
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments), "--parts", str(options.parts)]
    begin, code = time.monotonic(), BROKEN
    while code == BROKEN:  # what broke is in the errors, and is not tried again by this run
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=seconds - (time.monotonic() - begin)).returncode
        except subprocess.TimeoutExpired:
            say(f"{name}: cut after {seconds:.0f} s")
            return
        say(f"{name}: exit code {code} after {time.monotonic() - begin:.1f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument("--parts", type=Path, default=Path(".gpu"), help="folder of traces and models")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu"), help="kept between runs where the machine is")
    parser.add_argument("--seconds", type=float, default=520.0, help="that this run may take")
    parser.add_argument("--previous", type=Path, help="gpu.json of an earlier run: what it holds is not measured again")
    parser.add_argument("--commit", default="", help="that is measured; where there is no git")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=[])
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.group is not None:
        options.deadline = time.monotonic() + options.seconds
        GROUPS[options.group][0](options, Results(options.out / "gpu.json"))
        return
    print(json.dumps(run(options), ensure_ascii=False))


if __name__ == "__main__":
    main()
