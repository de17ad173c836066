"""Small files of Tekken's kind, shared by tests."""

import base64
import json
from pathlib import Path

import tokenizer_samples as samples

# The files that mistral-common ships: both v3, without a list of special tokens.
FILES = (samples.DATA / "tekken_240718.json", samples.DATA / "tekken_240911.json")
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Special tokens of files from v11 on; the ranks that are left out are filled.
_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
_WORDS = (
    *("th", "the", " t", " the", "in", "ing", "日", "日本", "é", "👍"),
    *("  ", "    ", "\n\n", " d", "de", "def"),
)


def described(version: str = "v3", special: int = 24, unused: int = 3) -> dict:
    """Returns the JSON value of a small file.

    Args:
      version: its version; files later than v7 list their special tokens.
      special: number of special tokens.
      unused: number of entries of the vocabulary beyond its size.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    for word in _WORDS:
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    tokens += [bytes([65 + i, 0xFF]) for i in range(unused)]
    made = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) - unused + special,
            "default_num_special_tokens": special,
            "version": version,
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": token.decode(errors="ignore") or None,
            }
            for rank, token in enumerate(tokens)
        ],
    }
    if version not in ("v3", "v7"):
        made["special_tokens"] = [
            {"rank": rank, "token_str": text, "is_control": True}
            for rank, text in enumerate(_SPECIAL[:special])
        ]
    return made


def write(path: Path, version: str = "v3", **options) -> Path:
    """Writes a small file."""
    path.write_text(json.dumps(described(version, **options)))
    return path
