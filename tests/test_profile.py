"""The whole profile on tiny models: figures against a naive forward pass in fp64, the files, the page."""

from __future__ import annotations

import io
import json
import math
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from benchmarks import profile_table
from benchmarks.readme import block
from cache.errors import ColdstreamError
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.families import Exact, Sketch4, all_families, quick_families
from runtime.kernels import Kernels, select
from runtime.layers import FFNWeights, load_ffn
from runtime.load import default_calibration, prepare
from runtime.pack import calibration_tokens
from runtime.predictivity import BUDGETS, SOURCES, Family
from runtime.profile import DETAIL_CETTS, JSON, QUICK, STATISTICS, profile, rounded
from runtime.sparsity import CETT_TARGETS
from runtime.tokenizer import Tokenizer
from server.profile_command import run_profile
from server.settings import SettingsError, read_settings
from tests.conftest import TINY, TinyModel

TOKENS = 256


def families(kernels: Kernels) -> list[Family]:
    return [Sketch4(kernels, sources=("input",)), Exact(carried=True)]


def silent(stage: str, share: float) -> None:
    assert 0 <= share <= 1


@pytest.fixture(scope="module")
def profiled(tiny_relu2: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("profile")
    return profile(str(tiny_relu2.checkpoint), out, tiny_relu2.text, TOKENS, True, silent, families), out


def heldout_ids(tiny: TinyModel) -> torch.Tensor:
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(str(tiny.checkpoint)))
    return torch.tensor([tokenizer.encode(tiny.text.read_text(encoding="utf-8"), add_special=False)[:TOKENS]])


def naive(tiny: TinyModel, ids: torch.Tensor, epsilon: np.ndarray | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """transformers in fp64 on ids [S, T]: logits, and each layer's factors [S, T, F], those of neurons whose output is
    below epsilon [L] set to zero."""
    model = tiny.reference.double()
    seen: list[np.ndarray] = []
    hooks = []
    for i, layer in enumerate(model.model.layers):

        def cut(module: Any, args: tuple[torch.Tensor], i: int = i) -> tuple[torch.Tensor]:
            magnitude = args[0].abs() * module.weight.norm(dim=0)
            kept = args[0] * (magnitude >= (0.0 if epsilon is None else float(epsilon[i])))
            seen.append(kept.numpy())
            return (kept,)

        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(cut))
    try:
        with torch.no_grad():
            logits = model(ids).logits.numpy()
        return logits, seen
    finally:
        for hook in hooks:
            hook.remove()
        model.float()


def down_vectors(tiny: TinyModel) -> list[np.ndarray]:
    return [layer.mlp.down_proj.weight.detach().double().numpy().T for layer in tiny.reference.model.layers]  # [F, D]


def naive_nll(tiny: TinyModel, epsilon: np.ndarray | None) -> tuple[float, list[float]]:
    """Mean nll of the held-out tokens, and the active share of each layer."""
    ids = heldout_ids(tiny)
    logits, seen = naive(tiny, ids, epsilon)
    nll = torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]), ids[0, 1:])
    return float(nll), [float((h != 0).mean()) for h in seen]


def test_dense_perplexity_is_that_of_transformers(profiled: tuple[dict[str, Any], Path], tiny_relu2: TinyModel) -> None:
    nll, _ = naive_nll(tiny_relu2, None)
    found = profiled[0]["sparsity"]["dense"]
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["tokens_scored"] == TOKENS - 1


def test_sparse_perplexity_and_active_shares_are_those_of_a_naive_cut(
    profiled: tuple[dict[str, Any], Path], tiny_relu2: TinyModel
) -> None:
    epsilon = load_file(profiled[1] / STATISTICS)["epsilon"]  # [L, C]
    for i, row in enumerate(profiled[0]["sparsity"]["rows"]):
        nll, shares = naive_nll(tiny_relu2, epsilon[:, i])
        assert row["perplexity"] == pytest.approx(math.exp(nll), rel=1e-3)
        assert row["active_share_layers"] == pytest.approx(shares, abs=2e-3)
        np.testing.assert_allclose(row["epsilon_layers"], epsilon[:, i])


