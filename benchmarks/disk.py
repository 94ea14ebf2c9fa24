"""Disk and CPU at their ceilings: the acceptance runs of a model two to three times the memory, without a GPU.

    make bench-disk            or: python -m benchmarks.disk [--stages reader decode ...] [--rounds 5] [--quick]

Stages: prepare (trace, packed models, GGUFs), reader, kernels, decode, whole, plan, ablation, sweep, prompt; `report`
prints the table and writes results and plot. Each stage is a list of cases; a round runs each once, in a process of its
own, under a memory cgroup where the case has a limit, the page cache dropped before. What has run is kept in
WORK/runs.jsonl and not run again, so that an interrupted benchmark goes on where it was. llama.cpp needs
--llama-python, a Python that has llama-cpp-python, and accelerate's disk offload --accelerate-python, one that has
accelerate and transformers; without them their rows are left out. Needs root (cgroup, page cache)
and fio. Knows commands and their JSON; the measuring is in benchmarks/forced.py, reader.py, kernels.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.disk_report import disturbed, write_report
from benchmarks.memory_cgroup import MemoryCgroup, NoCgroup
from benchmarks.processors import children_seconds, cpu_seconds
from cache.budget import parse_size

STAGES = ("prepare", "reader", "kernels", "decode", "whole", "plan", "ablation", "sweep", "prompt", "report")
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "disk.json"
MODEL_BYTES = {"afm-4.5b": 8_400_000_000}  # in bf16: what the budgets of the sweep are shares of
BUDGETS = ("3GiB", "4GiB")
PLAN_BUDGETS = ("3GiB", "4GiB", "6GiB")
POLICIES = ("static", "lru", "lfu", "ours", "belady")
ORDERS = {"by frequency": "frequency", "shuffled": "shuffled"}  # in place of by what is active together
SWEEP = (20, 40, 60, 80, 100)  # percent of the model
_PROMPT_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Case:
    """One command; limit: bytes of its memory cgroup, None: unlimited."""

    stage: str
    name: str
    command: tuple[str, ...]
    limit: int | None = None
    timeout_s: int = 900


class Bench:
    """Where things are, and what is asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.trace = self.work / "trace.npz"
        self.log = self.work / "runs.jsonl"

    def packed(self, dtype: str) -> Path:
        return self.work / f"{self.options.shape}-{dtype}"

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.options.shape}-checkpoint"

    def gguf(self, kind: str) -> Path:
        return self.work / f"{self.options.shape}-{kind}.gguf"

    def python(self, module: str, *arguments: object) -> tuple[str, ...]:
        return (sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments))

    def ours(self, stage: str, name: str, dtype: str, memory: str, *more: object, limited: bool = True) -> Case:
        length = ("--warm", self.options.warm, "--tokens", self.options.tokens)
        base = ("decode", self.packed(dtype), "--trace", self.trace, "--memory", memory)
        limit = parse_size(memory) if limited else None
        return Case(stage, name, self.python("forced", *base, *length, *more), limit)

    def theirs(self, stage: str, name: str, kind: str, memory: str | None) -> Iterator[Case]:
        """llama.cpp's case, if there is a llama.cpp."""
        if self.options.llama_python is not None:
            script = ROOT / "benchmarks" / "llama_cpp_decode.py"
            length = ("--tokens", str(self.options.llama_tokens), "--threads", str(os.cpu_count()))
            command = (str(self.options.llama_python), str(script), "decode", str(self.gguf(kind)), *length)
            yield Case(stage, name, command, None if memory is None else parse_size(memory))

    def accelerate(self, stage: str, name: str, memory: str) -> Iterator[Case]:
        """The disk offload of accelerate, if there is one: for the same shape, a checkpoint of random weights too."""
        if self.options.accelerate_python is not None:
            limit = parse_size(memory)
            script = (str(self.options.accelerate_python), "-P", str(ROOT / "benchmarks" / "accelerate_decode.py"))
            length = ("--tokens", str(min(3, self.options.llama_tokens)), "--threads", str(os.cpu_count()))
            place = ("--memory", str(limit), "--offload", str(self.work / "offload"))
            yield Case(stage, name, (*script, str(self.checkpoint), *place, *length), limit)


# -- cases ------------------------------------------------------------------------------------------------------------


def cases(bench: Bench, stage: str) -> Iterator[Case]:
    yield from {
        "reader": reader_cases,
        "kernels": kernel_cases,
        "decode": decode_cases,
        "whole": whole_cases,
        "plan": plan_cases,
        "ablation": ablation_cases,
        "sweep": sweep_cases,
        "prompt": prompt_cases,
    }[stage](bench)


