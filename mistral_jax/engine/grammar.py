"""Grammars that answers must follow: JSON, JSON schemas, regular expressions, Lark and GBNF.

llguidance, an optional library, finds the tokens that may come next; `Matcher` follows one answer.
"""

import dataclasses
import functools
import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mistral_jax.base.fields import show
from mistral_jax.tokens import libraries
from mistral_jax.tokens.tokenizer import Tokenizer

# Maximum number of compiled grammars that are kept.
_MOST_KEPT = 64
# Maximum number of characters of a schema, a grammar, and a string in them or a regular expression,
# and of rules or references. From some 2,500 rules on that name each other, llguidance overflows
# its stack, which ends the process. Long regular expressions take gigabytes.
_MOST_SCHEMA, _MOST_TEXT, _MOST_STRING, _MOST_RULES = 1 << 17, 1 << 14, 1 << 13, 1000
# A model may write blanks until it has no tokens left, so their number in a row is bounded.
_BLANKS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"}
# Bounds of the work of compiling a grammar, and of a step.
_LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "max_grammar_size": 500_000}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The texts that an answer may be.

    Attributes:
      source: the grammar in llguidance's form.
      after: id of a control token; the grammar holds for what follows its first occurrence, and
        what precedes it is free. None = the grammar holds from the first token on.
    """

    source: str
    after: int | None = None

    @staticmethod
    def json() -> "Grammar":
        """Returns the grammar of all JSON objects."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def json_schema(schema: Any) -> "Grammar":
        """Returns the grammar of the JSON values that a schema describes.

        Raises:
          ValueError: the schema is not one, or uses what llguidance does not support.
        """
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise ValueError(f"the JSON schema is {show(schema)}; expected an object")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"the JSON schema {show(schema)} is not JSON") from None
        check_schema(schema, text)
        options = {"overrides": _BLANKS}
        build = _library().LLMatcher.grammar_from_json_schema
        return Grammar(libraries.call("the JSON schema is invalid", build, text, **options))

    @staticmethod
    def regex(pattern: str) -> "Grammar":
        """Returns the grammar of the texts that a regular expression of Rust's syntax matches."""
        _check(pattern, "regex", _MOST_STRING)
        return Grammar(_library().LLMatcher.grammar_from_regex(pattern))

    @staticmethod
    def lark(text: str) -> "Grammar":
        """Returns a grammar in Lark's syntax, with llguidance's extensions."""
        _check(text, "grammar", _MOST_TEXT)
        return Grammar.of_lark(text)

    @staticmethod
    def of_lark(text: str) -> "Grammar":
        """Returns a grammar in Lark's syntax that is not from outside: it may be longer."""
        return Grammar(json.dumps({"grammars": [{"lark_grammar": text}]}))

    @staticmethod
    def gbnf(text: str) -> "Grammar":
        """Returns a grammar in llama.cpp's syntax, GBNF.

        Raises:
          ValueError: it is not in this syntax.
        """
        convert = _library("llguidance.gbnf_to_lark").any_to_lark
        _check(text, "grammar", _MOST_TEXT)
        return Grammar.lark(libraries.call("the grammar is invalid", convert, text))

    @staticmethod
    def choice(texts: Sequence[str]) -> "Grammar":
        """Returns the grammar of a few texts."""
        return Grammar.lark("start: " + " | ".join(json.dumps(text) for text in texts))