def test_more_error_leaves_fewer_neurons(profiled: tuple[dict[str, Any], Path]) -> None:
    rows = profiled[0]["sparsity"]["rows"]
    assert [r["cett"] for r in rows] == list(CETT_TARGETS)
    for before, after in pairwise(rows):
        assert after["active_share"] < before["active_share"]
        assert after["kl"] > before["kl"]
        assert all(b > a for a, b in zip(before["epsilon_layers"], after["epsilon_layers"], strict=True))


def test_thresholds_meet_their_cett_by_the_definition(
    profiled: tuple[dict[str, Any], Path], tiny_relu2: TinyModel
) -> None:
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(str(tiny_relu2.checkpoint)))
    ids = calibration_tokens(tokenizer, default_calibration(), TINY["vocab_size"], QUICK.calibration_windows)
    epsilon = load_file(profiled[1] / STATISTICS)["epsilon"]  # [L, C]
    _, seen = naive(tiny_relu2, ids, None)
    for i, (h, down) in enumerate(zip(seen, down_vectors(tiny_relu2), strict=True)):
        rows = h.reshape(-1, h.shape[2])
        for target, threshold in zip(CETT_TARGETS, epsilon[i], strict=True):
            dropped = np.abs(rows) * np.linalg.norm(down, axis=1) < threshold
            tail = np.linalg.norm((rows * dropped) @ down, axis=1) / np.linalg.norm(rows @ down, axis=1)
            assert 0.97 * target < tail.mean() < target * (1 + 1e-4)


def test_reuse_and_gap_are_those_of_a_naive_count(profiled: tuple[dict[str, Any], Path], tiny_relu2: TinyModel) -> None:
    epsilon = load_file(profiled[1] / STATISTICS)["epsilon"]
    _, seen = naive(tiny_relu2, heldout_ids(tiny_relu2), None)
    for detail in profiled[0]["affinity"]:
        at = epsilon[:, CETT_TARGETS.index(detail["cett"])]
        for i, (h, down) in enumerate(zip(seen, down_vectors(tiny_relu2), strict=True)):
            active = np.abs(h[0]) * np.linalg.norm(down, axis=1) >= at[i]  # [T, F]
            sets = [set(np.flatnonzero(row)) for row in active]
            reuse = np.mean([len(a & b) / len(b) for a, b in pairwise(sets) if b])
            assert detail["layers"][i]["reuse"] == pytest.approx(reuse, rel=1e-2)
            gaps = []
            for neuron in np.flatnonzero(active.sum(axis=0) >= 10):
                given = np.delete(active[active[:, neuron]].mean(axis=0), neuron)
                gaps.append(np.sort(given)[-10:].mean() - given.mean())
            assert detail["layers"][i]["gap"] == pytest.approx(np.mean(gaps), rel=1e-2)


def test_the_one_percent_point_was_run(profiled: tuple[dict[str, Any], Path]) -> None:
    found, rows = profiled[0]["sparsity"]["one_percent"], profiled[0]["sparsity"]["rows"]
    assert 0 < found["cett"] <= CETT_TARGETS[-1]
    above = [r for r in rows if r["cett"] >= found["cett"]]
    below = [r for r in rows if r["cett"] <= found["cett"]]
    assert not above or found["active_share"] >= above[0]["active_share"] - 1e-6
    assert not below or found["active_share"] <= below[-1]["active_share"] + 1e-6


