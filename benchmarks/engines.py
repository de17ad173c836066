"""Defines the interface of the compared programs, and two of them: this package and Transformers.

`llamacpp.py` has llama.cpp. Prompts are token ids, in rows of equal length.
"""

import copy
import importlib.util
import os
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from formats import Formats

import mistral_jax
from mistral_jax.engine import admission
from mistral_jax.engine.generate import generate
from mistral_jax.engine.prefill import prefill
from mistral_jax.engine.sampling import Sampling

Prompts = Sequence[Sequence[int]]

OURS, TRANSFORMERS, LLAMA = "ours", "transformers", "llama.cpp"
OURS_BFLOAT16 = "ours, computed in bfloat16"
OTHERS = (TRANSFORMERS, LLAMA)
# The programs that have each precision; int8 is the precision of the weights.
PRECISIONS = {
    "float32": (OURS, TRANSFORMERS, LLAMA),
    "bfloat16": (OURS, TRANSFORMERS, LLAMA),
    "int8": (OURS, OURS_BFLOAT16, LLAMA),
}
_ENOUGH = 2048  # tokens of a prompt that compile or set up everything that a longer one uses
_NEEDED = {TRANSFORMERS: ("torch", "transformers"), LLAMA: ("llama_cpp", "gguf")}


class Program(Protocol):
    """A model loaded in a program."""

    def warm(self, prompts: Prompts) -> None:
        """Prepares `prefill` for prompts of this shape."""

    def prefill(self, prompts: Prompts) -> object:
        """Reads prompts and computes the logits of the next token of each."""

    def request(self, prompts: Prompts, tokens: int, sampling: Sampling) -> None:
        """Reads prompts and generates a number of tokens for each."""

    def begin(self, prompts: Prompts, tokens: int, sampling: Sampling) -> object:
        """Reads prompts once, so that `go_on` can generate tokens from there several times."""

    def go_on(self, state: object, tokens: int, sampling: Sampling) -> float:
        """Generates from the state of `begin`; returns the seconds from first to last token."""

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Returns the logits after each token of a prompt, [T, V]."""


def missing(name: str) -> list[str]:
    """Returns the packages that a program needs and that are not installed."""
    return [need for need in _NEEDED.get(name, ()) if importlib.util.find_spec(need) is None]


def make(name: str, formats: Formats, dtype: str) -> Program:
    """Loads a model into a program in a precision."""
    if name == TRANSFORMERS:
        return Transformers(formats, dtype)
    if name == LLAMA:
        import llamacpp

        return llamacpp.LlamaCpp(formats.gguf(dtype))
    if dtype != "int8":
        return Ours(formats, dtype, None)
    return Ours(formats, "bfloat16" if name == OURS_BFLOAT16 else "float32", "int8")


class Ours:
    """The package's own `generate`, including sampling and the transfer of each token."""

    def __init__(self, formats: Formats, dtype: str, quantize: str | None):
        path = formats.orbax()
        self._model, self._params, _ = mistral_jax.load(path, dtype=dtype, quantize=quantize)
        jax.block_until_ready(self._params)

    def warm(self, prompts: Prompts) -> None:
        """Compiles the programs that read the first chunk of such prompts and later chunks."""
        self._read([prompt[:_ENOUGH] for prompt in prompts], len(prompts[0]) + 1)

    def prefill(self, prompts: Prompts) -> tuple:
        """Returns the cache and the logits."""
        return self._read(prompts, len(prompts[0]) + 1)

    def request(self, prompts: Prompts, tokens: int, sampling: Sampling) -> None:
        """Calls `generate`."""
        self._generate(prompts, tokens, sampling)

    def begin(self, prompts: Prompts, tokens: int, sampling: Sampling) -> tuple:
        """Returns the prompts, and the result of their prefill."""
        return prompts, self._read(prompts, len(prompts[0]) + tokens)

    def go_on(self, state: tuple, tokens: int, sampling: Sampling) -> float:
        """Calls `generate`, with a prefill that only copies the result of `begin`."""
        prompts, read = state

        def remembered(*_):
            cache, logits = jax.block_until_ready(jax.tree.map(jnp.copy, read))
            return SimpleNamespace(rest=0, cache=cache, logits=logits)

        with mock.patch.object(admission, "Reading", remembered):
            rows = self._generate(prompts, tokens, sampling)
        return max(row.seconds for row in rows) - rows[0].first_seconds

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Computes all logits in one pass, without a cache."""
        tokens = jnp.asarray([prompt], jnp.int32)
        positions = jnp.arange(len(prompt), dtype=jnp.int32)[None]
        run = jax.jit(lambda params: self._model.apply({"params": params}, tokens, positions)[0])
        return np.asarray(run(self._params)[0], np.float32)

    def _read(self, prompts, length):
        return jax.block_until_ready(prefill(self._model, self._params, prompts, length))

    def _generate(self, prompts, tokens, sampling):
        model, params = self._model, self._params
        return generate(model, params, prompts, tokens, sampling=sampling, stop_ids=())


class Transformers:
    """Hugging Face Transformers' `generate`, on PyTorch."""

    def __init__(self, formats: Formats, dtype: str):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch = torch
        self._model = transformers.MistralForCausalLM.from_pretrained(
            formats.hf(), dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None  # Every answer has the requested length.

    def warm(self, prompts: Prompts) -> None:
        """Reads the beginnings of the prompts, so that setup is not timed."""
        self.prefill([prompt[:_ENOUGH] for prompt in prompts])

    def prefill(self, prompts: Prompts) -> object:
        """Returns the cache."""
        inputs = self._torch.tensor(prompts)
        with self._torch.no_grad():
            return self._model(inputs, use_cache=True, logits_to_keep=1).past_key_values

    def request(self, prompts: Prompts, tokens: int, sampling: Sampling) -> None:
        """Calls `generate`."""
        self._generate(prompts, tokens, sampling)

    def begin(self, prompts: Prompts, tokens: int, sampling: Sampling) -> tuple:
        """Reads all but the last token of each prompt, with which `generate` begins."""
        return prompts, self.prefill([prompt[:-1] for prompt in prompts])

    def go_on(self, state: tuple, tokens: int, sampling: Sampling) -> float:
        """Calls `generate` with a copy of the cache, and with a streamer that notes times."""
        prompts, cache = state
        clock = _Clock()
        cache = copy.deepcopy(cache)
        self._generate(prompts, tokens, sampling, past_key_values=cache, streamer=clock)
        return clock.times[-1] - clock.times[1]

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Computes all logits in one pass."""
        with self._torch.no_grad():
            return self._model(self._torch.tensor([prompt])).logits[0].float().numpy()

    def _generate(self, prompts, tokens, sampling, **options) -> None:
        choice = {"do_sample": False}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
            choice["top_p"] = sampling.top_p
        inputs = self._torch.tensor(prompts)
        mask = self._torch.ones_like(inputs)
        options |= choice | {"max_new_tokens": tokens, "pad_token_id": 0}
        self._model.generate(inputs, attention_mask=mask, **options)


class _Clock:
    """A streamer that notes the time of each call: first the prompts, then each token."""

    def __init__(self):
        self.times = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
