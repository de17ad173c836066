"""The name of a model on the Hugging Face Hub, found in the paths of the Hub's cache.

The cache keeps a model in folders `models--acme--tiny/snapshots/<commit>`. A provenance should hold
the model's name, because the path means nothing on another machine.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def hub_name(folder: Path | str) -> str | None:
    """Returns "acme/tiny@commit" for a folder in the Hub's cache, and None for other folders."""
    for path in (Path(folder).absolute(), Path(folder).resolve()):
        for snapshot in (path, *path.parents):
            if snapshot.parent.name == "snapshots" and _COMMIT.fullmatch(snapshot.name):
                kind, *parts = snapshot.parent.parent.name.split("--")
                name = "/".join(parts)
                if kind == "models" and _NAME.fullmatch(name):
                    return f"{name}@{snapshot.name}"
    return None


def base_name(source: Any) -> str | None:
    """Returns the Hub's name of the source in a checkpoint's provenance.

    Args:
      source: "acme/tiny@commit", or the name of a local folder, or only the commit, which earlier
        conversions wrote, and which is looked up in this machine's cache.

    Returns:
      "acme/tiny", or None if the source has no name on the Hub.
    """
    if not isinstance(source, str):
        return None
    name, at, _ = source.partition("@")
    if _NAME.fullmatch(name) and (at or "/" in name):
        return name
    found = None
    if _COMMIT.fullmatch(source):
        found = next(
            (path for cache in _caches() for path in cache.glob(f"models--*/snapshots/{source}")),
            None,
        )
    return found and base_name(hub_name(found))


def snapshot(repository: str) -> Path | None:
    """Returns the folder of a model in the Hub's cache; None if the cache does not have it.

    It is the folder of the main branch, or the newest one if that is not cached. Files may be
    missing from it.
    """
    for cache in _caches():
        folder = cache / f"models--{repository.replace('/', '--')}"
        snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
        main = folder / "refs" / "main"
        commit = main.read_text(errors="replace").strip() if main.is_file() else None
        found = [path for path in snapshots if path.name == commit] or snapshots
        if found:
            return max(found, key=lambda path: path.stat().st_mtime_ns)
    return None


def _caches() -> Iterator[Path]:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return
    yield Path(HF_HUB_CACHE)
