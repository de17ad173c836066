"""The report of `--stats`: times, rates, and the time spent on compilation."""

import time
from collections.abc import Sequence

import jax

from mistral_jax.base.machine import read_bandwidth
from mistral_jax.engine.generate import FEWEST_SLOTS, Completion
from mistral_jax.engine.prefill import Params


class CompileClock:
    """Records the time that JAX spends on tracing and compiling, from its construction on."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def seconds(self, begin: float, end: float) -> float:
        """Returns the seconds spent between two times of `time.perf_counter`."""
        return sum(seconds for began, seconds in self._spans if begin <= began < end)

    def _add(self, event: str, seconds: float, **_) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        began = time.perf_counter() - seconds
        # JAX reports nested functions first; their time is part of the caller's.
        while self._spans and self._spans[-1][0] >= began:
            self._spans.pop()
        self._spans.append((began, seconds))


def report(
    params: Params,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    began: float,
    clock: CompileClock,
) -> str:
    """Returns a report of the times and rates of a request; rates exclude compilation.

    Args:
      params: the model's parameters.
      prompts: token ids of each row.
      completions: the completion of each row.
      began: time of the request, by `time.perf_counter`.
      clock: a clock made before the request.
    """
    first = max(completion.first_seconds for completion in completions)
    total = max(completion.seconds for completion in completions)
    if len(completions) > FEWEST_SLOTS and first > min(row.seconds for row in completions):
        return _report_in_turns(prompts, completions, total, clock.seconds(began, began + total))
    compile_first = clock.seconds(began, began + first)
    compile_rest = clock.seconds(began + first, began + total)
    read = sum(map(len, prompts))
    made = sum(len(completion.tokens) for completion in completions)
    lines = [
        f"compile      {compile_first + compile_rest:.2f} s",
        f"first token  {first:.2f} s after the request, with {compile_first:.2f} s of compilation",
        f"prefill      {_rate(read, first - compile_first)}",
    ]
    steps = max(len(completion.tokens) for completion in completions) - 1
    if steps > 0:
        seconds = total - first - compile_rest
        # Of an embedding that is not shared with the output layer, a step reads only a few rows.
        skipped = params["embed"]["embedding"].nbytes if "lm_head" in params else 0
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - skipped
        devices = len(jax.tree.leaves(params)[0].sharding.device_set)
        speed, roof = weights * steps / seconds, devices * read_bandwidth()
        lines += [
            f"decode       {_rate(made - len(completions), seconds)}",
            f"memory       weights are read at {speed / 1e9:.1f} GB/s, {speed / roof:.0%} of the "
            f"bandwidth of {roof / 1e9:.1f} GB/s",
        ]
    return "\n".join(lines)


def _report_in_turns(prompts, completions, total: float, compilation: float) -> str:
    """Returns the report of rows that took turns, in which reading and decoding overlap."""
    first = min(completion.first_seconds for completion in completions)
    made = sum(len(completion.tokens) for completion in completions)
    lines = [
        f"compile      {compilation:.2f} s",
        f"first token  {first:.2f} s after the request",
        f"read         {sum(map(len, prompts))} tokens",
        f"made         {_rate(made, total - compilation)}, including the time to read the prompts",
    ]
    return "\n".join(lines)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
