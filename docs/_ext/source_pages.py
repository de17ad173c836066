"""Links to files that are no pages of the site: each leads to a page of the file, highlighted.

A link to a folder leads to its README's page, or else to the folder in the repository.
"""

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
    app.connect(
        "env-merge-info", lambda app, env, names, other: _linked(env).update(_linked(other))
    )
    app.connect("doctree-resolved", _resolve)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}


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
            node.replace_self(_link(node, to_file=path))
    for node in [*doctree.findall(addnodes.pending_xref)]:
        if node.get("reftype") != "myst" or node.get("reftargetid"):
            continue
        path = posixpath.normpath(posixpath.join(here, node["reftarget"]))
        if (root / path).is_dir():
            node.replace_self(_link(node, to_folder=path))


def _link(node, **target):
    return nodes.reference("", "", *node.children, internal=True, **target)


def _resolve(app, doctree, docname):
    """Points the marked links to where their pages are."""
    for node in doctree.findall(nodes.reference):
        if "to_file" in node:
            node["refuri"] = _uri(app, docname, f"source/{node['to_file']}")
        elif "to_folder" in node:
            readme = f"{node['to_folder']}/README"
            if readme in app.env.found_docs:
                node["refuri"] = _uri(app, docname, readme)
            else:
                repository = app.config.html_theme_options["source_repository"]
                node["internal"] = False
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
