"""Renders Jinja templates in a process of its own, and reports who wrote each character.

`template.py` starts this file as a program. It imports nothing of the package: a template may loop
for ever or fill the memory, and only a process with limits can be stopped at any time. Requests and
answers are lines of JSON.

A template's text and the user's are told apart by `Traced`, a string that carries a mark for each
of its characters through concatenation, slicing and the other methods of strings. A method that
does not carry them gives characters marked UNKNOWN, so that a mark is never wrong.
"""
# ruff: noqa: D102 - the methods of `Traced` are those of `str`

import datetime
import functools
import json
import re
import sys

USER, WRITTEN, UNKNOWN, GENERATED = 0, 1, 2, 4  # marks; GENERATED is added to the others


class Traced(str):
    """A string with a mark for each character; equal to the plain string in every comparison."""

    def __new__(cls, text="", marks=None):
        """Makes a string; `marks` is one byte for each character, None = UNKNOWN."""
        made = super().__new__(cls, text)
        made._marks = bytes([UNKNOWN]) * len(made) if marks is None else marks
        return made

    def __str__(self):
        return self

    def __add__(self, other):
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other):
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count):
        return Traced(str.__mul__(self, count), self._marks * count)

    __rmul__ = __mul__

    def __mod__(self, values):
        values = list(values) if isinstance(values, tuple) else [values]
        pieces = list(self._cut(re.split("(%[sd%])", str.__str__(self))))
        holes = [piece for piece in pieces if piece in ("%s", "%d")]
        if len(holes) != len(values) or any("%" in piece for piece in pieces[::2]):
            return Traced(str.__mod__(self, tuple(values)))
        filled = [
            str(values.pop(0)) if piece in ("%s", "%d") else piece[:1] if piece == "%%" else piece
            for piece in pieces
        ]
        return concat(filled)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return Traced(str.__getitem__(self, key), self._marks[key])
        text = str.__getitem__(self, key)
        place = key + len(self) if key < 0 else key
        return Traced(text, self._marks[place : place + 1])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def lstrip(self, chars=None):
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars=None):
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix):
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix):
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep=None, maxsplit=-1):
        return list(self._cut(str.split(self, sep, maxsplit), len(sep or "")))

    def rsplit(self, sep=None, maxsplit=-1):
        return list(self._cut(str.rsplit(self, sep, maxsplit), len(sep or "")))

    def splitlines(self, keepends=False):
        return list(self._cut(str.splitlines(self, keepends)))

    def partition(self, sep):
        return tuple(self._cut(str.partition(self, sep)))

    def rpartition(self, sep):
        return tuple(self._cut(str.rpartition(self, sep)))

    def replace(self, old, new, count=-1):
        if not old:
            return Traced(str.replace(self, old, new, count))
        return join(new, self.split(old, count))

    def join(self, texts):
        return join(self, texts)

    def _cut(self, pieces, gap=0):
        """Yields the pieces of this string with their marks; `gap` characters are between them."""
        place = 0
        for piece in pieces:
            place = str.find(self, piece, place)
            yield self[place : place + len(piece)]
            place += len(piece) + gap


def concat(texts):
    """Joins texts with their marks."""
    texts = [str(text) for text in texts]
    return Traced("".join(texts), b"".join(map(marks_of, texts)))


def join(between, texts):
    """Joins texts by another one, with their marks."""
    joined = []
    for text in texts:
        joined += [between, text]
    return concat(joined[1:])


def marks_of(text):
    """Returns the marks of a text, one byte for each character."""
    return text._marks if isinstance(text, Traced) else bytes([UNKNOWN]) * len(text)


def marked(value, mark=USER):
    """Returns JSON values with all strings marked."""
    if isinstance(value, str):
        return Traced(value, bytes([mark]) * len(value))
    if isinstance(value, dict):
        return {marked(key, mark): marked(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, mark) for item in value]
    return value


def make_environment():
    """Returns the sandbox of Transformers' chat templates, with strings that are traced."""
    import jinja2
    from jinja2 import filters, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """The tag `{% generation %}`, around what the model learns."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def mark(self, caller):
            text = concat([caller()])
            return Traced(text, bytes(mark | GENERATED for mark in text._marks))

    class Literals(NodeTransformer):
        """Marks the strings in a template's source as written by it."""

        def visit_TemplateData(self, node):
            return _filter(nodes.Const(node.data, lineno=node.lineno), "written")

        def visit_Const(self, node):
            return _filter(node, "written") if isinstance(node.value, str) else node

        def visit_Concat(self, node):
            node = self.generic_visit(node)
            return _filter(nodes.List(node.nodes, lineno=node.lineno), "concat")

    def _filter(node, name):
        made = nodes.Filter(node, f"{name} of the template", [], [], None, None)
        return made.set_lineno(node.lineno).set_environment(environment)

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox; what it forbids is an error at once, not when the result is used."""

        concat = staticmethod(concat)

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"it reads the attribute {attribute}, which no template may")

    @jinja2.pass_context  # So that Jinja does not compute it in advance, and forget the marks.
    def written(context, text):
        return Traced(text, bytes([WRITTEN]) * len(text))

    @jinja2.pass_context
    def joined(context, values, d="", attribute=None):
        if attribute is not None:
            values = map(filters.make_attrgetter(context.environment, attribute), values)
        return join(d, values)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return marked(json.dumps(value, ensure_ascii=ensure_ascii, **options))

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters |= {
        "written of the template": written,
        "concat of the template": jinja2.pass_context(lambda context, texts: concat(texts)),
        "join": joined,
        "safe": lambda value: value,
        "string": lambda value: concat([value]),
        "tojson": to_json,
    }
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.globals.pop("lipsum")

    @functools.lru_cache(8)
    def compiled(source):
        return environment.from_string(Literals().visit(environment.parse(source)))

    return compiled


def render(compiled, request, most):
    """Renders one request; returns the text and the runs of equal marks, or the error."""
    variables = marked(request["variables"], WRITTEN)
    variables["messages"] = [
        {**message, "role": marked(message["role"], WRITTEN)}
        for message in marked(request["messages"])
    ]
    variables["tools"] = marked(request["tools"])
    pieces, size = [], 0
    for piece in compiled(request["template"]).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise ValueError(f"it writes more than {most:,} characters")
    text = concat(pieces)
    runs = (match[0] for match in re.finditer(rb"(?s)(.)\1*", text._marks))
    return {"text": text, "runs": [[len(run), run[0]] for run in runs]}


def main():
    """Answers requests until the standard input ends."""
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    import resource
    import signal

    compiled = make_environment()
    resource.setrlimit(resource.RLIMIT_AS, (setup["bytes"], setup["bytes"]))
    for line in sys.stdin:
        # The signal ends the process in whatever it does, and counts only time that it computes.
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            answer = render(compiled, json.loads(line), setup["characters"])
        except MemoryError:
            answer = {"error": f"it needs more than {setup['bytes'] >> 20} MiB of memory"}
        except RecursionError:
            answer = {"error": "its macros call each other without end"}
        except Exception as error:  # A template can raise any error.
            where = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
            answer = {"error": f"{error or type(error).__name__}{where}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
