"""The commands' parsers, as the page of commands takes them: descriptions flow, examples do not."""

import argparse
import importlib


def sample():
    """Returns the parser of `python -m mistral_jax.sample`."""
    return _for_page("mistral_jax.cli.options", "parser")


def convert():
    """Returns the parser of `python -m mistral_jax.convert`."""
    return _for_page("mistral_jax.convert.__main__", "_parser")


def train():
    """Returns the parser of `python -m mistral_jax.train`."""
    return _for_page("mistral_jax.cli.train", "_parser")


def serve():
    """Returns the parser of `python -m mistral_jax.serve`."""
    return _for_page("mistral_jax.cli.serve", "parser")


def evaluate():
    """Returns the parser of `python -m mistral_jax.evaluate`."""
    return _for_page("mistral_jax.cli.evaluate", "_parser")


def plan():
    """Returns the parser of `python -m mistral_jax.plan`."""
    return _for_page("mistral_jax.cli.plan", "_parser")


def _for_page(module: str, function: str) -> argparse.ArgumentParser:
    made = getattr(importlib.import_module(module), function)()
    made.description = " ".join(made.description.split())
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    return made
