"""Checks that programs compute the same model, by comparing their logits with float32 logits."""

from pathlib import Path

import engines
import numpy as np
import shapes
from formats import Formats

LENGTH = 100  # shorter than every window, because llama.cpp has none

# The largest difference of logits, as a share of their standard deviation. These are a few times
# the differences seen from rounding (5e-4, 1.5e-2, 4.5e-2). Rows of wq and wk in the wrong order,
# or a missing norm, give more than 0.4.
TOLERANCES = {"float32": 2e-3, "bfloat16": 5e-2, "int8": 1e-1}


def check(formats: Formats, programs: dict, dtype: str) -> dict[str, float]:
    """Compares logits with float32 logits of Transformers, or of this package if it is missing.

    Args:
      formats: the model.
      programs: the programs by name.
      dtype: the precision that the programs were loaded in.

    Returns:
      The difference of each program's logits, as a share of their standard deviation.

    Raises:
      ValueError: a difference is larger than the precision explains.
    """
    prompt = shapes.prompts(formats.config, 1, LENGTH)[0]
    exact = _reference(formats, prompt)
    found = {}
    for name, program in programs.items():
        difference = program.logits(prompt) - exact
        found[name] = float(np.sqrt(np.mean(difference**2)) / np.std(exact))
        if not found[name] <= TOLERANCES[dtype]:
            raise ValueError(
                f"the logits of {name} in {dtype} differ by {found[name]:.2g} of their spread; "
                f"expected at most {TOLERANCES[dtype]:g}, so it computes another model"
            )
    return found


def _reference(formats: Formats, prompt: list[int]) -> np.ndarray:
    """Returns the float32 logits, which are computed once and stored next to the model."""
    missing = engines.missing(engines.TRANSFORMERS)
    name = engines.OURS if missing else engines.TRANSFORMERS
    file: Path = formats.folder / f"logits-{name}.npy"
    if not file.is_file():
        np.save(file, engines.make(name, formats, "float32").logits(prompt))
    return np.load(file)
