"""Chooses the form of conversations of a source, and reads its chat templates."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from mistral_jax.base.fields import show
from mistral_jax.base.files import MOST_JSON, read_json, read_text
from mistral_jax.checkpoint.manifest import MOST_TEMPLATE, TEMPLATES
from mistral_jax.tokens.chat import ChatForm, by_version
from mistral_jax.tokens.tokenizer import Tokenizer

from .source import Source

_LLAMA_SIZES = (32000, 32016)  # of the vocabularies of Llama 1 and 2, and of CodeLlama
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def choose(
    source: Source,
    tokenizer: Tokenizer,
    name: str | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> ChatForm:
    """Returns the form of conversations of a source.

    A template that writes what a form by name does, but for spaces, is taken for that form: Mistral
    publishes its forms as templates too. Any other template is kept as it is.

    Args:
      source: the source.
      tokenizer: its tokenizer.
      name: the form's name, as a user chose it; None = choose by the source.
      say: receives messages.

    Raises:
      ValueError: a file of the source is invalid, or the user chose a template and there is none.
    """
    templates, described = _templates(source), _described(source)
    own = _own(source, tokenizer)
    known = {"templates": templates, "tokens": _tokens(source, described)}
    known["spaces"] = _spaces(source, described)
    if name is not None:
        if name == "template" and not templates:
            raise ValueError(
                f"{source.folder} has no chat template; expected one in tokenizer_config.json or "
                "chat_template.jinja"
            )
        return ChatForm(name, **known)
    if not templates:
        return ChatForm(own)
    form = ChatForm("template", **known)
    if importlib.util.find_spec("jinja2") is None:
        default = templates["default"]
        if own != "none" and "[INST]" in default and "<<SYS>>" not in default:
            say(f"the chat template is taken for {own}; with jinja2 installed, it is compared")
            return ChatForm(own, **known)
    for named in (own, "llama-2"):
        if named != "none" and _is_like(named, form, tokenizer):
            return ChatForm(named, **known)
    say("conversations have the form of the source's own chat template")
    return form


def _own(source: Source, tokenizer: Tokenizer) -> str:
    """Returns the form of a source without a template."""
    version = tokenizer.version
    if version == "v1" and _is_llama(source):
        return "llama-2" if tokenizer.vocab_size in _LLAMA_SIZES else "none"
    return by_version(version, tokenizer.kind)


def _is_llama(source: Source) -> bool:
    if source.format == "gguf":  # Its metadata names no family.
        return False
    config = read_json(source.config_file)
    if source.official:  # Only Llama's own files lack the width of the MLP.
        return "hidden_dim" not in config
    return config.get("model_type") == "llama"


def _described(source: Source) -> Mapping[str, Any]:
    file = source.details / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _templates(source: Source) -> dict[str, str]:
    """Returns the templates of a source that are ever used, by name."""
    if source.format.startswith("official"):
        return {}
    found: dict[str, str] = {}
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = source.details / name
        given = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            for one in given:
                if not isinstance(one, dict) or not isinstance(one.get("template"), str):
                    raise ValueError(
                        f"{file} has chat_template {show(one)}; expected a template, or a list of "
                        "objects with name and template"
                    )
                found[one.get("name")] = one["template"]
        elif given is not None:
            raise ValueError(f"{file} has chat_template {show(given)}; expected a template")
    files = {"default": source.details / "chat_template.jinja"}
    more = source.details / "additional_chat_templates"
    files |= {file.stem: file for file in sorted(more.glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            found[name] = read_text(file, MOST_TEMPLATE)
    found = {name: text for name, text in found.items() if name in TEMPLATES}
    for text in found.values():
        if len(text.encode("utf-8", "replace")) > MOST_TEMPLATE:
            raise ValueError(
                f"{source.folder} has a chat template of {len(text)} characters; expected at most "
                f"{MOST_TEMPLATE}"
            )
    return found if "default" in found else {}


def _tokens(source: Source, described: Mapping[str, Any]) -> dict[str, str]:
    """Returns the spellings of special tokens by the names that templates have for them."""
    file = source.details / "special_tokens_map.json"
    named = {**(read_json(file) if file.is_file() else {}), **described}
    found = {}
    for name in _NAMES:
        token = named.get(name)
        spelling = token.get("content") if isinstance(token, dict) else token
        if isinstance(spelling, str):
            found[name] = spelling
    return found


def _spaces(source: Source, described: Mapping[str, Any]) -> str:
    """Returns where the tokenizer's leading space goes, as Transformers 5 reads the files."""
    kind = described.get("tokenizer_class")
    if isinstance(kind, str) and kind.startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
        return "each" if described.get("legacy") is True else "first"
    file = source.details / "tokenizer.json"
    if file.is_file():
        before = read_json(file, MOST_JSON).get("pre_tokenizer")
        parts = before.get("pretokenizers", [before]) if isinstance(before, dict) else []
        schemes = [part.get("prepend_scheme") for part in parts if isinstance(part, dict)]
        return "first" if "first" in schemes else "each"
    return "first" if described.get("legacy") is False else "each"


def _is_like(name: str, form: ChatForm, tokenizer: Tokenizer) -> bool:
    """Tells whether a template writes what a form by name does, but for spaces.

    Some templates refuse system messages, which is no difference.
    """
    system, question, answer, more = (
        {"role": role, "content": text}
        for role, text in (("system", "S0"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
    )
    for messages in ([question], [question, answer, more], [system, question, answer, more]):
        try:
            found = _written(tokenizer, form, messages)
        except ValueError:
            if messages[0] is system:
                continue
            return False
        try:
            if found != _written(tokenizer, ChatForm(name), messages):
                return False
        except ValueError:
            return False
    return True


def _written(tokenizer: Tokenizer, form: ChatForm, messages: list[dict[str, str]]) -> str:
    """Returns a conversation in a form, with control tokens spelled and without spaces."""
    before, tokenizer.chat = tokenizer.chat, form
    try:
        ids = tokenizer.encode_chat(messages)
    finally:
        tokenizer.chat = before
    text = "".join(
        tokenizer.piece(i) if tokenizer.is_control(i) else tokenizer.decode([i]) for i in ids
    )
    return "".join(text.split())
