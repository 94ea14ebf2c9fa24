"""Exported models in few, small files and back, for a machine that gives back only so much: int8 rows with fp16 scales.

    python benchmarks/relu2_wins/compact.py pack --models /tmp/relu2_wins/export --out compact --names relu reglu
    python benchmarks/relu2_wins/compact.py unpack --models compact --out /tmp/relu2_wins/export

A matrix becomes int8 rows, each with the scale that brings its largest weight to 127; everything else stays as it is.
`unpack` writes the fp16 checkpoints again. Knows files and names, not what the models are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHARD_BYTES = 15 << 20
_SCALE = ".row_scale"
_TEXTS = ("config.json", "tokenizer_config.json")


def quantised(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """int8 [R, C] and fp16 scales [R] of a matrix; a vector as it is."""
    if tensor.dim() != 2:
        return {name: tensor}
    scale = (tensor.float().abs().amax(dim=1) / 127).clamp_min(1e-7).half()  # [R]
    codes = (tensor.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return {name: codes.to(torch.int8), name + _SCALE: scale}


def restored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp16 tensors of what `quantised` made."""
    scales = {name.removesuffix(_SCALE): t for name, t in tensors.items() if name.endswith(_SCALE)}
    plain = {name: t for name, t in tensors.items() if not name.endswith(_SCALE)}
    return {n: (t.float() * scales[n].float()[:, None]).half() if n in scales else t for n, t in plain.items()}


def shards(tensors: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of at most SHARD_BYTES; what comes together stays together."""
    shard: dict[str, torch.Tensor] = {}
    for group in tensors:
        if shard and sum(t.nbytes for t in (*shard.values(), *group.values())) > SHARD_BYTES:
            yield shard
            shard = {}
        shard |= group
    yield shard


def read_all(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def pack(folder: Path, out: Path) -> None:
    """OUT/NAME-0.safetensors, -1, ..; the texts of the checkpoint are in the first one's metadata."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {name: (folder / name).read_text() for name in _TEXTS if (folder / name).is_file()}
    for i, shard in enumerate(shards(quantised(*pair) for pair in read_all(folder))):
        save_file(shard, out / f"{folder.name}-{i}.safetensors", metadata={} if i else texts)


def unpack(compact: Path, name: str, out: Path) -> None:
    """The checkpoint in OUT/NAME; its tokenizer.json, the same for all, is put there by hand."""
    paths = sorted(compact.glob(f"{name}-*.safetensors"))
    (out / name).mkdir(parents=True, exist_ok=True)
    with safe_open(paths[0], "pt") as first:
        for file, text in first.metadata().items():
            (out / name / file).write_text(text)
    weight_map = {}
    for path in paths:
        tensors = restored(load_file(path))
        save_file(tensors, out / name / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / name / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("pack", "unpack"))
    parser.add_argument("--models", type=Path, required=True, help="pack: the exports; unpack: the small files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="*", help="none: all")
    options = parser.parse_args(argv)
    if options.verb == "pack":
        for name in options.names or sorted(p.name for p in options.models.iterdir()):
            pack(options.models / name, options.out)
    else:
        found = {p.stem.rpartition("-")[0] for p in options.models.glob("*.safetensors")}
        for name in options.names or sorted(found):
            unpack(options.models, name, options.out)


if __name__ == "__main__":
    main()
