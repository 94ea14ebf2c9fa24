"""Active sets of a real model on real text, recorded, and forced on a model of a large shape with random weights.

    python -m benchmarks.traces record MODEL --out FILE [--tokens 2304] [--cett 0.05 | --active 0.333]
    python -m benchmarks.traces record PACKED --out FILE [--tokens 2304] [--cett 0.05]
    python -m benchmarks.traces bench PACKED --trace FILE [--memory 3GiB] [--prompt-tokens 512] [--tokens 256]

Random weights have no skew, no reuse and no co-activation, and their text loops; so what is read and computed for each
token is decided by a trace of a real ReLU² model instead: every layer of F neurons replays F / 1,536 layers of the real
one, drawn anew for each layer, side by side (where F is no multiple, the last one in part). Which of them is drawn
never changes within a run, so that reuse between tokens, the sizes of the sets and which neurons go together are the
real ones. `--active` records the neurons of largest output in place of those that a CETT keeps: as many as another
activation keeps, a third for ReGLU. Of a packed model, what its own predictor took is recorded, misses and false alarms
included, and beside it what was truly active, and the predictor's guesses from the residual before attention and from
a layer before, the latter also with what its hottest neurons add, by how sure they are. Neurons are numbered by their
frequency on the calibration text, the hottest first; a packed model of benchmarks/make_packed.py has that frequency,
and the order that `prepare` would give the records, by what is active together in that text. The predictor's pass
is run at its real size, on sketches of random bits, and its answer is thrown away. The shares and the reuse of what was
replayed are measured in the run. Knows predictors by their protocol; nothing in runtime/ knows of traces.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import random_sketch
from benchmarks.predictors import TEXTS, forward
from cache.budget import parse_size
from runtime.affinity import reuse
from runtime.bench import measure
from runtime.calibrate import LayerTail, thresholds
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.coactivation import disk_order
from runtime.ffn import DenseFFN
from runtime.kernels import Kernels, select
from runtime.load import LOOKAHEADS, LoadOptions, default_heldout, load
from runtime.packed import PROFILE, Packed, is_packed, open_packed
from runtime.plan import FfnCache
from runtime.predictor import Predictor
from runtime.sketches import PlaneSketch
from runtime.sparse import sparse_setup
from runtime.tokenizer import Tokenizer

Keep = Callable[[LayerTail], float]  # a layer's threshold on output magnitudes
SURE = {f"sure_{at:g}": at for at in (2.0, 2.5, 3.0, 4.0, 5.0, 6.0)}  # guessed a layer before, with that confidence
EARLY, _EARLY_MARGIN = "early", 4.0  # guessed a layer before, from that layer's input alone, as a GPU does
BESIDE = ("active", "residual", "ahead", EARLY, *SURE)  # truly active; guessed before attention; guessed a layer before
_FIRST = 0.1  # of each layer's neurons: computed before a guess at the next one, as the pinned ones are
ROW_STEP = 131  # tokens of the trace between two rows of a batch, so that they are not at the same place of the text
_THRESHOLD_TOKENS = 1536


@dataclass(frozen=True, slots=True)
class Trace:
    """What each of T tokens of one text activates in L layers of F neurons.

    bits: uint8 [L, T, F / 8 rounded up], bit i % 8 of byte i // 8 is neuron i; frequency: float32 [L, F], share of
    tokens of another text. beside: other sets of the same tokens by name, as BESIDE has them, or none. calibration:
    bits of what is truly active in N tokens of that other text, or none. ValueError when the shapes do not belong
    together.
    """

    bits: np.ndarray
    frequency: np.ndarray
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)
    calibration: np.ndarray | None = None

    def __post_init__(self) -> None:
        layers, neurons = self.frequency.shape
        if self.bits.ndim != 3 or (self.bits.shape[0], self.bits.shape[2]) != (layers, -(-neurons // 8)):
            raise ValueError(f"bits of {self.bits.shape} do not fit {layers} layers of {neurons} neurons")
        if any(bits.shape != self.bits.shape for bits in self.beside.values()):
            raise ValueError(f"sets beside bits of {self.bits.shape} have another shape")

    @property
    def num_tokens(self) -> int:
        return int(self.bits.shape[1])

    def active(self, layer: int) -> np.ndarray:
        """bool [T, F] of one layer."""
        num = self.frequency.shape[1]
        return np.unpackbits(self.bits[layer], axis=1, count=num, bitorder="little").astype(bool)

    def with_sets(self, name: str, beside: Sequence[str] | None = None) -> Trace:
        """Other sets in place of those taken, if `name` is not "taken"; beside: of the others only these."""
        kept = {n: bits for n, bits in self.beside.items() if beside is None or n in beside}
        return replace(self, bits=self.bits if name == "taken" else self.beside[name], beside=kept)

    def first(self, num_tokens: int) -> Trace:
        """Its first tokens, in memory of their own."""
        beside = {name: bits[:, :num_tokens].copy() for name, bits in self.beside.items()}
        return Trace(self.bits[:, :num_tokens].copy(), self.frequency, beside)  # no calibration: it is large

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            known = {} if self.calibration is None else {"calibration": self.calibration}
            np.savez_compressed(file, bits=self.bits, frequency=self.frequency, **self.beside, **known)

    @classmethod
    def read(cls, path: Path, beside_names: Sequence[str] = BESIDE) -> Trace:
        """With what there is of these sets beside. SystemExit when the file is missing or no trace."""
        try:
            with np.load(path) as arrays:
                beside = {name: arrays[name] for name in beside_names if name in arrays}
                return cls(arrays["bits"], arrays["frequency"], beside, arrays.get("calibration"))
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"--trace {path}: not a trace ({error})") from error


def record(checkpoint: Checkpoint, calibration: torch.Tensor, heldout: torch.Tensor, keep: Keep) -> Trace:
    """Active sets of the dense model on the held-out tokens [T] at the threshold of each layer that `keep` gives on the
    calibration tokens [S, T]."""
    bits, frequencies = [], []
    for ffn, inputs in forward(checkpoint, torch.cat([calibration, heldout[None]])):
        h = DenseFFN(checkpoint.config.hidden_act, ffn.gate, ffn.up, ffn.down).neurons(inputs["input"])  # [S + 1, T, F]
        known = h[:-1].flatten(0, 1)
        rows = torch.linspace(0, known.shape[0] - 1, min(_THRESHOLD_TOKENS, known.shape[0])).long()
        at = keep(LayerTail(known[rows], ffn.down)) / ffn.down.norm(dim=1).clamp_min(1e-30)
        active = (h.abs() >= at) & (h != 0)
        bits.append(np.packbits(active[-1].numpy(), axis=1, bitorder="little"))
        frequencies.append(active[:-1].float().mean(dim=(0, 1)).numpy())
        print(f"layer {len(bits) - 1}: {100 * float(active[-1].float().mean()):.1f} % active", flush=True)
    return Trace(np.stack(bits), np.stack(frequencies))


def at_cett(cett: float) -> Keep:
    """The threshold on output magnitudes that drops a tail of that CETT."""
    return lambda tail: thresholds(tail, tail.magnitude, [cett])[0]


def at_share(share: float) -> Keep:
    """The threshold on output magnitudes that so many reach; what is zero is never active."""

    def keep(tail: LayerTail) -> float:
        return float(np.quantile(tail.magnitude.numpy(), 1 - share))

    return keep


@torch.no_grad()
def record_taken(packed: Packed, heldout: torch.Tensor, cett: float, calibration: torch.Tensor | None = None) -> Trace:
    """What a packed model's predictor takes of held-out tokens [T] at a CETT, whose inputs are those of the dense
    model, and what is active in calibration tokens [S, T]; its checkpoint must be where it was. Raises
    ColdstreamError."""
    checkpoint, profile = open_checkpoint(packed.source.path), packed.read(PROFILE)
    sparse = sparse_setup(packed, profile, cett, 0, select())
    own = np.empty(0, bool)
    first = profile["order"][:, : round(_FIRST * profile["order"].shape[1])].astype(np.int64)
    sources = {"taken": "input", "residual": "residual", "ahead": "ahead"}
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("taken", *BESIDE)}
    for layer, (ffn, inputs) in enumerate(forward(checkpoint, heldout[None], first)):
        active = _active(checkpoint, ffn, inputs["input"][0], profile["order"][layer], sparse.active_at[layer])
        found["active"].append(np.packbits(active, axis=1, bitorder="little"))
        for name, source in sources.items():
            taken = sparse.predictor.predict(layer, inputs[source][0].contiguous().numpy())
            mask = np.ones_like(active) if taken is None else taken
            own = mask.copy() if name == "taken" else own
            found[name].append(np.packbits(mask, axis=1, bitorder="little"))
        for source, levels in (("begun", SURE), ("ahead", {EARLY: _EARLY_MARGIN})):
            sure = sparse.predictor.confidence(layer, inputs[source][0].contiguous().numpy())
            given_up = sure is None or not layer or wrong(sure >= min(levels.values()), own)
            for name, at in levels.items():
                mask = np.zeros_like(active) if sure is None or given_up else sure >= at
                found[name].append(np.packbits(mask, axis=1, bitorder="little"))
    sets = {name: np.stack(bits) for name, bits in found.items()}
    known: list[np.ndarray] = []
    for layer, (ffn, inputs) in enumerate(() if calibration is None else forward(checkpoint, calibration)):
        at = profile["order"][layer], sparse.active_at[layer]
        known.append(np.packbits(_active(checkpoint, ffn, inputs["input"].flatten(0, 1), *at), 1, bitorder="little"))
    frequency = np.minimum(sparse.frequency, 1).astype(np.float32)
    return Trace(sets.pop("taken"), frequency, sets, np.stack(known) if known else None)


def _active(checkpoint: Checkpoint, ffn: Any, x: torch.Tensor, order: np.ndarray, at: np.ndarray) -> np.ndarray:
    """bool [N, F], in the packed model's order: whose activation of x [N, D] reaches `at` [F]."""
    h = DenseFFN(checkpoint.config.hidden_act, ffn.gate, ffn.up, ffn.down).neurons(x)
    h = h[:, torch.from_numpy(order.astype(np.int64))]
    return np.asarray(((h.abs() >= torch.from_numpy(at)) & (h != 0)).numpy())


