"""Trains a sparse ReLU-family student of a dense model on texts that the model itself writes.

Three phases. Layers: every layer's FFN learns the teacher's, on the teacher's inputs. Press: KL to the teacher's
logits, and a soft count of active neurons whose weight is steered until the share above epsilon is the one asked for;
epsilon is the threshold of one CETT, measured again and again (ProSparse's gradual pressure, arXiv 2402.13516, with a
goal in place of a schedule of weights). Served: what is below the threshold is dropped, as it will be when served, and
the thresholds are steered to the share.
A batch is a function of the step alone, and the state in the file is all that the next step depends on: on cpu a
resumed run takes the very steps of one that was never stopped. Knows a decoder and token ids; not files of models.
Shapes: S windows, T tokens, L layers.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cache.errors import ColdstreamError, FormatError, FormatKind
from runtime.adamw import AdamW
from runtime.muon import Muon
from runtime.objective import kl_divergence, relative_error, steered
from runtime.prompts import Prompts
from runtime.ranks import Ranks
from runtime.safetensors_file import open_to_others
from runtime.served import find_thresholds, measure_thresholds, perplexity, serve_rule
from runtime.student import Decoder, Ffn, match_scale, student_of
from runtime.teacher import SelfSampler

ACTS = ("relu2", "relu", "drelu")
_MEMORY = 0.95  # of the running means that are reported
_MEASURED_TOKENS = 1024  # on which thresholds are measured
_TEMPERATURES = (0.8, 1.0)
_FIRST_PRESSURE = 0.1
SAVE_EVERY_S = 120.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a run besides the teacher, the texts and the number of processes."""

    act: str = "relu2"
    gated: bool = True
    attention: bool = True  # trains too, beside FFN and norms
    tokens: int = 100_000_000  # that the student sees
    active: float = 0.08  # share of neurons, mean over layers
    window: int = 512  # tokens
    batch: int = 64  # windows a step, of all processes together
    micro: int = 64  # windows a backward pass
    sampled: int = 2048  # texts that the teacher writes at once
    passes: int = 6  # how often the student sees each
    text_share: float = 0.5  # of a batch, where texts are given
    optimiser: str = "muon"  # or adamw
    lr: float = 2.5e-3
    warm_up: float = 0.05  # shares of the steps, this one and the next two
    layers: float = 0.05
    served: float = 0.6
    cett: float = 0.1  # at which the pressed share is measured
    max_pressure: float = 2.0  # weight of the soft count beside KL in nats
    weight_decay: float = 0.01
    clip: float = 1.0
    refresh: int = 100  # steps between two measurements of the thresholds
    evaluations: int = 20
    moments: str = "fp32"  # or bf16
    bits: int = 0  # of the FFN's weights, rounded as they will be in the last third of the steps; 0: not rounded
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch * self.window))

    def lr_at(self, step: int) -> float:
        """Linear warm-up of each of the two losses, layers' and logits', and a cosine to a twentieth over all steps.

        The full rate on the first gradients of a new loss, which all point the same way, undoes what was there.
        """
        turn = round(self.layers * self.steps)
        since, warm = (step, turn / 2) if step < turn else (step - turn, self.warm_up * self.steps)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * cosine * min(1.0, (since + 1) / max(1.0, warm))

    def phase(self, step: int) -> str:
        """layers, press or served."""
        if step < round(self.layers * self.steps):
            return "layers"
        return "press" if step < round((1 - self.served) * self.steps) else "served"


@dataclass(frozen=True, slots=True)
class Report:
    """Where a run is. kl and active: running means of the steps; perplexities of held-out text at the last evaluation,
    dense and with thresholds; eta_s: seconds left at the pace so far."""

    step: int
    steps: int
    phase: str
    kl: float
    active: float
    perplexity: float | None
    perplexity_served: float | None
    tokens_per_s: float
    eta_s: float


