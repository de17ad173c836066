"""The examples of a run: encoded and packed once in its folder, described, and shown."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mistral_jax.base.fields import (
    boolean,
    build,
    check_table,
    integer,
    list_of,
    number,
    string,
    table_of,
)
from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import checkpoint, checksums, folder, manifest
from mistral_jax.config import ModelConfig
from mistral_jax.tokens import storage
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.data import packing, records
from mistral_jax.training.data.packing import SUMMARY_RULES
from mistral_jax.training.data.records import Example, Pair
from mistral_jax.training.job import Prompt
from mistral_jax.training.recipe import Recipe

_PROMPTS = 3  # prompts of a run, if its recipe names none
_LOOKED_AT = 100  # examples from whose beginnings the prompts are taken
_BEGINNING = 32  # tokens of a prompt that is the beginning of a text, at most
SPLITS = ("train", "validation")
_RULES = {
    "files": table_of(string()),
    "train": table_of(),
    "validation": table_of(),
    "prompts": list_of(table_of(), _PROMPTS),
}
_SPLIT_RULES = SUMMARY_RULES | {
    "fill": number(0, 1),
    "bad": integer(0, 1 << 40),
    "reasons": list_of(string()),
    "chat": boolean(),
}
_PROMPT_RULES = {"text": string(), "tokens": list_of(integer(0), 1 << 20)}

MARKS = "⟦", "⟧"  # around learnt text, on terminals without colours
_LEARNT, _GIVEN, _CONTROL = "bold green", "dim", "reverse"
# Control characters, which could move a terminal's cursor, are shown as their Unicode pictures. So
# are tabs, which then differ from spaces.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) != "\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def prepare(recipe: Recipe, path: Path) -> None:
    """Encodes and packs the examples of a run as `<path>/data`."""
    for name in SPLITS:
        records.check_paths(getattr(recipe.data, name))
    tokenizer = read_tokenizer(recipe)
    with folder.whole(path / "data") as part:
        notes: dict[str, Any] = {"files": _digests(recipe)}
        for name in SPLITS:
            files = getattr(recipe.data, name)
            if not files:
                continue
            tally = records.Tally()
            summary = packing.write_rows(
                part / name,
                read(recipe, files, tokenizer, tally),
                recipe.context,
                pairs=recipe.dpo is not None,
                pack=recipe.data.pack,
                seed=recipe.seed,
            )
            notes[name] = {**dataclasses.asdict(summary), "fill": summary.fill}
            notes[name] |= {"bad": tally.bad, "reasons": tally.reasons, "chat": tally.chat}
        prompts = itertools.islice(_beginnings(recipe, tokenizer), _PROMPTS)
        notes["prompts"] = [dataclasses.asdict(prompt) for prompt in prompts]
        (part / "data.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        checksums.write(part)


def changed(recipe: Recipe, path: Path) -> str | None:
    """Returns a file of the recipe that has changed since `<path>/data` was made, or None."""
    made = _notes(path)["files"]
    found = _digests(recipe)
    return next((file for file in made if found.get(file, made[file]) != made[file]), None)


def describe(path: Path) -> Iterator[str]:
    """Yields lines about the data of a run: their size, and what was cut or left out."""
    notes = _notes(path)
    for name in SPLITS:
        if name not in notes:
            continue
        of = notes[name]
        yield (
            f"{name}: {of['examples']:,} {'pairs' if of['pairs'] else 'examples'} in "
            f"{of['rows']:,} rows of {of['context']:,} tokens, {of['fill']:.0%} filled; "
            f"{of['learnt']:,} of {of['tokens']:,} tokens are learnt"
        )
        if of["too_long"]:
            yield f"  {of['too_long']:,} are longer than a row, and were cut"
        if of["left_out"]:
            yield f"  {of['left_out']:,} have nothing to learn in what fits, and were left out"
        if of["bad"]:
            yield f"  {of['bad']:,} bad lines were left out, such as"
            yield from (f"    {reason}" for reason in of["reasons"])


def prompts(recipe: Recipe, path: Path, tokenizer: Tokenizer) -> tuple[list[Prompt], bool]:
    """Returns the prompts of a run, and whether they are messages for the model to answer.

    The prompts are the recipe's texts, or the beginnings of the first examples.

    Raises:
      ValueError: a prompt of the recipe is longer than the model's positions.
    """
    notes = _notes(path)
    chat = notes["train"]["chat"]
    if not recipe.sample_prompts:
        return [Prompt(**prompt) for prompt in notes["prompts"]], chat

    def encode(text):
        if chat:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text, bos=tokenizer.adds_bos)

    found = [Prompt(text, encode(text)) for text in recipe.sample_prompts]
    most = read_base(recipe)[0].max_positions - 1
    if (longest := max(len(prompt.tokens) for prompt in found)) > most:
        raise ValueError(f"sample_prompts has a text of {longest} tokens; expected at most {most}")
    return found, chat


def show(examples: Iterable[Example | Pair], tokenizer: Tokenizer, console: Console) -> None:
    """Prints decoded examples; the learnt part is green, or between ⟦ and ⟧ without colours.

    Control tokens appear as the vocabulary spells them, in inverted colours, so that they differ
    from the same characters in a text.

    Args:
      examples: examples or pairs from `records.read`.
      tokenizer: the tokenizer that encoded them.
      console: the console to print on.
    """
    colours = console.color_system is not None and not console.no_color
    for count, example in enumerate(examples, start=1):
        sides = {f"Example {count}": example}
        if isinstance(example, Pair):
            sides = {
                f"Pair {count}, chosen": example.chosen,
                f"Pair {count}, rejected": example.rejected,
            }
        for title, side in sides.items():
            console.print(Text(f"{title}: {_count(side)}", "bold"), soft_wrap=True)
            console.print(_decode(side, tokenizer, colours), soft_wrap=True, end="\n\n")


def _notes(path: Path) -> dict[str, Any]:
    """Reads the notes that `prepare` wrote about the data; a ValueError names damaged ones."""
    file = path / "data" / "data.json"
    notes = {"files": None, "train": None, "prompts": None} | read_json(file)
    check_table(notes, _RULES, str(file))
    for name in SPLITS:
        if name in notes:
            notes[name] = dict.fromkeys(_SPLIT_RULES) | notes[name]
            check_table(notes[name], _SPLIT_RULES, f"{file}, {name},")
    for prompt in notes["prompts"]:
        build(Prompt, prompt, str(file))
        check_table(prompt, _PROMPT_RULES, str(file))
    return notes


def read(recipe: Recipe, files, tokenizer: Tokenizer, tally: records.Tally | None = None):
    """Yields the examples of files, read as a recipe says: see `records.read`."""
    return records.read(
        files,
        tokenizer,
        pairs=recipe.dpo is not None,
        skip_bad=recipe.data.skip_bad,
        tally=tally,
    )


def base_folder(recipe: Recipe) -> Path:
    """Returns the folder of the model that a recipe trains further."""
    return Path(recipe.checkpoint or checkpoint.BUNDLED)


def read_base(recipe: Recipe) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the architecture and the provenance of the model that a recipe trains further.

    Raises:
      ValueError: there is no such model, or it has fewer positions than a row.
    """
    base = base_folder(recipe)
    config, provenance = manifest.read(base)
    if recipe.context > config.max_positions:
        raise ValueError(
            f"context is {recipe.context}; expected at most {config.max_positions}, the positions "
            f"of {base}"
        )
    return config, provenance


