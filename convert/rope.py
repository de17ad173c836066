"""Translates the rotation that a `params.json` or `config.json` describes, and back.

Hugging Face's files describe it in a table `rope_scaling` beside `rope_theta` (Transformers 4), or
in a table `rope_parameters` that holds `rope_theta` too (Transformers 5). Official files have
`yarn` and `llama_4_scaling` beside `rope_theta`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mistral_jax.base.fields import Rule, boolean, check_table, integer, number, show, string
from mistral_jax.config import RULES, SCALING_FIELDS, ModelConfig, QueryScaling, RopeScaling

_LENGTH = "original_max_position_embeddings"
_BETA = "llama_4_scaling_beta"

_HF_RULES = {
    "rope_theta": RULES["rope_theta"],
    _LENGTH: integer(1),
    "rope_type": string(),
    "type": string(),
    "factor": number(0, 1e6, above=True),
    "partial_rotary_factor": number(0, 1),
    "attention_factor": number(0, 1e3, above=True),
    "beta_fast": number(0, 1e6),
    "beta_slow": number(0, 1e6),
    "low_freq_factor": number(0, 1e6, above=True),
    "high_freq_factor": number(0, 1e6, above=True),
    "mscale": number(0, 1e3),
    "mscale_all_dim": number(0, 1e3),
    "truncate": boolean(),
    _BETA: number(0, 1e3),
}
_YARN_RULES = {
    "factor": number(0, 1e6, above=True),
    _LENGTH: integer(1),
    "beta": number(0, 1e6),
    "alpha": number(0, 1e6),
    "apply_scale": boolean(),
}
_QUERY_RULES = {_LENGTH: integer(1), "beta": number(0, 1e3)}

# The keys of a table that each type of rotation reads, besides those of every table.
_EVERY = {"rope_theta", "rope_type", "type", _LENGTH, "max_position_embeddings", _BETA}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
}
# Other keys are accepted with a value that changes nothing.
_NEUTRAL = {"factor": 1, "partial_rotary_factor": 1, "truncate": True, "finetuned": True}
_LLAMA_ONLY = ("linear", "llama3")


class Rotation(NamedTuple):
    """What a file says of the rotation; see the fields of `ModelConfig`."""

    theta: float | None
    scaling: RopeScaling | None
    query_scaling: QueryScaling | None


def read_hf(raw: Mapping[str, Any], model_type: str, source: str) -> Rotation:
    """Reads the rotation of a `config.json`.

    Args:
      raw: its values.
      model_type: the type of the text model.
      source: name of the file for error messages.

    Raises:
      ValueError: a value is missing or invalid, or the type of rotation is not supported.
    """
    tables = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)}
    table: dict[str, Any] = {}
    for key, values in tables.items():
        _check(values, _HF_RULES, f"{source}: {key}")
        given = _without_null(values)
        if any(given.get(name, value) != value for name, value in table.items()):
            raise ValueError(
                f"{source} has rope_parameters {show(table)} and rope_scaling {show(given)}; "
                "expected one of them, or the same values in both"
            )
        table |= given
    key = next(reversed(tables), "rope_parameters")
    if model_type == "ministral3" and not table:
        raise ValueError(f"{source} has no rope_parameters; expected those of a model of its type")
    kind = _kind(table, model_type, f"{source} has {key}")
    length = raw.get(_LENGTH) or table.get(_LENGTH)
    where = f"{source} has {key} {show(table)}"
    beta = table.get(_BETA)
    if beta and model_type != "ministral3":
        raise ValueError(f"{where} in a model of type {model_type!r}; expected no {_BETA}")
    if (beta or kind in ("llama3", "yarn")) and length is None:
        raise ValueError(
            f"{where} without {_LENGTH}; expected the length of the texts that the model was "
            "trained on before its rotation was changed"
        )
    scaling = None
    if kind != "default":
        needed = {"factor"} if kind == "yarn" else _KEYS[kind]
        if missing := sorted(needed - set(table)):
            raise ValueError(f"{where} without {', '.join(missing)}; expected a number for each")
        values = {name: table.get(name) for name in SCALING_FIELDS[kind] if name in table}
        if kind == "yarn":
            values |= {
                "beta_fast": table.get("beta_fast") or 32,
                "beta_slow": table.get("beta_slow") or 1,
                "attention_factor": table.get("attention_factor") or _attention_factor(table),
            }
        if kind != "linear":
            values["original_positions"] = length
        scaling = RopeScaling(kind, table["factor"], **values)
    theta = table.get("rope_theta", raw.get("rope_theta"))
    return Rotation(theta, scaling, QueryScaling(beta, length) if beta else None)


def read_official(raw: Mapping[str, Any], source: str) -> Rotation:
    """Reads the rotation of a `params.json`; see `read_hf`."""
    yarn = _without_null(raw.get("yarn") or {})
    queries = _without_null(raw.get("llama_4_scaling") or {})
    for key, table, rules, needed in (
        ("yarn", yarn, _YARN_RULES, ("factor", _LENGTH)),
        ("llama_4_scaling", queries, _QUERY_RULES, ("beta", _LENGTH)),
    ):
        _check(table, rules, f"{source}: {key}")
        unknown = sorted(set(table) - set(rules))
        missing = [name for name in needed if name not in table] if table else []
        if unknown or missing:
            what = f"with {show(unknown[0])}" if unknown else f"without {' and '.join(missing)}"
            raise ValueError(
                f"{source} has {key} {show(table)} {what}; expected {', '.join(rules)}"
            )
    scaling = yarn and RopeScaling(
        "yarn",
        yarn["factor"],
        original_positions=yarn[_LENGTH],
        beta_fast=yarn.get("beta") or 32,
        beta_slow=yarn.get("alpha") or 1,
        attention_factor=_mscale(yarn["factor"]) if yarn.get("apply_scale", True) else 1,
    )
    scaled = queries.get("beta") and QueryScaling(queries["beta"], queries[_LENGTH])
    return Rotation(raw.get("rope_theta"), scaling or None, scaled or None)


def to_hf(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """Returns the keys of a `config.json` that describe a rotation.

    They are those of Transformers 4, which 5 reads too, except for `ministral3`, which is newer.

    Raises:
      ValueError: the format cannot represent the scaling of queries.
    """
    scaling, queries = config.rope_scaling, config.query_scaling
    table: dict[str, Any] = {}
    if scaling:
        table = {"rope_type": scaling.kind, "factor": scaling.factor}
        table |= {
            _LENGTH if name == "original_positions" else name: getattr(scaling, name)
            for name in SCALING_FIELDS[scaling.kind]
        }
    if model_type != "ministral3":
        return {"rope_theta": config.rope_theta} | ({"rope_scaling": table} if table else {})
    length = scaling and scaling.original_positions
    if queries and queries.original_positions != length:
        raise ValueError(
            f"the queries are scaled by spans of {queries.original_positions} positions and the "
            f"original length of YaRN is {length}; Hugging Face's format has one number for both: "
            "export it as official"
        )
    return {
        "rope_parameters": {"rope_theta": config.rope_theta, **table}
        | {_BETA: queries.beta if queries else 0.0}
    }


def to_official(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of a `params.json` that describe a rotation.

    Raises:
      ValueError: the format cannot represent the rotation.
    """
    fields: dict[str, Any] = {"rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        applied = scaling.attention_factor != 1
        known = scaling.kind == "yarn" and (
            not applied or math.isclose(scaling.attention_factor, _mscale(scaling.factor))
        )
        if not known:
            raise ValueError(
                f"rope_scaling is {show(scaling)}, which the official format does not have; export "
                "it as hf"
            )
        fields["yarn"] = {
            "factor": scaling.factor,
            _LENGTH: scaling.original_positions,
            "beta": scaling.beta_fast,
            "alpha": scaling.beta_slow,
            "apply_scale": applied,
        }
    if queries := config.query_scaling:
        fields["llama_4_scaling"] = {_LENGTH: queries.original_positions, "beta": queries.beta}
    return fields


def _kind(table: Mapping[str, Any], model_type: str, where: str) -> str:
    """Returns the type of rotation of a table, after a check that nothing else changes it."""
    kinds = {table[key] for key in ("rope_type", "type") if table.get(key) is not None}
    kind = kinds.pop() if kinds else "default"
    known = [name for name in _KEYS if model_type == "llama" or name not in _LLAMA_ONLY]
    if kinds or kind not in known:
        raise ValueError(
            f"{where} {show(table)}; expected the type {' or '.join(map(repr, known))} in a model "
            f"of type {model_type!r}"
        )
    for name, value in table.items():
        if value is None or name in _EVERY or name in _KEYS[kind]:
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise ValueError(
                f"{where} {show(table)}; expected no {show(name)} with another value than "
                f"{show(_NEUTRAL.get(name))} in a rotation of type {kind!r}"
            )
    return kind


def _attention_factor(table: Mapping[str, Any]) -> float:
    """Returns the attention factor of YaRN that Transformers derives where a file has none."""
    factor, scale, scale_all = (table.get(k) for k in ("factor", "mscale", "mscale_all_dim"))
    if scale and scale_all:
        return _mscale(factor, scale) / _mscale(factor, scale_all)
    return _mscale(factor)


def _mscale(factor: float, scale: float = 1) -> float:
    """Returns the attention factor of YaRN (arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _without_null(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    check_table(_without_null(values), rules, source)
