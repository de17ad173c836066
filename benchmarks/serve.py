"""Measures a server and the engine alone, in turns: tokens/s, time to first token, and per token.

Prints one JSON line for each number of streams: medians over the rounds, and the share of the
engine's tokens/s that the HTTP layer costs. With --peer, another server that speaks OpenAI's
protocol is measured in the same turns, with the same prompts.

    pip install 'mistral-jax-flax[serve]' openai
    python benchmarks/serve.py [--checkpoint DIR] [--streams 1 4 16] [--rounds 3] [--slots 8]
        [--tokens 128] [--peer http://127.0.0.1:8080]
"""

import argparse
import asyncio
import contextlib
import inspect
import json
import re
import statistics
import subprocess
import sys
import textwrap
import threading
import time

import httpx2
import numpy as np

import mistral_jax as mj
from mistral_jax.base import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="folder of a checkpoint [the bundled model]")
    parser.add_argument("--streams", nargs="+", type=int, default=(1, 4, 16))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peer", help="address of another server")
    arguments = parser.parse_args()
    machine.use_compilation_cache()
    model, params, tokenizer = mj.load(arguments.checkpoint)
    engine = mj.Engine(model, params, tokenizer, slots=arguments.slots, length=1024)
    engine.warm_up()
    with listening(arguments) as url:
        for streams in arguments.streams:
            measure(arguments, engine, url, streams)


@contextlib.contextmanager
def listening(arguments):
    """Yields the address of a server in a process of its own."""
    command = [sys.executable, "-m", "mistral_jax.serve", "--port", "0", "--length", "1024"]
    command += ["--slots", str(arguments.slots)]
    if arguments.checkpoint:
        command += ["--checkpoint", arguments.checkpoint]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"serving at (\S+)", line)))
        # The server would wait for a reader of its log.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url
        process.terminate()


def measure(arguments, engine, url: str, streams: int) -> None:
    """Prints the line of a number of streams."""
    lines = [line for line in inspect.getsource(textwrap).splitlines() if len(line) > 30]
    ways = {"engine": lambda texts: alone(engine, texts, arguments.tokens)}
    ways["server"] = lambda texts: asyncio.run(over_http(url, texts, arguments.tokens))
    if arguments.peer:
        ways["peer"] = lambda texts: asyncio.run(over_http(arguments.peer, texts, arguments.tokens))
    found = {name: [] for name in ways}
    for i in range(arguments.rounds + 1):
        # A prompt of its own for each stream and round: nothing is reused.
        texts = [f"# {i} {j}\n{lines[j % len(lines)]}" for j in range(2 * streams)]
        for name, way in ways.items():
            found[name].append(way([f"# {name}{text}" for text in texts]))
    line = {"streams": streams, "slots": arguments.slots, "tokens": arguments.tokens}
    for name, rounds in found.items():
        rounds = rounds[1:]  # The first one warms up.
        firsts = np.concatenate([first for first, _, _ in rounds])
        each = np.concatenate([each for _, each, _ in rounds])
        line[name] = {
            "tokens_per_s": round(statistics.median(rate for _, _, rate in rounds), 1),
            "first_ms_p50": round(1e3 * float(np.percentile(firsts, 50)), 1),
            "first_ms_p99": round(1e3 * float(np.percentile(firsts, 99)), 1),
            "token_ms_p50": round(1e3 * float(np.percentile(each, 50)), 2),
            "token_ms_p99": round(1e3 * float(np.percentile(each, 99)), 2),
        }
    ratios = [
        server[2] / engine[2]
        for engine, server in zip(found["engine"][1:], found["server"][1:], strict=True)
    ]
    line["cost_of_http"] = round(1 - statistics.median(ratios), 3)
    print(json.dumps(line), flush=True)


def alone(engine, texts: list[str], tokens: int):
    """Runs requests in the engine, half of them at a time."""
    began, times = time.perf_counter(), []

    def one(text):
        start = time.perf_counter()
        answer = engine.submit(text, tokens, temperature=0, stop_ids=())
        found = answer.result()
        times.append((found.first_seconds, (found.seconds - found.first_seconds) / (tokens - 1)))
        assert time.perf_counter() > start

    half = len(texts) // 2
    threads = [
        threading.Thread(target=lambda own=own: [one(text) for text in own])
        for own in ([texts[i], texts[i + half]] for i in range(half))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    firsts, each = zip(*times, strict=True)
    return firsts, each, len(texts) * tokens / (time.perf_counter() - began)


async def over_http(url: str, texts: list[str], tokens: int):
    """Streams the same requests from a server."""
    began, times = time.perf_counter(), []

    async def one(client, text):
        start = time.perf_counter()
        body = {"model": "model", "prompt": text, "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        first = last = 0.0
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    last = time.perf_counter() - start
                    first = first or last
        times.append((first, (last - first) / (tokens - 1)))

    async with httpx2.AsyncClient(timeout=600) as client:

        async def two(first, second):
            await one(client, first)
            await one(client, second)

        half = len(texts) // 2
        await asyncio.gather(*(two(texts[i], texts[i + half]) for i in range(half)))
    firsts, each = zip(*times, strict=True)
    return firsts, each, len(texts) * tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
