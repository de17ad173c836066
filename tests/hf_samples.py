"""Small files of Hugging Face's kind, of each algorithm, shared by tests."""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizer_samples as samples
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
KINDS = ("bytes", "prefixed bytes", "legacy", "metaspace", "unigram", "wordpiece")
# Whose decoding undoes encoding.
EXACT = ("bytes", "legacy", "metaspace")


def _texts() -> list[str]:
    return Path(samples.__file__).read_text(encoding="utf-8").splitlines()


def _byte_level(prefix: bool) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(CHATML)
    return made, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )


def _with_fallback(legacy: bool) -> tuple[Tokenizer, Any]:
    """Llama's files: a normalizer puts spaces, or (later) a pre-tokenizer."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [*LLAMA, *(f"<0x{byte:02X}>" for byte in range(256))]
    return made, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, limit_alphabet=100, show_progress=False
    )


def _unigram() -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(LLAMA), unk_token="<unk>", show_progress=False
    )


def _wordpiece() -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return made, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=special, show_progress=False
    )


@functools.cache
def _trained(kind: str) -> str:
    made, trainer = {
        "bytes": lambda: _byte_level(False),
        "prefixed bytes": lambda: _byte_level(True),
        "legacy": lambda: _with_fallback(True),
        "metaspace": lambda: _with_fallback(False),
        "unigram": _unigram,
        "wordpiece": _wordpiece,
    }[kind]()
    made.train_from_iterator(_texts(), trainer)
    first = {"wordpiece": "[CLS]"}.get(kind, "<s>")
    if "bytes" not in kind:
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, made.token_to_id(first))]
        )
    text = made.to_str()
    if kind in ("legacy", "metaspace"):
        # The bytes are entries of the vocabulary, not added tokens.
        table = json.loads(text)
        table["added_tokens"] = [x for x in table["added_tokens"] if x["content"] in LLAMA]
        made = Tokenizer.from_str(json.dumps(table))
    made.add_tokens(["<tool>", AddedToken("Straße", normalized=False), "yesterday"])
    made.add_special_tokens(["<|end_of_turn|>"])
    return made.to_str()


def described(kind: str) -> dict[str, Any]:
    """Returns the JSON value of a file of one of `KINDS`."""
    return json.loads(_trained(kind))


def named(kind: str) -> dict[str, Any]:
    """Returns what a `tokenizer_config.json` names."""
    tokens = {
        "bytes": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "wordpiece": ("[CLS]", "[SEP]", "[UNK]"),
    }.get(kind.removeprefix("prefixed "), ("<s>", "</s>", "<unk>"))
    return dict(zip(("bos_token", "eos_token", "unk_token"), tokens, strict=True))


def write(folder: Path, kind: str, names: bool = True) -> Path:
    """Writes a small file, and the one beside it that names its special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described(kind)))
    if names:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | named(kind)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"
