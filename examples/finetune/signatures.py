"""Makes and scores a small instruction data set: docstring -> function signature.

The pairs come from the installed Python source, so anyone can make them again:

    python examples/finetune/signatures.py make runs/signatures-data
    python examples/finetune/signatures.py score runs/signatures-data/test.jsonl
"""

import argparse
import ast
import collections
import hashlib
import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import mistral_jax
from mistral_jax.cli import command
from mistral_jax.config import CONFIG_DIR
from mistral_jax.engine.score import likelihoods
from mistral_jax.training.data import corpus, records
from mistral_jax.training.recipe import Recipe

PARTS = ("test", "test", "validation", *["train"] * 22)  # where each of 25 names goes
MOST_ARGUMENTS = 3  # besides self or cls
LONGEST = 40  # tokens of an answer
ROWS = 64  # answers in a batch

_SENTENCE = re.compile(r"[A-Z][a-z]+( [A-Za-z0-9'(),;:/.-]+){2,15}")
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_LITTLE = re.compile("as|by|for|from|get|has|in|is|make|of|on|or|set|the|to|with")
_RECEIVERS = {"self", "cls"}

Pair = tuple[str, str]  # the first sentence of a docstring, and the signature


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = command.Parser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="{make,score}")
    maker = commands.add_parser("make", help="write train, validation and test.jsonl")
    maker.add_argument("folder", type=Path, help="where to write them")
    maker.add_argument(
        "--unread",
        nargs="+",
        metavar="PACKAGE",
        help="write only test.jsonl, from installed packages that the bundled model never read",
    )
    maker.set_defaults(task=_make)
    scorer = commands.add_parser("score", help="score a model's answers to the pairs of a file")
    scorer.add_argument("file", type=Path, help="such as test.jsonl")
    scorer.add_argument("--checkpoint", type=Path, metavar="DIR", help="[the bundled model]")
    scorer.add_argument("--lora", type=Path, metavar="DIR", help="LoRA adapters for the model")
    scorer.add_argument("--show", type=int, default=6, metavar="N", help="answers to print [6]")
    scorer.set_defaults(task=_score)
    arguments = parser.parse_args(argv)
    return command.run(lambda: arguments.task(arguments))


def extract(source: str) -> Iterator[Pair]:
    """Finds the functions of a source text whose docstrings contain the words of their names.

    Yields:
      The docstring's first sentence, and the signature, with names only: without annotations,
      defaults, or a leading underscore.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from other people's source
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = (ast.get_docstring(node) or "").strip().partition("\n\n")[0]
            plain = " ".join(re.sub('[`"*]', "", paragraph).split())
            sentence = re.split(r"(?<=\.)\s", plain)[0].removesuffix(".") + "."
            name = node.name.removeprefix("_")
            arguments = _arguments(node.args)
            if (
                _SENTENCE.fullmatch(sentence)
                and _NAME.fullmatch(name)
                and _tells(sentence, name)
                and len(set(arguments) - _RECEIVERS) <= MOST_ARGUMENTS
            ):
                yield sentence, f"def {name}({', '.join(arguments)}):"


def _tells(sentence: str, name: str) -> bool:
    """Returns whether a sentence has the words of a name, except endings and common words."""
    told = {word[:4] for word in words(sentence)}
    content = [word[:4] for word in words(name) if not _LITTLE.fullmatch(word)]
    return bool(content) and told.issuperset(content)


def _arguments(arguments: ast.arguments) -> list[str]:
    """Returns the names of arguments, with the stars of *args and **kwargs."""
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def split(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Splits pairs so that no sentence and no function name is in two parts.

    Of equal sentences only the first is kept. The hash of the function name selects the part.
    """
    parts = {name: [] for name in PARTS}
    seen = set()
    for sentence, signature in pairs:
        if sentence.lower() not in seen:
            seen.add(sentence.lower())
            digest = hashlib.sha256(function_name(signature).encode()).digest()
            place = int.from_bytes(digest[:8], "big") % len(PARTS)
            parts[PARTS[place]].append((sentence, signature))
    return parts


def conversation(sentence: str, signature: str) -> dict[str, list[dict[str, str]]]:
    """Returns a pair in the format of trainers and chat APIs: a question and its answer."""
    contents = {"user": sentence, "assistant": signature}
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()]}


