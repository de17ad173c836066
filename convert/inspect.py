"""Describes a source or a checkpoint folder: model, tokenizer, sizes and problems."""

import collections
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from rich.filesize import decimal

from mistral_jax.base import DTYPES, memory
from mistral_jax.checkpoint import arrays, checkpoint, manifest, zarr
from mistral_jax.checkpoint.names import count_parameters
from mistral_jax.config import CONFIG_DIR, ModelConfig
from mistral_jax.model.cache import init_cache
from mistral_jax.tokens import storage
from mistral_jax.tokens.chat import ChatForm
from mistral_jax.tokens.tokenizer import Tokenizer

from . import architecture, chat, checks, tokens
from .checks import match
from .source import Source, find

# Fields that a fine-tune may change and still have the name of the released model.
_FREE = ("max_positions", "bos_id", "eos_id", "other_eos_ids", "unnamed_tokens")

Lines = Iterator[tuple[str, str]]


def inspect(
    folder: Path | str,
    format: str | None = None,
    lengths: Sequence[int] = (4096, 32768),
    rope_theta: float | None = None,
    verify: bool = False,
) -> Lines:
    """Yields the description of a folder.

    Args:
      folder: a source or a checkpoint.
      format: the checkpoint to describe if a source holds several (see `source.find`).
      lengths: text lengths in tokens for which to give the size of the cache.
      rope_theta: base of the rotary embedding, for sources that lack it.
      verify: whether to read all files of a checkpoint and compare them with their checksums.

    Yields:
      Pairs of a label and a text of one line.

    Raises:
      ValueError: the folder is neither, its config is not supported, or `verify` finds damage or
        is set for a source.
    """
    folder = Path(folder)
    yield "folder", str(folder)
    if manifest.is_checkpoint(folder):
        yield from _checkpoint(folder, lengths, verify)
    else:
        if verify:
            raise ValueError(
                f"{folder} is no checkpoint; only checkpoints have checksums to verify"
            )
        yield from _source(folder, format, lengths, rope_theta)


def _checkpoint(folder: Path, lengths: Sequence[int], verify: bool) -> Lines:
    config, provenance, described = manifest.examine(folder)
    yield "format", "checkpoint of mistral_jax (Orbax)"
    for key, value in provenance.items():
        if isinstance(value, str) and key != "rope_theta_from":
            yield key.replace("_", " "), value
    tree = arrays.stored(folder / "params", described)
    checkpoint.check_layers(config, tree, folder / "params")
    stored = flatten_dict(tree)
    quantized = [x for path, x in stored.items() if (*path[:-1], "values") in stored]
    yield from _model(config, _text(provenance, "rope_theta_from"), lengths, quantized)
    yield from _tokenizer(storage.find(folder), config, lambda _: manifest.read_chat(folder))
    yield from _stored(stored.values())
    if verify:
        yield "verified", _verified(folder, described)


def _text(provenance: Mapping[str, Any], key: str) -> str | None:
    return provenance[key] if isinstance(provenance.get(key), str) else None


def _verified(folder: Path, described: Mapping[str, zarr.Array] | None) -> str:
    """Verifies all files of a checkpoint and returns what was compared."""
    sums = manifest.verify(folder)
    if described is None:
        return "the sizes of all files; the first versions of this program recorded no checksums"
    zarr.verify(folder / "params", sums, described)
    if not sums:
        return f"{len(described)} arrays have finite numbers; it was written without checksums"
    return f"{len(described)} arrays in {len(sums)} files are as they were written"


def _source(
    folder: Path, format: str | None, lengths: Sequence[int], rope_theta: float | None
) -> Lines:
    found = find(folder, format)
    with tempfile.TemporaryDirectory() as scratch:
        yield from _unpacked(found.unpacked(Path(scratch)), lengths, rope_theta)


def _unpacked(source: Source, lengths: Sequence[int], rope_theta: float | None) -> Lines:
    others = "".join(f"; also {name} (see --format)" for name in source.other_formats)
    yield "format", f"{source.format}{others}"
    found = functools.cache(source.tensors)
    described = architecture.read(source.config_file, rope_theta, found)
    yield from _model(described.config, described.theta_origin, lengths)
    chosen = functools.partial(chat.choose, source)
    yield from _tokenizer(source.tokenizer_file, described.config, chosen)
    for note in described.notes:
        yield "note", note
    try:
        for note in tokens.read(source, described).notes:
            yield "note", note
    except ValueError as error:
        yield "problem", str(error)
    try:
        tensors = found()
        yield from _stored(place.array for places in tensors.values() for place in places)
        for note in checks.notes(tensors):
            yield "note", note
        match(source, tensors, described.config)
    except ValueError as error:
        yield "problem", str(error)


