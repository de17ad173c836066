"""Reads a `tokenizer.json`, and the files of Hugging Face beside it that name special tokens.

The tokenizers library matches added tokens in a text, and some of its algorithms match any entry
of the vocabulary. `read` therefore gives the control tokens spellings that no text can contain.
"""

import json
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mistral_jax.base.fields import (
    Rule,
    boolean,
    check_table,
    integer,
    list_of,
    optional,
    show,
    string,
    table_of,
)
from mistral_jax.base.files import read_json

# Maximum number of tokens.
_MOST_TOKENS = 1 << 20
_ALGORITHMS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# Decoders whose text of a token depends only on the token and on whether it is the first.
_DECODERS = ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")

_RULES = {
    "model": table_of(),
    "added_tokens": optional(list_of(table_of(), _MOST_TOKENS)),
    **dict.fromkeys(("normalizer", "pre_tokenizer", "decoder"), optional(table_of())),
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ADDED_RULES = {
    "id": integer(0, _MOST_TOKENS),
    "content": string(),
    **dict.fromkeys(_FLAGS, boolean()),
}
_SCORED = Rule(
    "a list of pieces with scores",
    lambda x: (
        isinstance(x, list)
        and len(x) <= _MOST_TOKENS
        and all(isinstance(i, list) and len(i) == 2 and isinstance(i[0], str) for i in x)
    ),
)


class Contents(NamedTuple):
    """A `tokenizer.json` and what the files beside it say of it.

    Attributes:
      described: the JSON value for the tokenizers library, with hidden control tokens.
      pieces: the spelling of each token by id.
      control: the ids of control tokens by spelling.
      added: the added tokens as (spelling in `described`, spelling in the file, id).
      bos_id: token that begins a text, or None.
      eos_id: token that ends an answer, or None.
      unk_id: token for text that the vocabulary cannot spell, or None.
      adds_bos: whether texts of the model begin with BOS.
      decoders: the types of the decoders.
    """

    described: dict[str, Any]
    pieces: dict[int, str]
    control: dict[str, int]
    added: list[tuple[str, str, int]]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    adds_bos: bool
    decoders: frozenset[str]


def read_names(folder: Path) -> dict[str, Any]:
    """Returns what the files of Hugging Face in a folder say of special tokens."""
    names: dict[str, Any] = {}
    # In the order of their weight, the last one counting most.
    last = "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"
    for name in ("config.json", *last):
        if (folder / name).is_file():
            found = read_json(folder / name)
            names |= {key: value for key, value in found.items() if value is not None}
    return names


def added_names(folder: Path) -> dict[int, str]:
    """Returns the tokens that the files of Hugging Face in a folder add, by id."""
    others = read_names(folder).get("added_tokens_decoder")
    found = {
        int(token): _spelling(entry)
        for token, entry in (others if isinstance(others, dict) else {}).items()
        if _is_id(token)
    }
    if (folder / "added_tokens.json").is_file():
        known = read_json(folder / "added_tokens.json").items()
        found |= {token: spelling for spelling, token in known if integer(0).accepts(token)}
    return {token: spelling for token, spelling in found.items() if spelling}


def read(
    described: Mapping[str, Any],
    source: str,
    names: Mapping[str, Any],
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Contents:
    """Reads the JSON value of a `tokenizer.json`.

    Args:
      described: the JSON value.
      source: name for error messages.
      names: as `read_names` returns them.
      bos_id: the BOS token of the model, which counts if neither `names` nor the file show one.
      eos_id: the same for the EOS token.

    Raises:
      ValueError: the value is not a `tokenizer.json` of a supported kind.
    """
    check_table(described, _RULES, source)
    model, vocabulary = dict(described["model"]), _vocabulary(described["model"], source)
    decoders = frozenset(part.get("type") for part in parts(described.get("decoder")))
    if unknown := decoders - set(_DECODERS):
        raise ValueError(
            f"{source} has a decoder of type {show(min(unknown, key=str))}; expected one of "
            f"{', '.join(_DECODERS)}"
        )
    added = _added(described, names, source)
    spelled = vocabulary | {entry["content"]: entry["id"] for entry in added}
    unk_id = model.get("unk_id") if model.get("type") == "Unigram" else None
    unk_id = spelled.get(model.get("unk_token"), unk_id)
    ends = []
    for name, given in (("bos", bos_id), ("eos", eos_id)):
        shown = (_named(name, names, spelled), _framing(name, described), given)
        usual = spelled.get({"bos": "<s>", "eos": "</s>"}[name])
        ends.append(next((token for token in (*shown, usual) if token is not None), None))

    control = {entry["content"] for entry in added if _is_control(entry, names)}
    control |= {spelling for spelling, token in vocabulary.items() if token in ends}
    # Nobody can type a random spelling.
    hidden = {spelling: f"{secrets.token_hex(16)} {spelling}" for spelling in control}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden.get(text, text), score] for text, score in model["vocab"]]
    else:
        model["vocab"] = {hidden.get(text, text): i for text, i in vocabulary.items()}
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if isinstance(model.get("merges"), list):
        model["merges"] = [x for x in model["merges"] if not _makes(x, control)]
    model |= {"dropout": None} if "dropout" in model else {}
    shown_added = [
        entry | {"content": hidden.get(entry["content"], entry["content"])} for entry in added
    ]
    for entry in shown_added:
        entry["normalized"] = entry["normalized"] and entry["content"] not in hidden.values()
    changed = {
        "model": model,
        "added_tokens": _without_gaps(shown_added, len(model["vocab"]), set(vocabulary.values())),
        **dict.fromkeys(("post_processor", "truncation", "padding")),
    }
    return Contents(
        {**described, **changed},
        {token: spelling for spelling, token in spelled.items()},
        {spelling: spelled[spelling] for spelling in control},
        [(x["content"], y["content"], y["id"]) for x, y in zip(shown_added, added, strict=True)],
        *ends,
        unk_id if isinstance(unk_id, int) else None,
        _adds_bos(described, names, ends[0]),
        decoders,
    )


