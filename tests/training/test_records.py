"""Laws of the records: what each form teaches, with what ids, and what is refused by its line."""

import gzip
import json
import os
import random
import tracemalloc

import numpy as np
import pytest
import tokenizer_samples as samples

from mistral_jax.config import CHECKOUT
from mistral_jax.evaluation import choices, perplexity
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.training.data import records

FILES = samples.FILES | {"nano": CHECKOUT / "mistral_jax/assets/nano/tokenizer.model"}
TOKENIZERS = {name: Tokenizer.from_file(path) for name, path in FILES.items()}
EOS = 2


@pytest.fixture(params=list(FILES))
def tokenizer(request):
    return TOKENIZERS[request.param]


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture
def encode(tmp_path, tokenizer):
    """Encodes records through a file of them."""

    def encode(*values, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return list(records.read([path], tokenizer, **options))

    return encode


def learnt(tokenizer, example):
    """The ids that are learnt, and the text of the others."""
    is_learnt = example.weights > 0
    return example.tokens[is_learnt].tolist(), tokenizer.decode(example.tokens[~is_learnt].tolist())


def assert_same(example, other):
    np.testing.assert_array_equal(example.tokens, other.tokens)
    np.testing.assert_array_equal(example.weights, other.weights)


# Texts, prompts and completions


def test_a_text_is_learnt_from_its_first_token_to_eos(encode, tokenizer):
    (example,) = encode({"text": "def f():\n    pass", "id": 7})
    assert example.tokens.tolist() == tokenizer.encode("def f():\n    pass", bos=True, eos=True)
    assert example.weights.tolist() == [0] + [1] * (len(example.tokens) - 1)
    assert (example.tokens.dtype, example.weights.dtype) == (np.int32, np.float32)


def test_a_completion_goes_on_where_the_prompt_ended_as_at_inference(encode, tokenizer):
    """The prompt's ids are those of `sample`, and all the ids decode to the two texts exactly."""
    rng = random.Random(0)
    texts = [(samples.random_text(rng), samples.random_text(rng) or "\n") for _ in range(300)]
    texts += [
        ("", " a"),
        ("", "a"),
        ("a ", " b"),
        ("a\n", "    b"),
        (" ", " "),
        ("def f", "oo"),
        ("é", "\u0301"),
        ("\U0010ffff", "\U0010ffff "),
        ("[INST]", "</s>"),
    ]
    examples = encode(*({"prompt": p, "completion": c} for p, c in texts))
    for (prompt, completion), example in zip(texts, examples, strict=True):
        ids = tokenizer.encode(prompt, bos=True)
        assert example.tokens[: len(ids)].tolist() == ids
        # SentencePiece's own spelling of a space decodes to one.
        whole = (prompt + completion).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        assert tokenizer.decode(example.tokens.tolist()) == whole, (prompt, completion)
        assert example.weights.tolist() == [0] * len(ids) + [1] * (len(example.tokens) - len(ids))
        assert example.tokens[-1] == EOS


def test_a_completion_of_messages_is_the_conversation_with_its_own_answers_learnt(encode):
    prompt = [system("S"), user("a"), answer("b"), user("c")]
    completion = [answer("d"), user("e"), answer("f", weight=0.5)]
    example, whole = encode(
        {"prompt": prompt, "completion": completion},
        {"messages": [*prompt[:2], answer("b", weight=0), prompt[3], *completion]},
    )
    assert_same(example, whole)


# Conversations


def test_only_answers_and_their_eos_are_learnt_with_their_weights(encode, tokenizer):
    messages = [user("one"), answer("two", weight=0), user("three"), answer("four", weight=0.5)]
    messages += [user("five"), answer("six")]
    (example,) = encode({"messages": messages})
    four, six = (tokenizer.encode(text, eos=True) for text in ("four", "six"))
    ids, rest = learnt(tokenizer, example)
    assert ids == four + six
    assert all(word in rest for word in ("one", "two", "three", "five"))
    assert example.weights[example.weights > 0].tolist() == [0.5] * len(four) + [1.0] * len(six)
    assert example.tokens.tolist().count(EOS) == 3
    assert example.weights[-1] == 1


def test_openais_parts_and_nulls_are_mistrals_strings(encode):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rich = [user(parts), answer([{"type": "text", "text": "c"}], refusal=None, weight=None)]
    assert_same(*encode({"messages": rich}, {"messages": [user("a\n\nb"), answer("c")]}))


def test_a_form_is_told_by_its_keys_and_other_keys_do_not_matter(encode):
    a, b = encode(
        {"messages": [user("a"), answer("b")], "prompt": "p", "text": None, "tools": []},
        {"messages": [user("a"), answer("b")]},
    )
    assert_same(a, b)


# Pairs


def test_pairs_of_strings_are_two_completions_of_one_prompt(encode):
    (pair,) = encode({"prompt": "p ", "chosen": "yes", "rejected": " no"}, pairs=True)
    chosen, rejected = encode(
        {"prompt": "p ", "completion": "yes"}, {"prompt": "p ", "completion": " no"}
    )
    assert_same(pair.chosen, chosen)
    assert_same(pair.rejected, rejected)


def test_pairs_of_messages_in_three_spellings_are_the_same(encode):
    prompt = [system("S"), user("a"), answer("b"), user("c")]
    chosen, rejected = [answer("yes")], [answer("no")]
    first, *others = encode(
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"chosen": prompt + chosen, "rejected": prompt + rejected, "score": 1},
        {
            "input": {"messages": prompt, "tools": [], "parallel_tool_calls": True},
            "preferred_output": chosen,
            "non_preferred_output": rejected,
        },
        pairs=True,
    )
    for other in others:
        assert_same(first.chosen, other.chosen)
        assert_same(first.rejected, other.rejected)
    (single,) = encode({"prompt": prompt, "completion": chosen})
    assert_same(first.chosen, single)


