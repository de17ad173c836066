"""Loggers: copies of a run's curve in TensorBoard and Weights & Biases.

When a run resumes from a saved state, its loggers resume too: new entries replace the earlier ones
of the same and later steps.
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
    """Yields a function that copies an entry of the curve to all loggers.

    A logger starts at the first entry, because the run's folder may not exist earlier.

    Args:
      names: "tensorboard" writes to `<folder>/tensorboard`; "wandb" writes where its environment
        variables say (WANDB_MODE, WANDB_PROJECT, ...), and to `<folder>/wandb`.
      folder: folder of the run.
      config: settings of the run, for display.

    Raises:
      ValueError: a logger is unknown, is not installed, or does not start.
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

    # TensorBoard drops this step and later ones from earlier files.
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
            settings={"console": "off"},  # do not record the progress bar
        )
    except wandb.Error as error:
        raise ValueError(f"wandb does not start: {error}; or set WANDB_MODE=offline") from None
    with run:
        # The steps of W&B must increase, but a resumed run may repeat some.
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
    """Formats a text as a Markdown code block."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
