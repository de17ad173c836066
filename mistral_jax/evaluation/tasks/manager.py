"""Finds tasks of lm-evaluation-harness, of this package and of users, and replaces their data."""

import atexit
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parent
_EXAMPLES = ".examples"


def task_manager(
    names: Iterable[str], include_path: Path | None = None, data: Path | None = None
) -> TaskManager:
    """Indexes the tasks of this package, of a user's folder, and of the harness.

    Args:
      names: tasks, groups or tags that will be loaded. The harness's own tasks, which are many, are
        indexed if one of them is not in the other folders.
      include_path: folder of more task files; its tasks replace others of the same names.
      data: folder of local data. A file TASK.jsonl, with one record a line in the form of the
        task's data set, replaces the questions of that task, or of all tasks of that group.
        TASK.examples.jsonl replaces the records from which its examples are taken; without it, they
        are taken from the questions.

    Raises:
      ValueError: there is no such folder, or a file of data belongs to no task.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"there is no folder {include_path}; expected one with task files")
    if data is not None and not data.is_dir():
        raise ValueError(f"there is no folder {data}; expected one with files such as TASK.jsonl")
    paths = sorted(data.glob("*.jsonl")) if data else []
    files = {path.name.removesuffix(".jsonl"): path for path in paths}
    files = {name: path for name, path in files.items() if not name.endswith(_EXAMPLES)}
    folders = [FOLDER, *([include_path] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    try:
        leaves = {name: _leaves(manager.task_index, name) for name in (*names, *files)}
    except KeyError:
        manager = TaskManager(include_path=folders)
        for name, path in files.items():
            if name not in manager.task_index:
                raise ValueError(
                    f"{path} belongs to no task; `lm_eval ls tasks` lists all names"
                ) from None
        leaves = {name: _leaves(manager.task_index, name) for name in files}
    # A task's own file replaces that of its group.
    sources = {}
    for name in sorted(files, key=lambda name: leaves[name] == {name}):
        sources |= dict.fromkeys(leaves[name], files[name])
    if sources:
        home = tempfile.TemporaryDirectory(prefix="tasks-")
        atexit.register(home.cleanup)  # Tasks outlive the manager, and read their data again.
        for task, path in sources.items():
            _replace_data(manager.task_index[task], path, Path(home.name))
    return manager


def _leaves(index: Mapping[str, Any], member: str | Mapping[str, Any]) -> set[str]:
    """Returns the names of the tasks in a member of a group: a name, or a definition.

    Raises:
      KeyError: a name is not in the index.
    """
    if isinstance(member, Mapping):
        name = member.get("group", member.get("task"))
        if isinstance(name, str) and name in index:
            return _leaves(index, name)
        members = member["task"] if isinstance(member.get("task"), list) else []
    elif index[member].kind.name == "TAG":
        members = index[member].tags
    elif index[member].kind.name == "GROUP":
        members = index[member].cfg["task"]
    else:
        return {member}
    return set().union(*(_leaves(index, one) for one in members))


def _replace_data(entry: Any, path: Path, folder: Path) -> None:
    """Lets a task of the index read its questions from `path`, by a file in `folder`."""
    asked = entry.cfg.get("test_split") or entry.cfg.get("validation_split")
    examples = path.with_suffix(f"{_EXAMPLES}.jsonl")
    other = examples if examples.is_file() else path
    splits = ("training_split", "validation_split", "test_split", "fewshot_split")
    files = {
        name: str((path if name == asked else other).resolve())
        for name in filter(None, map(entry.cfg.get, splits))
    }
    override = {
        "include": str(entry.yaml_path),
        "task": entry.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    target = folder / f"{entry.name}.yaml"
    target.write_text(json.dumps(override), encoding="utf-8")  # JSON is YAML, too.
    entry.yaml_path = target
