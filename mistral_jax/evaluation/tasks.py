"""Tasks of lm-evaluation-harness, run by its own evaluator on our model. It defines none."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from mistral_jax.evaluation.harness import MistralJax

# Draws of the bootstrap, for standard errors that have no formula.
_DRAWS = 1000


def prepare(
    tasks: Sequence[str],
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> Callable[..., list[dict[str, Any]]]:
    """Finds tasks by name.

    Args:
      tasks: names of tasks, groups or tags, or paths of YAML files.
      include_path: a folder of more tasks; None = only the harness's own.
      shots: examples before a question; None = as each task says.
      limit: questions of each task; None = all.

    Returns:
      A function of (model, params, tokenizer, batch) that runs them, and returns a dict for each
      metric of each task: "task", "metric", "value", "stderr".

    Raises:
      ValueError: there is no such task or folder.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"there is no folder {include_path}; expected one of tasks in YAML")
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}; `lm_eval ls tasks` lists all"
            )

    def run(model, params, tokenizer, batch):
        # Its other way is to fork, which a program with threads of its own does not survive.
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
    """Yields the metrics of all tasks, without the harness's name of the default filter."""
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
