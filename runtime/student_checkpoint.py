"""A trained student as a plain Hugging Face checkpoint, with its figures and its card beside it.

What has a class in transformers is written under that class's name: gated relu2 and relu are Llama, non-gated ones are
Arcee. dReLU has none, and is written under a model_type of its own, so that nothing loads it as what it is not.
Knows names and files; not how a student is trained. Peak memory: one file's tensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runtime.checkpoint import Checkpoint, GgufCheckpoint, expected_tensors
from runtime.config import ModelConfig
from runtime.safetensors_file import open_to_others
from runtime.student import DRELU, Decoder
from runtime.tokenizer import Tokenizer

FIGURES, CARD = "sparsify.json", "MODEL_CARD.md"
DRELU_TYPE = "llama_drelu"  # of no library: relu(gate) * relu(up)
_FILE_BYTES = 4 << 30
_CLASSES = {"llama": "LlamaForCausalLM", "arcee": "ArceeForCausalLM"}
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "attention_bias", "bos_token_id", "rope_theta"),
)  # fields of ModelConfig that have the same name in config.json
_HF_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def output_dtype(config: ModelConfig) -> torch.dtype:
    """Of the student's matrices: fp32 for an fp32 teacher, else bf16."""
    return torch.float32 if config.dtype == "fp32" else torch.bfloat16