def reader_cases(bench: Bench) -> Iterator[Case]:
    file = bench.packed("bf16") / "bundles.safetensors"
    length = ("--seconds", 0.5, "--repeats", 1) if bench.options.quick else ("--seconds", 1, "--repeats", 5)
    yield Case("reader", "reader", bench.python("reader", file, *length))


def kernel_cases(bench: Bench) -> Iterator[Case]:
    yield Case("kernels", "kernels", bench.python("kernels", "--rounds", 3 if bench.options.quick else 15))


def decode_cases(bench: Bench) -> Iterator[Case]:
    for memory in BUDGETS:
        yield bench.ours("decode", f"bf16 {memory}", "bf16", memory)
        yield from bench.theirs("decode", f"llama.cpp bf16 {memory}", "bf16", memory)
        yield bench.ours("decode", f"bf16 {memory}, what is active", "bf16", memory, "--sets", "active")
    yield bench.ours("decode", "int8 3GiB", "int8", "3GiB")
    yield bench.ours("decode", "int8 3GiB, what is active", "int8", "3GiB", "--sets", "active")
    yield from bench.theirs("decode", "llama.cpp q8_0 3GiB", "q8_0", "3GiB")
    yield from bench.theirs("decode", "llama.cpp q4_0 3GiB", "q4_0", "3GiB")


def whole_cases(bench: Bench) -> Iterator[Case]:
    yield bench.ours("whole", "bf16, all in memory", "bf16", "11GiB", limited=False)
    yield from bench.theirs("whole", "llama.cpp bf16, all in memory", "bf16", None)


def plan_cases(bench: Bench) -> Iterator[Case]:
    """What `plan` says, to be held against what decode did at the same budget."""
    settings = ("COLDSTREAM_MAX_MODEL_LEN=1024", "COLDSTREAM_MAX_NUM_SEQS=1")
    coldstream = ("env", *settings, sys.executable, "-c", "from server.cli import main; main()")
    for memory in PLAN_BUDGETS:
        command = (*coldstream, "plan", str(bench.packed("bf16")), "--memory", memory, "--json")
        yield Case("plan", f"plan {memory}", command)
        if memory not in BUDGETS:  # those are decode's
            yield bench.ours("plan", f"bf16 {memory}", "bf16", memory)


def ablation_cases(bench: Bench) -> Iterator[Case]:
    """All at 4 GiB on the same trace; whoever differs in nothing but its name is `ours`."""

    def one(name: str, *more: object) -> Case:
        return bench.ours("ablation", name, "bf16", "4GiB", *more, limited=False)

    for policy in POLICIES:
        yield one(policy, "--policy", policy)
    yield one("no prediction: dense stream", "--mode", "dense", "--tokens", 3, "--warm", 1)
    yield one("looking ahead before attention", "--lookahead", "attention")
    yield one("not looking ahead", "--lookahead", "none")
    for name, order in ORDERS.items():
        yield bench.ours("ablation", f"records {name}", f"bf16-{order}", "4GiB", limited=False)
    yield one("no merging", "--merge-gap", 0)
    yield one("merging over 32 KiB", "--merge-gap", 32 << 10)
    yield one("one thread", "--threads", 1)
    yield one("pread threads", "--io-engine", "pread")


def sweep_cases(bench: Bench) -> Iterator[Case]:
    for percent in SWEEP:
        memory = f"{MODEL_BYTES[bench.options.shape] * percent // 100 >> 20}MiB"
        for dtype in ("bf16", "int8"):
            yield bench.ours("sweep", f"{dtype} {percent} %", dtype, memory)
        for kind in ("bf16", "q4_0"):
            yield from bench.theirs("sweep", f"llama.cpp {kind} {percent} %", kind, memory)
        yield from bench.accelerate("sweep", f"accelerate bf16 {percent} %", memory)


def prompt_cases(bench: Bench) -> Iterator[Case]:
    memory = f"{int(MODEL_BYTES[bench.options.shape] * _PROMPT_SHARE) >> 20}MiB"
    base = ("prompt", bench.packed("bf16"), "--trace", bench.trace, "--max-model-len", 1040, "--prompt-tokens", 1024)
    yield Case("prompt", "prompt 40 %", bench.python("forced", *base, "--memory", memory), parse_size(memory))
    yield Case("prompt", "prompt, all in memory", bench.python("forced", *base, "--memory", "11GiB"))


# -- running ----------------------------------------------------------------------------------------------------------


