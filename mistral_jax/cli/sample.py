"""The command `python -m mistral_jax.sample`: generates texts and prints them."""

import argparse
import dataclasses
import functools
import json
import sys
import time

from mistral_jax.base import files
from mistral_jax.cli import command
from mistral_jax.cli.options import parser

_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)

# Maximum number of bytes of keys and values stored of the earlier turns of a conversation.
_PREFIX_BYTES = 2**29


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return command.run(lambda: _run(arguments), show_traceback="traceback" in arguments)


def _run(arguments: argparse.Namespace) -> int:
    from mistral_jax.parallel import distributed

    prompts = distributed.from_first(lambda: _prompts(arguments))
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is for --chat; a plain completion has no system message")
    if arguments.safe_prompt and not arguments.chat:
        raise ValueError("--safe-prompt is for --chat; a plain completion has no system message")
    if arguments.tools is not None and not arguments.chat:
        raise ValueError("--tools is for --chat; a plain completion calls no tools")
    if arguments.suffix is not None and (arguments.chat or prompts is None):
        raise ValueError("--suffix is for a prompt to complete; leave out --chat")
    if arguments.top_logprobs > 0 and not arguments.json:
        raise ValueError("--top-logprobs needs --json, the only output that shows them; add --json")
    if prompts is None and arguments.json:
        raise ValueError("--json is for prompts, not for a conversation; give one or more prompts")
    if arguments.merge and arguments.lora is None:
        raise ValueError("--merge is for --lora DIR; name the adapters to merge")

    from mistral_jax.engine.sampling import Sampling

    fields = {name: getattr(arguments, name) for name in _SAMPLING}
    sampling = Sampling(**fields, logit_bias=dict(arguments.logit_bias))
    model = _Model(arguments, sampling)
    if prompts is not None:
        return model.complete(prompts)
    from mistral_jax.cli.terminal import converse

    # Several processes would be interrupted at different tokens.
    alone = distributed.count() == 1
    with command.interruptible():
        converse(model.answer, arguments.system, call=distributed.from_first, resumes=alone)
    return 0


class _Model:
    """A loaded model with the options of the command."""

    def __init__(self, arguments: argparse.Namespace, sampling):
        from mistral_jax.cli.stats import CompileClock

        self._arguments = arguments
        self._clock = CompileClock()
        began = time.perf_counter()
        model, self._params, self._tokenizer = command.load_model(
            arguments, arguments.checkpoint, merge=arguments.merge, chat_form=arguments.chat_form
        )
        if arguments.max_positions is not None:
            config = dataclasses.replace(model.config, max_positions=arguments.max_positions)
            model = model.clone(config=config)
        self._tools = _tools(arguments.tools)
        if arguments.suffix is not None:
            ends = (*model.config.other_eos_ids, *self._tokenizer.fim_end_ids)
            config = dataclasses.replace(model.config, other_eos_ids=ends)
            model = model.clone(config=config)
        self._model = model.clone(kv_cache_dtype=arguments.kv_cache_dtype)
        self._judge = None
        if arguments.moderate:
            from mistral_jax.cli.judge import Judge

            loaded = self._model, self._params, self._tokenizer
            self._judge = Judge(*loaded, suffix=arguments.suffix or "")
        self._options = {
            "max_new_tokens": arguments.max_tokens,
            "sampling": sampling,
            "stop": arguments.stop,
            "top_logprobs": arguments.top_logprobs,
            "is_new": arguments.chat,
        }
        if arguments.stats:
            seconds = time.perf_counter() - began
            print(f"load         {seconds:.2f} s, in {model.dtype.name}", file=sys.stderr)

    def answer(self, messages, show) -> None:
        """Generates the answer to a conversation, and calls `show` with each piece of it."""
        from mistral_jax.cli.terminal import Declined
        from mistral_jax.engine.prefixes import Prefixes

        if "prefixes" not in self._options:  # Each turn repeats those before it.
            self._options["prefixes"] = Prefixes(self._model, self._params, _PREFIX_BYTES)
        split = _Apart(show)
        rows = self._generate([messages], lambda _, piece: split.push(piece))
        split.flush()
        _check(rows)
        if self._judge and (reason := self._judge.declined(0)):
            raise Declined(reason)

    def complete(self, texts: list[str]) -> int:
        """Continues or answers texts, and prints the results; returns the exit status."""
        asked = [self._messages(text) for text in texts] if self._arguments.chat else texts
        shown = texts if sys.stdout.isatty() and not self._arguments.chat else [""] * len(texts)
        if self._arguments.json:
            rows = self._generate(asked)
            for i, (text, completion) in enumerate(zip(texts, rows, strict=True)):
                fields = self._describe(text, completion)
                if self._judge:
                    found = self._judge.found[i]
                    fields["moderation"] = {k: dataclasses.asdict(v) for k, v in found.items()}
                print(json.dumps(fields, allow_nan=False), flush=True)
        elif len(texts) == 1:
            print(shown[0], end="", flush=True)
            put = functools.partial(print, end="", flush=True)
            split = _Apart(put) if self._arguments.chat else None
            push = split.push if split else put
            rows = self._generate(asked, lambda _, piece: push(piece))
            if split:
                split.flush()
            print(flush=True)
        else:
            rows = self._generate(asked)
            answers = [completion.text for completion in rows]
            print(*map("".join, zip(shown, answers, strict=True)), sep="\n\n", flush=True)
        status = self._judge.tell() if self._judge else 0
        _check(rows)
        return status

    def _generate(self, asked: list, on_text=None):
        """Generates the answers to texts or conversations; some are declined with --moderate."""
        prompts = [self._encode(one) for one in asked]
        if self._judge:
            return self._judge.run(self._run, asked, prompts, on_text)
        return self._run(prompts, on_text)

    def _encode(self, asked) -> list[int]:
        if not isinstance(asked, str):
            safe = self._arguments.safe_prompt
            return self._tokenizer.encode_chat(asked, safe_prompt=safe, tools=self._tools)
        if self._arguments.suffix is not None:
            return self._tokenizer.encode_fim(asked, self._arguments.suffix)
        return self._tokenizer.encode(asked, bos=self._tokenizer.adds_bos)

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = self._arguments.system
        messages = [{"role": "system", "content": system}] if system is not None else []
        return [*messages, {"role": "user", "content": text}]

    def _run(self, prompts: list[list[int]], on_text=None):
        from mistral_jax.cli.stats import report
        from mistral_jax.engine.text import completions

        began = time.perf_counter()
        with command.announced() as seen:

            def show(row, piece):
                seen()
                on_text(row, piece)

            rows = completions(
                self._model,
                self._params,
                self._tokenizer,
                prompts,
                on_text=show if on_text else None,
                **self._options,
            )
        if self._arguments.stats:
            sys.stdout.flush()
            if on_text is not None and sys.stdout.isatty():  # End the line of the text.
                print(file=sys.stderr)
            print(report(self._params, prompts, rows, began, self._clock), file=sys.stderr)
        return rows

    def _describe(self, prompt: str, completion) -> dict:
        from mistral_jax.tokens.answer import parse_answer

        fields = {
            "prompt": prompt,
            "text": completion.text,
            "tokens": completion.tokens,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "seconds": {
                "first_token": round(completion.first_seconds, 4),
                "total": round(completion.seconds, 4),
            },
        }
        if completion.error is not None:
            fields["error"] = completion.error
        if self._arguments.chat:
            answer = parse_answer(self._tokenizer, completion.tokens)
            if answer.thinking is not None:
                fields |= {"text": answer.text, "thinking": answer.thinking}
            if answer.tool_calls:
                fields |= {"text": answer.text, "tool_calls": answer.tool_calls}
        if self._arguments.top_logprobs:
            fields["top_logprobs"] = completion.top_logprobs
        return fields


