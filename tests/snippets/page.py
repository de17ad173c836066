"""Where the blocks of one page run: a folder as a reader has it, bash, and one Python process."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import stand_in_hub

from snippets import stand_ins

ROOT = Path(__file__).parents[2]
_LINKED = ("mistral_jax", "convert", "Makefile", "pyproject.toml", "README.md")
_COPIED = ("configs", "benchmarks", "examples")  # where a document may write
_PROGRAMS = ROOT / "build" / "snippets"  # compiled ones, kept from one session to the next
_SECONDS = 240

# Takes blocks of a page as JSON, [line, code], and says after each how it went.
_PYTHON = """if True:
    import json, os, sys, traceback
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    space = {"__name__": "__main__"}
    for block in sys.stdin:
        line, code = json.loads(block)
        try:
            exec(compile("\\n" * line + code, sys.argv[1], "exec"), space)
            found = ""
        except BaseException:
            found = traceback.format_exc()
        print(flush=True)
        print(json.dumps(found), file=reply, flush=True)
"""


class Page:
    """Where the blocks of one page run.

    Attributes:
      folder: the reader's.
      shown: what the last block printed, and where it ends in the page.
    """

    def __init__(self, path: Path, cache: Path):
        self._stack = contextlib.ExitStack()
        self._path, self._cache, self._python, self._hub = path, cache, None, None
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.shown = "", -1
        _PROGRAMS.mkdir(parents=True, exist_ok=True)
        for name in _LINKED:
            (self.folder / name).symlink_to(ROOT / name)
        ignored = shutil.ignore_patterns("__pycache__")
        for name in _COPIED:
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)

    def close(self) -> None:
        """Ends what runs, and removes the folder."""
        self._stack.close()

    def bash(self, script: str, typed: str = "") -> tuple[int, str]:
        """Runs a script; returns its status, and all that it printed."""
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment(script),
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        return done.returncode, done.stdout.replace("\r", "\n")

    def bash_once(self, script: str) -> tuple[int, str]:
        """Runs a script as `bash` does, or takes what another page's run of it printed."""
        kept = self._cache / f"{hashlib.sha256(script.encode()).hexdigest()}.json"
        if not kept.exists():
            done = self.bash(script)
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(done))
            part.rename(kept)
        status, printed = json.loads(kept.read_text())
        return status, printed

    def python(self, line: int, code: str) -> tuple[str, str]:
        """Runs code; returns its traceback, if any, and all that it printed."""
        log = self.folder / ".printed"
        if self._python is None:
            output = self._stack.enter_context(log.open("w"))
            self._python = subprocess.Popen(
                [sys.executable, "-u", "-c", _PYTHON, str(self._path)],
                cwd=self.folder,
                env=self.environment(code),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
            self._stack.callback(self._end_python)
        before = log.stat().st_size
        self._python.stdin.write(json.dumps([line, code]) + "\n")
        self._python.stdin.flush()
        reply = self._python.stdout.readline()
        with log.open() as file:
            file.seek(before)
            printed = file.read()
        return (json.loads(reply) if reply else "the process has ended"), printed

    def _end_python(self) -> None:
        with self._python:
            self._python.stdin.close()

    def environment(self, text: str) -> dict[str, str]:
        """Returns the environment of what runs; starts a Hub if the text names a repository."""
        made = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "HF_", "PYTEST"))}
        if any(name in text for name in stand_ins.REPOSITORIES):
            if self._hub is None:
                source = stand_ins.export(self._cache / "repository")
                folders = dict.fromkeys(stand_ins.REPOSITORIES, source)
                self._hub = self._stack.enter_context(stand_in_hub.serve(folders))
            made |= stand_in_hub.environment(self._hub.server_port, self.folder / ".hub")
        return made | {
            "HOME": str(self.folder / ".home"),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(_PROGRAMS),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": processes.UNDIVIDED,
        }
