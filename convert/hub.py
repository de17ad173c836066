"""Downloads the files of a checkpoint from a repository of the Hugging Face Hub."""

import re
from collections.abc import Callable
from pathlib import Path

from mistral_jax.checkpoint import origin

from .source import CHATS, DETAILS, FORMATS, TOKENIZERS, Source, find


def is_repository(name: Path | str) -> bool:
    """Returns whether `name` looks like "mistralai/Mistral-7B-v0.1" and is not an existing path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def fetch(
    repository: str, format: str | None = None, say: Callable[[str], None] = lambda note: None
) -> Source:
    """Downloads the files of one checkpoint to the Hub's cache, or finds them there.

    Args:
      repository: name of the repository on the Hub.
      format: the checkpoint to fetch if the repository holds several (see `source.find`).
      say: called with a message if the Hub does not answer and the cached files are used.

    Returns:
      The source. The name of its folder is the commit.

    Raises:
      ValueError: huggingface_hub is not installed, the repository does not exist or is not
        accessible, or it holds no such checkpoint.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
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

    refused = f"{repository} is no folder, and the Hub does not give it: "
    small = [name for kind in FORMATS.values() for name in (kind.config, kind.index) if name]
    try:
        about = huggingface_hub.HfApi().model_info(repository)
        folder = download([*small, *TOKENIZERS, *DETAILS, *CHATS])
        source = _find(repository, folder, format, {file.rfilename for file in about.siblings})
        download([file.name for file in source.weight_files])
        return source
    except errors.GatedRepoError:
        reason = f"ask for access at https://huggingface.co/{repository}, then run: hf auth login"
        raise ValueError(refused + reason) from None
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name, or it is private (then run: hf auth login)"
        raise ValueError(refused + reason) from None
    except _NoCheckpoint:
        raise
    except Exception as error:  # Network errors depend on the version of huggingface_hub.
        reason = str(error).partition("\n")[0].rstrip(".")
    cached = origin.snapshot(repository)
    if cached is None:
        raise ValueError(f"{refused}{reason}; nor is it in the Hub's cache")
    try:
        source = _find(
            repository, cached, format, {x.name for x in cached.iterdir() if x.is_file()}
        )
    except _NoCheckpoint as error:
        raise ValueError(
            f"{repository} is in the Hub's cache in part only, and the Hub does not give the rest: "
            f"{reason}; {error}"
        ) from None
    lacks = "" if source.tokenizer_file else ", which has no tokenizer of it"
    say(f"{repository} is read from the Hub's cache{lacks}, commit {cached.name}: {reason}")
    return source


class _NoCheckpoint(ValueError):
    """A repository does not hold the requested checkpoint."""


def _find(repository: str, folder: Path, format: str | None, names: set[str]) -> Source:
    try:
        return find(folder, format, names)
    except ValueError as error:
        raise _NoCheckpoint(str(error).replace(str(folder), repository)) from None
