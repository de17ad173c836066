"""lm-evaluation-harness: our models behind its interface, and a function that runs its tasks.

Contexts and continuations are tokenized as in the harness's own Transformers backend, so scores are
the same. Chat templates are not applied.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
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
from mistral_jax.engine.score import likelihoods
from mistral_jax.engine.text import completions
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
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        tokenizer: Tokenizer,
        batch: int = 8,
        max_length: int | None = None,
    ):
        super().__init__()
        self._loaded = model, params
        self._tokenizer = tokenizer
        self._batch = batch
        self.max_length = max_length or model.config.max_positions

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
        return self._tokenizer.encode(string, bos=adds_bos)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations; a request has the tokens of its context and of its continuation."""
        rows = [context + continuation for _, context, continuation in requests]
        rows = [row[-(self.max_length + 1) :] for row in rows]
        with tqdm(desc="scoring tokens", disable=disable_tqdm or None) as bar:

            def report(done, total):
                bar.total = total
                bar.update(done - bar.n)

            found = likelihoods(*self._loaded, rows, self._batch, report)
        scores = []
        for row, (_, _, continuation) in zip(found, requests, strict=True):
            start = len(row.logprobs) - len(continuation)
            if start < 0:
                raise ValueError(
                    f"a task has a continuation of {len(continuation)} tokens; expected at most "
                    f"{self.max_length}, the model's max_length"
                )
            logprob = math.fsum(row.logprobs[start:].tolist())
            scores.append((logprob, bool(row.greedy[start:].all())))
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts, in windows of `max_length` tokens."""
        windows = [
            (number, None, *make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        scores = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, *_), (logprob, _) in zip(windows, scores, strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts, each until its stop strings or its number of new tokens."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        with tqdm(desc="generating", total=len(requests), disable=disable_tqdm or None) as bar:
            for numbers in groups.values():
                numbers.sort(key=lambda number: -len(requests[number].args[0]))
                for start in range(0, len(numbers), self._batch):
                    some = numbers[start : start + self._batch]
                    contexts = [requests[number].args[0] for number in some]
                    texts = self._generate(contexts, requests[some[0]].args[1], some)
                    for number, text in zip(some, texts, strict=True):
                        answers[number] = text
                    bar.update(len(some))
        return answers

    def _generate(
        self, contexts: Sequence[str], options: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[str]:
        """Continues contexts that share their generation options."""
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
        prompts = [self.tok_encode(text)[-(self.max_length - new_tokens) :] for text in contexts]
        filters = known | options
        samplings = [
            Sampling(temperature if is_drawn else 0.0, seed=seed, **filters) for seed in seeds
        ]
        found = completions(
            *self._loaded,
            self._tokenizer,
            prompts,
            new_tokens,
            sampling=samplings,
            stop=stop,
            is_new=True,
        )
        return [completion.text for completion in found]


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
        # The harness would fork processes, which can deadlock in a program with threads.
        os.environ["DISABLE_MULTIPROC"] = "1"
        with contextlib.redirect_stdout(sys.stderr):
            results = lm_eval.simple_evaluate(
                MistralJax(model, params, tokenizer, batch),
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=_DRAWS,
                log_samples=False,
            )
        return list(_metrics(results["results"]))

    return run


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