def without_prefix(described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the file without all that puts a space before a text; None = it puts none."""
    found = json.loads(
        json.dumps({name: described.get(name) for name in ("normalizer", "pre_tokenizer")})
    )
    before = json.dumps(found)
    kept = [part for part in parts(found["normalizer"]) if not _is_prefix(part)]
    if len(kept) < len([*parts(found["normalizer"])]):
        found["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for part in parts(found["pre_tokenizer"]):
        if part.get("type") == "Metaspace":
            part |= {"prepend_scheme": "never"}
            part.pop("add_prefix_space", None)
        elif part.get("add_prefix_space"):
            part["add_prefix_space"] = False
    return None if json.dumps(found) == before else {**described, **found}


def _is_prefix(part: Mapping[str, Any]) -> bool:
    """Tells whether a normalizer puts a space before a text.

    Transformers 5 writes one that doubles a space at the beginning, as SentencePiece does.
    """
    if part.get("type") == "Prepend":
        return True
    pattern = part.get("pattern")
    return isinstance(pattern, dict) and pattern.get("Regex") in ("\\A▁", "^▁")


def parts(table: Any) -> Iterator[dict[str, Any]]:
    """Yields the parts of a normalizer, pre-tokenizer or decoder; a sequence has several."""
    if not isinstance(table, dict):
        return
    if table.get("type") != "Sequence":
        yield table
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for part in table.get(name) or ():
            yield from parts(part)


def _vocabulary(model: Mapping[str, Any], source: str) -> dict[str, int]:
    """Returns the ids of a model's entries by spelling."""
    found, source = model.get("vocab"), f"{source}, model"
    # Old files of BPE models name no type.
    if model.get("type", "BPE") not in _ALGORITHMS:
        raise ValueError(
            f"{source} has type {show(model['type'])}; expected one of {', '.join(_ALGORITHMS)}"
        )
    is_scored = model.get("type") == "Unigram"
    rule = _SCORED if is_scored else table_of(integer(0, _MOST_TOKENS))
    check_table({"vocab": found}, {"vocab": rule}, source)
    if is_scored:
        return {text: i for i, (text, _) in enumerate(found)}
    if len(set(found.values())) < len(found):
        raise ValueError(f"{source} has two entries in vocab with the same id; expected one each")
    return found


def _added(described: Mapping[str, Any], names: Mapping[str, Any], source: str) -> list[dict]:
    """Returns the added tokens in the order of their ids, also those that `names` adds."""
    flags = dict.fromkeys(_FLAGS, False)
    found, others = [], names.get("added_tokens_decoder")
    for i, entry in enumerate(described.get("added_tokens") or ()):
        entry = {"id": None, "content": None} | flags | entry
        check_table(entry, _ADDED_RULES, f"{source}, added_tokens[{i}]")
        found.append(entry)
    known = {entry["id"] for entry in found} | {entry["content"] for entry in found}
    for token, entry in (others if isinstance(others, dict) else {}).items():
        if isinstance(entry, dict) and _is_id(token):
            entry = flags | entry | {"id": int(token)}
            entry = {name: entry.get(name) for name in _ADDED_RULES}
            if all(rule.accepts(entry[name]) for name, rule in _ADDED_RULES.items()):
                if not {entry["id"], entry["content"]} & known:
                    found.append(entry)
                elif entry["special"]:
                    for own in found:
                        own["special"] |= own["content"] == entry["content"]
    for name in ("id", "content"):
        if len({entry[name] for entry in found}) < len(found):
            raise ValueError(f"{source} has two added tokens with the same {name}; expected one")
    return sorted(found, key=lambda entry: entry["id"])


def _is_control(entry: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    text = entry["content"]
    return entry["special"] or text in _listed(names) or (text[:2] == "<|" and text[-2:] == "|>")


def _listed(names: Mapping[str, Any]) -> set[str]:
    """Returns the spellings of the special tokens that `names` has."""
    found = []
    for name, value in names.items():
        if name.endswith("_special_tokens"):
            found += (
                value.values()
                if isinstance(value, dict)
                else value
                if isinstance(value, list)
                else ()
            )
        elif name.endswith("_token"):
            found.append(value)
    return {text for text in map(_spelling, found) if text}


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 8


def _spelling(token: Any) -> str | None:
    spelling = token.get("content") if isinstance(token, dict) else token
    return spelling if isinstance(spelling, str) else None


def _named(name: str, names: Mapping[str, Any], spelled: Mapping[str, int]) -> int | None:
    """Returns the id of the BOS or EOS token that files beside a `tokenizer.json` name."""
    token = spelled.get(_spelling(names.get(f"{name}_token")))
    if token is None:
        token = names.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if not integer(0).accepts(token) or token not in spelled.values():
            return None
    return token


def _framing(name: str, described: Mapping[str, Any]) -> int | None:
    """Returns the id of the token that the post-processor puts before or after a text."""
    place = 0 if name == "bos" else -1
    for part in _processors(described.get("post_processor")):
        try:
            spelling = part["single"][place]["SpecialToken"]["id"]
            return part["special_tokens"][spelling]["ids"][place]
        except (KeyError, IndexError, TypeError):
            continue
    return None


def _processors(table: Any) -> list[Any]:
    if isinstance(table, dict) and table.get("type") == "Sequence":
        return table.get("processors") or []
    return [table]


def _adds_bos(described: Mapping[str, Any], names: Mapping[str, Any], bos_id: int | None) -> bool:
    told = names.get("add_bos_token")
    if isinstance(told, bool):
        return told and bos_id is not None
    return bos_id is not None and _framing("bos", described) == bos_id


def _makes(merge: Any, control: set[str]) -> bool:
    """Returns whether a merge has to do with a control token, of which no text consists."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    texts = [text for text in pair if isinstance(text, str)] if isinstance(pair, list) else []
    return not control.isdisjoint((*texts, "".join(texts)))


def _without_gaps(added: list[dict], size: int, known: Collection[int]) -> list[dict]:
    """Returns the added tokens with others between them, so that the library keeps their ids.

    The library numbers the tokens that are not in the vocabulary after those that are.
    """
    whole, following = [], size
    for entry in added:
        if entry["id"] not in known:
            while following < entry["id"]:
                filler = {"id": following, "content": secrets.token_hex(16), "special": True}
                whole.append(dict.fromkeys(_FLAGS, False) | filler)
                following += 1
            following = entry["id"] + 1
        whole.append(entry)
    return whole
