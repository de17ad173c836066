"""A command on the checkpoint of a tiny model."""

import pytest
import tiny
import tokenizer_samples

from mistral_jax.checkpoint import checkpoint
from mistral_jax.cli import sample
from mistral_jax.tokens.tokenizer import Tokenizer

FLAGS = ["--temperature", "1", "--top-p", "1", "--seed", "4", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder of a tiny model."""
    home = tmp_path_factory.mktemp("sample")
    tokenizer = tokenizer_samples.train_small_mistral(home / "tokenizer.model")
    size = Tokenizer.from_file(tokenizer).vocab_size
    model, params = tiny.build(n_layers=1, vocab_size=size)
    checkpoint.save(home / "tiny", model.config, params, tokenizer)
    return home / "tiny"


@pytest.fixture
def command(folder, capsys):
    """Runs the command; returns its exit code, standard output and standard error."""

    def run(*arguments):
        flags = ["--checkpoint", str(folder), "--no-compilation-cache", *FLAGS]
        try:
            code = sample.main([*flags, *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
