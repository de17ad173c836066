"""Completes the official files of Llama, which leave out sizes that other files state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def complete(found: dict[str, Any], raw: Mapping[str, Any], file: Path, tensors: Any) -> list[str]:
    """Adds the sizes that an official file of Llama leaves out, and returns notes about them.

    The width of the MLP follows from the model's width, as in Llama's reference implementation.
    """
    notes = []
    if "mlp_dim" not in found and "embed_dim" in found and raw.get("multiple_of"):
        step, width = raw["multiple_of"], int(2 * (4 * found["embed_dim"]) / 3)
        width = int((raw.get("ffn_dim_multiplier") or 1) * width)
        found["mlp_dim"] = step * -(-width // step)
    shapes = {"vocab_size": "tok_embeddings.weight", "mlp_dim": "layers.0.feed_forward.w1.weight"}
    for field, name in shapes.items():
        if field not in found and tensors and (places := tensors().get(name)):
            sizes = [place.array.shape[0] for place in places if place.array.ndim == 2]
            # Several files hold columns of the embedding, and rows of the MLP.
            found[field] = sizes[0] if field == "vocab_size" and sizes else sum(sizes)
            notes.append(f"{file.name} has no {field}: {found[field]}, as {name} has")
    return notes


def positions(theta: float, official: bool) -> int:
    """Returns the number of positions of a Llama that states none.

    Transformers takes 2048. Official files never state it: Llama 2 has 4096, CodeLlama 16384.
    """
    if not official:
        return 2048
    return 4096 if theta == 1e4 else 16384
