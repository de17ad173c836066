"""A server of a tiny model on a free port, which the tests of this folder share."""

import contextlib
import threading
from types import SimpleNamespace

import httpx2
import jax
import jax.numpy as jnp
import pytest
import tiny
import tokenizer_samples

from mistral_jax.engine.engine import Engine
from mistral_jax.serving.app import make_app
from mistral_jax.serving.server import Server, bind
from mistral_jax.serving.service import Loaded, Service
from mistral_jax.tokens.tokenizer import Tokenizer

LENGTH, SLOTS = 200, 4


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer = Tokenizer.from_file(tokenizer_samples.train_small_mistral(path))
    model, params = tiny.build(sliding_window=[5, None], vocab_size=tokenizer.vocab_size + 3)
    return model, jax.tree.map(jnp.asarray, params), tokenizer


def loaded(mistral, **options) -> Loaded:
    """Returns an engine of the model, ready to serve."""
    model, _, tokenizer = mistral
    engine = Engine(*mistral, **({"slots": SLOTS, "length": LENGTH} | options))
    eos = tuple(model.config.eos_ids)
    return Loaded(engine, tokenizer, eos, eos, LENGTH)


@contextlib.contextmanager
def running(service: Service, drain_seconds: float = 5, **options):
    """Runs a server in a thread; yields its client, its address and itself."""
    server = Server(make_app(service, **options), service, drain_seconds)
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx2.Client(base_url=url, timeout=60) as client:
                yield SimpleNamespace(client=client, url=url, server=server, service=service)
        finally:
            server.should_exit = True
            thread.join()


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
