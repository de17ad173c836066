"""Adapters of experts in PEFT's files: stacked for all experts of a layer, or one for each expert.

With Transformers 5 PEFT adapts the parameters `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]
of a layer. A is then [E * R, in], with an expert's rows together, and B is [out, R * E], with an
expert's columns E apart. With Transformers 4 each expert's w1, w2 and w3 have an adapter.
"""

import re
from collections.abc import Mapping

import numpy as np

from mistral_jax.config import ModelConfig

_STACKED = re.compile(
    r"(.*model\.layers\.\d+)\.mlp\.experts(?:\.base_layer)?\.lora_A(?:\.default)?\.weight"
)
_ROUTER = re.compile(r"(.*model\.layers\.\d+)\.mlp\.gate\.(lora_[AB]\.weight)")


def separate(
    tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Replaces stacked adapters by those of each expert, under the names of Transformers 4.

    Args:
      tensors: the tensors of a file by name.
      config: the model.

    Returns:
      The tensors, and for each module that has another name in the file's config, that name.
    """
    found, modules = dict(tensors), {}
    if not config.num_experts:
        return found, modules
    for name in tensors:
        if match := _ROUTER.fullmatch(name):
            module = f"{match[1]}.block_sparse_moe.gate"
            found[f"{module}.{match[2]}"] = found.pop(name)
            modules[module] = f"{match[1]}.mlp.gate"
        elif match := _STACKED.fullmatch(name):
            other = name.replace("lora_A", "lora_B")
            if other in tensors and tensors[name].ndim == tensors[other].ndim == 2:
                a, b = found.pop(name), found.pop(other)
                _add(found, modules, match[1], a, b, config)
    return found, modules


def _add(found, modules, layer, a, b, config):
    count, inner, width = config.num_experts, config.mlp_dim, config.embed_dim
    shapes = {
        "gate_up_proj": (2 * inner, width),
        "down_proj": (width, inner),
    }
    name = next((n for n, s in shapes.items() if s == (len(b), a.shape[1])), None)
    if name is None or len(a) % count or len(a) != b.shape[1]:
        raise ValueError(
            f"{layer}.mlp.experts has adapters of {a.shape} and {b.shape}; expected those of "
            f"{count} experts of width {inner}: they are of another model"
        )
    a, b = a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count)
    parts = {"w2": slice(None)}
    if name == "gate_up_proj":
        parts = {"w1": slice(inner), "w3": slice(inner, None)}
    for matrix, rows in parts.items():
        for i in range(count):
            module = f"{layer}.block_sparse_moe.experts.{i}.{matrix}"
            found[f"{module}.lora_A.weight"] = a[i]
            found[f"{module}.lora_B.weight"] = b[rows, :, i]
            modules[module] = f"{layer}.mlp.experts.{name}"


def stack(each: Mapping[int, Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """Stacks the adapters of experts, with zeros where an expert has none or a smaller rank.

    Args:
      each: the adapter of some experts: `lora_a` [R, X] and `lora_b` [Y, R].
      count: number of experts.
    """
    rank = max(len(own["lora_a"]) for own in each.values())
    first = next(iter(each.values()))
    a = np.zeros((count, rank, first["lora_a"].shape[1]), np.float32)
    b = np.zeros((count, first["lora_b"].shape[0], rank), np.float32)
    for i, own in each.items():
        size = len(own["lora_a"])
        a[i, :size], b[i, :, :size] = own["lora_a"], own["lora_b"]
    return {"lora_a": a, "lora_b": b}
