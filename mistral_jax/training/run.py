"""A training run: its folder of data, states, curve and result, and the loop that fills it.

`step.py` does the computation. A run that was stopped resumes from its last state, bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import adapters, checksums, folder, manifest
from mistral_jax.engine.sampling import Sampling
from mistral_jax.engine.text import completions
from mistral_jax.parallel import distributed
from mistral_jax.parallel.sharding import on_mesh
from mistral_jax.training import curve, finetuning, flops, pretraining
from mistral_jax.training.curve import Curve, Entry
from mistral_jax.training.data import examples
from mistral_jax.training.data.batches import spread
from mistral_jax.training.job import Job, optimizer_of
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.states import Saver, restore_state, saved_steps
from mistral_jax.training.step import Batch, TrainState, make_train_step

_SAMPLE_TOKENS = 64
# Settings that decide the data. If one changes before a state is saved, the data are made again.
_DECIDE_DATA = ("model", "corpus", "checkpoint", "data", "dpo", "context", "seed")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      stopped: the signal that stopped it; None = it is complete.
      result: folder of the result: a checkpoint, or adapters.
      step: step of the result.
      command: command that uses the result.
    """

    stopped: signal.Signals | None = None
    result: Path | None = None
    step: int = 0
    command: str = ""


def train(
    recipe: Recipe,
    path: Path | str,
    report: Callable[[Entry], None],
    sharding: Path | str | None = None,
    mesh: Mapping[str, int] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Trains a model, or resumes its training, and saves the result in the folder of the run.

    The result is `<path>/checkpoint`, in bfloat16, or `<path>/adapter` if adapters are trained. An
    interrupt or SIGTERM ends the run after the current step and saves its state.

    Args:
      recipe: settings of the run.
      path: folder of the run; it is created, or holds a run of this recipe.
      report: called with every entry of the curve that is written to `<path>/curve.jsonl`.
      sharding: partition over devices, with `mesh`: see `read_layout`. A run may resume under
        another layout.
      tell: called with lines about the data, the state that the run resumes from, and slow steps.

    Raises:
      ValueError: the recipe does not fit the run in the folder, the data or the model; too many
        consecutive steps were not finite; or another process trains in the folder.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))  # Whatever the caller's setting is.
        stopped = stack.enter_context(_signals())
        distributed.from_first(lambda: stack.enter_context(prepared(recipe, path)))
        if recipe.data and distributed.is_first():
            for line in examples.describe(path):
                tell(line)
        kind = finetuning if recipe.data else pretraining
        job = kind.make_job(recipe, path, sharding, mesh)
        training = _Run(recipe, path, job, report, tell)
        if number := distributed.largest(stopped()) or training.go_on(stopped):
            return Outcome(signal.Signals(number))
        state = training.result()
        target, options = job.export(state)
        use = shlex.join(["python", "-m", "mistral_jax.sample", *options])
        return Outcome(None, target, int(state.step), use)


@contextlib.contextmanager
def prepared(recipe: Recipe, path: Path) -> Iterator[None]:
    """Locks the folder of a run for this process, and fills it with the recipe and the data."""
    notes = path / "recipe.json"
    if not notes.is_file():
        folder.check_free(path, remedy=" and is no run: name another folder with --run")
        path.mkdir(parents=True, exist_ok=True)
    busy = (
        f"another process trains in {path}: wait for it ({{owner}}), or name another folder with "
        "--run"
    )
    # The result is written last. Find out now whether it can be.
    for target, kept in (("checkpoint", manifest.kept), ("adapter", adapters.kept)):
        folder.check_target(path / target, kept)
    with folder.locked(path, busy):
        earlier = None
        if notes.is_file():
            earlier = Recipe.from_dict(read_json(notes), str(notes))
        _check_data(recipe, path, earlier)
        if recipe != earlier:
            part = path / ".recipe.json.partial"
            part.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n", encoding="utf-8")
            part.replace(notes)
        if not (path / "data").is_dir():
            (examples if recipe.data else pretraining).prepare(recipe, path)
        yield