def wrong(guessed: np.ndarray, taken: np.ndarray) -> bool:
    """Whether a layer's guesses are wrong more often than right, so that they are given up; bool [T, F]."""
    return bool(2 * np.count_nonzero(guessed & taken) < np.count_nonzero(guessed))


class Replay:
    """Sets of a trace for `num_layers` layers of `num_neurons`, hottest neuron first unless it is `reordered`."""

    def __init__(self, trace: Trace, num_layers: int, num_neurons: int, seed: int = 0) -> None:
        real_layers, real_neurons = trace.frequency.shape
        rng, cut = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        parts = -(-num_neurons // real_neurons)
        draws = -(-parts // real_layers)
        self._parts = [
            np.concatenate([rng.permutation(real_layers) for _ in range(draws)])[:parts] for _ in range(num_layers)
        ]
        whole, rest = divmod(num_neurons, real_neurons)
        places = [
            np.concatenate(
                [np.arange(whole * real_neurons), whole * real_neurons + cut.permutation(real_neurons)[:rest]]
            )
            for _ in range(num_layers)
        ]
        self._order = [
            at[np.argsort(-trace.frequency[p].ravel()[at], kind="stable")]
            for p, at in zip(self._parts, places, strict=True)
        ]
        self.trace, self.num_layers, self.num_neurons = trace, num_layers, num_neurons

    def reordered(self, order: np.ndarray) -> Replay:
        """The same with the neurons in another order, int [L, F]: whoever comes first was number order[l, 0]."""
        other = copy.copy(self)
        other._order = [own[o] for own, o in zip(self._order, order, strict=True)]
        return other

    def disk_order(self, edges: Sequence[int]) -> np.ndarray:
        """The order in which `prepare` would lay the records out, int32 [L, F], by what is active together on the
        calibration text; as they are where the trace has none. `edges` go by the frequency."""
        known, ranks = self.trace.calibration, -np.arange(self.num_neurons)
        if known is None:
            return np.tile(np.arange(self.num_neurons, dtype=np.int32), (self.num_layers, 1))
        tokens = range(known.shape[1])
        sets = (np.stack([self._set(known, layer, t) for t in tokens]) for layer in range(self.num_layers))
        return np.stack([disk_order(active, edges, ranks) for active in sets]).astype(np.int32)

    def active(self, layer: int, token: int, beside: str | None = None) -> np.ndarray:
        """bool [F], the trace's own sets or some beside them; the trace begins again after its last token."""
        sets = self.trace.bits if beside is None else self.trace.beside[beside]
        return self._set(sets, layer, token % self.trace.num_tokens)

    def _set(self, sets: np.ndarray, layer: int, token: int) -> np.ndarray:
        bits = sets[self._parts[layer], token]  # [parts, bytes]
        real = np.unpackbits(bits, axis=1, count=self.trace.frequency.shape[1], bitorder="little")
        return np.asarray(real.ravel()[self._order[layer]].view(bool))

    def sets(self, layer: int, device: torch.device | str = "cpu", beside: str | None = None) -> torch.Tensor:
        """bool [T, F] of all tokens, made on the device; as of `active`."""
        recorded = self.trace.bits if beside is None else self.trace.beside[beside]
        bits = torch.from_numpy(recorded[self._parts[layer]]).to(device)  # [parts, T, bytes]
        real = (bits[..., None] >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
        whole = real.flatten(2)[..., : self.trace.frequency.shape[1]].transpose(0, 1).flatten(1)  # [T, parts * real]
        return whole[:, torch.from_numpy(self._order[layer]).to(device)].bool()

    def frequency(self) -> np.ndarray:
        """float32 [L, F]: share of tokens of another text that need a neuron."""
        return np.stack([self.trace.frequency[p].ravel()[o] for p, o in zip(self._parts, self._order, strict=True)])

    def facts(self, first: int, last: int) -> dict[str, float]:
        """Of tokens first..last - 1, over all layers: shares taken and active, and how much of what a token takes the
        one before took."""
        tokens, layers = range(first, last), range(self.num_layers)
        taken = np.stack([[self.active(layer, t) for t in tokens] for layer in layers])  # [L, T, F]
        found = {"taken_share": float(taken.mean()), "reuse": reuse(taken)}
        if "active" in self.trace.beside:
            shares = [self.active(layer, t, "active").mean() for layer in layers for t in tokens]
            found["active_share"] = float(np.mean(shares))
        return found


def replay_on(packed: Packed, trace: Trace, seed: int = 0) -> Replay:
    """Of a trace on a packed model of benchmarks/make_packed.py, its neurons as they lie there."""
    config = packed.config
    replay = Replay(trace, config.num_hidden_layers, config.intermediate_size, seed)
    return replay.reordered(packed.read(PROFILE)["order"])


class ReplayPredictor:
    """Forces a replay's sets; a token of the trace for each call of a layer.

    pass_of(layer, x): what a real predictor would compute, run and forgotten. calls_per_token: 2 where the model looks
    ahead before attention; its guesses are those recorded there, or always right where there are none. The first
    num_pinned neurons come on top, as the engine's own predictor has it. Row b of a batch is ROW_STEP * b tokens
    further.
    """

    name = "trace"

    def __init__(
        self,
        replay: Replay,
        pass_of: Callable[[int, np.ndarray], object],
        pass_bytes: int = 0,
        calls_per_token: int = 1,
        num_pinned: int = 0,
    ) -> None:
        self._num_pinned = num_pinned
        self._replay, self._pass_of, self.num_bytes = replay, pass_of, pass_bytes
        self._calls_per_token = calls_per_token
        self._calls = np.zeros(replay.num_layers, np.int64)
        self._replayed: list[np.ndarray] = []  # of layer 0, packed: what `facts` looks at

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray:
        self._pass_of(layer, x)
        token, call = divmod(int(self._calls[layer]), self._calls_per_token)
        self._calls[layer] += 1
        guess = call + 1 < self._calls_per_token and "residual" in self._replay.trace.beside
        beside = "residual" if guess else None
        mask = np.stack([self._replay.active(layer, token + ROW_STEP * b, beside) for b in range(x.shape[0])])
        mask[:, : self._num_pinned] = True
        if layer == 0 and self._calls[0] % self._calls_per_token == 0:
            self._replayed.append(np.packbits(mask[0]))
        return mask

    def confidence(self, layer: int, x: np.ndarray) -> np.ndarray | None:
        """As recorded of the token to come, in the steps of SURE; None where it was not."""
        levels = [(name, at) for name, at in SURE.items() if name in self._replay.trace.beside]
        if not levels:
            return None
        self._pass_of(layer, x)
        token = int(self._calls[layer]) // self._calls_per_token
        sure = np.zeros((x.shape[0], self._replay.num_neurons), np.float32)
        for b, row in enumerate(sure):
            for name, at in levels:
                row[self._replay.active(layer, token + ROW_STEP * b, name)] = at
        sure[:, : self._num_pinned] = 0.0
        return sure

    def facts(self) -> dict[str, float]:
        """Of layer 0 and the first rows so far: share of neurons that were active, and reuse between tokens."""
        sets = np.unpackbits(np.stack(self._replayed), axis=1, count=self._replay.num_neurons).astype(bool)
        return {"active_share": float(sets.mean()), "reuse": reuse(sets[None])}


def sketch_pass(sketches: Sequence[PlaneSketch], kernels: Kernels) -> Callable[[int, np.ndarray], object]:
    """A predictor's pass over sketches, its scores dropped."""

    def run(layer: int, x: np.ndarray) -> None:
        kernels.plane_scores(x, sketches[layer], np.empty((x.shape[0], sketches[layer].up.codes.shape[0]), np.float32))

    return run


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """`coldstream bench` of a packed model, the trace in its predictor's place; its figures and the trace's own."""
    trace = Trace.read(options.trace)
    packed = open_packed(Path(options.model))
    config = packed.config
    made: list[ReplayPredictor] = []

    def adapt(_: Predictor | None, kernels: Kernels) -> Predictor:
        rng, size = np.random.default_rng(1), (config.hidden_size, config.intermediate_size)
        sketches = [
            random_sketch(rng, *size, options.sketch_bits, config.gated, config.hidden_act)
            for _ in range(config.num_hidden_layers)
        ]
        run, num_bytes = sketch_pass(sketches, kernels), sum(s.num_bytes for s in sketches)
        calls = 2 if options.lookahead == "attention" else 1
        replay = replay_on(packed, trace, options.seed)
        made.append(ReplayPredictor(replay, run, num_bytes, calls))
        return made[0]

    wanted = LoadOptions(
        memory_bytes=None if options.memory is None else parse_size(options.memory),
        ffn_cache=None if options.ffn_cache is None else FfnCache.parse(options.ffn_cache),
        mode=options.mode,
        threads=options.threads,
        lookahead=options.lookahead,
    )
    loaded = load(options.model, wanted, lambda what, share: None, adapt)
    try:
        found = measure(loaded, options.prompt_tokens, options.tokens, default_heldout())
        counted = {"overflow": loaded.model.counters().overflow}
    finally:
        loaded.close()
    return found | counted | made[0].facts() | {"vocab_size": config.vocab_size, "sketch_bytes": made[0].num_bytes}


def tokens_of(tokenizer: Tokenizer, name: str, windows: int, length: int) -> torch.Tensor:
    """The first tokens of a text that comes with coldstream, int64 [windows, length]. SystemExit when it is shorter."""
    ids = tokenizer.encode((TEXTS / name).read_text(encoding="utf-8"), add_special=False)
    if len(ids) < windows * length:
        raise SystemExit(f"--tokens {length}: {name} has {len(ids)} tokens, {windows * length} are needed")
    return torch.tensor(ids[: windows * length]).view(windows, length)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("record", help="write the active sets of a real model")
    one.add_argument("model", help="a checkpoint, or a packed model whose checkpoint is where it was")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--tokens", type=int, default=2304, help="of the held-out text, in one window")
    one.add_argument("--sets", default="taken", choices=["taken", "active"], help="of a packed model, that are forced")
    one.add_argument(
        "--beside", nargs="*", choices=BESIDE, help="of a packed model: only these other sets, in a small file"
    )
    one.add_argument("--calibration-windows", type=int, default=2, help="of as many tokens")
    one.add_argument("--cett", type=float, default=0.05)
    one.add_argument("--active", type=float, help="share of the neurons to keep, in place of --cett")
    two = verbs.add_parser("bench", help="decode with the sets of a trace")
    two.add_argument("model", help="a packed model, of random weights for instance")
    two.add_argument("--trace", type=Path, required=True)
    two.add_argument("--memory", help="as in `coldstream serve`; what the sketches keep comes on top")
    two.add_argument("--ffn-cache", help="as in `coldstream serve`")
    two.add_argument("--mode", default="auto", choices=["auto", "dense", "sparse"], help="that memory is planned for")
    two.add_argument("--threads", type=int)
    two.add_argument("--lookahead", default="none", choices=LOOKAHEADS)
    two.add_argument("--sketch-bits", type=float, default=1.7)
    two.add_argument("--prompt-tokens", type=int, default=512)
    two.add_argument("--tokens", type=int, default=256)
    two.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = arguments()
    if options.verb == "bench":
        print(json.dumps(bench(options)))
        return
    if is_packed(Path(options.model)):
        packed = open_packed(Path(options.model))
        tokenizer = Tokenizer.from_dir(packed.path)
        heldout = tokens_of(tokenizer, "heldout.txt", 1, options.tokens)[0]
        calibration = tokens_of(tokenizer, "calibration.txt", options.calibration_windows, options.tokens)
        trace = record_taken(packed, heldout, options.cett, calibration if options.beside is None else None)
        trace.with_sets(options.sets, options.beside).save(options.out)
        return
    checkpoint = open_checkpoint(options.model)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    calibration = tokens_of(tokenizer, "calibration.txt", options.calibration_windows, options.tokens)
    keep = at_cett(options.cett) if options.active is None else at_share(options.active)
    trace = record(checkpoint, calibration, tokens_of(tokenizer, "heldout.txt", 1, options.tokens)[0], keep)
    trace.save(options.out)
    shares = [float(trace.active(i).mean()) for i in range(trace.bits.shape[0])]
    again = [reuse(trace.active(i)[None]) for i in range(trace.bits.shape[0])]
    facts = {"tokens": trace.num_tokens, "active_share": float(np.mean(shares)), "reuse": float(np.nanmean(again))}
    kept = {"cett": options.cett} if options.active is None else {"active": options.active}
    print(json.dumps({"file_bytes": options.out.stat().st_size} | kept | facts))


if __name__ == "__main__":
    main()
