"""Moderation of the command `sample` (`--moderate`): judges prompts and answers, declines some."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mistral_jax.cli import command
from mistral_jax.engine.completion import Completion
from mistral_jax.evaluation.moderation import Moderation, Moderator

# Exit status if a prompt or an answer was declined.
STATUS = 3

REASON = "declined"
_NOTHING = Completion([], [], REASON, [], text="")

Asked = str | list[dict[str, Any]]
Run = Callable[..., list[Completion]]


class Judge:
    """Runs prompts, and lets the model judge each prompt before and each answer after.

    An answer is shown once it is whole and found acceptable.

    Attributes:
      found: what was found of each prompt of the last call: `Moderation` by "prompt" and "answer".
    """

    def __init__(self, model, params, tokenizer, suffix: str = ""):
        """Prepares for prompts; `suffix` is the text after the answers to plain prompts."""
        self._moderate = Moderator(model, params, tokenizer)
        self._suffix = suffix
        self.found: list[dict[str, Moderation]] = []
        if tokenizer.chat_form == "none":
            command.tell(
                "the model has no chat form: it judges by continuing a plain text, which base "
                "models do badly"
            )

    def run(
        self,
        run: Run,
        asked: Sequence[Asked],
        prompts: list[list[int]],
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Generates the answers to prompts; a declined one is empty, and a line says why.

        Args:
          run: generates the answers; its arguments are `prompts` and `on_text`.
          asked: the text or conversation of each prompt.
          prompts: token ids of each prompt.
          on_text: called with the row and each piece of a text, after the text was accepted.
        """
        judged = self._moderate([self._whole(one) for one in asked])
        self.found = [{"prompt": found} for found in judged]
        accepted = [self.declined(row) is None for row in range(len(asked))]
        rows, pieces = [_NOTHING] * len(asked), []
        if any(accepted):
            # A declined prompt keeps its row, so that the draws of the others are the same.
            kept = [p if fine else p[:1] for p, fine in zip(prompts, accepted, strict=True)]
            rows = run(kept, None if on_text is None else lambda *piece: pieces.append(piece))
        whole = {
            row: self._whole(asked[row], own.text)
            for row, own in enumerate(rows)
            if accepted[row] and own.text.strip()
        }
        judged = self._moderate([*whole.values()])
        for row, found in zip(whole, judged, strict=True):
            self.found[row]["answer"] = found
        made = [self._kept(row, own) for row, own in enumerate(rows)]
        for row, piece in pieces if on_text else ():
            if made[row].finish_reason != REASON:
                on_text(row, piece)
        return made

    def declined(self, row: int) -> str | None:
        """Returns why a prompt or its answer was declined; None = it was not."""
        for what, found in self.found[row].items():
            if found.category != self._moderate.labels[-1]:
                odds = found.probabilities[found.category]
                return f"the {what} is {found.category!r} (probability {odds:.2f})"
        return None

    def tell(self) -> int:
        """Says on standard error what was declined; returns the exit status."""
        reasons = [self.declined(row) for row in range(len(self.found))]
        for row, reason in enumerate(reasons):
            where = f"prompt {row}: " if len(reasons) > 1 else ""
            if reason is not None:
                print(f"declined: {where}{reason}", file=sys.stderr)
        return STATUS if any(reasons) else 0

    def _kept(self, row: int, own: Completion) -> Completion:
        """Returns an answer, or an empty one in its place if it is declined."""
        if self.declined(row) is None:
            return own
        return dataclasses.replace(_NOTHING, first_seconds=own.first_seconds, seconds=own.seconds)

    def _whole(self, asked: Asked, answer: str = "") -> Asked:
        """Returns a prompt together with its answer."""
        if isinstance(asked, str):
            return asked + answer + self._suffix
        return [*asked, {"role": "assistant", "content": answer}] if answer else asked
