"""The documentation site: it builds without a warning, and has all that it says it has."""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from snippets.rules import PARSERS

import mistral_jax
from mistral_jax.checkpoint.lora import Lora
from mistral_jax.config import ModelConfig
from mistral_jax.parallel.rules import LOGICAL_AXES
from mistral_jax.parallel.sharding import _parameters
from mistral_jax.training.recipe import Data, Preference, Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class Page(HTMLParser):
    """What a test asks of a page: its ids, its links, and the text of its pieces of code."""

    def __init__(self, file):
        super().__init__()
        self.ids, self.links, self.codes, self._code = set(), [], [], None
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)
        if tag == "code":
            self._code = ""

    def handle_data(self, data):
        if self._code is not None:
            self._code += data

    def handle_endtag(self, tag):
        if tag == "code":
            self.codes.append(self._code)
            self._code = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The site, built; notebooks are not run."""
    base = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-c", DOCS, "-d", base / "doctrees"]
    command += ["-W", "--keep-going", "-D", "nb_execution_mode=off", ROOT, base / "html"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout + made.stderr == ""
    return base / "html"


@pytest.fixture(scope="module")
def site(folder):
    """The site's pages by their paths."""
    return {file.relative_to(folder).as_posix(): Page(file) for file in folder.rglob("*.html")}


def test_every_document_is_a_page_that_the_first_one_leads_to(site):
    sources = [*DOCS.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    pages = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in sources}
    assert len(pages) > 15
    first = site["docs/index.html"].links
    reached = {os.path.normpath(f"docs/{link}") for link in first}
    assert pages - reached == {"docs/index.html"}
    assert site["index.html"].links == ["docs/index.html"]


def test_no_link_within_the_site_is_dead(site, folder):
    dead, count = [], 0
    for name, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            beside = os.path.join(os.path.dirname(name), unquote(parts.path))
            target = os.path.normpath(beside) if parts.path else name
            ids = site[target].ids if target in site else ()
            fragment = unquote(parts.fragment)
            if not (folder / target).is_file() or (fragment and fragment not in ids):
                dead.append(f"{name}: {link}")
    assert count > 1000
    assert not dead


def test_links_to_files_of_the_repository_lead_to_their_source(site):
    assert "../source/mistral_jax/model/transformer.py.html" in site["docs/architecture.html"].links
    assert "L-1" in site["source/mistral_jax/model/transformer.py.html"].ids
    lines = (ROOT / "mistral_jax/model/cache.py").read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("def init_cache("))
    address = f"../source/mistral_jax/model/cache.py.html#L-{number}"
    assert address in site["docs/python.html"].links


def test_every_public_name_has_an_entry(site):
    missing = {f"mistral_jax.{name}" for name in mistral_jax.__all__} - site["docs/python.html"].ids
    assert not missing


@pytest.mark.parametrize(
    "name", sorted(set(PARSERS) - {"convert"})
)  # "convert" is another's short name
def test_every_command_has_all_its_options(site, name):
    prog = f"python--m-{name}"
    parsers = {prog: PARSERS[name]()}
    for action in parsers[prog]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers |= {f"{prog}-{each}": made for each, made in action.choices.items()}
    expected = {
        f"{prefix}-{option}"
        for prefix, made in parsers.items()
        for action in made._actions
        for option in action.option_strings
    }
    assert len(expected) > 8
    assert expected <= site["docs/commands.html"].ids


@pytest.mark.parametrize(
    ("made", "prefix"),
    [(ModelConfig, ""), (Recipe, ""), (Data, "data."), (Lora, "lora."), (Preference, "dpo.")],
)
def test_every_field_of_a_file_is_explained(site, made, prefix):
    fields = {prefix + field.name for field in dataclasses.fields(made)}
    assert fields <= set(site["docs/configuration.html"].codes)


def rows_of(page, columns):
    """The rows of a page's tables that have this many columns, without what marks up code."""
    lines = re.findall(r"^\| (.*) \|$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    rows = [[cell.strip("`") for cell in line.split(" | ")] for line in lines]
    return [row for row in rows if len(row) == columns]


def test_the_table_of_logical_axes_is_that_of_the_model():
    arrays = {}
    for name, axes, _ in _parameters(ModelConfig.from_name("nano")):
        for axis in axes:
            arrays.setdefault(axis, set()).add(name)
    rows = {axis: text for axis, _, text in rows_of("configuration.md", 3)}
    assert set(LOGICAL_AXES) <= set(rows)
    every = arrays.pop("embed")
    assert rows["embed"] == "every parameter"
    assert every == {name for name, _, _ in _parameters(ModelConfig.from_name("nano"))}
    for axis, names in arrays.items():
        said = re.findall(r"[\w/]*_proj|\w+/\w+", rows[axis].partition(";")[0])
        assert names == {n for n in names if any(part in n for part in said)}, axis
        assert all(any(part in n for n in names) for part in said), axis


def test_the_shapes_in_the_format_are_those_of_a_model():
    rows = {row[0]: row[1:] for row in rows_of("checkpoint.md", 3)}
    config = ModelConfig.from_name("mistral-7b-v0.3")
    letters = dict(zip("VDFNKH", _sizes(config), strict=True))
    parameters = [*_parameters(config)]
    assert len(parameters) == 12
    for name, _, shape in parameters:
        written, numbers = rows[name.replace("layers_*", "layers_i")]
        assert tuple(letters[c] for c in written.strip("[]").split(", ")) == shape
        assert tuple(map(int, numbers.split(" x "))) == shape


def _sizes(config):
    return (
        *(config.vocab_size, config.embed_dim, config.mlp_dim),
        *(config.num_heads, config.num_kv_heads, config.head_dim),
    )


def test_the_releases_are_as_their_configs_say():
    for release, base, window, vocabulary, _ in rows_of("exactness.md", 5)[1:]:
        if not release.startswith("v0"):
            continue
        config = ModelConfig.from_name(f"mistral-7b-{release[:4]}")
        assert float(base.replace(",", "")) == config.rope_theta
        assert int(vocabulary.replace(",", "")) == config.vocab_size
        seen = None if window == "none" else int(window.split()[0].replace(",", ""))
        assert seen == config.sliding_window
