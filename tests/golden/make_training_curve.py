"""Writes golden/training_curve.json: the losses of `training_case.py`, trained in PyTorch.

Needs torch and Transformers (`pip install '.[parity]'`). Weights and batches are drawn from the
seed again.
"""

import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parent))

import hf_reference  # noqa: E402  (it lies one folder up)
import hf_training  # noqa: E402
import reference  # noqa: E402
import training_case as case  # noqa: E402

SEED = 12


def main() -> None:
    model = hf_reference.build(case.CONFIG, reference.random_tensors(case.CONFIG, SEED)).train()
    batches = case.batches(SEED)
    losses = hf_training.train(
        model, batches, case.rates(), **case.ADAMW, microbatches=case.MICROBATCHES
    )
    curve = {"seed": SEED, "losses": [round(loss, 7) for loss in losses]}
    (GOLDEN / "training_curve.json").write_text(json.dumps(curve) + "\n")
    print(f"the loss falls from {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
