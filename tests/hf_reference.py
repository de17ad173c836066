"""A second reference: Transformers' Mistral in float32, built from official tensors.

Needs PyTorch and Transformers: only `golden/make_transformers.py` and the parity tests import it.
"""

import numpy as np
import torch
import transformers


def build(config: dict, tensors: dict[str, np.ndarray], **fields) -> transformers.PreTrainedModel:
    """Builds the model of official fields and tensors, with eager (exact) attention.

    A list of windows needs Transformers' Ministral, which is Mistral with one window per layer. The
    list may hold None and one number.
    """
    windows = config["sliding_window"]
    kind = "Mistral"
    if isinstance(windows, list):
        kind = "Ministral"
        fields["layer_types"] = [f"{'sliding' if w else 'full'}_attention" for w in windows]
        (windows,) = set(windows) - {None}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if yarn := config.get("yarn"):
        kind = "Ministral3"
        rope |= {
            "rope_type": "yarn",
            "factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": yarn["beta"],
            "beta_slow": yarn["alpha"],
            "llama_4_scaling_beta": config.get("llama_4_scaling", {}).get("beta", 0.0),
        } | ({} if yarn["apply_scale"] else {"attention_factor": 1.0})
    hf_config = getattr(transformers, f"{kind}Config")(
        vocab_size=config["vocab_size"],
        hidden_size=config["dim"],
        intermediate_size=config["hidden_dim"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config["n_kv_heads"],
        head_dim=config["head_dim"],
        rms_norm_eps=config["norm_eps"],
        rope_parameters=rope,
        sliding_window=windows,
        max_position_embeddings=4096,
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
        **fields,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(hf_config).eval()
    state = {hf_name(n): torch.from_numpy(hf_layout(config, n, t)) for n, t in tensors.items()}
    if "output.weight" not in tensors:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def load(folder) -> transformers.PreTrainedModel:
    """Loads a Hugging Face folder in float32, whatever the dtype of its files."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model: transformers.PreTrainedModel, tokens) -> np.ndarray:
    """Computes the logits [T, V] of one sequence without a cache."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()


def greedy(model: transformers.PreTrainedModel, tokens, count: int) -> list[int]:
    """Generates `count` tokens with Transformers' greedy `generate`, which uses its cache."""
    prompt = torch.tensor([list(tokens)])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(tokens) :].tolist()


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of an official tensor."""
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_layout(config: dict, name: str, tensor: np.ndarray) -> np.ndarray:
    """Reorders the rows of wq and wk from rotary pairs to rotary halves."""
    for projection, heads in (("wq", config["n_heads"]), ("wk", config["n_kv_heads"])):
        if f".{projection}." in name:
            pairs = tensor.reshape(heads, config["head_dim"] // 2, 2, -1)
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "output": "lm_head",
}