class Grammars:
    """Compiles grammars for a tokenizer, and keeps the last ones."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        """Makes it without work; the first grammar takes up to some seconds more.

        Args:
          tokenizer: the model's tokenizer.
          vocab_size: number of tokens of the model (V).
          eos_ids: tokens that end an answer.
        """
        self._tokenizer, self._size, self._eos = tokenizer, vocab_size, list(eos_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def start(self, grammar: Grammar, is_new: bool) -> "Matcher":
        """Returns the matcher of an answer.

        Args:
          grammar: the grammar.
          is_new: whether the answer begins a text, so that decoding removes a space before it.

        Raises:
          ValueError: the grammar is invalid, or too complex.
        """
        source = grammar.source
        if is_new and grammar.after is None and self._strips_space:
            source = _after_space(source)
        with self._lock:
            matcher = self._kept.pop(source, None)
        if matcher is None:
            matcher = self._compile(source)
        with self._lock:
            self._kept[source] = matcher
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return Matcher(matcher.deep_copy(), grammar.after)

    def _compile(self, source: str) -> Any:
        library = _library()
        limits = library.LLParserLimits(**_LIMITS)
        options = {"limits": limits, "log_level": 0}
        matcher = library.LLMatcher(self._vocabulary, source, **options)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"the grammar is invalid: {_reason(matcher)}")
        return matcher.deep_copy()

    @functools.cached_property
    def _strips_space(self) -> bool:
        first, later = self._tokenizer.stream(), self._tokenizer.stream(self._tokenizer.encode("a"))
        return any(first.spell(i) != later.spell(i) for i in self._tokenizer.encode("a b"))

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer in llguidance's form; tokens without text are special."""
        tokenizer = self._tokenizer
        # After another text, so that words keep their space.
        decoder = tokenizer.stream(tokenizer.encode("a b"))
        spelled = [decoder.spell(token) for token in range(min(tokenizer.vocab_size, self._size))]
        spelled += [b""] * (self._size - len(spelled))
        special = [token for token, text in enumerate(spelled) if not text]
        names = [text or b"<|%d|>" % token for token, text in enumerate(spelled)]
        library = _library()
        eos = self._eos or [special[0]]

        class Wrapped:
            eos_token_id, bos_token_id = eos[0], tokenizer.bos_id
            tokens, special_token_ids = names, special

            def __call__(self, text: str) -> list[int]:
                return tokenizer.encode(text, continues=True)

        wrapper = library.TokenizerWrapper(Wrapped())
        return library.LLTokenizer(wrapper, n_vocab=self._size, eos_token=eos)


class Matcher:
    """Follows one answer through its grammar.

    Attributes:
      holds: whether the grammar restricts the next token.
    """

    def __init__(self, matcher: Any, after: int | None):
        self._matcher, self._after = matcher, after
        self.holds = after is None

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether the answer is complete, and cannot go on.

        Raises:
          ValueError: the grammar does not allow the token, or has become too complex.
        """
        if not self.holds:
            self.holds = token == self._after
            return False
        if not self._matcher.consume_token(token):
            raise ValueError(f"the answer left its grammar: {_reason(self._matcher)}")
        return self._matcher.is_stopped()

    def fill(self, mask: np.ndarray) -> None:
        """Sets the bits of the tokens that may come next.

        Args:
          mask: one bit a token, [ceil(V / 32)] int32, all of them set.

        Raises:
          ValueError: the grammar has become too complex.
        """
        if self.holds:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if self._matcher.is_error():
                raise ValueError(f"the grammar has no next token: {_reason(self._matcher)}")


def _library(name: str = "llguidance") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            "llguidance is needed for answers in a grammar: pip install 'mistral-jax-flax[serve]'"
        ) from None


def _after_space(source: str) -> str:
    """Returns a grammar that allows one space before the texts of another one.

    Models write the first word of an answer with a space in front, which decoding removes.
    """
    inner = json.loads(source)
    inner["grammars"][0]["name"] = "answer"
    first = {"lark_grammar": 'start: " "? @answer'}
    return json.dumps(inner | {"grammars": [first, *inner["grammars"]]})


def check_schema(schema: Any, text: str) -> None:
    """Raises a ValueError if a JSON schema, whose JSON is `text`, needs too much to compile."""
    _check(text, "JSON schema", _MOST_SCHEMA)
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            _check(value, "text in the JSON schema", _MOST_STRING)


def _check(text: Any, name: str, most: int) -> None:
    """Raises a ValueError if a text from outside needs too much to compile."""
    if not isinstance(text, str):
        raise ValueError(f"the {name} is {show(text)}; expected a text")
    if len(text) > most:
        raise ValueError(
            f"the {name} has {len(text)} characters; expected at most {most}: simplify it"
        )
    for what, count in (("lines", text.count("\n")), ("references", text.count('"$ref"'))):
        if count >= _MOST_RULES:
            raise ValueError(
                f"the {name} has {count} {what}; expected fewer than {_MOST_RULES}: simplify it"
            )


def _reason(matcher: Any) -> str:
    return " ".join(matcher.get_error().split())[:200] or "it allows no token"