def test_the_oracle_recalls_everything(profiled: tuple[dict[str, Any], Path]) -> None:
    rows = {(r["predictor"], r["source"], r["cett"]): r for r in profiled[0]["predictivity"]}
    for cett in DETAIL_CETTS:
        oracle, sketch = (rows[name, "input", cett]["budgets"] for name in ("exact", "sketch4"))
        ahead = rows["exact", "ahead", cett]["budgets"]
        assert [b["budget"] for b in oracle] == list(BUDGETS)
        assert oracle[0]["recall"] == oracle[0]["precision"] == 1.0
        assert oracle[0]["over_oracle_percent"] == pytest.approx(0.0, abs=1e-6)
        assert oracle[0]["recall"] > sketch[0]["recall"] > ahead[0]["recall"]
        assert all(b["recall"] > a["recall"] for a, b in pairwise(sketch))
        assert sketch[2]["perplexity_oracle"] > 0 and "perplexity" not in sketch[1]  # quick: budgets 1 and 1.5
        assert not any("perplexity" in b for b in ahead)  # it is carried on its own input alone
        shipped = rows["sketch4", "input", cett]
        assert shipped["num_bytes"] > 0 and shipped["microseconds_a_layer"] > 0


@pytest.mark.parametrize("name", ["tiny_relu2", "tiny_arcee"])
def test_every_predictor_is_asked_from_its_inputs(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = request.getfixturevalue(name)
    monkeypatch.setattr("runtime.families.TRAINED_TOKENS", 256)
    found = profile(str(tiny.checkpoint), tmp_path, tiny.text, 64, True, silent, all_families)
    rows = {(r["predictor"], r["source"]): r for r in found["predictivity"] if r["cett"] == DETAIL_CETTS[0]}
    asked = {(f.name, s) for f in all_families(select()) for s in f.sources}
    assert set(rows) == asked and {s for _, s in asked} == set(SOURCES)
    recall = {key: row["budgets"][0]["recall"] for key, row in rows.items()}
    assert recall["exact", "input"] == max(recall.values()) == 1.0
    assert recall["sketch4", "input"] > recall["rows 2", "input"] > recall["rows 1", "input"]
    assert recall["planes 2", "input"] > recall["planes 1", "input"]
    assert recall["aware svd", "input"] >= recall["svd", "input"] - 0.02
    for (predictor, source), row in rows.items():
        assert row["num_bytes"] > 0, predictor
        assert ("perplexity" in row["budgets"][0]) == (source == "input" and predictor != "exact")


def test_quick_asks_fewer_of_the_same(tiny_relu2: TinyModel) -> None:
    full, quick = ({f.name: f for f in made(select())} for made in (all_families, quick_families))
    assert quick.keys() < full.keys()
    assert all(set(f.sources) <= set(full[name].sources) for name, f in quick.items())
    assert set(quick["planes 2"].sources) == set(quick["exact"].sources) == set(SOURCES)


def test_affinity_is_complete_and_bounded(profiled: tuple[dict[str, Any], Path]) -> None:
    for detail in profiled[0]["affinity"]:
        assert len(detail["layers"]) == TINY["num_hidden_layers"] and 0 < detail["reuse"] < 1
        assert len(detail["union"]) == 16 and detail["union"] == sorted(detail["union"])
        for rates in (detail["hit_rates"], detail["pool_hit_rates"]):
            for name in ("static", "lru", "lfu", "ours"):
                assert all(b >= a for a, b in zip(rates[name], rates["belady"], strict=True)), name
        reads = np.asarray([detail["reads_a_token"][k] for k in ("original", "frequency", "coactivation")])
        assert (np.diff(reads[..., 0], axis=2) <= 0).all() and (np.diff(reads[..., 1], axis=2) >= 0).all()


def test_statistics_hold_what_prepare_wants(profiled: tuple[dict[str, Any], Path]) -> None:
    found = load_file(profiled[1] / STATISTICS)
    num_layers, size = TINY["num_hidden_layers"], TINY["intermediate_size"]
    np.testing.assert_array_equal(found["targets"], CETT_TARGETS)
    for cett in DETAIL_CETTS:
        order = found[f"cett_{cett:g}.order"]
        np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(size), (num_layers, 1)))
        assert found[f"cett_{cett:g}.partners"].shape == (num_layers, size, 10)
        active = found["active"][:, CETT_TARGETS.index(cett)]
        np.testing.assert_allclose(found[f"cett_{cett:g}.frequency"].mean(axis=1), active, rtol=1e-4)


