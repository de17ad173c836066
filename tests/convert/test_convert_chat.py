"""The chat form from a source to a checkpoint, a trained model and an export."""

import json
import shutil

import chat_templates
import pytest
import sources
import tokenizer_samples as samples
from conversations import said
from sources import Heard

import mistral_jax as mj
from convert import chat
from convert.inspect import inspect
from convert.source import Source
from convert.to_orbax import to_orbax
from convert.to_torch import to_torch
from mistral_jax.checkpoint import checkpoint, manifest
from mistral_jax.tokens.chat import ChatForm
from mistral_jax.tokens.tokenizer import Tokenizer

SIZE = 600
HELLO = [said("user", "Hello")]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return samples.train_small_mistral(tmp_path_factory.mktemp("chat") / "tokenizer.model")


def write_source(folder, vocabulary, template=None, **config):
    """A source of Hugging Face's form; ChatML's tokens come after the vocabulary."""
    size = Tokenizer.from_file(vocabulary).vocab_size
    sources.write(
        folder, "hf-safetensors", sources.tensors(vocab_size=size + 2), vocab_size=size + 2
    )
    shutil.copyfile(vocabulary, folder / "tokenizer.model")
    added = {str(size): {"content": "<|im_start|>"}, str(size + 1): {"content": "<|im_end|>"}}
    described = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "bos_token": "<s>"}
    if template is not None:
        described["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(described | config))
    return folder


def test_a_template_goes_with_the_model(tmp_path, vocabulary):
    source = write_source(tmp_path / "s", vocabulary, chat_templates.CHATML)
    heard = Heard()
    to_orbax(source, tmp_path / "x", progress=heard)
    assert "conversations have the form of the source's own chat template" in heard.said
    model, params, tokenizer = mj.load(tmp_path / "x")
    assert tokenizer.chat_form == "template"
    assert json.loads((tmp_path / "x/config.json").read_text())["chat_form"] == "template"
    assert (tmp_path / "x/chat_template.jinja").read_text() == chat_templates.CHATML
    end = tokenizer.control("<|im_end|>")
    assert end in model.config.eos_ids
    ids = tokenizer.encode_chat(HELLO)
    assert ids[0] == tokenizer.control("<|im_start|>")
    assert ids.count(end) == 1
    assert isinstance(mj.chat(model, params, tokenizer, HELLO, max_new_tokens=2), str)
    learnt = tokenizer.encode_lesson([*HELLO, said("assistant", "a")])
    assert [i for i, weight in zip(*learnt, strict=True) if weight][-1] == end
    assert dict(inspect(tmp_path / "x"))["chat form"] == "template"

    mj.save(tmp_path / "y", model.config, params, tmp_path / "x/tokenizer.model")
    assert mj.load(tmp_path / "y")[2].encode_chat(HELLO) == ids
    assert manifest.kept(tmp_path / "y") is None
    manifest.verify(tmp_path / "y")
    to_torch(tmp_path / "y", tmp_path / "z")
    assert (tmp_path / "z/chat_template.jinja").read_text() == chat_templates.CHATML
    to_torch(tmp_path / "y", tmp_path / "z", overwrite=True)
    assert mj.load(tmp_path / "x", chat_form="v2")[2].encode_chat(HELLO)[1] == 3


def test_a_form_is_chosen_by_name_at_conversion(tmp_path, vocabulary):
    source = write_source(tmp_path / "s", vocabulary, chat_templates.CHATML)
    to_orbax(source, tmp_path / "x", chat_form="v2")
    tokenizer = mj.load(tmp_path / "x")[2]
    assert tokenizer.chat_form == "v2"
    assert tokenizer.encode_chat(HELLO)[1] == 3
    tokenizer.chat_form = "template"  # It is kept.
    assert tokenizer.encode_chat(HELLO)[0] == tokenizer.control("<|im_start|>")
    bare = write_source(tmp_path / "t", vocabulary)
    with pytest.raises(ValueError, match="has no chat template; expected one in tokenizer_config"):
        to_orbax(bare, tmp_path / "y", chat_form="template")
    with pytest.raises(ValueError, match="there is no chat form 'v4'; expected v1, v2, v3"):
        to_orbax(bare, tmp_path / "y", chat_form="v4")


def test_a_checkpoint_without_a_form_has_that_of_its_tokenizer(tmp_path, vocabulary):
    source = write_source(tmp_path / "s", vocabulary)
    to_orbax(source, tmp_path / "x")
    contents = json.loads((tmp_path / "x/config.json").read_text())
    assert contents.pop("chat_form") == "v2"
    (tmp_path / "x/config.json").write_text(json.dumps(contents))
    assert mj.load(tmp_path / "x")[2].chat_form == "v2"
    (tmp_path / "x/config.json").write_text(json.dumps(contents | {"chat_form": "v4"}))
    with pytest.raises(ValueError, match=r"config.json has chat_form 'v4'; expected one of v1"):
        mj.load(tmp_path / "x")
    (tmp_path / "x/config.json").write_text(json.dumps(contents | {"chat_form": "template"}))
    with pytest.raises(ValueError, match=r"has no chat_template.jinja, which its chat form needs"):
        mj.load(tmp_path / "x")


def test_a_saved_model_keeps_a_form_that_is_named(tmp_path, vocabulary):
    to_orbax(write_source(tmp_path / "s", vocabulary), tmp_path / "x")
    model, params, _ = mj.load(tmp_path / "x")
    checkpoint.save(
        tmp_path / "y",
        model.config,
        params,
        tmp_path / "x/tokenizer.model",
        chat=ChatForm("none"),
    )
    assert mj.load(tmp_path / "y")[2].chat_form == "none"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, "v1"),
        (chat_templates.CHATML, "template"),
        (chat_templates.ZEPHYR, "template"),
        (chat_templates.VICUNA, "template"),
        (chat_templates.INST, "v1"),
        (chat_templates.LLAMA, "llama-2"),
        ("{{ broken", "template"),
        ([{"name": "default", "template": chat_templates.INST}], "v1"),
        ([{"name": "rag", "template": "x"}], "v1"),
    ],
)
def test_a_template_that_is_like_a_named_form_is_that_form(tmp_path, template, form):
    described = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    source = Source(tmp_path, "hf-safetensors", (), None, (), ())
    tokenizer = Tokenizer.from_file(samples.FILES["v1"])
    assert chat.choose(source, tokenizer).name == form
    assert tokenizer.chat is None