def _make(arguments: argparse.Namespace) -> None:
    roots = list(Recipe.from_file(CONFIG_DIR / "training" / "nano.toml").corpus)
    _, _, tokenizer = mistral_jax.load()

    def pairs_of(files: Mapping[str, str]) -> list[Pair]:
        found = [pair for text in files.values() for pair in extract(text)]
        return [pair for pair in found if len(tokenizer.encode(pair[1], eos=True)) <= LONGEST]

    parts = split(pair for source in corpus.gather(roots) for pair in pairs_of(source.files))
    if arguments.unread:
        read = {sentence.lower() for part in parts.values() for sentence, _ in part}
        found = (pair for name in arguments.unread for pair in pairs_of(corpus.python_files(name)))
        new = {sentence: signature for sentence, signature in found if sentence.lower() not in read}
        parts = {"test": list(new.items())}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = [json.dumps(conversation(*pair)) + "\n" for pair in part]
        (arguments.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(part)} pairs")


def words(text: str) -> list[str]:
    """Divides names and prose into lower-case words; `get_node` and `getNode` both have two."""
    return [word.lower() for word in _WORD.findall(text)]


def function_name(answer: str) -> str | None:
    """Returns the name in `def name(...):`, or None if the answer is anything else."""
    try:
        body = ast.parse(f"{answer} ...").body
    except (SyntaxError, ValueError):
        return None
    alone = len(body) == 1 and isinstance(body[0], ast.FunctionDef) and "\n" not in answer
    return body[0].name if alone else None


def f1(answer: str, signature: str) -> float:
    """Returns the F1 score of the words of two signatures; def, self and cls do not count."""
    given, wanted = (
        collections.Counter(word for word in words(text) if word not in {"def", *_RECEIVERS})
        for text in (answer, signature)
    )
    return 2 * (given & wanted).total() / max(1, given.total() + wanted.total())


def measure(answers: Sequence[str], ended: Sequence[bool], signatures: Sequence[str]) -> dict:
    """Scores answers against the expected signatures.

    Args:
      answers: texts that the model generated.
      ended: whether the model ended each answer by itself.
      signatures: the expected texts.

    Returns:
      The number of `answers`; the shares of answers that `ended`, that are a `signature`, and
      that have the right `name`; and the mean `f1` of their words.
    """
    names = [(function_name(a), function_name(s)) for a, s in zip(answers, signatures, strict=True)]
    total = len(answers)
    return {
        "answers": total,
        "ended": sum(ended) / total,
        "signature": sum(given is not None for given, _ in names) / total,
        "name": sum(given == wanted for given, wanted in names) / total,
        "f1": math.fsum(map(f1, answers, signatures)) / total,
    }


def ask(model, params: Mapping, tokenizer, sentences: Sequence[str]) -> list[tuple[str, bool]]:
    """Generates greedy answers; returns each text, and whether the model ended it."""
    greedy = mistral_jax.Sampling(temperature=0)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in sentences]
    rows = []
    for start in range(0, len(prompts), ROWS):
        batch = prompts[start : start + ROWS]
        rows += mistral_jax.generate(model, params, batch, LONGEST, sampling=greedy)
    return [(tokenizer.decode(row.tokens), row.finish_reason == "stop") for row in rows]


def reference_loss(model, params: Mapping, tokenizer, file: Path) -> float:
    """Returns the loss of the expected answers, including their end tokens, in nats a token."""
    examples = list(records.read([file], tokenizer))
    rows = likelihoods(model, params, [example.tokens.tolist() for example in examples], ROWS)
    pairs = zip(examples, rows, strict=True)
    loss = -math.fsum(example.weights[1:] @ row.logprobs for example, row in pairs)
    return loss / math.fsum(example.weights.sum() for example in examples)


def _score(arguments: argparse.Namespace) -> None:
    model, params, tokenizer = mistral_jax.load(
        arguments.checkpoint, dtype="float32", lora=arguments.lora
    )
    loss = reference_loss(model, params, tokenizer, arguments.file)
    lines = arguments.file.read_text(encoding="utf-8").splitlines()
    contents = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    sentences, signatures = zip(*contents, strict=True)
    answers, ended = zip(*ask(model, params, tokenizer, sentences), strict=True)
    for i in range(0, len(lines), -(-len(lines) // max(1, arguments.show)))[: arguments.show]:
        shown = f"{sentences[i]}\n  wanted    {signatures[i]}\n  answered  {answers[i]!r}"
        print(shown, file=sys.stderr)
    result = {**measure(answers, ended, signatures), "loss": loss}
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    sys.exit(main())
