"""Converts a checkpoint folder to a PyTorch checkpoint, official or Hugging Face's."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mistral_jax.base.output import Advance, Progress
from mistral_jax.checkpoint import arrays, entries, folder, manifest, safetensors_file, zarr
from mistral_jax.checkpoint.checkpoint import check_shapes, read_tokenizer
from mistral_jax.checkpoint.names import Weight, groups, weights
from mistral_jax.config import ModelConfig
from mistral_jax.tokens import storage
from mistral_jax.tokens.tokenizer import Tokenizer

from . import architecture, hf_tokenizer
from .checks import check_finite
from .source import TOKENIZERS

# Names of the files of both formats and of tokenizers. A folder with other files is not replaced.
# The files of chat templates, as Transformers names them.
_TEMPLATES = {
    "default": "chat_template.jinja",
    "tool_use": "additional_chat_templates/tool_use.jinja",
}
_FILES = re.compile(
    r"(config|params|generation_config|tokenizer|tokenizer_config|added_tokens|special_tokens_map|tekken)\.json"
    r"|[\w.-]+\.model(\.v\d+\w*)?|chat_template\.jinja"
    r"|additional_chat_templates/tool_use\.jinja"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|consolidated\.safetensors"
)


def to_torch(
    checkpoint: Path | str,
    target: Path | str,
    *,
    format: str = "hf",
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Converts a checkpoint folder to a PyTorch one, which appears complete or not at all.

    Args:
      checkpoint: the folder to read.
      target: the folder to make.
      format: "hf" (config.json, model*.safetensors, and the tokenizer files of Transformers) or
        "official" (params.json and consolidated.safetensors).
      dtype: dtype of the tensors; None = unchanged.
      shard_bytes: maximum bytes of tensors in one file of the "hf" format.
      overwrite: whether to replace a PyTorch checkpoint at `target` that this function made, if
        its folder holds nothing else.
      progress: receives messages and the bytes done; None = nothing is shown.

    Raises:
      ValueError: the checkpoint is incomplete or damaged; the format or the dtype cannot represent
        it; `target` exists; or its disk is too small.
    """
    progress, checkpoint, official = progress or Progress(), Path(checkpoint), format == "official"
    kept = _kept if overwrite else None
    folder.check_target(target, kept)
    config, provenance, arrays_on_disk = manifest.examine(checkpoint)
    vocabulary = storage.find(checkpoint)
    tokenizer = read_tokenizer(vocabulary, config) if vocabulary else None
    if tokenizer is not None:
        config = config.taught_to_end_with(tokenizer.eos_id)
    if official:
        described = architecture.to_official(config)
    else:
        described = architecture.to_hf(config, provenance.get("model_type", architecture.MISTRAL))
    stored = flatten_dict(arrays.stored(checkpoint / "params", arrays_on_disk), sep="/")
    if any(path.endswith("/values") for path in stored):
        raise ValueError(
            f"{checkpoint} is rounded to 8 bits, which PyTorch's formats do not hold; export one "
            "that is not quantized"
        )
    dtypes = {path: np.dtype(dtype or array.dtype) for path, array in stored.items()}
    table, found = weights(config), {path: array.shape for path, array in stored.items()}
    expected = {weight.path: weight.parameter_shape(config) for weight in table}
    check_shapes(expected, found, checkpoint)
    sums = manifest.verify(checkpoint)

    def verify(paths: set[str]) -> None:
        own = {path: array for path, array in (arrays_on_disk or {}).items() if path in paths}
        zarr.verify(checkpoint / "params", sums, own)

    sizes = [math.prod(weight.shape(config)) * dtypes[weight.path].itemsize for weight in table]
    folder.check_space(target, sum(sizes))

    with folder.whole(target, kept) as part, progress.task(sum(sizes)) as advance:
        tensors = _tensors(checkpoint, config, dtypes, official, arrays_on_disk, verify, advance)
        if official:
            shards = {"consolidated.safetensors": table}
        else:
            shards = _shards(table, sizes, shard_bytes)
        for file, shard in shards.items():
            heads = {
                weight.name(official): (weight.file_shape(config), dtypes[weight.path])
                for weight in shard
            }
            safetensors_file.write(part / file, heads, tensors)
        if len(shards) > 1:
            places = {
                weight.name(official): file for file, shard in shards.items() for weight in shard
            }
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
            _write_json(part / "model.safetensors.index.json", index)
        if not official:
            described["torch_dtype"] = dtypes[table[0].path].name
            ends = {name: described[name] for name in ("bos_token_id", "eos_token_id")}
            _write_json(part / "generation_config.json", ends)
        _write_json(part / ("params.json" if official else "config.json"), described)
        if tokenizer is not None and tokenizer.chat is not None and not official:
            for key, text in tokenizer.chat.templates.items():
                file = part / _TEMPLATES[key]
                file.parent.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="")
        if tokenizer is not None and tokenizer.kind != "sentencepiece":
            storage.copy(vocabulary, part)
        elif tokenizer is not None:
            # mistral-common reads the version of a tokenizer from the suffix of its file name.
            name = provenance.get("tokenizer")
            name = name if official and name in TOKENIZERS else vocabulary.name
            shutil.copyfile(vocabulary, part / name)
            if not official:
                _write_tokenizer(part, vocabulary.read_bytes(), tokenizer, config, progress)


