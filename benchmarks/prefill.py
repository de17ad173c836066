"""Measures reading a prompt: tokens a second beside Transformers, on the same weights, in turns.

One JSON line for each prompt length; compilation is left out. It needs the `parity` extra.

    python benchmarks/prefill.py [--model 229M|nano] [--dtype float32|bfloat16] [--length 512 2048]
"""

import argparse
import time

import jax
import peers
import torch

from mistral_jax.generation.prefill import prefill


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=peers.MODELS, default="229M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, nargs="+", default=[100, 512, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    config = peers.MODELS[arguments.model]
    model, params, theirs = peers.build(config, arguments.dtype)
    for length in arguments.length:
        prompts = peers.prompts(config, arguments.batch, length)
        inputs = torch.tensor(prompts)

        def ours(prompts=prompts):
            jax.block_until_ready(prefill(model, params, prompts, len(prompts[0]) + 1))

        def transformers(inputs=inputs):
            with torch.no_grad():
                theirs(inputs, use_cache=True, logits_to_keep=1)

        tokens = arguments.batch * length
        rounds = [
            (rate(ours, tokens), rate(transformers, tokens)) for _ in range(arguments.rounds + 1)
        ]
        about = {"benchmark": "prefill", "model": arguments.model, "dtype": arguments.dtype}
        about |= {"batch": arguments.batch, "length": length}
        peers.report(about, *zip(*rounds, strict=True))


def rate(run, tokens: int) -> float:
    """Returns tokens a second of one run."""
    start = time.perf_counter()
    run()
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
