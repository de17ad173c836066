"""Whether programs compute the same model: the logits of a prompt, beside those in float32."""

from pathlib import Path

import engines
import numpy as np
import shapes
from formats import Formats

LENGTH = 100  # below every window, which llama.cpp does not know

# Most that logits may differ, as a share of their spread: some times what was seen of rounding
# (5e-4, 1.5e-2, 4.5e-2). Rows of wq and wk in the wrong order, or a norm left out, give above 0.4.
TOLERANCES = {"float32": 2e-3, "bfloat16": 5e-2, "int8": 1e-1}


def check(formats: Formats, programs: dict, dtype: str) -> dict[str, float]:
    """Compares logits in a precision with those in float32 by Transformers, else by ours.

    Args:
      formats: the model.
      programs: by name.
      dtype: what they were loaded in.

    Returns:
      How much the logits of each program differ, as a share of their spread.

    Raises:
      ValueError: they differ more than the precision explains.
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
                f"expected at most {TOLERANCES[dtype]:g}: it computes another model"
            )
    return found


def _reference(formats: Formats, prompt: list[int]) -> np.ndarray:
    """Returns the exact logits, computed once and kept beside the model."""
    missing = engines.missing(engines.TRANSFORMERS)
    name = engines.OURS if missing else engines.TRANSFORMERS
    file: Path = formats.folder / f"logits-{name}.npy"
    if not file.is_file():
        np.save(file, engines.make(name, formats, "float32").logits(prompt))
    return np.load(file)
