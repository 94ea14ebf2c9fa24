"""llama.cpp beside us: decode timed, or a GGUF quantised. Run by a Python that has llama-cpp-python, and alone.

    PYTHON benchmarks/llama_cpp_decode.py decode MODEL.gguf [--tokens 4] [--threads 2]
    PYTHON benchmarks/llama_cpp_decode.py quantise MODEL.gguf --to q8_0|q4_0 --out OUT.gguf

decode: mmap, a prompt of ten tokens, then one token at a time; the last line is JSON. Knows nothing of the project.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path


def decode(options: argparse.Namespace) -> None:
    from llama_cpp import Llama

    llm = Llama(str(options.model), n_ctx=512, n_threads=options.threads, verbose=False, use_mmap=True)
    start = time.perf_counter()
    llm.eval(list(range(100, 110)))
    prompt_s = time.perf_counter() - start
    times = []
    for i in range(options.tokens + 1):
        start = time.perf_counter()
        llm.eval([1000 + i])
        times.append(time.perf_counter() - start)
    times = times[1:]
    found = {"model": options.model.name, "prompt_s": prompt_s, "s_per_token": statistics.median(times)}
    print(json.dumps(found | {"tokens_per_s": len(times) / sum(times), "tokens": len(times)}))


def quantise(options: argparse.Namespace) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[options.to]
    params.nthread = options.threads
    if llama_cpp.llama_model_quantize(str(options.model).encode(), str(options.out).encode(), params):
        raise SystemExit(f"{options.model}: cannot be quantised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["decode", "quantise"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--to", choices=["q8_0", "q4_0"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.verb == "quantise" and (options.to is None or options.out is None):
        parser.error("quantise needs --to and --out")
    (decode if options.verb == "decode" else quantise)(options)


if __name__ == "__main__":
    main()
