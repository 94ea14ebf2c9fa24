"""Whether the contract holds end to end: perplexity, bytes and speed of a model as it is served, beside dense.

    python -m benchmarks.contract PACKED [--tokens 17408] [--decode 256] [--http-windows 2] [--out FILE]

Everything with the same memory beside what is resident anyway: 45 % of the FFN's bytes, of which a predictor has to be
paid; the slots get the rest. Perplexity goes through the engine's model (predictor, cache, streaming) on a text that
`prepare` never sees, paired token by token; the same windows are scored again over HTTP with `echo` and `logprobs`.
Bytes are those read while decoding. One JSON object, written and printed last. The share that is reported is read
bytes; a ceiling beside it: the bytes of the missing neurons alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.serving import serving
from cache.budget import detect_memory, process_bytes
from runtime.bench import bench
from runtime.load import LoadOptions, default_heldout
from runtime.packed import Packed, open_packed
from runtime.perplexity import WINDOW, perplexity
from runtime.plan import FfnCache, PlanOptions, make_plan
from runtime.tokenizer import Tokenizer

RESULTS = Path(__file__).resolve().parent / "results"
FFN_SHARE = 0.45
PROMPT_TOKENS = 64


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    packed = open_packed(options.packed)
    result = {
        "model": packed.source.path.rstrip("/").rpartition("/")[2],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
        "ffn_share": FFN_SHARE,
        "contract": packed.contract,
        "quality": quality(packed, load_options(packed, options, packed.mode), options.tokens),
        "decode": decode(packed, options),
    }
    if options.http_windows:
        result["http"] = over_http(packed, options)
    text = json.dumps(result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="a packed model")
    parser.add_argument("--tokens", type=int, default=17 * WINDOW, help="of the held-out text")
    parser.add_argument("--decode", type=int, default=256, help="tokens to decode after a prompt of 64")
    parser.add_argument("--http-windows", type=int, default=2, help="windows that are scored over HTTP too; 0: none")
    parser.add_argument("--threads", type=int, help="to compute with; all cores, unless given")
    parser.add_argument("--out", type=Path, help=f"JSON file, usually in {RESULTS.name}/")
    return parser.parse_args()


def slots(packed: Packed, mode: str) -> FfnCache:
    """FFN_SHARE of the FFN's bytes less the predictor's, which depends on how many neurons the slots let it pin."""
    ffn = packed.bundles.layer_bytes * packed.bundles.num_layers
    total, left = int(FFN_SHARE * ffn), int(FFN_SHARE * ffn)
    for _ in range(3):
        asked = PlanOptions(mode=mode, ffn_cache=FfnCache(num_bytes=left), max_model_len=WINDOW, max_num_seqs=1)
        sketches = packed.sketch_sizes(packed.cett)
        plan = make_plan(packed.config, packed.bundles.layout, asked, detect_memory(), process_bytes(), sketches)
        left = total - plan.predictor_bytes
    return FfnCache(num_bytes=left)


def load_options(packed: Packed, options: argparse.Namespace, mode: str) -> LoadOptions:
    cache = slots(packed, mode)
    return LoadOptions(mode=mode, ffn_cache=cache, max_model_len=WINDOW, max_num_seqs=1, threads=options.threads)


def quiet(what: str, share: float) -> None:
    """No progress bar."""


def quality(packed: Packed, options: LoadOptions, tokens: int) -> dict[str, Any]:
    """Dense, and what is served where that is sparse."""
    cetts = [packed.cett] if packed.mode == "sparse" else []
    return perplexity(str(packed.path), options, None, tokens, cetts, quiet)


def decode(packed: Packed, options: argparse.Namespace) -> dict[str, Any]:
    """What `auto` does beside dense at the same memory; the runs alternate, the second of each counts."""
    runs: dict[str, dict[str, Any]] = {}
    for name, mode in (("dense", "dense"), ("auto", packed.mode)) * 2:
        given = load_options(packed, options, mode)
        runs[name] = bench(str(packed.path), given, PROMPT_TOKENS, options.decode, None, quiet)
    dense, auto = runs["dense"], runs["auto"]
    return {
        "auto": auto,
        "dense": dense,
        "bytes_share": auto["bytes_read_per_token"] / max(1.0, dense["bytes_read_per_token"]),
        "needed_share": auto["needed_bytes_per_token"] / max(1.0, dense["bytes_read_per_token"]),
        "time_ratio": auto["s_per_token_median"] / dense["s_per_token_median"],
    }


def over_http(packed: Packed, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the first windows by echo and logprobs, and by the runtime itself."""
    tokens = options.http_windows * WINDOW
    ids = Tokenizer.from_dir(packed.path).encode(default_heldout().read_text(encoding="utf-8"), add_special=False)
    given = load_options(packed, options, packed.mode)
    cache = str((given.ffn_cache or FfnCache(num_bytes=0)).num_bytes)
    arguments = [str(packed.path), "--ffn-cache", cache, "--max-model-len", str(WINDOW), "--max-num-seqs", "1"]
    nll: list[float] = []
    with serving(arguments) as served, httpx.Client(base_url=served.url, timeout=600) as client:
        semantics = client.get("/v1/models").json()["data"][0]["coldstream"]
        for start in range(0, tokens, WINDOW):
            body = {"prompt": ids[start : start + WINDOW], "max_tokens": 0, "echo": True, "logprobs": 0}
            answer = client.post("/v1/completions", json=body)
            answer.raise_for_status()
            nll += [-lp for lp in answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]]
    itself = quality(packed, given, tokens)["rows"][-1]
    return {
        "tokens_scored": len(nll),
        "perplexity": math.exp(float(np.mean(nll))),
        "perplexity_of_the_runtime": itself["perplexity"],
        "pinned_share": semantics["pinned_share"],
        "mode": semantics["mode"],
        "cett": semantics["cett"],
    }


if __name__ == "__main__":
    main()
