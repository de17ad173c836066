"""The state of a run: the first one, and those on disk. It trains nothing.

On any layout it is the same; of several processes, all must call what saves and restores it.
"""

import contextlib
import functools
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mistral_jax import arrays, distributed, folder
from mistral_jax.model.transformer import Transformer
from mistral_jax.sharding import Layout, abstract_params
from mistral_jax.training.step import TrainState

KEPT_STATES = 2


def initial_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    seed: int,
    layout: Layout | None = None,
) -> TrainState:
    """Builds the state that training begins with, in float32: the same on any layout."""
    token = jnp.zeros((1, 1), jnp.int32)

    def init(key):
        params = nn.unbox(model.init(key, token, token))["params"]
        return TrainState.create(optimizer, params)

    abstract = abstract_state(model, optimizer, layout)
    places = jax.tree.map(lambda x: x.sharding, abstract) if layout else None
    return jax.jit(init, out_shardings=places)(jax.random.key(seed))


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformation, layout: Layout | None = None
) -> TrainState:
    """Describes the state of training all parameters; the optimizer's part lies where they do."""
    params = abstract_params(model, layout)
    state = jax.eval_shape(functools.partial(TrainState.create, optimizer), params)
    if layout is None:
        return state
    whole = layout.sharding()
    opt_state = optax.tree.map_params(
        optimizer,
        lambda x, param: x.update(sharding=param.sharding),
        state.opt_state,
        params,
        transform_non_params=lambda x: x.update(sharding=whole),
    )
    return state.replace(
        trainable=params, opt_state=opt_state, step=state.step.update(sharding=whole)
    )


def save_state(path: Path, state: TrainState) -> None:
    """Saves the state of a run as `<path>/states/<step>`, and removes all but the latest few."""
    target = path / "states" / f"{int(state.step):08d}"
    with contextlib.ExitStack() as stack:
        part = distributed.from_first(
            lambda: stack.enter_context(folder.whole(target, lambda old: True))
        )
        arrays.save(part / "state", state)
    if distributed.is_first():
        for old in sorted(_saved(path))[:-KEPT_STATES]:
            shutil.rmtree(old)
    distributed.sync()


def restore_state(path: Path, state: TrainState) -> TrainState:
    """Returns the latest state that a run saved, or `state` if it saved none."""
    latest = distributed.from_first(lambda: max(_saved(path), default=None))
    if latest is None:
        return state
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    return arrays.read(latest / "state", abstract)


def _saved(path: Path) -> list[Path]:
    return [folder for folder in (path / "states").glob("[0-9]*") if folder.is_dir()]
