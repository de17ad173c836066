"""Translates the fields of mixtures of experts between `ModelConfig` and the files of Mixtral."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import check_table, show, table_of
from mistral_jax.config import RULES, ModelConfig

# In ModelConfig, in the table "moe" of official files, in Hugging Face's.
_FIELDS = (
    ("num_experts", "num_experts", "num_local_experts"),
    ("experts_per_token", "num_experts_per_tok", "num_experts_per_tok"),
)
_RULES = {name: RULES[ours] for ours, *names in _FIELDS for name in names}


def read(raw: Mapping[str, Any], official: bool, file: Path) -> dict[str, int]:
    """Returns the fields of a mixture of experts; an empty dict for a model without experts.

    Args:
      raw: the values of a `params.json` (official) or `config.json`.
      official: which of them it is.
      file: the file, for messages.

    Raises:
      ValueError: a value is missing or not a number of experts.
    """
    if not official and raw.get("model_type") != "mixtral":
        return {}
    table, source = (raw.get("moe"), f"{file}: moe") if official else (raw, str(file))
    if not table:
        return {}
    if not table_of().accepts(table):
        raise ValueError(f"{source} is {show(table)}; expected a table")
    keys = {ours: theirs[not official] for ours, *theirs in _FIELDS}
    given = {key: table[key] for key in keys.values() if table.get(key) is not None}
    check_table(given, _RULES, source)
    for key in keys.values():
        if not given.get(key):
            raise ValueError(f"{source} has no {key}; expected a number above 0")
    return {ours: given[key] for ours, key in keys.items()}


def to_official(config: ModelConfig) -> dict[str, Any]:
    """Returns the part of a `params.json` that describes the experts."""
    fields = {key: getattr(config, ours) for ours, key, _ in _FIELDS}
    return {"moe": fields} if config.num_experts else {}


def to_hf(config: ModelConfig) -> dict[str, int]:
    """Returns the part of a `config.json` that describes the experts."""
    return {key: getattr(config, ours) for ours, _, key in _FIELDS}


def check_exported(config: ModelConfig) -> None:
    """Raises a ValueError if Hugging Face's Mixtral does not compute what the config says."""
    if isinstance(config.sliding_window, tuple):
        raise ValueError(
            "Hugging Face's Mixtral has one window for all layers; this model has "
            f"{show(list(config.sliding_window))}: export it as official"
        )
    if config.query_scaling:
        raise ValueError(
            f"Hugging Face's Mixtral has no scale of queries; this model has "
            f"{show(config.query_scaling)}: export it as official"
        )
