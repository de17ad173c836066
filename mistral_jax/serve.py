"""Runs `python -m mistral_jax.serve`; see `cli/serve.py`."""

import sys

from mistral_jax.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
