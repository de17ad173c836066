"""Translates `params.json` and `config.json` files to `ModelConfig`, and back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import (
    Rule,
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
from mistral_jax.base.files import parse_json, read_json
from mistral_jax.config import DEFAULT_MAX_POSITIONS, RULES, ModelConfig

# Names of each field: in ModelConfig, in official files, in Hugging Face's. Every file must have
# the first seven.
FIELDS = (
    ("vocab_size", "vocab_size", "vocab_size"),
    ("num_layers", "n_layers", "num_hidden_layers"),
    ("embed_dim", "dim", "hidden_size"),
    ("mlp_dim", "hidden_dim", "intermediate_size"),
    ("num_heads", "n_heads", "num_attention_heads"),
    ("num_kv_heads", "n_kv_heads", "num_key_value_heads"),
    ("norm_eps", "norm_eps", "rms_norm_eps"),
    ("head_dim", "head_dim", "head_dim"),
    ("rope_theta", "rope_theta", "rope_theta"),
    ("sliding_window", "sliding_window", "sliding_window"),
    ("tie_embeddings", "tied_embeddings", "tie_word_embeddings"),
    ("max_positions", "max_position_embeddings", "max_position_embeddings"),
    ("bos_id", "bos_token_id", "bos_token_id"),
    ("eos_id", "eos_token_id", "eos_token_id"),
)
_REQUIRED = [name for name, *_ in FIELDS[:7]]

# Maximum bytes of a file, which has a few thousand, and maximum number of layers.
_MOST_BYTES, _MOST_LAYERS = 4 << 20, 1 << 10

_WINDOW = either(integer(1), list_of(optional(integer(1)), _MOST_LAYERS))
_IDS = list_of(integer(0), 1 << 10)

# Rules for the values that are read, by their names in the files.
_RULES = {theirs: RULES[ours] for ours, *names in FIELDS for theirs in names if ours in RULES} | {
    "bos_token_id": integer(0),
    "eos_token_id": Rule(
        "a token id, or a list of some",
        lambda x: integer(0).accepts(x) or (x != [] and _IDS.accepts(x)),
    ),
    "model_type": string(),
    "sliding_window": either(_WINDOW, string()),
    "_sliding_window": either(_WINDOW, string()),
    "layer_types": list_of(string(), _MOST_LAYERS),
    "hidden_act": string(),
    "attention_bias": boolean(),
    "mlp_bias": boolean(),
    "use_biases": boolean(),
    "partial_rotary_factor": number(0, 1),
    "rope_scaling": table_of(),
    "rope_parameters": table_of(),
    "lora": table_of(),
}
# Fields of a mixture of experts: in ModelConfig, in official files' table "moe", in Hugging Face's.
_EXPERT_FIELDS = (
    ("num_experts", "num_experts", "num_local_experts"),
    ("experts_per_token", "num_experts_per_tok", "num_experts_per_tok"),
)
_EXPERT_RULES = {name: RULES[ours] for ours, *names in _EXPERT_FIELDS for name in names}
_ROPE_RULES = {
    "rope_theta": RULES["rope_theta"],
    "original_max_position_embeddings": integer(1),
    "rope_type": string(),
    "type": string(),
    "factor": number(0, 1e6),
    "partial_rotary_factor": number(0, 1),
}

# Fields that other architectures set, and their values in the supported ones.
_UNSUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_biases": (False,),
    "quantization": (),
    "quantization_config": (),
    "vision_encoder": (),
    "yarn": (),
    "llama_4_scaling": (),
    "q_lora_rank": (),
    "partial_rotary_factor": (1,),
}

# Supported contents of `rope_scaling` and `rope_parameters`: others change the rotation.
_ROPE_CONSTANTS = ("rope_theta", "original_max_position_embeddings")
_PLAIN_ROPE = {
    "rope_type": ("default",),
    "type": ("default",),
    "factor": (1,),
    "partial_rotary_factor": (1,),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A config and the origin of its values.

    Attributes:
      config: the architecture.
      theta_origin: source of the base of the rotary embedding.
      eos_ids: tokens that end an answer according to the file; empty if it names none.
      notes: messages about values that are not in the file.
    """

    config: ModelConfig
    theta_origin: str
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read(file: Path, rope_theta: float | None = None) -> Architecture:
    """Reads the architecture of a source.

    Args:
      file: `params.json` (official) or `config.json` (Hugging Face).
      rope_theta: base of the rotary embedding, for files that lack it or hold a wrong one.

    Raises:
      ValueError: the file is not JSON, describes an unsupported architecture, or lacks a value.
    """
    raw = read_json(file, _MOST_BYTES)
    _check(raw, _RULES, str(file))
    official = file.name == "params.json"
    _refuse_others(raw, official, file)
    keys = {ours: theirs[not official] for ours, *theirs in FIELDS}
    found = {ours: raw[key] for ours, key in keys.items() if raw.get(key) is not None}
    missing = [keys[name] for name in _REQUIRED if name not in found]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}")
    notes = []
    if "head_dim" not in found:
        found["head_dim"] = _head_dim(found, file)
        notes.append(f"{file.name} has no head_dim: {found['head_dim']}, the width / heads")
    ends = found.pop("eos_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if ends:
        found |= {"eos_id": ends[0], "other_eos_ids": tuple(ends[1:])}
    found |= _experts(raw, official, file)
    found["sliding_window"] = _windows(raw, official, found["num_layers"], file)
    if rope_theta is not None:
        found["rope_theta"], origin = rope_theta, "--rope-theta"
    else:
        found["rope_theta"], origin = _theta(raw, found, official, file)
    if origin != file.name:
        notes.append(f"rope_theta is {found['rope_theta']:g} ({origin})")
    config = ModelConfig.from_dict(found, str(file))
    return Architecture(config, origin, config.eos_ids if ends else (), tuple(notes))


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    """Checks the values of a file; null counts as a missing value."""
    check_table({k: v for k, v in values.items() if v is not None}, rules, source)


def _refuse_others(raw: Mapping[str, Any], official: bool, file: Path) -> None:
    kind = raw.get("model_type", "transformer" if official else None)
    known = ("transformer",) if official else ("mistral", "ministral", "mixtral")
    if kind not in known:
        raise ValueError(f"{file} is of model type {show(kind)}; expected {' or '.join(known)}")
    for key, supported in _UNSUPPORTED.items():
        value = raw.get(key)
        if value is not None and value != {} and value not in supported:
            expected = " or ".join(map(repr, supported)) or "none"
            raise ValueError(f"{file} has {key} {show(value)}; expected {expected}")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = raw.get(key) or {}
        _check(scaling, _ROPE_RULES, f"{file}: {key}")
        plain = all(
            value is None or name in _ROPE_CONSTANTS or value in _PLAIN_ROPE.get(name, ())
            for name, value in scaling.items()
        )
        if not plain:
            raise ValueError(
                f"{file} has {key} {show(scaling)}; only plain rotation, of type 'default', is "
                "supported"
            )


def _experts(raw: Mapping[str, Any], official: bool, file: Path) -> dict[str, int]:
    """Returns the fields of a mixture of experts; an empty dict for a model without experts."""
    if not official and raw.get("model_type") != "mixtral":
        return {}
    table, source = (raw.get("moe"), f"{file}: moe") if official else (raw, str(file))
    if not table:
        return {}
    if not table_of().accepts(table):
        raise ValueError(f"{source} is {show(table)}; expected a table")
    keys = {ours: theirs[not official] for ours, *theirs in _EXPERT_FIELDS}
    _check({key: table.get(key) for key in keys.values()}, _EXPERT_RULES, source)
    for key in keys.values():
        if not table.get(key):
            raise ValueError(f"{source} has no {key}; expected a number above 0")
    return {ours: table[key] for ours, key in keys.items()}


def _head_dim(found: Mapping[str, Any], file: Path) -> int:
    width, heads = found["embed_dim"], found["num_heads"]
    if width % heads:
        raise ValueError(f"{file} has no head_dim, and its {heads} heads do not divide {width}")
    return width // heads


def _windows(raw: Mapping[str, Any], official: bool, layers: int, file: Path) -> Any:
    """Returns one window, or a list with the window of each layer.

    Official files list windows, which repeat over the layers; Hugging Face's name a type per layer.
    """
    window = raw.get("sliding_window")
    if official and window is None:
        window = raw.get("_sliding_window")
    if isinstance(window, str):
        window = parse_json(window, f"{file}: sliding_window {show(window)}")
        _check({"sliding_window": window}, {"sliding_window": _WINDOW}, str(file))
    if official and isinstance(window, list):
        if not window or layers % len(window):
            raise ValueError(
                f"{file} has {len(window)} entries in sliding_window; expected a divisor of the "
                f"number of layers ({layers})"
            )
        return window * (layers // len(window))
    if not official and "sliding_window" not in raw and raw.get("model_type") != "mixtral":
        raise ValueError(f"{file} has no sliding_window; expected a number, or null for no window")
    kinds = None if official else raw.get("layer_types")
    if kinds is None:
        return window
    known = {"full_attention": None, "sliding_attention": window}
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise ValueError(
            f"{file} has layer_types {show(kinds)}; expected {' or '.join(known)} for each of the "
            f"{layers} layers"
        )
    return [known[kind] for kind in kinds]


def _theta(
    raw: Mapping[str, Any], found: Mapping[str, Any], official: bool, file: Path
) -> tuple[float, str]:
    """Returns the base of the rotary embedding and a description of its source."""
    nested = raw.get("rope_parameters") or {}
    theta = nested.get("rope_theta", found.get("rope_theta"))
    if theta is not None:
        return theta, file.name
    # The official params.json of v0.1 is older than the field rope_theta.
    v01 = ModelConfig.from_name("mistral-7b-v0.1")
    if official and all(getattr(v01, name) == value for name, value in found.items()):
        return v01.rope_theta, f"{file.name} is that of Mistral 7B v0.1, which leaves it out"
    if official and "num_experts" in found:
        return 1e6, f"{file.name} is that of a Mixtral, whose first release leaves it out"
    raise ValueError(f"{file} has no rope_theta; name it with --rope-theta (v0.1: 1e4, later: 1e6)")


def to_official(config: ModelConfig) -> dict[str, Any]:
    """Returns the contents of the `params.json` for a config.

    Raises:
      ValueError: a window is dilated.
    """
    _refuse_dilation(config)
    fields = {theirs: getattr(config, ours) for ours, theirs, _ in FIELDS}
    fields["eos_token_id"] = _ends(config)
    if isinstance(config.sliding_window, tuple):
        fields["sliding_window"] = list(config.sliding_window)
    unset = {
        "sliding_window": None,
        "tied_embeddings": False,
        "max_position_embeddings": DEFAULT_MAX_POSITIONS,
        # Official files leave these to the tokenizer.
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    described = {key: value for key, value in fields.items() if unset.get(key, ...) != value}
    if config.num_experts:
        described["moe"] = {key: getattr(config, ours) for ours, key, _ in _EXPERT_FIELDS}
    return described


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the contents of the `config.json` for a config.

    Raises:
      ValueError: a window is dilated, or layers have windows of different sizes.
    """
    _refuse_dilation(config)
    fields = {theirs: getattr(config, ours) for ours, _, theirs in FIELDS}
    fields["eos_token_id"] = _ends(config)
    kind = "mistral"
    if config.num_experts:
        kind = "mixtral"
        fields |= {key: getattr(config, ours) for ours, _, key in _EXPERT_FIELDS}
        if isinstance(config.sliding_window, tuple):
            raise ValueError(
                "Hugging Face's Mixtral has one window for all layers; this model has "
                f"{show(list(config.sliding_window))}: export it as official"
            )
    if isinstance(config.sliding_window, tuple):
        # Transformers' name for a Mistral in which only some layers have a window.
        kind = "ministral"
        windows = set(config.sliding_window) - {None}
        if len(windows) > 1:
            raise ValueError(
                f"Hugging Face's format has one window for all layers that have one; this model "
                f"has {sorted(windows)}: export it as official"
            )
        fields["sliding_window"] = windows.pop()
        fields["layer_types"] = [
            "full_attention" if window is None else "sliding_attention"
            for window in config.sliding_window
        ]
    head = {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind}
    return head | fields | {"hidden_act": "silu", "attention_dropout": 0.0}


def _ends(config: ModelConfig) -> int | list[int]:
    return list(config.eos_ids) if config.other_eos_ids else config.eos_id


def _refuse_dilation(config: ModelConfig) -> None:
    if config.dilation != 1:
        raise ValueError(
            f"dilation is {config.dilation!r}, and PyTorch's formats have no dilated windows; keep "
            "this model as a checkpoint of this program"
        )
