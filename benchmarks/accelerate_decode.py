"""accelerate's disk offload beside us: decode timed. Run by a Python that has accelerate and transformers, and alone.

    PYTHON -P benchmarks/accelerate_decode.py CHECKPOINT --memory BYTES --offload DIR [--tokens 3] [--threads 2]

Modules stay in main memory as far as --memory less RESERVED_BYTES go, in the model's order, the others are read from
the checkpoint's safetensors whenever they are run. The last line is JSON. -P, because a module in this folder has the
name of a package that transformers looks for. Knows nothing of the project.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

RESERVED_BYTES = (
    1_600_000_000  # of the limit: Python, torch and transformers, a layer being run, and what is on its way
)


def decode(options: argparse.Namespace) -> dict[str, Any]:
    import accelerate
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    kept = max(0, options.memory - RESERVED_BYTES)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": kept},
        offload_folder=options.offload,
        low_cpu_mem_usage=True,
    )
    model.eval()
    places = list(model.hf_device_map.values())
    with torch.no_grad():
        out, times = model(torch.arange(100, 110)[None], use_cache=True), []
        for i in range(options.tokens + 1):
            start = time.perf_counter()
            out = model(torch.tensor([[1000 + i]]), past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - start)
    times = times[1:]
    return {
        "s_per_token": statistics.median(times),
        "tokens_per_s": len(times) / sum(times),
        "tokens": len(times),
        "modules_on_disk": places.count("disk"),
        "modules": len(places),
        "versions": {"accelerate": accelerate.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--memory", type=int, required=True, help="bytes that the process may have")
    parser.add_argument("--offload", type=Path, required=True, help="directory for what has to be written anew")
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(decode(parser.parse_args())))


if __name__ == "__main__":
    main()
