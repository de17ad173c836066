"""The routes that convert texts to tokens and back, in vLLM's and llama.cpp's forms."""

from typing import Any

from mistral_jax.serving import requests
from mistral_jax.serving.requests import Fields
from mistral_jax.serving.service import Loaded


def tokenize(loaded: Loaded, fields: Fields) -> dict[str, Any]:
    """Returns the tokens of a text, or of a conversation as the model reads it."""
    given = [name for name in ("prompt", "content", "messages") if name in fields]
    if len(given) != 1:
        raise ValueError(
            f"the request has {' and '.join(given) or 'no text'}; expected one of prompt, content "
            "(llama.cpp's name) and messages"
        )
    tokenizer, (name,) = loaded.tokenizer, given
    if name == "messages":
        ids = requests.chat_prompt(tokenizer, fields).ids
    else:
        # vLLM adds BOS unless told not to, and llama.cpp only if told to.
        vllm = name == "prompt"
        bos = fields.get("add_special_tokens", vllm) if vllm else fields.get("add_special", False)
        ids = tokenizer.encode(fields[name], bos=bos and tokenizer.bos_id is not None)
    made: dict[str, Any] = {"count": len(ids), "max_model_len": loaded.length, "tokens": ids}
    if fields.get("return_token_strs"):
        made["token_strs"] = [tokenizer.piece(token) for token in ids]
    if fields.get("with_pieces"):
        decoder = tokenizer.stream(ids)  # The first word keeps its space, as in llama.cpp.
        spelled = [_shown(decoder.spell(token)) or tokenizer.piece(token) for token in ids]
        pairs = zip(ids, spelled, strict=True)
        made["tokens"] = [{"id": token, "piece": piece} for token, piece in pairs]
    return made


def detokenize(loaded: Loaded, fields: Fields) -> dict[str, Any]:
    """Returns the text of tokens."""
    text = loaded.tokenizer.decode(fields["tokens"])
    return {"prompt": text, "content": text}


def tokenizer_info(loaded: Loaded) -> dict[str, Any]:
    """Describes a tokenizer by the fields of vLLM's route."""
    tokenizer = loaded.tokenizer

    def named(token: int | None) -> str | None:
        return None if token is None else tokenizer.piece(token)

    return {
        "tokenizer_class": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bos_token": named(tokenizer.bos_id),
        "eos_token": named(tokenizer.eos_id),
        "unk_token": named(tokenizer.unk_id),
        "add_bos_token": tokenizer.adds_bos,
        "model_max_length": loaded.length,
        "chat_form": tokenizer.chat_form,
    }


def _shown(spelled: bytes) -> str | list[int]:
    """Returns the text of a token, or its bytes if they are a part of a character."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)
