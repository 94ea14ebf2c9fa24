"""`coldstream sparsify` on a tiny model: the whole run, resumed or not, what is written, each part by definition."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import sparsify_gpu as gpu
from cache.errors import ColdstreamError, FormatError, UnsupportedError
from runtime import sparsify as job
from runtime.adamw import BETAS, AdamW
from runtime.checkpoint import open_checkpoint
from runtime.config import ModelConfig
from runtime.distill import Recipe, Report, Sparsifier
from runtime.kv_cache import BlockManager, KVCache
from runtime.load import default_heldout
from runtime.muon import Muon, orthogonal
from runtime.objective import kl_divergence, press, steered
from runtime.prompts import Prompts
from runtime.quantise import codes, rounded, straight_through
from runtime.ranks import Ranks
from runtime.served import find_thresholds, perplexity, serve_rule, sketch_scores, top_shares
from runtime.student import Decoder, load_teacher, match_scale, student_of
from runtime.student_checkpoint import CARD, FIGURES, hf_config
from runtime.teacher import FREE, SelfSampler
from runtime.tokenizer import Tokenizer
from server.openers import openers
from server.settings import SettingsError, read_settings
from server.sparsify_command import run_sparsify, sparsify_table
from tests.conftest import TINY, TinyModel
from tests.test_model import batch, ours

WINDOW, STEPS, ACTIVE = 32, 200, 0.15
OPTIONS = job.SparsifyOptions(gated=True, tokens=STEPS * 4 * WINDOW, active=ACTIVE)
CPU = torch.device("cpu")
ORIGINAL_RECIPE_FOR = job.recipe_for


def small(config: ModelConfig, options: job.SparsifyOptions) -> Recipe:
    """A recipe of 200 steps of 4 windows that takes seconds."""
    return Recipe(
        act=options.act,
        gated=options.act != "relu2" if options.gated is None else options.gated,
        attention=options.attention,
        tokens=options.tokens,
        active=options.active,
        window=WINDOW,
        batch=4,
        micro=2,
        sampled=64,
        refresh=25,
        evaluations=2,
    )


class Interrupted(Exception):
    pass


class Reports(list[Report]):
    """Keeps every report; raises at a step, as if the process had been killed."""

    def __init__(self, until: int | None = None) -> None:
        self._until = until

    def __call__(self, report: Report) -> None:
        self.append(report)
        if report.step == self._until:
            raise Interrupted


def run(model: Path, out: Path, options: job.SparsifyOptions = OPTIONS, reports: Reports | None = None) -> Any:
    texts = (model.parent / "text.txt", model.parent / "text.txt")  # short ones: what is measured on them is no figure
    return job.sparsify(str(model), out, options, openers, texts, reports if reports is not None else Reports())


@pytest.fixture(scope="module", autouse=True)
def tiny_recipe() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "recipe_for", small)
        patch.setattr(job, "_FINAL_TOKENS", 512)
        patch.setattr(job, "_CURVE_TOKENS", 256)
        patch.setattr(job, "_CALIBRATION_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def teacher(tiny_llama: TinyModel) -> Decoder:
    return load_teacher(open_checkpoint(tiny_llama.checkpoint), WINDOW, CPU, torch.float32)


@pytest.fixture(scope="module")
def trained(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Reports]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sparsify") / "student"
    reports = Reports()
    return out, run(tiny_llama.checkpoint, out, reports=reports), reports


def tokens_of(model: Path, num: int = 64) -> torch.Tensor:
    ids = Tokenizer.from_dir(model).encode(default_heldout().read_text(encoding="utf-8")[:2000], add_special=False)
    return torch.tensor(ids[:num])[None]


# --- The whole run ---


def test_kl_falls_and_the_active_share_reaches_its_target(
    trained: tuple[Path, dict[str, Any], Reports], teacher: Decoder
) -> None:
    _, figures, reports = trained
    assert [r.step for r in reports] == list(range(1, STEPS + 1))
    assert [r.phase for r in (reports[0], reports[20], reports[-1])] == ["layers", "press", "served"]
    assert reports[9].kl < reports[0].kl  # the layers' error
    pressed = [r for r in reports if r.phase == "press"]
    assert min(r.kl for r in pressed) < 0.95 * pressed[0].kl
    assert reports[-1].kl < 0.8 * served_kl_untrained(teacher)
    assert reports[-1].active == pytest.approx(ACTIVE, rel=0.1)
    assert figures["result"]["active_heldout"] == pytest.approx(ACTIVE, rel=0.2)
    assert max(figures["result"]["top_shares"]) < 0.35
    assert reports[-1].eta_s == 0


def served_kl_untrained(teacher: Decoder) -> float:
    """Of the student as it starts, thresholds in place: what training has to beat."""
    tokens = written(teacher, 16, seed=5)
    student = student_of(teacher, "relu2", True)
    match_scale(student, teacher, tokens)
    found = find_thresholds(student, tokens, ACTIVE)
    with torch.no_grad():
        own = student.hidden(tokens, serve_rule(found)).flatten(0, 1)
        return float(kl_divergence(own, teacher.hidden(tokens).flatten(0, 1), teacher.head))


def written(teacher: Decoder, num: int, seed: int) -> torch.Tensor:
    """Texts of the teacher's, int64 [num, WINDOW]."""
    prompts = Prompts.make([], [], TINY["vocab_size"])
    return SelfSampler(teacher, num, WINDOW).sample(prompts.forced(num, WINDOW, seed), torch.ones(num), seed)