def read_tokenizer(recipe: Recipe) -> Tokenizer:
    """Reads the tokenizer of the model that a recipe trains further.

    Raises:
      ValueError: the model has no tokenizer.
    """
    base = base_folder(recipe)
    config, _ = read_base(recipe)
    file = storage.find(base)
    if file is None:
        raise ValueError(f"{base} has no {storage.EXPECTED}, which encodes examples: put it there")
    tokenizer = checkpoint.read_tokenizer(file, config)
    if recipe.data.chat_form is not None:
        tokenizer.chat_form = recipe.data.chat_form
    return tokenizer


def _beginnings(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Yields the beginnings of the first examples, if they are shorter than a row."""
    files = recipe.data.validation or recipe.data.train
    examples = read(recipe, files, tokenizer)
    for example in itertools.islice(examples, _LOOKED_AT):
        example = getattr(example, "chosen", example)
        begin = int(np.flatnonzero(example.weights)[0])
        if begin == 1:  # All of a text is learnt.
            begin = max(1, min(len(example.tokens) // 2, _BEGINNING))
        if begin < recipe.context:
            tokens = example.tokens[:begin].tolist()
            yield Prompt(tokenizer.decode(tokens), tokens)


def _digests(recipe: Recipe) -> dict[str, str]:
    """Returns the SHA-256 of each existing data file, and of the model's config.json."""
    named = [Path(file) for name in SPLITS for file in getattr(recipe.data, name)]
    files = [base_folder(recipe) / "config.json"]
    for path in named:
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
    digests = {}
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _count(example: Example) -> str:
    learnt = example.weights[example.weights > 0]
    weights = np.unique(learnt)
    note = (
        ""
        if np.array_equal(weights, [1])
        else f" with weight {', '.join(f'{w:g}' for w in weights)}"
    )
    return f"{len(example.tokens)} tokens, {len(learnt)} learnt{note}"


def _decode(example: Example, tokenizer: Tokenizer, colours: bool) -> Text:
    text, decoder = Text(), tokenizer.stream()
    tokens = zip(example.tokens.tolist(), (example.weights > 0).tolist(), strict=True)
    for learnt, run in itertools.groupby(tokens, key=lambda token: token[1]):
        style = _LEARNT if learnt else _GIVEN
        before, after = MARKS if learnt and not colours else ("", "")
        text.append(before)
        ids = (token for token, _ in run)
        for is_control, part in itertools.groupby(ids, tokenizer.is_control):
            if is_control:
                text.append("".join(map(tokenizer.piece, part)), f"{style} {_CONTROL}")
            else:
                decoded = "".join(map(decoder.push, part)) + decoder.flush()
                text.append(decoded.translate(_PICTURES), style)
        text.append(after)
    return text
