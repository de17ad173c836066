"""`Recipe`: how a model is trained from nothing. It holds no weights, and no folder of a run."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.config import ModelConfig, read_toml

# What a stopped run may change when it goes on: its length, and how often it looks up.
CHANGEABLE = ("steps", "remat", "validate_every", "save_every")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes.

    Attributes:
      model: name of a file in configs/models.
      corpus: installed distributions whose Python source is read, and how often in an epoch; what
        they need in their turn is read once. "python" is the standard library.
      context: tokens a row (T).
      rows: rows a step (B).
      microbatches: parts that a step computes one after another, to save memory; divides rows.
      remat: whether a step computes each block again on its way back, to save memory.
      steps: optimizer steps in all.
      warmup_steps: steps in which the learning rate rises from 0.
      learning_rate: its peak; from there it falls along a cosine.
      final_learning_rate: where it ends.
      beta1: decay of AdamW's mean of gradients.
      beta2: decay of AdamW's mean of their squares.
      weight_decay: AdamW's decay of matrices.
      clip_norm: global norm that gradients are clipped to.
      seed: of the first weights, the vocabulary's sample, and the order of the data.
      validate_every: steps between two measurements of the validation loss.
      save_every: steps between two saved states.
    """

    model: str
    corpus: Mapping[str, int]
    context: int
    rows: int
    steps: int
    warmup_steps: int
    learning_rate: float
    final_learning_rate: float
    microbatches: int = 1
    remat: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    validate_every: int = 500
    save_every: int = 200

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                least = 0 if field.name in ("seed", "warmup_steps") else 1
                good, expected = _is_count(value, least), f"an integer of at least {least}"
            elif field.type is float:
                good = isinstance(value, int | float) and not isinstance(value, bool)
                good = good and 0 <= value < float("inf")
                expected = "a finite number of at least 0"
            elif field.type is bool:
                good, expected = isinstance(value, bool), "true or false"
            elif field.type is str:
                good, expected = isinstance(value, str), "a string"
            else:
                good = isinstance(value, Mapping) and len(value) > 0
                good = good and all(_is_count(times, 1) for times in value.values())
                expected = "a table of distributions and whole numbers, such as { python = 1 }"
            if not good:
                raise ValueError(f"{field.name} is {value!r}; expected {expected}")
        if self.rows % self.microbatches:
            raise ValueError(
                f"microbatches is {self.microbatches}; expected a divisor of rows ({self.rows})"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; expected less than steps ({self.steps})"
            )

    @property
    def model_config(self) -> ModelConfig:
        """The architecture that `model` names."""
        return ModelConfig.from_name(self.model)

    @classmethod
    def from_file(cls, path: Path | str) -> "Recipe":
        """Reads a TOML file, such as configs/training/nano.toml.

        Raises:
          ValueError: there is no such file, or a key is unknown, missing or invalid.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"there is no file {path}; expected a recipe like configs/training/nano.toml"
            )
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """Builds a recipe from its fields; `source` is what messages call their place."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0)[0]
                raise ValueError(
                    f"{source}: unknown key {name!r}; the nearest known one is {near!r}"
                )
        missing = [
            name
            for name, field in known.items()
            if name not in fields and field.default is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{source}: missing {', '.join(missing)}")
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, such that `from_dict` gives an equal recipe."""
        return dataclasses.asdict(self)

    def check_continues(self, earlier: "Recipe", where: str) -> None:
        """Raises a ValueError if the run in `where`, of `earlier`, can't go on with this recipe."""
        for name, value in earlier.to_dict().items():
            mine = self.to_dict()[name]
            if name not in CHANGEABLE and mine != value:
                raise ValueError(
                    f"{where} holds a run with {name} = {value!r}, and this recipe says {mine!r}: "
                    "name another folder with --run, or restore the recipe"
                )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
