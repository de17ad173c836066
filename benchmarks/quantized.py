"""Measures what int8 costs in quality: bits per byte on held-out source, and distance to float32.

The distance is the Kullback-Leibler divergence of the next token's distribution from that in
float32, in nats, and the share of tokens whose likeliest next token is the same. Both are means
over all tokens.

    python benchmarks/quantized.py [--checkpoint FOLDER] [--every N] [--cache]
"""

import argparse
import functools
import json

import heldout
import jax
import jax.numpy as jnp
import numpy as np

import mistral_jax

BLOCK = 512  # lengths of texts are rounded up to a multiple, so that few programs compile


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="default: the bundled model")
    parser.add_argument("--every", type=int, default=5, help="read only every Nth file")
    parser.add_argument("--cache", action="store_true", help="measure the cache, not the weights")
    arguments = parser.parse_args()

    model, exact, tokenizer = mistral_jax.load(arguments.checkpoint, dtype="float32")
    if arguments.cache:
        small = model.clone(kv_cache_dtype="int8"), exact
    else:
        rough = mistral_jax.load(arguments.checkpoint, dtype="float32", quantize="int8")[1]
        small = model, rough
    texts = heldout.held_out(heldout.TOOLS)[0][:: arguments.every]
    totals, size = np.zeros(5), 0
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        tokens = np.zeros((1, -(-len(ids) // BLOCK) * BLOCK), np.int32)
        positions = np.full_like(tokens, -1)
        tokens[0, : len(ids)], positions[0, : len(ids)] = ids, range(len(ids))
        totals += np.asarray(compare(model, exact, *small, tokens, positions))
        size += len(text.encode())
    count, exact_nats, rough_nats, divergence, same = totals
    result = {
        "bytes": size,
        "tokens": int(count),
        "float32_bits_per_byte": round(exact_nats / np.log(2) / size, 4),
        "int8_bits_per_byte": round(rough_nats / np.log(2) / size, 4),
        "divergence": float(f"{divergence / count:.3g}"),
        "same_likeliest": round(same / count, 4),
        "float32_megabytes": round(megabytes(exact), 1),
        "int8_megabytes": round(megabytes(small[1]), 1),
    }
    print(json.dumps(result))


@functools.partial(jax.jit, static_argnums=(0, 2))
def compare(model, exact, small, rough, tokens, positions):
    """Returns sums over the tokens of a text: their count, both losses, divergence, and matches."""
    p, q = (
        jax.nn.log_softmax(logits(model, params, tokens, positions)[0, :-1])
        for model, params in ((model, exact), (small, rough))
    )
    counted = positions[0, 1:] >= 0
    losses = [-jnp.take_along_axis(x, tokens[0, 1:, None], axis=1)[:, 0] for x in (p, q)]
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=1)
    same = jnp.argmax(p, axis=1) == jnp.argmax(q, axis=1)
    each = [jnp.ones_like(divergence), *losses, divergence, same]
    return jnp.stack([jnp.sum(jnp.where(counted, x, 0)) for x in each])


def logits(model, params, tokens, positions):
    cache = None
    if model.kv_cache_dtype:
        cache = mistral_jax.init_cache(model.config, 1, tokens.shape[1], jnp.int8)
    return model.apply({"params": params}, tokens, positions, cache)[0]


def megabytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6


if __name__ == "__main__":
    main()
