import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mistral_jax.checkpoint import folder, locks


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def folders(path):
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def make(target, content, kept=None):
    with folder.whole(target, kept) as part:
        (part / "a").write_text(content)
        assert not (target / "a").exists() or (target / "a").read_text() != content


def always(path):
    return folder.foreign(path, re.compile(".*"))


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
    for kept, message in (
        (None, "exists; .*--overwrite"),
        (lambda path: "is odd", "is odd; .*left"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "x", "new", kept)
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
        folder.check_free(tmp_path / "x", remedy="; call it y")


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


@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOSYS])
def test_replacing_without_the_system_s_exchange(tmp_path, monkeypatch, caplog, number):
    without = SimpleNamespace(renameat2=lambda *_: -1) if number else object()
    monkeypatch.setattr(folder.ctypes, "CDLL", lambda *_, **__: without)
    monkeypatch.setattr(folder.ctypes, "get_errno", lambda: number)
    monkeypatch.setattr(locks, "_said", set())
    make(tmp_path / "x", "old")
    make(tmp_path / "x", "new", always)
    assert (tmp_path / "x" / "a").read_text() == "new"
    assert names(tmp_path) == ["x"]
    (record,) = caplog.records
    assert "does not swap folders" in record.message


def test_an_exchange_that_the_system_refuses_leaves_the_old_one(tmp_path, monkeypatch):
    make(tmp_path / "x", "old")
    without = SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(folder.ctypes, "CDLL", lambda *_, **__: without)
    monkeypatch.setattr(folder.ctypes, "get_errno", lambda: errno.EACCES)
    with pytest.raises(OSError, match="x could not be made: Permission denied"):
        make(tmp_path / "x", "new", always)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "old"


def test_a_name_is_given_back_that_a_killed_process_took(tmp_path):
    """Where folders cannot be swapped in one step, the old one has another name for a moment."""
    make(tmp_path / ".x.partial-00000000-old", "old")
    make(tmp_path / ".x.partial-00000000", "new, but nobody knows whether whole")
    with pytest.raises(ValueError, match="exists"):
        make(tmp_path / "x", "newer")
    assert (tmp_path / "x" / "a").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "x").symlink_to("disk/empty")
    make(tmp_path / "x", "new")
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "disk" / "empty" / "a").read_text() == "new"
    assert names(tmp_path / "disk") == ["empty"]


def begun(target):
    with folder.whole(target):
        pytest.fail("the work has begun")


def test_what_cannot_become_a_folder_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "mounted").mkdir()
    with pytest.raises(ValueError, match="lost exists"):
        begun(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"file is no folder, so .* cannot be made; name"):
        begun(tmp_path / "file" / "x")
    monkeypatch.setattr(folder.os.path, "ismount", lambda path: path.name == "mounted")
    with pytest.raises(
        ValueError, match=r"mounted is a mount point, .*; name a folder in it, such"
    ):
        begun(tmp_path / "mounted")
    monkeypatch.setattr(folder.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"cannot be written to, and x/y is made there; name a"):
        begun(tmp_path / "x" / "y")
    assert names(tmp_path) == ["file", "lost", "mounted"]


def test_a_part_of_the_same_disk_that_is_mounted(tmp_path, monkeypatch):
    place = tmp_path / "a b"
    place.mkdir()
    line = f"1 2 0:3 / {tmp_path}/a\\040b rw - ext4 /dev/x rw\n"
    read = Path.read_text

    def read_text(path, *arguments, **options):
        return line if str(path) == "/proc/self/mountinfo" else read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert folder._is_mounted(place)
    assert not folder._is_mounted(tmp_path)


STRAY = [
    "._x",
    "._.zarray",
    ".DS_Store",
    "desktop.ini",
    "Thumbs.db",
    ".nfs0000000001234abc",
    "@eaDir",
]


def test_what_is_foreign_is_named(tmp_path):
    known = re.compile(r"a|sub/\d+")
    make(tmp_path / "x", "old")
    place = tmp_path / "x"
    (place / "sub").mkdir()
    (place / "sub" / "12").touch()
    for name in STRAY:
        (place / name).touch()
        (place / "sub" / name).touch()
    assert folder.foreign(place, known) is None
    for name in ("notes.txt", "sub/notes", "other/1", ".git/config", "a.bak", "sub/12x"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
        assert folder.foreign(place, known) == f"has {name}, which this program did not write"
        with pytest.raises(ValueError, match=f"x has {name}, which .*; it is left as it is"):
            make(place, "new", lambda path: folder.foreign(path, known))
        (place / name).unlink()
        if name.startswith(("other", ".git")):
            (place / name).parent.rmdir()
    (place / "empty").mkdir()
    assert "has empty," in folder.foreign(place, known)
    (place / "empty").rmdir()
    (place / "sub" / "7").symlink_to("/")
    assert "has sub/7," in folder.foreign(place, known)
    (place / "sub" / "7").unlink()
    make(place, "new", lambda path: folder.foreign(path, known))
    assert names(place) == ["a"]


def test_a_folder_with_what_systems_leave_is_empty(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".DS_Store").touch()
    make(tmp_path / "x", "new")
    assert names(tmp_path / "x") == ["a"]
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_that_does_not_flush_folders(tmp_path, monkeypatch, caplog, number):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(locks, "_said", set())
    make(tmp_path / "x", "new")
    make(tmp_path / "y", "new")
    assert names(tmp_path) == ["x", "y"]
    (record,) = caplog.records
    assert "does not flush" in record.message
    monkeypatch.setattr(os, "fsync", lambda descriptor: fail(errno.EIO))
    with pytest.raises(OSError, match="z could not be made: Input/output error"):
        make(tmp_path / "z", "new")
    assert names(tmp_path) == ["x", "y"]


def fail(number):
    raise OSError(number, os.strerror(number))


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists"), folder.whole(tmp_path / "x"):
        make(tmp_path / "x", "another's")
    assert (tmp_path / "x" / "a").read_text() == "another's"
    assert names(tmp_path) == ["x"]


HALF = """
import sys, time
from pathlib import Path
from mistral_jax.checkpoint import locks
from mistral_jax.checkpoint import folder
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
        assert len(folders(tmp_path)) == 2
        make(tmp_path / "xy", "another target")
        assert len(folders(tmp_path)) == 3
        make(tmp_path / "x", "new")
        (left,) = (name for name in folders(tmp_path) if name not in ("x", "xy"))
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
