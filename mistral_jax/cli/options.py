"""The options of `python -m mistral_jax.sample`: names, defaults and help texts."""

import argparse
import functools
from pathlib import Path

from mistral_jax.base import VERSION
from mistral_jax.cli.command import Parser, add_cache, add_chat_form, add_layout, add_model, called

DESCRIPTION = """\
Continues prompts with a Mistral model, or answers them (--chat). Standard output carries only the
generated text; on a terminal, each prompt is printed before its continuation. The completions of
several prompts are separated by an empty line. Defaults are in brackets.
"""
EPILOG = """\
Examples:
  %(prog)s "def read_json(path):" --max-tokens 100
  %(prog)s --checkpoint mistral-7b-instruct-v0.3 --chat
  %(prog)s --checkpoint mistral-7b-v0.3 --lora my-adapters "def main"
  echo "class Stack:" | %(prog)s - --json
  %(prog)s --prompts-file prompts.txt --temperature 0 --stats
"""


def parser() -> Parser:
    """Builds the parser of the command."""
    made = Parser(
        prog=called("sample"),
        usage="%(prog)s [PROMPT ...] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100
        ),
        allow_abbrev=False,
    )
    version = f"mistral_jax {VERSION}"
    made.add_argument("--version", action="version", version=version, help="print it and exit")

    add = made.add_argument_group("prompts").add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="text to continue; - reads standard input")
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="file of more prompts, one on each line, in any number",
    )
    add(
        "--chat",
        action="store_true",
        help="answer prompts as messages; without prompts, hold a conversation",
    )
    add("--system", metavar="TEXT", help="system message of --chat")
    add(
        "--safe-prompt",
        action="store_true",
        help="put Mistral's safety prompt before the system message of --chat",
    )
    add(
        "--moderate",
        action="store_true",
        help="let the model judge each prompt and answer, and decline those that it finds harmful: "
        "an answer is shown as a whole; the exit status is 3 if anything was declined",
    )
    add("--tools", type=Path, metavar="FILE", help="JSON list of tools that --chat may call")
    add("--suffix", metavar="TEXT", help="text after the completion: fill in the middle")

    group = made.add_argument_group("the model")
    add = group.add_argument
    add_model(group)
    add_chat_form(group)
    add(
        "--merge",
        action="store_true",
        help="add the adapters to the weights: slower to load, as fast to run as no adapters",
    )
    add_layout(group)
    add(
        "--max-positions",
        type=int,
        metavar="N",
        help="maximum number of tokens of prompt and answer together [the model's own limit]",
    )
    add(
        "--kv-cache-dtype",
        choices=("int8",),
        metavar="int8",
        help="store keys and values in 8 bits, in half of the memory or less [the compute dtype]",
    )
    add_cache(group)

    add = made.add_argument_group("sampling").add_argument
    number = functools.partial(_number, add)
    number("--max-tokens", int, 256, "maximum number of tokens to generate")
    number("--temperature", float, 0.7, "divides the logits; 0 always takes the likeliest token")
    number("--top-k", int, 0, "choose from the N likeliest tokens; 0 is all")
    number("--top-p", float, 0.95, "choose from the likeliest tokens with this total probability")
    number("--min-p", float, 0, "choose from tokens at least X times as likely as the likeliest")
    number("--repetition-penalty", float, 1, "penalizes tokens in prompt or answer; 1 is none")
    number("--presence-penalty", float, 0, "subtracted from the logits of tokens in the answer")
    number("--frequency-penalty", float, 0, "the same, once for each occurrence")
    add(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=X",
        help="add X to the logit of token ID; -inf bans it; may be repeated",
    )
    number("--seed", int, 0, "seed of the random draws; the same seed gives the same text")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )

    add = made.add_argument_group("the output").add_argument
    add("--json", action="store_true", help="print each completion as a JSON object on one line")
    number = functools.partial(_number, add)
    number("--top-logprobs", int, 0, "likeliest tokens to list at each position, up to 20")
    add("--stats", action="store_true", help="print times and rates to standard error")
    return made


def _number(add, name: str, kind: type, default: float, meaning: str) -> None:
    letter = "N" if kind is int else "X"
    add(name, type=kind, default=default, metavar=letter, help=f"{meaning} [{default:g}]")


def _bias(text: str) -> tuple[int, float]:
    try:
        token, bias = text.split("=")
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id, =, and a number") from None
