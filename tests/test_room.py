"""Whose turn the spare slots are: by what a step takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.batch import Batch, BatchKind, LogitsKind, SequenceView
from runtime.load import Loaded, LoadOptions, load, prepare
from runtime.plan import FEW_ROWS, Plan, make_plan
from runtime.room import SpareRoom, is_wide
from tests.conftest import TinyModel


def batch(kind: BatchKind, rows: int, logits: LogitsKind = "last") -> Batch:
    ids = torch.zeros(rows, dtype=torch.int64)
    return Batch(kind, ids, ids, (SequenceView(np.zeros(1, np.int32), 0, rows),), logits)


@pytest.mark.parametrize(
    ("batches", "wide"),
    [
        ((batch("decode", 1),), False),
        ((batch("decode", 32),), False),
        ((batch("decode", 33),), True),
        ((batch("prefill", FEW_ROWS),), False),
        ((batch("prefill", FEW_ROWS + 1),), True),
        ((batch("score", FEW_ROWS + 1),), True),
        ((batch("decode", 20), batch("prefill", FEW_ROWS)), True),
        ((batch("score", 2, "all"),), True),
    ],
)
def test_a_step_is_wide_by_its_rows_and_its_logits(batches: tuple[Batch, ...], wide: bool) -> None:
    assert is_wide(batches, max_num_seqs=32) == wide


class Lent:
    """A cache that only notes whose the spare slots are."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def give_back(self) -> None:
        self.calls.append("give")

    def take_back(self) -> None:
        self.calls.append("take")


def test_slots_change_hands_once_a_run_of_steps() -> None:
    cache = Lent()
    room = SpareRoom(cache, max_num_seqs=4)  # type: ignore[arg-type]
    one, many = (batch("decode", 1),), (batch("prefill", 100),)
    for step in (one, one, many, many, one, one):
        room(step)
    assert cache.calls == ["give", "take"]
    room.make()
    room(many)
    room(one)
    assert cache.calls == ["give", "take"] * 2


def decoded(loaded: Loaded) -> list[list[float]]:
    """Logits of three tokens before a prompt of 40 tokens, of its last one, and of three after it."""
    kv, manager = loaded.new_kv()
    first, second = manager.allocate(64), manager.allocate(64)
    steps: list[tuple[BatchKind, np.ndarray, int, int]] = [("decode", first, at, 1) for at in range(3)]
    steps += [("prefill", second, 0, 40)] + [("decode", first, at, 1) for at in range(3, 6)]
    out = []
    for kind, blocks, start, rows in steps:
        ids = torch.arange(start, start + rows) % 50
        view = (SequenceView(blocks, start, rows),)
        logits = loaded.model.forward(
            Batch(kind, ids, torch.arange(start, start + rows), view, "last"), kv, lambda: None
        )
        assert logits is not None
        out.append(logits[-1].tolist())
    return out


def test_a_model_decodes_from_what_its_prompts_will_need(
    tiny_relu2: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quiet(what: str, share: float) -> None: ...

    path = prepare(str(tiny_relu2.checkpoint), tmp_path / "packed", tiny_relu2.text, None, "auto", False, quiet)

    def opened(each: int, spare: int) -> Loaded:
        def tight(*arguments: Any) -> Plan:
            plan = make_plan(*arguments)
            layers = len(plan.slots_per_layer)
            return replace(plan, slots_per_layer=(each,) * layers, num_spare_slots=spare * layers)

        monkeypatch.setattr("runtime.load.make_plan", tight)  # a tiny model leaves no more than a page
        return load(str(path), LoadOptions(mode="sparse", cett=0.1, threads=1), quiet)

    plain, lent = opened(20, 0), opened(10, 10)
    layers = len(lent.plan.slots_per_layer)
    assert sum(lent.cache.slots_per_layer) == sum(plain.cache.slots_per_layer) == 20 * layers
    assert decoded(lent) == decoded(plain)
    assert sum(lent.cache.slots_per_layer) == 20 * layers  # taken back
    lent.model.forward(prompt(lent), lent.new_kv()[0], lambda: None)
    assert sum(lent.cache.slots_per_layer) == 10 * layers
    evictions = [one.cache.snapshot().tiers["cpu"].evictions for one in (plain, lent)]
    assert evictions[1] > evictions[0]
    plain.close()
    lent.close()


def prompt(loaded: Loaded) -> Batch:
    ids = torch.arange(40)
    return Batch("prefill", ids, ids, (SequenceView(loaded.new_kv()[1].allocate(40), 0, 40),), "none")
