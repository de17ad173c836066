"""An exported tokenizer, as Transformers loads it, and ours: the same ids, and the same ends."""

import random
import subprocess
import sys

import jinja2
import pytest
import sources
import tiny
import tokenizer_samples as samples
import torch
import transformers
from conversations import finished_conversation, random_conversation
from sources import Heard

from convert.to_orbax import to_orbax
from convert.to_torch import to_torch
from mistral_jax.checkpoint import checkpoint
from mistral_jax.tokens.tokenizer import Tokenizer

NAMES = ("v1", "v2", "v3", "v7", "nano", "small", "bare")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Mistral's own, the bundled one, which has user-defined pieces, and small ones."""
    folder = tmp_path_factory.mktemp("tokenizers")
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    bare = samples.train(
        folder / "bare.model", add_dummy_prefix=False, user_defined_symbols=["ab", "▁▁"], **options
    )
    return samples.FILES | {
        "v7": samples.V7_FILE,
        "nano": checkpoint.BUNDLED / "tokenizer.model",
        "small": samples.train_small_mistral(folder / "small.model"),
        "bare": bare,  # no bytes and no space in front
        "plain": samples.train(folder / "plain.model"),
    }


def export(file, folder):
    """Exports a tiny model with a tokenizer; returns both sides, and what was said."""
    heard, ours = Heard(), Tokenizer.from_file(file)
    model, params = tiny.build(vocab_size=ours.vocab_size, dim=8, n_layers=1, hidden_dim=8)
    checkpoint.save(folder / "x", model.config, params, file)
    to_torch(folder / "x", folder / "hf", progress=heard)
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "hf"), heard.said


@pytest.fixture(scope="module")
def pairs(files, tmp_path_factory):
    return {name: export(files[name], tmp_path_factory.mktemp(name))[:2] for name in NAMES}


@pytest.fixture(params=NAMES)
def pair(request, pairs):
    return pairs[request.param]


def texts(rng, ours):
    """Yields texts of all kinds: of words, of pieces, of runs of few characters."""
    ids = [i for i in range(ours.vocab_size) if not ours.is_control(i)]
    spelled = [ours.piece(i).replace("▁", " ") for i in ids]
    characters = sorted(set("".join(spelled)))
    while True:
        yield samples.random_text(rng)
        yield "".join(rng.choices(spelled, k=rng.randrange(8)))
        yield "".join(rng.choices(spelled, k=2)) * rng.randrange(6)
        yield "".join(rng.choices("ab \n<0x1>", k=rng.randrange(20)))
        yield "".join(rng.choices(rng.choices(characters, k=2), k=rng.randrange(20)))
        yield rng.choice(characters) * rng.randrange(70)


def spells_control(theirs, *parts):
    """Tells whether a text spells a control token, which Transformers takes for one."""
    special = [token.content for token in theirs.added_tokens_decoder.values()]
    return any(token in part for token in special for part in parts)


def test_texts_have_the_same_ids_and_ids_the_same_text(pair, seed):
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    rng, count = random.Random(seed), 0
    for text in texts(rng, ours):
        if spells_control(theirs, text):
            continue
        ids = ours.encode(text, bos=True)
        assert theirs(text).input_ids == ids, text
        assert theirs(text, add_special_tokens=False).input_ids == ids[1:], text
        if "⁇" not in ours.decode(ids):  # how SentencePiece shows an unknown character
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        count += 1
        if count == 600:
            return


def test_what_is_typed_is_text_where_transformers_is_told_so(pairs, seed):
    rng = random.Random(seed)
    for name in NAMES:
        ours, theirs = pairs[name]
        folder = theirs.name_or_path
        theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
        control = [ours.piece(i) for i in range(ours.vocab_size) if ours.is_control(i)]
        for _ in range(100):
            text = "".join(rng.choices([*control, "<unk>", "<0x41>", "\n", "ab", " "], k=6))
            assert theirs(text).input_ids == ours.encode(text, bos=True), text


def test_conversations_have_the_same_ids(pair, seed):
    ours, theirs = pair
    if theirs.chat_template is None:
        return
    rng, count = random.Random(seed), 0
    while count < 100:
        messages, lesson = random_conversation(rng), finished_conversation(rng)
        if spells_control(theirs, *(m["content"] for m in (*messages, *lesson))):
            continue
        if rng.random() < 0.3:
            for message in messages:
                part = {"type": "text", "text": message["content"]}
                message["content"] = [part, {"type": "text", "text": ""}, part]
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert found["input_ids"] == ours.encode_chat(messages)
        found = theirs.apply_chat_template(lesson)
        assert found["input_ids"] == ours.encode_lesson(lesson)[0]
        count += 1
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "[2,"}
    found = theirs.apply_chat_template([question, answer], continue_final_message=True)
    assert found["input_ids"] == ours.encode_chat([question, answer | {"prefix": True}])


def test_a_form_that_no_template_has_gets_none(pairs):
    """Of a later version, or where a question and its answer are not divided by a space."""
    assert [name for name in NAMES if pairs[name][1].chat_template is None] == ["v7", "bare"]


def test_conversations_that_we_refuse_are_refused(pair):
    ours, theirs = pair
    if theirs.chat_template is None:
        return
    system, user, answer = ({"role": r, "content": "a"} for r in ("system", "user", "assistant"))
    image = {"role": "user", "content": [{"type": "image", "text": "a"}]}
    tool = {"role": "tool", "content": "a"}
    for messages in ([system], [answer], [user, system], [system, answer], [image], [tool]):
        with pytest.raises(ValueError, match=r"messages|conversation"):
            ours.encode_chat(messages)
        with pytest.raises(jinja2.TemplateError):
            theirs.apply_chat_template(messages)


def test_a_tokenizer_that_changes_characters_is_left_to_sentencepiece(files, tmp_path):
    ours, theirs, said = export(files["plain"], tmp_path)
    assert len(said) == 1
    assert said[0].startswith(
        "tokenizer.json is not written because the tokenizer changes characters"
    )
    for text in ("Hello, world", "a  b", "naïve ﬁne"):
        assert theirs(text).input_ids == ours.encode(text, bos=True)


def test_neither_sentencepiece_nor_protobuf_is_needed(files, tmp_path):
    ours, _, said = export(files["small"], tmp_path)
    assert said == []
    program = (
        "import sys; sys.modules |= {'sentencepiece': None, 'google.protobuf': None}\n"
        "import transformers\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'hf')!r})\n"
        "print(tokenizer('import os').input_ids)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == str(ours.encode("import os", bos=True)), run.stderr


def test_generation_stops_at_every_end(files, tmp_path):
    tensors = sources.tensors(vocab_size=403)
    source = sources.write(
        tmp_path / "s", "hf-safetensors", tensors, vocab_size=403, eos_token_id=[401, 9]
    )
    (source / "tokenizer.model").write_bytes(files["small"].read_bytes())
    to_orbax(source, tmp_path / "x")
    to_torch(tmp_path / "x", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert checkpoint.load(tmp_path / "x")[0].config.eos_ids == (2, 401, 9)
    for token in (2, 401, 9, 5, 402):
        prompt = torch.tensor([[1, 20, 30]])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=3,
            do_sample=False,
            sequence_bias={(token,): 1e3},
            pad_token_id=0,
        )
        expected = [token] * (1 if token in (2, 401, 9) else 3)
        assert out[0, 3:].tolist() == expected