# Files


def test_marks_line_ends_blank_lines_and_gzip_do_not_matter(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in ("one\u2028é", "two", "three")]
    plain, windows, packed = (tmp_path / n for n in ("a.jsonl", "b.jsonl", "c.jsonl.gz"))
    plain.write_text("\n".join(lines))
    windows.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n  \r\n".join(lines).encode() + b"\r\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected = list(records.read([plain], tokenizer))
    for other in (windows, packed):
        for a, b in zip(expected, records.read([other], tokenizer), strict=True):
            assert_same(a, b)
    assert len(list(records.read([plain, str(windows)], tokenizer))) == 6


def test_a_file_is_read_as_it_is_needed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\nno JSON\n')
    stream = records.read([path], TOKENIZERS["v3"])
    assert len(next(stream).tokens) == 3
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: character 1 is not JSON"):
        next(stream)


def test_a_folder_of_datasets_is_read_row_by_row(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [user("a", weight=None), answer("b", weight=0.5)], "text": None}]
    rows += [{"messages": None, "text": "c"}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = (list(records.read([p], tokenizer)) for p in (tmp_path / "data", path))
    for one, other in zip(a, b, strict=True):
        assert_same(one, other)
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match=r"dict has the splits test, train; name one"):
        list(records.read([tmp_path / "dict"], tokenizer))


