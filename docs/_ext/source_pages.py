"""Pages of files: each file that some page links to gets one of its own, highlighted.

So links in Markdown to files of the repository hold on the site as well. Each entry of a function
or class gets such a link, to its line. A link to a folder leads to its README's page, or else to
the folder in the repository.
"""

import functools
import importlib
import inspect
import posixpath
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.util.osutil import relative_uri

_DOWNLOADS = (".png", ".svg", ".jpg")


def setup(app):
    """Registers the extension."""
    app.connect("doctree-read", _find, priority=400)  # Before Sphinx collects downloads.
    app.connect("env-purge-doc", lambda app, env, name: _linked(env).pop(name, None))
    app.connect("doctree-resolved", _resolve)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": False, "env_version": 1}


def _linked(env) -> dict[str, set[str]]:
    """The files that each page links to, by paths in the repository."""
    if not hasattr(env, "linked_files"):
        env.linked_files = {}
    return env.linked_files


def _find(app, doctree):
    """Marks the links of a page that lead to files and folders of the repository."""
    env = app.env
    linked = _linked(env).setdefault(env.docname, set())
    root, here = Path(app.srcdir), posixpath.dirname(env.docname)
    for node in [*doctree.findall(addnodes.download_reference)]:
        path = posixpath.normpath(posixpath.join(here, node["reftarget"]))
        if (root / path).is_file() and not path.endswith(_DOWNLOADS):
            linked.add(path)
            node.replace_self(nodes.reference("", "", *node.children, internal=True, to_file=path))
    for node in [*doctree.findall(addnodes.pending_xref)]:
        if node.get("reftype") != "myst" or node.get("reftargetid"):
            continue
        path = posixpath.normpath(posixpath.join(here, node["reftarget"]))
        if (root / path).is_dir():
            node.replace_self(nodes.reference("", "", *node.children, to_folder=path))
    for node in doctree.findall(addnodes.desc_signature):
        if found := _source(node["module"], node["fullname"], root):
            path, line = found
            linked.add(path)
            text = nodes.inline("", "[source]", classes=["viewcode-link"])
            node += nodes.reference("", "", text, internal=True, to_file=path, to_line=line)


def _source(module: str, name: str, root: Path) -> tuple[str, int] | None:
    """Returns where something is defined: a path in the repository, and a line."""
    try:
        made = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        made = inspect.unwrap(made.fget if isinstance(made, property) else made)
        path = Path(inspect.getsourcefile(made)).resolve().relative_to(root.resolve())
        return path.as_posix(), inspect.getsourcelines(made)[1]
    except (AttributeError, TypeError, ValueError):  # A field, or something that Flax made.
        return None


def _resolve(app, doctree, docname):
    """Points the marked links to where their pages are."""
    for node in doctree.findall(nodes.reference):
        if "to_file" in node:
            node["refuri"] = _uri(app, docname, f"source/{node['to_file']}")
            if "to_line" in node:
                node["refuri"] += f"#L-{node['to_line']}"
        elif "to_folder" in node:
            readme = f"{node['to_folder']}/README"
            node["internal"] = readme in app.env.found_docs
            if node["internal"]:
                node["refuri"] = _uri(app, docname, readme)
            else:
                repository = app.config.html_theme_options["source_repository"]
                node["refuri"] = f"{repository}/tree/main/{node['to_folder']}"


def _uri(app, docname, page):
    return relative_uri(app.builder.get_target_uri(docname), app.builder.get_target_uri(page))


def _pages(app):
    """Yields a page for each file that some page links to."""
    for path in sorted(set().union(*_linked(app.env).values())):
        text = Path(app.srcdir, path).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(path)
        except ClassNotFound:
            lexer = TextLexer()
        form = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
        body = f'<h1 class="source-file">{path}</h1>\n{highlight(text, lexer, form)}'
        yield f"source/{path}", {"title": path, "body": body}, "page.html"
