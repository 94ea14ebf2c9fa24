"""`coldstream perplexity`: the same windows for dense and sparse, and refusals before anything has been scored."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.errors import ColdstreamError
from runtime.load import LoadOptions, load, open_plan, prepare
from runtime.pack import PackOptions
from runtime.perplexity import perplexity
from runtime.plan import PlanOptions
from tests.conftest import TinyModel


def quiet(what: str, share: float) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def packed(tiny_relu2: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("perplexity") / "packed"
    return prepare(str(tiny_relu2.checkpoint), out, tiny_relu2.text, None, "auto", False, quiet)


def smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def test_windows_are_the_same_where_the_contexts_of_dense_and_sparse_differ(
    packed: Path, tiny_relu2: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.load.process_bytes", lambda: 400 << 20)  # of every plan: tests take more and more

    def context(mode: str, budget: int) -> int:
        return open_plan(str(packed), PlanOptions(budget, mode=mode)).max_model_len

    least = max(open_plan(str(packed), PlanOptions(mode=mode)).smallest_budget_bytes for mode in ("dense", "sparse"))
    needs = [
        smallest(lambda b, m=mode: context(m, b) == 512, least, least + (64 << 20)) for mode in ("dense", "sparse")
    ]  # type: ignore[misc]
    budget = min(needs)
    assert {context("dense", budget), context("sparse", budget)} == {256, 512}
    found = perplexity(str(packed), LoadOptions(memory_bytes=budget), tiny_relu2.text, 600, [0.1], quiet)
    assert found["window"] == 256 and found["tokens_scored"] == 2 * 255
    dense, sparse = found["rows"]
    assert sparse["increase"] == pytest.approx(sparse["perplexity"] - dense["perplexity"])


def test_a_model_is_gone_before_the_next_is_planned(
    packed: Path, tiny_relu2: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its memory counts as that of the process, and the budget is too small for the next."""
    before: list[weakref.ref[Any]] = []

    def loads(*arguments: Any) -> Any:
        assert not any(model() for model in before)
        loaded = load(*arguments)
        before.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr("runtime.perplexity.load", loads)
    perplexity(str(packed), LoadOptions(max_model_len=128), tiny_relu2.text, 128, [0.1, 0.15], quiet)
    assert len(before) == 3


def test_what_cannot_be_scored_is_refused_by_its_flag_before_anything_is(packed: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 1000)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"text": latin}, rf"--text {latin}: not UTF-8, at byte 3"),
        ({"text": tmp_path / "none.txt"}, r"--text .*none\.txt: not found"),
        ({"text": tmp_path}, r"--text .*: cannot be read \(Is a directory\)"),
        ({"tokens": 300}, r"--tokens 300: at least 512"),
        ({"cetts": [0.1, 0.9]}, r"--cett 0\.9: this model was prepared for"),
    ]
    done: list[str] = []
    for change, says in cases:
        given = {"text": None, "tokens": 1024, "cetts": [0.1], **change}
        with pytest.raises(ColdstreamError, match=says):
            perplexity(str(packed), LoadOptions(), progress=lambda what, share: done.append(what), **given)
    assert not done


def test_a_budget_is_refused_before_packing(
    tiny_relu2: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTREAM_CACHE_DIR", str(tmp_path))
    options = LoadOptions(memory_bytes=1 << 20, pack=PackOptions(tiny_relu2.text))
    with pytest.raises(ColdstreamError, match=r"--memory 1MiB .*is too small"):
        perplexity(str(tiny_relu2.checkpoint), options, None, 256, [0.2], quiet)
    assert list(tmp_path.iterdir()) == []
