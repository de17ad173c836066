"""The TPU compiler's estimates of Mistral 7B stay as close to the chip's limits as they have come.

`benchmarks/tpu.py` says what each case is, and has the bounds that all of them shall reach.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from mistral_jax.config import CHECKOUT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu-compiler]'",
    ),
]

# The least time as a share of the estimate, by chip and case; those of the bounds once a case
# reaches them.
PROMPT = "prompt-bf16-v0.1-4096x1"
SHARES = {
    ("v5e", "decode-bf16-1"): 0.85,
    ("v5e", "decode-bf16-8"): 0.85,
    ("v5e", "decode-int8-8"): 0.75,
    ("v5e", "room-bf16-8"): 1 / 1.15,
    ("v5e", PROMPT): 0.65,
    ("v6e", PROMPT): 0.65,
}
# Temporaries of decoding are below this, in MB. A row's cache of one layer alone has 17 MB.
TEMPORARIES = dict.fromkeys(("decode-bf16-1", "decode-bf16-8", "decode-int8-8"), 20)


@pytest.fixture(scope="module")
def lines():
    """Returns the benchmark's line of each chip and case.

    Steps are compiled with two and with four layers. One and two are enough for prompts, whose
    products are too long to be copied ahead.
    """
    steps = [name for chip, name in SHARES if name != PROMPT]
    return measure("v5e", "2", "4", *steps) | {
        key: line
        for chip in ("v5e", "v6e")
        for key, line in measure(chip, "1", "2", PROMPT).items()
    }


def measure(chip, few, more, *names):
    # The settings of tests, which make programs compile faster, would change what is compiled.
    made = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, CHECKOUT / "benchmarks" / "tpu.py", "--chip", chip]
    done = subprocess.run(
        [*command, "--layers", few, more, "--", *names],
        env=made,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = map(json.loads, done.stdout.splitlines())
    return {(chip, line["case"]): line for line in found}


@pytest.mark.parametrize(("chip", "name"), SHARES)
def test_a_case_stays_as_near_to_the_limit(lines, chip, name):
    # The line is rounded.
    assert SHARES[chip, name] <= lines[chip, name]["share"] + 5e-4


@pytest.mark.parametrize("name", TEMPORARIES)
def test_decoding_needs_few_temporaries(lines, name):
    assert lines["v5e", name]["temporaries_mb"] < TEMPORARIES[name]
