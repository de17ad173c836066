"""Makes `tokenizer.model` or `tokenizer.json` out of a GGUF file's metadata."""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import integer, show
from mistral_jax.tokens.spm import Kind

# How byte-level tokenizers divide a text, by the names that llama.cpp gives to them.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


# The parts of a pre-tokenizer, and whether it takes pieces of the vocabulary whole, without merges.
_PRE = {
    "gpt-2": ([_split(_GPT_2)], False),
    "smollm": ([_DIGITS, _split(_GPT_2)], False),
    "llama-bpe": ([_split(_LLAMA_3)], True),
    "tekken": ([_split(_TEKKEN)], True),
}
_PRE |= {"llama3": _PRE["llama-bpe"], "llama-v3": _PRE["llama-bpe"]}
# Tokens that mark structure, whatever their kind in the file says: a user must not be able to type
# them.
_MARK = re.compile(r"<[|/]?[\w .:|/-]+\|?>|\[/?[A-Z_]+\]|▁<[A-Z]+>")
_KEY = "tokenizer.ggml."


def files(metadata: Mapping[str, Any], file: Path) -> dict[str, bytes]:
    """Returns the contents of the files of a tokenizer by name; empty = there is no tokenizer.

    Args:
      metadata: the metadata of a GGUF file.
      file: the GGUF file, for messages.

    Raises:
      ValueError: the tokenizer is of a kind that is not supported, or its lists do not fit.
    """
    own = {key.removeprefix(_KEY): x for key, x in metadata.items() if key.startswith(_KEY)}
    if "model" not in own:
        return {}
    tokens = own.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(x, str) for x in tokens):
        raise ValueError(f"{file} has no list of tokens in {_KEY}tokens; convert it again")
    kinds = own.get("token_type", [Kind.NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not set(kinds) <= set(Kind):
        raise ValueError(f"{file} has no type for each of its {len(tokens)} tokens")
    kinds = [
        Kind.CONTROL if kind == Kind.USER_DEFINED and _MARK.fullmatch(token) else Kind(kind)
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    details = {"tokenizer_config.json": json.dumps(_details(metadata, own, tokens)).encode()}
    if own["model"] == "llama":
        return {"tokenizer.model": _sentencepiece(own, tokens, kinds, file)} | details
    if own["model"] == "gpt2":
        return {"tokenizer.json": _byte_level(own, tokens, kinds, file)} | details
    raise ValueError(
        f"{file} has a tokenizer of kind {show(own['model'])}; expected llama (SentencePiece) or "
        "gpt2 (byte-level BPE)"
    )


def _details(
    metadata: Mapping[str, Any], own: Mapping[str, Any], tokens: Sequence[str]
) -> dict[str, Any]:
    """Returns the contents of a `tokenizer_config.json`."""
    found: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = own.get(f"{key}_token_id")
        if integer(0, len(tokens) - 1).accepts(token):
            found[f"{name}_token"] = tokens[token]
    if isinstance(own.get("add_bos_token"), bool):
        found["add_bos_token"] = own["add_bos_token"]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        found["chat_template"] = template
    return found


def _byte_level(
    own: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[Kind], file: Path
) -> bytes:
    if own.get("pre") not in _PRE:
        raise ValueError(
            f"{file} divides texts as {show(own.get('pre'))} ({_KEY}pre); expected one of "
            f"{', '.join(_PRE)}"
        )
    pre, whole = _PRE[own["pre"]]
    merges = own.get("merges")
    pairs = [merge.split(" ") for merge in merges] if isinstance(merges, list) else None
    if pairs is None or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{file} has no list of pairs in {_KEY}merges; convert it again")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, **flags, "special": kind in (Kind.CONTROL, Kind.UNKNOWN)}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ]
    ending = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*pre, {"type": "ByteLevel", **ending}],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **ending},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": pairs,
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()


def _sentencepiece(
    own: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[Kind], file: Path
) -> bytes:
    """Returns a protocol buffer as `sentencepiece_model.proto` describes it."""
    scores = own.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"{file} has no score for each of its {len(tokens)} tokens")
    ids = {name: own.get(f"{name}_token_id", -1) for name in ("bos", "eos", "padding")}
    unknown = next((i for i, kind in enumerate(kinds) if kind == Kind.UNKNOWN), 0)
    pieces = (
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, int(kind)))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    bpe, has_bytes = 2, Kind.BYTE in kinds
    trainer = _field(3, bpe) + _field(35, int(has_bytes)) + _field(40, unknown)
    trainer += _field(41, ids["bos"]) + _field(42, ids["eos"]) + _field(43, ids["padding"])
    prefix = int(bool(own.get("add_space_prefix", True)))
    strips = int(bool(own.get("remove_extra_whitespaces", False)))
    normalizer = _field(1, b"identity") + _field(3, prefix) + _field(4, strips) + _field(5, 1)
    names = {41: "bos", 42: "eos"}
    spelled = b"".join(
        _field(number + 5, tokens[ids[name]].encode())
        for number, name in names.items()
        if 0 <= ids[name] < len(tokens)
    )
    trainer += _field(45, tokens[unknown].encode()) + spelled
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """Returns a field of a protocol buffer."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes(_groups(value))


def _groups(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