def prepare(bench: Bench) -> None:
    """Makes what is missing: the trace of the real model, packed models, GGUFs of the same weights."""
    options = bench.options
    bench.work.mkdir(parents=True, exist_ok=True)
    real = bench.work / "real-packed"
    if not bench.trace.exists():
        if not real.exists():
            if options.real is None:
                sys.exit("--real: the checkpoint of the real ReLU² model is needed, to record its active sets")
            run((sys.executable, "-c", "from server.cli import main; main()", "prepare", options.real, "--out", real))
        run(bench.python("traces", "record", real, "--out", bench.trace))
    for dtype in ("bf16", "int8"):
        if not bench.packed(dtype).exists():
            made = ("--shape", options.shape, "--dtype", dtype, "--trace", bench.trace, "--out", bench.packed(dtype))
            run(bench.python("make_packed", *made))
    for order in ORDERS.values():
        if not bench.packed(f"bf16-{order}").exists():
            like = ("--like", bench.packed("bf16"), "--order", order, "--out", bench.packed(f"bf16-{order}"))
            run(bench.python("make_packed", *like))
    if options.accelerate_python is not None and not bench.checkpoint.exists():
        run(bench.python("make_checkpoint", "--shape", options.shape, "--out", bench.checkpoint))
    if options.llama_python is not None:
        if not bench.gguf("bf16").exists():
            run(bench.python("packed_gguf", bench.packed("bf16"), "--out", bench.gguf("bf16")))
        for kind in ("q8_0", "q4_0"):
            if not bench.gguf(kind).exists():
                script = ROOT / "benchmarks" / "llama_cpp_decode.py"
                to = ("--to", kind, "--out", bench.gguf(kind))
                run((options.llama_python, script, "quantise", bench.gguf("bf16"), *to))


def run(command: Sequence[object]) -> None:
    say(" ".join(map(str, command)))
    subprocess.run([str(c) for c in command], cwd=ROOT, check=True, stdout=sys.stderr)


def run_stage(bench: Bench, stage: str) -> None:
    """All cases in turn, round by round; what is in the log already is left out."""
    done = {(r["stage"], r["name"], r["round"]) for r in read_runs(bench.log)}
    rounds = 1 if stage in ("reader", "kernels") else bench.options.rounds
    for number in range(rounds):
        for case in cases(bench, stage):
            if (stage, case.name, number) in done or not wanted(case.name, bench.options.only):
                continue
            figures = run_case(case)
            if disturbed(figures):
                say(f"  once more: others took {figures['others_busy']:.0%} of the processors")
                figures = min(figures, run_case(case), key=lambda f: f.get("others_busy", 1.0))
            record = {"stage": stage, "name": case.name, "round": number, "time": time.time(), **figures}
            with bench.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")


def wanted(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def run_case(case: Case) -> dict[str, Any]:
    """Its JSON, and the cgroup's peak where it had one; {"failed": why} when it failed."""
    say(f"{case.stage}: {case.name}")
    drop_page_cache()
    if case.limit is None:
        return _output(case, list(case.command), None)
    with MemoryCgroup(case.limit) as group:
        return _output(case, group.command(case.command), group)


def _output(case: Case, command: list[str], group: MemoryCgroup | None) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_") and k != "OMP_NUM_THREADS"}
    before, own = cpu_seconds(), children_seconds()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=case.timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {case.timeout_s} s"}
    if done.returncode:
        why = done.stderr.strip().splitlines()
        say(f"  failed: {why[-1] if why else done.returncode}")
        return {"failed": why[-1] if why else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    busy, total = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
    found["others_busy"] = (busy - (children_seconds() - own)) / max(total, 1e-9)
    if group is not None:
        counters = group.counters()
        found |= {"limit_bytes": case.limit, "peak_bytes": counters.peak_bytes, "oom_kills": counters.oom_kills}
    brief = {k: found[k] for k in ("tokens_per_s", "hit_rate", "cpu_busy", "others_busy") if k in found}
    say("  " + json.dumps(brief))
    return found


def drop_page_cache() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        sys.exit(f"the page cache cannot be dropped ({error.strerror}): run as root")


def read_runs(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--only", nargs="+", default=[], help="only cases whose name contains one of these")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/coldstream-disk"), help="30 GB; kept, used again")
    parser.add_argument("--shape", default="afm-4.5b", choices=MODEL_BYTES)
    parser.add_argument("--real", type=Path, help="checkpoint of the real ReLU² model, for its trace")
    parser.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python")
    parser.add_argument("--accelerate-python", type=Path, help="a Python with accelerate and transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=16, help="tokens before those that are timed")
    parser.add_argument("--tokens", type=int, default=64, help="timed ones of a run")
    parser.add_argument("--llama-tokens", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.warm, options.tokens, options.llama_tokens = 1, 2, 4, 1
    return options


def main() -> None:
    bench = Bench(arguments())
    for stage in bench.options.stages:
        try:
            if stage == "prepare":
                prepare(bench)
            elif stage == "report":
                print(json.dumps(write_report(read_runs(bench.log), bench.options.out)))
            else:
                run_stage(bench, stage)
        except (NoCgroup, subprocess.CalledProcessError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
