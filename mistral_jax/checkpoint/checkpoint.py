"""A checkpoint folder: `config.json`, `tokenizer.model` and `params/` (Orbax). It reads no PyTorch.

Arrays go straight from disk to their devices, in the dtype asked for.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mistral_jax.base import memory
from mistral_jax.base.fields import show
from mistral_jax.base.output import Progress
from mistral_jax.checkpoint import adapters, arrays, folder, manifest, precision, quantization, zarr
from mistral_jax.checkpoint.lora import apply
from mistral_jax.config import ModelConfig
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops.backend import PLAIN, Backend
from mistral_jax.ops.quantized import QuantizedMatrix
from mistral_jax.parallel import distributed
from mistral_jax.parallel.sharding import abstract_params, read_layout
from mistral_jax.tokens.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "nano"
# Fine-tuning adds tokens that a SentencePiece file lacks, and tables are padded to even sizes.
MOST_UNNAMED = 255
# What is read at once: large enough to keep the disk busy, small enough to show how it goes on.
_PART_BYTES = 1 << 30

Params = Mapping[str, Any]


def load(
    path: Path | str | None = None,
    *,
    sharding: Path | str | None = None,
    mesh: Mapping[str, int] | None = None,
    dtype: jnp.dtype | str | None = None,
    lora: Path | str | None = None,
    merge: bool = False,
    quantize: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Loads a model; of several processes, each reads its own part.

    Args:
      path: a checkpoint folder; None or "nano" = the small model that comes with this package.
      sharding: how to spread the arrays over all devices: a name from `configs/sharding/`, or a
        file like those; None = one device holds everything.
      mesh: sizes of that file's mesh axes, in place of its own: `{"tensor": 4}`.
      dtype: of parameters and computation. None = as stored; on a CPU, float32 if it fits, which
        is exact.
      lora: adapters of the model to use: a folder or a file, as `adapters.read` takes it.
      merge: whether to add their products to the weights, as fast as if there were none, and ready
        to be saved; else they stay matrices of their own, beside the weights.
      quantize: "int8" rounds the matrices of all projections and of the output to 8 bits, with a
        scale for each output, a layer at a time; None = they stay as they are.
      verify: whether to read all files for their checksums first, and look for numbers that are
        not finite; else sizes and descriptions alone are compared.
      progress: what to tell of the work's course; None = nothing. It is told which dtype was
        chosen where that is not the usual one, and of more than 1 GB how much is read.

    Returns:
      The model, its parameters, and its tokenizer (None if the folder has none).

    Raises:
      ValueError: the folder is no whole checkpoint of a format that this version knows, its parts
        do not fit each other, it does not fit in memory, or the adapters are not the model's.
    """
    quantization.check(quantize)
    path, progress = find(path), progress or Progress()
    config, _, described = manifest.examine(path)
    if merge and lora is None:
        raise ValueError("merge is True, but lora names no adapters to merge; name their folder")
    adapted = None if lora is None else adapters.read(lora, config)
    stored = arrays.stored(path / "params", described)
    check_layers(config, stored, path / "params")
    file = path / "tokenizer.model"
    tokenizer = read_tokenizer(file, config) if file.is_file() else None
    if tokenizer is not None:  # Earlier versions did not compare their ends.
        config = config.taught_to_end_with(tokenizer.eos_id)
    layout = read_layout(sharding, config, mesh=mesh)
    model = Transformer(config, rules=layout.rules if layout else (), backend=PLAIN)
    abstract = abstract_params(model, layout)
    if layout is None:
        device = jax.local_devices()[0]
        one = jax.sharding.SingleDeviceSharding(device)
        abstract = jax.tree.map(lambda array: array.update(sharding=one), abstract)
    small, flat = quantization.matrices(abstract, output=True), flatten_dict(stored)
    held = {place: small[place] for place in small if (*place, "values") in flat}
    rest = {place: small[place] for place in small if quantize and place not in held}
    abstract = quantization.abstract(abstract, held)
    check_shapes(shapes_of(quantization.split(abstract)), shapes_of(stored), path / "params")
    kept = quantization.abstract(abstract, rest)
    dtype = precision.choose(path, kept, stored, precision.check(dtype), progress.say)
    abstract = precision.typed(abstract, dtype)
    # On a CPU this compiles C++ kernels, once: after all checks that need no arrays.
    backend = layout.backend() if layout else Backend.of([device])
    sums = manifest.verify(path) if verify else {}
    params, size = {}, _bytes(abstract)
    with (progress if size > _PART_BYTES else Progress()).task(size) as advance:
        # What is to be quantised is read a layer at a time, for the whole may not fit.
        for names in _parts(abstract, 1 if rest else _PART_BYTES):
            part = quantization.split({name: abstract[name] for name in names})
            if verify and described is not None:
                own = {x: array for x, array in described.items() if x.split("/")[0] in part}
                zarr.verify(path / "params", sums, own)
            read = quantization.join(arrays.read(path / "params", part))
            params |= quantization.quantize(read, "int8", rest)
            advance(_bytes(part))
    if adapted is not None:
        params = apply(params, *adapted, merge)
    return model.clone(dtype=dtype, backend=backend), memory.to_large_pages(params), tokenizer


