"""PEFT's `adapter_config.json`, which describes the adapters of a folder."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import (
    boolean,
    check_table,
    either,
    integer,
    list_of,
    number,
    optional,
    show,
    string,
    table_of,
)
from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import patterns
from mistral_jax.checkpoint.lora import Lora

# If one of these fields is set, an adapter is more than two matrices beside a frozen one.
_OTHER_KINDS = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
    *("use_qalora", "use_bdlora", "kasa_config"),
)
# Other initialisations, such as PiSSA, change the base model's matrices.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# The most bytes of a file; one with a rank for each of a thousand modules has about 100,000.
_MOST_BYTES = 512 << 10
MOST_RANK = 1 << 16
_RANK, _ALPHA = integer(1, MOST_RANK), number(0, 1e6, above=True)
_RULES = {
    "peft_type": string(),
    "bias": optional(string()),
    "init_lora_weights": optional(either(boolean(), string())),
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "use_rslora": optional(boolean()),
    "lora_dropout": optional(number(0, 1)),
    "target_modules": optional(either(string(), list_of(string()))),
    "rank_pattern": optional(table_of(_RANK)),
    "alpha_pattern": optional(table_of(_ALPHA)),
    **{name: optional(boolean()) for name in ("use_dora", "fan_in_fan_out", "lora_bias")},
}

# Pairs of a function that tells whether a module is meant, by its name in Hugging Face's model, and
# the value for such modules.
_Values = tuple[tuple[Callable[[str], bool], float], ...]


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The contents of the file.

    Attributes:
      lora: the defaults for all modules. Its targets have no meaning: the tensors' names tell which
        modules are adapted.
      ranks: ranks of some modules; the first entry that means a module counts.
      alphas: alphas of some modules, in the same form.
    """

    lora: Lora
    ranks: _Values
    alphas: _Values

    def of(self, module: str) -> Lora:
        """Returns the description of one module's adapter, by its name in Hugging Face's model."""

        def pick(values, default):
            return next((value for means, value in values if means(module)), default)

        rank, alpha = pick(self.ranks, self.lora.rank), pick(self.alphas, self.lora.alpha)
        return dataclasses.replace(self.lora, rank=rank, alpha=alpha)


def read(file: Path, experts: bool = False) -> PeftConfig:
    """Reads the file.

    Args:
      file: the file.
      experts: whether the model has experts, whose parameters `target_parameters` names.

    Raises:
      ValueError: the file does not exist, is malformed, or describes more than plain LoRA.
    """
    if not file.exists():
        raise ValueError(f"there is no {file}; put the one there that was saved with the adapters")
    found = read_json(file, _MOST_BYTES)
    check_table(found, _RULES, str(file))
    plain = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": _PLAIN_INITS}
    for name, values in plain.items():
        if found.get(name, values[0]) not in values:
            raise ValueError(
                f"{file} has {name} = {show(found[name])}; only plain LoRA is read, with "
                f"{values[0]!r}"
            )
    for name in _OTHER_KINDS:
        if found.get(name) and not (experts and name == "target_parameters"):
            raise ValueError(
                f"{file} has {name} = {show(found[name])}; only plain LoRA is read, without it"
            )
    try:
        lora = Lora(
            rank=found.get("r"),
            alpha=found.get("lora_alpha"),
            rslora=bool(found.get("use_rslora")),
            dropout=found.get("lora_dropout") or 0.0,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return PeftConfig(
        lora, _values(found, "rank_pattern", file), _values(found, "alpha_pattern", file)
    )


def _values(found: Mapping[str, Any], name: str, file: Path) -> _Values:
    """Reads a table whose keys are patterns of module names, which match as in PEFT."""
    values = []
    for pattern, value in (found.get(name) or {}).items():
        try:
            values.append((patterns.suffix(pattern), value))
        except ValueError as error:
            raise ValueError(
                f"{file} has {show(pattern)} in {name}, but {error}; expected the end of a "
                "module's name, or a simple pattern of it"
            ) from None
    return tuple(values)


def write(
    file: Path, lora: Lora, ranks: Mapping[str, int], modules: Collection[str], base: str | None
) -> None:
    """Writes the file.

    Args:
      file: the file to write.
      lora: the adapters' description; all adapters have its scale.
      ranks: the rank of each adapter, by its module's name in Hugging Face's model.
      modules: names of all projections of the model.
      base: path or name of the base model; None = do not state it.
    """
    own = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    alphas = {
        name: lora.scale * (math.sqrt(rank) if lora.rslora else rank) for name, rank in own.items()
    }
    kinds = {_kind(name) for name in ranks}
    everywhere = all(name in ranks for name in modules if _kind(name) in kinds)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(kinds if everywhere else ranks),
        "rank_pattern": own,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


# The fields that `write` writes.
FIELDS = [
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha"),
    *("lora_dropout", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("fan_in_fan_out", "init_lora_weights", "modules_to_save"),
]


def _kind(module: str) -> str:
    return module.rpartition(".")[2]
