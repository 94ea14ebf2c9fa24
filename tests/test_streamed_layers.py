"""Attention that does not fit: read by every step, the same numbers, and never more layers in memory than planned."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import FormatError, FormatKind, ReadError
from runtime.bench import _decode, _prefill
from runtime.load import LoadOptions, load, open_plan, prepare
from runtime.plan import PlanOptions
from runtime.streamed_layers import StreamedLayers
from tests.conftest import TinyModel


def test_layers_come_in_order_and_the_next_is_read_meanwhile() -> None:
    read: list[int] = []
    layers: Any = StreamedLayers(3, lambda i: read.append(i) or i)  # type: ignore[func-returns-value, arg-type, return-value]
    assert [list(layers), list(layers)] == [[0, 1, 2]] * 2
    assert len(layers) == 3 and layers[-1] == 2 and layers[1:] == [1, 2]
    assert read[:6] == [0, 1, 2] * 2
    for layer in layers:  # a step that is cancelled
        if layer == 1:
            break
    assert list(layers) == [0, 1, 2]


@pytest.mark.parametrize("error", [FormatError(FormatKind.TRUNCATED, "cut"), OSError(5, "cut")])
def test_a_layer_that_cannot_be_read_is_a_read_error_and_the_next_step_tries_again(error: Exception) -> None:
    broken = threading.Event()

    def make(layer: int) -> Any:
        if broken.is_set() and layer == 1:
            raise error
        return layer

    layers = StreamedLayers(2, make)
    broken.set()
    with pytest.raises(ReadError, match=r"layer 1.*cut"):
        list(layers)
    broken.clear()
    assert len(list(layers)) == 2


def logits_of(model: Path, options: LoadOptions) -> tuple[Any, torch.Tensor]:
    """The plan, and the logits of some decoded tokens."""
    loaded = load(str(model), options, lambda what, share: None)
    found: list[torch.Tensor] = []
    forward = loaded.model.forward

    def keep(*arguments: Any) -> torch.Tensor | None:
        out = forward(*arguments)
        found.extend([] if out is None else [out.clone()])
        return out

    loaded.model.forward = keep  # type: ignore[method-assign]
    kv, manager = loaded.new_kv()
    blocks = manager.allocate(40)
    _prefill(loaded, kv, blocks, list(range(30, 60)))
    for position in range(30, 36):
        _decode(loaded, kv, blocks, position, position)
    loaded.close()
    return loaded.plan, torch.cat(found)


def test_streamed_attention_gives_the_same_numbers_and_plan_says_so(tiny_arcee: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    prepare(str(tiny_arcee.checkpoint), path, tiny_arcee.text, None, "auto", False, lambda what, share: None)
    options = LoadOptions(mode="dense", max_model_len=256, threads=1)
    plan, expected = logits_of(path, options)
    assert plan.streamed_bytes == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.plan.LAYERS_AT_ONCE", 1)
        patch.setattr("runtime.plan._smallest_budget", lambda sizes: 0 if sizes.streams_attention else 1 << 60)
        slow, found = logits_of(path, options)
        said = open_plan(str(path), PlanOptions(mode="dense", max_model_len=256))
    assert torch.equal(found, expected)
    assert slow.streamed_bytes == plan.details["resident.attention"] == 3 * slow.details["resident.attention"]
    assert slow.multiplied_bytes == plan.multiplied_bytes
    assert any("every step reads" in note for note in said.notes)
    assert replace(said, notes=()).streamed_bytes == slow.streamed_bytes
