"""Measures a checkpoint's bits per byte on held-out Python source, beside `xz -9`.

The text is the first 6000 characters of each file of development tools, which are not in the
bundled model's training data. Files that share lines with that data (vendored or copied code) are
left out.

    python benchmarks/heldout.py [--checkpoint FOLDER] [--every N] [DISTRIBUTION...]
"""

import argparse
import json
import lzma

import mistral_jax
from mistral_jax.config import CONFIG_DIR
from mistral_jax.training.data import corpus
from mistral_jax.training.recipe import Recipe

CHARACTERS = 6000
TOOLS = ("mistral_common", "pip", "pluggy", "pytest", "setuptools")
SHORT_LINE = 30  # shorter lines occur in unrelated files too
MOST_SHARED = 0.1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("distributions", nargs="*", default=TOOLS, metavar="DISTRIBUTION")
    parser.add_argument("--checkpoint", help="default: the bundled model")
    parser.add_argument("--every", type=int, default=1, help="read only every Nth file")
    arguments = parser.parse_args()

    model, params, tokenizer = mistral_jax.load(arguments.checkpoint, dtype="float32")
    texts, shared = held_out(arguments.distributions)
    texts = texts[:: arguments.every]
    size = sum(len(text.encode()) for text in texts)
    bits = xz_bits = 0.0
    for text in texts:
        score = mistral_jax.score(model, params, tokenizer, text)
        bits += score.bits_per_byte * score.bytes
        xz_bits += 8 * len(lzma.compress(text.encode(), preset=9))
    result = {
        "files": len(texts),
        "left_out": shared,
        "bytes": size,
        "bits_per_byte": round(bits / size, 4),
        "xz_bits_per_byte": round(xz_bits / size, 4),
        "ratio": round(bits / xz_bits, 4),
    }
    print(json.dumps(result))


def held_out(distributions):
    """Returns the texts, and the number of files left out for sharing lines with the corpus."""
    recipe = Recipe.from_file(CONFIG_DIR / "training" / "nano.toml")
    seen = {
        line
        for source in corpus.gather(recipe.corpus)
        for text in source.files.values()
        for line in long_lines(text)
    }
    texts = [
        text[:CHARACTERS]
        for name in distributions
        for text in corpus.python_files(name).values()
        if len(text) >= CHARACTERS
    ]
    fresh = [text for text in texts if share(long_lines(text), seen) <= MOST_SHARED]
    return fresh, len(texts) - len(fresh)


def long_lines(text):
    return [line.strip() for line in text.splitlines() if len(line.strip()) > SHORT_LINE]


def share(lines, seen):
    return sum(line in seen for line in lines) / max(1, len(lines))


if __name__ == "__main__":
    main()
