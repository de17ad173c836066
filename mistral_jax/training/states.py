"""The states of a run: the first, and those on disk, saved in the background. It trains nothing.

On any layout they are the same; of several processes, all must call what saves and restores them.
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
import optax

from mistral_jax import arrays, distributed, folder
from mistral_jax.sharding import Layout
from mistral_jax.training.step import Params, TrainState

# What a saved state consists of.
_FILES = re.compile(r"state/.*")


def create_state(
    optimizer: optax.GradientTransformation,
    trainable: Params,
    frozen: Params | None = None,
    layout: Layout | None = None,
) -> TrainState:
    """Builds the state before the first step; the optimizer's part lies where the parameters do."""
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
    """Describes the state of training `trainable`, arrays or shapes that lie on a layout."""
    whole = layout.sharding()

    def place(moment, param):
        # A factored moment is smaller than its parameter, and whole everywhere.
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
    """Saves the states of a run while it goes on, as `<path>/states/<step>`; the last `keep` stay.

    A state appears whole or not at all. What is frozen is not part of it.

    Args:
      path: folder of the run.
      keep: how many states stay, beside the best.
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
        """Begins to save a state, which may be consumed at once; first it waits for the last.

        Args:
          state: what to save.
          best: the step whose state is the best so far, and stays; None = there is none yet.
        """
        self.wait()
        target = self._path / "states" / f"{int(state.step):08d}"
        saved = _saved_part(state)
        if next(iter(state.step.devices())).platform == "cpu":
            # Elsewhere arrays are copied to the host before this returns; there, they are shared.
            saved = jax.tree.map(jnp.copy, saved)
        stack = contextlib.ExitStack()
        part = distributed.from_first(lambda: stack.enter_context(folder.whole(target, _kept)))
        finish = arrays.save_in_background(part / "state", saved)
        self._pending = self._pool.submit(self._finish, finish, stack, target, best)

    def check(self) -> None:
        """Raises what went wrong, if something has by now."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Waits until the last state that was to be saved is there; raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            distributed.sync()

    def _finish(self, finish: Callable[[], None], stack, target: Path, best: int | None) -> None:
        try:
            with stack:
                finish()
        except Exception as error:
            raise OSError(f"{target} could not be saved: {_reason(error)}") from error
        if distributed.is_first():
            latest = {int(state.name) for state in _saved(self._path)[-self._keep :]}
            for old in _saved(self._path):
                if int(old.name) not in latest | {best}:
                    shutil.rmtree(old)


def restore_state(path: Path, state: TrainState, step: int | None = None) -> TrainState:
    """Returns a state that a run saved.

    Args:
      path: folder of the run.
      state: one like it, of which it takes over the frozen part and the places. The rest of it is
        freed, for the memory of one state; or it is returned, if there is none to restore.
      step: which; None = the latest.
    """
    found = distributed.from_first(lambda: saved_steps(path)) if step is None else [step]
    if not found:
        return state
    old = _saved_part(state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), old
    )
    jax.tree.map(lambda x: x.delete(), old)
    return state.replace(**arrays.read(path / "states" / f"{found[-1]:08d}" / "state", abstract))


def saved_steps(path: Path) -> list[int]:
    """Returns the steps of the states that a run has saved, in order."""
    return [int(state.name) for state in _saved(path)]


def _saved_part(state: TrainState) -> dict[str, Any]:
    return {"trainable": state.trainable, "opt_state": state.opt_state, "step": state.step}


def _kept(path: Path) -> str | None:
    return folder.foreign(path, _FILES)


def _saved(path: Path) -> list[Path]:
    return sorted(p for p in (path / "states").glob("[0-9]*") if p.is_dir())


def _reason(error: BaseException) -> str:
    """Returns what the system said first, of an error that was raised out of others."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return said[:200] or type(error).__name__
