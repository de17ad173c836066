"""Tiny PyTorch checkpoints for tests, written byte by byte without PyTorch and without `convert`.

The names, the order of rows and the pickle format are written down again here, so that `convert`
and this file check each other.
"""

import io
import json
import math
import zipfile
from pathlib import Path

import ml_dtypes  # noqa: F401  (safetensors then knows bfloat16)
import numpy as np
import reference
from safetensors.numpy import save_file
from sentencepiece import SentencePieceTrainer
from tiny import OFFICIAL

from mistral_jax.base.output import Progress

# The pointer that git checks out for a file in Git LFS.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 9942981696\n" % 0

FORMATS = ("hf-safetensors", "official-safetensors", "hf-torch", "official-torch")

HF_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
HF_CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
} | {HF_KEYS.get(key, key): value for key, value in OFFICIAL.items()}


def tensors(tied: bool = False, **fields) -> dict[str, np.ndarray]:
    """Draws random weights for `OFFICIAL` with the changes of `fields`."""
    return reference.random_tensors(OFFICIAL | fields, 0, tied)


def write(
    folder: Path,
    format: str,
    tensors: dict[str, np.ndarray] | None = None,
    parts: int = 1,
    **fields,
) -> Path:
    """Writes a source folder.

    Args:
      folder: the folder; may exist and hold another format.
      format: one of `FORMATS`.
      tensors: arrays by official name, in the official layout; None = random float32 ones.
      parts: number of files that hold the tensors.
      fields: changes to the config file, by either format's names; `...` removes a field.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = reference.random_tensors(OFFICIAL, 0) if tensors is None else tensors
    hf, torch = format.startswith("hf"), format.endswith("torch")
    if hf:
        fields = {HF_KEYS.get(key, key): value for key, value in fields.items()}
    config = {k: v for k, v in ((HF_CONFIG if hf else OFFICIAL) | fields).items() if v is not ...}
    (folder / ("config.json" if hf else "params.json")).write_text(json.dumps(config))
    if hf:
        held = {hf_name(name): hf_layout(name, tensor) for name, tensor in held.items()}
    save = save_torch if torch else save_safetensors
    if format == "official-torch":
        for part in range(parts):
            save(folder / f"consolidated.{part:02}.pth", _part(held, part, parts))
        return folder
    stem, ending = ("pytorch_model", "bin") if torch else ("model", "safetensors")
    stem = stem if hf else "consolidated"
    if parts == 1:
        save(folder / f"{stem}.{ending}", held)
        return folder
    places = {name: i % parts for i, name in enumerate(held)}
    files = [f"{stem}-{i + 1:05}-of-{parts:05}.{ending}" for i in range(parts)]
    for i, file in enumerate(files):
        save(folder / file, {name: held[name] for name in held if places[name] == i})
    index = {"metadata": {}, "weight_map": {name: files[i] for name, i in places.items()}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(file: Path, size: int = OFFICIAL["vocab_size"]) -> Path:
    """Trains a SentencePiece model of `size` pieces on pairs of lower-case letters."""
    words = " ".join(f"{a}{b}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
    return file


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of an official tensor."""
    for old, new in _HF_NAMES.items():
        name = name.replace(old, new)
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_layout(name: str, tensor: np.ndarray) -> np.ndarray:
    """Moves the rows of rotary pairs (2j, 2j + 1) to (j, j + head_dim / 2) in wq and wk."""
    if ".wq." not in name and ".wk." not in name:
        return tensor
    heads = np.split(tensor, len(tensor) // OFFICIAL["head_dim"])
    return np.concatenate([rows for head in heads for rows in (head[0::2], head[1::2])])


def save_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as a safetensors file."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)


def save_torch(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes the file that `torch.save` writes for contiguous tensors."""
    pickle = b"\x80\x02}("
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
        pickle += text(name) + rebuilt(str(key), tensor.dtype.name, tensor.shape, strides)
    save_zip(file, pickle + b"u.", [tensor.tobytes() for tensor in tensors.values()])


def save_zip(file: Path, pickle: bytes, storages: list[bytes], **members: bytes) -> None:
    """Writes the zip file of `torch.save` around a pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", members.get("byteorder", b"little"))
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage)


def rebuilt(key: str, dtype: str, shape, strides, offset: int = 0, count: int | None = None):
    """Returns the opcodes of one tensor, as PyTorch pickles it."""
    count = math.prod(shape) if count is None else count
    storage = text("storage") + name_of("torch", f"{_STORAGES[dtype]}Storage") + text(key)
    storage = b"(" + storage + text("cpu") + integer(count) + b"tQ"
    numbers = integer(offset) + integers(shape) + integers(strides)
    hooks = name_of("collections", "OrderedDict") + b")R"
    tensor = b"(" + storage + numbers + b"\x89" + hooks + b"t"
    return name_of("torch._utils", "_rebuild_tensor_v2") + tensor + b"R"


def name_of(module: str, name: str) -> bytes:
    """Returns the opcode that looks up a name in a module."""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """Returns the opcode of a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def integer(value: int) -> bytes:
    """Returns the opcode of an integer."""
    return b"J" + value.to_bytes(4, "little", signed=True)


def integers(values) -> bytes:
    """Returns the opcodes of a tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def _part(tensors: dict[str, np.ndarray], part: int, parts: int) -> dict[str, np.ndarray]:
    """Returns the columns, rows or whole tensors that `consolidated.NN.pth` number `part` holds."""
    shares = {}
    for name, tensor in tensors.items():
        columns = any(word in name for word in ("tok_embeddings", ".wo.", ".w2."))
        whole = "norm" in name
        axis = 1 if columns else 0
        shares[name] = tensor if whole else np.split(tensor, parts, axis)[part]
    return shares


_STORAGES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
_HF_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "output": "lm_head",
}


class Heard(Progress):
    """Progress that records the sentences said to it."""

    def __init__(self):
        self.said = []

    def say(self, sentence):
        self.said.append(sentence)
