"""Tokenizers of Hugging Face, in a `tokenizer.json` (placeholder)."""

from mistral_jax.tokens.tokenizer import Tokenizer


class HuggingFace(Tokenizer):
    """A tokenizer that the tokenizers library runs."""

    kind = "tokenizer.json"
