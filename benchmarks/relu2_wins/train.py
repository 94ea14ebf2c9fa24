"""Trains the four decoders of the comparison: the same tokens, order, steps and settings, only the activation differs.

    python benchmarks/relu2_wins/train.py --data benchmarks/relu2_wins/data --work /tmp/relu2_wins --total-seconds 555

The number of steps is chosen once, from a short timing of all four, so that everything ends within --total-seconds;
it is kept in WORK/plan.json. Resumable: run the same command again after an interruption. A batch is a function of
the step alone, so that a resumed run takes the same steps. Finished models lie in WORK/export/NAME.
Needs PyTorch, numpy and safetensors, nothing else: it runs on a machine that cannot install anything.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from decoder import ACTIVATIONS, Decoder, Shape, export, head_loss

STARTED = time.monotonic()
WARM_STEPS, TIMED_STEPS = 4, 12  # of the timing: the first ones compile
MARGIN_S = 14.0  # of --total-seconds: evaluation, export, saving


@dataclass(frozen=True)
class Recipe:
    """What is the same for all four. AdamW, linear warm-up, cosine to `final` of the peak."""

    batch: int = 128  # windows a step
    lr: float = 2e-3
    warmup: int = 150
    final: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 17

    def lr_at(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part)))


class Windows:
    """Windows of T + 1 tokens of one long text, in an order that depends on seed and epoch alone."""

    def __init__(self, tokens: np.ndarray, context: int, recipe: Recipe, device: str) -> None:
        self.num = (len(tokens) - 1) // context
        if self.num < recipe.batch:
            raise SystemExit(f"the text has {self.num} windows of {context} tokens, a batch needs {recipe.batch}")
        self.context, self.recipe = context, recipe
        self.per_epoch = self.num // recipe.batch
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # under 32,768 entries
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [B, T] of one step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1000 + epoch)
            order = torch.randperm(self.num, generator=generator) * self.context
            self._epoch, self._order = epoch, order.to(self.tokens.device)
        starts = self._order[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        offsets = torch.arange(self.context + 1, device=self.tokens.device)
        rows = self.tokens[starts.unsqueeze(1) + offsets].long()
        return rows[:, :-1], rows[:, 1:]


class Trainer:
    """One model, its optimiser, and its checkpoint in the work folder."""

    def __init__(self, activation: str, shape: Shape, recipe: Recipe, windows: Windows, options: argparse.Namespace):
        self.activation, self.recipe, self.windows, self.options = activation, recipe, windows, options
        self.model = Decoder(shape, activation, recipe.seed).to(options.device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=1e-9, fused=True)
        self.step, self.log = 0, []
        self.path = options.work / f"{activation}.pt"
        self.loss: Callable[..., torch.Tensor] = head_loss
        if options.compile:
            self.model.compile_blocks()
            self.loss = torch.compile(head_loss, dynamic=False)

    def save(self) -> None:
        state = {"step": self.step, "log": self.log, "model": self.model.state_dict()}
        partial = self.path.with_suffix(".partial")
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, partial)
        os.replace(partial, self.path)

    def load(self) -> None:
        """Continues where the checkpoint in the work folder is, if there is one."""
        if self.path.is_file():
            state = torch.load(self.path, map_location=self.options.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.log = state["step"], state["log"]

    def train_step(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One update; loss and gradient norm stay on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step, steps)
        inputs, targets = self.windows.batch(self.step)
        with self._precision():
            loss = self.loss(self.model.hidden(inputs), self.model.model.embed_tokens.weight, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), norm

    def run(self, steps: int) -> None:
        """Trains up to `steps`, saving now and then."""
        started, first = time.monotonic(), self.step
        losses: list[torch.Tensor] = []
        while self.step < steps:
            loss, norm = self.train_step(steps)
            losses.append(loss)
            if self.step % self.options.log_every == 0 or self.step == steps:
                mean = float(torch.stack(losses).mean())  # waits for the device
                losses.clear()
                speed = (self.step - first) * self.windows.recipe.batch * self.windows.context
                speed /= time.monotonic() - started
                self.log.append({"step": self.step, "loss": mean, "grad_norm": float(norm), "tokens_per_s": speed})
                if not math.isfinite(mean):
                    raise SystemExit(f"{self.activation}: the loss is {mean} at step {self.step}")
            if self.step % self.options.save_every == 0 or self.step == steps or self.step == self.options.stop_at:
                self.save()
                if self.step == self.options.stop_at:
                    return

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray) -> float:
        """Mean negative log-likelihood of a text, in windows of the context's length."""
        context = self.windows.context
        num = (len(tokens) - 1) // context
        rows = np.stack([tokens[i * context : (i + 1) * context + 1] for i in range(num)]).astype(np.int64)
        total = 0.0
        for chunk in torch.from_numpy(rows).split(64):
            data = chunk.to(self.options.device)
            with self._precision():
                hidden = self.model.hidden(data[:, :-1], compiled=False)
                loss = head_loss(hidden, self.model.model.embed_tokens.weight, data[:, 1:])
            total += float(loss) * len(chunk)
        return total / num

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.bf16)