def save(
    path: Path | str,
    config: ModelConfig,
    params: Params,
    tokenizer_file: Path | str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model; the folder appears whole or not at all.

    Of several processes all must call it, and the first writes.

    Args:
      path: the folder to make.
      config: the architecture.
      params: the parameters, of any dtype, on any devices.
      tokenizer_file: SentencePiece model to copy into the folder.
      provenance: where the model is from, as JSON values.
      overwrite: whether a checkpoint at `path` may be replaced, if nothing else is in its folder.

    Raises:
      ValueError: something else is at `path`, or `params` are not those of `config`, or have
        adapters beside them, or are quantised to less than 8 bits.
    """
    if not isinstance(tokenizer_file, str | Path | None):
        raise ValueError(
            f"tokenizer_file is {show(tokenizer_file)}; expected the path of its file, such as "
            "the tokenizer.model of the folder that the model was loaded from"
        )
    for name, array in flatten_dict(params, sep="/").items():
        if "/lora_" in name:
            raise ValueError(
                f"params has {name}: save adapters by themselves, with adapters.save, or merge "
                "them first, with load(..., lora=..., merge=True)"
            )
        if isinstance(array, QuantizedMatrix) and array.values.dtype != jnp.int8:
            raise ValueError(f"params has {name} in 4 bits; save the model as it was before")
    model = Transformer(config, backend=PLAIN)
    abstract, flat = abstract_params(model), flatten_dict(params)
    small = quantization.matrices(abstract, output=True)
    held = {place: n for place, n in small.items() if isinstance(flat.get(place), QuantizedMatrix)}
    shapes = shapes_of(quantization.split(quantization.abstract(abstract, held)))
    params = quantization.split(params)
    check_shapes(shapes, shapes_of(params), "params")
    writers = []
    with contextlib.ExitStack() as stack:

        def begin():
            writer = create(path, config, shapes, tokenizer_file, provenance, overwrite)
            writers.append(stack.enter_context(writer))

        distributed.from_first(begin)
        for name, array in flatten_dict(params, sep="/").items():
            whole = distributed.gather(array)
            for write in writers:
                write(name, whole)
        distributed.from_first(stack.close)


@contextlib.contextmanager
def create(
    path: Path | str,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    tokenizer_file: Path | str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yields a function that writes one parameter after the other, by path and array.

    So a model can be saved that does not fit in memory. `shapes` are those of all its parameters,
    by path; the other arguments are those of `save`, and `provenance` is written last.
    """
    with folder.whole(path, manifest.kept if overwrite else None) as part:
        names = [tuple(name.split("/")) for name in shapes]
        sums = zarr.lay_out(part / "params", names, arrays.HANDLER)
        written = {}

        def write(name, array):
            written[name] = array.shape
            sums.update(zarr.write(part / "params", name, array))

        yield write
        check_shapes(shapes, written, path)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, part / "tokenizer.model")
        manifest.write(part, config, provenance or {}, sums)


def read_tokenizer(file: Path, config: ModelConfig) -> Tokenizer:
    """Reads the tokenizer of a model.

    Raises:
      ValueError: it is not one, or another model's.
    """
    tokenizer = Tokenizer.from_file(file, config.vocab_size)
    check_tokenizer(tokenizer, config, file)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, file: Path) -> None:
    """Raises what `read_tokenizer` raises of a tokenizer that was read from `file`."""
    unnamed = config.vocab_size - tokenizer.vocab_size
    if unnamed != config.unnamed_tokens and not 0 <= unnamed <= MOST_UNNAMED:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size} tokens; expected {config.vocab_size}, as the model "
            "has: put the model's own file there"
        )


def find(path: Path | str | None) -> Path:
    """Returns the folder that `load` means: of the bundled model, by its name too, or as it is."""
    if path is None or (str(path) == BUNDLED.name and not Path(path).exists()):
        return BUNDLED
    return Path(path)


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its path."""
    return {path: tuple(array.shape) for path, array in flatten_dict(params, sep="/").items()}


def check_layers(config: ModelConfig, stored: Params, where: Path) -> None:
    """Raises a ValueError if a config has another number of layers than there are arrays of."""
    found = sum(name.startswith("layers_") for name in stored)
    if found != config.num_layers:
        raise ValueError(
            f"{where} has {found} layers; expected {config.num_layers}, as config.json says"
        )


def check_shapes(expected: Mapping, found: Mapping, where: Path | str) -> None:
    """Raises a ValueError that names the first parameter whose shape is not what is expected."""
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where} has {found.get(name, 'nothing')} as {name}; expected "
                f"{expected.get(name, 'nothing')}"
            )


def _parts(abstract: Params, size: int) -> Iterator[list[str]]:
    """Divides the entries of a tree into parts of at least `size` bytes."""
    part: list[str] = []
    for name in abstract:
        part.append(name)
        if _bytes({name: abstract[name] for name in part}) >= size:
            yield part
            part = []
    if part:
        yield part


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
