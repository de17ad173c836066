"""Converts a SentencePiece tokenizer to the files that Transformers reads, with the same ids.

The `tokenizers` library reads `tokenizer.json` without SentencePiece. The chat template in
`tokenizer_config.json` gives the same ids as `Tokenizer.encode_chat`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mistral_jax.config import ModelConfig
from mistral_jax.tokens import spm
from mistral_jax.tokens.spm import Kind, Piece
from mistral_jax.tokens.tokenizer import Tokenizer

# The chat form of `mistral_jax.tokens.messages`: it joins consecutive messages of one role, places
# the system text and puts control tokens around texts. Transformers encodes each text between
# control tokens separately.
_TEMPLATE = """\
{%- macro refuse(problem) -%}{{ raise_exception(problem) }}{%- endmacro -%}
{%- if tools -%}{{ refuse('tools are not supported') }}{%- endif -%}
{%- set ns = namespace(runs=[]) -%}
{%- for message in messages -%}
  {%- set role, content = message['role'], message['content'] -%}
  {%- set before = ns.runs[-1][0] if ns.runs else 'system' -%}
  {%- if role not in ['system', 'user', 'assistant'] -%}
    {{ refuse('expected messages of system, user and assistant') }}
  {%- elif role == 'system' and before != 'system' -%}
    {{ refuse('expected system messages at the beginning') }}
  {%- elif role == 'assistant' and before == 'system' -%}
    {{ refuse('expected a user message before an answer') }}
  {%- endif -%}
  {%- if content is not string -%}
    {%- if content | rejectattr('type', 'equalto', 'text') | list -%}
      {{ refuse('expected content of text alone') }}
    {%- endif -%}
    {%- set content = content | map(attribute='text') | select | join('\\n\\n') -%}
  {%- endif -%}
  {%- if ns.runs and before == role -%}
    {%- set content = [ns.runs[-1][1], content] | select | join('\\n\\n') -%}
    {%- set ns.runs = ns.runs[:-1] -%}
  {%- endif -%}
  {%- set ns.runs = ns.runs + [[role, content]] -%}
{%- endfor -%}
{%- set system = '' -%}
{%- if ns.runs and ns.runs[0][0] == 'system' -%}
  {%- set system = ns.runs[0][1] -%}
  {%- set ns.runs = ns.runs[1:] -%}
{%- endif -%}
{%- if not ns.runs -%}{{ refuse('expected a user message') }}{%- endif -%}
{%- set place = PLACE -%}
{{- bos_token -}}
{%- for role, content in ns.runs -%}
  {%- if role == 'user' -%}
    {%- if system and loop.index0 == place -%}
      {%- set content = system + '\\n\\n' + content -%}
    {%- endif -%}
    {{- USER -}}
  {%- else -%}
    {{- ANSWER -}}
    {%- if not (loop.last and messages[-1]['prefix']) -%}{{ eos_token }}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""
_LAST_USER = "ns.runs | length - 1 - (ns.runs[-1][0] == 'assistant') | int"
_FORMS = {
    "v1": ("0", "'[INST] ' + content + ' [/INST]'", "(' ' if content else '') + content"),
    "v2": (_LAST_USER, "'[INST]' + content + '[/INST]'", "content.rstrip(' ')"),
}
_FORMS["v3"] = _FORMS["v2"]

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's replacement for a space


def files(
    data: bytes, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[dict[str, Any], str | None]:
    """Returns the JSON files that Transformers reads in place of a SentencePiece file.

    `tokenizer.json` cannot express every SentencePiece model; it is then left out.

    Args:
      data: the contents of the SentencePiece file.
      tokenizer: the tokenizer that was read from the file.
      config: the config of the model.

    Returns:
      JSON values by file name, and the reason why `tokenizer.json` is left out; None = it is there.
    """
    try:
        pieces, rules = spm.pieces(data), spm.normalizer(data)
    except ValueError:
        pieces, rules = [], spm.Normalizer(is_identity=False, prefix=False)
    problem = None
    if [piece.text for piece in pieces] != [*map(tokenizer.piece, range(tokenizer.vocab_size))]:
        pieces, problem = [], "the tokenizer has fields of an unknown form"
    elif not rules.is_identity:
        problem = "the tokenizer changes characters before it divides a text"
    elif any(piece.kind == Kind.UNUSED for piece in pieces):
        problem = "the tokenizer has pieces that must not be used"
    contents = {
        # All other classes apply rules of their own in addition to those of tokenizer.json.
        "tokenizer_class": "LlamaTokenizer" if problem else "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
    }
    # In v1 there is no control token between a question and its answer. The space before the answer
    # separates them, unless a piece contains both the end of the question and the space.
    divided = rules.prefix and not any(f"]{_SPACE}" in piece.text for piece in pieces)
    if tokenizer.chat_form == "template":
        contents |= tokenizer.chat.tokens
    if tokenizer.chat_form in _FORMS and pieces and (divided or tokenizer.chat_form != "v1"):
        contents["chat_template"] = _template(*_FORMS[tokenizer.chat_form])
    found = {"tokenizer_config.json": contents}
    if not problem:
        found["tokenizer.json"] = _tokenizer_json(pieces, rules.prefix, tokenizer)
    return found, problem


def _template(place: str, user: str, answer: str) -> str:
    names = {"PLACE": place, "USER": user, "ANSWER": answer}
    return re.sub("|".join(names), lambda match: names[match[0]], _TEMPLATE)


def _tokenizer_json(pieces: Sequence[Piece], prefix: bool, tokenizer: Tokenizer) -> dict[str, Any]:
    special = [i for i, piece in enumerate(pieces) if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)]
    bos = tokenizer.piece(tokenizer.bos_id)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": pieces[i].text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}] * prefix + [spaces],
        },
        "pre_tokenizer": _pre_tokenizer(pieces, tokenizer),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(tokenizer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == Kind.BYTE for piece in pieces),
            "ignore_merges": bool(_own(pieces)),
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in _merges(pieces)],
        },
    }


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Yields the pairs that merge to a piece, in SentencePiece's order of merges."""
    # A piece with a plain space never occurs, because spaces are replaced by U+2581 first.
    plain = {
        piece.text: piece.score
        for piece in pieces
        if piece.kind == Kind.NORMAL and " " not in piece.text
    }
    for text in sorted(plain, key=plain.__getitem__, reverse=True):
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in plain and text[cut:] in plain:
                yield text[:cut], text[cut:]


def _own(pieces: Sequence[Piece]) -> list[str]:
    """Returns the user-defined pieces, which are matched before any merge."""
    return [piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED]


def _pre_tokenizer(pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Returns a pre-tokenizer that isolates user-defined pieces, the longest match first.

    `tokenizers` encodes a part that is in the vocabulary as one token. A text that spells a control
    token or a byte must not become that token, so it is divided again where SentencePiece divides
    it.
    """
    own = _own(pieces)
    if not own:
        return None
    spelled: dict[str, list[str]] = {}
    for text, _, kind in pieces:
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE):
            first = tokenizer.piece(tokenizer.encode(text, continues=True)[0])
            cut = len(first) if text.startswith(first) else 1  # 1: a character without a piece
            spelled.setdefault(text[:cut], []).append(text[cut:])
    divided = (rf"{re.escape(first)}(?={_any(rests)}\z)" for first, rests in spelled.items())
    patterns = _any(sorted(own, key=len, reverse=True)), rf"\A(?:{'|'.join(divided)})"
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            for pattern in patterns
        ],
    }


def _any(texts: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, texts))})"
