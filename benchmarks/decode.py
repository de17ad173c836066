"""Measures decoding: tokens a second beside Transformers, on the same weights, in turns.

One JSON line for each batch size. Both choose tokens at temperature 0.7 and top-p 0.95; the time
of the prompt and of compilation is left out. It needs the `parity` extra.

    python benchmarks/decode.py [--model 229M|nano] [--dtype float32|bfloat16] [--batch 1 8]
        [--quantize int8]
"""

import argparse
import time

import peers
import torch

from mistral_jax import quantization
from mistral_jax.generation.generate import generate
from mistral_jax.generation.sampling import Sampling

PROMPT = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=peers.MODELS, default="229M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--quantize", choices=("int8",), help="ours; Transformers' stays as it is")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    config = peers.MODELS[arguments.model]
    model, params, theirs = peers.build(config, arguments.dtype)
    if arguments.quantize:
        which = quantization.kernels(params, output=True)
        params = quantization.quantize(params, arguments.quantize, which)
    for batch in arguments.batch:
        prompts = peers.prompts(config, batch, PROMPT)
        ours_rates, their_rates = [], []
        for _ in range(arguments.rounds + 1):
            ours_rates.append(batch * ours(model, params, prompts, arguments.tokens))
            their_rates.append(batch * transformers(theirs, prompts, arguments.tokens))
        about = {"benchmark": "decode", "model": arguments.model, "dtype": arguments.dtype}
        about |= {"quantize": arguments.quantize}
        peers.report(about | {"batch": batch}, ours_rates, their_rates)


def ours(model, params, prompts, tokens: int) -> float:
    """Returns the steps a second of our batch loop, after the first token."""
    rows = generate(model, params, prompts, tokens, sampling=Sampling(), stop_ids=())
    return (tokens - 1) / (rows[0].seconds - rows[0].first_seconds)


def transformers(model, prompts, tokens: int) -> float:
    """Returns the steps a second of Transformers, after the first token."""
    inputs = torch.tensor(prompts)

    def seconds(count):
        start = time.perf_counter()
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
            top_k=0,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    return (tokens - 1) / (seconds(tokens) - seconds(1))


if __name__ == "__main__":
    main()
