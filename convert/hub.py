"""A repository of the Hugging Face Hub in place of a source folder: it fetches what is needed."""

import re
from pathlib import Path

from .source import FORMATS, TOKENIZERS, Source, find


def is_repository(name: Path | str) -> bool:
    """Tells whether `name` can be a repository ("mistralai/Mistral-7B-v0.1") and is no path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(name).exists()


def fetch(repository: str, format: str | None = None) -> Source:
    """Downloads the files of one checkpoint into the Hub's cache, or finds them there.

    Args:
      repository: its name on the Hub.
      format: what to fetch where it holds several checkpoints (see `source.find`).

    Raises:
      ValueError: the program that fetches is not installed, the Hub does not give the repository,
        or it holds no such checkpoint.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(
            f"{repository} is no folder; to fetch it from the Hugging Face Hub, first: "
            "pip install 'huggingface_hub>=1.0'"
        ) from None
    small = [f.config for f in FORMATS.values()] + [f.index for f in FORMATS.values() if f.index]
    try:
        about = huggingface_hub.HfApi().model_info(repository)
        names = {sibling.rfilename for sibling in about.siblings}

        def download(files: list[str]) -> Path:
            return Path(
                huggingface_hub.snapshot_download(
                    repository, revision=about.sha, allow_patterns=files
                )
            )

        source = find(download([*small, *TOKENIZERS]), format, names)
        download([file.name for file in source.weight_files])
        return source
    except errors.GatedRepoError:
        reason = f"ask for access at https://huggingface.co/{repository}, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name, or it is private (run: hf auth login)"
    except OSError as error:
        reason = str(error).splitlines()[0]
    raise ValueError(f"{repository} is no folder, and the Hub does not give it: {reason}")