def test_the_json_is_the_figures(profiled: tuple[dict[str, Any], Path]) -> None:
    figures, out = profiled
    written = json.loads((out / JSON).read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(rounded(figures)))
    assert written["peak_memory_bytes"] > 0 and written["scope"]["tokens"] == TOKENS


def test_the_page_holds_a_curve_for_each_model(profiled: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib: the extra `report` is not installed")
    from runtime.report import HTML, write_report

    other = dict(profiled[0]) | {"model": "<other>"}
    write_report([rounded(profiled[0]), rounded(other)], tmp_path)
    page = (tmp_path / HTML).read_text(encoding="utf-8")
    assert page.count("<svg") == len(list(tmp_path.glob("*.svg"))) == 4
    assert "&lt;other&gt;" in page and "<other>" not in page


def test_the_readme_gets_both_models_side_by_side(
    profiled: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    figures, out = profiled
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{block(profile_table.BLOCK, 'stale')}\nafter\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["profile_table.py", str(out), str(out), "--readme", str(readme)])
    profile_table.main()
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert f"| {figures['sparsity']['dense']['perplexity']:.2f} |" in text and text.count("\n| ") == 14
    assert capsys.readouterr().out in text + "\n"
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="must be there once each"):
        profile_table.main()


def test_a_non_gated_model_and_a_packed_one_with_one_layer_in_memory(
    tiny_arcee: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.Tensor]] = []

    def load(checkpoint: Checkpoint, layer: int) -> FFNWeights:
        assert all(up() is None for up in loaded)
        weights = load_ffn(checkpoint, layer)
        loaded.append(weakref.ref(weights.up))
        return weights

    packed = prepare(str(tiny_arcee.checkpoint), tmp_path / "packed", None, None, "auto", False, silent)
    monkeypatch.setattr("runtime.streams.load_ffn", load)
    exact = [Exact()]
    found = profile(str(packed), tmp_path / "out", tiny_arcee.text, TOKENS, True, silent, lambda kernels: exact)
    assert found["config"]["gated"] is False
    assert len(loaded) == 2 * TINY["num_hidden_layers"]  # profiled, then checked
    nll, _ = naive_nll(tiny_arcee, None)
    assert found["sparsity"]["dense"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)


def test_the_command_shows_the_figures(
    profiled: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[tuple[Any, ...]] = []

    def measured(*args: Any) -> dict[str, Any]:
        given.append(args)
        return profiled[0]

    monkeypatch.setattr("runtime.profile.profile", measured)
    monkeypatch.setattr("runtime.report.can_draw", lambda: False)
    console = Console(file=io.StringIO(), width=200)
    settings = read_settings({"out": tmp_path, "as_json": True, "tokens": 99})
    run_profile("a model", settings, True, console)
    assert given[0][:5] == ("a model", tmp_path, None, 99, True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(rounded(profiled[0])))
    assert "matplotlib is absent (pip install 'coldstream[report]')" in console.file.getvalue()  # type: ignore[attr-defined]
    run_profile("a model", read_settings({"out": tmp_path}), False, console)
    shown = capsys.readouterr().out
    assert f"{profiled[0]['sparsity']['dense']['perplexity']:.3f}" in shown and shown.count("%") > 20
    with pytest.raises(SettingsError, match="--out is missing"):
        run_profile("a model", read_settings({}), False, console)


@pytest.mark.parametrize(
    "wrong", [[Exact(), Exact()], [Exact(sources=("ahead",), carried=True)], [Exact(sources=("behind",))]]
)
def test_predictors_that_cannot_be_measured_are_refused(
    wrong: list[Family], tiny_relu2: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="predictor"):
        profile(str(tiny_relu2.checkpoint), tmp_path, tiny_relu2.text, TOKENS, True, silent, lambda kernels: wrong)


def test_a_missing_text_is_named(tiny_relu2: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ColdstreamError, match=r"--text .*nowhere.txt: not found"):
        profile(str(tiny_relu2.checkpoint), tmp_path, tmp_path / "nowhere.txt", None, True, silent)
