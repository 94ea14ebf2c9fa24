"""Adds to results of benchmarks/gpu.py what the reference policy misses on the same trace with the same slots.

    python -m benchmarks.gpu_reference GPU.JSON --parts .gpu

Takes seconds of CPU for each step, which is why it does not run where a GPU waits. Knows traces and counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu_floors import reference_misses
from benchmarks.gpu_results import Figures, Results
from benchmarks.make_checkpoint import SHAPES
from benchmarks.traces import Replay, Trace

TRACES = {"afm-4.5b": "trace-relu2.npz", "llama-7b": "trace-third.npz"}
TAKEN = "trace-taken.npz"  # of the first, with the predictor's misses and false alarms


def add_reference(figures: Figures, replay: Replay) -> Figures:
    """The figures of a decode step, with the reference's misses a step and the share over them."""
    reference = reference_misses(
        replay, figures["slots_per_layer"], figures["warm_steps"], figures["steps"], figures["rows"]
    )
    over = figures["misses_per_step"] / reference if reference else None
    return figures | {"reference_misses_per_step": reference, "misses_over_reference": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--parts", type=Path, default=Path(".gpu"), help="folder of the traces")
    options = parser.parse_args()
    results = Results(options.results)
    data = results.read()
    for shape, file in TRACES.items():
        config = SHAPES[shape]
        replay = Replay(Trace.read(options.parts / file), config.num_hidden_layers, config.intermediate_size)
        for name, figures in data["steps"].items():
            if name.startswith(shape) and "slots_per_layer" in figures:
                data["steps"][name] = add_reference(figures, replay)
                print(name, data["steps"][name]["misses_over_reference"], flush=True)
    results.write(data)


if __name__ == "__main__":
    main()