def output_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of the tensors of a student of this configuration."""
    return sum(math.prod(shape) for _, shape in expected_tensors(config)) * dtype.itemsize


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a student, fields as transformers names them."""
    model_type = DRELU_TYPE if config.hidden_act == DRELU else config.model_type
    ends = list(config.eos_token_ids)
    return {
        "architectures": [_CLASSES.get(model_type, "none")],
        "model_type": model_type,
        **{name: getattr(config, name) for name in _SAME},
        **_rope(config),
        "mlp_bias": False,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "dtype": _HF_DTYPES[dtype],
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    numbers = {k: int(v) if v == int(v) else v for k, v in config.rope_scaling.parameters.items()}
    if "truncate" in numbers:
        numbers["truncate"] = bool(numbers["truncate"])
    return {"rope_scaling": {"rope_type": config.rope_scaling.rope_type, **numbers}}


def write_student(student: Decoder, source: Checkpoint, tokenizer: Tokenizer, out: Path) -> None:
    """config.json, safetensors (in files of at most 4 GiB) and the tokenizer's files, into an existing directory."""
    dtype = output_dtype(source.config)
    _write_json(out / "config.json", hf_config(student.config, dtype))
    files = list(_files(student, dtype))
    index: dict[str, str] = {}
    for i, names in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        state = student.state_dict()
        tensors = {n: state[n].detach().to("cpu", dtype, copy=True).contiguous() for n in names}
        save_file(tensors, out / name, metadata={"format": "pt"})
        open_to_others(out / name)
        index |= dict.fromkeys(names, name)
    if len(files) > 1:
        size = output_bytes(student.config, dtype)
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_tokenizer(source, tokenizer, out)


def _files(student: Decoder, dtype: torch.dtype) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, shape in expected_tensors(student.config):
        num_bytes = math.prod(shape) * dtype.itemsize
        if names and size + num_bytes > _FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _write_tokenizer(source: Checkpoint, tokenizer: Tokenizer, out: Path) -> None:
    """The source's own files; of a GGUF vocabulary, those that transformers reads."""
    if not isinstance(source, GgufCheckpoint):
        more = [p for n in ("generation_config.json", "special_tokens_map.json") if (p := source.path / n).is_file()]
        for path in [*source.tokenizer_files(), *more]:
            shutil.copyfile(path, out / path.name)
        return
    tokenizer.save_json(out / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos_token}
    config |= {"eos_token": tokenizer.eos_token, "chat_template": tokenizer.chat_template}
    _write_json(out / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})
    _write_json(out / "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})


def write_figures(
    figures: dict[str, Any], out: Path, base_model: str | None = None, licence: str | None = None
) -> None:
    """sparsify.json and MODEL_CARD.md."""
    _write_json(out / FIGURES, figures)
    (out / CARD).write_text(card(figures, base_model, licence), encoding="utf-8")


def card(figures: dict[str, Any], base_model: str | None = None, licence: str | None = None) -> str:
    """The card, in Hugging Face's format: data, procedure, figures, limits. licence: the base model's, as SPDX has it.

    It has more rows where `figures` tells of more texts (benchmarks/sparsify_gpu.py).
    """
    name = base_model or figures["teacher"]["name"]
    terms = f"license: {licence}" if licence else "license: other\nlicense_name: as-the-base-model"
    rows = "\n".join(f"| {row} | {value} |" for row, value in _card_rows(figures))
    return f"""---
base_model: {name}
library_name: transformers
pipeline_tag: text-generation
{terms}
tags: [activation-sparsity, {figures["recipe"]["act"]}, coldstream]
---
# {name.rpartition("/")[2]}, made sparse

{_form(figures)}

## Data
{_data(figures)}

## Procedure
{_procedure(figures)}

## Figures
Held-out text, never trained on: {figures["heldout"]}.

| | |
|---|---|
{rows}

## Limits
The student knows what its teacher writes, and the given texts: its faults are the original's, and texts unlike these
lose most. Thresholds are not part of the weights: run densely, it gives the dense figure. Nothing but perplexity was
measured.
"""


def _form(figures: dict[str, Any]) -> str:
    r = figures["recipe"]
    form = "gated" if r["gated"] else "non-gated (two neurons for each of the original, of opposite sign)"
    trained = "FFN, norms and attention" if r.get("attention") else "FFN and norms"
    stock = "It loads in no stock class." if r["act"] == DRELU else "It loads in transformers and in coldstream."
    return (
        f"The FFN's {figures['teacher']['hidden_act']} is replaced by {form} {r['act']}.\n"
        f"{trained} are trained, the rest is the original's. {stock}"
    )


def _data(figures: dict[str, Any]) -> str:
    given = ", ".join(t["name"] for t in figures["texts"])
    share = f"\nGiven texts, {100 * figures['recipe']['text_share']:.0f} % of each batch: {given}." if given else ""
    return (
        "Texts that the original model wrote itself, from chat openers and the beginnings of given texts (without\n"
        f"any, from single tokens), temperature 0.8 to 1.{share} No label and no other model."
    )


def _procedure(figures: dict[str, Any]) -> str:
    r = figures["recipe"]
    where = f"{figures.get('processes', 1)} x {figures['device']}, {figures['seconds'] / 60:.1f} minutes"
    return (
        f"`coldstream sparsify` ({where}): {r['tokens']:,} tokens seen in windows of {r['window']},\n"
        f"{r['batch']} a step, optimiser {r.get('optimiser', 'adamw')}. Every layer was fitted to the original's; "
        "then KL to the\noriginal's logits, with a pressure on the number of active neurons; the last "
        f"{100 * r['served']:.0f} % of the steps with\nthresholds in place. All settings and the curve: `{FIGURES}`."
    )


def _card_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    result, teacher = figures["result"], figures["teacher"]
    yield "perplexity, original", f"{teacher['perplexity']:.3f}"
    yield "perplexity, dense", f"{result['perplexity_dense']:.3f}"
    yield "perplexity, thresholds in place", f"{result['perplexity_served']:.3f}"
    yield "perplexity, neurons chosen by 4-bit sketches", f"{result['perplexity_predicted']:.3f}"
    yield "neurons active, thresholds in place", f"{100 * result['active_heldout']:.1f} %"
    yield "neurons computed, chosen by 4-bit sketches", f"{100 * result['taken_heldout']:.1f} %"
    yield "CETT of these thresholds", f"{result['cett']:.3f}"
    yield "largest share of one neuron in a layer's contribution energy", f"{max(result['top_shares']):.2f}"
    more = {"the original's own texts": figures["samples"]} if "samples" in figures else {}
    for name, found in (more | figures.get("others", {})).items():
        three = [found[f"perplexity_{kind}"] for kind in ("teacher", "dense", "predicted")]
        yield f"perplexity of {name}: original, dense, by sketches", ", ".join(f"{value:.2f}" for value in three)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
