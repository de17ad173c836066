"""Runs `python -m mistral_jax.sample`; see `cli/sample.py`."""

import sys

from mistral_jax.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
