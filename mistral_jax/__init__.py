"""Mistral 7B in JAX with Flax linen: convert, load, generate, score and train."""

import importlib
import os
import sys

from mistral_jax.base import VERSION as __version__  # noqa: F401

if sys.argv[:1] == ["-m"]:  # Python sets this while it looks up the module to run.
    from mistral_jax.cli import command

    command.begin()

# In a checkout, `convert` and `configs` are next to this package instead of inside it.
_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

_HOMES = {
    "checkpoint.checkpoint": ("load", "save"),
    "config": ("ModelConfig",),
    "engine.engine": ("Engine",),
    "engine.generate": ("Completion", "generate"),
    "engine.grammar": ("Grammar",),
    "engine.sampling": ("Sampling",),
    "engine.score": ("Score", "score"),
    "engine.text": ("chat", "complete", "stream"),
    "evaluation.moderation": ("Moderation", "moderate"),
    "model.cache": ("init_cache",),
    "model.transformer": ("Transformer",),
    "tokens.answer": ("Answer", "parse_answer"),
    "tokens.tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*sorted(_HOME_OF)]


def __getattr__(name: str):
    """Imports a public name at its first use, so that commands import only what they need."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mistral_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mistral_jax.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME_OF})
