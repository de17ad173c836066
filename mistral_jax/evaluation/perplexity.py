"""The perplexity of texts: the loss of a model per token, and per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from mistral_jax.base.fields import show
from mistral_jax.base.files import read_records, read_text
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.score import likelihoods
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.tokenizer import Tokenizer

_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a model on texts, each read from its own BOS. Losses can be added.

    Attributes:
      documents: number of texts.
      tokens: number of tokens, without BOS.
      bytes: length of the texts in UTF-8.
      nats: negative natural logarithm of the texts' probability.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float

    def __add__(self, other: "Loss") -> "Loss":
        """Returns the loss on the texts of both."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Loss(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def per_token(self) -> float:
        """Nats per token; depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss per token; infinity if a float cannot hold it.

        The model is as uncertain as among this many equally likely tokens.
        """
        try:
            return math.exp(self.per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The bits per byte of text, which are comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def read_texts(path: Path) -> list[str]:
    """Reads the texts of a file: the whole file, or the "text" of each record of JSON Lines.

    Args:
      path: a UTF-8 file; JSON Lines if its name ends with .jsonl or .ndjson, or one of these and
        .gz.

    Returns:
      At least one text; none is empty.

    Raises:
      ValueError: the file or a text is empty, the file is not UTF-8, or a record has no text.
      OSError: the file cannot be read.
    """
    if not path.name.endswith(_JSON_LINES):
        found = {str(path): read_text(path, pipe=True)}
    else:
        found = {where: record.get("text") for where, record in read_records(path)}
        if not found:
            raise ValueError(f"{path} is empty; expected JSON objects, one a line")
        for where, text in found.items():
            if not isinstance(text, str):
                raise ValueError(f'{where}: "text" is {show(text)}; expected a string')
    for where, text in found.items():
        if not text:
            raise ValueError(f"{where} is empty; expected a text of at least one character")
    return list(found.values())


def token_losses(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    batch: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
    """Computes the loss of every token of texts, which may have different lengths.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      texts: the texts; none is empty.
      batch: texts per batch.
      report: called repeatedly with the number of tokens scored so far, and in total.

    Returns:
      The loss of each token in nats, one [T] float32 array per text.
    """
    rows = [tokenizer.encode(text, bos=True) for text in texts]
    return row_losses(model, params, rows, batch, report)


def row_losses(
    model: Transformer,
    params: Params,
    rows: Sequence[Sequence[int]],
    batch: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
    """Computes the same as `token_losses` from rows of token ids that begin with BOS."""
    return [-row.logprobs for row in likelihoods(model, params, rows, batch, report)]


def loss(texts: Sequence[str], losses: Sequence[np.ndarray]) -> Loss:
    """Adds up the losses that `token_losses` returned for these texts.

    Raises:
      ValueError: a loss is not finite.
    """
    check_finite(losses)
    return Loss(
        documents=len(texts),
        tokens=sum(map(len, losses)),
        bytes=sum(len(text.encode()) for text in texts),
        nats=math.fsum(math.fsum(row.tolist()) for row in losses),
    )


def check_finite(losses: Iterable[Sequence[float]]) -> None:
    """Raises a ValueError if a loss or a log-probability is not finite."""
    for number, row in enumerate(losses):
        if not np.isfinite(row).all():
            raise ValueError(
                f"text {number + 1} has a token whose probability is not finite: the model's "
                "weights are damaged, or its dtype overflows (use bfloat16 or float32)"
            )
