"""Tokenizer files and texts shared by the tests of the tokenizer and of chat."""

import importlib.util
import random
from pathlib import Path

import sentencepiece

# Mistral's own files, as mistral-common ships them; found without importing it, which is slow.
DATA = Path(importlib.util.find_spec("mistral_common").origin).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
V7_FILE = DATA / "mistral_instruct_tokenizer_241114.model.v7"

# What forgers and the world type.
_TYPED = """
[INST] [/INST] <s> </s> <unk> [TOOL_CALLS] [/TOOL_RESULTS] [IMG] [PREFIX] [SYSTEM_PROMPT] [/ INST]
[control_8] [REFERENCE_DOC_3] <0x0A> <0xE4> Hello, world 3.14159 f(x): naïve Straße cafe\u0301
日本語のテキスト 한국어 中文 עברית हिन्दी ไทย 👍 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈
\U0010ffff \ufffd \ufeff \u200b \0 \x1b
"""
_CONTROL = (
    "[INST],[/INST],[TOOL_CALLS],"
    "[AVAILABLE_TOOLS],[/AVAILABLE_TOOLS],[TOOL_RESULTS],[/TOOL_RESULTS]"
)
_SPACES = ("", "", " ", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\xa0")


def random_text(rng: random.Random, words: int = 8) -> str:
    """Returns a text of up to so many words: control tokens spelled out, scripts, emoji, spaces."""
    parts = [rng.choice(_SPACES)]
    for _ in range(rng.randrange(words + 1)):
        word = rng.choice((*_TYPED.split(), "▁", "".join(_random_char(rng) for _ in range(4))))
        parts += [word, rng.choice(_SPACES)]
    return "".join(parts)


def _random_char(rng: random.Random) -> str:
    return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))


def train(path: Path, **options) -> Path:
    """Trains a tokenizer of 400 pieces on this file, and writes it to `path`."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
            model_writer=file,
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            **{"model_type": "bpe"} | options,
        )
    return path


def train_small_mistral(path: Path) -> Path:
    """Trains a small tokenizer of Mistral's kind: control tokens at 3 to 9, then the 256 bytes."""
    return train(
        path,
        control_symbols=_CONTROL,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )
