"""What others call a model: its name on the Hugging Face Hub, as the Hub's cache tells it.

The cache keeps a model in folders `models--acme--tiny/snapshots/<commit>`, whose own name, a
commit, means nothing on another machine.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def hub_name(folder: Path | str) -> str | None:
    """Returns "acme/tiny@commit" of a folder in the Hub's cache; None = it is another folder."""
    for path in (Path(folder).absolute(), Path(folder).resolve()):
        for snapshot in (path, *path.parents):
            if snapshot.parent.name == "snapshots" and _COMMIT.fullmatch(snapshot.name):
                kind, *parts = snapshot.parent.parent.name.split("--")
                name = "/".join(parts)
                if kind == "models" and _NAME.fullmatch(name):
                    return f"{name}@{snapshot.name}"
    return None


def base_name(source: Any) -> str | None:
    """Returns the Hub's name for what a checkpoint's provenance calls its source.

    Args:
      source: "acme/tiny@commit"; the name of a folder, which means nothing elsewhere; or, of
        earlier conversions, the commit alone, which is looked for in this machine's cache.

    Returns:
      "acme/tiny", or None if there is no such name.
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
    """Returns the folder in which the Hub's cache has a model: that of its main branch, if known.

    It may lack files. Of several that are not known to be the main branch's, it is the newest.
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
