"""`coldstream sparsify`: from a checkpoint's name to a sparse student of it on disk.

Refuses what cannot work before anything large is read, trains (`runtime.distill`), measures the student as it will be
served, and writes it. Knows files and settings; not how a step is made. Memory: the teacher in the compute dtype, and
12 bytes for each weight that trains (10 with bf16 moments), keys and values of the sampled texts, activations.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache.errors import ColdstreamError, UnsupportedError
from runtime.checkpoint import Checkpoint, check_tensors, expected_tensors, open_checkpoint
from runtime.config import ModelConfig
from runtime.distill import Recipe, Report, Sparsifier
from runtime.packed import is_packed, open_packed
from runtime.prompts import Prompts
from runtime.ranks import Ranks
from runtime.served import find_thresholds, perplexity, serve_rule, sketch_scores, top_shares
from runtime.student import DRELU, Decoder, is_trained, load_teacher, student_config
from runtime.student_checkpoint import output_bytes, output_dtype, write_figures, write_student
from runtime.tokenizer import Tokenizer
from runtime.windows import read_text

DEFAULT_TOKENS = 100_000_000
PROFILE_DIRECTORY = "profile"
_CALIBRATION_TOKENS, _CURVE_TOKENS, _FINAL_TOKENS = 2048, 4096, 16_384
_PIECE = 50_000  # characters of a long text that are tokenised at once
_KV_BYTES = 24 << 30  # of texts that the teacher writes at once
_ACTIVATION_BYTES = 32 << 30  # of a backward pass
_SPARE_BYTES = 4 << 30  # logits of a chunk of rows, the framework's own
_PARTS = (1, 2, 4, 8)  # of the texts and windows at a time
_WANTED_STEPS = 400  # batches shrink before a run has fewer
_REFRESHES = 30  # of the thresholds: each takes as long as a few steps
_COMPILED_FORMS = 64  # of one layer: teacher and student, of each phase and shape; all 30 share them
_REFERENCE_HIDDEN = 576  # of the model that the learning rate was found on; it falls as 1 / width (arXiv 2203.03466)


@dataclass(frozen=True, slots=True)
class SparsifyOptions:
    """What a user may choose. gated: None is whichever form learns faster, without a gate for relu2; texts: given ones,
    beside what the teacher writes; device: auto, cpu or cuda."""

    act: str = "relu2"
    gated: bool | None = None
    attention: bool = True
    tokens: int = DEFAULT_TOKENS
    active: float = 0.08
    texts: tuple[Path, ...] = ()
    device: str = "auto"
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Material:
    """Token ids of a run: windows int64 [S, T] of calibration and held-out text, and how the teacher's texts begin."""

    prompts: Prompts
    calibration: torch.Tensor
    heldout: torch.Tensor


Openers = Callable[[Tokenizer], Sequence[Sequence[int]]]


def sparsify(
    model: str,
    out: Path,
    options: SparsifyOptions,
    openers: Openers,
    texts: tuple[Path, Path],
    report: Callable[[Report], None],
    profile: Callable[[Path, Path], object] | None = None,
) -> dict[str, Any]:
    """Writes the student of `model` to `out` and returns the figures of sparsify.json.

    texts: calibration and held-out text, never trained on. profile(model directory, report directory) is called last,
    for what the runtime can load. Raises ColdstreamError; interrupted, it leaves a state that `resume` goes on from.
    """
    checkpoint = open_checkpoint(open_packed(Path(model)).source.path if is_packed(Path(model)) else model)
    check_source(checkpoint, options)
    device = pick_device(options.device)
    recipe = fitted(recipe_for(checkpoint.config, options), checkpoint.config, device)
    check_output(out, options.resume, _disk_bytes(checkpoint.config, recipe))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    material = read_material(tokenizer, checkpoint.config, recipe, options.texts, openers(tokenizer), texts)
    ranks = Ranks.join(device.type)
    try:
        run = start(checkpoint, recipe, material, device, ranks)
        identity = identity_of(checkpoint, recipe, options.texts, ranks)
        if options.resume:
            run.load(state_path(out), identity)
        out.parent.mkdir(parents=True, exist_ok=True)
        run.run(state_path(out), identity, report)
        figures = figures_of(run, checkpoint, material, model, identity | {"heldout": texts[1].name})
        if ranks.rank == 0:
            write(run.student, checkpoint, tokenizer, figures, out, profile)
    finally:
        ranks.leave()
    return figures


