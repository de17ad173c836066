"""What stands in for what a reader has and a test has not: weights, data, and the Hub's models."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mistral_jax.convert.to_torch import to_torch
from safetensors.numpy import save_file

from mistral_jax.checkpoint import checkpoint
from mistral_jax.config import ModelConfig

# Repositories of the Hub: a stand-in serves the bundled model, in both formats, as any of them.
REPOSITORIES = (
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.3",
)


def export(path: Path) -> Path:
    """Exports the bundled model once, as a folder of both PyTorch formats."""
    if not path.exists():
        part = path.with_name(f"{path.name}-{id(path)}")
        to_torch(checkpoint.BUNDLED, part, format="official")
        (part / "params.json").rename(part / "kept")
        to_torch(checkpoint.BUNDLED, part / "hf", format="hf")
        for file in (part / "hf").iterdir():
            file.rename(part / file.name)
        (part / "hf").rmdir()
        (part / "kept").rename(part / "params.json")
        part.rename(path)
    return path


def _bundled(path: Path) -> None:
    path.symlink_to(checkpoint.BUNDLED)


def _hugging_face(path: Path) -> None:
    to_torch(checkpoint.BUNDLED, path, format="hf")


def _official_without_theta(path: Path) -> None:
    to_torch(checkpoint.BUNDLED, path, format="official")
    described = json.loads((path / "params.json").read_text())
    del described["rope_theta"]
    (path / "params.json").write_text(json.dumps(described))


def _adapter(path: Path) -> None:
    """Writes adapters of one projection as PEFT does."""
    path.mkdir(parents=True)
    config = ModelConfig.from_name("nano")
    inner = config.num_heads * config.head_dim
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(0)
    tensors = {
        f"{module}.lora_A.weight": rng.normal(size=(2, config.embed_dim)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(inner, 2)).astype(np.float32) / 1000,
    }
    save_file(tensors, path / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(described))


def _lines(*entries) -> Callable[[Path], None]:
    return lambda path: path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


_CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Read a file."},
        {"role": "assistant", "content": "def read_file(path):"},
    ]
}
_PAIR = {"prompt": "Read a file.", "chosen": "def read_file(path):", "rejected": "import os"}
_QUESTION = {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}
_SOURCE = Path(dataclasses.__file__).read_text()

STAND_INS = {
    "mistral-7b-v0.1": _bundled,
    "mistral-7b-v0.3": _bundled,
    "mistral-7b-instruct-v0.3": _bundled,
    "Mistral-7B-Instruct-v0.3": _hugging_face,
    "mistral-7B-v0.1-official": _official_without_theta,
    "runs/lora/adapter": _adapter,
    "train.jsonl": _lines(*[_CONVERSATION] * 12),
    "valid.jsonl": _lines(*[_CONVERSATION] * 2),
    "pairs.jsonl": _lines(*[_PAIR] * 8),
    "questions.jsonl": _lines(*[_QUESTION] * 3),
    "set.jsonl": _lines(
        {"prompt": "How do I kill a Linux process?", "unsafe": False},
        {"text": "import os", "category": "not moderated"},
    ),
    "articles.jsonl": _lines({"text": "import os\n"}, {"text": "import sys\n"}),
    "runs/unread/test.jsonl": _lines(*[_CONVERSATION] * 8),
    "prompts.txt": _text("import os\ndef main(\nclass Stack:\n"),
    "book.txt": _text(_SOURCE[:3000]),
}
_NOT_READ = (
    r"mistral_jax\.plan (\S+)",
    r"convert to-\w+ \S+ ([\w./-]+)",
    r'to_(?:orbax|torch)\(\s*"[^"]+",\s*"([^"]+)"',
)


def prepare(folder: Path, text: str) -> None:
    """Puts what a text names into a reader's folder, but for what the text itself makes."""
    made = {match for pattern in _NOT_READ for match in re.findall(pattern, text)}
    for name, make in STAND_INS.items():
        named = re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-]|\.\w)", text)
        if named and name not in made and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            make(folder / name)
