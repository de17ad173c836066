"""The place of a run: its folder, kept for one process, and the signals that reach it.

It takes no step.
"""

import contextlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mistral_jax.base.files import read_json
from mistral_jax.checkpoint import adapters, checksums, folder, manifest
from mistral_jax.training import pretraining
from mistral_jax.training.data import examples
from mistral_jax.training.recipe import Recipe
from mistral_jax.training.states import saved_steps

_DECIDE_DATA = ("model", "corpus", "checkpoint", "data", "dpo", "context", "seed")


@contextlib.contextmanager
def prepared(recipe: Recipe, path: Path) -> Iterator[None]:
    """Keeps the folder of a run for this process, with its recipe and data in it."""
    notes = path / "recipe.json"
    if not notes.is_file():
        folder.check_free(path, remedy=" and is no run: name another folder with --run")
        path.mkdir(parents=True, exist_ok=True)
    busy = (
        f"another process trains in {path}: wait for it ({{owner}}), or name another folder with "
        "--run"
    )
    # A result is written last: what would keep it from that is found first.
    for target, kept in (("checkpoint", manifest.kept), ("adapter", adapters.kept)):
        folder.check_target(path / target, kept)
    with folder.locked(path, busy):
        earlier = None
        if notes.is_file():
            earlier = Recipe.from_dict(read_json(notes), str(notes))
        _check_data(recipe, path, earlier)
        if recipe != earlier:
            part = path / ".recipe.json.partial"
            part.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n", encoding="utf-8")
            part.replace(notes)
        if not (path / "data").is_dir():
            (examples if recipe.data else pretraining).prepare(recipe, path)
        yield


def _check_data(recipe: Recipe, path: Path, earlier: Recipe | None) -> None:
    """Refuses data that are damaged or of other files; removes what may be made again.

    They may be as long as no state is saved: nothing was learnt from them.
    """
    data, begun = path / "data", saved_steps(path)
    if earlier and begun:
        recipe.check_continues(earlier, str(path))
    if data.is_dir() and earlier:
        checksums.check(data, f"remove {data}, and it is made again")
        other = examples.changed(recipe, path) if recipe.data and earlier.data else None
        if other and begun:
            raise ValueError(
                f"{other} is another file now than when the run in {path} began: restore it, or "
                "name another folder with --run"
            )
        if other or any(getattr(recipe, x) != getattr(earlier, x) for x in _DECIDE_DATA):
            shutil.rmtree(data)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the SIGINT or SIGTERM that came, or 0; a second one acts."""
    received = []
    earlier = {}

    def note(number, frame):
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):
                print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        received.append(number)
        signal.signal(number, earlier[number] or signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # Python gives no signals to other threads.
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, note)
    try:
        yield lambda: max(received, default=0)
    finally:
        for number, handler in earlier.items():
            # None: one that Python did not set.
            signal.signal(number, handler or signal.SIG_DFL)
