"""Tiny models for tests: our config and params, mapped by hand from official fields and tensors.

The map of `convert/names.py` is written down again here, so that the two check each other.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import reference
import tokenizer_samples

from mistral_jax.config import ModelConfig, QueryScaling, RopeScaling
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.tokenizer import Tokenizer

OFFICIAL = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 44,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 53,
    "rope_theta": 1e4,
    "sliding_window": 5,
}
# The changes of the rotation and of the queries that Ministral 3 has, for short texts.
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta": 4.0,
    "alpha": 1.0,
    "apply_scale": False,
}
QUERIES = {"original_max_position_embeddings": 8, "beta": 0.1}


def build(seed: int = 0, tied: bool = False, dtype=jnp.float32, **fields):
    """Returns the model and the params of a random tiny Mistral; `fields` override `OFFICIAL`."""
    config = OFFICIAL | fields
    return from_official(config, reference.random_tensors(config, seed, tied), dtype)


def with_tokenizer(folder, more: int = 3):
    """Returns a tiny model on a device, its params, and a tokenizer that it trains in `folder`.

    The model has `more` tokens than the tokenizer, and layers with a window and without.
    """
    path = tokenizer_samples.train_small_mistral(folder / "tokenizer.model")
    tokenizer = Tokenizer.from_file(path)
    model, params = build(sliding_window=[5, None], vocab_size=tokenizer.vocab_size + more)
    return model, jax.tree.map(jnp.asarray, params), tokenizer


def from_official(config: dict, tensors: dict[str, np.ndarray], dtype=jnp.float32):
    """Builds our model and params from an official config and its tensors."""
    ours = ModelConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["n_layers"],
        embed_dim=config["dim"],
        mlp_dim=config["hidden_dim"],
        num_heads=config["n_heads"],
        num_kv_heads=config["n_kv_heads"],
        head_dim=config["head_dim"],
        rope_theta=config["rope_theta"],
        sliding_window=config["sliding_window"],
        norm_eps=config["norm_eps"],
        dilation=config.get("dilation", 1),
        tie_embeddings="output.weight" not in tensors,
        rope_scaling=_yarn(config.get("yarn")),
        query_scaling=_queries(config.get("llama_4_scaling")),
    )
    params = {
        "embed": {"embedding": tensors["tok_embeddings.weight"]},
        "final_norm": {"scale": tensors["norm.weight"]},
    }
    for i in range(ours.num_layers):
        params[f"layers_{i}"] = _layer(ours, lambda name, i=i: tensors[f"layers.{i}.{name}.weight"])
    if not ours.tie_embeddings:
        params["lm_head"] = {"kernel": tensors["output.weight"]}
    return Transformer(ours, dtype), jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens, positions, cache=None, logits_at=None):
    """Applies the model; the session compiles it once for each model and shape."""
    return model.apply({"params": params}, tokens, positions, cache, logits_at)


def alone(model, params, text):
    """Computes the logits [T, V] of one text, without padding, neighbours or a cache."""
    return forward(model, params, *ragged([text]))[0][0]


def ragged(rows):
    """Returns tokens and positions [B, T] of rows of different lengths, padded at the end."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    positions = np.full_like(tokens, -1)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        positions[i, : len(row)] = range(len(row))
    return jnp.asarray(tokens), jnp.asarray(positions)


def _yarn(table):
    if not table:
        return None
    applied = 0.1 * math.log(table["factor"]) + 1 if table["apply_scale"] else 1.0
    return RopeScaling(
        "yarn",
        table["factor"],
        original_positions=table["original_max_position_embeddings"],
        beta_fast=table["beta"],
        beta_slow=table["alpha"],
        attention_factor=applied,
    )


def _queries(table):
    return table and QueryScaling(table["beta"], table["original_max_position_embeddings"])


def _layer(config, take):
    def heads(name, count):
        return take(name).reshape(count, config.head_dim, config.embed_dim)

    def halves(kernel):  # moves the rotary pair (2j, 2j + 1) to (j, j + H/2)
        return np.concatenate([kernel[:, 0::2], kernel[:, 1::2]], axis=1)

    attn = {
        "q_proj": halves(heads("attention.wq", config.num_heads)),
        "k_proj": halves(heads("attention.wk", config.num_kv_heads)),
        "v_proj": heads("attention.wv", config.num_kv_heads),
        "o_proj": take("attention.wo").reshape(config.embed_dim, config.num_heads, config.head_dim),
    }
    mlp = {f"{ours}_proj": take(f"feed_forward.w{n}") for ours, n in _MLP.items()}
    return {
        "attn_norm": {"scale": take("attention_norm")},
        "attn": {name: {"kernel": kernel} for name, kernel in attn.items()},
        "mlp_norm": {"scale": take("ffn_norm")},
        "mlp": {name: {"kernel": kernel} for name, kernel in mlp.items()},
    }


_MLP = {"gate": 1, "down": 2, "up": 3}
