"""Chat templates against Transformers: equal ids, and equal masks of what is learnt."""

import json
import random
import shutil

import chat_templates
import pytest
import tokenizer_samples as samples
from conversations import said, short_text
from transformers import AutoTokenizer

from convert import chat
from convert.source import Source
from mistral_jax.tokens.tokenizer import Tokenizer

ADDED = {32000: "<|im_start|>", 32001: "<|im_end|>"}


def _read(folder, template, spm, **config):
    """Returns our tokenizer and Transformers' for a folder as fine-tunes publish it."""
    folder.mkdir()
    added = {
        str(token): {"content": text, "special": True, "normalized": False}
        for token, text in ADDED.items()
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    described = {**named, "added_tokens_decoder": added, "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    shutil.copyfile(samples.FILES["v1"], folder / "tokenizer.model")
    theirs = AutoTokenizer.from_pretrained(folder)
    if not spm:
        theirs.save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
        theirs = AutoTokenizer.from_pretrained(folder)
    file = folder / ("tokenizer.model" if spm else "tokenizer.json")
    ours = Tokenizer.from_file(file, 32002, bos_id=1, eos_id=2)
    source = Source(folder, "hf-safetensors", (), file, (), ())
    ours.chat = chat.choose(source, ours, "template")
    return ours, theirs


@pytest.mark.parametrize("spm", [True, False], ids=["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", [*chat_templates.ALL])
def test_ids_equal_transformers(tmp_path, name, legacy, spm):
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    ours, theirs = _read(tmp_path / "x", chat_templates.ALL[name], spm, **options)
    rng = random.Random(0)
    for _ in range(30):
        roles = ["user", "assistant"] * rng.randrange(1, 4)
        messages = [said(role, _harmless(rng)) for role in roles]
        if name != "inst" and rng.random() < 0.5:
            messages.insert(0, said("system", _harmless(rng)))
        for asks in (True, False):
            given = messages[:-1] if asks else messages
            expected = theirs.apply_chat_template(given, add_generation_prompt=asks)["input_ids"]
            found = ours.encode_chat(given) if asks else ours.encode_lesson(given)[0]
            if asks or name != "inst":
                assert found == expected


def _harmless(rng):
    """A text that spells no special token, which Transformers would read as one."""
    text = short_text(rng)
    for token in ("<s>", "</s>", "<unk>"):
        text = text.replace(token, "")
    return "x " + text.strip()


def test_masks_equal_transformers(tmp_path):
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    ours, theirs = _read(tmp_path / "x", chat_templates.GENERATION, False, **options)
    rng = random.Random(1)
    for _ in range(30):
        messages = [said(role, _harmless(rng)) for role in ("user", "assistant") * 2]
        found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        ids, weights = ours.encode_lesson(messages)
        assert ids == found["input_ids"]
        assert weights == found["assistant_masks"]


def test_tools_and_calls_equal_transformers(tmp_path):
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    ours, theirs = _read(tmp_path / "x", chat_templates.TOOLS, True, **options)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"é": ["<", 1.5, None]}}}
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"a": "</x>"}}}
    messages = [said("user", "Hi"), said("assistant", "", tool_calls=[call]), said("tool", "2")]
    expected = theirs.apply_chat_template(messages, tools=[tool], add_generation_prompt=True)
    assert ours.encode_chat(messages, tools=[tool]) == expected["input_ids"]