def _check_data(recipe: Recipe, path: Path, earlier: Recipe | None) -> None:
    """Refuses data that are damaged or made from other files; removes data that may be made again.

    They may be made again until a state is saved, because nothing was learnt from them.
    """
    data, begun = path / "data", saved_steps(path)
    if earlier and begun:
        recipe.check_continues(earlier, str(path))
    if data.is_dir() and earlier:
        checksums.check(data, f"remove {data}, and it is made again")
        other = examples.changed(recipe, path) if recipe.data and earlier.data else None
        if other and begun:
            raise ValueError(
                f"{other} has changed since the run in {path} began: restore it, or name another "
                "folder with --run"
            )
        if other or any(getattr(recipe, x) != getattr(earlier, x) for x in _DECIDE_DATA):
            shutil.rmtree(data)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the SIGINT or SIGTERM received, or 0.

    The second signal of a kind has its usual effect.
    """
    received = []
    earlier = {}

    def note(number, frame):
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):
                print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        received.append(number)
        signal.signal(number, earlier[number] or signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # Python delivers signals to the main thread only.
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, note)
    try:
        yield lambda: max(received, default=0)
    finally:
        for number, handler in earlier.items():
            # None stands for a handler that Python did not set.
            signal.signal(number, handler or signal.SIG_DFL)


class _Run:
    """The loop of a run, with its validation, samples and saved states."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        job: Job,
        report: Callable[[Entry], None],
        tell: Callable[[str], None],
    ):
        self._recipe, self._path, self._job, self._tell = recipe, path, job, tell
        self._schedule, optimizer = optimizer_of(recipe, job.steps)
        # A step returns committed arrays. Uncommitted ones here would compile the step twice.
        places = jax.tree.map(lambda x: x.sharding, job.state)
        self._state = restore_state(path, jax.device_put(job.state, places), tell=tell)
        if step := int(self._state.step):
            tell(f"going on at step {step:,} of {job.steps:,}")
        options = job.model.backend.training_options
        self._train_step = make_train_step(
            job.loss_fn,
            optimizer,
            recipe.microbatches,
            places if job.layout else None,
            recipe.seed,
            options,
        )
        self._evaluate = jax.jit(job.loss_fn, compiler_options=options)
        per_token = flops.per_token(
            job.model.config,
            recipe.context,
            adapters=recipe.lora is not None,
            reference=recipe.dpo is not None,
        )
        file, is_first = path / "curve.jsonl", distributed.is_first()
        self._curve = Curve(
            file if is_first else None,
            int(self._state.step),
            report,
            per_token,
            flops.peak() if is_first else None,
            job.steps,
        )
        self._looked, self._best, self._skipped = distributed.from_first(lambda: _earlier(file))

    def go_on(self, stopped: Callable[[], int]) -> int:
        """Trains to the end or until a signal arrives; returns the signal, or 0."""
        recipe, job = self._recipe, self._job
        first, skipped = int(self._state.step), 0
        with (
            on_mesh(self._state.trainable),
            Saver(self._path, recipe.keep) as saver,
            contextlib.closing(job.feed(range(first, job.steps))) as batches,
        ):
            # A run may have been stopped between the step and its validation.
            if (first or job.before) and first not in self._looked:
                self._look(first)
            if first < job.steps:
                self._tell("compiling the training step; the first step waits for it")
            for step, batch in enumerate(batches, first + 1):
                rate = float(self._schedule(step - 1 - self._skipped))
                batch = self._spread(batch, recipe.microbatches)
                self._state, metrics = self._train_step(self._state, batch)
                metrics = jax.device_get(metrics)
                self._curve.add(step, metrics, int(metrics.pop("tokens")), rate)
                skipped = skipped + 1 if metrics["skipped"] else 0
                self._skipped += int(metrics["skipped"])
                # All processes stop after the same step, by the same signal (SIGTERM is larger).
                stop = distributed.largest(stopped()) if step < job.steps else 0
                improved = not stop and self._look(step)
                ended = skipped == recipe.most_skipped
                due = step == job.steps or step % recipe.save_every == 0
                with self._curve.pause():
                    saver.check()
                    if due or stop or ended or improved:
                        saver.save(self._state, self._best.step)
                if ended:
                    saver.wait()
                    raise ValueError(
                        f"the loss or the gradients of {skipped} steps in a row, up to step "
                        f"{step}, are not finite (loss {metrics['loss']}): the last good state is "
                        f"saved; begin another run with a learning_rate below "
                        f"{recipe.learning_rate:g}"
                    )
                if stop:
                    return stop
        return 0

    def result(self) -> TrainState:
        """Returns the state to export: the last, or the best by validation."""
        best = self._best.step
        if self._recipe.export_best and best != int(self._state.step):
            kept = distributed.from_first(lambda: saved_steps(self._path))
            return restore_state(self._path, self._state, best) if best in kept else self._state
        return self._state

    def _look(self, step: int) -> bool:
        """Validates and samples where it is due; returns whether the model is the best so far."""
        recipe, last, improved = self._recipe, step == self._job.steps, False
        with self._curve.pause():
            if last or step % recipe.validate_every == 0:
                improved = self._validate(step)
            every = recipe.sample_every if self._job.prompts else 0
            if every and (last or step % every == 0):
                self._curve.write_samples(step, self._sample())
        return improved

    def _validate(self, step: int) -> bool:
        # Wait for each batch. CPU devices run independent programs at once, and processes that run
        # them in different orders deadlock.
        sums = [
            jax.device_get(
                self._evaluate(
                    self._state.trainable, self._state.frozen, self._spread(batch, 1), None
                )
            )
            for batch in self._job.validation()
        ]
        if not sums:
            return False
        loss, sums = jax.tree.map(lambda *parts: float(np.sum(parts)), *sums)
        count, loss = sums.pop("targets"), sums.pop("loss", loss)
        means = {f"validation_{name}": value / count for name, value in sums.items()}
        loss /= count
        self._curve.write({"step": step, "validation_loss": loss, **means})
        improved = step > 0 and loss < self._best.loss
        if improved:
            self._best = _Best(loss, step)
        return improved

    def _sample(self) -> list[tuple[str, str]]:
        job, tokens = self._job, [prompt.tokens for prompt in self._job.prompts]
        room = job.model.config.max_positions - max(map(len, tokens))
        rows = completions(
            job.model,
            job.params(self._state),
            job.tokenizer,
            tokens,
            min(_SAMPLE_TOKENS, room),
            sampling=Sampling(temperature=0),
            is_new=job.chat,
        )
        return [(prompt.text, row.text) for prompt, row in zip(job.prompts, rows, strict=True)]

    def _spread(self, batch: Batch, parts: int) -> Batch:
        return spread(batch, self._job.layout, parts) if self._job.layout else batch


class _Best(NamedTuple):
    """The lowest validation loss so far, and its step."""

    loss: float
    step: int | None


def _earlier(file: Path) -> tuple[set[int], _Best, int]:
    """Returns the steps validated or sampled so far, the best one, and the number skipped."""
    entries = curve.read(file)
    looked = {entry["step"] for entry in entries if "loss" not in entry}
    # The state of step 0 is not saved.
    best = [_Best(y, step) for step, y in curve.points(entries, "validation_loss") if step]
    skipped = sum(entry.get("skipped", 0) for entry in entries)
    return looked, min(best, default=_Best(math.inf, None)), skipped