def read_tokens(data: Path, use: str) -> np.ndarray:
    """uint16 tokens of one text that build_data.py wrote."""
    packed = data / f"{use}.u16.xz"
    raw = lzma.decompress(packed.read_bytes()) if packed.is_file() else (data / f"{use}.u16").read_bytes()
    return np.frombuffer(raw, np.uint16)


def time_steps(make: Callable[[str], Trainer]) -> dict[str, float]:
    """Seconds of a step of each model, compiling on the way; nothing of these steps is kept."""
    found = {}
    for activation in ACTIVATIONS:
        trainer, begun = make(activation), time.monotonic()
        for _ in range(WARM_STEPS):
            trainer.train_step(1000)
        _wait(trainer)
        started = time.monotonic()
        for _ in range(TIMED_STEPS):
            trainer.train_step(1000)
        _wait(trainer)
        found[activation] = (time.monotonic() - started) / TIMED_STEPS
        print(f"{activation}: compiled in {started - begun:.1f} s, {found[activation] * 1e3:.1f} ms a step", flush=True)
    return found


def _wait(trainer: Trainer) -> None:
    float(next(trainer.model.parameters()).detach().flatten()[0])


def plan_steps(options: argparse.Namespace, make: Callable[[str], Trainer]) -> int:
    """The number of steps of every model: given, chosen before, or what fits in the time."""
    path = options.work / "plan.json"
    if path.is_file():
        return int(json.loads(path.read_text())["steps"])
    seconds = {}
    steps = options.steps
    if not steps:
        seconds = time_steps(make)
        left = options.total_seconds - (time.monotonic() - STARTED) - MARGIN_S
        steps = int(left / (1.02 * sum(seconds.values())))
    if steps < 1:
        raise SystemExit("no time for a single step: raise --total-seconds")
    path.write_text(json.dumps({"steps": steps, "seconds_a_step": seconds}) + "\n")
    return steps


def train_all(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    shape, recipe = Shape(**json.loads(options.shape)), Recipe(**json.loads(options.recipe))
    texts = {use: read_tokens(options.data, use) for use in ("train", "heldout")}
    windows = Windows(texts["train"], shape.context, recipe, options.device)
    print(f"{len(texts['train']) / 1e6:.1f} M tokens read after {time.monotonic() - STARTED:.1f} s", flush=True)

    def make(activation: str) -> Trainer:
        return Trainer(activation, shape, recipe, windows, options)

    steps = plan_steps(options, make)
    tokens = steps * recipe.batch * shape.context
    print(f"{steps} steps, {tokens / 1e6:.1f} M tokens a model, {steps / windows.per_epoch:.2f} epochs", flush=True)
    tokenizer = options.data / "tokenizer.json"
    for activation in options.names or ACTIVATIONS:
        summary = options.work / f"{activation}.json"
        if summary.is_file():
            continue
        trainer = make(activation)
        trainer.load()
        trainer.run(steps)
        if trainer.step < steps:
            continue
        export(trainer.model, options.work / "export" / activation, tokenizer if tokenizer.is_file() else None)
        found = {
            "activation": activation,
            "steps": steps,
            "tokens": tokens,
            "epochs": steps / windows.per_epoch,
            "heldout_nll": trainer.evaluate(texts["heldout"]),
            "non_embedding_parameters": trainer.model.num_non_embedding,
            "ffn_parameters": trainer.model.num_ffn,
            "recipe": asdict(recipe),
            "shape": asdict(shape),
            "log": trainer.log,
        }
        summary.write_text(json.dumps(found) + "\n")
        last = trainer.log[-1]
        line = f"{activation}: train {last['loss']:.4f}, held-out {found['heldout_nll']:.4f}"
        print(f"{line}, {last['tokens_per_s'] / 1e3:.0f} k tokens/s, {time.monotonic() - STARTED:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, logs and the exported models")
    parser.add_argument("--total-seconds", type=float, default=555.0, help="for everything, from the start")
    parser.add_argument("--names", nargs="*", choices=ACTIVATIONS, help="train only these; needs --steps or a plan")
    parser.add_argument("--steps", type=int, default=0, help="in place of --total-seconds")
    parser.add_argument("--stop-at", type=int, default=0, help="a step at which each model is left unfinished")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--shape", default="{}", help="JSON, fields of Shape")
    parser.add_argument("--recipe", default="{}", help="JSON, fields of Recipe")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    options = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    if options.compile:
        from torch._dynamo import config

        config.recompile_limit = 64  # four kinds of block, each its own code
    train_all(options)


if __name__ == "__main__":
    main()
