"""`ModelConfig`, the architecture of a model.

A config describes the architecture only: meshes, computation dtypes, batch sizes and paths belong
to the caller.
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
    string,
)
from mistral_jax.base.files import read_toml

_HERE = Path(__file__).resolve().parent
CHECKOUT = _HERE.parent if (_HERE.parent / "pyproject.toml").is_file() else None
CONFIG_DIR = CHECKOUT / "configs" if CHECKOUT else _HERE / "configs"

DEFAULT_MAX_POSITIONS = 32768
_MOST_ENDS = 64


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A change of the rotary frequencies, with which a model reads longer texts.

    Attributes:
      kind: "linear" divides all frequencies by the factor; "llama3" divides the low ones, as Llama
        3.1 does; "yarn" does so with a ramp between both (arXiv 2309.00071, section 3.2).
      factor: divisor of the frequencies.
      original_positions: length of the texts before the change; "llama3" and "yarn".
      beta_fast: number of turns within that length above which "yarn" keeps a frequency.
      beta_slow: number of turns within that length below which "yarn" divides it.
      attention_factor: factor of the rotated queries and keys; "yarn".
      low_freq_factor: number of turns below which "llama3" divides a frequency.
      high_freq_factor: number of turns above which "llama3" keeps it.

    Raises:
      ValueError: the kind is unknown, a value is out of range, or the kind's values are not exactly
        those that are given.
    """

    kind: str
    factor: float
    original_positions: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self):
        kinds = string(*SCALING_FIELDS)
        self._check(kinds.accepts(self.kind), "kind", kinds.expected)
        for name, rule in _SCALING_RULES.items():
            if name in ("factor", *SCALING_FIELDS[self.kind]):
                self._check(rule.accepts(getattr(self, name)), name, rule.expected)
            else:
                expected = f"none, because kind is {self.kind!r}"
                self._check(getattr(self, name) is None, name, expected)
        if self.kind == "llama3":
            expected = f"a number above low_freq_factor ({self.low_freq_factor})"
            self._check(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", expected)
        for name, value in list(vars(self).items()):
            if name not in ("kind", "original_positions") and value is not None:
                object.__setattr__(self, name, float(value))

    def _check(self, good: bool, name: str, expected: str) -> None:
        _check(good, self, name, expected, "rope_scaling.")


@dataclasses.dataclass(frozen=True)
class QueryScaling:
    """A factor of the rotated queries that grows with their position.

    The query at position p is multiplied by `1 + beta * ln(1 + floor(p / original_positions))`, as
    in Ministral 3.

    Attributes:
      beta: growth of the factor.
      original_positions: number of positions, from 0, at which the factor is 1.

    Raises:
      ValueError: a value is out of range.
    """

    beta: float
    original_positions: int

    def __post_init__(self):
        for name, rule in _QUERY_RULES.items():
            _check(rule.accepts(getattr(self, name)), self, name, rule.expected, "query_scaling.")
        object.__setattr__(self, "beta", float(self.beta))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The dimensions and constants that, with the parameters, define a model's forward pass.

    The letters in parentheses are those of the legend in `model/transformer.py`.

    Attributes:
      vocab_size: number of tokens (V).
      num_layers: number of blocks (L).
      embed_dim: width of the residual stream (D).
      mlp_dim: width of the gated MLP, or of each expert (F).
      num_heads: query heads (N).
      num_kv_heads: key-value heads (K); divides num_heads.
      head_dim: width of a head (H); even, and not always D / N.
      rope_theta: base of the rotary embedding (10000 for v0.1, 1e6 for v0.2 and v0.3).
      sliding_window: number of keys visible to a query, its own included (W); None = all. A list
        has one entry for each layer; it is stored as a tuple, or as one value if all are equal.
      dilation: distance between neighbouring visible keys (Longformer, arXiv 2004.05150, section
        3.1); 1 = no gaps, as in all Mistral models; a list as for sliding_window.
      norm_eps: epsilon of every RMSNorm.
      tie_embeddings: whether the output projection is the embedding table.
      max_positions: maximum number of tokens of a sequence, prompt and continuation together.
      bos_id: token that begins a text.
      eos_id: token that ends an answer; training teaches the model to end answers with it.
      other_eos_ids: other tokens that end an answer; a list is stored as a tuple without `eos_id`.
      unnamed_tokens: number of tokens at the end of the vocabulary that are known to have no piece
        in the tokenizer, because they were added to the model or pad its embedding table.
      rope_scaling: change of the rotary frequencies; None = `rope_theta` alone defines them.
      query_scaling: factor of the queries that grows with their position; None = 1.
      num_experts: gated MLPs in each layer, of which a router chooses some for each token (E); 0 =
        each layer has one MLP for all tokens.
      experts_per_token: number of experts that compute each token; 0 if there are no experts.

    Raises:
      ValueError: a value has the wrong type, is out of range, or does not fit the other values.
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
    rope_scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None
    num_experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self):
        for name, rule in RULES.items():
            _check(rule.accepts(getattr(self, name)), self, name, rule.expected)
        for name, kind in (("rope_scaling", RopeScaling), ("query_scaling", QueryScaling)):
            good = isinstance(getattr(self, name), kind | None)
            _check(good, self, name, f"null, or a table with the fields of {kind.__name__}")
        if self.rope_scaling and self.rope_scaling.kind == "yarn":
            expected = "a number above 1 in a model with YaRN"
            _check(self.rope_theta > 1, self, "rope_theta", expected)
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
        least, most = min(1, self.num_experts), self.num_experts
        _check(
            least <= self.experts_per_token <= most,
            self,
            "experts_per_token",
            f"{least} to {most}, because num_experts is {most}",
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
        """The tokens that end an answer, `eos_id` first; generation stops at any of them."""
        return (self.eos_id, *self.other_eos_ids)

    def taught_to_end_with(self, token: int) -> "ModelConfig":
        """Returns a copy whose `eos_id` is `token`; the previous end tokens still end an answer."""
        return dataclasses.replace(self, eos_id=token, other_eos_ids=self.eos_ids)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The `sliding_window` of each layer, L entries."""
        return self._by_layer(self.sliding_window)

    @property
    def dilations(self) -> tuple[int, ...]:
        """The `dilation` of each layer, L entries."""
        return self._by_layer(self.dilation)

    @property
    def spans(self) -> tuple[int | None, ...]:
        """Number of tokens that each layer must keep in its cache, L entries; None = all.

        It counts from the oldest visible key to the query's own: (W - 1) * dilation + 1.
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
        """Returns the fields as JSON values, from which `from_dict` builds an equal config."""
        fields = dataclasses.asdict(self)
        if self.rope_scaling:
            scaling = fields["rope_scaling"].items()
            fields["rope_scaling"] = {k: v for k, v in scaling if v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> "ModelConfig":
        """Builds a config from its fields.

        Args:
          fields: values by field name, as `to_dict` returns. `sliding_window` may be "none" in
            place of None, because TOML has no null.
          source: name of the file for error messages.

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
        """Reads `configs/models/<name>.toml`, for instance "mistral-7b-v0.1".

        Raises:
          ValueError: there is no such file, or a field is invalid.
        """
        known = {path.stem: path for path in sorted((CONFIG_DIR / "models").glob("*.toml"))}
        if name not in known:
            raise ValueError(f"no model config named {name!r}; there are {', '.join(known)}")
        return cls.from_dict(read_toml(known[name]), str(known[name]))


def find(kind: str, name: str | Path, what: str) -> Path:
    """Returns the path `configs/<kind>/<name>.toml` if it exists, else `name` as a path.

    Args:
      kind: name of a folder in `configs/`.
      name: name of a file in that folder without its suffix, or the path of another file.
      what: name of the kind of file for error messages.

    Raises:
      ValueError: there is no such file; the message lists the known names.
    """
    folder = CONFIG_DIR / kind
    for path in (folder / f"{name}.toml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise ValueError(f"no {what} named {str(name)!r}; expected one of {known}, or a .toml file")


def _above_zero(most: int) -> Rule:
    return integer(1, most)._replace(expected=f"an integer above 0 and at most {most}")


# The limits exceed every model, and keep arrays below 2**63 bytes and positions below 2**31.
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
    "num_experts": integer(0, 1 << 10),
    "experts_per_token": integer(0, 1 << 10),
}
# The fields of `RopeScaling` that each kind has, besides the factor.
SCALING_FIELDS = {
    "linear": (),
    "llama3": ("original_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_positions", "beta_fast", "beta_slow", "attention_factor"),
}
_SCALING_RULES = {
    "factor": number(0, 1e6, above=True),
    "original_positions": _above_zero(LARGEST_INT),
    "beta_fast": number(1e-3, 1e6),
    "beta_slow": number(1e-3, 1e6),
    "attention_factor": number(0, 1e3, above=True),
    "low_freq_factor": number(0, 1e6, above=True),
    "high_freq_factor": number(0, 1e6, above=True),
}
_QUERY_RULES = {
    "beta": number(0, 1e3, above=True),
    "original_positions": _above_zero(LARGEST_INT),
}
_WINDOW = integer(1)
_BY_LAYER = ("sliding_window", "dilation")


def _check(good: bool, made: Any, name: str, expected: str, table: str = "") -> None:
    if not good:
        raise ValueError(f"{table}{name} is {show(getattr(made, name))}; expected {expected}")
