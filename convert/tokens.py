"""Reads the tokenizer of a source, and the tokens that its files name as the end of an answer."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mistral_jax.base.fields import (
    check_table,
    either,
    integer,
    list_of,
    optional,
    string,
    table_of,
)
from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import checkpoint
from mistral_jax.config import ModelConfig
from mistral_jax.tokens import storage
from mistral_jax.tokens.tokenizer import Tokenizer

from .architecture import Architecture
from .source import Source

_ID = integer(-(2**31))  # some files use -1 for none
_TOKEN = either(string(), table_of())
_RULES = {
    "generation_config.json": {"eos_token_id": optional(either(_ID, list_of(_ID, 64)))},
    "tokenizer_config.json": {
        "eos_token": optional(_TOKEN),
        "added_tokens_decoder": optional(table_of(_TOKEN)),
    },
    "added_tokens.json": {},
    "special_tokens_map.json": {},
}


class Tokens(NamedTuple):
    """The tokenizer of a source, and its config with the tokens that end an answer.

    Attributes:
      tokenizer: the tokenizer; None = the source has no file of one.
      config: the config, completed with all tokens that end an answer.
      notes: messages about disagreements between files.
    """

    tokenizer: Tokenizer | None
    config: ModelConfig
    notes: list[str]


def read(source: Source, described: Architecture) -> Tokens:
    """Reads the tokenizer of a source, and the tokens that end an answer from all files.

    Generation stops at any of these tokens. Training uses the tokenizer's EOS, because the chat
    form ends answers with it.

    Args:
      source: the source.
      described: the contents of its config file.

    Raises:
      ValueError: the tokenizer does not fit the model, or a file is not JSON or has a value of an
        unexpected type.
    """
    config, file, notes = described.config, source.tokenizer_file, []
    present = [name for name in storage.NAMES.values() if (source.folder / name).is_file()]
    others = [name for name in present if file and not file.name.startswith(name)]
    if others:
        notes.append(f"the tokenizer is {file.name}; {' and '.join(others)} is left out")
    ends = {"bos_id": config.bos_id, "eos_id": next(iter(described.eos_ids), None)}
    tokenizer = Tokenizer.from_file(file, config.vocab_size, **ends) if file else None
    if tokenizer is not None:
        unnamed = config.vocab_size - tokenizer.vocab_size
        # If fewer than half of the tokens have a piece, `check_tokenizer` raises an error.
        if checkpoint.MOST_UNNAMED < unnamed <= tokenizer.vocab_size:
            config = dataclasses.replace(config, unnamed_tokens=unnamed)
            notes.append(
                f"{file.name} has {tokenizer.vocab_size} of the model's {config.vocab_size} "
                f"tokens, and the other {unnamed} have no text: unless they were added to the "
                "model, this is another model's tokenizer"
            )
        checkpoint.check_tokenizer(tokenizer, config, file)
        if tokenizer.bos_id is not None:
            config = dataclasses.replace(config, bos_id=tokenizer.bos_id)
    ends, more = _ends(source, described, tokenizer)
    if ends:
        first, *others = ends
        config = dataclasses.replace(config, eos_id=first, other_eos_ids=tuple(others))
    if len(ends) > 1:
        places = (f"{token} ({', '.join(names)})" for token, names in ends.items())
        more.append(
            f"an answer ends with token {' or '.join(places)}: generation stops at each, training "
            f"teaches {config.eos_id}"
        )
    return Tokens(tokenizer, config, notes + more)


def _ends(
    source: Source, described: Architecture, tokenizer: Tokenizer | None
) -> tuple[dict[int, dict[str, None]], list[str]]:
    """Returns the tokens that end an answer, each with the files that name it, and notes."""
    raw: dict[str, Mapping[str, Any]] = {name: {} for name in _RULES}
    for file in source.detail_files:
        raw[file.name] = read_json(file)
        check_table(raw[file.name], _RULES[file.name], str(file))
    generation, own, added, _ = raw.values()
    ids = generation.get("eos_token_id")
    named = [(source.tokenizer_file.name, tokenizer.eos_id)] if tokenizer else []
    named += [(source.config_file.name, token) for token in described.eos_ids]
    named += [
        ("generation_config.json", token) for token in (ids if isinstance(ids, list) else [ids])
    ]
    named += [("tokenizer_config.json", token) for token in _own(own, added)]
    size, ends, notes = described.config.vocab_size, {}, []
    for name, token in named:
        if token is None:
            continue
        if 0 <= token < size:
            ends.setdefault(token, {})[name] = None
        else:
            notes.append(
                f"{name} ends an answer with token {token}, which is ignored: the model has {size} "
                "tokens"
            )
    return ends, notes


def _own(config: Mapping[str, Any], added: Mapping[str, Any]) -> list[int]:
    """Returns the ids of the end token that `tokenizer_config.json` names by its spelling."""
    name = _spelling(config.get("eos_token"))
    decoder = config.get("added_tokens_decoder") or {}
    ids = [
        int(token)
        for token, spelled in decoder.items()
        if _spelling(spelled) == name and re.fullmatch("[0-9]{1,9}", token)
    ]
    if integer(0).accepts(added.get(name)):
        ids.append(added[name])
    return ids if name else []


def _spelling(token: Any) -> Any:
    spelling = token.get("content") if isinstance(token, dict) else token
    return spelling if isinstance(spelling, str) else None
