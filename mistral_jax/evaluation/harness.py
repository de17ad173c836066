"""lm-evaluation-harness: our models behind its interface, and a function that runs its tasks.

Contexts and continuations are tokenized as in the harness's own Transformers backend, so scores are
the same. Chat templates are not applied.
"""

import collections
import contextlib
import functools
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from mistral_jax.checkpoint.checkpoint import load
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.score import each_likelihood
from mistral_jax.evaluation.drawing import Prompt, draws_of
from mistral_jax.evaluation.journal import Journal
from mistral_jax.evaluation.tasks.manager import task_manager
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.tokenizer import Tokenizer

# Bootstrap samples, for standard errors that have no formula.
_DRAWS = 1000
_NEW_TOKENS = 256  # limit of tasks that set none, as in the harness's own backends


@register_model("mistral_jax")
class MistralJax(TemplateLM):
    """A model behind the interface of the harness.

    After this module is imported, `lm_eval.simple_evaluate(model="mistral_jax",
    model_args="checkpoint=DIR,dtype=float32", ...)` finds it. `model_args` are the arguments of
    `mistral_jax.load` and `max_length`.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      batch: rows per batch.
      max_length: most tokens that the model reads at once. A longer input loses its beginning;
        `loglikelihood_rolling` cuts it into windows. None = the model's `max_positions`.
      journal: where answers are kept and found; None = in memory.
      advance: called with the share of the requests of a call that were answered since the last
        time; None = a progress bar is shown instead.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        tokenizer: Tokenizer,
        batch: int = 8,
        max_length: int | None = None,
        journal: Journal | None = None,
        advance: Callable[[float], None] | None = None,
    ):
        super().__init__()
        self._loaded = model, params
        self._tokenizer = tokenizer
        self._batch = batch
        self.max_length = max_length or model.config.max_positions
        self._journal = Journal() if journal is None else journal  # an empty one is falsy
        self._advance = advance
        # The choices of a question have one context.
        self._encode = functools.lru_cache(4)(
            lambda text, bos: tuple(tokenizer.encode(text, bos=bos))
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "MistralJax":
        """Loads the checkpoint that `--model_args` names."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "MistralJax":
        """Loads the checkpoint that arguments name; `additional_config` gives the batch size."""
        options = dict(arg_dict)
        max_length = options.pop("max_length", None)
        batch = (additional_config or {}).get("batch_size") or 8
        return cls(*load(options.pop("checkpoint", None), **options), int(batch), max_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        return self._tokenizer.first_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text, with BOS unless `add_special_tokens` is False or the model has none.

        If it is None, a BOS that the text spells out at its beginning is not added twice.
        """
        adds_bos = self._tokenizer.adds_bos and add_special_tokens is not False
        if adds_bos and add_special_tokens is None:
            string = string.removeprefix(self._tokenizer.piece(self._tokenizer.bos_id))
        return list(self._encode(string, adds_bos))

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations of contexts."""
        found = self._answer("loglikelihood", requests, self._score_pairs, disable_tqdm)
        return [(logprob, is_greedy) for logprob, is_greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts, in windows of `max_length` tokens."""
        return self._answer("loglikelihood_rolling", requests, self._score_texts, disable_tqdm)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts, each until its stop strings or its number of new tokens.

        A request that draws at random and appears several times gets as many answers.
        """
        return self._answer("generate_until", requests, self._generate, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations; a request has the tokens of its context and of its continuation."""
        found = [None] * len(requests)
        for number, score in self._scores([request[1:] for request in requests]):
            found[number] = score
        return found

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[list[tuple], list[int]], Iterable[tuple[int, Any]]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Looks answers up in the journal, and computes the others once each.

        Args:
          kind: kind of the requests.
          requests: the requests.
          compute: a function of the arguments of requests, and of the draw of each. It yields
            numbers of requests and their answers, in any order.
          disable_tqdm: whether to show no progress bar.
        """
        keys, draws, counts = [], {}, collections.Counter()
        arguments = {}
        for request in requests:
            key, draw = self._journal.key(kind, request.args), 0
            if kind == "generate_until" and request.args[1].get("do_sample", False):
                draw, counts[key] = counts[key], counts[key] + 1
                key = self._journal.key(kind, request.args, draw)
            keys.append(key)
            draws[key], arguments[key] = draw, request.args
        counts = collections.Counter(keys)
        todo = [key for key in arguments if key not in self._journal]
        is_hidden = disable_tqdm or self._advance is not None or None
        with tqdm(desc=kind, total=len(keys), disable=is_hidden) as bar:

            def advance(count):
                bar.update(count)
                if self._advance is not None:
                    self._advance(count / len(keys))

            advance(len(keys) - sum(counts[key] for key in todo))
            chosen = [arguments[key] for key in todo], [draws[key] for key in todo]
            for number, answer in compute(*chosen) if todo else ():
                self._journal.add(todo[number], answer)
                advance(counts[todo[number]])
        return [self._journal[key] for key in keys]

    def _score_pairs(self, pairs, _) -> Iterator[tuple[int, tuple[float, bool]]]:
        return self._scores([self._pair(*pair) for pair in pairs])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes a context and its continuation."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[0] == self.prefix_token_id:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    def _scores(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yields the number and the score of pairs of a context and a continuation."""
        rows, given = [], []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a task has a continuation of {len(continuation)} tokens; expected at most "
                    f"{self.max_length}, the model's max_length"
                )
            rows.append((context + continuation)[-(self.max_length + 1) :])
            given.append(len(rows[-1]) - len(continuation))
        for number, row in each_likelihood(*self._loaded, rows, self._batch, given=given):
            yield number, (math.fsum(row.logprobs.tolist()), bool(row.greedy.all()))

    def _score_texts(self, arguments, _) -> Iterator[tuple[int, float]]:
        windows, owners = [], []
        for number, (text,) in enumerate(arguments):
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            windows += [make_disjoint_window(window) for window in rolling]
            owners += [number] * (len(windows) - len(owners))
        left, sums = collections.Counter(owners), collections.defaultdict(list)
        yield from ((number, 0.0) for number in range(len(arguments)) if not left[number])
        for window, (logprob, _) in self._scores(windows):
            number = owners[window]
            sums[number].append(logprob)
            left[number] -= 1
            if not left[number]:
                yield number, math.fsum(sums.pop(number))

    def _generate(self, arguments, draws) -> Iterator[tuple[int, str]]:
        """Continues contexts in one continuous batch."""
        drawn = collections.defaultdict(dict)
        for number, (pair, draw) in enumerate(zip(arguments, draws, strict=True)):
            drawn[json.dumps(pair, sort_keys=True)][draw] = number
        asked = [(self._prompt(*json.loads(pair)), numbers) for pair, numbers in drawn.items()]
        return draws_of(*self._loaded, self._tokenizer, asked, self._batch)

    def _prompt(self, context: str, options: Mapping[str, Any]) -> Prompt:
        """Encodes a context, and reads its generation options."""
        # The seed depends on the request alone, so that a run can go on from any place.
        whole = json.dumps([context, options], sort_keys=True).encode("utf-8", "surrogatepass")
        seed = zlib.crc32(whole) >> 1
        options = normalize_gen_kwargs(dict(options), _NEW_TOKENS)
        new_tokens = options.pop("max_gen_toks")
        end = self._tokenizer.piece(self.eot_token_id)
        stop = [text for text in handle_stop_sequences(options.pop("until", None), end) if text]
        is_drawn = options.pop("do_sample")
        temperature = options.pop("temperature", 1.0)
        known = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"a task asks to generate with {unknown}, which is not supported")
        if new_tokens >= self.max_length:
            raise ValueError(
                f"a task asks for {new_tokens} new tokens; expected fewer than {self.max_length}, "
                "the model's max_length"
            )
        ids = self.tok_encode(context)[-(self.max_length - new_tokens) :]
        sampling = Sampling(temperature if is_drawn else 0.0, seed=seed, **(known | options))
        return Prompt(tuple(ids), new_tokens, tuple(stop), sampling)


def prepare_tasks(
    tasks: Sequence[str],
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    data: Path | None = None,
) -> Callable[..., list[dict[str, Any]]]:
    """Finds tasks by name, and returns a function that runs them.

    Args:
      tasks: names of tasks, groups or tags, or paths of YAML files.
      include_path: folder of more tasks; None = only those of the harness and of this package.
      shots: number of examples before a question; None = the task's own number.
      limit: number of questions per task; None = all.
      data: folder of local data, see `task_manager`; None = the data that the tasks name.

    Returns:
      A function of (model, params, tokenizer, batch) that runs the tasks. It returns a dict for
      each metric of each task: "task", "metric", "value", "stderr".

    Raises:
      ValueError: there is no such task or folder.
    """
    manager = task_manager(tasks, include_path, data)
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}; `lm_eval ls tasks` lists all"
            )

    def run(model, params, tokenizer, batch):
        own = MistralJax(model, params, tokenizer, batch)
        with contextlib.redirect_stdout(sys.stderr):
            loaded = manager.load(list(tasks))
        return list(_metrics(evaluate(own, loaded, shots, limit, False)["results"]))

    return run


def evaluate(
    model: MistralJax,
    tasks: Mapping[str, Any],
    shots: int | None,
    limit: int | None,
    executes: bool,
) -> dict[str, Any]:
    """Runs tasks with the defaults of the harness's command, and returns its results.

    Args:
      model: the model.
      tasks: what `TaskManager.load` returned.
      shots: examples before a question, unless a task sets 0; None = each task's own number.
      limit: maximum number of questions of a task; None = all.
      executes: whether programs may be run that the model has written.
    """
    # The harness would fork processes, which can deadlock in a program with threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and shots is not None):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with contextlib.redirect_stdout(sys.stderr):
        return lm_eval.evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=_DRAWS,
            log_samples=False,
            confirm_run_unsafe_code=executes,
        )


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the metrics of all tasks; the name of the harness's default filter is left out."""
    for task, fields in results.items():
        for key, value in fields.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            stderr = fields.get(f"{metric}_stderr,{kind}")
            yield {
                "task": task,
                "metric": metric if kind == "none" else f"{metric}, {kind}",
                "value": float(value),
                "stderr": stderr if isinstance(stderr, float) else None,
            }