def _model(
    config: ModelConfig,
    theta_origin: str | None,
    lengths: Sequence[int],
    quantized: Collection[Any] = (),
) -> Lines:
    """Describes a model and the memory that it needs.

    Args:
      config: the architecture.
      theta_origin: source of the base of the rotary embedding.
      lengths: text lengths in tokens.
      quantized: int8 values and scales in the checkpoint, whose size does not depend on the dtype.
    """
    names = _names(config)
    yield "model", names[0] if names else "none of those that this program knows by name"
    if names[1:]:
        yield "same as", ", ".join(names[1:])
    yield "layers", f"{config.num_layers}, width {config.embed_dim}, MLP {config.mlp_dim}"
    if config.num_experts:
        chosen = f"of which {config.experts_per_token} compute each token"
        yield "experts", f"{config.num_experts} in each layer, {chosen}"
    heads = f"{config.num_heads} query and {config.num_kv_heads} key-value heads"
    yield "attention", f"{heads} of {config.head_dim}"
    windows = collections.Counter(zip(config.windows, config.dilations, strict=True))
    yield (
        "window",
        ", ".join(
            f"{window or 'all'} keys"
            + (f" {dilation} tokens apart" if dilation > 1 else "")
            + (f" in {count} layers" if len(windows) > 1 else "")
            for (window, dilation), count in windows.items()
        ),
    )
    yield "rope theta", f"{config.rope_theta:g}" + (f" ({theta_origin})" if theta_origin else "")
    if scaling := config.rope_scaling:
        fields = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
        yield "rope scaling", _list(fields)
    if config.query_scaling:
        yield "query scaling", _list(dataclasses.asdict(config.query_scaling))
    tied = " (input and output tied)" if config.tie_embeddings else ""
    yield "vocabulary", f"{config.vocab_size} tokens{tied}"
    count = count_parameters(config)
    active = count_parameters(config, active=True)
    yield (
        "parameters",
        f"{count:,}" + (f", of which {active:,} compute each token" if active < count else ""),
    )
    kept = sum(map(_bytes, quantized))
    loose = count - sum(math.prod(x.shape) for x in quantized if x.dtype == np.int8)
    needed = ", ".join(
        f"{decimal(kept + loose * np.dtype(dtype).itemsize)} as {dtype}" for dtype in DTYPES
    )
    needed += ", its matrices in int8" if quantized else ""
    free = memory.host_free()
    yield "to load", needed + (f"; this machine has {decimal(free)} free" if free else "")
    for length in lengths:
        cache = jax.eval_shape(lambda: init_cache(config, 1, length, jnp.bfloat16))  # noqa: B023
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        yield "cache", f"{decimal(size)} for a text of {length} tokens, in bfloat16"


def _tokenizer(
    file: Path | None, config: ModelConfig, chosen: Callable[[Tokenizer], ChatForm | None]
) -> Lines:
    if file is None:
        yield "tokenizer", "none (no SentencePiece file)"
        return
    tokenizer = Tokenizer.from_file(file, bos_id=config.bos_id, eos_id=config.eos_id)
    kind = "" if tokenizer.kind == "sentencepiece" else f"{tokenizer.kind} "
    version = tokenizer.version or "with control tokens of its own"
    yield "tokenizer", f"{kind}{version}, {tokenizer.vocab_size} tokens ({file.name})"
    tokenizer.chat = chosen(tokenizer)
    yield "chat form", tokenizer.chat_form


def _stored(tensors: Iterable[Any]) -> Lines:
    """Describes the size on disk of arrays, by dtype."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype)] += _bytes(tensor)
    yield "stored", ", ".join(f"{decimal(size)} of {dtype}" for dtype, size in sizes.items())


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _list(fields: Mapping[str, Any]) -> str:
    """Lists the values of a table by name."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in fields.items()
    )


def _names(config: ModelConfig) -> list[str]:
    """Returns the names of the released models with this architecture.

    General models come first: Mathstral, for instance, is a Mistral 7B v0.3 that was trained
    further.
    """
    files = [path.stem for path in (CONFIG_DIR / "models").glob("*.toml")]
    found = []
    for name in sorted(files, key=lambda name: (not name.startswith("mistral"), name)):
        known = ModelConfig.from_name(name)
        same = {field: getattr(config, field) for field in _FREE}
        if dataclasses.replace(known, **same) == config:
            found.append(name)
    return found