@dataclass(slots=True)
class _Progress:
    """What changes from step to step besides tensors; goes into the state file as JSON."""

    step: int = 0
    seconds: float = 0.0  # of all runs so far
    kl: float = math.nan
    active: float = math.nan
    start_active: float = math.nan  # share at the beginning of the phase
    pressure: float = _FIRST_PRESSURE
    threshold: float = 1.0
    scale_factors: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


class Sparsifier:
    """One run. Memory: the teacher; FFN and norms of the student in fp32, their gradients and two moments; keys and
    values of `sampled` texts; activations of `micro` windows."""

    def __init__(
        self,
        teacher: Decoder,
        recipe: Recipe,
        prompts: Prompts,
        calibration: torch.Tensor,
        heldout: torch.Tensor,
        ranks: Ranks,
        compile_blocks: bool = False,
    ) -> None:
        """calibration, heldout int64 [S, T]: for the thresholds and perplexities of the evaluations alone."""
        self.recipe, self.teacher, self._prompts, self._ranks = recipe, teacher, prompts, ranks
        self.student = student_of(teacher, recipe.act, recipe.gated, recipe.attention)
        self._device = teacher.head.device
        self._calibration, self._heldout = calibration.to(self._device), heldout.to(self._device)
        self._trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        moments = torch.bfloat16 if recipe.moments == "bf16" else torch.float32
        kind = Muon if recipe.optimiser == "muon" else AdamW
        self._optimiser: AdamW | Muon = kind(self._trained, recipe.weight_decay, moments)
        self._sampler = SelfSampler(teacher, recipe.sampled, recipe.window)
        self._round, self._pool = -1, torch.empty(0, dtype=torch.int64)
        self._answers: torch.Tensor | None = None  # of the teacher to the pool, once KL is trained
        self._epsilon = torch.zeros(len(self.student.blocks), device=self._device)
        self.progress = _Progress()
        if compile_blocks:
            for block in (*teacher.blocks, *self.student.blocks):
                block.compile(dynamic=False)

    def run(
        self,
        path: Path | None,
        identity: dict[str, Any],
        report: Callable[[Report], None],
        stop: Callable[[int], bool] = lambda step: False,
    ) -> bool:
        """Trains to the end, keeping its state in `path`; False when `stop(step)` ended it before.

        Raises ColdstreamError when the loss is no number.
        """
        if self.progress.step == 0:
            self._match_scale()
        begin, saved = time.monotonic() - self.progress.seconds, time.monotonic()
        every = max(1, self.recipe.steps // self.recipe.evaluations)
        while self.progress.step < self.recipe.steps:
            self._step()
            done, now = self.progress.step, time.monotonic()
            self.progress.seconds = now - begin
            if done % every == 0 or done == self.recipe.steps:
                self.progress.history.append(self._evaluate())
            report(self._report())
            stopped = stop(done)
            if path is not None and (now - saved > SAVE_EVERY_S or stopped or done == self.recipe.steps):
                self.save(path, identity)
                saved = now
            if stopped:
                return done == self.recipe.steps
        return True

    def _match_scale(self) -> None:
        self.progress.scale_factors = match_scale(self.student, self.teacher, self._batch(0)[:2])
        for block in self.student.blocks:  # each process has seen other windows
            self._ranks.share_first(block.mlp.down_proj.weight.data)

    # --- one step ---

    def _step(self) -> None:
        """Measure, forward and backward, average, update, steer."""
        step, phase = self.progress.step, self.recipe.phase(self.progress.step)
        self._begin(step, phase)
        windows = self._batch(step)
        wanted = None if phase == "layers" else self._wanted(step, windows)
        stats = torch.zeros(2, device=self._device)
        for first in range(0, windows.shape[0], self.recipe.micro):
            part = windows[first : first + self.recipe.micro]
            share = part.shape[0] / windows.shape[0]
            if wanted is None:
                stats += share * self._layerwise(part, share)
            else:
                stats += share * self._distil(part, wanted[first : first + self.recipe.micro], share, phase)
        self._ranks.average_gradients(self._trained.values())
        torch.nn.utils.clip_grad_norm_(list(self._trained.values()), self.recipe.clip)
        self._optimiser.step(self.recipe.lr_at(step))
        for parameter in self._trained.values():
            parameter.grad = None
        self._note(phase, *self._ranks.average(stats).tolist())
        self.progress.step += 1

    def _begin(self, step: int, phase: str) -> None:
        """Thresholds at the beginning of a phase and every `refresh` steps of it; rounding for the last third."""
        if 3 * step >= 2 * self.recipe.steps:
            for block in self.student.blocks:
                block.mlp.bits = self.recipe.bits
        if phase == "layers":
            return
        new = step == 0 or self.recipe.phase(step - 1) != phase
        if new and phase == "press":
            self._optimiser.forget()  # moments of another loss
        if new or step % self.recipe.refresh == 0:
            self._measure(phase, step, new)

    def _measure(self, phase: str, step: int, new: bool) -> None:
        tokens = self._pool_of(step)[: max(1, _MEASURED_TOKENS // self.recipe.window)]
        if phase == "press":
            found, shares = measure_thresholds(self.student, tokens, (self.recipe.cett,), centred=True)
            epsilon, share = torch.from_numpy(found[:, 0]), float(shares[0])
        else:
            wanted = self._target(phase, step) if not new else self.progress.active
            thresholds = find_thresholds(self.student, tokens, min(wanted, 1.0), centred=True)
            epsilon, share = torch.tensor(thresholds.epsilon), thresholds.share
        found_all = torch.cat([epsilon.double(), torch.tensor([share], dtype=torch.float64)]).to(self._device)
        epsilon, share = self._ranks.share_first(found_all)[:-1].float(), float(found_all[-1])
        if new:
            self.progress.start_active = share
            self._epsilon = epsilon
        else:  # half way on logarithms: a sample's threshold is noisy
            self._epsilon = (self._epsilon * self.progress.threshold * epsilon).sqrt()
        self.progress.threshold = 1.0

    def _layerwise(self, windows: torch.Tensor, share: float) -> torch.Tensor:
        """Gradients of every layer's relative error, one layer's graph at a time; (mean error, 0)."""
        errors: list[torch.Tensor] = []

        def visit(layer: int, ffn: Ffn, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            own = self.student.blocks[layer].mlp
            with torch.enable_grad():
                error = relative_error(own.combine(own.neurons(x)), ffn.combine(h))
                (error * share / len(self.student.blocks)).backward()  # type: ignore[no-untyped-call]
            errors.append(error.detach())
            return h

        with torch.no_grad():
            self.teacher.hidden(windows, visit)
        mean = torch.stack(errors).mean()
        return torch.stack([mean, torch.zeros_like(mean)])

    def _distil(self, windows: torch.Tensor, wanted: torch.Tensor, share: float, phase: str) -> torch.Tensor:
        """Gradients of KL and pressure; (KL, share of neurons at or above their threshold)."""
        student, epsilon = self.student, self._epsilon * self.progress.threshold
        hidden, tables = student.embed(windows), student.tables(windows.shape[1])
        pressed = []
        with student.precision():
            for i, block in enumerate(student.blocks):
                hidden, seen = block(hidden, *tables, epsilon[i], phase == "served")
                pressed.append(seen)
        kl = kl_divergence(student.final(hidden).flatten(0, 1), wanted.flatten(0, 1), student.head)
        soft = torch.stack([p.soft for p in pressed]).mean()
        loss = kl + self._pressure(phase) * soft + torch.stack([p.excess for p in pressed]).sum()
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return torch.stack([kl.detach(), torch.stack([p.active for p in pressed]).mean().detach()])

    def _pressure(self, phase: str) -> float:
        """Its weight; fades while serving is trained, as the threshold keeps the share then."""
        if phase == "press":
            return self.progress.pressure
        left = (self.recipe.steps - self.progress.step) / max(1.0, self.recipe.served * self.recipe.steps)
        return self.progress.pressure * min(1.0, left)

    def _note(self, phase: str, kl: float, active: float) -> None:
        """Running means, and the two controllers."""
        p = self.progress
        if not math.isfinite(kl):
            raise ColdstreamError(f"training failed: the loss is {kl} at step {p.step}")
        first = p.step == 0 or self.recipe.phase(p.step - 1) != phase
        p.kl = kl if first else _MEMORY * p.kl + (1 - _MEMORY) * kl
        if phase == "layers":
            return
        p.active = active if math.isnan(p.active) else _MEMORY * p.active + (1 - _MEMORY) * active
        gain = min(0.3, 30 / self.recipe.steps)
        if phase == "press":
            p.pressure = min(steered(p.pressure, gain, active, self._target(phase, p.step)), self.recipe.max_pressure)
        else:
            p.threshold = steered(p.threshold, gain, active, self._target(phase, p.step))

    def _target(self, phase: str, step: int) -> float:
        """The share wanted now: from the phase's first to the asked one, geometrically, over the first part of it."""
        r, start = self.recipe, self.progress.start_active
        turn = 1 - r.served
        begin, end = (
            (r.layers, r.layers + (turn - r.layers) * 2 / 3) if phase == "press" else (turn, turn + r.served / 4)
        )
        part = min(1.0, max(0.0, (step / r.steps - begin) / max(end - begin, 1e-9)))
        return math.exp((1 - part) * math.log(max(start, 1e-6)) + part * math.log(r.active))

    # --- data ---

    def _batch(self, step: int) -> torch.Tensor:
        """This process's windows of a step, int64 [S, T]."""
        r, (rows, num_text) = self.recipe, self._rows()
        pool = self._pool_of(step)
        text = self._prompts.windows(num_text, r.window, self._seed(2, step)) if num_text else pool.new_empty(0)
        return torch.cat([pool[self._chosen(step, rows)], text.view(-1, r.window).to(pool.device)])

    def _chosen(self, step: int, rows: int) -> torch.Tensor:
        """Which texts of the pool a step sees."""
        place = step % self._steps_a_round() * rows
        order = torch.cat([self._order(step, i) for i in range(self.recipe.passes)])[place : place + rows]
        return order.to(self._device)

    @torch.no_grad()
    def _wanted(self, step: int, windows: torch.Tensor) -> torch.Tensor:
        """What the teacher's head multiplies for the step's windows, [S, T, D] in the head's dtype. The teacher reads
        each text of the pool once, not at every pass."""
        rows, num_text = self._rows()
        if self._answers is None:
            parts = torch.split(self._pool, num_text or self.recipe.micro)
            self._answers = torch.cat([self._answer(part) for part in parts])
        kept = self._answers[self._chosen(step, rows)]
        return torch.cat([kept, self._answer(windows[rows:])]) if num_text else kept

    def _answer(self, windows: torch.Tensor) -> torch.Tensor:
        return self.teacher.hidden(windows).to(self.teacher.head.dtype)

    def _rows(self) -> tuple[int, int]:
        """Of this process's share of a batch: windows of the teacher's, windows of given texts."""
        own = self.recipe.batch // self._ranks.world
        num_text = round(self.recipe.text_share * own) if self._prompts.text.numel() >= self.recipe.window else 0
        return own - num_text, num_text

    def _steps_a_round(self) -> int:
        return max(1, self.recipe.sampled * self.recipe.passes // self._rows()[0])

    def _order(self, step: int, turn: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed(1, self._round * self.recipe.passes + turn))
        return torch.randperm(self.recipe.sampled, generator=generator)

    def _pool_of(self, step: int) -> torch.Tensor:
        """The teacher's texts of the step's round, written when the round begins."""
        r, index = self.recipe, step // self._steps_a_round()
        if index != self._round:
            generator = torch.Generator().manual_seed(self._seed(0, index))
            low, high = _TEMPERATURES
            temperature = low + (high - low) * torch.rand(r.sampled, generator=generator)
            forced = self._prompts.forced(r.sampled, r.window, self._seed(3, index))
            self._pool = self._sampler.sample(
                forced.to(self._device), temperature.to(self._device), self._seed(4, index)
            )
            self._round, self._answers = index, None
        return self._pool

    def _seed(self, stream: int, index: int) -> int:
        """One for each stream of random numbers, index in it, and process."""
        return ((self.recipe.seed * 8 + stream) * 1_000_003 + index) * self._ranks.world + self._ranks.rank

    # --- figures and state ---

    def _evaluate(self) -> dict[str, Any]:
        """On held-out text, thresholds as `prepare` would find them, for the share asked for."""
        p = self.progress
        found = find_thresholds(self.student, self._calibration, self.recipe.active)
        counts: list[float] = []
        dense, _ = perplexity(self.student, self._heldout, lambda layer, ffn, x, h: h)  # not compiled for these shapes
        served, _ = perplexity(self.student, self._heldout, serve_rule(found, counts=counts))
        return {
            "step": p.step,
            "tokens": p.step * self.recipe.batch * self.recipe.window,
            "seconds": p.seconds,
            "phase": self.recipe.phase(p.step - 1),
            "kl": p.kl,
            "active": None if math.isnan(p.active) else p.active,
            "pressure": p.pressure,
            "cett": found.cett,
            "perplexity_dense": dense,
            "perplexity_served": served,
            "active_heldout": sum(counts) / len(counts),
        }

    def _report(self) -> Report:
        p, r = self.progress, self.recipe
        pace = p.seconds / p.step
        last = p.history[-1] if p.history else {}
        return Report(
            p.step,
            r.steps,
            r.phase(p.step - 1),
            p.kl,
            p.active,
            last.get("perplexity_dense"),
            last.get("perplexity_served"),
            r.batch * r.window / pace,
            (r.steps - p.step) * pace,
        )

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Weights, moments, thresholds and progress, in one file that is replaced whole. The first process writes."""
        if self._ranks.rank:
            return
        tensors = {f"weight.{n}": p.detach() for n, p in self._trained.items()} | self._optimiser.state()
        state = json.dumps(
            {"identity": identity, "optimiser_steps": self._optimiser.steps, "progress": asdict(self.progress)}
        )
        partial = path.with_name(path.name + ".partial")
        save_file(tensors | {"epsilon": self._epsilon}, partial, metadata={"state": state})
        open_to_others(partial)
        os.replace(partial, path)

    def load(self, path: Path, identity: dict[str, Any]) -> None:
        """Goes on where `path` was saved. Raises FormatError when it cannot be read, ColdstreamError naming the
        setting that was another one then."""
        try:
            with safe_open(path, framework="pt", device=str(self._device)) as file:
                state = json.loads(file.metadata()["state"])
                check_identity(state["identity"], identity, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            self._optimiser.load_state(tensors, state["optimiser_steps"])
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(tensors[f"weight.{name}"])
            self._epsilon = tensors["epsilon"]
            self.progress = _Progress(**state["progress"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(FormatKind.BAD_HEADER, f"{path}: not the state of a run ({error})") from error


def check_identity(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ColdstreamError naming what differs between the run that was saved and the one that is to go on."""
    before, after = _flat(then), _flat(now)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise ColdstreamError(
                f"--resume: {name} was {before.get(name)!r} in the run that {path} is of, now it is {after.get(name)!r}"
            )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    recipe = {f"recipe.{name}": value for name, value in identity.get("recipe", {}).items()}
    return {name: value for name, value in identity.items() if name != "recipe"} | recipe