def test_the_result_is_the_same_in_transformers_and_in_our_engine(
    trained: tuple[Path, dict[str, Any], Reports],
) -> None:
    out = trained[0]
    tokens = tokens_of(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.hidden_act == "relu2" and model.config.model_type == "llama"
    with torch.no_grad():
        wanted = model(tokens).logits[0]
    found = engine_logits(out, tokens[0].tolist())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def engine_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """Of the engine's decoder, as a prompt."""
    model = ours(path, "auto")
    kv, manager = KVCache(model.config, 16, 8, torch.float32), BlockManager(16, 8)
    logits = model.forward(batch("prefill", ids, 0, manager.allocate(len(ids))), kv, lambda: None)
    assert logits is not None
    return logits


def test_what_is_written(trained: tuple[Path, dict[str, Any], Reports], tiny_llama: TinyModel) -> None:
    out, figures, _ = trained
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", FIGURES, CARD} <= names
    assert len({(out / n).stat().st_mode for n in ("config.json", "model.safetensors")}) == 1  # others may read it too
    assert not job.state_path(out).exists() and [p.name for p in out.parent.iterdir()] == [out.name]
    assert json.loads((out / FIGURES).read_text()) == figures
    assert figures["recipe"]["act"] == "relu2" and len(figures["curve"]) == 2
    card = (out / CARD).read_text()
    assert card.startswith("---\nbase_model: checkpoint\n")
    assert f"{figures['result']['perplexity_served']:.3f}" in card
    before, after = open_checkpoint(tiny_llama.checkpoint), open_checkpoint(out)
    assert after.names() and after.config.intermediate_size == TINY["intermediate_size"]
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(after.load(name), before.load(name), rtol=0, atol=0)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(after.load(name), before.load(name))


def test_a_run_that_is_interrupted_and_resumed_is_the_run_that_was_not(
    trained: tuple[Path, dict[str, Any], Reports], tiny_llama: TinyModel, tmp_path: Path
) -> None:
    """Killed in two phases; each time from the state that was saved last."""
    out, figures, _ = trained
    again = tmp_path / "student"
    for until in (60, 150):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr("runtime.distill.SAVE_EVERY_S", 0.0)
            options = OPTIONS if until == 60 else resumed(OPTIONS)
            run(tiny_llama.checkpoint, again, options, Reports(until))
    found = run(tiny_llama.checkpoint, again, resumed(OPTIONS))
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert timeless(found) == timeless(figures)


def resumed(options: job.SparsifyOptions, **changes: Any) -> job.SparsifyOptions:
    return replace(options, resume=True, **changes)


def timeless(figures: dict[str, Any]) -> dict[str, Any]:
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in figures["curve"]]
    return {k: v for k, v in figures.items() if k != "seconds"} | {"curve": curve}


# --- The command ---


