"""Measures `Engine`: a conversation with and without prefix reuse, and many requests at once.

Two engines take turns, one with and one without prefix reuse. For each turn of the conversation, a
JSON line has the tokens of the prompt and the seconds to the first token of the answer by both
engines. Then, for each number of requests submitted at once, a line has the tokens/s and the
longest time to first token in seconds. All values are medians over the rounds.

    python benchmarks/serving.py [--model nano] [--turns 10] [--question 60] [--answer 60]
        [--requests 1 4 16 64] [--rounds 3]
"""

import argparse
import json
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import shapes

import mistral_jax as mj
from mistral_jax.model.transformer import Transformer

SAMPLING = mj.Sampling(0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(shapes.MODELS), default="nano")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--question", type=int, default=60, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=60, help="tokens of an answer")
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = shapes.MODELS[arguments.model]
    model, token = Transformer(config), jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), token, token)["params"])
    about = {"benchmark": "serving", "model": arguments.model}
    conversations(model, params, arguments, about | {"work": "conversation"})
    load(model, params, arguments, about | {"work": "requests"})


def conversations(model, params, arguments, about: dict) -> None:
    """Prints the time to first token of each turn of a conversation, in seconds."""
    length = arguments.turns * (arguments.question + arguments.answer) + 1
    kinds = {"with": 2**30, "without": 0}
    engines = {
        name: mj.Engine(model, params, slots=1, length=length, prefix_bytes=size)
        for name, size in kinds.items()
    }
    for engine in engines.values():
        engine.warm_up()
    found = {name: [] for name in kinds}
    for seed in range(arguments.rounds):
        for name, engine in engines.items():
            found[name].append(conversation(engine, model.config.vocab_size, arguments, seed))
    for engine in engines.values():
        engine.close()
    for turn in range(arguments.turns):
        seconds = {
            name: round(statistics.median(one[turn] for one in rounds), 4)
            for name, rounds in found.items()
        }
        tokens = turn * (arguments.question + arguments.answer) + arguments.question
        print(json.dumps(about | {"turn": turn + 1, "prompt": tokens, "first": seconds}))


def conversation(engine, vocab_size: int, arguments, seed: int) -> list[float]:
    """Holds one conversation; returns the time to first token of each turn, in seconds."""
    rng, ids, seconds = np.random.default_rng(seed), [], []
    for _ in range(arguments.turns):
        ids += rng.integers(3, vocab_size, arguments.question).tolist()
        answer = engine.submit(ids, arguments.answer, sampling=SAMPLING, stop_ids=()).result()
        seconds.append(answer.first_seconds)
        ids += answer.tokens
    return seconds


def load(model, params, arguments, about: dict) -> None:
    """Prints the throughput and the longest time to first token of requests submitted at once."""
    length = arguments.question + arguments.answer
    with mj.Engine(model, params, slots=8, length=length, prefix_bytes=0) as engine:
        engine.warm_up()
        for count in arguments.requests:
            rates, firsts = [], []
            for seed in range(arguments.rounds):
                prompts = np.random.default_rng(seed).integers(
                    3, model.config.vocab_size, (count, arguments.question)
                )
                began = time.perf_counter()
                answers = [
                    engine.submit(prompt, arguments.answer, sampling=SAMPLING, stop_ids=())
                    for prompt in prompts.tolist()
                ]
                firsts.append(max(answer.result().first_seconds for answer in answers))
                rates.append(count * arguments.answer / (time.perf_counter() - began))
            rate, first = round(statistics.median(rates), 1), statistics.median(firsts)
            found = {"requests": count, "tokens_per_second": rate, "slowest_first": round(first, 3)}
            print(json.dumps(about | found), flush=True)


if __name__ == "__main__":
    main()
