"""The instruction set of examples/finetune: what it takes, how it is divided, how it is scored."""

import importlib.util
import json
import math

import pytest

import mistral_jax as mj
from mistral_jax.config import CHECKOUT
from mistral_jax.engine.score import likelihoods
from mistral_jax.training.data import corpus, records

NUMBERS = range(200)
SOURCE = '''
class Store:
    def read_values(self, path: str, *, strict: bool = True) -> list:
        """Reads the `values` of a file. They come
        in order.

        Whatever follows is not read.
        """

    async def _close_file(self, *args, **kwargs):
        """Closes the file"""

    def __len__(self):
        """Returns the len of all the values."""

    def frobnicate(self):
        """Reads the values of another file."""

    def write(self, one, two, three, four):
        """Writes the values to a file."""

    def readAll(self):
        """Reads all values of a file."""

    def read_none(self):
        """none are to be read here."""

    def get(self):
        """Returns the values of a file."""

    def read_long(self):
        """Reads a long line of a file, one that is not so easy to read as the others are."""

    def read_all(self):
        pass
'''


@pytest.fixture(scope="module")
def signatures():
    path = CHECKOUT / "examples" / "finetune" / "signatures.py"
    spec = importlib.util.spec_from_file_location("signatures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_takes_functions_whose_sentence_tells_their_name(signatures):
    assert list(signatures.extract(SOURCE)) == [
        ("Reads the values of a file.", "def read_values(self, path, strict):"),
        ("Closes the file.", "def close_file(self, *args, **kwargs):"),
    ]
    assert list(signatures.extract("def broken(:")) == []


def test_no_sentence_and_no_name_is_in_two_parts(signatures):
    pairs = [(f"Sentence {i % 500}.", f"def name_{i % 700}():") for i in range(2000)]
    parts = signatures.split(pairs)
    sentences = [sentence for part in parts.values() for sentence, _ in part]
    assert sorted(sentences) == sorted({sentence for sentence, _ in pairs})
    names = [{signature for _, signature in part} for part in parts.values()]
    assert len(set.union(*names)) == sum(map(len, names))
    assert {name: len(part) > 0 for name, part in parts.items()} == dict.fromkeys(parts, True)
    assert 0.8 < len(parts["train"]) / len(sentences) < 0.95


def test_writes_the_same_conversations_each_time(signatures, tmp_path, monkeypatch, capsys):
    text = "\n".join(
        f'def read_{i}(path):\n    """Reads the number {i} of a file."""' for i in NUMBERS
    )
    source = corpus.Source("alpha", "1", "MIT", {"alpha.py": text})
    monkeypatch.setattr(corpus, "gather", lambda roots: [source])
    for folder in ("a", "b"):
        assert signatures.main(["make", str(tmp_path / folder)]) == 0
    printed = capsys.readouterr().out
    _, _, tokenizer = mj.load()
    total = 0
    for name in ("train", "validation", "test"):
        file = tmp_path / "a" / f"{name}.jsonl"
        assert file.read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
        examples = list(records.read([file], tokenizer))
        total += len(examples)
        assert f"{name}.jsonl: {len(examples)} pairs" in printed
        for line, example in zip(file.read_text().splitlines(), examples, strict=True):
            learnt = example.tokens[example.weights > 0]
            assert learnt[-1] == tokenizer.eos_id
            assert tokenizer.decode(learnt) == json.loads(line)["messages"][1]["content"]
    assert total == len(NUMBERS)

    other = text + '\ndef write_down(path):\n    """Writes it down."""\n'
    monkeypatch.setattr(corpus, "python_files", lambda name: {"b.py": other})
    assert signatures.main(["make", str(tmp_path / "c"), "--unread", "beta"]) == 0
    (line,) = (tmp_path / "c" / "test.jsonl").read_text().splitlines()
    assert json.loads(line) == signatures.conversation("Writes it down.", "def write_down(path):")


def test_scores_answers(signatures):
    wanted = "def get_node(self, key):"
    assert signatures.f1(wanted, wanted) == 1
    assert signatures.f1("def getNode(cls, key):", wanted) == 1
    assert signatures.f1("def get_node():", wanted) == pytest.approx(0.8)
    assert signatures.f1("def set(self):", wanted) == signatures.f1("", wanted) == 0
    answers = [wanted, "def get_node(k", wanted + "\n    pass", "def other(key):", ""]
    assert signatures.measure(answers, [True, False, False, True, True], [wanted] * 5) == {
        "answers": 5,
        "ended": 0.6,
        "signature": 0.4,
        "name": 0.2,
        "f1": pytest.approx((1 + 2 / 3 + 6 / 7 + 2 / 5) / 5),
    }


def test_the_loss_is_that_of_the_answers_and_their_ends(signatures, tmp_path):
    model, params, tokenizer = mj.load(dtype="float32")
    pairs = [("Close the file.", "def close(self):"), ("Read it all.", "def read_all(path):")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(signatures.conversation(*pair)) + "\n" for pair in pairs))
    losses = []
    for sentence, signature in pairs:
        ids = tokenizer.encode_chat([{"role": "user", "content": sentence}])
        for token in tokenizer.encode(signature, eos=True):
            ids.append(token)
            (row,) = likelihoods(model, params, [ids], 1)
            losses.append(-float(row.logprobs[-1]))
    expected = math.fsum(losses) / len(losses)
    assert signatures.reference_loss(model, params, tokenizer, file) == pytest.approx(expected)


def test_scores_the_bundled_model(signatures, tmp_path, capsys):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(signatures.conversation("Close it.", "def close(self):")) + "\n")
    assert signatures.main(["score", str(file)]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["answers"] == 1
    assert result["signature"] == 0, "a model that was never asked answers nothing"
    assert "wanted    def close(self):" in output.err
    assert signatures.main(["score", str(tmp_path / "none.jsonl")]) == 2
