"""Translates the metadata and the tensor names of GGUF files to those of official checkpoints.

GGUF files of Llama's and Mistral's models interleave the rotary pairs of wq and wk, as official
files do.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_jax.base.fields import integer, show

from . import gguf

# The architectures that compute what the model in this package computes.
_ARCHITECTURES = ("llama", "mistral3")
# Official fields, by the keys that follow the architecture's name.
_FIELDS = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_YARN = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta",
    "rope.scaling.yarn_beta_slow": "alpha",
}
# Keys that change nothing, and keys that `params` reads by name.
_KNOWN = {
    "tensor_data_layout",
    "attention.value_length",
    "attention.temperature_scale",
    "attention.temperature_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
}
_ENDS = ("eos", "eot", "eom")
_V01 = {
    **{"dim": 4096, "n_layers": 32, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8},
    **{"rope_theta": 1e4, "max_position_embeddings": 32768},
}

_PLAIN = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "rope_freqs": "rope_freqs",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "ffn_gate_inp": "feed_forward.gate",
}
_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_NAME = re.compile(r"(?:blk\.(\d{1,4})\.)?([a-z_]+?)(?:(_exps)|\.(\d{1,4}))?\.weight")


def params(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of the official `params.json` of a GGUF file's model, and messages.

    Args:
      file: the file, or the first of its parts.

    Raises:
      ValueError: the file is damaged, the model is of another architecture, or a value is missing
        or not supported.
    """
    metadata, tensors = gguf.read_all(gguf.parts(file))
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        expected = " or ".join(_ARCHITECTURES)
        raise ValueError(f"{file} is of the architecture {show(kind)}; expected {expected}")
    start = f"{kind}."
    own = {key.removeprefix(start): x for key, x in metadata.items() if key.startswith(start)}
    for key, value in own.items():
        if key not in {*_FIELDS, *_YARN, *_KNOWN}:
            raise ValueError(f"{file} has {start}{key} {show(value)}, which is not supported")
        own[key] = _alone(value, f"{file}: {start}{key}")
    found = {theirs: own[key] for key, theirs in _FIELDS.items() if key in own}
    table = tensors.get("token_embd.weight")
    if "vocab_size" not in found and table is not None:
        found["vocab_size"] = table.array.shape[0]
    found.setdefault("n_kv_heads", found.get("n_heads"))
    found["tied_embeddings"] = "output.weight" not in tensors
    if integer(1).accepts(heads := found.get("n_heads")) and integer(1).accepts(found.get("dim")):
        found.setdefault("head_dim", found["dim"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, found.get("head_dim")) != found.get("head_dim"):
            raise ValueError(
                f"{file} has {start}{key} {show(own[key])}; expected {found.get('head_dim')}, the "
                "width of a head"
            )
    _add_scaling(found, own, file)
    if own.get("expert_count"):
        used = own.get("expert_used_count")
        found["moe"] = {"num_experts": own["expert_count"], "num_experts_per_tok": used}
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *_ENDS))
    bos, *ends = (token if integer(0).accepts(token) else None for token in ids)
    named = list(dict.fromkeys(token for token in ends if token is not None))
    found |= {
        key: value
        for key, value in (("bos_token_id", bos), ("eos_token_id", named))
        if value not in (None, [])
    }
    notes = []
    if "sliding_window" not in found and all(found.get(key) == x for key, x in _V01.items()):
        found["sliding_window"] = 4096
        notes.append(
            f"{file.name} has the shapes of Mistral 7B v0.1, whose window of 4096 keys llama.cpp "
            "leaves out"
        )
    return found, notes


def tensors(files: Sequence[Path]) -> dict[str, gguf.Tensor]:
    """Returns the tensors of a model by their official names; those of experts one by one.

    Raises:
      ValueError: a file is damaged, or a name is unknown.
    """
    found = {}
    for name, tensor in gguf.read_all(files)[1].items():
        match = _NAME.fullmatch(name)
        layer, base, fused, number = match.groups() if match else (None,) * 4
        start = "" if layer is None else f"layers.{int(layer)}."
        if base in _EXPERTS and fused:
            for i in range(tensor.array.shape[0]):
                part = gguf.Tensor(tensor.file, tensor.array[i])
                found[f"{start}feed_forward.experts.{i}.{_EXPERTS[base]}.weight"] = part
        elif base in _EXPERTS and number:
            found[f"{start}feed_forward.experts.{int(number)}.{_EXPERTS[base]}.weight"] = tensor
        elif base in _PLAIN and not fused and not number:
            found[f"{start}{_PLAIN[base]}.weight"] = tensor
        else:
            raise ValueError(
                f"{tensor.file} has tensor {show(name)}, which is no part of a Mistral"
            )
    return found


def _alone(value: Any, what: str) -> Any:
    """Returns the value of all layers where a file lists one for each; floats as short decimals."""
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"{what} is {show(value)}; expected the same for all layers")
    # A file holds a float32: 1e-5 would otherwise become 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _add_scaling(found: dict[str, Any], own: Mapping[str, Any], file: Path) -> None:
    """Adds the official fields of YaRN and of the scale of queries."""
    kind = own.get("rope.scaling.type", "none")
    if kind == "yarn":
        found["yarn"] = {theirs: own[key] for key, theirs in _YARN.items() if key in own}
        found["yarn"]["apply_scale"] = bool(own.get("rope.scaling.yarn_log_multiplier", 1.0))
    elif kind != "none" or own.get("rope.scaling.factor", 1) != 1:
        raise ValueError(
            f"{file} has rotation scaled by {show(kind)}; expected none or yarn, as Mistral's have"
        )
    if scale := own.get("attention.temperature_scale"):
        length = own.get("attention.temperature_length")
        length = length or own.get("rope.scaling.original_context_length")
        found["llama_4_scaling"] = {"beta": scale, "original_max_position_embeddings": length}
