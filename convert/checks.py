"""Checks that the tensors of a source are exactly the weights of a model."""

import re
from collections.abc import Mapping

import numpy as np
from rich.filesize import decimal

from mistral_jax.base import DTYPES
from mistral_jax.checkpoint.names import EMBED, HEAD, Weight, weights
from mistral_jax.config import ModelConfig

from . import experts, fp8
from .source import Source, Tensor

# Tables of rotary angles, one per layer or one per model: the model computes them.
IGNORABLE = re.compile(
    r"(.*\.)?rope\.freqs|(.*\.)?rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)", re.DOTALL
)
# The parts of a model that read images, in Hugging Face's and in official files.
VISION = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector)\..+"
    r"|(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..+",
    re.DOTALL,
)
# LoRA weights, in official and in Hugging Face's files.
ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


def match(
    source: Source, tensors: Mapping[str, list[Tensor]], config: ModelConfig
) -> dict[Weight, list[Tensor]]:
    """Maps each weight of a model to its tensor: one, or its part in each file.

    Raises:
      ValueError: a tensor is missing, has the wrong shape or dtype, or is not part of the model.
    """
    if adapted := next(filter(ADAPTER.search, tensors), None):
        raise ValueError(
            f"tensor {adapted} in {tensors[adapted][0].file} is an adapter's; expected a whole "
            "model: convert the base model, and load the adapters together with it"
        )
    tensors = experts.separate(tensors, config)
    # The files of the first Mixtral hold whole tensors. Those of other models hold parts of all.
    whole = config.num_experts > 0 and all(len(places) == 1 for places in tensors.values())
    matched, unused = {}, dict(tensors)
    for weight in weights(config):
        name, shape = weight.name(source.official), weight.file_shape(config)
        if name not in unused:
            raise ValueError(f"{source.folder} has no tensor {name}; expected one of {shape}")
        matched[weight] = unused.pop(name)
        _check_places(name, matched[weight], shape, weight.shard_axis, source, whole)
    if config.tie_embeddings:
        _check_tied(unused.pop(HEAD.name(source.official), []), matched[EMBED], config, source)
    for name, places in unused.items():
        if not any(known.fullmatch(name) for known in (IGNORABLE, VISION, fp8.IGNORABLE)):
            raise ValueError(
                f"tensor {name} {places[0].array.shape} in {places[0].file} is no part of this "
                f"model; expected only those of {config.num_layers} layers"
            )
    return matched


def notes(tensors: Mapping[str, list[Tensor]]) -> list[str]:
    """Returns messages about tensors that are left out, or stored in another form than ours."""
    said = []
    images = [places for name, places in tensors.items() if VISION.fullmatch(name)]
    if images:
        size = sum(place.array.nbytes for places in images for place in places)
        said.append(
            f"the {len(images)} tensors that read images, {decimal(size)}, are left out: the text "
            "model is converted"
        )
    scaled = sum(places[0].scale is not None for places in tensors.values())
    if scaled:
        said.append(
            f"{scaled} matrices in FP8 become bfloat16, times their scales; activations are not "
            "rounded"
        )
    return said


def check_finite(array: np.ndarray, where: str) -> None:
    """Checks that an array has no infinities and no NaNs.

    Args:
      array: an array of any shape and a floating dtype.
      where: name of the array for error messages.

    Raises:
      ValueError: some values are not finite; the message has their number and the first of them.
    """
    # Without the sign, the bits of a value that is not finite are at least those of infinity.
    # Comparing bits as integers allocates no memory and runs at memory speed: unsigned to find
    # negative values, signed to find positive ones.
    bits = array.view(f"u{array.itemsize}")
    infinity, negative = np.array([np.inf, -np.inf], array.dtype).view(bits.dtype)
    if bits.max() < negative and bits.view(f"i{array.itemsize}").max() < infinity:
        return
    bad = ~np.isfinite(array)
    first = tuple(int(i[0]) for i in bad.nonzero())
    raise ValueError(
        f"{where} has {int(bad.sum())} values that are not finite, first {array[first]} at {first}"
    )


def _check_places(
    name: str,
    places: list[Tensor],
    shape: tuple[int, ...],
    shard_axis: int | None,
    source: Source,
    whole: bool = False,
) -> None:
    parts = source.format == "official-torch" and not whole
    if len(places) != len(source.weight_files) and parts:
        raise ValueError(
            f"tensor {name} is in {len(places)} of {len(source.weight_files)} parts of "
            f"{source.folder}; expected a part of it in each"
        )
    if shard_axis is not None:
        shape = tuple(n // len(places) if i == shard_axis else n for i, n in enumerate(shape))
    for place in places:
        file, array = place.file, place.array
        if array.shape != shape:
            raise ValueError(f"tensor {name} in {file} is {array.shape}; expected {shape}")
        if array.nbytes > file.stat().st_size:
            raise ValueError(
                f"tensor {name} in {file} has {array.nbytes} bytes, more than its file: it repeats "
                "stored values; expected every value to be stored"
            )
        if place.dtype.name not in DTYPES:
            raise ValueError(
                f"tensor {name} in {file} is {place.dtype}; expected {' or '.join(DTYPES)}"
            )
        if shard_axis is None and place is not places[0] and not _equal(place, places[0]):
            raise ValueError(f"tensor {name} differs between {places[0].file} and {file}")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.array.tobytes() == other.array.tobytes()


def _check_tied(
    head: list[Tensor], embed: list[Tensor], config: ModelConfig, source: Source
) -> None:
    """Checks that a stored output projection of a tied model equals the embedding."""
    if not head:
        return
    name = HEAD.name(source.official)
    _check_places(name, head, HEAD.file_shape(config), HEAD.shard_axis, source)
    copy, table = (
        weight.join([place.read() for place in places])
        for weight, places in ((HEAD, head), (EMBED, embed))
    )
    if copy.tobytes() != table.tobytes():
        raise ValueError(
            f"tensor {name} in {head[0].file} differs from the embedding, but "
            f"{source.config_file} says that they are tied"
        )
