"""Translates `params.json` and `config.json` files to `ModelConfig`, and back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from mistral_jax.checkpoint.names import HEAD
from mistral_jax.config import DEFAULT_MAX_POSITIONS, RULES, ModelConfig

from . import expert_fields, fp8, gguf_model, llama, rope
from .source import Tensor

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
    "original_max_position_embeddings": integer(1),
    "rope_scaling": table_of(),
    "rope_parameters": table_of(),
    "yarn": table_of(),
    "llama_4_scaling": table_of(),
    "multiple_of": integer(1, 1 << 20),
    "ffn_dim_multiplier": number(0, 1e3, above=True),
    "use_scaled_rope": boolean(),
    "text_config": table_of(),
    "lora": table_of(),
}

# The types of text models in Hugging Face's files that this program runs.
MISTRAL = "mistral"
_TYPES = (MISTRAL, "ministral", "ministral3", "llama", "mixtral")
_LATENT_TYPES = ("mistral4", "mistral_large4")
_LATENT = (
    "it uses multi-head latent attention (MLA), as Mistral Small 4, Large 3 and Large 4 do, which "
    "would take an attention layer of its own, experts with a shared one, and a cache of latents; "
    "expected a model with one key and value for each head"
)
# Fields that other architectures set, and their values in the supported ones.
_UNSUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_biases": (False,),
    "partial_rotary_factor": (1,),
    "use_scaled_rope": (False,),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A config and the origin of its values.

    Attributes:
      config: the architecture.
      model_type: type of the text model in Hugging Face's format.
      theta_origin: source of the base of the rotary embedding.
      eos_ids: tokens that end an answer according to the file; empty if it names none.
      notes: messages about values that are not in the file.
    """

    config: ModelConfig
    model_type: str
    theta_origin: str
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read(
    file: Path,
    rope_theta: float | None = None,
    tensors: Callable[[], Mapping[str, Sequence[Tensor]]] | None = None,
) -> Architecture:
    """Reads the architecture of a source.

    Args:
      file: `params.json` (official), `config.json` (Hugging Face), or a GGUF file.
      rope_theta: base of the rotary embedding, for files that lack it or hold a wrong one.
      tensors: returns the tensors of the source, from which the values follow that some files leave
        out; None = such files are refused.

    Raises:
      ValueError: the file is not JSON, describes an unsupported architecture, or lacks a value.
    """
    is_gguf, official = file.suffix == ".gguf", file.name != "config.json"
    raw, notes = gguf_model.params(file) if is_gguf else (read_json(file, _MOST_BYTES), [])
    if official and raw.get("vocab_size") == -1:  # Llama's files leave it to the tokenizer.
        del raw["vocab_size"]
    _check(raw, _RULES, str(file))
    if not official:
        raw = _text_model(raw, file, tensors)
    model_type = _model_type(raw, official, file)
    _refuse_others(raw, file)
    keys = {ours: theirs[not official] for ours, *theirs in FIELDS}
    found = {ours: raw[key] for ours, key in keys.items() if raw.get(key) is not None}
    if official and model_type == "llama":
        notes += llama.complete(found, raw, file, tensors)
    if model_type == "llama" or raw.get("num_key_value_heads", ...) is None:
        found.setdefault("num_kv_heads", found.get("num_heads"))
    missing = [keys[name] for name in _REQUIRED if found.get(name) is None]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}")
    if "head_dim" not in found:
        found["head_dim"] = _head_dim(found, file)
        notes.append(f"{file.name} has no head_dim: {found['head_dim']}, the width / heads")
    ends = found.pop("eos_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if ends:
        found |= {"eos_id": ends[0], "other_eos_ids": tuple(ends[1:])}
    found |= expert_fields.read(raw, official, file)
    found["sliding_window"] = _windows(raw, official, model_type, found["num_layers"], file)
    if official:
        rotation = rope.read_official(raw, str(file))
    else:
        rotation = rope.read_hf(raw, model_type, str(file))
    if rope_theta is not None:
        found["rope_theta"], origin = rope_theta, "--rope-theta"
    else:
        found["rope_theta"], origin = _theta(rotation.theta, found, official, model_type, file)
    if origin != file.name:
        notes.append(f"rope_theta is {found['rope_theta']:g} ({origin})")
    if model_type == "llama" and "max_positions" not in found:
        found["max_positions"] = llama.positions(found["rope_theta"], official)
        notes.append(f"{file.name} has no number of positions: {found['max_positions']}")
    found |= {"rope_scaling": rotation.scaling, "query_scaling": rotation.query_scaling}
    config = ModelConfig.from_dict(found, str(file))
    return Architecture(config, model_type, origin, config.eos_ids if ends else (), tuple(notes))


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    """Checks the values of a file; null counts as a missing value."""
    check_table({k: v for k, v in values.items() if v is not None}, rules, source)


def _text_model(raw: dict[str, Any], file: Path, tensors: Any) -> dict[str, Any]:
    """Returns the values of a `config.json` that describe the text model: all, or a table of them.

    In a model that reads images too, the table decides whether the output is the embedding, or the
    output itself if there is one: files have contradicted each other.
    """
    if raw.get("model_type") != "mistral3":
        return raw
    text = raw.get("text_config")
    if not text:
        raise ValueError(f"{file} has no text_config; expected one in a model of type 'mistral3'")
    _check(text, _RULES, f"{file}: text_config")
    outer = ("bos_token_id", "eos_token_id", "quantization_config")
    text = {"model_type": MISTRAL} | {key: raw[key] for key in outer if key in raw} | text
    if not text.get("tie_word_embeddings") and raw.get("tie_word_embeddings", True) and tensors:
        text["tie_word_embeddings"] = HEAD.name(official=False) not in tensors()
    return text


def _model_type(raw: Mapping[str, Any], official: bool, file: Path) -> str:
    """Returns the type of the text model in Hugging Face's format."""
    kind = raw.get("model_type", "transformer" if official else None)
    if kind in _LATENT_TYPES:
        raise ValueError(f"{file} is of model type {show(kind)}: {_LATENT}")
    known = ("transformer",) if official else _TYPES
    if kind not in known:
        raise ValueError(f"{file} is of model type {show(kind)}; expected {' or '.join(known)}")
    if not official:
        return kind
    if raw.get("moe"):
        return "mixtral"
    # Llama's official files state no width of the MLP, but how it follows from the model's width.
    if raw.get("hidden_dim") is None or raw.get("multiple_of") is not None:
        return "llama"
    if raw.get("llama_4_scaling"):
        return "ministral3"
    return MISTRAL


def _refuse_others(raw: Mapping[str, Any], file: Path) -> None:
    for key in ("q_lora_rank", "kv_lora_rank"):
        if raw.get(key) is not None:
            raise ValueError(f"{file} has {key} {show(raw[key])}: {_LATENT}")
    for key, supported in _UNSUPPORTED.items():
        value = raw.get(key)
        if value is not None and value != {} and value not in supported:
            expected = " or ".join(map(repr, supported)) or "none"
            raise ValueError(f"{file} has {key} {show(value)}; expected {expected}")
    fp8.check_config(raw, file)


def _head_dim(found: Mapping[str, Any], file: Path) -> int:
    width, heads = found["embed_dim"], found["num_heads"]
    if width % heads:
        raise ValueError(f"{file} has no head_dim, and its {heads} heads do not divide {width}")
    return width // heads


def _windows(
    raw: Mapping[str, Any], official: bool, model_type: str, layers: int, file: Path
) -> Any:
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
    if not official and model_type == "llama":
        kinds = set(raw.get("layer_types") or ())
        if window is not None or kinds - {"full_attention"}:
            raise ValueError(
                f"{file} is of model type 'llama'; expected mistral or ministral for a model with "
                f"windows (sliding_window {show(window)})"
            )
        return None
    if not official and "sliding_window" not in raw and model_type not in ("ministral3", "mixtral"):
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
    theta: float | None, found: Mapping[str, Any], official: bool, model_type: str, file: Path
) -> tuple[float, str]:
    """Returns the base of the rotary embedding and a description of its source."""
    if theta is not None:
        return theta, file.name
    if model_type == "llama":
        return 1e4, f"{file.name} leaves it out, as those of Llama do"
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
      ValueError: a window is dilated, or the format does not have the rotation.
    """
    _refuse_dilation(config)
    fields = {theirs: getattr(config, ours) for ours, theirs, _ in FIELDS}
    fields |= rope.to_official(config)
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
    return described | expert_fields.to_official(config)


def to_hf(config: ModelConfig, model_type: str = MISTRAL) -> dict[str, Any]:
    """Returns the contents of the `config.json` for a config.

    Args:
      config: the architecture.
      model_type: type of the text model that the weights come from; it is kept if it computes what
        the config says.

    Raises:
      ValueError: a window is dilated, layers have windows of different sizes, or the format does
        not have the rotation.
    """
    _refuse_dilation(config)
    kind = _exported_type(config, model_type)
    fields = {theirs: getattr(config, ours) for ours, _, theirs in FIELDS}
    del fields["rope_theta"]
    fields |= rope.to_hf(config, kind)
    fields["eos_token_id"] = _ends(config)
    if kind == "llama":
        del fields["sliding_window"]
        fields |= {"attention_bias": False, "mlp_bias": False}
    if kind == "mixtral":
        fields |= expert_fields.to_hf(config)
    if isinstance(config.sliding_window, tuple):
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


def _exported_type(config: ModelConfig, model_type: str) -> str:
    """Returns the type, in Transformers, of a model that computes what the config says."""
    by_layer = isinstance(config.sliding_window, tuple)
    if config.num_experts:
        expert_fields.check_exported(config)
        return "mixtral"
    if by_layer and config.query_scaling:
        raise ValueError(
            f"sliding_window is {show(config.sliding_window)} and query_scaling "
            f"{show(config.query_scaling)}; Hugging Face's format has no model with both: export "
            "it as official"
        )
    if by_layer:  # Transformers' name for a Mistral in which only some layers have a window.
        return "ministral"
    scaling = config.rope_scaling
    if config.query_scaling or (model_type == "ministral3" and scaling and scaling.kind == "yarn"):
        return "ministral3"
    llama = model_type == "llama" or (scaling and scaling.kind != "yarn")
    # Transformers' Llama has no window, and its heads divide the width.
    if llama and config.sliding_window is None and config.embed_dim % config.num_heads == 0:
        return "llama"
    return MISTRAL


def _ends(config: ModelConfig) -> int | list[int]:
    return list(config.eos_ids) if config.other_eos_ids else config.eos_id


def _refuse_dilation(config: ModelConfig) -> None:
    if config.dilation != 1:
        raise ValueError(
            f"dilation is {config.dilation!r}, and PyTorch's formats have no dilated windows; keep "
            "this model as a checkpoint of this program"
        )
