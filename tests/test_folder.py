import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mistral_jax import folder


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def make(target, content, replaceable=None):
    with folder.whole(target, replaceable) as part:
        (part / "a").write_text(content)
        assert not (target / "a").exists() or (target / "a").read_text() != content


def always(path):
    return True


def test_it_appears_when_the_block_ends(tmp_path):
    make(tmp_path / "x" / "y", "new")  # in a folder that is made for it
    assert names(tmp_path / "x") == ["y"]
    assert (tmp_path / "x" / "y" / "a").read_text() == "new"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "x").mkdir()
    make(tmp_path / "x", "new")
    assert names(tmp_path) == ["x"]


def test_a_relative_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path.__class__("x"), "new")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_it_vanishes_if_the_block_fails(tmp_path, error):
    def fail():
        with folder.whole(tmp_path / "x") as part:
            (part / "sub").mkdir()
            (part / "sub" / "a").touch()
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == []


def test_an_error_of_the_system_names_the_target(tmp_path):
    message = r"x could not be made: No space left on device$"
    with pytest.raises(OSError, match=message), folder.whole(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/part")
    assert names(tmp_path) == []


def test_what_exists_is_left_alone(tmp_path):
    make(tmp_path / "x", "old")
    for replaceable, message in ((None, "exists; .*--overwrite"), (lambda path: False, "left as")):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "x", "new", replaceable)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("x")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=f"{name} .*left as it is"):
            make(tmp_path / name, "new", always)
    assert names(tmp_path) == ["file", "link", "x"]
    assert (tmp_path / "x" / "a").read_text() == "old"


def test_who_asks_beforehand_may_name_the_remedy(tmp_path):
    make(tmp_path / "x", "old")
    with pytest.raises(ValueError, match=r"x exists; call it y$"):
        folder.check_target(tmp_path / "x", remedy="; call it y")


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path):
    make(tmp_path / "x", "old")

    def fail():
        with folder.whole(tmp_path / "x", always) as part:
            (part / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "x" / "a").read_text() == "old"
    make(tmp_path / "x", "new", always)
    assert (tmp_path / "x" / "a").read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_replacing_without_the_system_s_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.ctypes, "CDLL", lambda *_, **__: object())
    make(tmp_path / "x", "old")
    make(tmp_path / "x", "new", always)
    assert (tmp_path / "x" / "a").read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists"), folder.whole(tmp_path / "x"):
        make(tmp_path / "x", "another's")
    assert (tmp_path / "x" / "a").read_text() == "another's"
    assert names(tmp_path) == ["x"]


HALF = """
import sys, time
from pathlib import Path
from mistral_jax import folder
with folder.whole(Path(sys.argv[1])) as part:
    (part / "half").touch()
    print("half", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_process_are_cleaned_but_not_those_of_a_running_one(tmp_path):
    command = [sys.executable, "-c", HALF, tmp_path / "x"]
    dead, alive = (subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2))
    for process in (dead, alive):
        assert process.stdout.readline() == b"half\n"
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    try:
        assert len(names(tmp_path)) == 2
        make(tmp_path / "xy", "another target")
        assert len(names(tmp_path)) == 3
        make(tmp_path / "x", "new")
        (left,) = (name for name in names(tmp_path) if name not in ("x", "xy"))
    finally:
        alive.send_signal(signal.SIGINT)
        alive.wait()
        dead.stdout.close()
        alive.stdout.close()
    assert names(tmp_path) == ["x", "xy"], left
    assert (tmp_path / "x" / "a").read_text() == "new"


def test_a_disk_that_is_too_full(tmp_path):
    folder.check_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(ValueError, match=r"x needs 1\.0 EB, but its disk has .* free"):
        folder.check_space(tmp_path / "x", 10**18)


def test_the_bytes_of_an_array(tmp_path):
    array = np.arange(300_000, dtype=np.float32).reshape(3, 100_000)
    for part in (array, array[:, 1:], array.T, array[:0]):
        with open(tmp_path / "a", "wb") as file:
            folder.write_array(file, part)
        assert (tmp_path / "a").read_bytes() == part.tobytes()
