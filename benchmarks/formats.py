"""Writes a model in the formats of three programs: Transformers, this package and llama.cpp.

`engines.py` loads them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import shapes
from mistral_jax.convert import architecture
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

from mistral_jax.checkpoint import names, safetensors_file
from mistral_jax.checkpoint.checkpoint import BUNDLED
from mistral_jax.config import ModelConfig

# GGUF's names of precisions, and of the tensors of official files.
_GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
_GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}

# Standard deviation of the logits of random weights. They are then as peaked as a trained model's.
_LOGITS = 4.0


class Formats:
    """One model on disk; each format is written when it is first requested.

    Attributes:
      config: the architecture.
      folder: the folder that holds all formats.
    """

    def __init__(self, model: str, folder: Path):
        """Takes a name of `shapes.MODELS`."""
        self.config = shapes.MODELS[model]
        self.folder = folder / model
        self._bundled = model == "nano"

    def hf(self) -> Path:
        """Returns the Hugging Face folder, from which the other formats are converted."""
        path = self.folder / "hf"
        if not path.is_dir():
            part = _fresh(self.folder / "hf.part")
            if self._bundled:
                to_torch(BUNDLED, part / "hf")
                part = part / "hf"
            else:
                _write_random(part, self.config)
            part.rename(path)
        return path

    def orbax(self) -> Path:
        """Returns the checkpoint of this package, written by its converter."""
        path = self.folder / "orbax"
        if not path.is_dir():
            to_orbax(self.hf(), path)
        return path

    def gguf(self, dtype: str) -> Path:
        """Returns llama.cpp's file in a precision, written by the `gguf` package."""
        path = self.folder / f"{dtype}.gguf"
        if not path.is_file():
            part = path.with_suffix(".part")
            _write_gguf(part, self.hf(), self.config, dtype)
            part.rename(path)
        return path


def _fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _write_random(folder: Path, config: ModelConfig) -> None:
    """Writes random bfloat16 weights: products keep their input's variance; scales are near 1."""
    rng, dtype, rows = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16), names.weights(config)

    def draw(row):
        shape = row.file_shape(config)
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return (1 + values / 10).astype(dtype)
        spread = shape[-1] ** -0.5 * (_LOGITS if row is names.HEAD else 1)
        return (values * np.float32(spread)).astype(dtype)

    heads = {row.name(official=False): (row.file_shape(config), dtype) for row in rows}
    safetensors_file.write(folder / "model.safetensors", heads, map(draw, rows))
    fields = architecture.to_hf(config) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields))


def _write_gguf(file: Path, source: Path, config: ModelConfig, dtype: str) -> None:
    """Writes a GGUF file of the architecture `llama`, which has no window."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("none")
    for name, tensor in _official(source, config):
        parts = name.removesuffix(".weight").split(".", 2)
        if parts[0] == "layers":
            name = f"blk.{parts[1]}.{_GGUF_NAMES[parts[2]]}.weight"
        else:
            name = f"{_GGUF_NAMES[name.removesuffix('.weight')]}.weight"
        kind = gguf.GGMLQuantizationType[_GGUF_TYPES[dtype] if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _official(source: Path, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields float32 tensors in the official order of rows, which llama.cpp uses too."""
    tensors = safetensors_file.read(source / "model.safetensors")
    for row in names.weights(config):
        tensor = tensors[row.name(official=False)].astype(np.float32)
        ours = row.from_file(tensor, config, official=False)
        yield row.name(official=True), np.ascontiguousarray(row.to_file(ours, config, True))
