"""Runs llama.cpp through the low-level functions of llama-cpp-python, as one of the engines.

Its architecture `llama` has no window. For prompts longer than the window, llama.cpp does more work
and computes other results.
"""

import ctypes
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp as llama
import numpy as np

from mistral_jax.engine.sampling import Sampling

Prompts = Sequence[Sequence[int]]

# A global, because C calls it until the process ends.
_SILENT = llama.llama_log_callback(lambda level, text, data: None)
_MOST = 2048  # tokens of a call
_TRIAL = 32  # tokens generated to compare settings


class Settings(NamedTuple):
    """The settings that llama.cpp leaves to its user.

    Attributes:
      flash: whether llama.cpp uses flash attention.
      ubatch: the largest number of prompt tokens that pass through a layer at once.
    """

    flash: bool
    ubatch: int


class _Owned:
    """An object of the library that is freed with the last reference to it.

    Attributes:
      it: a pointer, or a structure that contains pointers.
    """

    def __init__(self, it, free: Callable, *needed):
        """Takes ownership of `it`, which `free` frees before the objects that it needs."""
        self.it, self._needed = it, needed
        weakref.finalize(self, free, it)


class Context(NamedTuple):
    """A cache and the buffers to use it.

    Attributes:
      handle: the library's context.
      batch: the buffer for the tokens of a call.
      prompts: the prompts that it was made for.
      tokens: the number of further tokens that it has room for.
      settings: the settings that it was made with.
    """

    handle: _Owned
    batch: _Owned
    prompts: Prompts
    tokens: int
    settings: Settings


