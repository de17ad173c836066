"""`Recipe`: the settings that decide what a training run computes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import (
    build,
    check,
    integer,
    number,
    optional,
    show,
    string,
    table_of,
)
from mistral_jax.base.files import read_toml
from mistral_jax.checkpoint.lora import Lora
from mistral_jax.config import ModelConfig, find
from mistral_jax.model.transformer import SAVED
from mistral_jax.tokens.chat import NAMES
from mistral_jax.training.optimizers import (
    SCHEDULES,
    SHARE,
    check_optimizer,
    check_options,
    parameters_of,
)

# Settings that a resumed run may change: its length, its memory, and how often it validates, saves
# and samples.
CHANGEABLE = (
    *("steps", "epochs", "remat", "microbatches", "most_skipped"),
    *("validate_every", "save_every", "sample_every", "sample_prompts", "keep", "export_best"),
)
MOST_STEPS = 1 << 30
_DOTS = ("dots_saveable", "dots_with_no_batch_dims_saveable")
REMAT = ("none", "nothing_saveable", *SAVED, *_DOTS, "everything_saveable")
# The bounds keep float32 from overflowing, and a run from outlasting its machine.
_CORPUS = table_of(integer(1, 1000))
_MOST_PROMPTS = 64
_SMALLEST_SHARE = 1e-30  # smallest quotient of learning_rate and final_learning_rate
_RULES = {
    "context": integer(1, 1 << 20),
    "rows": integer(1, 1 << 20),
    "steps": integer(1, MOST_STEPS),
    "epochs": number(0, 1e6),
    "warmup_steps": integer(0),
    "sample_every": integer(0),
    "seed": integer(0, 1 << 64),
    "learning_rate": number(0, 1e3),
    "final_learning_rate": number(0, 1e3),
    "weight_decay": number(0, 1e3),
    "beta1": SHARE,
    "beta2": SHARE,
    "clip_norm": number(0, 1e9),
    "router_loss": number(0, 1e3),
    "schedule": string(*SCHEDULES),
    "dtype": string("auto", "float32", "bfloat16"),
    "remat": string(*REMAT),
    "quantize": string("none", "int8", "nf4"),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Files of examples, in the formats that `records.py` reads.

    Attributes:
      train: JSONL files, or folders that Hugging Face `datasets` saved.
      validation: files for the validation loss; empty = it is not measured.
      pack: whether a packed row holds as many examples as fit.
      skip_bad: whether bad lines are counted and left out, instead of raising an error.
      chat_form: name of the form of conversations; None = the checkpoint's.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    pack: bool = True
    skip_bad: bool = False
    chat_form: str | None = None

    def __post_init__(self):
        check(self, "data.", {"chat_form": optional(string(*NAMES))})
        if not self.train:
            raise ValueError("data.train is empty; name at least one JSONL file (--data FILE)")


@dataclasses.dataclass(frozen=True)
class Preference:
    """Settings of direct preference optimization, DPO (arXiv 2305.18290).

    Attributes:
      beta: how strongly the model is held to the reference, the model before training.
      label_smoothing: assumed share of pairs whose answers are swapped.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self):
        check(self, "dpo.", {"beta": number(0, 1e3)})
        if not self.label_smoothing < 0.5:
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing}; expected less than 0.5"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes.

    A recipe trains either a new `model` on a `corpus`, or the model of a `checkpoint` on `data`.

    Attributes:
      context: tokens per row (T).
      rows: rows per step (B).
      learning_rate: peak learning rate.
      model: name of a file in configs/models, for a model that starts from random weights.
      corpus: installed distributions whose Python source is read, and how often per epoch; their
        requirements are read once. "python" is the standard library.
      checkpoint: folder of the model to train further; None = the bundled model.
      data: files of examples to train that model on.
      lora: the adapters to train beside frozen parameters; None = all parameters are trained.
      quantize: dtype of the frozen projections: "int8", "nf4" (QLoRA, arXiv 2305.14314), or "none"
        to keep their dtype.
      dpo: settings for training on pairs of answers; None = next-token loss.
      steps: total number of optimizer steps; or
      epochs: number of passes over the data. A recipe has one of the two.
      warmup_steps: steps in which the learning rate rises from 0.
      schedule: course of the learning rate after the warmup: "cosine", "linear" or "constant".
      final_learning_rate: learning rate at the end.
      optimizer: name in Optax.
      beta1: decay rate of the optimizer's mean of gradients, if it has one.
      beta2: decay rate of the optimizer's mean of squared gradients, if it has one.
      weight_decay: the optimizer's decay of matrices, if it has one.
      optimizer_options: further arguments of Optax's function.
      clip_norm: global norm to which gradients are clipped; 0 = no clipping.
      microbatches: parts of a step that are computed in sequence to save memory; divides rows.
      router_loss: coefficient of the load-balancing loss of a mixture of experts, which is part of
        what training minimises, but not of the reported loss; 0 = it is reported only. The default
        is that of Transformers.
      dtype: dtype of computation and of frozen parameters; trained parameters are float32. "auto" =
        float32 on a CPU, bfloat16 elsewhere.
      remat: what each block keeps for the backward pass, which computes the rest again: "none" =
        everything is kept; "save_attention", "save_heads" or "save_products" = the results of some
        products (see `Transformer`); or the name of a policy in `jax.checkpoint_policies`.
      scan: whether one compiled block scans over all layers, which shortens compilation.
      seed: seed of initial weights, adapters, dropout, the vocabulary's sample and the data order.
      validate_every: steps between two measurements of the validation loss.
      save_every: steps between two saved states.
      keep: number of latest states to keep, beside the best one by validation.
      export_best: whether the result is the best state by validation, instead of the last.
      most_skipped: number of consecutive steps with a loss or gradients that are not finite, after
        which a run stops.
      sample_every: steps between two rounds of sample texts; 0 = none.
      sample_prompts: prompts of the sample texts; empty = beginnings of validation examples.
    """

    context: int
    rows: int
    learning_rate: float
    model: str | None = None
    corpus: Mapping[str, int] | None = None
    checkpoint: str | None = None
    data: Data | None = None
    lora: Lora | None = None
    quantize: str = "none"
    dpo: Preference | None = None
    steps: int | None = None
    epochs: float | None = None
    warmup_steps: int = 0
    schedule: str = "cosine"
    final_learning_rate: float = 0.0
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    optimizer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clip_norm: float = 1.0
    microbatches: int = 1
    router_loss: float = 0.001
    dtype: str = "auto"
    remat: str = "none"
    scan: bool = False
    seed: int = 0
    validate_every: int = 500
    save_every: int = 200
    keep: int = 2
    export_best: bool = False
    most_skipped: int = 10
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self):
        check(self, rules=_RULES)
        self._check_kind()
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a recipe says steps or epochs; expected one of the two")
        if self.epochs == 0:
            raise ValueError(f"epochs is {self.epochs}; expected more than 0")
        if self.seed >= 1 << 32:  # Packing shuffles with a seed of 32 bits.
            raise ValueError(f"seed is {self.seed}; expected an integer below {1 << 32}")
        if self.rows % self.microbatches:
            raise ValueError(
                f"microbatches is {self.microbatches}; expected a divisor of rows ({self.rows})"
            )
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; expected less than steps ({self.steps})"
            )
        if self.learning_rate < _SMALLEST_SHARE * self.final_learning_rate:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, too small beside final_learning_rate "
                f"({self.final_learning_rate}); expected one of the same order"
            )
        if len(self.sample_prompts) > _MOST_PROMPTS:
            raise ValueError(
                f"sample_prompts has {len(self.sample_prompts)} texts; expected at most "
                f"{_MOST_PROMPTS}"
            )
        check_options(self.optimizer, self.optimizer_options)
        check_optimizer(self.optimizer, self.optimizer_arguments)

    def _check_kind(self) -> None:
        if self.data is None:
            if self.model is None or self.corpus is None:
                raise ValueError(
                    "a recipe trains a new model on a corpus (model, corpus), or a checkpoint on "
                    "files of examples ([data] or --data FILE); expected one of the two"
                )
            if not self.corpus or not _CORPUS.accepts(self.corpus):
                raise ValueError(
                    f"corpus is {show(self.corpus)}; expected a table of distributions and whole "
                    "numbers from 1 to 1000, such as { python = 1 }"
                )
        of_data = ("checkpoint", "lora", "dpo", "epochs")
        of_corpus = ("model", "corpus")
        kind, foreign = ("a corpus", of_data) if self.data is None else ("data", of_corpus)
        for name in foreign:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not for training on {kind}; leave it out")
        if self.quantize != "none" and self.lora is None:
            raise ValueError(
                f"quantize is {self.quantize!r}, but all parameters are trained and none is "
                "frozen: add [lora]"
            )

    @property
    def model_config(self) -> ModelConfig:
        """The architecture that `model` names."""
        return ModelConfig.from_name(self.model)

    @property
    def validation_rows(self) -> int:
        """Rows of a validation batch: as many as a step computes at a time."""
        return self.rows // self.microbatches

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The arguments of `make_optimizer` besides the learning rate."""
        known = parameters_of(self.optimizer)
        named = {"b1": self.beta1, "b2": self.beta2, "weight_decay": self.weight_decay}
        own = {name: value for name, value in named.items() if name in known}
        return {"clip_norm": self.clip_norm or None, **own, **self.optimizer_options}

    @classmethod
    def from_file(cls, path: Path | str) -> "Recipe":
        """Reads a TOML file, or one of configs/training by its name, such as "nano".

        Raises:
          ValueError: there is no such file, or a key is unknown, missing or invalid.
        """
        return cls.from_dict(read_table(path), str(path))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """Builds a recipe from its fields; `source` names their origin in error messages."""
        return build(cls, fields, source)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, such that `from_dict` gives an equal recipe."""
        return dataclasses.asdict(self)

    def check_continues(self, earlier: "Recipe", where: str) -> None:
        """Raises a ValueError if this recipe cannot continue the run of `earlier` in `where`."""
        changeable = set(CHANGEABLE)
        if earlier.lora and earlier.lora.dropout:
            changeable.remove("microbatches")  # Dropout depends on them.
        for field in dataclasses.fields(self):
            value, mine = getattr(earlier, field.name), getattr(self, field.name)
            if field.name not in changeable and mine != value:
                raise ValueError(
                    f"{where} holds a run with {field.name} = {value!r}, and this recipe says "
                    f"{mine!r}: name another folder with --run, or restore the recipe"
                )


def find_recipe(name: Path | str) -> Path:
    """Returns the file of a recipe, from a path or the name of a file in configs/training ("lora").

    Raises:
      ValueError: there is no such file; the message lists the known names.
    """
    return find("training", name, "recipe")


def read_table(name: Path | str) -> dict[str, Any]:
    """Reads the fields of a recipe; arguments and errors are those of `find_recipe`."""
    return read_toml(find_recipe(name))
