"""Answers for MT-Bench: they are those of `chat`, and a run that was killed goes on."""

import json
import types
import uuid

import pytest
import tiny
import tokenizer_samples

import mistral_jax as mj
from mistral_jax.checkpoint import checkpoint
from mistral_jax.cli import evaluate
from mistral_jax.config import CONFIG_DIR
from mistral_jax.engine.completion import Completion
from mistral_jax.evaluation import mt_bench
from mistral_jax.tokens.tokenizer import Tokenizer

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["import os", "and numpy?"]},
    {"question_id": 7, "category": "math", "turns": ["1 + 1 =", "Why?"], "reference": ["2"]},
    {"question_id": "x", "category": "other", "turns": ["def f(x):"]},
    {"question_id": 9, "category": "stem", "turns": ["A", "B", "C"], "required_temperature": 0.3},
    {"question_id": 10, "category": "math", "turns": ["for i in", "while"]},
]
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and questions."""
    home = tmp_path_factory.mktemp("mt-bench")
    tokenizer = tokenizer_samples.train_small_mistral(home / "tokenizer.model")
    size = Tokenizer.from_file(tokenizer).vocab_size
    model, params = tiny.build(
        vocab_size=size + -size % 8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=48
    )
    checkpoint.save(home / "tiny", model.config, params, tokenizer)
    (home / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return home


@pytest.fixture(scope="module")
def loaded(folder):
    return mj.load(folder / "tiny", dtype="float32", chat_form="v1")


@pytest.fixture(scope="module")
def questions(folder):
    return mt_bench.read_questions(folder / "questions.jsonl")


@pytest.fixture(scope="module")
def answered(loaded, questions, tmp_path_factory):
    """The records of a run that nothing interrupts, and its file."""
    path = tmp_path_factory.mktemp("whole") / "mt-bench" / "tiny.jsonl"
    return mt_bench.answer(*loaded, questions, path, "tiny", slots=2, new_tokens=NEW), path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(records):
    return [record["choices"][0]["turns"] for record in records]


def test_each_turn_is_answered_as_by_chat(loaded, questions, answered):
    records, path = answered
    assert lines(path) == records
    assert [record["question_id"] for record in records] == [81, 7, "x", 9, 10]
    temperatures = [0.7, 0.0, 0.7, 0.3, 0.0]
    assert [question.temperature for question in questions] == temperatures
    sampling = [mj.Sampling(own, top_p=1.0) for own in temperatures[:2]]
    conversations = [[], []]
    for turn in range(2):
        for conversation, question in zip(conversations, questions, strict=False):
            conversation.append({"role": "user", "content": question.turns[turn]})
        found = mj.chat(*loaded, conversations, NEW, sampling=sampling)
        for conversation, own, text in zip(conversations, turns(records), found, strict=False):
            assert own[turn] == text.strip()
            conversation.append({"role": "assistant", "content": own[turn]})
    assert any(map(any, turns(records)))


def test_records_have_the_fields_of_fastchat(answered):
    for record in answered[0]:
        assert list(record) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert uuid.UUID(record["answer_id"]).version == 4
        assert record["model_id"] == "tiny"
        assert [list(choice) for choice in record["choices"]] == [["index", "turns"]]
        assert record["choices"][0]["index"] == 0
        assert isinstance(record["tstamp"], float)
    assert len({record["answer_id"] for record in answered[0]}) == len(QUESTIONS)


def test_a_run_that_was_killed_goes_on(loaded, questions, answered, tmp_path):
    path = tmp_path / "tiny.jsonl"
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    run = {"slots": 2, "new_tokens": NEW}
    with pytest.raises(KeyboardInterrupt):
        mt_bench.answer(*loaded, questions, path, "tiny", report=stop, **run)
    kept = lines(path)
    assert len(kept) == 2
    assert seen == [(0, 5), (1, 5), (2, 5)]
    with open(path, "a") as file:
        file.write('{"question_id": 10, "answer_id": "cut o')
    seen.clear()
    records = mt_bench.answer(
        *(*loaded, questions, path, "tiny"), report=lambda *counts: seen.append(counts), **run
    )
    assert seen == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert lines(path) == records
    assert all(record in records for record in kept)
    # Another order gives the same texts.
    assert turns(records) == turns(answered[0])
    before = path.read_bytes()
    mt_bench.answer(*loaded, questions, path, "tiny", **run)
    assert path.read_bytes() == before
    mt_bench.answer(*loaded, questions[1:3], path, "tiny", **run)
    assert lines(path) == records[1:3]


def test_answers_share_the_room_that_is_left(loaded, caplog):
    class Engine:
        """Answers with as many words as it may."""

        def submit(self, messages, count, sampling):
            asked.append(count)
            token = tokenizer.encode(" x")[-1]
            completion = Completion([token] * count, [], "length", [], text=" x" * count)
            return types.SimpleNamespace(result=lambda: completion)

    tokenizer, asked = loaded[2], []
    question = mt_bench.Question(9, "stem", ("A", "B", "C", "D"), 0.3)
    first = len(tokenizer.encode_chat([{"role": "user", "content": "A"}]))
    work = mt_bench._Work(Engine(), tokenizer, first + 200, 70, "t")
    texts = work.answer(question)["choices"][0]["turns"]
    assert asked[0] == 70
    assert 1 <= asked[1] < 70
    assert [bool(text) for text in texts] == [True, True, False, False]
    assert "question 9 has no answer to turn 3: it has" in caplog.text


def test_a_question_that_is_too_long_is_refused_first(loaded, tmp_path):
    model, params, tokenizer = loaded
    long = mt_bench.Question(9, "stem", ("x = 1\n" * model.config.max_positions,), 0.3)
    path = tmp_path / "tiny.jsonl"
    with pytest.raises(ValueError, match="question 9 has more tokens than the model's"):
        mt_bench.answer(model, params, tokenizer, [long], path, "t")
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]\n", "line 1: it begins a JSON list"),
        ('{"question_id": 1}\n', "line 1 is no answer in FastChat's form"),
        (
            '{"question_id": [], "model_id": "tiny", "choices": [{"turns": ["a"]}]}\n',
            "line 1 is no answer in FastChat's form",
        ),
        (
            '{"question_id": 81, "model_id": "other", "choices": [{"turns": ["a", "b"]}]}\n',
            "line 1 is an answer of 'other'; expected 'tiny'",
        ),
    ],
)
def test_other_files_are_not_replaced(loaded, questions, tmp_path, content, message):
    path = tmp_path / "tiny.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        mt_bench.answer(*loaded, questions, path, "tiny")
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"category": "math", "turns": ["a"]}, "line 2 has no question_id"),
        ({"question_id": 1, "turns": ["a"]}, "line 2 has no category"),
        ({"question_id": 1, "category": "math"}, "line 2 has no turns"),
        ({"question_id": 1, "category": "math", "turns": []}, "line 2 has an empty turn or none"),
        ({"question_id": 1, "category": "math", "turns": [" "]}, "has an empty turn or none"),
        ({"question_id": 1, "category": "math", "turns": "a"}, "turns 'a'; expected a list"),
        ({"question_id": 1, "category": 2, "turns": ["a"]}, "category 2; expected a string"),
        ({"question_id": True, "category": "a", "turns": ["a"]}, "question_id True; expected an"),
        ({"question_id": 81, "category": "a", "turns": ["a"]}, "question_id 81 a second time"),
        (
            {"question_id": 1, "category": "a", "turns": ["a"], "required_temperature": -1},
            "required_temperature -1; expected a finite number",
        ),
    ],
)
def test_bad_questions_are_named(tmp_path, record, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message):
        mt_bench.read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty; expected JSON objects"):
        mt_bench.read_questions(path)


def test_the_example_has_a_question_of_each_category():
    found = mt_bench.read_questions(CONFIG_DIR / "suites" / "mt_bench.jsonl")
    assert {question.category for question in found} == set(mt_bench.TEMPERATURES)
    assert all(len(question.turns) == 2 for question in found)


@pytest.fixture
def command(folder, capsys, tmp_path, monkeypatch):
    """Runs the suite; returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        flags = ["--suite", "mt-bench", "--checkpoint", str(folder / "tiny")]
        code = evaluate.main([*flags, "--no-compilation-cache", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_a_file_for_each_checkpoint(command, folder, tmp_path, answered):
    asked = folder / "questions.jsonl", "--dtype", "float32", "--max-tokens", NEW
    asked += "--chat-form", "v1", "--limit", 2, "--batch", 2
    code, out, err = command(*asked)
    assert (code, err) == (0, "")
    assert out == "tiny answered 2 questions: results/mt-bench/tiny.jsonl\n"
    records = lines(tmp_path / "results" / "mt-bench" / "tiny.jsonl")
    assert turns(records) == turns(answered[0])[:2]
    code, out, err = command(*asked, "--results", "here", "--json")
    expected = {"model": "tiny", "questions": 2, "answers": "here/mt-bench/tiny.jsonl"}
    assert (code, err, json.loads(out)) == (0, "", expected)


def test_what_is_wrong_is_said_in_one_line(command, folder, tmp_path):
    file = folder / "questions.jsonl"
    for arguments, message in (
        ([], "has 0 files of questions; expected one FILE"),
        ([file, file], "has 2 files of questions; expected one FILE"),
        (["absent.jsonl"], "there is no file absent.jsonl"),
        ([file, "--choices", file], "--suite mt-bench does not take --choices; leave it out"),
        ([file, "--tasks", "x"], "--suite mt-bench does not take --tasks; leave it out"),
        ([file, "--results", "a", "b"], "--suite writes its results to one place"),
        ([file, "--chat-form", "none"], "the model has no chat form: it is a base model"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err
    assert not list(tmp_path.rglob("*.jsonl"))
    code = evaluate.main([str(file), "--chat-form", "v1"])
    assert code == 2
