"""The tokens of a corpus: a vocabulary for source code, and the documents as one array of ids."""

import io
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from mistral_jax.tokens.tokenizer import Tokenizer

# Ids 3 to 9 of Mistral's vocabularies from the second on.
CONTROL_PIECES = (
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_DEEPEST_INDENT = 24
_SAMPLE_CHARACTERS = 8_000_000
_SENTENCE_CHARACTERS = 4000


def train_vocabulary(texts: Sequence[str], size: int, seed: int) -> bytes:
    """Trains a SentencePiece model like Mistral's: BPE with byte fallback, without normalisation.

    A line break and the indentation after it are one piece, which saves a fifth of the tokens of
    source code.

    Args:
      texts: documents; a sample of them is read.
      size: number of pieces (V).
      seed: seed of the sample.

    Returns:
      The contents of a `tokenizer.model`.

    Raises:
      ValueError: the texts are too few for a vocabulary of this size.
    """
    space = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
    indents = range(0, _DEEPEST_INDENT + 1, 4)
    line_ends = ["\n" * lines + space * indent for lines in (1, 2) for indent in indents]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample(texts, seed),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentencepiece_length=24,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(CONTROL_PIECES),
            user_defined_symbols=[*line_ends, "\n\n\n"],
            max_sentence_length=8 * _SENTENCE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"no vocabulary of {size} pieces can be trained on the texts ({error}): add text, or "
            "make it smaller"
        ) from None
    return model.getvalue()


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Encodes documents, each between BOS and EOS, as one array of uint16 (or uint32) ids."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    rows = [np.array(tokenizer.encode(text, bos=True, eos=True), dtype) for text in texts]
    return np.concatenate([np.empty(0, dtype), *rows])


def _sample(texts: Sequence[str], seed: int) -> Iterator[str]:
    read = 0
    for text in random.Random(seed).sample(texts, len(texts)):
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]
        read += len(text)
        if read > _SAMPLE_CHARACTERS:
            return
