"""Runs `python -m mistral_jax.train`; see `cli/train.py`."""

import sys

from mistral_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