def test_the_command_tells_what_it_made(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr("runtime.profile.profile", lambda model, out, *rest: asked.append((model, out)))
    out, said = tmp_path / "student", io.StringIO()
    settings = read_settings({"out": out, "tokens": 8 * WINDOW, "active": ACTIVE, "act": "relu", "as_json": True})
    run_sparsify(str(tiny_llama.checkpoint), settings, [tiny_llama.text], Console(file=said, width=200))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == json.loads((out / FIGURES).read_text())
    assert [Path(model).name for model, _ in asked] == [".student.partial"]
    assert "served" in said.getvalue() and f"written: {out}; " in said.getvalue()
    assert f"CETT {figures['result']['cett']:.3f}, more than 0.2" in said.getvalue()  # a tiny, untrained one
    rows = [str(cell) for cell in sparsify_table(figures).columns[0].cells]
    assert rows == ["original", "student, dense", "student, thresholds", "student, 4-bit sketches"]


def test_the_command_needs_a_directory(tiny_llama: TinyModel) -> None:
    with pytest.raises(SettingsError, match="--out is missing"):
        run_sparsify(str(tiny_llama.checkpoint), read_settings({}), [], Console(file=io.StringIO()))


@pytest.mark.parametrize(("field", "value"), [("act", "gelu"), ("active", 1.5), ("tokens", 0)])
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^--{field}: "):
        read_settings({field: value})


# --- Several processes ---

TWO = """
import sys, torch
from runtime.checkpoint import open_checkpoint
from runtime.distill import Recipe, Sparsifier
from runtime.prompts import Prompts
from runtime.quantise import codes, rounded, straight_through
from runtime.ranks import Ranks
from runtime.student import load_teacher
torch.set_num_threads(1)
ranks = Ranks.join("cpu")
teacher = load_teacher(open_checkpoint(sys.argv[1]), 16, torch.device("cpu"), torch.float32)
recipe = Recipe(tokens=6 * 4 * 16, window=16, batch=4, micro=2, sampled=4, evaluations=1, refresh=2)
text = torch.arange(16)[None] + 20
run = Sparsifier(teacher, recipe, Prompts.make([], [], 320), text, text, ranks)
run.run(None, {}, lambda report: None)
total = sum(float(p.double().sum()) for p in run.student.parameters() if p.requires_grad)
first = run._pool_of(0).sum().item()
open(f"{sys.argv[2]}/{ranks.rank}", "w").write(f"{total!r} {run.progress.kl!r} {first}")
ranks.leave()
"""


def test_processes_keep_the_same_weights(tiny_llama: TinyModel, tmp_path: Path) -> None:
    """Two of them, each with texts of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", TWO, str(tiny_llama.checkpoint), str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    processes = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, cwd=root) for rank in range(2)]
    assert [p.wait(timeout=100) for p in processes] == [0, 0]
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first[:2] == second[:2]
    assert first[2] != second[2]


# --- Forms of the student ---


@pytest.mark.parametrize(
    ("act", "gated", "model_type"), [("relu", True, "llama"), ("relu2", False, "arcee"), ("relu", False, "arcee")]
)
def test_every_stock_form_is_the_same_in_transformers(
    act: str, gated: bool, model_type: str, tiny_llama: TinyModel, tmp_path: Path
) -> None:
    options = job.SparsifyOptions(act=act, gated=gated, tokens=8 * WINDOW, active=ACTIVE)
    figures = run(tiny_llama.checkpoint, tmp_path / "student", options)
    tokens = tokens_of(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert (model.config.model_type, model.config.hidden_act) == (model_type, act)
    with torch.no_grad():
        wanted = model(tokens).logits[0]
    torch.testing.assert_close(engine_logits(tmp_path / "student", tokens[0].tolist()), wanted, rtol=1e-4, atol=1e-4)
    assert figures["recipe"]["gated"] is gated


def test_drelu_is_written_under_a_name_that_nothing_takes_for_another(teacher: Decoder) -> None:
    student = student_of(teacher, "drelu", True)
    x = torch.randn(5, TINY["hidden_size"])
    ffn = student.blocks[0].mlp
    assert ffn.gate_proj is not None
    wanted = F.relu(x @ ffn.gate_proj.weight.T) * F.relu(x @ ffn.up_proj.weight.T)
    torch.testing.assert_close(ffn.neurons(x), wanted)
    data = hf_config(student.config, torch.float32)
    with pytest.raises(UnsupportedError, match="model_type = 'llama_drelu' is not supported"):
        ModelConfig.from_hf(data)


def test_the_decoder_is_the_model_that_transformers_has(teacher: Decoder, tiny_llama: TinyModel) -> None:
    tokens = tokens_of(tiny_llama.checkpoint, WINDOW)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(tokens), tiny_llama.reference(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_pair_is_the_product_where_up_is_the_smaller(teacher: Decoder) -> None:
    """relu(g + b u)^2 - relu(g - b u)^2 = 4 b g u where |b u| < g."""
    block, own = teacher.blocks[1].mlp, student_of(teacher, "relu2", False).blocks[1].mlp
    assert block.gate_proj is not None and own.gate_proj is None
    gate, up = block.gate_proj.weight, block.up_proj.weight
    x = torch.randn(400, TINY["hidden_size"])
    g, u = x @ gate.T, (x @ up.T) * (gate.norm(dim=1) / up.norm(dim=1))
    inside = u.abs() < g
    pairs = own.neurons(x).view(400, -1, 2)
    found = (pairs[..., 0] - pairs[..., 1])[inside] / 4
    assert inside.float().mean() > 0.1
    torch.testing.assert_close(found, (g * u)[inside], rtol=1e-3, atol=1e-3)
    weights = own.down_proj.weight.view(TINY["hidden_size"], -1, 2)
    torch.testing.assert_close(weights[..., 0], -weights[..., 1])


def test_scales_are_those_of_least_squares(teacher: Decoder) -> None:
    tokens, student = written(teacher, 4, 1), student_of(teacher, "relu2", True)
    match_scale(student, teacher, tokens)
    again = match_scale(student, teacher, tokens)
    assert again == pytest.approx([1.0] * TINY["num_hidden_layers"], rel=1e-4)


# --- Parts ---


def test_the_sampler_writes_what_the_decoder_finds_likeliest(teacher: Decoder) -> None:
    """Almost without temperature; forced tokens stay; the same seed gives the same texts, another one others."""
    sampler = SelfSampler(teacher, 3, WINDOW)
    forced = torch.full((3, WINDOW), FREE)
    forced[:, 0] = torch.tensor([5, 6, 7])
    forced[1, 1:9] = torch.arange(20, 28)
    texts = sampler.sample(forced, torch.full((3,), 1e-4), 0)
    with torch.no_grad():
        likeliest = teacher.logits(texts).argmax(dim=2)
    free = forced[:, 1:] == FREE
    assert (texts[:, 1:] == likeliest[:, :-1])[free].all()
    assert (texts[forced != FREE] == forced[forced != FREE]).all()
    warm = [sampler.sample(forced, torch.ones(3), seed) for seed in (1, 1, 2)]
    assert torch.equal(warm[0], warm[1]) and not torch.equal(warm[0], warm[2])


def test_sampling_follows_the_distribution(teacher: Decoder) -> None:
    forced = torch.full((4000, 2), FREE)
    forced[:, 0] = 9
    found = SelfSampler(teacher, 4000, 2).sample(forced, torch.ones(4000), 3)[:, 1]
    with torch.no_grad():
        wanted = teacher.logits(torch.tensor([[9]]))[0, 0].softmax(dim=0)
    counts = torch.bincount(found, minlength=TINY["vocab_size"]) / 4000
    assert float((counts - wanted).abs().sum()) / 2 < 0.15  # total variation; its mean is about 0.09 for 320 tokens


def test_kl_and_its_gradient_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    student, other, head = (torch.randn(n, 16, generator=generator) for n in (50, 50, 70))
    student.requires_grad_()
    loss = 3 * kl_divergence(student, other, head, chunk=16)
    (found,) = torch.autograd.grad(loss, student)
    plain = 3 * F.kl_div(
        (student @ head.T).log_softmax(1), (other @ head.T).log_softmax(1), log_target=True, reduction="batchmean"
    )
    (wanted,) = torch.autograd.grad(plain, student)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, wanted)


def test_an_always_on_neuron_does_not_lower_the_count() -> None:
    """Grown a hundredfold, it changes nobody else's part of the count; and it costs once it holds too much."""
    h = torch.rand(64, 40, generator=torch.Generator().manual_seed(1))
    norm, epsilon = torch.ones(40), torch.tensor(0.5)
    loud = h.clone()
    loud[:, 3] = 100.0
    before, after = press(h, norm, epsilon, False), press(loud, norm, epsilon, False)
    assert after.soft > before.soft and after.active >= before.active
    assert before.excess == 0 and after.excess > 0.7
    assert press(h, norm, epsilon, True).h.count_nonzero() == (h >= 0.5).sum()
    torch.testing.assert_close(before.active, (h >= 0.5).float().mean())
    assert press(torch.zeros(4, 40), norm, torch.tensor(0.0), False).soft == 0


def test_steering_reaches_a_target() -> None:
    factor = 1.0
    for _ in range(200):
        factor = steered(factor, 0.2, 1 / (1 + factor), 0.1)  # what is measured falls as the factor grows
    assert 1 / (1 + factor) == pytest.approx(0.1, rel=1e-3)


def test_thresholds_give_the_share_that_is_asked_for(teacher: Decoder) -> None:
    tokens = written(teacher, 16, 2)
    student = student_of(teacher, "relu2", True)
    for scores in (None, sketch_scores(student)):
        counts: list[float] = []
        found = find_thresholds(student, tokens, 0.2, scores=scores)
        # on the very residuals that they were found on: layer 0's; later layers see what earlier ones dropped
        perplexity(student, tokens, serve_rule(found, scores, counts))
        assert np.mean(counts) == pytest.approx(0.2, rel=0.1)
        assert 0.005 < found.cett < 0.64
    assert perplexity(student, tokens, serve_rule(find_thresholds(student, tokens, 0.9)))[0] == pytest.approx(
        perplexity(student, tokens)[0], rel=1e-2
    )


def test_top_shares_are_of_the_contribution_energy(teacher: Decoder) -> None:
    student = student_of(teacher, "relu", True)
    with torch.no_grad():
        student.blocks[1].mlp.down_proj.weight[:, 7] *= 1000
    shares = top_shares(student, written(teacher, 2, 3))
    assert shares[1] > 0.99 > 0.5 > shares[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(6, 5), torch.randn(5)]
    ours_, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    own = AdamW({str(i): p for i, p in enumerate(ours_)}, 0.1, dtype)
    groups = [{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=BETAS, eps=1e-8)
    for _ in range(20):
        for a, b in zip(ours_, theirs, strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.clone()
        own.step(0.01)
        reference.step()
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    for a, b in zip(ours_, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 40, 12), (3, 12, 40)])
def test_orthogonal_keeps_directions_and_makes_them_equal(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    given = torch.randn(shape, generator=generator) * 1e-3
    found = orthogonal(given)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    wanted = u @ v
    assert ((found - wanted).norm() / wanted.norm()) < 0.3


def test_muon_moves_by_the_rate_and_its_state_goes_on() -> None:
    """Matrices by 0.2 lr an element, vectors as AdamW does; saved and loaded it takes the same steps."""
    torch.manual_seed(0)
    start = {"a": torch.randn(48, 16), "b": torch.randn(16, 48), "v": torch.ones(16)}
    gradients = [{n: torch.randn_like(t) for n, t in start.items()} for _ in range(4)]

    def stepped(state: Any, parameters: dict[str, torch.nn.Parameter], rows: Any) -> Muon:
        own = Muon(parameters, 0.0, torch.float32)
        if state is not None:
            own.load_state(*state)
        for row in rows:
            for name, parameter in parameters.items():
                parameter.grad = row[name].clone()
            own.step(0.01)
        return own

    whole, halves = ({n: torch.nn.Parameter(t.clone()) for n, t in start.items()} for _ in range(2))
    stepped(None, whole, gradients[:1])
    for name in ("a", "b"):
        assert float((whole[name].detach() - start[name]).square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)
    torch.testing.assert_close(whole["v"], 1 - 0.01 * gradients[0]["v"].sign())
    whole = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
    stepped(None, whole, gradients)
    first = stepped(None, halves, gradients[:2])
    stepped((first.state(), first.steps), halves, gradients[2:])
    for name in start:
        torch.testing.assert_close(halves[name], whole[name], rtol=0, atol=0)


def test_attention_trains_only_where_asked(teacher: Decoder) -> None:
    """And the teacher keeps its own."""
    name = "model.layers.0.self_attn.q_proj.weight"
    for attention in (False, True):
        recipe = replace(small(teacher.config, OPTIONS), tokens=40 * 4 * WINDOW, attention=attention, optimiser="muon")
        before = teacher.state_dict()[name].clone()
        run_ = Sparsifier(teacher, recipe, Prompts.make([], [], 320), *[written(teacher, 2, 7)] * 2, Ranks())
        run_.run(None, {}, Reports())
        assert torch.equal(teacher.state_dict()[name], before)
        assert torch.equal(run_.student.state_dict()[name], before) is not attention


def test_prompts_begin_as_told() -> None:
    prompts = Prompts.make([[1, 2, 3]], [[10, 11, 12] * 40], 320)
    rows = prompts.forced(60, WINDOW, 4)
    assert torch.equal(rows, prompts.forced(60, WINDOW, 4))
    opened = [row[:4].tolist() == [1, 2, 3, FREE] for row in rows]
    assert 15 < sum(opened) < 45
    others = [row[row != FREE].tolist() for row, chat in zip(rows, opened, strict=True) if not chat]
    assert all(8 <= len(o) <= WINDOW // 2 and set(o) <= {10, 11, 12} for o in others)
    assert prompts.windows(5, 20, 1).shape == (5, 20)
    assert (Prompts.make([], [], 320).forced(9, WINDOW, 0)[:, 1:] == FREE).all()


def test_openers_end_where_the_user_speaks(tiny_llama: TinyModel) -> None:
    tokenizer = Tokenizer.from_dir(tiny_llama.checkpoint)
    assert [tokenizer.decode(ids) for ids in openers(tokenizer)[1:]] == ["user: "]
    assert openers(tokenizer)[0] == [tokenizer.bos_id]


def test_recipes_fit_the_model() -> None:
    config = ModelConfig.from_hf({"model_type": "llama", "num_key_value_heads": 8, "hidden_size": 4096})
    recipe = ORIGINAL_RECIPE_FOR(config, job.SparsifyOptions())
    assert (recipe.window, recipe.batch) == (512, 64) and recipe.micro < 64
    assert recipe.lr == pytest.approx(2.5e-3 * 576 / 4096)
    few = ORIGINAL_RECIPE_FOR(config, job.SparsifyOptions(tokens=512 * 400))
    assert (few.batch, few.steps, few.sampled) == (1, 400, 67)


def test_recipes_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1.2 billion model: as it is on 80 GB, in smaller pieces on 40, bf16 moments on 22, refused on 12."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8}
    config = ModelConfig.from_hf({"model_type": "llama", "vocab_size": 128_256, **shape})
    options = job.SparsifyOptions(gated=True)
    recipe, cuda = ORIGINAL_RECIPE_FOR(config, options), torch.device("cuda")
    free = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"] << 30, 0))
    fits = {}
    for free["bytes"] in (80, 40, 22):
        fits[free["bytes"]] = job.fitted(recipe, config, cuda)
        assert job.memory_bytes(fits[free["bytes"]], config) <= free["bytes"] << 30
    assert fits[80] == recipe and recipe.moments == "fp32"
    assert fits[40].moments == "fp32" and fits[40].micro < recipe.micro and recipe.batch % fits[40].micro == 0
    assert fits[22].moments == "bf16" and fits[22].tokens == recipe.tokens
    free["bytes"] = 12
    with pytest.raises(ColdstreamError, match=r"--device cuda: .* are needed"):
        job.fitted(recipe, config, cuda)
    assert job.fitted(recipe, config, CPU) == recipe


def test_a_form_is_chosen_unless_one_is_given() -> None:
    config = ModelConfig.from_hf({"model_type": "llama", "num_key_value_heads": 8})
    for act, gated, wanted in (
        ("relu2", None, False),
        ("relu", None, True),
        ("drelu", None, True),
        ("relu2", True, True),
    ):
        assert ORIGINAL_RECIPE_FOR(config, job.SparsifyOptions(act=act, gated=gated)).gated is wanted


def test_the_rate_and_the_phases_of_a_recipe() -> None:
    recipe = Recipe(tokens=1000 * 64 * 512)
    for turn in (0, 50):  # each loss is warmed up to
        assert recipe.lr_at(turn) < 0.05 * recipe.lr < recipe.lr_at(turn + 10) < recipe.lr_at(turn + 24)
    assert recipe.lr_at(49) == pytest.approx(recipe.lr, rel=1e-2)
    assert recipe.lr_at(100) == pytest.approx(0.95 * recipe.lr, rel=0.05)
    assert recipe.lr_at(999) == pytest.approx(0.05 * recipe.lr, rel=1e-2)
    assert [recipe.phase(s) for s in (0, 49, 50, 999)] == ["layers", "layers", "press", "served"]


# --- Few bits ---


def test_rounding_is_to_the_nearest_and_changes_nothing_twice() -> None:
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    found, scale = codes(weight, 4, 1)
    assert found.abs().max() == 7 and torch.equal(found, found.round())
    assert ((weight - found * scale).abs() <= scale / 2 + 1e-6).all()
    once = rounded(weight, 4, 1)
    torch.testing.assert_close(rounded(once, 4, 1), once)
    weight.requires_grad_()
    through = straight_through(weight, 4, 1)
    torch.testing.assert_close(through, once)
    through.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and (weight.grad == 1).all()


def test_a_run_with_few_bits_ends_rounded_and_comes_back_as_it_was(
    tiny_llama: TinyModel, teacher: Decoder, tmp_path: Path
) -> None:
    """Through the files of benchmarks/sparsify_gpu.py, which pack two codes a byte."""
    recipe = replace(small(teacher.config, OPTIONS), tokens=12 * 4 * WINDOW, bits=4, sampled=16)
    run_ = Sparsifier(teacher, recipe, Prompts.make([], [], 320), *[written(teacher, 2, 7)] * 2, Ranks())
    run_.run(None, {}, Reports())
    tokens = written(teacher, 2, 8)
    with torch.no_grad():
        trained_ = run_.student.logits(tokens)
        for block in run_.student.blocks:
            block.mlp.settle()
        torch.testing.assert_close(run_.student.logits(tokens), trained_, rtol=1e-4, atol=1e-4)
    row = run_.student.blocks[0].mlp.up_proj.weight[3]
    assert row.unique().numel() <= 15
    for bits in (4, 8):
        gpu.export(run_.student, tmp_path / str(bits), bits)
        parts = {k: v for p in (tmp_path / str(bits)).iterdir() for k, v in load_file(p).items()}
        for name, parameter in run_.student.named_parameters():
            if parameter.requires_grad:
                tolerance = 1e-6 if bits == 4 and ".mlp." in name else 5e-3 * float(parameter.detach().abs().max())
                found = gpu.restored(name, parts, parameter.shape)
                torch.testing.assert_close(found, parameter.detach(), rtol=1e-5, atol=tolerance)


# --- Refusals ---


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"act": "drelu", "gated": False}, "--non-gated: drelu"),
        ({"texts": (Path("/nowhere.txt"),)}, "--text /nowhere.txt: not found"),
        ({"resume": True}, "--resume: there is no interrupted run"),
        ({"device": "cuda"}, "--device cuda: PyTorch finds no CUDA device"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], wanted: str, tiny_llama: TinyModel, tmp_path: Path
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ColdstreamError) as raised:
        run(tiny_llama.checkpoint, tmp_path / "student", replace(OPTIONS, **changes))
    assert str(raised.value).startswith(wanted)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_gate_is_refused(tiny_arcee: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a arcee model has no gate"):
        run(tiny_arcee.checkpoint, tmp_path / "student")


def test_outputs_and_disks_are_looked_at_first(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ColdstreamError, match="already exists"):
        run(tiny_llama.checkpoint, tmp_path)
    out = tmp_path / "student"
    job.state_path(out).write_bytes(b"no state")
    with pytest.raises(ColdstreamError, match="an interrupted run is kept in"):
        run(tiny_llama.checkpoint, out)
    with pytest.raises(FormatError, match="not the state of a run"):
        run(tiny_llama.checkpoint, out, resumed(OPTIONS))
    job.state_path(out).unlink()
    monkeypatch.setattr(job, "_disk_bytes", lambda config, recipe: 1 << 60)
    with pytest.raises(ColdstreamError, match="are needed on the disk"):
        run(tiny_llama.checkpoint, out)


def test_texts_are_learnt_from_and_must_be_long_enough(tiny_llama: TinyModel, tmp_path: Path) -> None:
    options = replace(OPTIONS, tokens=8 * WINDOW, texts=(tiny_llama.text,))
    figures = run(tiny_llama.checkpoint, tmp_path / "student", options)
    assert [t["name"] for t in figures["texts"]] == ["text.txt"]
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ColdstreamError, match=r"--text: .* at least 32 are needed"):
        run(tiny_llama.checkpoint, tmp_path / "other", replace(options, texts=(short,)))


def test_another_setting_cannot_go_on(tiny_llama: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "student"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("runtime.distill.SAVE_EVERY_S", 0.0)
        run(tiny_llama.checkpoint, out, OPTIONS, Reports(2))
    with pytest.raises(ColdstreamError, match=r"--resume: recipe\.active was 0\.15 .* now it is 0\.5"):
        run(tiny_llama.checkpoint, out, resumed(OPTIONS, active=0.5))
