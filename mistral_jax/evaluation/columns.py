"""The columns of a suite: their tasks in lm-evaluation-harness, and a run of them on a model."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mistral_jax.base.output import one_line
from mistral_jax.checkpoint import manifest
from mistral_jax.evaluation.harness import MistralJax, evaluate
from mistral_jax.evaluation.results import Column
from mistral_jax.evaluation.suite import Benchmark, Suite
from mistral_jax.evaluation.tasks.manager import task_manager
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel.sharding import abstract_params

NEEDS_PERMISSION = "needs --allow-code-execution"

# Time of a generated answer beside that of a question whose choices are scored, for estimates.
_COST = 30


class Prepared(NamedTuple):
    """A column whose data are at hand.

    Attributes:
      benchmark: its description.
      tasks: the task, or the tasks of a group, as the harness loads them.
      questions: number of questions.
      cost: estimate of the time that it takes, in no particular unit.
    """

    benchmark: Benchmark
    tasks: Mapping[str, Any]
    questions: int
    cost: int


def prepare(
    suite: Suite,
    names: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    executes: bool,
    report: Callable[[str], None] = lambda name: None,
    data: Path | None = None,
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Reads the tasks of columns and their data.

    Args:
      suite: the suite.
      names: names of the columns.
      include_path: folder of more task files.
      limit: maximum number of questions of a task; None = all.
      executes: whether programs may be run that a model has written.
      report: called with the name of each column before its data are read.
      data: folder of local data, see `task_manager`; None = the data that the tasks name.

    Returns:
      The columns that can be run, and the reasons why the others cannot, both by name.

    Raises:
      ValueError: there is no such folder.
    """
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    known = {name: suite.columns[name] for name in names}
    manager = task_manager([own.task for own in known.values()], include_path, data)
    found, missing = {}, {}
    for name, benchmark in known.items():
        if benchmark.executes and not executes:
            missing[name] = NEEDS_PERMISSION
        elif benchmark.task not in manager.all_tasks:
            missing[name] = f"lm-evaluation-harness has no task {benchmark.task!r}"
        else:
            report(name)
            try:
                found[name] = _load(manager, benchmark, limit)
            except Exception as error:  # Each data set and its library has errors of its own.
                said = str(error).strip().partition("\n")[0]
                missing[name] = one_line(
                    f"the data of {benchmark.task} cannot be read: {type(error).__name__}: {said}"
                )
    return found, missing


def _load(manager: Any, benchmark: Benchmark, limit: int | None) -> Prepared:
    loaded = manager.load([benchmark.task])
    questions, cost = 0, 0
    for task in loaded["tasks"].values():
        count = min(len(task.eval_docs), limit or math.inf)
        questions += count
        is_drawn = task.get_config("output_type") == "generate_until"
        cost += count * (_COST * (task.get_config("repeats") or 1) if is_drawn else 1)
    return Prepared(benchmark, loaded, questions, cost)


def run(column: Prepared, model: MistralJax, limit: int | None) -> Column:
    """Runs a column.

    Raises:
      ValueError: the task has no such metric, or its result is not a number.
    """
    began, own = time.monotonic(), column.benchmark
    found = evaluate(model, column.tasks, own.shots, limit, own.executes)
    metrics = found["results"].get(own.task, {})
    key = f"{own.metric},{own.filter}"
    if key not in metrics:
        known = ", ".join(name for name in metrics if "," in name and "_stderr" not in name)
        raise ValueError(f"{own.task} has no metric {key!r}; it has {known}")
    stderr = metrics.get(f"{own.metric}_stderr,{own.filter}")
    is_known = isinstance(stderr, float) and math.isfinite(stderr)
    return Column(
        value=100 * float(metrics[key]),
        stderr=100 * stderr if is_known else None,
        questions=sum(count["effective"] for count in found["n-samples"].values()),
        task=own.task,
        metric=own.metric,
        shots=found["n-shot"].get(own.task, own.shots),
        limit=limit,
        seconds=round(time.monotonic() - began, 3),
    )


def parameters(path: Path) -> int:
    """Returns the number of parameters of a checkpoint's model, without adapters.

    Raises:
      ValueError: the folder is not a checkpoint.
    """
    config = manifest.examine(path).config
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(Transformer(config))))
