"""A SentencePiece tokenizer as Transformers reads one: the same ids, without SentencePiece.

`tokenizer.json` is read by the `tokenizers` library alone; `tokenizer_config.json` has the chat
template, which makes the ids of `Tokenizer.encode_chat`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mistral_jax import spm
from mistral_jax.config import ModelConfig
from mistral_jax.spm import Kind, Piece
from mistral_jax.tokenizer import Tokenizer

# The form of `mistral_jax.messages`: what makes one message of several in a row, where the system
# text goes, and what stands around a text. Each text between control tokens is encoded by itself.
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

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


def problem(data: bytes) -> str | None:
    """Says why `tokenizer.json` cannot give the ids of a SentencePiece file; None = it can."""
    pieces = spm.pieces(data)
    if not spm.normalizer(data).is_identity:
        return "the tokenizer changes characters before it divides a text"
    if any(piece.kind == Kind.UNUSED for piece in pieces):
        return "the tokenizer has pieces that are not to be used"
    if _own(pieces) and any(piece.text.startswith("<0") for piece in _plain(pieces)):
        return (
            "the tokenizer has user-defined pieces, and one that begins as the spelling of a byte"
        )
    return None


def tokenizer_json(data: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the contents of `tokenizer.json`, of a file that has no `problem`."""
    pieces, prefix = spm.pieces(data), spm.normalizer(data).prefix
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
        "pre_tokenizer": _pre_tokenizer(_own(pieces)),
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
            "unk_token": _unknown(pieces),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == Kind.BYTE for piece in pieces),
            "ignore_merges": bool(_own(pieces)),
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in _merges(pieces)],
        },
    }


def tokenizer_config(data: bytes, tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json`."""
    contents = {
        # Any other class divides texts by rules of its own, beside those of tokenizer.json.
        "tokenizer_class": "LlamaTokenizer" if problem(data) else "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": _unknown(spm.pieces(data)),
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
    }
    if tokenizer.version in _FORMS and _has_template(data, tokenizer):
        template = _TEMPLATE
        names = ("PLACE", "USER", "ANSWER")
        for name, value in zip(names, _FORMS[tokenizer.version], strict=True):
            template = template.replace(name, value)
        contents["chat_template"] = template
    return contents


def _has_template(data: bytes, tokenizer: Tokenizer) -> bool:
    """Tells whether a conversation written as one text has the ids of its parts.

    In v1 no control token divides a question from its answer, but the space in front of the answer
    does, unless a piece has both sides.
    """
    divided = not any(f"]{_SPACE}" in piece.text for piece in spm.pieces(data))
    return tokenizer.version != "v1" or (spm.normalizer(data).prefix and divided)


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Yields the pairs that make a piece, in the order in which SentencePiece merges them."""
    plain = {piece.text: piece.score for piece in _plain(pieces)}
    for text in sorted(plain, key=plain.__getitem__, reverse=True):
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in plain and text[cut:] in plain:
                yield text[:cut], text[cut:]


def _plain(pieces: Sequence[Piece]) -> Iterator[Piece]:
    return (piece for piece in pieces if piece.kind == Kind.NORMAL)


def _unknown(pieces: Sequence[Piece]) -> str:
    return next(piece.text for piece in pieces if piece.kind == Kind.UNKNOWN)


def _own(pieces: Sequence[Piece]) -> list[str]:
    """Returns the user-defined pieces, which are found before anything is merged."""
    return [piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED]


def _pre_tokenizer(own: Sequence[str]) -> dict[str, Any] | None:
    if not own:
        return None
    # SentencePiece takes the longest at each place. A part that is a piece is taken whole; but
    # what spells a byte is text, so it is divided where no piece begins with both sides.
    longest_first = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            for pattern in (longest_first, r"\A<(?=0x[0-9A-F]{2}>\z)")
        ],
    }
