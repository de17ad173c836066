"""The documentation site: `make docs` builds it into build/site.

The source directory is the repository, so that a relative link in a Markdown file or a notebook
means the same on the site and in a repository browser.
"""

import re
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

_ROOT = Path(__file__).resolve().parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
repository = _PROJECT["urls"]["Repository"]

project = "mistral_jax"
version = release = _PROJECT["version"]
author = "The mistral_jax authors"
copyright = f"{author}, {_PROJECT['license']}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
    "fields",
    "source_pages",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "docs/*.md",
    "notebooks/[0-9]*.ipynb",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/*/README.md",
    "mistral_jax/assets/*/MODEL_CARD.md",
]
exclude_patterns = [".*", "**/.*", "build", "runs", "dist", "*.egg-info", "tests"]
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

nb_execution_mode = "cache"
nb_execution_cache_path = str(_ROOT / "build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

mermaid_height = "auto"
mermaid_light_theme = "neutral"
mermaid_fullscreen_button = "+"

# Docstrings put code between single backticks; what has an entry here is linked to it.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

html_theme = "furo"
html_title = "mistral_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": repository,
    "source_branch": "main",
    "source_directory": "",
}
linkcheck_ignore = [r"https://colab\.research\.google\.com/.*"]


_RULES = "tuple[tuple[str, str | tuple[str, ...] | None], ...]"  # `Rules` of model/layers.py


def _tidy_signature(app, what, name, obj, options, signature, returns):
    """Takes out of a signature what linen adds to each module, and what is no source text."""
    if signature is not None:
        signature = re.sub(r", parent: .*?(?=\)$)", "", signature)
        signature = signature.replace(_RULES, "Rules")
        signature = re.sub(r"<class '(?:jax\.numpy|numpy)\.(\w+)'>", r"jnp.\1", signature)
    return signature, returns


def _skip_member(app, what, name, obj, skip, options):
    """Leaves out what Flax adds to dataclasses and asks of modules."""
    return True if name in ("replace", "setup") else skip


def _open_at_root(app, error):
    """Makes the site's root lead to its first page."""
    if error is None and app.builder.format == "html":
        to = app.builder.get_target_uri(root_doc)
        Path(app.outdir, "index.html").write_text(
            f'<!doctype html><meta charset="utf-8"><title>{project}</title>'
            f'<meta http-equiv="refresh" content="0; url={to}"><a href="{to}">{project}</a>\n',
            encoding="utf-8",
        )


def setup(app):
    """Registers what is done here."""
    app.connect("autodoc-process-signature", _tidy_signature)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("build-finished", _open_at_root)
