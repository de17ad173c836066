"""The parameters of sampling: `Sampling` for one request, `RowSampling` for all rows of a batch.

`logits.py` applies them.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mistral_jax.base.fields import show

# Maximum of `top_logprobs`, as in OpenAI's API.
MOST_TOP = 20

ALL_BANNED = "logit_bias bans every token; leave at least one that the model may choose"
# Minimum, maximum, and whether the value must be an integer.
_RANGES = {
    "temperature": (0, 100, False),
    "top_k": (0, 2**31 - 1, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, False),
    "repetition_penalty": (0.01, 100, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "seed": (0, 2**32 - 1, True),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the tokens of one request.

    Attributes:
      temperature: divides the logits, 0 to 100; 0 = always the likeliest token.
      top_k: keep this many of the likeliest tokens; 0 = all.
      top_p: of these, keep the fewest likeliest tokens whose probabilities add up to at least this,
        0 to 1; 1 = all.
      min_p: of these, keep the tokens whose probability is at least this fraction of the likeliest
        token's, 0 to 1; 0 = all.
      repetition_penalty: divides the positive logits and multiplies the negative ones of tokens in
        the prompt or the answer (arXiv 1909.05858; as in Transformers and vLLM); 1 = none.
      presence_penalty: subtracted from the logits of tokens in the answer (as in OpenAI's API and
        vLLM), -2 to 2; 0 = none.
      frequency_penalty: subtracted once for each occurrence of a token in the answer, -2 to 2; 0 =
        none.
      logit_bias: added to the logits of tokens before all other steps, by token id: -100 to 100, or
        -inf to ban the token.
      seed: seed of the random draws, 0 to 2**32 - 1; the same seed, prompt and row give the same
        text.

    Raises:
      ValueError: a value is out of its range, of the wrong type, or NaN.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        for name, (least, greatest, integral) in _RANGES.items():
            value = getattr(self, name)
            kind = numbers.Integral if integral else numbers.Real
            if not _is(value, kind) or not least <= value <= greatest:
                expected = "an integer" if integral else "a number"
                raise ValueError(
                    f"{name} is {show(value)}; expected {expected} from {least} to {greatest}"
                )
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias is {show(self.logit_bias)}; expected a dict of id: number"
            )
        for token, bias in self.logit_bias.items():
            number = _is(bias, numbers.Real) and (-100 <= bias <= 100 or bias == -math.inf)
            if not _is(token, numbers.Integral) or not number:
                raise ValueError(
                    f"logit_bias has {show(token)}: {show(bias)}; expected a token id and a "
                    "number from -100 to 100, or -inf to ban the token"
                )

    @property
    def penalizes(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return neutral != (1, 0, 0) or bool(self.logit_bias)

    def bans_all(self, tokens: int) -> bool:
        """Whether the bias bans all of the first `tokens` tokens."""
        banned = {token for token, bias in self.logit_bias.items() if bias == -math.inf}
        return len(banned) >= tokens and banned.issuperset(range(tokens))

    def check(self, vocab_size: int) -> None:
        """Raises a ValueError if the bias names an unknown token, or bans all tokens."""
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias names token {token}; expected 0 to {vocab_size - 1}")
        if self.bans_all(vocab_size):
            raise ValueError(ALL_BANNED)


def _is(value, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


DEFAULT = Sampling()


def settle(
    sampling: Sampling | Sequence[Sampling], fields: Mapping[str, Any]
) -> Sampling | list[Sampling]:
    """Replaces fields of a `Sampling`, or of each `Sampling` of a list, by keyword arguments.

    Raises:
      ValueError: a name is not a field, a value is invalid, or `sampling` has another type.
    """
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(
                f"there is no keyword {name!r}; the nearest field of Sampling is {near!r}"
            )
    if isinstance(sampling, Sampling):
        return dataclasses.replace(sampling, **fields)
    if isinstance(sampling, list | tuple) and all(isinstance(x, Sampling) for x in sampling):
        return [dataclasses.replace(one, **fields) for one in sampling]
    raise ValueError(
        f"sampling is {show(sampling)}; expected a Sampling, or a list with one for each prompt: "
        "give its fields as keywords, such as temperature=0.2, or as Sampling(temperature=0.2)"
    )


@flax.struct.dataclass
class Penalties:
    """Biases and penalties of all rows.

    Attributes:
      bias: added to the logits, [B, V] float32.
      in_prompt: whether a token occurs in the row's prompt, [B, V] bool.
      repetition: see `Sampling.repetition_penalty`, [B] float32.
      presence: see `Sampling.presence_penalty`, [B] float32.
      frequency: see `Sampling.frequency_penalty`, [B] float32.
      apply: whether the row has a bias or a penalty, [B] bool; if no row has, the step is skipped.
    """

    bias: jax.Array
    in_prompt: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    apply: jax.Array


@flax.struct.dataclass
class RowSampling:
    """The `Sampling` of all rows as arrays, so that new values need no compilation.

    Attributes:
      temperature: [B] float32.
      top_k: [B] int32.
      top_p: [B] float32.
      min_p: [B] float32.
      key: random key of each row, [B, 2] uint32: its index among the rows that share its seed, and
        the seed.
      penalties: biases and penalties.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array
    penalties: Penalties

    @classmethod
    def stack(
        cls,
        samplings: Sequence[Sampling],
        draws: Sequence[int],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
    ) -> "RowSampling":
        """Builds the arrays in host memory.

        Args:
          samplings: the sampling of each row (B entries).
          draws: index of each row among the rows that share its seed.
          prompts: prompt of each row, for the repetition penalty.
          vocab_size: V.

        Raises:
          ValueError: a logit bias names a token outside the vocabulary, or bans all tokens.
        """

        def column(name, dtype=np.float32):
            return np.array([getattr(sampling, name) for sampling in samplings], dtype)

        bias = np.zeros((len(samplings), vocab_size), np.float32)
        in_prompt = np.zeros(bias.shape, bool)
        for i, (sampling, prompt) in enumerate(zip(samplings, prompts, strict=True)):
            in_prompt[i, list(prompt)] = True
            sampling.check(vocab_size)
            for token, value in sampling.logit_bias.items():
                bias[i, token] = value
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        apply = np.array([sampling.penalizes for sampling in samplings])
        return cls(
            temperature=column("temperature"),
            top_k=column("top_k", np.int32),
            top_p=column("top_p"),
            min_p=column("min_p"),
            key=np.stack([np.array(draws, np.uint32), column("seed", np.uint32)], axis=1),
            penalties=Penalties(bias, in_prompt, *map(column, names), apply),
        )

    def only(self, rows: jax.Array) -> "RowSampling":
        """Makes the other rows neutral, so that steps which only they need are skipped.

        Args:
          rows: the rows to keep, [B] bool.
        """
        return self.replace(
            temperature=jnp.where(rows, self.temperature, 0),
            top_k=jnp.where(rows, self.top_k, 0),
            penalties=self.penalties.replace(apply=self.penalties.apply & rows),
        )
