"""The directive `fields`: a table of a dataclass's fields, for those who write them in TOML.

Names and defaults are the dataclass's; meanings come from its docstring.
"""

import dataclasses
import importlib
import inspect
import json
import re
import types
import typing

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

_WORDS = {int: "integer", float: "number", bool: "true or false", str: "string", tuple: "list"}


class Fields(SphinxDirective):
    """Makes the table; its argument is the dataclass, `prefix` what stands before its names."""

    required_arguments = 1
    option_spec = {"prefix": str}  # noqa: RUF012 - as docutils declares it.

    def run(self):
        """Returns the table."""
        module, _, name = self.arguments[0].rpartition(".")
        made = getattr(importlib.import_module(module), name)
        self.env.note_dependency(inspect.getsourcefile(made))
        prefix = self.options.get("prefix", "")
        meanings, hints = _meanings(made), typing.get_type_hints(made)
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 24 16 14 46"]
        lines += ["   :class: fields", ""]
        lines += _row("field", "value", "default", "meaning")
        for field in dataclasses.fields(made):
            word = _words(hints[field.name])
            lines += _row(f"``{prefix}{field.name}``", word, _default(field), meanings[field.name])
        box = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), 0, box)
        return box.children


def _row(first: str, *others: str) -> list[str]:
    return [f"   * - {first}", *(f"     - {cell}" for cell in others)]


def _meanings(made) -> dict[str, str]:
    """Reads the section Attributes of a docstring."""
    section = re.search(r"\nAttributes:\n(.*?)(?=\n\S|\Z)", inspect.getdoc(made), re.DOTALL)
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _words(hint) -> str:
    """Says what TOML has for a type; None is what is left out."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in choices if kind is not type(None)]
    return ", ".join(_WORDS.get(kind, "table") for kind in kinds)


def _default(field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.default == ():
        return "none"
    return f"``{json.dumps(field.default)}``"


def setup(app):
    """Registers the directive."""
    app.add_directive("fields", Fields)
    return {"parallel_read_safe": True}
