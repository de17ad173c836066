"""Writes golden/*.npz: logits and greedy continuations of tiny random models by Transformers.

Needs torch and Transformers (`pip install '.[parity]'`). Weights are not stored:
`reference.random_tensors` draws them from the seed.
"""

import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parent))

import hf_reference  # noqa: E402  (it lies one folder up)
import reference  # noqa: E402
import tiny  # noqa: E402

BASE = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 44,
    "vocab_size": 57,
    "norm_eps": 1e-5,
}
YARN = {"head_dim": 16, "yarn": tiny.YARN}
CASES = {  # name: seed, query heads, kv heads, window, theta, what differs from BASE
    "mha": (23, 4, 4, 5, 1e4, {}),
    "gqa_wide_heads": (27, 6, 2, 7, 1e4, {"head_dim": 10}),
    "gqa_tied": (14, 4, 2, 8, 1e4, {}),
    "gqa_no_window": (16, 8, 2, None, 1e6, {}),
    "mqa_long_base": (25, 3, 1, 6, 1e6, {"norm_eps": 1e-3}),
    "windows_by_layer": (22, 4, 1, [None, 4], 1e8, {}),
    "yarn_queries": (31, 4, 2, None, 1e3, YARN | {"llama_4_scaling": tiny.QUERIES}),
    "yarn_scaled_tied": (40, 4, 4, 9, 1e4, YARN | {"yarn": tiny.YARN | {"apply_scale": True}}),
}
NEW_TOKENS = 48  # six of the widest windows


def main() -> None:
    for name, (seed, *values, fields) in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        keys = ("n_heads", "n_kv_heads", "sliding_window", "rope_theta")
        config = BASE | dict(zip(keys, values, strict=True)) | fields
        tied = "tied" in name
        model = hf_reference.build(config, reference.random_tensors(config, seed, tied))
        windows = config["sliding_window"]
        window = (windows[-1] if isinstance(windows, list) else windows) or 5
        rng = np.random.default_rng(seed)
        arrays = {"about": json.dumps({"config": config, "seed": seed, "tied": tied})}
        for length in (1, window - 1, window, window + 1, 3 * window + 2):
            tokens = rng.integers(config["vocab_size"], size=length, dtype=np.int32)
            arrays[f"tokens_{length}"] = tokens
            arrays[f"logits_{length}"] = hf_reference.logits(model, tokens)
        greedy = hf_reference.greedy(model, tokens, NEW_TOKENS)
        check_margins(hf_reference.logits(model, [*tokens, *greedy])[len(tokens) - 1 : -1])
        np.savez_compressed(GOLDEN / name, greedy=np.array(greedy, np.int32), **arrays)
        print(f"{name}: {len(set(greedy))} of the {NEW_TOKENS} new tokens differ")


def check_margins(logits: np.ndarray) -> None:
    """Refuses a greedy continuation whose choice rounding could change."""
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    if (first - second).min() < 1e-3 * np.abs(logits).max():
        raise ValueError("a greedy choice is nearly tied: take another seed")


if __name__ == "__main__":
    main()
