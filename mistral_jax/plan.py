"""Runs `python -m mistral_jax.plan`; see `cli/plan.py`."""

import sys

from mistral_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
