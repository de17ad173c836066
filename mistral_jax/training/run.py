"""A training run: a folder of data, states, curve and result, and the loop that fills it.

It is the bookkeeping around `step.py`. A run that was stopped goes on where it was, to the bit.
"""

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mistral_jax import distributed, folder
from mistral_jax.config import read_json
from mistral_jax.generation.sampling import Sampling
from mistral_jax.generation.text import completions
from mistral_jax.sharding import on_mesh
from mistral_jax.training import curve, data, finetuning, pretraining
from mistral_jax.training.curve import Curve, Entry
from mistral_jax.training.job import Job, optimizer_of
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.states import Saver, restore_state, saved_steps
from mistral_jax.training.step import Batch, TrainState, make_train_step
from mistral_jax.training.utilisation import flops_per_token, peak_flops

_SAMPLE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      stopped: the signal that stopped it, state saved; None = it is complete.
      result: what came of it, a folder: a checkpoint, or adapters.
      command: how to use that.
    """

    stopped: signal.Signals | None = None
    result: Path | None = None
    command: str = ""


def train(
    recipe: Recipe,
    path: Path | str,
    report: Callable[[Entry], None],
    sharding: Path | str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Outcome:
    """Trains a model, or goes on with it, and saves what comes of it in the folder of the run.

    That is `<path>/checkpoint`, in bfloat16, or `<path>/adapter`, where adapters are trained.

    Args:
      recipe: how.
      path: folder of the run; it is made, or holds a run of this recipe.
      report: is given every entry of the curve that `<path>/curve.jsonl` gets.
      sharding: how to spread the work over devices, and `mesh`: see `read_layout`. A run may go on
        under another layout than it began with.

    Raises:
      ValueError: the recipe does not fit the run in the folder, the data or the model; or steps in
        a row were not finite.
    """
    path = Path(path).absolute()
    kind = finetuning if recipe.data else pretraining
    distributed.from_first(lambda: prepare(recipe, path))
    job = kind.make_job(recipe, path, sharding, mesh)
    state = _Run(recipe, path, job, report).go_on()
    if isinstance(state, signal.Signals):
        return Outcome(stopped=state)
    return Outcome(None, *job.export(state))


def prepare(recipe: Recipe, path: Path) -> None:
    """Makes the folder of a run and its data, where they are not there yet; of one process only."""
    notes = path / "recipe.json"
    if notes.is_file() and (path / "data").is_dir():
        recipe.check_continues(Recipe.from_dict(read_json(notes), str(notes)), str(path))
    elif not notes.is_file():
        folder.check_target(path)
        path.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
    (finetuning if recipe.data else pretraining).prepare(recipe, path)


class _Run:
    """The loop of a run, and what it looks at."""

    def __init__(self, recipe: Recipe, path: Path, job: Job, report: Callable[[Entry], None]):
        self._recipe, self._path, self._job = recipe, path, job
        self._schedule, optimizer = optimizer_of(recipe, job.steps)
        # Committed to their devices, as what a step returns is: else it would be compiled twice.
        places = jax.tree.map(lambda x: x.sharding, job.state)
        self._state = restore_state(path, jax.device_put(job.state, places))
        self._train_step = make_train_step(
            job.loss_fn, optimizer, recipe.microbatches, places if job.layout else None, recipe.seed
        )
        self._evaluate = jax.jit(job.loss_fn)
        step = int(self._state.step)
        file = path / "curve.jsonl"
        flops = flops_per_token(
            job.model.config,
            recipe.context,
            adapters=recipe.lora is not None,
            reference=recipe.dpo is not None,
        )
        self._curve = Curve(
            file if distributed.is_first() else None,
            step,
            report,
            flops,
            peak_flops() if distributed.is_first() else None,
            job.steps,
        )
        self._best = distributed.from_first(lambda: _best(file))

    def go_on(self) -> TrainState | signal.Signals:
        """Trains to the end, or until a signal comes; returns the last state, or the signal."""
        recipe, job = self._recipe, self._job
        first, skipped = int(self._state.step), 0
        with (
            _signals() as stopped,
            on_mesh(self._state.trainable),
            Saver(self._path, recipe.keep, lambda: self._best.step) as saver,
            contextlib.closing(job.feed(range(first, job.steps))) as batches,
        ):
            if job.before and not first:
                self._look(0, last=False)
            for step, batch in enumerate(batches, first + 1):
                last = step == job.steps
                self._state, metrics = self._train_step(self._state, self._spread(batch))
                metrics = jax.device_get(metrics)
                self._curve.add(step, metrics, batch.tokens.size, float(self._schedule(step - 1)))
                skipped = skipped + 1 if metrics["skipped"] else 0
                improved = self._look(step, last)
                # All stop after the same step, and for the same reason: SIGTERM is the larger.
                stop = distributed.largest(stopped())
                ended = skipped == recipe.most_skipped
                if last or stop or ended or improved or step % recipe.save_every == 0:
                    with self._curve.pause():
                        saver.save(self._state)
                if ended:
                    saver.wait()
                    raise ValueError(
                        f"the loss or the gradients of {skipped} steps in a row, up to step "
                        f"{step}, are not finite (loss {metrics['loss']}): the last good state is "
                        f"saved; begin another run with a learning_rate below "
                        f"{recipe.learning_rate:g}"
                    )
                if stop and not last:
                    return signal.Signals(stop)
        if recipe.export_best and self._best.step in distributed.from_first(
            lambda: saved_steps(self._path)
        ):
            self._state = restore_state(self._path, self._state, self._best.step)
        return self._state

    def _look(self, step: int, last: bool) -> bool:
        """Validates and samples where that is due; returns whether the model is the best so far."""
        recipe, improved = self._recipe, False
        with self._curve.pause():
            if last or step % recipe.validate_every == 0:
                improved = self._validate(step)
            if recipe.sample_every and (last or step % recipe.sample_every == 0):
                self._curve.write_samples(step, self._sample())
        return improved and step > 0

    def _validate(self, step: int) -> bool:
        # One at a time: CPU devices run what does not depend on each other at once, and processes
        # that do so in another order wait for each other forever.
        sums = [
            jax.device_get(
                self._evaluate(self._state.trainable, self._state.frozen, self._spread(batch), None)
            )
            for batch in self._job.validation()
        ]
        if not sums:
            return False
        loss, sums = jax.tree.map(lambda *parts: float(np.sum(parts)), *sums)
        count = sums.pop("targets")
        means = {f"validation_{name}": value / count for name, value in sums.items()}
        loss /= count
        self._curve.write({"step": step, "validation_loss": loss, **means})
        improved = loss < self._best.loss
        if improved:
            self._best = _Best(loss, step)
        return improved

    def _sample(self) -> list[tuple[str, str]]:
        job = self._job
        rows = completions(
            job.model,
            job.params(self._state),
            job.tokenizer,
            [prompt.tokens for prompt in job.prompts],
            _SAMPLE_TOKENS,
            sampling=Sampling(temperature=0),
            is_new=job.chat,
        )
        return [(prompt.text, row.text) for prompt, row in zip(job.prompts, rows, strict=True)]

    def _spread(self, batch: Batch) -> Batch:
        layout = self._job.layout
        return data.spread(batch, layout, self._recipe.microbatches) if layout else batch


class _Best(NamedTuple):
    """The lowest validation loss so far, and its step."""

    loss: float
    step: int | None


def _best(path: Path) -> _Best:
    """Reads it off a curve; step 0, whose state is not kept, does not count."""
    entries = [entry for entry in curve.read(path) if entry.get("validation_loss") is not None]
    found = [_Best(entry["validation_loss"], entry["step"]) for entry in entries if entry["step"]]
    return min(found, default=_Best(math.inf, None))


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the SIGINT or SIGTERM that came, or 0; a second one acts."""
    received = []
    earlier = {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, earlier[number] or signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, note)
    try:
        yield lambda: max(received, default=0)
    finally:
        for number, handler in earlier.items():
            # None: one that Python did not set.
            signal.signal(number, handler or signal.SIG_DFL)