class LlamaCpp:
    """A GGUF file on all cores, with llama.cpp's default cache in float16.

    Attributes:
      settings: the fastest settings of the last comparison.
    """

    def __init__(self, file: Path):
        llama.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.load_mode = llama.LLAMA_LOAD_MODE_NONE  # Private memory, as in the other programs.
        model = llama.llama_model_load_from_file(str(file).encode(), options)
        if not model:
            raise ValueError(f"llama.cpp cannot load {file}")
        self._model = _Owned(model, llama.llama_model_free)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._reading: Context | None = None
        self.settings = Settings(flash=True, ubatch=512)

    def warm(self, prompts: Prompts) -> None:
        """Selects the settings that read prompts in the least time."""
        seconds, prompts = {}, [prompt[:_MOST] for prompt in prompts]
        for settings in itertools.starmap(Settings, itertools.product((True, False), (512, 2048))):
            self.settings = settings
            began = time.perf_counter()
            self.prefill(prompts)
            seconds[settings] = time.perf_counter() - began
        self.settings = min(seconds, key=seconds.get)

    def prefill(self, prompts: Prompts) -> None:
        """Reads prompts and computes the logits of the next token of each."""
        self._read(self._emptied(prompts, 0), len(prompts[0]))

    def request(self, prompts: Prompts, tokens: int, sampling: Sampling) -> None:
        """Reads prompts and generates tokens."""
        context = self._emptied(prompts, tokens)
        self._read(context, len(prompts[0]) - 1)
        self.go_on(context, tokens, sampling)

    def begin(self, prompts: Prompts, tokens: int, sampling: Sampling) -> Context:
        """Reads all but the last token of each prompt, in the settings that decode faster."""
        found = {}
        for flash in (True, False):
            context = self._context(prompts, max(tokens, _TRIAL), Settings(flash, ubatch=512))
            self._read(context, len(prompts[0]) - 1)
            self.go_on(context, _TRIAL, sampling)
            found[self.go_on(context, _TRIAL, sampling)] = context
        context = found[min(found)]
        self.settings = context.settings
        return context

    def go_on(self, context: Context, tokens: int, sampling: Sampling) -> float:
        """Generates tokens; returns the seconds from the first token to the last."""
        handle, rows = context.handle.it, range(len(context.prompts))
        end = len(context.prompts[0]) - 1
        for row in rows:
            llama.llama_memory_seq_rm(llama.llama_get_memory(handle), row, end, -1)
        samplers = [_sampler(sampling, seed=row) for row in rows]
        last = [prompt[-1] for prompt in context.prompts]
        began = 0.0
        for step in range(tokens):
            _call(context, [(last[row], end + step, row, True) for row in rows])
            last = [llama.llama_sampler_sample(samplers[i].it, handle, i) for i in rows]
            began = began or time.perf_counter()
        return time.perf_counter() - began

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Returns the logits after each token of a prompt, [T, V], with a float32 cache."""
        context = self._context([prompt], 0, self.settings, llama.GGML_TYPE_F32)
        _call(context, [(token, at, 0, True) for at, token in enumerate(prompt)])
        rows = [llama.llama_get_logits_ith(context.handle.it, at) for at in range(len(prompt))]
        return np.array([np.ctypeslib.as_array(row, (self._vocab_size,)) for row in rows])

    def _emptied(self, prompts: Prompts, tokens: int) -> Context:
        """Returns an empty context: that of the last call if it fits, or else a new one."""
        wanted = prompts, tokens, self.settings
        if self._reading is None or self._reading[2:] != wanted:
            self._reading = None  # Frees its memory first.
            self._reading = self._context(*wanted)
        llama.llama_memory_clear(llama.llama_get_memory(self._reading.handle.it), False)
        return self._reading

    def _context(self, prompts, tokens, settings, kind=llama.GGML_TYPE_F16) -> Context:
        """Makes a cache for prompts of equal length and a number of further tokens."""
        options = llama.llama_context_default_params()
        room = -(-(len(prompts[0]) + tokens) // 256) * 256
        options.n_ctx, options.n_seq_max = room * len(prompts), len(prompts)
        options.n_batch, options.n_ubatch = _MOST, settings.ubatch
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.flash_attn_type = int(settings.flash)
        options.type_k = options.type_v = kind
        options.kv_unified = False
        handle = llama.llama_init_from_model(self._model.it, options)
        if not handle:
            raise ValueError(f"llama.cpp has no memory for {len(prompts)} rows of {room} tokens")
        handle = _Owned(handle, llama.llama_free, self._model)
        batch = _Owned(llama.llama_batch_init(_MOST, 0, 1), llama.llama_batch_free)
        return Context(handle, batch, prompts, tokens, settings)

    def _read(self, context: Context, length: int) -> None:
        """Reads the first `length` tokens of each prompt, with equal numbers of each in a call."""
        step = _MOST // len(context.prompts)
        for start in range(0, length, step):
            places = range(start, min(start + step, length))
            rows = enumerate(context.prompts)
            _call(context, ((p[at], at, row, at == length - 1) for row, p in rows for at in places))


def _call(context: Context, entries: Iterable[tuple[int, int, int, bool]]) -> None:
    """Runs the model on entries of token, position, row, and whether logits are needed."""
    batch, count = context.batch.it, 0
    for token, position, row, wanted in entries:
        batch.token[count], batch.pos[count], batch.logits[count] = token, position, wanted
        batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
        count += 1
    batch.n_tokens = count
    if status := llama.llama_decode(context.handle.it, batch):
        raise ValueError(f"llama_decode returns {status}")
    llama.llama_synchronize(context.handle.it)


def _sampler(sampling: Sampling, seed: int) -> _Owned:
    """Makes the sampler of a row."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if sampling.temperature == 0:
        parts = [llama.llama_sampler_init_greedy()]
    else:
        parts = [
            llama.llama_sampler_init_temp(sampling.temperature),
            llama.llama_sampler_init_top_p(sampling.top_p, 1),
            llama.llama_sampler_init_dist(seed),
        ]
    for part in parts:
        llama.llama_sampler_chain_add(chain, part)
    return _Owned(chain, llama.llama_sampler_free)