# --- Refusals ---


def check_source(checkpoint: Checkpoint, options: SparsifyOptions) -> None:
    """Reads headers alone. Raises UnsupportedError, FormatError, ColdstreamError."""
    check_tensors(checkpoint)
    if not checkpoint.config.gated:
        raise UnsupportedError(
            f"{checkpoint.path}: a {checkpoint.config.model_type} model has no gate; sparsify starts from a gated FFN"
        )
    if options.act == DRELU and options.gated is False:
        raise ColdstreamError("--non-gated: drelu is relu(gate) * relu(up) and needs a gate; use relu2 or relu")
    for text in options.texts:
        if not text.is_file():
            raise ColdstreamError(f"--text {text}: not found")


def check_output(out: Path, resume: bool, num_bytes: int) -> None:
    """ColdstreamError when `out` is taken, when there is (no) interrupted run, or when the disk is too small."""
    state = state_path(out)
    if out.exists():
        raise ColdstreamError(f"--out {out}: already exists; remove it or name another directory")
    if resume and not state.is_file():
        raise ColdstreamError(f"--resume: there is no interrupted run for {out} ({state} is missing)")
    if not resume and state.is_file():
        raise ColdstreamError(f"--out {out}: an interrupted run is kept in {state}; say --resume, or remove it")
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ColdstreamError(f"--out {out}: {_gib(num_bytes)} are needed on the disk, {_gib(free)} are free")