class _Apart:
    """Shows an answer as it is generated, and what the model thinks before on standard error."""

    def __init__(self, show):
        from mistral_jax.tokens.answer import Splitter

        self._show, self._split, self._thinks = show, Splitter(), False
        self._dim = ("\x1b[2m", "\x1b[22m") if sys.stderr.isatty() else ("", "")

    def push(self, piece: str) -> None:
        """Takes the next piece."""
        self._put(self._split.push(piece))

    def flush(self) -> None:
        """Shows what was held back."""
        self._put(self._split.flush())

    def _put(self, pieces) -> None:
        for piece in filter(None, pieces):
            thinks = piece.kind == "thinking"
            if thinks:
                begin, end = self._dim
                print(f"{begin}{piece}{end}", end="", file=sys.stderr, flush=True)
            else:
                if self._thinks:
                    print(file=sys.stderr, flush=True)
                self._show(str(piece))
            self._thinks = thinks


def _tools(file) -> list | None:
    """Reads the tools of a JSON file; None = no file."""
    if file is None:
        return None
    from mistral_jax.tokens.tools import check_tools

    tools = files.parse_json(files.read_text(file), str(file))
    try:
        return check_tools(tools)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check(completions) -> None:
    """Raises a ValueError if a completion ended with an error."""
    for row, completion in enumerate(completions):
        if completion.error is not None:
            where = f"prompt {row}: " if len(completions) > 1 else ""
            raise ValueError(f"{where}{completion.error}")


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """Reads all prompts; returns None for a conversation at the terminal."""
    prompts = [_standard_input() if text == "-" else text for text in arguments.prompts]
    if arguments.prompts_file is not None:
        text = files.read_text(arguments.prompts_file, files.MOST_LINE, pipe=True)
        lines = [line for line in files.split_lines(text) if line]
        if not lines:
            raise ValueError(f"{arguments.prompts_file} is empty; expected prompts, one a line")
        prompts += lines
    if not prompts and not arguments.chat:
        raise ValueError("there is no prompt; give one, - for standard input, or --chat")
    return prompts or None


def _standard_input() -> str:
    if "stdin" in command.closed:
        raise ValueError("standard input is closed; give the prompt as an argument, or in a pipe")
    data = files.read_stream(sys.stdin.buffer, "standard input", files.MOST_LINE)
    return files.decode(data, "standard input").removesuffix("\n")
