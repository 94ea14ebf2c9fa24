"""What a user would take instead on the same GPU: transformers with accelerate's CPU offload. Knows a cap in bytes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.gpu_results import Figures
from benchmarks.make_checkpoint import Shape, config_json

PROMPT_TOKENS, TOKENS = 8, 5


@torch.no_grad()
def accelerate_offload(shape: Shape, vocab_size: int, gpu_bytes: int) -> Figures:
    """Decode, batch 1, of random weights: as many modules on the GPU as fit `gpu_bytes`, the others copied from main
    memory whenever they are run."""
    import accelerate
    import transformers

    model, config = random_model(shape, vocab_size)
    block = type(model.model.layers[0]).__name__
    places = accelerate.infer_auto_device_map(
        model, max_memory={0: gpu_bytes, "cpu": 1 << 40}, no_split_module_classes=[block], dtype=torch.bfloat16
    )
    model = accelerate.dispatch_model(model, places, main_device=0)
    on_gpu = sum(p.nbytes for p in model.parameters() if p.device.type == "cuda")
    times = decode_times(model, vocab_size)
    return {
        "tokens_per_s": 1 / statistics.median(times),
        "s_per_token": times,
        "gpu_budget_bytes": gpu_bytes,
        "weights_on_gpu_bytes": on_gpu,
        "layers_on_gpu": sum(places.get(f"model.layers.{i}") == 0 for i in range(config.num_hidden_layers)),
        "versions": {"accelerate": accelerate.__version__, "transformers": transformers.__version__},
    }


def random_model(shape: Shape, vocab_size: int, device: str = "cuda") -> tuple[Any, Any]:
    """In main memory, bf16, made on the device a tensor at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config_json(shape, vocab_size, 1, 2)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.bfloat16, device=device) * shape.hidden_size**-0.5)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were made without numbers
    return model.eval(), config


def decode_times(model: Any, vocab_size: int, device: str = "cuda") -> list[float]:
    """Seconds of each of TOKENS steps after a short prompt; reading the chosen token waits for the device."""
    ids = torch.randint(0, vocab_size, (1, PROMPT_TOKENS), device=device)
    out, times = model(ids, use_cache=True), []
    next_id = int(out.logits[0, -1].argmax())
    for _ in range(TOKENS):
        begin = time.perf_counter()
        out = model(torch.tensor([[next_id]], device=device), past_key_values=out.past_key_values, use_cache=True)
        next_id = int(out.logits[0, -1].argmax())
        times.append(time.perf_counter() - begin)
    return times
