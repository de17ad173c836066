"""The states of a run: the first one, and those that are saved in the background and restored.

A saved state does not depend on the layout. If a run has several processes, all of them must call
the functions that save and restore.
"""

import contextlib
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import arrays, checksums, folder, zarr
from mistral_jax.parallel import distributed
from mistral_jax.parallel.sharding import Layout
from mistral_jax.training.step import Params, TrainState

# Files of a saved state.
_FILES = re.compile(r"(check)?sums\.json|state/.*")


def create_state(
    optimizer: optax.GradientTransformation,
    trainable: Params,
    frozen: Params | None = None,
    layout: Layout | None = None,
) -> TrainState:
    """Builds the state before the first step; the optimizer's part is laid out like `trainable`."""
    if layout is None:
        opt_state = jax.jit(optimizer.init)(trainable)
        step = jnp.zeros((), jnp.int32)
    else:
        abstract = abstract_state(optimizer, trainable, layout)
        places = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
        opt_state = jax.jit(optimizer.init, out_shardings=places)(trainable)
        step = jax.device_put(jnp.zeros((), jnp.int32), layout.sharding())
    return TrainState(trainable, {} if frozen is None else frozen, opt_state, step)


def abstract_state(
    optimizer: optax.GradientTransformation, trainable: Params, layout: Layout
) -> TrainState:
    """Returns the shapes and shardings of the state that trains `trainable` under a layout."""
    whole = layout.sharding()

    def place(moment, param):
        # A factored moment has another shape than its parameter, and is replicated.
        return moment.update(sharding=param.sharding if moment.shape == param.shape else whole)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable
    )
    opt_state = optax.tree.map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, shapes),
        shapes,
        transform_non_params=lambda x: x.update(sharding=whole),
    )
    return TrainState(shapes, {}, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


class Saver:
    """Saves the states of a run in the background as `<path>/states/<step>`, and removes old ones.

    A state appears complete or not at all. It does not contain the frozen parameters.

    Args:
      path: folder of the run.
      keep: number of latest states to keep, beside the best one.
    """

    def __init__(self, path: Path, keep: int):
        self._path, self._keep = path, keep
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error) -> None:
        self.wait()
        self._pool.shutdown()

    def save(self, state: TrainState, best: int | None) -> None:
        """Waits for the previous state, then starts to save this one, which may be donated at once.

        Args:
          state: the state to save.
          best: step of the best state so far, which is kept; None = there is none yet.
        """
        self.wait()
        target = _place(self._path, int(state.step))
        saved = _saved_part(state)
        if next(iter(state.step.devices())).platform == "cpu":
            # On accelerators Orbax copies arrays to the host before it returns; on a CPU it shares
            # them.
            saved = jax.tree.map(jnp.copy, saved)
        stack = contextlib.ExitStack()
        part = distributed.from_first(lambda: stack.enter_context(folder.whole(target, _kept)))
        finish = arrays.save_in_background(part / "state", saved)
        self._pending = self._pool.submit(self._finish, finish, stack, part, target, best)

    def check(self) -> None:
        """Raises the error of the last save, if it has failed by now."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Waits until the last state is saved; raises the error if that fails."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            distributed.sync()

    def _finish(
        self, finish: Callable[[], None], stack, part: Path, target: Path, best: int | None
    ) -> None:
        try:
            with stack:
                finish()
                if distributed.is_first():
                    checksums.write(part)
        except Exception as error:
            raise OSError(f"{target} could not be saved: {_reason(error)}") from error
        if distributed.is_first():
            latest = {int(state.name) for state in _saved(self._path)[-self._keep :]}
            for old in _saved(self._path):
                if int(old.name) not in latest | {best}:
                    shutil.rmtree(old)


def restore_state(
    path: Path,
    state: TrainState,
    step: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """Returns a saved state of a run, or `state` if there is none.

    Args:
      path: folder of the run.
      state: a state with the same shapes and shardings; its frozen part is kept, and the rest is
        freed, so that memory holds one state only.
      step: step of the state; None = the latest state that is not damaged.
      tell: called with a line about each damaged state.

    Raises:
      ValueError: the state of that step, or every state, is damaged.
    """
    found = distributed.from_first(lambda: saved_steps(path)) if step is None else [step]
    if not found:
        return state
    old = _saved_part(state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), old
    )
    jax.tree.map(lambda x: x.delete(), old)
    for number in reversed(found):
        place = _place(path, number)
        try:
            return state.replace(**_read(place, abstract, number))
        except ValueError as error:
            if number == found[0]:
                raise ValueError(f"{error}; to go on without this state, remove {place}") from error
            tell(f"warning: {error}; the run goes on from an earlier state")
    raise AssertionError("no state was tried")


def _read(place: Path, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    """Reads a saved state; raises a ValueError if it is damaged."""

    def check():
        checksums.check(place, "the state is damaged")
        _check_arrays(place / "state" / "state", abstract)

    distributed.from_first(check)
    try:
        read = arrays.read(place / "state", abstract)
    except MemoryError:
        raise
    except Exception as error:  # Orbax raises errors of many types.
        if distributed.count() > 1:  # The others may have read their parts.
            raise
        raise ValueError(f"{place} cannot be read ({_reason(error)})") from error
    if int(read["step"]) != step:
        raise ValueError(f"{place} holds step {int(read['step'])}; expected step {step}")
    return read


def _check_arrays(place: Path, abstract: dict[str, Any]) -> None:
    """Checks that all files of a state's arrays exist, before Orbax reads one.

    Orbax reports missing files by errors in many threads, and may crash. For states saved before
    there were checksums, this is the only check.
    """
    if any(place.glob("*/zarr.json")):  # Earlier versions of Orbax wrote Zarr 3.
        return
    read_json(place / "_METADATA")
    for keys, array in jax.tree.leaves_with_path(abstract):
        part = place / jax.tree_util.keystr(keys, simple=True, separator=".")
        try:  # The step is an int32, which no model has.
            found = zarr.describe(part, zarr.DTYPES | {"<i4": np.dtype(np.int32)})
        except ValueError as error:
            raise ValueError(f"{place.parent.parent} is damaged: {error}") from None
        if (found.shape, found.dtype) != (array.shape, array.dtype):
            raise ValueError(
                f"{found.place} has {found.shape} of {found.dtype}; expected {array.shape} of "
                f"{array.dtype}"
            )


def saved_steps(path: Path) -> list[int]:
    """Returns the steps of the saved states of a run, in ascending order."""
    return [int(state.name) for state in _saved(path)]


def _saved_part(state: TrainState) -> dict[str, Any]:
    return {"trainable": state.trainable, "opt_state": state.opt_state, "step": state.step}


def _place(path: Path, step: int) -> Path:
    return path / "states" / f"{step:08d}"


def _kept(path: Path) -> str | None:
    return folder.foreign(path, _FILES)


def _saved(path: Path) -> list[Path]:
    places = (path / "states").glob("[0-9]*")
    found = {int(p.name): p for p in places if p.name.isdecimal() and p.is_dir()}
    return [p for step, p in sorted(found.items()) if p == _place(path, step)]


def _reason(error: BaseException) -> str:
    """Returns the message of the error from which a chain of errors started."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return said[:200] or type(error).__name__
