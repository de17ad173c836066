"""The architecture of a model: `ModelConfig`, and its checks.

It holds no mesh, no dtype of computation and no path.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_jax.base.fields import (
    LARGEST_INT,
    Rule,
    boolean,
    build,
    integer,
    list_of,
    number,
    show,
)
from mistral_jax.base.files import read_toml

_HERE = Path(__file__).resolve().parent
CHECKOUT = _HERE.parent if (_HERE.parent / "pyproject.toml").is_file() else None
CONFIG_DIR = CHECKOUT / "configs" if CHECKOUT else _HERE / "configs"

DEFAULT_MAX_POSITIONS = 32768
_MOST_ENDS = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape and constants of a Mistral model: all that its forward pass depends on but weights.

    Letters in parentheses are those of the legend in `model/transformer.py`.

    Attributes:
      vocab_size: number of tokens (V).
      num_layers: number of blocks (L).
      embed_dim: width of the residual stream (D).
      mlp_dim: width of the gated MLP (F).
      num_heads: query heads (N).
      num_kv_heads: key-value heads (K); divides num_heads.
      head_dim: width of a head (H); even, and not always D / N.
      rope_theta: base of the rotary embedding (10000 for v0.1, 1e6 for v0.2 and v0.3).
      sliding_window: keys that a query sees, its own included (W); None for all; a list has one
        entry a layer, and is stored as a tuple, or as its value where all are the same.
      dilation: distance between neighbouring keys that a query sees (Longformer, arXiv 2004.05150,
        section 3.1); 1 = every key, as all Mistral models have it; a list as for sliding_window.
      norm_eps: epsilon of every RMSNorm.
      tie_embeddings: whether the output projection is the embedding table.
      max_positions: tokens a sequence may have (prompt and continuation).
      bos_id: token that begins a text.
      eos_id: token that ends an answer, and that training teaches to end with.
      other_eos_ids: more tokens that end an answer; a list is stored as a tuple, without `eos_id`.
      unnamed_tokens: tokens, the last ones, that the tokenizer is known to have no piece for: they
        were added to the model, or pad its tables.

    Raises:
      ValueError: a value is missing, of the wrong type, or does not fit the others.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    sliding_window: int | tuple[int | None, ...] | None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: int = DEFAULT_MAX_POSITIONS
    bos_id: int = 1
    eos_id: int = 2
    dilation: int | tuple[int, ...] = 1
    other_eos_ids: tuple[int, ...] = ()
    unnamed_tokens: int = 0

    def __post_init__(self):
        for name, rule in RULES.items():
            _check(rule.accepts(getattr(self, name)), self, name, rule.expected)
        for name in ("bos_id", "eos_id"):
            good = integer(0, self.vocab_size - 1).accepts(getattr(self, name))
            _check(good, self, name, f"a token id below vocab_size ({self.vocab_size})")
        others = self.other_eos_ids
        others = list(others) if isinstance(others, tuple) else others
        good = list_of(integer(0, self.vocab_size - 1), _MOST_ENDS).accepts(others)
        if not good:
            raise ValueError(
                f"other_eos_ids is {show(others)}; expected at most {_MOST_ENDS} token ids below "
                f"vocab_size ({self.vocab_size})"
            )
        others = dict.fromkeys(token for token in others if token != self.eos_id)
        object.__setattr__(self, "other_eos_ids", tuple(others))
        for name in ("rope_theta", "norm_eps"):
            object.__setattr__(self, name, float(getattr(self, name)))
        _check(self.head_dim % 2 == 0, self, "head_dim", "an even number (rotary pairs)")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            self,
            "num_kv_heads",
            f"a divisor of num_heads ({self.num_heads})",
        )
        for name in _BY_LAYER:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
                expected = f"one entry for each of the {self.num_layers} layers"
                _check(len(value) == self.num_layers, self, name, expected)
        for window in self.windows:
            _check(
                window is None or _WINDOW.accepts(window),
                self,
                "sliding_window",
                "null for all keys, or an integer above 0 (keys seen, the query's own included) "
                f"and at most {LARGEST_INT}",
            )
        for dilation in self.dilations:
            _check(
                _WINDOW.accepts(dilation),
                self,
                "dilation",
                "an integer above 0 (1 for windows without gaps)",
            )
        if any(span is not None and span > LARGEST_INT for span in self.spans):
            raise ValueError(
                f"sliding_window is {show(self.sliding_window)} and dilation "
                f"{show(self.dilation)}; expected windows that span at most {LARGEST_INT} tokens"
            )
        for name in _BY_LAYER:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(set(value)) == 1:
                object.__setattr__(self, name, value[0])

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, `eos_id` first: generation stops at each of them."""
        return (self.eos_id, *self.other_eos_ids)

    def taught_to_end_with(self, token: int) -> "ModelConfig":
        """Returns the config of a model that training teaches to end with `token`.

        The tokens that ended an answer before still do.
        """
        return dataclasses.replace(self, eos_id=token, other_eos_ids=self.eos_ids)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer: L entries."""
        return self._by_layer(self.sliding_window)

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of each layer's window: L entries."""
        return self._by_layer(self.dilation)

    @property
    def spans(self) -> tuple[int | None, ...]:
        """Tokens from the oldest key that a query of each layer may see to its own, both included.

        It is how many tokens a layer must remember: W, or (W - 1) * dilation + 1; None = all.
        """
        return tuple(
            None if window is None else (window - 1) * dilation + 1
            for window, dilation in zip(self.windows, self.dilations, strict=True)
        )

    def _by_layer(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * self.num_layers

    @property
    def group_size(self) -> int:
        """Query heads per key-value head (G)."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, such that `from_dict` gives an equal config."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> "ModelConfig":
        """Builds a config from its fields.

        Args:
          fields: one entry a field, as `to_dict` writes. TOML has no null, so a file may say
            `sliding_window = "none"`.
          source: what messages call the place that the fields came from.

        Raises:
          ValueError: a field is unknown, missing or invalid.
        """
        fields = dict(fields)
        window = fields.get("sliding_window")
        if isinstance(window, list):
            fields["sliding_window"] = [None if w == "none" else w for w in window]
        elif window == "none":
            fields["sliding_window"] = None
        return build(cls, fields, source)

    @classmethod
    def from_name(cls, name: str) -> "ModelConfig":
        """Reads `configs/models/<name>.toml`, for instance "mistral-7b-v0.1"."""
        known = {path.stem: path for path in sorted((CONFIG_DIR / "models").glob("*.toml"))}
        if name not in known:
            raise ValueError(f"no model config named {name!r}; there are {', '.join(known)}")
        return cls.from_dict(read_toml(known[name]), str(known[name]))


def find(kind: str, name: str | Path, what: str) -> Path:
    """Returns the TOML file that a name stands for: `configs/<kind>/<name>.toml`, or else its path.

    Args:
      kind: a folder of `configs/`.
      name: of a file in it, without its ending; or a path to another file.
      what: what messages call it.

    Raises:
      ValueError: there is no such file; the known names are listed.
    """
    folder = CONFIG_DIR / kind
    for path in (folder / f"{name}.toml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise ValueError(f"no {what} named {str(name)!r}; expected one of {known}, or a .toml file")


def _above_zero(most: int) -> Rule:
    return integer(1, most)._replace(expected=f"an integer above 0 and at most {most}")


# Larger than any model, small enough to compute with: shapes stay below 2**63 bytes, and positions
# below 2**31.
RULES = {
    "vocab_size": _above_zero(1 << 24),
    "num_layers": _above_zero(1 << 10),
    "embed_dim": _above_zero(1 << 20),
    "mlp_dim": _above_zero(1 << 22),
    "num_heads": _above_zero(1 << 14),
    "num_kv_heads": _above_zero(1 << 14),
    "head_dim": _above_zero(1 << 14),
    "max_positions": _above_zero(LARGEST_INT),
    "rope_theta": number(0, 1e15, above=True),
    "norm_eps": number(0, 1, above=True),
    "tie_embeddings": boolean(),
    "unnamed_tokens": integer(0),
}
_WINDOW = integer(1)
_BY_LAYER = ("sliding_window", "dilation")


def _check(good: bool, config: ModelConfig, name: str, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} is {show(getattr(config, name))}; expected {expected}")
