"""PEFT's `adapter_config.json`: which adapters a folder has. It reads and writes no tensors."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mistral_jax.files import read_json
from mistral_jax.training.lora import Lora

# Fields that, where they are set, make an adapter more than two matrices beside a frozen one.
_OTHER_KINDS = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
    *("use_qalora", "use_bdlora", "kasa_config"),
)
# Others, such as PiSSA, take the first matrices out of the base, which is another one then.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What the file says.

    Attributes:
      lora: the defaults; its targets mean nothing, for the tensors tell them.
      ranks: ranks of some modules, by patterns of their names.
      alphas: their alphas, likewise.
    """

    lora: Lora
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, module: str) -> Lora:
        """Returns what the adapter of a module is, by its name in Hugging Face's model."""

        def pick(patterns, default):
            found = (
                value
                for pattern, value in patterns.items()
                if re.match(rf"(.*\.)?({pattern})$", module)
            )
            return next(found, default)

        rank, alpha = pick(self.ranks, self.lora.rank), pick(self.alphas, self.lora.alpha)
        return dataclasses.replace(self.lora, rank=rank, alpha=alpha)


def read(file: Path) -> PeftConfig:
    """Reads the file.

    Raises:
      ValueError: there is none, or it tells of adapters that are no plain LoRA.
    """
    if not file.is_file():
        raise ValueError(f"there is no {file}; put the one there that was saved with the adapters")
    found = read_json(file)
    plain = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": _PLAIN_INITS}
    for name, values in plain.items():
        if found.get(name, values[0]) not in values:
            raise ValueError(
                f"{file} has {name} = {found[name]!r}; only plain LoRA is read, with {values[0]!r}"
            )
    for name in _OTHER_KINDS:
        if found.get(name):
            raise ValueError(
                f"{file} has {name} = {found[name]!r}; only plain LoRA is read, without it"
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
    return PeftConfig(lora, found.get("rank_pattern") or {}, found.get("alpha_pattern") or {})


def write(
    file: Path, lora: Lora, ranks: Mapping[str, int], modules: Collection[str], base: str | None
) -> None:
    """Writes the file.

    Args:
      file: where to.
      lora: what the adapters are; all have its scale.
      ranks: the rank of each, by the module's name in Hugging Face's model.
      modules: names of all projections of the model.
      base: path or name of the model; None = not said.
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


# What `write` describes adapters by.
FIELDS = [
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha"),
    *("lora_dropout", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("fan_in_fan_out", "init_lora_weights", "modules_to_save"),
]


def _kind(module: str) -> str:
    return module.rpartition(".")[2]
