"""Tekken, the byte-level tokenizer of Mistral's models since Nemo, in a `tekken.json`.

The vocabulary is a list of byte sequences by rank, which the tiktoken library merges. The ids of
special tokens come first, so the id of a sequence is its rank plus their number.
"""

import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mistral_jax.base.fields import (
    boolean,
    check_table,
    integer,
    list_of,
    optional,
    show,
    string,
    table_of,
)
from mistral_jax.tokens import libraries
from mistral_jax.tokens.tokenizer import Tokenizer

# Maximum number of tokens, and of characters of the regular expression that divides a text.
_MOST_TOKENS = 1 << 20
_MOST_PATTERN = 1 << 14

_RULES = {"config": table_of(), "vocab": list_of(table_of(), _MOST_TOKENS)}
_CONFIG_RULES = {
    "pattern": string(),
    "default_vocab_size": integer(257, _MOST_TOKENS),
    "default_num_special_tokens": integer(3, _MOST_TOKENS),
    "version": string(),
}
_SPECIAL_RULES = {
    "rank": integer(0, _MOST_TOKENS),
    "token_str": string(),
    "is_control": optional(boolean()),
}

# The special tokens of files up to v7, which do not list them.
_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)


class Tekken(Tokenizer):
    """A tokenizer that the tiktoken library runs. All special tokens are control tokens."""

    kind = "tekken"

    def __init__(self, special: list[str], tokens: list[bytes], pattern: str, version: str, ids=0):
        self._special, self._tokens = special, tokens
        self._control = {spelling: token for token, spelling in enumerate(special)}
        self._encoding = libraries.call(
            f"the pattern is {show(pattern)}; expected a regular expression that tiktoken reads",
            _tiktoken().Encoding,
            "tekken",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={},
        )
        super().__init__(
            len(special) + len(tokens),
            ids,
            bos_id=self._control["<s>"],
            eos_id=self._control["</s>"],
            unk_id=self._control.get("<unk>"),
            version=version,
        )

    @classmethod
    def parse(cls, described: Mapping[str, Any], path: Path, ids: int = 0) -> "Tekken":
        """Reads the JSON value of a file; see `Tokenizer.from_file`.

        Raises:
          ValueError: it is not a `tekken.json`, or tiktoken is not installed.
        """
        _tiktoken()
        check_table(described, _RULES, str(path))
        config = described["config"]
        for name in _CONFIG_RULES:
            config.setdefault(name, None)
        check_table(config, _CONFIG_RULES, f"{path}, config")
        version, pattern = config["version"], config["pattern"]
        if not re.fullmatch(r"v[0-9]{1,3}(m[0-9])?", version):
            raise ValueError(f'{path} has version {show(version)}; expected one such as "v3"')
        if len(pattern) > _MOST_PATTERN:
            raise ValueError(
                f"{path} has a pattern of {len(pattern)} characters; expected at most "
                f"{_MOST_PATTERN}"
            )
        count = config["default_num_special_tokens"]
        size = config["default_vocab_size"] - count
        if not 256 <= size <= len(described["vocab"]):
            raise ValueError(
                f"{path} has {len(described['vocab'])} entries in vocab; expected at least "
                f"{max(size, 256)}: those of default_vocab_size without the special tokens"
            )
        special = _special(described.get("special_tokens"), version, count, path)
        tokens = [_token(x, rank, path) for rank, x in enumerate(described["vocab"][:size])]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"{path} has two entries in vocab with the same token_bytes")
        try:
            return cls(special, tokens, pattern, version, ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def piece(self, token: int) -> str:
        """Returns the spelling of a token: its text, or "<0xE4><0xBD>" if it is not UTF-8."""
        token = self._checked(token)
        if token >= self.vocab_size:
            return f"<{token}>"
        if token < len(self._special):
            return self._special[token]
        spelled = self._tokens[token - len(self._special)]
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in spelled)

    def is_control(self, token: int) -> bool:
        """Returns whether a token has no text; see `Tokenizer.is_control`."""
        return not len(self._special) <= self._checked(token) < self.vocab_size

    @property
    def controls(self) -> Mapping[str, int]:
        """The ids of control tokens; see `Tokenizer.controls`."""
        return self._control

    def _encode(self, text: str, continues: bool) -> list[int]:
        shift = len(self._special)
        problem = "the tokenizer's pattern cannot divide the text; expected a shorter one"
        ranks = libraries.call(problem, self._encoding.encode_ordinary, text)
        return [rank + shift for rank in ranks]

    def _spell(self, token: int, before: int | None) -> bytes:
        return self._tokens[token - len(self._special)]


def _tiktoken() -> ModuleType:
    return libraries.load("tiktoken", "tekken", "tekken.json")


def _special(listed: Any, version: str, count: int, path: Path) -> list[str]:
    """Returns the spellings of all special tokens by id."""
    if listed is None:
        if int(version[1:].partition("m")[0]) > 7:
            raise ValueError(
                f"{path} has version {version} and no special_tokens; expected a list, which files "
                "later than v7 have"
            )
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(_SPECIAL)]
    check_table({"special_tokens": listed}, {"special_tokens": list_of(table_of())}, str(path))
    named: dict[int, str] = {}
    for i, entry in enumerate(listed):
        where = f"{path}, special_tokens[{i}]"
        check_table({"rank": None, "token_str": None, **entry}, _SPECIAL_RULES, where)
        if not entry["rank"] < count or entry["rank"] in named:
            raise ValueError(
                f"{where} has rank {entry['rank']}; expected a rank of its own below {count}, "
                "default_num_special_tokens"
            )
        named[entry["rank"]] = entry["token_str"]
    spelled = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    if len(set(spelled)) < count:
        raise ValueError(f"{path} has two special tokens with the same token_str")
    if not {"<s>", "</s>"} <= set(spelled):
        raise ValueError(f"{path} has no special tokens <s> and </s>; expected both")
    return spelled


def _token(entry: Mapping[str, Any], rank: int, path: Path) -> bytes:
    """Returns the bytes of an entry of the vocabulary, which must have this rank."""
    text = entry.get("token_bytes")
    try:
        token = binascii.a2b_base64(text, strict_mode=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        token = b""
    if not token:
        raise ValueError(
            f"{path}, vocab[{rank}] has token_bytes {show(text)}; expected bytes in base64"
        )
    if type(entry.get("rank")) is not int or entry["rank"] != rank:
        raise ValueError(
            f"{path}, vocab[{rank}] has rank {show(entry.get('rank'))}; expected {rank}"
        )
    if rank < 256 and token != bytes([rank]):
        raise ValueError(
            f"{path}, vocab[{rank}] has token_bytes {show(text)}; expected the byte {rank}, as the "
            "first 256 entries are the bytes"
        )
    return token
