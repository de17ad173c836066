"""The states of a run: the first, and those on disk, saved in the background. It trains nothing.

On any layout they are the same; of several processes, all must call what saves and restores them.
"""

import contextlib
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
      keep: how many states stay; beside them that of
      best: the step whose state is the best so far; None = there is none yet.
    """

    def __init__(self, path: Path, keep: int, best: Callable[[], int | None]):
        self._path, self._keep, self._best = path, keep, best
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error) -> None:
        self.wait()
        self._pool.shutdown()

    def save(self, state: TrainState) -> None:
        """Begins to save a state, which may be consumed at once; first it waits for the last."""
        self.wait()
        target = self._path / "states" / f"{int(state.step):08d}"
        saved = _saved_part(state)
        if next(iter(state.step.devices())).platform == "cpu":
            # Elsewhere arrays are copied to the host before this returns; there, they are shared.
            saved = jax.tree.map(jnp.copy, saved)
        stack = contextlib.ExitStack()
        part = distributed.from_first(
            lambda: stack.enter_context(folder.whole(target, lambda old: True))
        )
        finish = arrays.save_in_background(part / "state", saved)
        self._pending = self._pool.submit(self._finish, finish, stack)

    def wait(self) -> None:
        """Waits until the last state that was to be saved is there; raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            distributed.sync()

    def _finish(self, finish: Callable[[], None], stack: contextlib.ExitStack) -> None:
        with stack:
            finish()
        if distributed.is_first():
            kept = {int(state.name) for state in _saved(self._path)[-self._keep :]} | {self._best()}
            for old in _saved(self._path):
                if int(old.name) not in kept:
                    shutil.rmtree(old)


def restore_state(path: Path, state: TrainState, step: int | None = None) -> TrainState:
    """Returns a state that a run saved.

    Args:
      path: folder of the run.
      state: one like it, whose frozen part and places it takes over.
      step: which; None = the latest, or `state` itself if none was saved.
    """
    found = distributed.from_first(lambda: saved_steps(path)) if step is None else [step]
    if not found:
        return state
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved_part(state)
    )
    return state.replace(**arrays.read(path / "states" / f"{found[-1]:08d}" / "state", abstract))


def saved_steps(path: Path) -> list[int]:
    """Returns the steps of the states that a run has saved, in order."""
    return [int(state.name) for state in _saved(path)]


def _saved_part(state: TrainState) -> dict[str, Any]:
    return {"trainable": state.trainable, "opt_state": state.opt_state, "step": state.step}


def _saved(path: Path) -> list[Path]:
    return sorted(p for p in (path / "states").glob("[0-9]*") if p.is_dir())
