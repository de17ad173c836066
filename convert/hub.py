"""A repository of the Hugging Face Hub in place of a source folder: it fetches what is needed."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from .source import DETAILS, FORMATS, TOKENIZERS, Source, find


def is_repository(name: Path | str) -> bool:
    """Tells whether `name` looks like "mistralai/Mistral-7B-v0.1", and is no path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def fetch(repository: str, format: str | None = None) -> Source:
    """Downloads the files of one checkpoint into the Hub's cache, or finds them there.

    Args:
      repository: its name on the Hub.
      format: what to fetch of one that holds several checkpoints (see `source.find`).

    Returns:
      The source; its folder is named like the commit that it was fetched at.

    Raises:
      ValueError: the Hub's own program is not installed, the Hub does not give the repository, or
        it holds no such checkpoint.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{repository} is no folder; to fetch it from the Hugging Face Hub, first: "
            "pip install 'huggingface_hub>=1.0'"
        ) from None

    def download(names: list[str]) -> Path:
        folder = huggingface_hub.snapshot_download(
            repository, revision=about.sha, allow_patterns=names
        )
        return Path(folder)

    small = [name for kind in FORMATS.values() for name in (kind.config, kind.index) if name]
    with _explained(repository):
        about = huggingface_hub.HfApi().model_info(repository)
        folder = download([*small, *TOKENIZERS, *DETAILS])
    try:
        source = find(folder, format, {file.rfilename for file in about.siblings})
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), repository)) from None
    with _explained(repository):
        download([file.name for file in source.weight_files])
    return source


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns whatever the Hub's program raises into a sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        reason = f"ask for access at https://huggingface.co/{repository}, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name, or it is private (then run: hf auth login)"
    except Exception as error:  # Each version of it has another library for the network.
        reason = str(error).partition("\n")[0]
    else:
        return
    raise ValueError(f"{repository} is no folder, and the Hub does not give it: {reason}")
