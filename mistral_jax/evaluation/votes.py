"""Votes among several answers to one question (maj@k)."""

import collections
from collections.abc import Iterable


def majority(answers: Iterable[str | None]) -> str | None:
    """Returns the most frequent answer, and the earliest one of several.

    Args:
      answers: the answers in the order in which they were drawn; None = a text without an answer,
        which does not vote.

    Returns:
      The answer; None if no text has one.
    """
    counts = collections.Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)