def pick_device(name: str) -> torch.device:
    """auto: cuda where there is one. UnsupportedError when it is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: PyTorch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


# --- Settings ---


def recipe_for(config: ModelConfig, options: SparsifyOptions) -> Recipe:
    """Sizes from the model's shape and the tokens alone, so that they are the same on any machine."""
    window = min(512, config.max_position_embeddings)
    batch = max(1, min(64, options.tokens // (window * _WANTED_STEPS)))
    recipe = Recipe(
        act=options.act,
        gated=options.act != "relu2" if options.gated is None else options.gated,
        attention=options.attention,
        tokens=options.tokens,
        active=options.active,
        window=window,
        batch=batch,
        micro=_divisor(batch, _ACTIVATION_BYTES // (window * _activation_bytes(config))),
        lr=Recipe().lr * min(1.0, _REFERENCE_HIDDEN / config.hidden_size),
    )
    kv = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * window
    needed = -(-recipe.steps * batch // recipe.passes)
    sampled = max(batch, min(_power_of_two(_KV_BYTES // kv), 4096, needed))
    return replace(recipe, sampled=sampled, refresh=max(recipe.refresh, recipe.steps // _REFRESHES))


def _activation_bytes(config: ModelConfig) -> int:
    """Kept for the backward pass, a token: about eight vectors of D and six of F a layer, two and four bytes each."""
    return config.num_hidden_layers * (8 * 4 * config.hidden_size + 6 * 3 * config.intermediate_size)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, at least 1: every backward pass has the same shape."""
    return max(d for d in range(1, number + 1) if number % d == 0 and (d <= limit or d == 1))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def fitted(recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
    """The recipe with fewer texts and windows at a time, then with bf16 moments, where the device is too small for it.

    ColdstreamError when no such way fits.
    """
    if device.type != "cuda":
        return recipe
    free = torch.cuda.mem_get_info(device)[0] - _SPARE_BYTES
    for moments in ("fp32", "bf16"):
        for part in _PARTS:
            sampled, micro = max(recipe.micro, recipe.sampled // part), _divisor(recipe.batch, recipe.micro // part)
            smaller = replace(recipe, sampled=sampled, micro=micro, moments=moments)
            needed = memory_bytes(smaller, config)
            if needed <= free:
                return smaller
    raise ColdstreamError(f"--device cuda: {_gib(needed + _SPARE_BYTES)} are needed, {_gib(free)} are free")


def memory_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """Of a run on cuda: weights, gradients, moments, the teacher's texts (keys and values, answers), activations."""
    moment_bytes = (1 if recipe.optimiser == "muon" else 2) * (2 if recipe.moments == "bf16" else 4)
    trained = _trained_weights(config, recipe)
    teacher = sum(math.prod(shape) for _, shape in expected_tensors(config))
    kv = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * recipe.window * recipe.sampled
    kv += 2 * config.hidden_size * recipe.window * recipe.sampled
    activations = recipe.micro * recipe.window * _activation_bytes(config)
    return 2 * teacher + trained * (8 + moment_bytes) + kv + activations


def _trained_weights(config: ModelConfig, recipe: Recipe) -> int:
    own = student_config(config, recipe.act, recipe.gated)
    return sum(math.prod(shape) for name, shape in expected_tensors(own) if is_trained(name, recipe.attention))


def _disk_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """The student, and twice the state: the new one is written beside the old."""
    own = student_config(config, recipe.act, recipe.gated)
    return output_bytes(own, output_dtype(config)) + 2 * 12 * _trained_weights(config, recipe) + (64 << 20)


def identity_of(checkpoint: Checkpoint, recipe: Recipe, texts: Sequence[Path], ranks: Ranks) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return {
        "recipe": asdict(recipe),
        "source": [[f.name, f.size, f.sha256] for f in checkpoint.fingerprint()],
        "texts": [{"name": t.name, "sha256": hashlib.sha256(t.read_bytes()).hexdigest()} for t in texts],
        "processes": ranks.world,
    }


# --- The run ---


def read_material(
    tokenizer: Tokenizer,
    config: ModelConfig,
    recipe: Recipe,
    texts: Sequence[Path],
    openers: Sequence[Sequence[int]],
    measured: tuple[Path, Path],
) -> Material:
    """Token ids of everything. measured: calibration and held-out text. Raises ColdstreamError naming the file."""
    given = [_token_ids(tokenizer, text, "--text", config, in_pieces=True) for text in texts]
    if texts and sum(len(ids) for ids in given) < recipe.window:
        raise ColdstreamError(f"--text: {sum(len(i) for i in given)} tokens, at least {recipe.window} are needed")
    calibration, heldout = (_token_ids(tokenizer, text, "text", config) for text in measured)
    return Material(
        Prompts.make(openers, given, config.vocab_size),
        _windows(calibration, recipe.window, _CALIBRATION_TOKENS),
        _windows(heldout, recipe.window, _FINAL_TOKENS),
    )


def _token_ids(tokenizer: Tokenizer, path: Path, flag: str, config: ModelConfig, in_pieces: bool = False) -> list[int]:
    """in_pieces: cut every now and then at a paragraph's end, so that all cores have something to do."""
    text = read_text(flag, path)
    if in_pieces:
        ids = [i for piece in tokenizer.encode_all(list(_pieces(text))) for i in piece]
    else:
        ids = tokenizer.encode(text, add_special=False)
    if ids and max(ids) >= config.vocab_size:
        raise UnsupportedError(
            f"the tokenizer has token {max(ids)}, the model's vocabulary ends at {config.vocab_size - 1}"
        )
    return ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + _PIECE) + 2
        end = cut if cut > 1 else len(text)
        yield text[start:end]
        start = end


def _windows(ids: list[int], length: int, num_tokens: int) -> torch.Tensor:
    """Windows evenly spread over a text, int64 [S, T]; at least one."""
    num = max(1, min(num_tokens, len(ids)) // length)
    starts = torch.linspace(0, max(0, len(ids) - length), num).long()
    return torch.tensor(ids)[starts[:, None] + torch.arange(min(length, len(ids)))]


def start(checkpoint: Checkpoint, recipe: Recipe, material: Material, device: torch.device, ranks: Ranks) -> Sparsifier:
    """The run before its first step, on this process's device."""
    if recipe.batch % ranks.world:
        raise ColdstreamError(f"{ranks.world} processes cannot share {recipe.batch} windows a step evenly")
    cuda = device.type == "cuda"
    own = torch.device("cuda", ranks.local) if cuda else device
    if cuda:
        torch.cuda.set_device(own)
        torch._dynamo.config.recompile_limit = _COMPILED_FORMS
    teacher = load_teacher(checkpoint, recipe.window, own, torch.bfloat16 if cuda else torch.float32)
    curve = material.heldout[: max(1, _CURVE_TOKENS // recipe.window)]
    return Sparsifier(teacher, recipe, material.prompts, material.calibration, curve, ranks, compile_blocks=cuda)


def figures_of(
    run: Sparsifier, checkpoint: Checkpoint, material: Material, model: str, more: dict[str, Any]
) -> dict[str, Any]:
    """All of sparsify.json: settings, the curve, the teacher and the student on held-out text. The run is over then:
    weights that were trained to be rounded are rounded first."""
    for block in run.student.blocks:
        block.mlp.settle()
    device = run.student.head.device
    calibration, heldout = material.calibration.to(device), material.heldout.to(device)
    value, error = perplexity(run.teacher, heldout)
    teacher = {
        "name": Path(model).stem if Path(model).is_file() else Path(model).name,
        "hidden_act": checkpoint.config.hidden_act,
        "perplexity": value,
        "standard_error": error,
        "top_shares": top_shares(run.teacher, calibration),
    }
    return {
        **more,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": run.progress.seconds,
        "scale_factors": run.progress.scale_factors,
        "teacher": teacher,
        "result": result_of(run.student, calibration, heldout, run.recipe.active),
        "curve": run.progress.history,
    }


def result_of(student: Decoder, calibration: torch.Tensor, heldout: torch.Tensor, active: float) -> dict[str, Any]:
    """The student dense, with thresholds on the true magnitudes, and with neurons chosen by 4-bit sketches.

    Thresholds are found on the calibration text, for the share `active`; figures are of the held-out text.
    """
    dense, error = perplexity(student, heldout)
    found = find_thresholds(student, calibration, active)
    counts: list[float] = []
    served, served_error = perplexity(student, heldout, serve_rule(found, counts=counts))
    scores = sketch_scores(student)
    chosen = find_thresholds(student, calibration, active, scores=scores)
    taken: list[float] = []
    predicted, predicted_error = perplexity(student, heldout, serve_rule(chosen, scores, taken))
    return {
        "perplexity_dense": dense,
        "standard_error_dense": error,
        "perplexity_served": served,
        "standard_error_served": served_error,
        "cett": found.cett,
        "active_heldout": sum(counts) / len(counts),
        "perplexity_predicted": predicted,
        "standard_error_predicted": predicted_error,
        "cett_predicted": chosen.cett,
        "taken_heldout": sum(taken) / len(taken),
        "top_shares": top_shares(student, calibration),
    }


def state_path(out: Path) -> Path:
    """Where an interrupted run is kept: beside `out`."""
    return out.parent / f".{out.name}.state.safetensors"


def write(
    student: Decoder,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    figures: dict[str, Any],
    out: Path,
    profile: Callable[[Path, Path], object] | None,
) -> None:
    """The student's directory, whole or not at all; then the state of the run goes."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_student(student, checkpoint, tokenizer, partial)
        write_figures(figures, partial)
        if profile is not None and student.config.hidden_act != DRELU:
            profile(partial, partial / PROFILE_DIRECTORY)
        partial.rename(out)
    except OSError as error:
        raise ColdstreamError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    state_path(out).unlink(missing_ok=True)
