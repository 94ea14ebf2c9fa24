"""Perplexity on a held-out text, dense beside sparse, paired token by token: what `coldstream perplexity` runs.

The sparse figure goes the way that scoring goes in the server: masks row by row, through the same FFN, the same
predictor and the same cache as decode.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.budget import trim_heap
from cache.errors import ColdstreamError
from runtime.batch import Batch, SequenceView
from runtime.load import Loaded, LoadOptions, default_heldout, find_or_pack, load, open_plan, plan_options
from runtime.pack import Progress
from runtime.packed import PROFILE, Packed
from runtime.sparse import check_cett
from runtime.sparsity import block_error
from runtime.tokenizer import Tokenizer
from runtime.windows import read_text

WINDOW = 1024  # tokens of context, each window a text of its own; the first token of a window is not scored
_CHUNK = 128  # rows of logits at once: the vocabulary is large


def perplexity(
    model: str, options: LoadOptions, text: Path | None, tokens: int, cetts: Sequence[float], progress: Progress
) -> dict[str, Any]:
    """Dense, then each CETT: perplexity, increase over dense with its standard error, active and taken share.

    The increase's standard error is that of the paired difference of log-likelihoods over blocks of neighbouring
    tokens. Raises ColdstreamError.
    """
    path = text or default_heldout()
    dense_options = replace(options, mode="dense", cett=None)
    sparse_options = [replace(options, mode="sparse", cett=cett) for cett in cetts]
    packed = find_or_pack(model, progress, options.pack, lambda: _refuse(model, [dense_options, *sparse_options]))
    targets = packed.read(PROFILE)["targets"]
    for cett in cetts:
        check_cett(targets, cett)
    length = _window(packed, [dense_options, *sparse_options])
    windows = _windows(packed, path, tokens, length)
    dense, found = _score(packed, replace(dense_options, max_model_len=length), windows, progress)
    rows = [
        {
            "mode": "dense",
            "cett": 0.0,
            "perplexity": math.exp(dense.mean()),
            "standard_error": _ppl_error(dense),
            **found,
        }
    ]
    for cett, sparse in zip(cetts, sparse_options, strict=True):
        nll, found = _score(packed, replace(sparse, max_model_len=length), windows, progress)
        rows.append({"mode": "sparse", "cett": cett, **_compare(dense, nll), **found})
    return {
        "model": Path(model).name,
        "text": path.name,
        "text_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tokens_scored": int(dense.size),
        "window": length,
        "rows": rows,
    }


def _refuse(model: str, options: Sequence[LoadOptions]) -> None:
    """ColdstreamError for a budget that one of them does not fit."""
    for each in options:
        open_plan(model, plan_options(each), each.pack)


def _window(packed: Packed, options: Sequence[LoadOptions]) -> int:
    """Tokens of a window: as many as the context has in each of the ways that are compared, WINDOW at most."""
    return min(WINDOW, *(open_plan(str(packed.path), plan_options(each)).max_model_len for each in options))


def _compare(dense: np.ndarray, nll: np.ndarray) -> dict[str, float]:
    base, value = math.exp(dense.mean()), math.exp(nll.mean())
    return {
        "perplexity": value,
        "standard_error": _ppl_error(nll),
        "increase": value - base,
        "increase_standard_error": value * block_error(nll - dense),
        "increase_percent": 100 * (value / base - 1),
    }


def _ppl_error(nll: np.ndarray) -> float:
    return math.exp(nll.mean()) * block_error(nll)


def _score(
    packed: Packed, options: LoadOptions, windows: list[list[int]], progress: Progress
) -> tuple[np.ndarray, dict[str, float]]:
    """Negative log-likelihoods of the windows' tokens, and the shares of neurons that it took."""
    gc.collect()
    trim_heap()  # what the load before has left is not this one's
    loaded = load(str(packed.path), options, progress)
    try:
        done = []
        for i, window in enumerate(windows):
            progress(
                f"scoring {options.mode}" + (f" at CETT {options.cett:g}" if options.cett else ""), i / len(windows)
            )
            done.append(_score_window(loaded, window))
        return np.concatenate(done), _shares(loaded)
    finally:
        loaded.close()


def _windows(packed: Packed, text: Path, tokens: int, length: int) -> list[list[int]]:
    if tokens < length:
        raise ColdstreamError(f"--tokens {tokens}: at least {length} are needed, one window")
    ids = Tokenizer.from_dir(packed.path).encode(read_text("--text", text), add_special=False)[:tokens]
    if len(ids) < length:
        raise ColdstreamError(f"--text {text}: {len(ids)} tokens, at least {length} are needed")
    return [ids[s : s + length] for s in range(0, len(ids) - length + 1, length)]


def _score_window(loaded: Loaded, ids: list[int]) -> np.ndarray:
    kv, manager = loaded.new_kv()
    blocks = manager.allocate(len(ids))
    targets = torch.tensor(ids[1:])
    out = []
    for first in range(0, len(ids) - 1, _CHUNK):
        part = ids[first : min(first + _CHUNK, len(ids) - 1)]
        batch = Batch(
            kind="score",
            token_ids=torch.tensor(part),
            positions=torch.arange(first, first + len(part)),
            sequences=(SequenceView(blocks, first, len(part)),),
            logits="all",
        )
        logits = loaded.model.forward(batch, kv, lambda: None)
        if logits is None:
            raise RuntimeError("a scoring batch returned no logits")
        out.append(torch.nn.functional.cross_entropy(logits, targets[first : first + len(part)], reduction="none"))
    return torch.cat(out).double().numpy()


def _shares(loaded: Loaded) -> dict[str, float]:
    """Shares of the FFN's neurons that were active (true magnitude at or above epsilon) and taken (predicted)."""
    counted = loaded.model.counters()
    if not counted.predicted_rows:
        return {}
    total = counted.predicted_rows * loaded.packed.bundles.num_neurons
    return {"active_share": counted.active_neurons / total, "taken_share": counted.predicted_neurons / total}
