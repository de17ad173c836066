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

# The least time as a share of the estimate, on a v5e; those of the bounds once a case reaches them.
SHARES = {
    "decode-bf16-1": 0.85,
    "decode-bf16-8": 0.85,
    "decode-int8-8": 0.75,
    "room-bf16-8": 1 / 1.15,
    "prompt-bf16-v0.1-4096x1": 0.65,
}
# Temporaries of decoding are below this, in MB. A row's cache of one layer alone has 17 MB.
TEMPORARIES = dict.fromkeys(("decode-bf16-1", "decode-bf16-8", "decode-int8-8"), 20)


@pytest.fixture(scope="module")
def lines():
    """Returns the benchmark's line of each case; two compilations of two and of four layers."""
    # The settings of tests, which make programs compile faster, would change what is compiled.
    made = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, CHECKOUT / "benchmarks" / "tpu.py", "--chip", "v5e"]
    done = subprocess.run(
        [*command, *SHARES],
        env=made,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = map(json.loads, done.stdout.splitlines())
    return {line["case"]: line for line in found}


@pytest.mark.parametrize("name", SHARES)
def test_a_case_stays_as_near_to_the_limit(lines, name):
    assert SHARES[name] <= lines[name]["share"] + 5e-4  # The line is rounded.


@pytest.mark.parametrize("name", TEMPORARIES)
def test_decoding_needs_few_temporaries(lines, name):
    assert lines[name]["temporaries_mb"] < TEMPORARIES[name]
