"""Runs `python -m mistral_jax.evaluate`; see `cli/evaluate.py`."""

import sys

from mistral_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
