"""Laws of lock files: one owner at a time, with flock and without; the dead own nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mistral_jax.checkpoint import folder, locks

HOLD = """
import fcntl, os, sys, time
from pathlib import Path
from mistral_jax.checkpoint import locks
number = int(sys.argv[2])
def flock(descriptor, mode):
    raise OSError(number, os.strerror(number))
if number:
    fcntl.flock = flock
with locks.held(Path(sys.argv[1])) as owner:
    print(owner, flush=True)
    time.sleep(60)
"""
WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture
def without(monkeypatch):
    """Returns a function after whose call this process has no flock."""
    monkeypatch.setattr(locks, "_said", set())
    monkeypatch.setattr(locks, "_SETTLE_SECONDS", 0.05)

    def set_up(number):
        def flock(descriptor, mode):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return set_up


def owner(file):
    with locks.held(file) as found:
        return found


@pytest.mark.parametrize("number", [0, *WITHOUT])
def test_one_process_at_a_time_and_the_dead_own_nothing(tmp_path, without, number, caplog):
    if number:
        without(number)
    file = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, file, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"None\n"
        assert owner(file).startswith(f"process {other.pid} on ")
        (tmp_path / ".lock").hardlink_to(file)
        with (
            pytest.raises(ValueError, match=rf"wait for process {other.pid} on"),
            folder.locked(tmp_path, "wait for {owner}"),
        ):
            pytest.fail("it is locked")
        other.send_signal(signal.SIGKILL)
    assert file.exists()
    assert owner(file) is None
    assert not file.exists()
    assert [record.message.split("does")[1] for record in caplog.records] == [
        " not lock files: do not start two programs there at the same moment"
    ] * bool(number)


def test_a_process_may_not_hold_it_twice(tmp_path, without):
    for _ in range(2):
        with locks.held(tmp_path / "lock") as first:
            assert first is None
            assert str(os.getpid()) in owner(tmp_path / "lock")
        without(errno.ENOSYS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [0, errno.ENOLCK])
def test_another_host_owns_it_as_long_as_it_gives_signs_of_life(tmp_path, without, number):
    """On NFS, flock may succeed though another host holds it."""
    if number:
        without(number)
    file = tmp_path / "lock"
    record = locks._self() | {"host": "elsewhere", "boot": "b", "token": "t"}
    file.write_text(json.dumps(record))
    assert owner(file) == f"process {os.getpid()} on elsewhere"
    past = time.time() - locks._DEAD_SECONDS - 5
    os.utime(file, (past, past))
    assert owner(file) is None


def test_an_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.01)
    file = tmp_path / "lock"
    with locks.held(file):
        os.utime(file, (1, 1))
        for _ in range(500):
            if file.stat().st_mtime > 1:
                break
            time.sleep(0.01)
        assert file.stat().st_mtime > 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": 3}', "[" * 5000])
def test_a_file_that_names_no_owner_is_taken(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    assert owner(tmp_path / "lock") is None


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    record = locks._self() | {"started": "1", "token": "t"}
    (tmp_path / "lock").write_text(json.dumps(record))
    assert owner(tmp_path / "lock") is None


def test_other_errors_are_raised(tmp_path, without):
    without(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        owner(tmp_path / "lock")
