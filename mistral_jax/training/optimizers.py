"""The optimizer and its learning-rate schedule, by their names in Optax."""

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mistral_jax.base.fields import Rule, boolean, integer, number, optional, show, string

SCHEDULES = ("cosine", "linear", "constant")
# Decay rates of moving averages. With a rate of 1, the average stays 0.
SHARE = Rule(
    "a finite number of at least 0 and below 1",
    lambda x: number(0, 1).accepts(x) and x < 1,
)
_SHARES = ("b1", "b2", "b3", "decay", "momentum", "rho")


def make_schedule(
    name: str, steps: int, *, warmup_steps: int, learning_rate: float, final_learning_rate: float
) -> optax.Schedule:
    """Builds a learning-rate schedule: a linear warmup from 0, then the named course.

    Args:
      name: "cosine" or "linear", from the peak to the final rate; or "constant", at the peak.
      steps: total number of steps.
      warmup_steps: number of steps of the warmup.
      learning_rate: peak learning rate.
      final_learning_rate: learning rate at the end.
    """
    rest = steps - warmup_steps
    if name == "cosine":
        share = final_learning_rate / learning_rate if learning_rate else 0.0
        after = optax.cosine_decay_schedule(learning_rate, rest, share)
    elif name == "linear":
        after = optax.linear_schedule(learning_rate, final_learning_rate, rest)
    else:
        after = optax.constant_schedule(learning_rate)
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def make_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    /,
    *,
    clip_norm: float | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Builds one of Optax's optimizers, preceded by clipping to a global norm.

    If the optimizer decays weights, only matrices decay.

    Args:
      name: name in Optax, such as "adamw" (arXiv 1711.05101), "lion", "adafactor" or "sgd".
      learning_rate: a constant or a schedule.
      clip_norm: global norm to which gradients are clipped; None = no clipping.
      options: further arguments of Optax's function of that name.

    Raises:
      ValueError: Optax has no such optimizer, or the optimizer has no such option.
    """
    known = parameters_of(name)
    for option in options:
        if option == "learning_rate":
            raise ValueError("learning_rate is no option of an optimizer: set the recipe's own")
        if option not in known:
            near = difflib.get_close_matches(option, known, 1, 0)[0]
            raise ValueError(f"{name} has no option {option!r}; the nearest is {near!r}")
    for mask in ("mask", "weight_decay_mask"):
        if mask in known:
            options.setdefault(mask, _matrices)
    optimizer = _optimizers()[name](learning_rate, **options)
    if clip_norm is None:
        return optimizer
    return optax.chain(_clip_to(clip_norm), optimizer)


def _clip_to(most: float) -> optax.GradientTransformationExtraArgs:
    """Clips like `optax.clip_by_global_norm`, but takes the norm if the caller has computed it."""

    def update(updates, state, params=None, *, grad_norm=None, **others):
        del params, others
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm

        def clip(grad):
            clipped = grad / norm.astype(grad.dtype) * most
            return jax.lax.select(norm < most, grad, clipped)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError if an option of an optimizer has a wrong type or is out of range.

    Optax does not check options: it may fail in an update, or compute something else.
    """
    known = parameters_of(name)
    for option, value in options.items():
        if option in known and not (rule := _rule(known[option])).accepts(value):
            raise ValueError(
                f"optimizer_options.{option} is {show(value)}; expected {rule.expected}"
            )


def _rule(parameter: inspect.Parameter) -> Rule:
    """Returns the rule for an option of an optimizer, from its parameter's name and default."""
    name, default = parameter.name, parameter.default
    if name.endswith("mask"):
        return Rule("no value, because it is a function of the parameters", lambda x: False)
    if name.endswith("dtype") or name.startswith("dtype"):
        rule = string("float32", "bfloat16", "float16")
    elif isinstance(default, bool):
        rule = boolean()
    elif parameter.annotation is int:
        rule = integer(0)
    elif name in _SHARES:
        rule = SHARE
    else:
        rule = number(0, 1e3 if name.startswith("weight_decay") else 1e9)
    return optional(rule) if default is None else rule


def check_optimizer(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises a ValueError if Optax cannot build or apply the optimizer with these arguments."""

    def update(params):
        return optimizer.update(params, optimizer.init(params), params)

    shapes = {"kernel": (2, 3), "scale": (3,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    try:
        optimizer = make_optimizer(name, optax.linear_schedule(1.0, 0.0, 2), **arguments)
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(update, params)
    except (TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} does not accept its optimizer_options: {reason}") from None


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of an optimizer, without the learning rate.

    Raises:
      ValueError: Optax has no such optimizer.
    """
    if name not in _optimizers():
        near = difflib.get_close_matches(name, _optimizers(), 1, 0)[0]
        raise ValueError(
            f"Optax has no optimizer {name!r} that needs only gradients and a schedule; the "
            f"nearest is {near!r}"
        )
    parameters = dict(inspect.signature(_optimizers()[name]).parameters)
    del parameters["learning_rate"]
    return parameters


@functools.cache
def _optimizers() -> Mapping[str, Any]:
    """Returns Optax's functions that build an optimizer of gradients from a schedule alone."""
    found = {}
    for name, value in vars(optax).items():
        if not inspect.isfunction(value) or name.startswith("_"):
            continue
        parameters = list(inspect.signature(value).parameters.values())
        needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
        is_first = bool(parameters) and parameters[0].name == "learning_rate"
        if is_first and needed in ([], ["learning_rate"]) and name not in _NEED_MORE:
            found[name] = value
    return found


# These need the loss or its Hessian in every update, another optimizer, or a random key, or they
# accept no schedule.
_NEED_MORE = {
    *("lbfgs", "polyak_sgd", "scale_by_learning_rate", "scale_by_rprop"),
    *("rprop", "sm3", "optimistic_adam", "noisy_sgd"),
}


def _matrices(params: Any) -> Any:
    """Marks the parameters to decay: those with two or more axes, except stacked norm scales."""
    return jax.tree.map_with_path(
        lambda path, p: p.ndim > 1 and path[-1] != jax.tree_util.DictKey("scale"), params
    )
