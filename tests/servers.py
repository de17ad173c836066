"""Servers of tiny models for tests."""

import contextlib
import threading
from types import SimpleNamespace

import httpx2

from mistral_jax.engine.engine import Engine
from mistral_jax.serving.app import make_app
from mistral_jax.serving.server import Server, bind
from mistral_jax.serving.service import Loaded, Service

LENGTH, SLOTS = 200, 4


def loaded(mistral, **options) -> Loaded:
    """Returns an engine of the model, ready to serve."""
    model, _, tokenizer = mistral
    engine = Engine(*mistral, **({"slots": SLOTS, "length": LENGTH} | options))
    eos = tuple(model.config.eos_ids)
    return Loaded(engine, tokenizer, eos, eos, engine.length)


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
