"""Chooses the form of conversations of a source, and reads its chat templates."""

from mistral_jax.base.files import read_json
from mistral_jax.tokens.chat import ChatForm, by_version
from mistral_jax.tokens.tokenizer import Tokenizer

from .source import Source

_LLAMA_SIZES = (32000, 32016)  # of the vocabularies of Llama 1 and 2, and of CodeLlama


def choose(source: Source, tokenizer: Tokenizer, name: str | None = None) -> ChatForm:
    """Returns the form of conversations of a source.

    Args:
      source: the source.
      tokenizer: its tokenizer.
      name: the form's name, as a user chose it; None = choose by the source.
    """
    if name is not None:
        return ChatForm(name)
    if _is_llama(source) and tokenizer.vocab_size in _LLAMA_SIZES and tokenizer.version == "v1":
        return ChatForm("llama-2")
    return ChatForm(by_version(tokenizer.version, tokenizer.kind))


def _is_llama(source: Source) -> bool:
    if source.official:
        # Only Llama's own files lack the width of the MLP.
        return "hidden_dim" not in read_json(source.config_file)
    return read_json(source.config_file).get("model_type") == "llama"
