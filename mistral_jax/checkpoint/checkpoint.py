"""Load and save models in checkpoint folders: `config.json`, a tokenizer, `params/` (Orbax).

Arrays are read from disk directly onto their devices, in the dtype of the caller's choice.
PyTorch checkpoints are converted first (`mistral_jax.convert`).
"""

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from mistral_jax.tokens import storage
from mistral_jax.tokens.chat import ChatForm
from mistral_jax.tokens.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "nano"
# The most tokens that a model may have beyond those of its tokenizer's file: fine-tuning adds
# tokens, and tables are padded to round sizes.
MOST_UNNAMED = 255
# Bytes read at a time: enough to keep the disk busy, and few enough to show progress.
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
    chat_form: str | None = None,
    progress: Progress | None = None,
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Loads a model. With several processes, each reads its own part of the arrays.

    Args:
      path: a checkpoint folder; None or "nano" = the small model that comes with this package.
      sharding: how to partition the arrays over all devices: a name from `configs/sharding/`, or
        the path of such a file; None = one device holds everything.
      mesh: sizes of the mesh axes, to override those of the sharding file: `{"tensor": 4}`.
      dtype: dtype of the parameters and of computation. None = as stored; but on a CPU float32, in
        which it computes exactly, if that fits in memory.
      lora: adapters to use with the model: a folder or a file, as for `adapters.read`.
      merge: whether to add the adapters to the weights, which costs no time in use and can be
        saved; else they stay separate matrices beside the weights.
      quantize: "int8" quantises the matrices of all projections and of the output, with a scale for
        each output, one layer at a time; None = they stay as they are.
      verify: whether to compare the checksums of all files first, and refuse numbers that are not
        finite; else only the files' sizes and descriptions are checked.
      chat_form: name of the form of conversations (`tokens.chat.NAMES`), to override the
        checkpoint's; None = as the checkpoint says.
      progress: reports the progress of loading more than 1 GB, and the dtype if it is not the usual
        one; None = no reports.

    Returns:
      The model, its parameters, and its tokenizer (None if the folder has none).

    Raises:
      ValueError: the folder is not a complete checkpoint of a known format, its parts do not fit
        each other, the model does not fit in memory, or the adapters are for another model.
    """
    quantization.check(quantize)
    path, progress = find(path), progress or Progress()
    config, _, described = manifest.examine(path)
    if merge and lora is None:
        raise ValueError("merge is True, but lora names no adapters to merge; name their folder")
    adapted = None if lora is None else adapters.read(lora, config)
    stored = arrays.stored(path / "params", described)
    check_layers(config, stored, path / "params")
    file = storage.find(path)
    tokenizer = read_tokenizer(file, config) if file else None
    if tokenizer is not None and chat_form is not None:
        tokenizer.chat_form = chat_form
    if tokenizer is not None:  # Earlier versions did not check the end token.
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
    # On a CPU this may compile the C++ kernels, so it follows all checks that need no arrays.
    backend = layout.backend() if layout else Backend.of([device])
    sums = manifest.verify(path) if verify else {}
    params, size = {}, _bytes(abstract)
    with (progress if size > _PART_BYTES else Progress()).task(size) as advance:
        # Matrices to be quantised are read one layer at a time: all of them may not fit in memory.
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
    chat: ChatForm | None = None,
) -> None:
    """Saves a model in a folder, which appears whole or not at all.

    With several processes all must call it, and the first one writes.

    Args:
      path: the folder to make.
      config: the architecture.
      params: the parameters, in any dtype, on any devices.
      tokenizer_file: the tokenizer's file, to copy into the folder.
      provenance: the origin of the model, as JSON values.
      overwrite: whether to replace a checkpoint at `path`, if its folder holds nothing else.
      chat: the chat form, such as `tokenizer.chat`; None = that of the checkpoint that
        `tokenizer_file` is in, if any.

    Raises:
      ValueError: something else is at `path`, or `params` do not fit `config`, hold adapters, or
        are quantised to less than 8 bits.
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
    found = chat
    if found is None and tokenizer_file and manifest.is_checkpoint(Path(tokenizer_file).parent):
        found = manifest.read_chat(Path(tokenizer_file).parent)
    writers = []
    with contextlib.ExitStack() as stack:

        def begin():
            writer = create(path, config, shapes, tokenizer_file, provenance, overwrite, found)
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
    chat: ChatForm | None = None,
) -> Iterator[Callable[..., None]]:
    """Yields a function that writes one parameter, given its path and array.

    A model that does not fit in memory can so be saved one array at a time. With an index as its
    third argument, the function writes one entry of a parameter, such as the matrix of one expert.

    Args:
      path: the folder to make.
      config: the architecture.
      shapes: the shapes of all parameters, by path.
      tokenizer_file: the tokenizer's file, to copy into the folder.
      provenance: the origin of the model, as JSON values. It is written last, so the caller may add
        to it until then.
      overwrite: whether to replace a checkpoint at `path`, if its folder holds nothing else.
      chat: the chat form; None = that of the tokenizer's version.
    """
    with folder.whole(path, manifest.kept if overwrite else None) as part:
        names = [tuple(name.split("/")) for name in shapes]
        sums = zarr.lay_out(part / "params", names, arrays.HANDLER)
        written, entries = {}, collections.Counter()

        def write(name, array, index=None):
            entry = None if index is None else (index, shapes[name][0])
            entries[name] += entry is not None
            written[name] = array.shape if entry is None else (entries[name], *array.shape)
            sums.update(zarr.write(part / "params", name, array, entry))

        yield write
        check_shapes(shapes, written, path)
        if tokenizer_file is not None:
            storage.copy(tokenizer_file, part)
        manifest.write(part, config, provenance or {}, sums, chat)


def read_tokenizer(file: Path, config: ModelConfig) -> Tokenizer:
    """Reads the tokenizer of a model from its checkpoint folder, with the chat form of the folder.

    Raises:
      ValueError: the file is not a tokenizer, or is that of another model.
    """
    ends = {"bos_id": config.bos_id, "eos_id": config.eos_id}
    tokenizer = Tokenizer.from_file(file, config.vocab_size, **ends)
    check_tokenizer(tokenizer, config, file)
    tokenizer.chat = manifest.read_chat(file.parent)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, file: Path) -> None:
    """Raises a ValueError if a tokenizer that was read from `file` is that of another model."""
    unnamed = config.vocab_size - tokenizer.vocab_size
    if unnamed != config.unnamed_tokens and not 0 <= unnamed <= MOST_UNNAMED:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size} tokens; expected {config.vocab_size}, as the model "
            "has: put the model's own file there"
        )


def find(path: Path | str | None) -> Path:
    """Returns the folder that `load` reads: that of the bundled model for None or its name."""
    if path is None or (str(path) == BUNDLED.name and not Path(path).exists()):
        return BUNDLED
    return Path(path)


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its path."""
    return {path: tuple(array.shape) for path, array in flatten_dict(params, sep="/").items()}


def check_layers(config: ModelConfig, stored: Params, where: Path) -> None:
    """Raises a ValueError if the stored arrays have another number of layers than the config."""
    found = sum(name.startswith("layers_") for name in stored)
    if found != config.num_layers:
        raise ValueError(
            f"{where} has {found} layers; expected {config.num_layers}, as config.json says"
        )


def check_shapes(expected: Mapping, found: Mapping, where: Path | str) -> None:
    """Raises a ValueError that names the first parameter whose shape differs from the expected."""
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
