"""A PyTorch checkpoint becomes an Orbax one, a layer at a time. It computes nothing but casts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import mistral_jax
from mistral_jax import checkpoint
from mistral_jax.config import ModelConfig

from . import architecture, names
from .source import Source, Tensor, find


def to_orbax(
    folder: Path | str,
    target: Path | str,
    *,
    format: str | None = None,
    dtype: str | None = None,
    rope_theta: float | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Converts a source folder into a checkpoint folder.

    Args:
      folder: the source.
      target: the checkpoint folder to make.
      format: which checkpoint of a folder that holds several (see `source.find`).
      dtype: to cast every tensor to; None = as in the source.
      rope_theta: base of the rotary embedding, where the source does not say.
      overwrite: whether a checkpoint at `target` may be replaced.
      say: called with each sentence that a user should know.

    Raises:
      ValueError: the source is not a whole and finite checkpoint of a known architecture, or
        `target` is taken.
    """
    source = find(folder, format)
    if source.other_formats:
        others = ", ".join(source.other_formats)
        say(f"{source.folder} is read as {source.format} (--format: {others})")
    arch = architecture.read(source.config_file, rope_theta)
    for note in arch.notes:
        say(note)
    config, tensors = arch.config, source.tensors()
    check(source, tensors, config)
    provenance = {
        "source_format": source.format,
        "rope_theta_origin": arch.theta_origin,
        "converter": f"mistral_jax {mistral_jax.__version__}",
    }
    with checkpoint.create(target, config, source.tokenizer_file, provenance, overwrite) as add:
        for group in names.groups(config):
            arrays = {row.path: read(row, source, tensors, config, dtype) for row in group}
            add(unflatten_dict(arrays, sep="/"))


def check(source: Source, tensors: Mapping[str, list[Tensor]], config: ModelConfig) -> None:
    """Makes sure that the source has the tensors of the model, of the right shape, and no others."""
    left = dict(tensors)
    for group in names.groups(config):
        for row in group:
            name = row.official if source.official else row.hf
            places = left.pop(name, None)
            if places is None:
                raise ValueError(
                    f"{source.folder} has no tensor {name}; expected {names.file_shape(row, config)}"
                )
            whole = list(names.file_shape(row, config))
            if row.split is not None:
                whole[row.split] //= len(places)
            for file, array in places:
                if array.shape != tuple(whole):
                    raise ValueError(
                        f"tensor {name} in {file} is {array.shape}; expected {tuple(whole)}"
                    )
    for name in left:
        if not names.IGNORABLE.fullmatch(name):
            raise ValueError(
                f"tensor {name} in {left[name][0].file} is no part of this architecture"
            )


def read(
    row: names.Row,
    source: Source,
    tensors: Mapping[str, list[Tensor]],
    config: ModelConfig,
    dtype: Any,
) -> np.ndarray:
    """Reads one array of the model."""
    places = tensors[row.official if source.official else row.hf]
    parts = [place.array for place in places]
    whole = parts[0] if len(parts) == 1 or row.split is None else np.concatenate(parts, row.split)
    array = names.from_file(row, whole, config, source.official)
    return np.require(array, None if dtype is None else jnp.dtype(dtype), ["C", "A"])