def _tensors(
    checkpoint: Path,
    config: ModelConfig,
    dtypes: dict[str, np.dtype],
    official: bool,
    described: Mapping[str, zarr.Array] | None,
    verify: Callable[[set[str]], None],
    advance: Advance,
) -> Iterator[np.ndarray]:
    """Yields the tensors of the target in the order of the forward pass.

    It verifies one layer at a time, and reads one layer or the matrix of one expert at a time, so
    that memory stays bounded.
    """
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    for group in groups(config):
        abstract = {
            weight.path: jax.ShapeDtypeStruct(
                weight.shape(config), dtypes[weight.path], sharding=host
            )
            for weight in group
            if weight.expert is None
        }
        verify({weight.path for weight in group})
        layer = flatten_dict(
            arrays.read(checkpoint / "params", unflatten_dict(abstract, sep="/")), sep="/"
        )
        for weight in group:
            if weight.expert is None:
                array = np.asarray(layer.pop(weight.path))
            else:
                array = entries.read(described[weight.path], weight.expert)
                with np.errstate(over="ignore"):  # `check_finite` reports overflow.
                    array = array.astype(dtypes[weight.path])
            check_finite(array, f"{weight.path} of {checkpoint} as {array.dtype}")
            advance(array.nbytes)
            yield weight.to_file(array, config, official)


def _write_tokenizer(
    part: Path, data: bytes, tokenizer: Tokenizer, config: ModelConfig, progress: Progress
) -> None:
    """Writes the tokenizer files that Transformers reads in place of `tokenizer.model`."""
    files, problem = hf_tokenizer.files(data, tokenizer, config)
    if problem:
        progress.say(
            f"tokenizer.json is not written because {problem}; Transformers needs sentencepiece "
            "and protobuf to read tokenizer.model"
        )
    for name, contents in files.items():
        _write_json(part / name, contents)


def _shards(weights: list[Weight], sizes: list[int], limit: int) -> dict[str, list[Weight]]:
    """Assigns weights to files of at most `limit` bytes; a larger weight has its own file."""
    shards, size = [[]], 0
    for weight, bytes_ in zip(weights, sizes, strict=True):
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += bytes_
    if len(shards) == 1:
        return {"model.safetensors": weights}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _kept(path: Path) -> str | None:
    """Returns why `to_torch` must not replace a folder, or None if it may."""
    if reason := folder.foreign(path, _FILES):
        return reason
    files = [file for file in sorted(path.glob("*.safetensors")) if not folder.is_stray(file.name)]
    for file in files:
        if not safetensors_file.is_ours(file):
            return f"has {file.name}, which this program did not write"
    return None if files else "has no tensors that this program wrote"


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
