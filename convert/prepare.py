"""A model by whatever name one has for it, ready to load. It converts nothing itself."""

from pathlib import Path

from mistral_jax import manifest
from mistral_jax.progress import Screen

from .to_orbax import to_orbax


def prepare(model: Path | str | None, folder: Path | str = "checkpoints") -> Path | None:
    """Returns the checkpoint folder of a model, converting it once if it is not one, with a bar.

    It is for notebooks, where one name at the top decides which model is used.

    Args:
      model: a checkpoint folder; or what `to_orbax` converts: a PyTorch checkpoint's folder, or the
        name of a repository on the Hugging Face Hub. None = the model that comes with the package.
      folder: where converted checkpoints are put, each under the last part of its model's name.

    Returns:
      What `mistral_jax.load` takes: a folder, or None.

    Raises:
      ValueError: as `to_orbax`.
    """
    if model is None:
        return None
    if manifest.is_checkpoint(model):
        return Path(model)
    target = Path(folder) / Path(model).resolve().name
    if not manifest.is_checkpoint(target):
        to_orbax(model, target, progress=Screen())
    return target
