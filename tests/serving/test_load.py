"""Two hundred clients at once: each gets what it would get alone, and nothing is left behind."""

import asyncio
import contextlib
import json
import random
import threading
import time

import httpx2
import jax
import pytest
from servers import loaded, running

from mistral_jax.serving.service import Service

pytestmark = pytest.mark.slow

CLIENTS, EACH = 200, 5
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}


def body_of(rng: random.Random, name: str) -> tuple[str, dict]:
    """Returns a route and a random request with a marker of its own."""
    body = {
        "max_tokens": rng.randint(1, 40),
        "seed": rng.randrange(10**6),
        "temperature": rng.choice([0, 0.8, 1.5]),
        "n": rng.choice([1, 1, 1, 2]),
    }
    kind = rng.choice(["plain", "plain", "stop", "schema", "tools", "odds"])
    if kind == "stop":
        body["stop"] = rng.choice(["a", ["e", "o "], "\n"])
    if kind == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    text = f"{name} one two three " * rng.choice([1, 1, 1, 4])
    if kind == "tools" or rng.random() < 0.3:
        body["messages"] = [{"role": "user", "content": text}]
        if kind == "tools":
            body |= {"tools": [TOOL], "tool_choice": rng.choice(["auto", "required"])}
        return "/v1/chat/completions", body
    if kind == "odds":
        body["logprobs"] = 2
    return "/v1/completions", body | {"prompt": text}


def summed(events: list[dict]) -> dict[int, tuple]:
    """Returns what the events of a stream add up to, by the index of the answer."""
    found: dict[int, list] = {}
    for event in events:
        for choice in event["choices"]:
            own = found.setdefault(choice["index"], ["", "", None])
            delta = choice.get("delta", {})
            own[0] += choice.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                own[1] += call["function"].get("name", "") + call["function"]["arguments"]
            own[2] = choice["finish_reason"] or own[2]
    return {index: tuple(own) for index, own in found.items()}


def read(response: dict) -> dict[int, tuple]:
    """Returns the same of a whole response."""
    found = {}
    for choice in response["choices"]:
        message = choice.get("message", {})
        calls = "".join(
            call["function"]["name"] + call["function"]["arguments"]
            for call in message.get("tool_calls", ())
        )
        text = choice.get("text") or message.get("content") or ""
        found[choice["index"]] = (text, calls, choice["finish_reason"])
    return found


class Client:
    """A client that streams, reads slowly, or leaves at a random time."""

    def __init__(self, url: str, number: int):
        self._url, self._rng, self.number = url, random.Random(number), number
        self.answers: list[tuple[str, dict, dict]] = []
        self.cancelled = self.refused = 0

    async def run(self) -> None:
        async with httpx2.AsyncClient(base_url=self._url, timeout=300) as client:
            for i in range(EACH):
                path, body = body_of(self._rng, f"client {self.number} request {i}")
                await self._ask(client, path, body)

    async def _ask(self, client, path, body) -> None:
        leaves = self._rng.random() < 1 / 3
        slow = self._rng.random() < 0.1
        streams = self._rng.random() < 0.5
        while True:
            try:
                work = self._get(client, path, body, streams, slow)
                answer = await asyncio.wait_for(work, self._rng.random() * 3 if leaves else None)
            except TimeoutError:
                self.cancelled += 1
                return
            if answer is not None:
                self.answers.append((path, body, answer))
                return
            self.refused += 1
            await asyncio.sleep(0.2 * self._rng.random())

    async def _get(self, client, path, body, streams, slow):
        """Returns what the server answered, or None if it was full."""
        if not streams:
            answer = await client.post(path, json=body)
            if answer.status_code == 503:
                return None
            assert answer.status_code == 200, answer.text
            return read(answer.json())
        events = []
        async with client.stream("POST", path, json=body | {"stream": True}) as answer:
            if answer.status_code == 503:
                return None
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if slow:
                    await asyncio.sleep(0.01)
                if line and line != "data: [DONE]":
                    events.append(json.loads(line.removeprefix("data: ")))
        return summed(events)


def test_two_hundred_clients_get_what_each_would_get_alone(mistral):
    compiled = []

    def listen(event, _, **__):
        if event.startswith("/jax/core/compile/"):
            compiled.append(event)

    service = Service("tiny")
    service.load(lambda: loaded(mistral, slots=8, length=500, most_waiting=64))
    engine = service.loaded.engine
    engine.warm_up()
    with contextlib.closing(service), running(service) as served:
        clients = [Client(served.url, number) for number in range(CLIENTS)]
        # The first grammars of a process, and the pools of threads.
        warm = random.Random(-1)
        for _ in range(20):
            path, body = body_of(warm, "warm")
            served.client.post(path, json=body)
        threads = threading.active_count()
        jax.monitoring.register_event_duration_secs_listener(listen)

        async def all_at_once():
            await asyncio.gather(*(client.run() for client in clients))

        try:
            asyncio.run(all_at_once())
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert not compiled
        done = sum(len(client.answers) for client in clients)
        cancelled = sum(client.cancelled for client in clients)
        assert done + cancelled == CLIENTS * EACH
        assert cancelled > 50
        assert sum(client.refused for client in clients) > 0
        deadline = time.monotonic() + 30
        while (stats := engine.stats())["running"] or stats["waiting"]:
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)
        # Threads of the pool may be kept, one for each processor and a few more.
        assert threading.active_count() <= threads + 40
        rng = random.Random(0)
        answers = [one for client in clients for one in client.answers]
        for path, body, found in rng.sample(answers, 150):
            assert read(served.client.post(path, json=body).json()) == found, body
        assert engine.stats()["failed"] == 0