def test_a_folder_needs_datasets_and_says_so(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is a folder, but not one that `datasets` saved"):
        list(records.read([tmp_path], TOKENIZERS["v3"]))
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'mistral-jax-flax\[datasets\]'"):
        list(records.read([tmp_path], TOKENIZERS["v3"]))


# Mistakes

HELLO = [user("a"), answer("b")]
BAD = [
    (b"{", "character 1 is not JSON"),
    (b'{"text": "\xff"}', "byte 11 (0xff) is not UTF-8"),
    (b'  ["a"]', "it begins a JSON list; expected JSON Lines: one object per line"),
    (b"[", "it begins a JSON list; expected JSON Lines"),
    (b"7", "it is a JSON int; expected an object"),
    (b'{"a":' * 100_000, "its JSON is nested too deeply"),
    ({}, 'it has no keys; expected "text" or "prompt" with "completion" or "messages"'),
    ({"prompt": "a", "id": 1}, 'it has "id", "prompt"; expected "text" or'),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'it has "chosen", "prompt", "rejected", as'),
    ({"text": "a", "messages": HELLO}, 'it has "text" and "messages"; expected one of these'),
    ({"text": ""}, '"text" is empty'),
    ({"text": 1}, '"text" is a int; expected a string'),
    ({"text": "\ud800"}, "the text has a lone surrogate"),
    ({"prompt": "a", "completion": ""}, '"completion" is empty'),
    ({"prompt": "a", "completion": [answer("b")]}, '"prompt" and "completion" are str and list'),
    ({"prompt": {}, "completion": {}}, '"prompt" and "completion" are dict and dict'),
    ({"messages": "a"}, '"messages" is a str; expected a list'),
    ({"messages": {"role": "user"}}, '"messages" is a dict; expected a list'),
    ({"messages": []}, "the conversation is empty"),
    ({"messages": [1]}, "messages[0] is 1; expected a dict"),
    ({"messages": [user("a")]}, "messages[0] is the last message and not an answer"),
    ({"messages": [user("a"), answer("")]}, "an answer is empty"),
    ({"messages": [user("a"), answer("b", weight=0)]}, "no answer is to be learnt"),
    ({"messages": [user("a"), answer("b", prefix=True)]}, "messages[1] has a prefix to continue"),
    ({"messages": [user("a", weight=1), answer("b")]}, "messages[0] has a weight and role 'user'"),
    ({"messages": [user("a"), answer("b", weight=-1)]}, "messages[1] has weight -1; expected a"),
    ({"messages": [user("a"), answer("b", weight=float("nan"))]}, "messages[1] has weight nan"),
    ({"messages": [user("a"), answer("b", weight=10**400)]}, "messages[1] has weight 1000"),
    ({"messages": [user("a"), answer("b", weight=True)]}, "messages[1] has weight True"),
    ({"messages": [*HELLO, answer("c", weight=0)]}, "answers in a row are joined, but these have"),
    ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "messages[1] has role 'tool'"),
    ({"messages": [user("a"), answer("b", tool_calls=[1])]}, "messages[1] has 'tool_calls'"),
    ({"messages": HELLO, "tools": [{}]}, "tools[0] is {}; expected"),
    ({"messages": HELLO, "functions": [{}]}, 'it has "functions"; expected "tools" beside "mess'),
]
CHOSEN = {"chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]}
BAD_PAIRS = [
    ({"text": "a"}, 'it has "text", as for training without pairs; expected "chosen" with "rej'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, '"chosen" and "rejected" are the same'),
    ({"chosen": "ab", "rejected": "ac"}, 'it has no "prompt"'),
    ({**CHOSEN, "prompt": "a"}, '"prompt" and "chosen" are str and list; expected two strings'),
    ({**CHOSEN, "rejected": [user("a")]}, '"chosen" and "rejected" part at messages[1]; expec'),
    ({**CHOSEN, "rejected": [user("c")]}, '"chosen" and "rejected" part at messages[0]; expec'),
    ({**CHOSEN, "rejected": []}, '"chosen" and "rejected" part at messages[0]'),
    ({"chosen": [1], "rejected": [2]}, '"chosen" and "rejected" part at messages[0]'),
    ({"input": [], "preferred_output": [], "non_preferred_output": [1]}, '"input" has no "messa'),
]


@pytest.mark.parametrize(
    ("record", "problem", "pairs"),
    [(*case, False) for case in BAD] + [(*case, True) for case in BAD_PAIRS],
)
def test_a_bad_record_is_named_by_file_and_line_or_skipped(tmp_path, record, problem, pairs):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"} if pairs else {"text": "a"}
    path = tmp_path / "data.jsonl"
    bad = record if isinstance(record, bytes) else json.dumps(record).encode()
    path.write_bytes(b"\n".join([json.dumps(good).encode(), b"", bad, json.dumps(good).encode()]))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        list(records.read([path], TOKENIZERS["v3"], pairs=pairs))
    assert str(error.value).startswith(f"{path}, line 3: {problem}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250 + len(str(path))
    tally = records.Tally()
    read = records.read([path], TOKENIZERS["v3"], pairs=pairs, skip_bad=True, tally=tally)
    assert len(list(read)) == 2
    assert (tally.good, tally.bad, tally.reasons) == (2, 1, [str(error.value)])


def test_of_many_bad_records_the_first_few_reasons_are_kept(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("bad\n" * 100)
    tally = records.Tally()
    read = records.read([path], TOKENIZERS["v3"], skip_bad=True, tally=tally)
    with pytest.raises(ValueError, match=r"^all records are bad, 100 of them, .*line 1: character"):
        next(read)
    assert tally.bad == 100
    assert [reason.split(":")[0][-6:] for reason in tally.reasons] == [
        f"line {i}" for i in range(1, 6)
    ]


def test_a_file_that_is_not_there_or_cut_is_an_error_though_bad_records_are_skipped(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        list(records.read([tmp_path / "x"], TOKENIZERS["v3"], skip_bad=True))
    path = tmp_path / "data.jsonl.gz"
    for damaged in (b"no gzip", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole gzip file"):
            list(records.read([path], TOKENIZERS["v3"], skip_bad=True))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "chosen": HELLO}, False),
        ({"prompt": "a", "completion": "b"}, False),
        ({"prompt": [user("a")], "completion": [answer("b")], "text": None}, True),
        ({"messages": HELLO}, True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, False),
        (CHOSEN, True),
        (
            {
                "input": {"messages": [user("a")]},
                "preferred_output": [answer("b")],
                "non_preferred_output": [answer("c")],
            },
            True,
        ),
    ],
)
def test_conversations_are_known_by_the_first_good_record(tmp_path, record, expected):
    """Not by one that is parsed but bad, nor by a later one."""
    pairs = not record.keys() & {"text", "completion", "messages"}
    kinds = [CHOSEN, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    others = kinds if pairs else [{"messages": HELLO}, {"text": "a"}]
    other = others[expected]
    bad = {"messages": []} if not expected else {"text": ""}
    path, tally = tmp_path / "x.jsonl", records.Tally()
    path.write_text("".join(json.dumps(line) + "\n" for line in (bad, record, other)))
    for _ in records.read([path], TOKENIZERS["v3"], pairs=pairs, skip_bad=True, tally=tally):
        assert tally.chat is expected
    assert (tally.good, tally.bad) == (2, 1)


HOSTILE = [
    *(
        "NaN",
        "1e400",
        "-1",
        "true",
        "null",
        "[]",
        "{}",
        "[[]]",
        '"\\ud800"',
        '"\\u0000"',
        "1" * 5000,
    ),
    *("[" * 70 + "]" * 70, "[" * 100_000 + "]" * 100_000, '"' + "x" * 50_000 + '"'),
    '[{"role": ["user"], "content": "x"}]',
    '[{"role": "user", "content": [{"type": "text", "text": 1}]}]',
    *(
        json.dumps([user("x"), answer("y", weight="@")]).replace('"@"', weight)
        for weight in ("NaN", "1e400", "1e-300", "true", "[]")
    ),
]
FORMS = [
    {"text": "x"},
    {"prompt": "x", "completion": "y"},
    {"messages": [user("x"), answer("y", weight=0.5)]},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"input": {"messages": [user("x")]}, "preferred_output": [], "non_preferred_output": [1]},
    {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
]


def mutated(rng):
    """A line of a file: a record with a hostile value, or with bytes that are others."""
    record = dict(rng.choice(FORMS))
    if rng.random() < 0.6:
        record[rng.choice([*record, "tools", "x"])] = "@"
        return json.dumps(record).replace('"@"', rng.choice(HOSTILE)).encode()
    line = bytearray(json.dumps(record).encode())
    for _ in range(3):
        place = rng.randrange(len(line))
        line[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(line)


def test_any_file_is_read_or_refused_in_one_sentence(tmp_path):
    """Of training and of evaluation, packed or not."""
    rng = random.Random(0)
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    for _ in range(150):
        data = b"\n".join(mutated(rng) for _ in range(rng.randint(1, 2)))
        plain.write_bytes(data)
        whole = gzip.compress(data, mtime=0)
        packed.write_bytes(whole[: rng.randrange(2 * len(whole))])
        options = {"pairs": rng.random() < 0.5, "skip_bad": rng.random() < 0.5}
        for task in (
            lambda: [*records.read([plain], TOKENIZERS["nano"], **options)],  # noqa: B023
            lambda: [*records.read([packed], TOKENIZERS["nano"], **options)],  # noqa: B023
            lambda: choices.read(plain),
            lambda: perplexity.read_texts(packed),
        ):
            try:
                task()
            except ValueError as error:
                assert str(error).startswith(("all records are bad", "there are no", str(tmp_path)))  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017


def test_a_pipe_is_refused_for_it_is_read_more_than_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is a pipe; expected .*: save its output in one first"):
        list(records.read([tmp_path / "pipe"], TOKENIZERS["nano"]))


def test_a_long_line_is_refused_in_bounded_memory(tmp_path):
    """Also where a few bytes unpack to it."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(20):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 1 has more than 16\.8 MB"):
        list(records.read([tmp_path / "a.jsonl.gz"], TOKENIZERS["nano"]))
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
