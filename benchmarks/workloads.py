"""Measures the workloads in rounds, in which the programs take turns.

Other load on the machine then slows all programs alike. It also slows the machine's limit, which is
measured in the same rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import engines
import shares

from mistral_jax.config import ModelConfig
from mistral_jax.engine.sampling import Sampling

Programs = Mapping[str, engines.Program]
Run = Callable[[], float]
Figures = dict[str, list[float]]

# Rows and length of the prompts. Memory is measured first, before this process loads models.
CASES = {
    "memory": ((1, 32), (8, 32), (1, 512), (1, 2048), (1, 8192), (1, 16384)),
    "decode": ((1, 32), (8, 32), (1, 2048), (8, 2048)),
    "prefill": ((1, 512), (8, 512), (1, 2048), (1, 8192), (1, 16384)),
    "first": ((1, 32), (1, 512)),
    "position": ((1, 30000),),
}
UNITS = {
    "memory": "bytes",
    "decode": "tokens/s",
    "prefill": "tokens/s",
    "first": "s",
    "position": "s",
}
EARLY = 2000  # the early position, whose token is compared with a late one
LIMIT = "limit"
_TOKENS = 64  # of an answer
_MANY = 4096  # prompts with more tokens get fewer rounds, and none is discarded


def measure(
    work: str,
    programs: Programs,
    prompts: engines.Prompts,
    sampling: Sampling,
    rounds: int,
    limit: Run | None,
) -> Figures:
    """Measures a workload; returns the results of each program, round by round.

    Args:
      work: a key of `CASES`, except memory.
      programs: the programs by name, this package first.
      prompts: token ids.
      sampling: how tokens are chosen.
      rounds: the number of rounds that count; fewer for long prompts.
      limit: measures the machine's limit once; called in each round.
    """
    runs = {
        "decode": _decode,
        "prefill": _prefill,
        "first": _first,
        "position": _position,
    }[work](programs, prompts, sampling)
    if limit is not None:
        runs[LIMIT] = limit
    count = len(prompts) * len(prompts[0])
    if work == "prefill" and count > _MANY:
        rounds, drop = max(1, min(rounds, 5 * _MANY // count)), 0
    else:
        drop = 1  # The first round warms up.
    found = [{name: run() for name, run in runs.items()} for _ in range(drop + rounds)]
    return {name: [figures[name] for figures in found[drop:]] for name in runs}


def _decode(programs: Programs, prompts: engines.Prompts, sampling: Sampling) -> dict[str, Run]:
    """Returns measurements of the tokens a second of all rows, from first token to last."""
    count = len(prompts) * (_TOKENS - 1)

    def run_of(program):
        state = program.begin(prompts, _TOKENS, sampling)
        return lambda: count / program.go_on(state, _TOKENS, sampling)

    return {name: run_of(program) for name, program in programs.items()}


def _prefill(programs: Programs, prompts: engines.Prompts, sampling: Sampling) -> dict[str, Run]:
    """Returns measurements of the prompt tokens read per second."""
    count = len(prompts) * len(prompts[0])

    def run_of(program):
        program.warm(prompts)
        return lambda: count / seconds(lambda: program.prefill(prompts))

    return {name: run_of(program) for name, program in programs.items()}


def _first(programs: Programs, prompts: engines.Prompts, sampling: Sampling) -> dict[str, Run]:
    """Returns measurements of the seconds of a request for one token."""

    def run_of(program):
        program.warm(prompts)
        return lambda: seconds(lambda: program.request(prompts, 1, sampling))

    return {name: run_of(program) for name, program in programs.items()}


def _position(programs: Programs, prompts: engines.Prompts, sampling: Sampling) -> dict[str, Run]:
    """Returns measurements of the seconds of our tokens, after short prompts and whole ones."""
    program = programs[engines.OURS]

    def run_of(length):
        state = program.begin([prompt[:length] for prompt in prompts], _TOKENS, sampling)
        return lambda: program.go_on(state, _TOKENS, sampling) / (_TOKENS - 1)

    return {place(length): run_of(length) for length in (EARLY, len(prompts[0]))}


def place(length: int) -> str:
    """Returns the name of this package's result after `length` tokens."""
    return f"{engines.OURS}, after {length}"


def seconds(run: Callable[[], Any]) -> float:
    """Returns the seconds of a run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def summary(work: str, figures: Figures) -> dict[str, Any]:
    """Returns the median of each program, and how many times better this package is.

    Args:
      work: the workload, which determines whether higher is better.
      figures: results of each program round by round, this package first.
    """
    more, (ours, *others) = UNITS[work] == "tokens/s", [name for name in figures if name != LIMIT]
    ratios = {}
    for name in others:
        pairs = zip(figures[ours], figures[name], strict=True)
        ratios[name] = statistics.median(a / b if more else b / a for a, b in pairs)
    return {
        "unit": UNITS[work],
        "values": {name: statistics.median(figures[name]) for name in (ours, *others)},
        "ratios": ratios,
        "ratio": min((ratios[name] for name in ratios if name in engines.OTHERS), default=None),
        "rounds": figures,
    }


def limited(
    work: str, figures: Figures, dtype: str, config: ModelConfig, batch: int, length: int
) -> dict[str, Any]:
    """Returns the machine's limit in the rounds, and the share of it that each program reached."""
    limits = figures.get(LIMIT)
    if limits is None:
        return {}
    found = {}
    for name in figures:
        if name != LIMIT:
            cost = shares.cost(work, name, dtype, config, batch, length)
            pairs = zip(figures[name], limits, strict=True)
            found[name] = statistics.median(cost * rate / limit for rate, limit in pairs)
    return {"limit": statistics.median(limits), "shares": found}
