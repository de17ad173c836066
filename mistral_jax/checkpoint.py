"""A checkpoint folder: `config.json`, `tokenizer.model` and `params/` (Orbax). It reads no PyTorch.

All of Orbax is behind this file. Arrays are restored straight onto their devices, in their dtype.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from mistral_jax import folder, memory
from mistral_jax.config import ModelConfig, read_json
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokenizer import Tokenizer

FORMAT_VERSION = 1
BUNDLED = Path(__file__).resolve().parent / "assets" / "nano"

# Fine-tuning adds a few tokens that its tokenizer file lacks, and tables are padded to even sizes.
_MOST_UNNAMED_TOKENS = 255

Params = Mapping[str, Any]


def load(
    path: Path | str | None = None,
    *,
    sharding: str | None = None,
    dtype: jnp.dtype | str | None = None,
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Loads a model.

    Args:
      path: a checkpoint folder; None = the small model that comes with this package.
      sharding: rules that spread the arrays over all devices; None = the default device holds them.
      dtype: of parameters and computation. None = as stored; but float32 on a CPU that has the
        memory, where it is as fast and more exact.

    Returns:
      The model, its parameters, and its tokenizer (None where the folder has none).

    Raises:
      ValueError: the folder is not a whole checkpoint of a format that this version knows, its
        parts do not fit each other, or memory does not suffice.
    """
    path = BUNDLED if path is None else Path(path)
    config, _ = read_config(path)
    tokenizer = _tokenizer(path, config)
    stored = stored_arrays(path, config)
    dtype = _dtype(dtype, stored)
    device = jax.devices()[0]
    single = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, dtype, sharding=single), stored
    )
    _check_memory(path, abstract)
    params = restore(path, abstract)
    return Transformer(config, dtype), params, tokenizer


def save(
    path: Path | str,
    config: ModelConfig,
    params: Params,
    tokenizer_file: Path | str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model; the folder appears whole or not at all.

    Args:
      path: the folder to make.
      config: the architecture.
      params: the parameters, of any dtype, on any devices.
      tokenizer_file: SentencePiece model to copy into the folder.
      provenance: what is known of the origin, as JSON values.
      overwrite: whether a checkpoint at `path` may be replaced.

    Raises:
      ValueError: something is at `path` already, or `params` are not those of `config`.
    """
    _check_shapes(_flat(abstract_params(config)), _flat(params), "params")
    with create(path, config, tokenizer_file, provenance, overwrite) as add:
        add(params)


@contextlib.contextmanager
def create(
    path: Path | str,
    config: ModelConfig,
    tokenizer_file: Path | str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Iterator[Callable[[Params], None]]:
    """Yields a function that writes one part of the parameters, and forgets it, at each call.

    So a model can be saved that does not fit in memory. Arguments as for `save`; `provenance` may
    still be filled while the block runs.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False  # 3x the speed for a fifth more bytes.
    context.memory.deepcopy_host_arrays = False  # `add` returns when all is written.

    with folder.whole(path, is_checkpoint if overwrite else None) as part:

        def add(params: Params) -> None:
            with context:
                ocp.partial.save(part / "params", params)

        yield add
        with context:
            ocp.partial.finalize(part / "params")
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, part / "tokenizer.model")
        contents = {"format_version": FORMAT_VERSION, "model": config.to_dict()}
        contents["provenance"] = dict(provenance or {})
        text = json.dumps(contents, indent=2, ensure_ascii=False)
        (part / "config.json").write_text(text + "\n", encoding="utf-8")


def is_checkpoint(path: Path | str) -> bool:
    """Tells whether a folder has the two parts that only a checkpoint has."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "params").is_dir()


def read_config(path: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `config.json` of a checkpoint folder: the architecture, and the provenance.

    Raises:
      ValueError: the folder is no whole checkpoint, or one of a later format.
    """
    path = Path(path)
    file = path / "config.json"
    if not is_checkpoint(path):
        raise ValueError(_not_a_checkpoint(path))
    contents = read_json(file)
    version = contents.get("format_version")
    if not isinstance(version, int):
        raise ValueError(f"{file} has no format_version: save the checkpoint again")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} is a checkpoint of format {version}; this version of mistral_jax reads up to "
            f"{FORMAT_VERSION}: update it"
        )
    return ModelConfig.from_dict(contents["model"], str(file)), contents.get("provenance", {})


def abstract_params(config: ModelConfig) -> Params:
    """Returns the tree of parameters as shapes without arrays."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), token, token)
    return nn.unbox(variables)["params"]


def stored_arrays(path: Path | str, config: ModelConfig) -> Params:
    """Returns the tree of parameters in a checkpoint folder, as shapes and dtypes.

    Raises:
      ValueError: they are not those of `config`.
    """
    path = Path(path) / "params"
    try:
        stored = ocp.metadata(path).metadata
    except (ocp.errors.InvalidLayoutError, ValueError, OSError) as error:
        raise ValueError(f"{path} holds no whole set of arrays: {_first_line(error)}") from None
    expected = abstract_params(config)
    _check_shapes(_flat(expected), _flat(stored), str(path))
    return jax.tree.map(
        lambda like, array: jax.ShapeDtypeStruct(like.shape, array.dtype), expected, stored
    )


def restore(path: Path | str, abstract: Params) -> Params:
    """Reads parameters of a checkpoint folder.

    Args:
      path: the folder.
      abstract: shapes and dtypes, with shardings for JAX arrays or without for NumPy's, of all
        parameters or of a part of the tree.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(Path(path).absolute() / "params", abstract)


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    file = path / "tokenizer.model"
    if not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(file)
    unnamed = config.vocab_size - tokenizer.vocab_size
    if not 0 <= unnamed <= _MOST_UNNAMED_TOKENS:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: it is "
            "another model's; put the right one there, or none"
        )
    return tokenizer


def _dtype(dtype: jnp.dtype | str | None, stored: Params) -> jnp.dtype:
    if dtype is not None:
        return jnp.dtype(dtype)
    leaves = jax.tree.leaves(stored)
    if jax.default_backend() == "cpu":
        free = memory.host_free()
        if free is None or 4 * sum(array.size for array in leaves) <= free:
            return jnp.dtype(jnp.float32)
    return max(leaves, key=lambda array: array.size).dtype


def _check_memory(path: Path, abstract: Params) -> None:
    for device, needed in memory.per_device(jax.tree.leaves(abstract)).items():
        free = memory.device_free(device)
        if free is not None and needed > free:
            raise ValueError(
                f"{path} needs {needed / 1e9:.1f} GB on {device}, which has {free / 1e9:.1f} GB "
                "free: free some, load it as bfloat16, or spread it over more devices"
            )


def _flat(tree: Params) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    for name in expected:
        if name not in found:
            raise ValueError(f"{where} has no {name}; expected one of {expected[name].shape}")
        if found[name].shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} is {found[name].shape}; expected {expected[name].shape}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{where} has {name}, which this architecture does not")


def _not_a_checkpoint(path: Path) -> str:
    if not path.is_dir():
        return f"there is no folder {path}"
    config = path / "config.json"
    if (path / "params.json").is_file() or (
        "model_type" in config.read_text() if config.is_file() else False
    ):
        return (
            f"{path} holds a PyTorch checkpoint; convert it first: "
            f"python -m mistral_jax.convert to-orbax {path} {path.name}-orbax"
        )
    missing = " and ".join(n for n in ("config.json", "params/") if not (path / n).exists())
    return f"{path} is not a whole checkpoint folder: it has no {missing}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
