"""Loggers: TensorBoard and Weights & Biases, as copies of a run's curve. They keep no record of it.

A run that goes on goes on in them too: entries after the state that it goes on from take the place
of those that were there.
"""

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_jax.training.curve import Entry

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@contextlib.contextmanager
def open_loggers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any]
) -> Iterator[Callable[[Entry], None]]:
    """Yields what copies an entry of the curve to loggers.

    They begin with the first entry, so that the folder may be made in the meantime.

    Args:
      names: "tensorboard" writes to `<folder>/tensorboard`; "wandb" to where its own environment
        variables say (WANDB_MODE, WANDB_PROJECT ...), and to `<folder>/wandb`.
      folder: of the run.
      config: of the run, for people.

    Raises:
      ValueError: a logger is unknown or not installed, or does not begin.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in _MODULES:
            raise ValueError(f"there is no logger {name!r}; expected {' or '.join(_MODULES)}")
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ValueError(f"{name} is not installed: pip install 'mistral-jax-flax[{name}]'")
    begin = {"tensorboard": _tensorboard, "wandb": _wandb}
    with contextlib.ExitStack() as stack:
        logs: list[Callable[[Entry], None]] = []

        def report(entry: Entry) -> None:
            if not logs:
                logs.extend(
                    stack.enter_context(begin[name](folder, config, entry["step"]))
                    for name in names
                )
            for log in logs:
                log(entry)

        yield report


@contextlib.contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any], step: int):
    from tensorboardX import SummaryWriter

    # TensorBoard forgets what earlier files have of this step and later ones.
    with SummaryWriter(str(folder / "tensorboard"), purge_step=step) as writer:
        writer.add_text("recipe", _indented(_table(config)), step)

        def log(entry: Entry) -> None:
            for tag, value in _scalars(entry).items():
                writer.add_scalar(tag, value, entry["step"])
            for number, sample in enumerate(entry.get("samples", ())):
                text = _indented(sample["prompt"] + sample["text"])
                writer.add_text(f"samples/{number}", text, entry["step"])
            writer.flush()

        yield log


@contextlib.contextmanager
def _wandb(folder: Path, config: Mapping[str, Any], step: int):
    import wandb

    notes = folder / "wandb" / "id"
    if not notes.is_file():
        notes.parent.mkdir(exist_ok=True)
        notes.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mistral_jax"),
            name=folder.name,
            dir=str(folder),
            id=notes.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(config),
            allow_val_change=True,
            settings={"console": "off"},  # a bar that is drawn anew is no log
        )
    except wandb.Error as error:
        raise ValueError(f"wandb does not begin, {error}; or set WANDB_MODE=offline") from None
    with run:
        # Its own steps only rise, while a run that goes on may repeat some.
        run.define_metric("*", step_metric="step")

        def log(entry: Entry) -> None:
            values = {"step": entry["step"], **_scalars(entry)}
            if samples := entry.get("samples"):
                rows = [[entry["step"], sample["prompt"], sample["text"]] for sample in samples]
                values["samples"] = wandb.Table(columns=["step", "prompt", "text"], data=rows)
            run.log(values)

        yield log


def _scalars(entry: Entry) -> dict[str, float]:
    """Returns the numbers of an entry by their names in loggers, such as "train/loss"."""
    scalars = {}
    for name, value in entry.items():
        if name in ("step", "steps", "samples") or value is None:
            continue
        group = "validation" if name.startswith("validation_") else "train"
        scalars[f"{group}/{name.removeprefix('validation_')}"] = value
    return scalars


def _table(config: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in config.items() if value is not None)


def _indented(text: str) -> str:
    """Returns Markdown that shows a text as it is."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
