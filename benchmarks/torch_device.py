"""Measures Transformers on one accelerator, for `device.py --transformers`.

The weights are random, in bfloat16. Decoding uses a static cache, with which Transformers compiles
its step on a GPU. PyTorch chooses the attention kernel. Prints one JSON line for each number of
rows and length of prompts.
"""

import argparse
import json
import time

import shapes
import torch
import transformers
from mistral_jax.convert import architecture

from mistral_jax.config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mistral-7b-v0.3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    config = ModelConfig.from_name(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        fields = architecture.to_hf(config) | {"attn_implementation": "sdpa"}
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).eval()
    model.generation_config.eos_token_id = None  # Every answer has the requested length.
    for batch in arguments.batch:
        for prompt in arguments.prompt:
            inputs = torch.tensor(shapes.prompts(config, batch, prompt), device=device)
            found = measure(model, inputs, arguments.tokens)
            print(json.dumps({"batch": batch, "prompt": prompt} | found), flush=True)


def measure(model, inputs: torch.Tensor, tokens: int) -> dict[str, float]:
    """Returns the tokens a second of prefill and of decoding."""
    mask = torch.ones_like(inputs)
    choice = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "pad_token_id": 0}

    def generate(count):
        options = choice | {"max_new_tokens": count, "min_new_tokens": count}
        model.generate(inputs, attention_mask=mask, cache_implementation="static", **options)

    with torch.inference_mode():
        read = seconds(lambda: model(inputs, use_cache=True, logits_to_keep=1))
        made = seconds(lambda: generate(tokens)) - seconds(lambda: generate(1))
    return {
        "prefill_tokens_per_second": round(inputs.numel() / read, 1),
        "decode_tokens_per_second": round(len(inputs) * (tokens - 1) / made, 1),
    }


def seconds(run) -> float:
    """Returns the seconds of the fastest of three runs, after a first run that compiles."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    main()
