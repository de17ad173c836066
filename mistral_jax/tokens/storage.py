"""The files of tokenizers: tells their kinds apart, and copies them into checkpoint folders."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.files import MARK, MOST_JSON, check_regular, read_bytes, read_json

# The name of each kind's file in a checkpoint folder, in the order of preference.
NAMES = {
    "sentencepiece": "tokenizer.model",
    "tekken": "tekken.json",
    "tokenizer.json": "tokenizer.json",
}
EXPECTED = "tokenizer.model, tekken.json or tokenizer.json"
# Files beside a tokenizer's file that name its special tokens, in Hugging Face's format.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Maximum size in bytes of a SentencePiece file: 262,144 pieces take less than 5 MB.
MOST_BYTES = 16 << 20


def find(folder: Path | str) -> Path | None:
    """Returns the tokenizer's file in a checkpoint folder, or None."""
    files = (Path(folder) / name for name in NAMES.values())
    return next((file for file in files if file.is_file()), None)


def read(path: Path | str) -> tuple[str, bytes | Mapping[str, Any]]:
    """Reads a tokenizer's file of any kind.

    Returns:
      A key of `NAMES`, and the bytes of a file that is not JSON or the object of one that is.

    Raises:
      ValueError: the file does not exist, is too large, or is JSON of another kind.
      OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no tokenizer file {path}; expected a {EXPECTED}")
    check_regular(path)
    with open(path, "rb") as file:
        is_json = file.read(64).removeprefix(MARK).lstrip().startswith(b"{")
    if not is_json:
        return "sentencepiece", read_bytes(path, MOST_BYTES)
    described = read_json(path, MOST_JSON)
    if isinstance(described.get("model"), dict):
        return "tokenizer.json", described
    if "vocab" in described and "config" in described:
        return "tekken", described
    raise ValueError(
        f"{path} is not a SentencePiece model, and its JSON has neither config and vocab, as a "
        "tekken.json, nor model, as a tokenizer.json; expected the model's own file"
    )


def copy(file: Path | str, folder: Path) -> None:
    """Copies a tokenizer's file and its companions into a folder, under the names of `NAMES`."""
    file = Path(file)
    kind, _ = read(file)
    shutil.copyfile(file, folder / NAMES[kind])
    for name in COMPANIONS if kind != "tekken" else ():
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