def test_llama_without_a_template_has_its_own_form(tmp_path):
    tokenizer = Tokenizer.from_file(samples.FILES["v1"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    source = Source(tmp_path, "hf-safetensors", (), None, (), ())
    assert chat.choose(source, tokenizer).name == "llama-2"
    (tmp_path / "params.json").write_text('{"dim": 8, "multiple_of": 256}')
    source = Source(tmp_path, "official-torch", (), None, (), ())
    assert chat.choose(source, tokenizer).name == "llama-2"
    (tmp_path / "params.json").write_text('{"dim": 8, "hidden_dim": 16}')
    assert chat.choose(source, tokenizer).name == "v1"


@pytest.mark.parametrize("template", [7, [7], [{"name": "default"}], {"x": 1}])
def test_a_bad_template_is_refused_by_its_file(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    source = Source(tmp_path, "hf-safetensors", (), None, (), ())
    with pytest.raises(ValueError, match=r"tokenizer_config.json has chat_template .*; expected a"):
        chat.choose(source, Tokenizer.from_file(samples.FILES["v1"]))


def test_a_template_for_tools_is_used_if_there_are_tools(tmp_path, vocabulary):
    (tmp_path / "s").mkdir()
    templates = [
        {"name": "default", "template": chat_templates.CHATML},
        {"name": "tool_use", "template": chat_templates.TOOLS},
    ]
    source = write_source(tmp_path / "s", vocabulary, templates)
    to_orbax(source, tmp_path / "x")
    tokenizer = mj.load(tmp_path / "x")[2]
    text = tokenizer.decode(
        tokenizer.encode_chat(HELLO, tools=[{"function": {"name": "add", "parameters": {}}}])
    )
    assert '{"function": {"name": "add"' in text
    to_torch(tmp_path / "x", tmp_path / "y")
    found = (tmp_path / "y/additional_chat_templates/tool_use.jinja").read_text()
    assert found == chat_templates.TOOLS
    to_torch(tmp_path / "x", tmp_path / "y", overwrite=True)
    to_orbax(tmp_path / "y", tmp_path / "z")
    assert mj.load(tmp_path / "z")[2].chat.templates == tokenizer.chat.templates
