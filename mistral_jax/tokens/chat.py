"""The chat form of a tokenizer: encodes conversations, and texts with a gap to fill in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.tokens.messages import (
    RULES,
    Control,
    Infill,
    Later,
    Part,
    chat_parts,
    infill_parts,
    lesson_parts,
)
from mistral_jax.tokens.template import TemplateForm

# All names of forms: "template" is the checkpoint's own Jinja template, "none" a model without any.
NAMES = (*RULES, "template", "none")


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """The form of conversations of a checkpoint.

    It is a property of the checkpoint and not of the architecture: models with equal weights of
    equal shapes may have been trained on different forms.

    Attributes:
      name: one of `NAMES`.
      templates: Jinja templates by name, for "template": "default", and perhaps "tool_use", which
        is used if there are tools.
      tokens: spellings of special tokens by their names in the templates, such as "eos_token".
      spaces: where the tokenizer's leading space goes in what a template writes: "each" text
        between control tokens, or only the "first" text.
    """

    name: str
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spaces: str = "each"

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(
                f"there is no chat form {show(self.name)}; expected {', '.join(NAMES)}"
            )


def by_version(version: str | None, kind: str) -> str:
    """Returns the name of the form of Mistral's models by the tokenizer's version and kind."""
    if (version, kind) == ("v3", "tekken"):
        return "v3-tekken"
    return version if version in RULES else "none"


class Chat:
    """Conversations and infilling; a base class of the kinds of tokenizer.

    A tokenizer has the form of its version until `chat` is set.

    Attributes:
      chat: the form of conversations that was chosen; None = that of the version.
    """

    chat: ChatForm | None = None

    @property
    def chat_form(self) -> str:
        """Name of the form of conversations; set it to choose another form."""
        return self.chat.name if self.chat else by_version(self.version, self.kind)

    @chat_form.setter
    def chat_form(self, name: str) -> None:
        chosen = ChatForm(name) if self.chat is None else dataclasses.replace(self.chat, name=name)
        if name == "template" and not chosen.templates:
            raise ValueError(
                "the checkpoint has no chat template; convert it from a source that has one, or "
                f"choose another form: {', '.join(RULES)}"
            )
        self.chat = chosen

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        safe_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Encodes a conversation as the prompt for the next answer, in the form `chat_form`.

        Args:
          messages: see `messages.chat_parts`.
          safe_prompt: whether to put Mistral's safety prompt before the system text.
          tools: tools that the model may call, in OpenAI's form; None = none.

        Returns:
          Token ids, BOS first.

        Raises:
          ValueError: the conversation or a tool is invalid, or the form does not support it.
        """
        if self._named_form() == "template":
            return self._template().encode(messages, tools, safe_prompt)
        parts = chat_parts(messages, self.chat_form, safe_prompt, tools)
        return [token for part in parts for token in self._encode_part(part)]

    def encode_lesson(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[float]]:
        """Encodes a finished conversation to train on, in the form `chat_form`.

        Args:
          messages: see `messages.lesson_parts`.
          tools: as for `encode_chat`.

        Returns:
          Token ids, BOS first and EOS last, and the loss weight of each token.

        Raises:
          ValueError: the conversation, a tool or a weight is invalid, all weights are 0, or the
            form does not support it.
        """
        if self._named_form() == "template":
            return self._template().lesson(messages, tools)
        ids: list[int] = []
        weights: list[float] = []
        for part, weight in lesson_parts(messages, self.chat_form, tools):
            more = self._encode_part(part)
            ids += more
            weights += [weight] * len(more)
        return ids, weights

    def encode_fim(self, prefix: str, suffix: str = "") -> list[int]:
        """Encodes a text with a gap, as Codestral and CodeLlama were trained to fill in.

        Args:
          prefix: the text before the gap.
          suffix: the text after the gap.

        Returns:
          Token ids, BOS first; the text of the gap follows them.

        Raises:
          ValueError: the tokenizer has no tokens for it.
        """
        is_llama = self._find(Control.LLAMA_MIDDLE) is not None
        parts = infill_parts(prefix, suffix, "llama-2" if is_llama else "v3")
        for part in parts:
            if isinstance(part, Control) and self._find(part) is None:
                raise ValueError(
                    f"the tokenizer has no {part.value}: the model cannot fill in the middle; "
                    "expected Codestral or CodeLlama (7B or 13B, not Python), or leave the suffix"
                )
        return [token for part in parts for token in self._encode_part(part)]

    @property
    def fim_end_ids(self) -> tuple[int, ...]:
        """Tokens besides EOS that end a text that fills in: CodeLlama's `<EOT>`."""
        token = self._find(Control.LLAMA_END)
        return () if token is None else (token,)

    def _named_form(self) -> str:
        form = self.chat_form
        if form == "none":
            raise ValueError(
                "the model has no chat form: it is a base model, which continues texts; give it a "
                "plain text, or choose a form with --chat-form"
            )
        return form

    def _template(self) -> TemplateForm:
        chat = self.chat
        return TemplateForm(self, chat.templates, chat.tokens, chat.spaces)

    def _find(self, control: Control) -> int | None:
        if control is Control.BOS:
            return self.bos_id
        if control is Control.EOS:
            return self.eos_id
        return self.control(control.value)

    def _encode_part(self, part: Part) -> list[int]:
        if isinstance(part, Infill):  # mistral-common and CodeLlama encode a suffix so.
            return self.encode(f"☺{part}")[2:] if part else []
        if isinstance(part, str):
            return self.encode(str(part), continues=isinstance(part, Later))
        token = self._find(part)
        if token is None:
            raise ValueError(
                f"the tokenizer has no {part.value}, which the chat form {self.chat_form} needs; "
                "choose another form with --chat-form"
            )
        return [token]
