"""An independent forward pass of Mistral: NumPy in float64, slow, and plain enough to check by eye.

It follows the paper (arXiv:2310.06825) and the official files: their tensor and config names,
interleaved rotary pairs, and one loop over heads and queries. It shares no code with the package,
and has no cache and no batch.
"""

import math

import numpy as np


def forward(config: dict, tensors: dict[str, np.ndarray], tokens) -> np.ndarray:
    """Computes the logits [T, V] of one sequence.

    Args:
      config: fields of `params.json`, and `rope_theta`; `yarn` and `llama_4_scaling` as in files of
        Ministral 3. `sliding_window` may be a list with one entry per layer, and so may `dilation`,
        which no official file has.
      tensors: float32 arrays by official name; without `output.weight` the output is tied to the
        embedding.
      tokens: T token ids.
    """
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = w["tok_embeddings.weight"][np.asarray(tokens)]
    for i in range(config["n_layers"]):
        layer = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if f"layers.{i}." in n}
        x = x + attention(config, layer, rms_norm(config, x, layer["attention_norm.weight"]), i)
        x = x + feed_forward(layer, rms_norm(config, x, layer["ffn_norm.weight"]))
    output = w.get("output.weight", w["tok_embeddings.weight"])
    return rms_norm(config, x, w["norm.weight"]) @ output.T


def attention(config: dict, layer: dict[str, np.ndarray], x: np.ndarray, i: int) -> np.ndarray:
    """Computes the attention of layer i: each query head over the keys in its window."""
    length, dim = len(x), config["head_dim"]
    window = config["sliding_window"]
    window = window[i] if isinstance(window, list) else window
    dilation = config.get("dilation", 1)
    dilation = dilation[i] if isinstance(dilation, list) else dilation
    q = (x @ layer["attention.wq.weight"].T).reshape(length, config["n_heads"], dim)
    k = (x @ layer["attention.wk.weight"].T).reshape(length, config["n_kv_heads"], dim)
    v = (x @ layer["attention.wv.weight"].T).reshape(length, config["n_kv_heads"], dim)
    q, k = rotate(q, *turns(config)), rotate(k, *turns(config))
    if scaling := config.get("llama_4_scaling"):
        spans = np.arange(length) // scaling["original_max_position_embeddings"]
        q = q * (1 + scaling["beta"] * np.log(1 + spans))[:, None, None]
    out = np.zeros_like(q)
    for head in range(config["n_heads"]):
        kv_head = head // (config["n_heads"] // config["n_kv_heads"])
        for t in range(length):
            seen = range(t, -1, -dilation)[:window]  # `window` keys, t's own included
            scores = k[seen, kv_head] @ q[t, head] / math.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[seen, kv_head]
    return out.reshape(length, -1) @ layer["attention.wo.weight"].T


def turns(config: dict) -> tuple[np.ndarray, float]:
    """Returns the radians that each pair turns by per position, and the factor of its length.

    With YaRN (arXiv 2309.00071), pairs that turn rarely within the original length turn `factor`
    times more slowly, pairs that turn often do not, and between them the share rises linearly.
    """
    dim, theta, yarn = config["head_dim"], config["rope_theta"], config.get("yarn")
    plain = np.array([theta ** (-2 * j / dim) for j in range(dim // 2)])
    if not yarn:
        return plain, 1.0

    def pair(rotations):
        around = yarn["original_max_position_embeddings"] / (2 * math.pi * rotations)
        return math.log(around) / math.log(theta) * dim / 2

    first, last = math.floor(pair(yarn["beta"])), math.ceil(pair(yarn["alpha"]))
    first, last = max(first, 0), min(last, dim - 1)
    slowed = [min(max((j - first) / (last - first), 0), 1) for j in range(dim // 2)]
    changed = [
        f * (1 - share + share / yarn["factor"]) for f, share in zip(plain, slowed, strict=True)
    ]
    return np.array(changed), 0.1 * math.log(yarn["factor"]) + 1 if yarn["apply_scale"] else 1.0


def rotate(x: np.ndarray, frequencies: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """Rotates each pair (2j, 2j + 1) of x [T, heads, head_dim] by t * frequencies[j]."""
    angles = np.outer(np.arange(len(x)), frequencies)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * factor * np.exp(1j * angles)[:, None, :]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def feed_forward(layer: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Returns w2(silu(w1 x) * w3 x)."""
    gate = x @ layer["feed_forward.w1.weight"].T
    up = x @ layer["feed_forward.w3.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ layer["feed_forward.w2.weight"].T


def rms_norm(config: dict, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Divides x by the root mean square of its last axis, and multiplies it by `weight`."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["norm_eps"]) * weight


def random_tensors(config: dict, seed: int, tied: bool = False) -> dict[str, np.ndarray]:
    """Draws float32 weights that keep activations near unit scale.

    The numbers come from the raw bits of PCG64, which NumPy promises never to change, so golden
    files can hold a seed instead of weights.
    """
    bits = np.random.PCG64(seed)

    def uniform(*shape):
        raw = bits.random_raw(math.prod(shape)) >> np.uint64(40)  # 24 bits are exact in float32
        return (raw.astype(np.float32) * np.float32(2**-23) - 1).reshape(shape)

    def matrix(rows, columns):
        return uniform(rows, columns) * np.float32(math.sqrt(3 / columns))

    def norm():
        return np.float32(1) + uniform(config["dim"]) * np.float32(0.5)

    dim, hidden = config["dim"], config["hidden_dim"]
    heads, kv_heads = (config[n] * config["head_dim"] for n in ("n_heads", "n_kv_heads"))
    # With a larger embedding, a tied output would mostly repeat the token that was read.
    tensors = {"tok_embeddings.weight": uniform(config["vocab_size"], dim) * np.float32(0.25)}
    for i in range(config["n_layers"]):
        layer = {
            "attention_norm": norm(),
            "attention.wq": matrix(heads, dim),
            "attention.wk": matrix(kv_heads, dim),
            "attention.wv": matrix(kv_heads, dim),
            "attention.wo": matrix(dim, heads),
            "ffn_norm": norm(),
            "feed_forward.w1": matrix(hidden, dim),
            "feed_forward.w2": matrix(dim, hidden),
            "feed_forward.w3": matrix(hidden, dim),
        }
        tensors |= {f"layers.{i}.{name}.weight": value for name, value in layer.items()}
    tensors["norm.weight"] = norm()
    if not tied:
        tensors["output.weight"] = matrix(config["vocab_size"], dim)
    return tensors
