"""A server of a tiny model on a free port, which the tests of this folder share."""

import contextlib

import pytest
import tiny
from servers import loaded, running

from mistral_jax.serving.service import Service


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    return tiny.with_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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
