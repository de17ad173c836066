"""A checkpoint folder: `config.json`, `tokenizer.model` and `params/` (Orbax). It reads no PyTorch.

Arrays go straight from disk to their devices, in the dtype asked for.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mistral_jax import (
    adapters,
    arrays,
    distributed,
    folder,
    manifest,
    pages,
    precision,
    quantization,
)
from mistral_jax.config import ModelConfig
from mistral_jax.fields import show
from mistral_jax.model.quantized import QuantizedKernel
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import abstract_params, read_layout
from mistral_jax.tokenizer import Tokenizer
from mistral_jax.training.lora import apply

BUNDLED = Path(__file__).resolve().parent / "assets" / "nano"
# Fine-tuning adds tokens that a SentencePiece file lacks, and tables are padded to even sizes.
_MOST_UNNAMED_TOKENS = 255

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
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Loads a model; of several processes, each reads its own part.

    Args:
      path: a checkpoint folder; None = the small model that comes with this package.
      sharding: how to spread the arrays over all devices: a name from `configs/sharding/`, or a
        file like those; None = one device holds everything.
      mesh: sizes of that file's mesh axes, in place of its own: `{"tensor": 4}`.
      dtype: of parameters and computation. None = as stored; on a CPU, float32 if it fits, which
        is exact.
      lora: adapters of the model to use: a folder or a file, as `adapters.read` takes it.
      merge: whether to add their products to the kernels, as fast as if there were none, and ready
        to be saved; else they stay matrices of their own, beside the kernels.
      quantize: "int8" rounds the kernels of all projections and of the output to 8 bits, with a
        scale for each output, a layer at a time; None = they stay as they are.

    Returns:
      The model, its parameters, and its tokenizer (None if the folder has none).

    Raises:
      ValueError: the folder is no whole checkpoint of a format that this version knows, its parts
        do not fit each other, it does not fit in memory, or the adapters are not the model's.
    """
    quantization.check(quantize)
    path = Path(BUNDLED if path is None else path)
    config, _ = manifest.read(path)
    if merge and lora is None:
        raise ValueError("merge is True, but lora names no adapters to merge; name their folder")
    adapted = None if lora is None else adapters.read(lora, config)
    stored = arrays.stored(path / "params")
    file = path / "tokenizer.model"
    tokenizer = read_tokenizer(file, config) if file.is_file() else None
    layout = read_layout(sharding, config, mesh=mesh)
    model = Transformer(config, rules=layout.rules if layout else ())
    abstract = abstract_params(model, layout)
    if layout is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda array: array.update(sharding=one), abstract)
    small, flat = quantization.kernels(abstract, output=True), flatten_dict(stored)
    held = {place: small[place] for place in small if (*place, "values") in flat}
    rest = {place: small[place] for place in small if quantize and place not in held}
    abstract = quantization.abstract(abstract, held)
    _check_shapes(_shapes(quantization.split(abstract)), _shapes(stored), str(path / "params"))
    kept = quantization.abstract(abstract, rest)
    dtype = precision.choose(path, kept, stored, precision.check(dtype))
    abstract = precision.typed(abstract, dtype)
    params = {}
    # What is to be quantised is read in parts, for the whole may not fit.
    for names in ([name] for name in abstract) if rest else [abstract]:
        part = quantization.split({name: abstract[name] for name in names})
        read = quantization.join(arrays.read(path / "params", part))
        params |= quantization.quantize(read, "int8", rest)
    if adapted is not None:
        params = apply(params, *adapted, merge)
    return model.clone(dtype=dtype), pages.move(params), tokenizer


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
      overwrite: whether a checkpoint at `path` may be replaced.

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
        if isinstance(array, QuantizedKernel) and array.values.dtype != jnp.int8:
            raise ValueError(f"params has {name} in 4 bits; save the model as it was before")
    abstract, flat = abstract_params(Transformer(config)), flatten_dict(params)
    small = quantization.kernels(abstract, output=True)
    held = {place: n for place, n in small.items() if isinstance(flat.get(place), QuantizedKernel)}
    shapes = _shapes(quantization.split(quantization.abstract(abstract, held)))
    params = quantization.split(params)
    _check_shapes(shapes, _shapes(params), "params")
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
    with folder.whole(path, manifest.is_checkpoint if overwrite else None) as part:
        arrays.lay_out(part / "params", unflatten_dict(dict.fromkeys(shapes), sep="/"))
        written = {}

        def write(name, array):
            written[name] = array.shape
            arrays.write(part / "params", name, array)

        yield write
        _check_shapes(shapes, written, str(path))
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, part / "tokenizer.model")
        manifest.write(part, config, provenance or {})


def read_tokenizer(file: Path, config: ModelConfig) -> Tokenizer:
    """Reads the tokenizer of a model.

    Raises:
      ValueError: it is not one, or another model's.
    """
    tokenizer = Tokenizer.from_file(file)
    if not 0 <= config.vocab_size - tokenizer.vocab_size <= _MOST_UNNAMED_TOKENS:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size} tokens; expected {config.vocab_size}, as the model "
            "has: put the model's own file there"
        )
    return tokenizer


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its path."""
    return {path: tuple(array.shape) for path, array in flatten_dict(params, sep="/").items()}


def _check_shapes(expected: Mapping, found: Mapping, where: str) -> None:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where} has {found.get(name, 'nothing')} as {name}; expected "
                f"{expected.get(name, 'nothing')}"
            )
