"""A server of a tiny model on a free port, which the tests of this folder share."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
import tiny
import tokenizer_samples
from servers import loaded, running

from mistral_jax.serving.service import Service
from mistral_jax.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer = Tokenizer.from_file(tokenizer_samples.train_small_mistral(path))
    model, params = tiny.build(sliding_window=[5, None], vocab_size=tokenizer.vocab_size + 3)
    return model, jax.tree.map(jnp.asarray, params), tokenizer


@pytest.fixture(scope="module")
def served(mistral):
    """A server whose engine compiles programs as they are needed."""
    service = Service("tiny")
    service.load(lambda: loaded(mistral))
    with contextlib.closing(service), running(service) as made:
        yield made


@pytest.fixture
def post(served):
    """Posts a body to a route; returns the answer, which must have succeeded."""

    def call(path, **body):
        answer = served.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return call
