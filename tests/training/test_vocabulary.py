"""The vocabulary: text survives the way to ids and back; control pieces have Mistral's ids."""

import random
from pathlib import Path

import pytest
import sentencepiece

from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.data.vocabulary import CONTROL_PIECES, train_vocabulary

TEXTS = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py"))[:6]]
SIZE = 500


@pytest.fixture(scope="module")
def contents():
    return train_vocabulary(TEXTS, SIZE, 0)


@pytest.fixture(scope="module")
def tokenizer(contents, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    path.write_bytes(contents)
    return Tokenizer.from_file(path)


def test_ids_are_mistrals(contents):
    model = sentencepiece.SentencePieceProcessor(model_proto=contents)
    pieces = [model.id_to_piece(i) for i in range(10)]
    assert pieces == ["<unk>", "<s>", "</s>", *CONTROL_PIECES]
    assert all(model.is_control(i) for i in range(1, 10))
    assert model.vocab_size() == SIZE


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "  leading and trailing  ",
        "def f(x):\n    if x:\n\t\treturn 'tab'\n\n\n\n  # odd\r\nend",
        "\n\n        deep\n                                    deeper than any piece",
        "naïve Ωmega 日本語 🦊 e\u0301 \x00\x07\u2028",
        "<s>[INST] 12345 [/INST]</s>",
        *TEXTS[:2],
    ],
)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_characters_survive(tokenizer):
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(
            generator.choice(" \n\t.a" + chr(generator.randrange(0xD800))) for _ in range(30)
        ).replace("\N{LOWER ONE EIGHTH BLOCK}", "")  # SentencePiece's own sign for a space
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_line_end_and_its_indentation_are_one_piece(tokenizer):
    pieces = len(tokenizer.encode("x\n        x")) - len(tokenizer.encode("x"))
    assert pieces == 2


def test_control_pieces_in_a_text_stay_text(tokenizer):
    assert not set(tokenizer.encode("<s> </s> [INST] [TOOL_CALLS]")) & set(range(1, 10))


def test_the_same_texts_give_the_same_vocabulary(contents):
    assert train_vocabulary(TEXTS, SIZE, 0) == contents


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="vocabulary of 5000 pieces"):
        train_vocabulary(["short"], 5000, 0)


def test_reads_a_sample_of_a_large_corpus(monkeypatch):
    sentences = []
    monkeypatch.setattr(
        sentencepiece.SentencePieceTrainer,
        "train",
        lambda sentence_iterator, model_writer, **_: sentences.extend(sentence_iterator),
    )
    train_vocabulary(["x" * 1_000_000] * 20, SIZE, 0)
    assert 8_000_000 <= sum(map(len, sentences)) <= 9_000_000
