"""Laws of documents: every page is run, commands in sentences parse, and the runner can fail."""

import argparse
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from snippets import blocks, rules, stand_ins
from sybil import Sybil
from sybil.example import SybilFailure

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
OTHERS = ("--kill-on-bad-exit",)  # options of other programs
SYBIL = Sybil(parsers=[blocks.parse], pattern="*.md", teardown=blocks.close)


def pages():
    """Returns all documents, those that are not committed yet too."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({ROOT / name for name in done.stdout.split() if (ROOT / name).is_file()})


def shown_commands():
    """Returns all commands of console blocks."""
    return [
        command
        for page in pages()
        for example in SYBIL.parse(page).examples()
        if example.parsed["language"] == "console"
        for command, _ in blocks.commands(example.parsed["source"])
    ]


def sentences(page):
    """Returns a page without its fenced blocks."""
    text, at, kept = page.read_text(), 0, []
    for example in SYBIL.parse(page).examples():
        kept.append(text[at : example.region.start])
        at = example.region.end
    return "".join([*kept, text[at:]])


def test_every_page_is_run():
    ran = [ROOT / path for path in SETTINGS["testpaths"]]
    missed = [page for page in pages() if not any(page.is_relative_to(path) for path in ran)]
    assert missed == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_sentence_parses(page):
    text = sentences(page)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    for span in [*spans, *re.findall(r"(?m)^ {4}(python .*)$", text)]:
        if re.match(r"([A-Z_]+=\S+ )*python -m (mistral_jax\.\w+|convert) (?!\S+$)", span):
            assert rules.check_parsed(None, span) is None, span
        elif span.startswith("python benchmarks/"):
            assert rules.check_benchmark(None, span) is None, span
        elif span.startswith("pip install "):
            assert rules.check_pip(None, span) is None, span


def test_every_option_in_a_sentence_exists():
    known = set(OTHERS)
    for make in rules.PARSERS.values():
        known |= options_of(make())
    for file in (ROOT / "benchmarks").glob("*.py"):
        known |= rules.options_of_benchmark(file)
    for page in pages():
        for span in re.findall(r"`([^`]+)`", sentences(page)):
            named = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", span))
            assert named <= known, (page.name, named - known)


def options_of(parser):
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(options_of, action.choices.values()))
    return found


def test_no_exception_is_stale():
    commands = shown_commands()
    for pattern, _ in rules.SHORTENED:
        assert any(re.search(pattern, command, re.DOTALL) for command in commands), pattern
    for pattern in rules.UNCOMPARED:
        assert any(re.search(pattern, command, re.DOTALL) for command in commands), pattern
    for pattern, _ in rules.CHECKS:
        assert any(re.match(pattern, command, re.DOTALL) for command in commands), pattern
    text = "".join(page.read_text() for page in pages())
    for name in (*stand_ins.STAND_INS, *stand_ins.REPOSITORIES):
        assert name in text, name


def run(tmp_path, text):
    """Runs a page of one or more blocks."""
    page = tmp_path / "page.md"
    page.write_text(text)
    document = SYBIL.parse(page)
    document.namespace["snippet_cache"] = tmp_path
    try:
        for example in document.examples():
            example.evaluate()
    finally:
        blocks.close(document.namespace)


def fence(language, *lines):
    return "\n".join([f"```{language}", *lines, "```", "", ""])


def test_commands_see_a_reader_s_folder_and_python_goes_on(tmp_path):
    run(
        tmp_path,
        fence(
            "console",
            "$ test -f configs/sharding/tensor.toml && echo 1 \\",
            "      > made",
            "$ cat made",
            "2",
        )
        + fence("text", "7")
        + fence("python", "number = 3", "print(number, 'made')")
        + fence("text", "4 ...de")
        + fence("python", "assert number == 3 and open('made').read() == '1\\n'")
        + fence("console", "$ cat", "> typed", "typed", "$ echo error: no; exit 2", "error: no")
        + fence("json", '{"text": 1}', '{"text": 2}')
        + fence("toml", "learning_rate = 1e-4"),
    )
    assert not (ROOT / "made").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (fence("console", "$ false"), "status 1, expected 0"),
        (fence("console", "$ true", "error: no"), "status 0, expected 2"),
        (fence("console", "$ echo one", "two"), "'two' is shown, but was not printed"),
        (fence("console", "$ echo a; echo b", "b", "a"), "'a' is shown"),
        (fence("console", "$ echo one") + fence("text", "two"), "'two' is shown"),
        (fence("console", "echo one"), "before any command"),
        (fence("python", "1 / 0"), "ZeroDivisionError"),
        (fence("python", "import os", "os._exit(1)"), "the process has ended"),
        (fence("bash", "false", "true"), "status 1"),
        (fence("sh", "true"), "a block of sh"),
        (fence("", "true"), "a block of no language"),
        (fence("json", "{"), "Expecting"),
        (fence("toml", "learning_rat = 1"), "expected a layout, a model or a recipe"),
        (fence("toml", "learning_rate = -1"), "learning_rate"),
        (fence("toml", "[mesh]", "x = 8", "[rules]", 'heads = "y"'), "y"),
        (fence("console", "$ pip install '.[nothing]'"), "has no extra nothing"),
        (fence("console", '$ pip install "jax[nothing]"'), "jax has no extra nothing"),
        (fence("console", "$ pip install nothing"), "does not use nothing"),
        (fence("console", "$ make nothing"), "No rule"),
        (fence("console", "$ git clone https://example.org/x"), "expected https"),
        (fence("console", "$ sbatch examples/nothing.sbatch"), "there is no nothing.sbatch"),
        (fence("console", "$ python benchmarks/compare.py --nothing"), "it has no --nothing"),
        (fence("console", "$ python benchmarks/nothing.py"), "there is no"),
        (fence("console", "$ python -m mistral_jax.evaluate --tasks a --nothing"), "wrong"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(tmp_path, text, message):
    with pytest.raises((SybilFailure, ValueError)) as caught:
        run(tmp_path, text)
    assert message in str(caught.value)
