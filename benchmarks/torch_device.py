"""Transformers' model on the weights of ours, and its speed, for `device.py --transformers`.

Both models share the memory of the weights. Decoding uses a static cache, with which Transformers
compiles its step on a GPU. PyTorch chooses the attention kernel.
"""

import time
from typing import Any

import numpy as np
import torch
import transformers
from mistral_jax.convert import architecture

from mistral_jax.checkpoint import names
from mistral_jax.config import ModelConfig


def model_of(config: ModelConfig, params: dict[str, Any]) -> transformers.MistralForCausalLM:
    """Builds Transformers' model on our bfloat16 arrays, which must stay where they are."""
    from flax.traverse_util import flatten_dict

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = architecture.to_hf(config) | {"attn_implementation": "sdpa"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).eval()
    flat = flatten_dict(params, sep="/")
    tensors = {
        weight.name(official=False): torch.from_dlpack(flat[weight.path]).reshape(
            weight.file_shape(config)
        )
        for weight in names.weights(config)
    }
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None  # Every answer has the requested length.
    return model


def logits(model, prompt: list[int]) -> np.ndarray:
    """Returns the logits of the token after a prompt, [V] float32."""
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        return model(ids, logits_to_keep=1).logits[0, -1].float().cpu().numpy()


def measure(model, prompts: list[list[int]], tokens: int, runs: int = 2) -> dict[str, float]:
    """Returns the tokens a second of prefill and of decoding."""
    inputs = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(inputs)
    choice = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "pad_token_id": 0}

    def generate(count):
        options = choice | {"max_new_tokens": count, "min_new_tokens": count}
        model.generate(inputs, attention_mask=mask, cache_implementation="static", **options)

    with torch.inference_mode():
        read = seconds(lambda: model(inputs, use_cache=True, logits_to_keep=1), runs)
        made = seconds(lambda: generate(tokens), runs) - seconds(lambda: generate(1), runs)
    return {
        "transformers_prefill_tokens_per_second": round(inputs.numel() / read, 1),
        "transformers_decode_tokens_per_second": round(len(inputs) * (tokens - 1) / made, 1),
    }


def seconds(run, runs: int) -> float:
    """Returns the seconds of the fastest of some runs, after a first run that compiles."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
