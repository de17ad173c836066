"""The sandbox: whatever a program does, it is contained, and passes only if it runs to its end."""

import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import processes
import pytest

from mistral_jax.evaluation import jail, sandbox
from mistral_jax.evaluation.sandbox import Limits, run, run_all

pytestmark = pytest.mark.skipif(not processes.has_landlock(), reason="the kernel has no Landlock")

DENIED = "failed: PermissionError"
EARLY = "before its tests have ended"


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path, monkeypatch):
    """Gives the sandbox a folder of its own; neither files nor processes are left at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("sandbox-*"))
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if lies_in(path, tmp_path)]


def lies_in(link, folder):
    try:
        return os.readlink(link).startswith(str(folder))
    except OSError:
        return False


PROGRAMS = {
    "nothing": ("", "passed"),
    "tests that hold": ("def f(x):\n    return x + 1\nassert f(1) == 2", "passed"),
    "tests that fail": ("assert 1 + 1 == 3, 'sum'", "failed: AssertionError: sum"),
    "no Python": ("def f(:", "failed: SyntaxError"),
    "a null character": ("x = '\0'", "failed: "),
    "half a character": ("x = '\ud800'", "failed: UnicodeEncodeError"),
    "the standard library": (
        "import collections, ctypes, decimal, hashlib, math, random, re, sqlite3, ssl, zoneinfo\n"
        "import datetime, logging, os, sys, time, typing, unittest\n"
        "zoneinfo.ZoneInfo('Europe/Paris')\n"
        "assert time.time() and os.urandom(3) and random.random() < 1\ntime.sleep(0.01)",
        "passed",
    ),
    "a dataclass": (
        "from __future__ import annotations\nimport dataclasses, typing\n"
        "@dataclasses.dataclass\nclass A:\n    x: typing.List[int]\n"
        "assert typing.get_type_hints(A)['x'] == typing.List[int]",
        "passed",
    ),
    "a block of a script": ("if __name__ == '__main__':\n    raise ValueError", "passed"),
    "deep recursion": ("def f(n):\n    return n and f(n - 1)\nf(950)", "passed"),
    "too deep recursion": ("def f():\n    f()\nf()", "failed: RecursionError"),
    "native recursion": (
        "import sys\nsys.setrecursionlimit(10**8)\nclass A:\n    def __repr__(self):\n"
        "        return repr([self])\nrepr(A())",
        ("killed: SIGSEGV", "failed: RecursionError", "out of memory"),
    ),
    "memory": ("x = [0]\nwhile True:\n    x += x", "out of memory"),
    "memory at once": ("bytearray(1 << 40)", "out of memory"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "killed: SIGSEGV"),
    "abort": ("import os\nos.abort()", "killed: SIGABRT"),
    "a gigabyte of output": ("for i in range(1024):\n    print('x' * 2**20)", "passed"),
    "no output": ("import os, sys\nsys.stdout.close()\nos.closerange(0, 3)", "passed"),
    "no files at all": ("import os\nos.closerange(0, 64)", f"failed: it exits.*{EARLY}"),
    "input": ("input()", "failed: EOFError"),
    "a long report": ("raise ValueError('x' * 10**7)", "failed: ValueError: x+"),
    "a report of lines": ("raise ValueError('a\\nended\\n')", "failed: ValueError: a ended"),
    "a bad report": (
        "class E(BaseException):\n    def __str__(self):\n        raise E\nraise E",
        "failed: E",
    ),
    # Ends that are not the end.
    "exit": ("import sys\nsys.exit(0)", "failed: SystemExit: 0"),
    "exit at once": ("import os\nos._exit(0)", f"failed: it exits with code 0 {EARLY}"),
    "interrupt": ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
    "exit later": (
        "import atexit, os\natexit.register(os._exit, 0)\nassert False",
        "failed: AssertionError",
    ),
    "other functions": (
        "import builtins, json, os, sys\nreal = os._exit\n"
        "builtins.exec = builtins.compile = builtins.print = lambda *a, **k: None\n"
        "os.read = os.write = lambda *a: None\nos._exit = lambda code: real(0)\nassert False",
        "failed: AssertionError",
    ),
    "a forged report": (
        "import os\nfor i in range(64):\n    try:\n        os.write(i, b'ended\\n')\n"
        "        os.read(i, 1)\n    except OSError:\n        pass",
        f"failed: it reports that it has passed {EARLY}",
    ),
    "other functions of its caller": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for name in list(frame.f_globals):\n"
        "        if name in ('message', 'nested', 'confine'):\n"
        "            frame.f_globals[name] = lambda *a: b'ended\\n'\n"
        "    frame = frame.f_back\nassert False",
        f"failed: it reports that it has passed {EARLY}|failed: it exits with.*",
    ),
    # Other processes.
    "fork": ("import os\nos.fork()", DENIED),
    "a fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except MemoryError: pass",
        DENIED,
    ),
    "a command": ("import subprocess\nsubprocess.run(['true'])", DENIED),
    "a shell": ("import os\nassert os.system('true') == 0", "failed: AssertionError"),
    "another program": ("import os\nos.execv('/bin/true', ['true'])", DENIED),
    "multiprocessing": ("import multiprocessing as m\nm.Process(target=print).start()", "failed"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "failed: Runtime"),
    "small threads": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
        "failed: RuntimeError",
    ),
    "a daemon": ("import os\nos.setsid()", DENIED),
    "the end of its parent": ("import os\nos.kill(os.getppid(), 9)", DENIED),
    "the end of all": ("import os\nos.kill(-1, 9)", DENIED),
    "the end of its group": ("import os\nos.killpg(0, 9)", DENIED),
    "its own end": ("import os\nos.kill(os.getpid(), 15)", "killed: SIGTERM"),
    "a signal by a file": (
        "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        DENIED,
    ),
    "its parent's memory": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(16, os.getppid(), 0, 0) == 0",
        "failed: AssertionError",
    ),
    "priority": ("import os\nos.nice(-5)", DENIED),
    "more memory": (
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
        "failed: (PermissionError|ValueError)",
    ),
    "root": ("import os\nos.setuid(0)", DENIED),
    "a namespace": (
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "failed: AssertionError",
    ),
    "a mount": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, 0) == 0",
        "failed: AssertionError",
    ),
    # Files.
    "a file in its folder": (
        "import os\nopen('a', 'w').write('b')\nassert open(os.path.abspath('a')).read() == 'b'\n"
        "os.rename('a', 'c')\nos.truncate if 0 else os.remove('c')\nassert os.listdir() == []",
        "passed",
    ),
    "a file for a while": (
        "import tempfile\nwith tempfile.TemporaryFile() as file:\n    file.write(b'x' * 9999)",
        "passed",
    ),
    "a file in memory": ("import os\nos.memfd_create('x')", DENIED),
    "shared memory": (
        "from multiprocessing.shared_memory import SharedMemory\nSharedMemory('x', True, 99)",
        DENIED,
    ),
    "a folder": ("import os\nos.mkdir('x')", DENIED),
    "a link": ("import os\nos.symlink('/', 'x')", DENIED),
    "a pipe in its folder": ("import os\nos.mkfifo('x')", DENIED),
    "the terminal": ("open('/dev/tty', 'w')", "failed: (PermissionError|OSError)"),
    "the disk": ("import os\nopen('/dev/' + os.listdir('/dev')[0], 'rb')", DENIED),
    "the environment of its parent": (
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
        DENIED,
    ),
    "its own description": ("open('/proc/self/status')", DENIED),
    "the accounts": ("open('/etc/passwd')", DENIED),
    "the home": ("import os\nos.listdir(os.path.expanduser('~root'))", "failed: (Perm|FileNot)"),
    # The network.
    "TCP": ("import socket\nsocket.create_connection(('127.0.0.1', 80))", DENIED),
    "UDP": ("import socket\nsocket.socket(type=socket.SOCK_DGRAM)", DENIED),
    "a local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", DENIED),
    "a pair of sockets": ("import socket\nsocket.socketpair()", DENIED),
    "a name": ("import socket\nsocket.getaddrinfo('localhost', 80)", "failed"),
    "io_uring": (
        "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(200)) >= 0",
        "failed: AssertionError",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    seen = []
    programs = [program for program, _ in PROGRAMS.values()]
    found = run_all(programs, Limits(memory=512 << 20), 4, lambda *counts: seen.append(counts))
    assert seen == [(i + 1, len(programs)) for i in range(len(programs))]
    return dict(zip(PROGRAMS, found, strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_contained(outcomes, name):
    expected = PROGRAMS[name][1]
    outcome = outcomes[name]
    assert outcome.passed == (expected == "passed")
    choices = expected if isinstance(expected, tuple) else (expected,)
    assert any(re.match(choice, outcome.reason) for choice in choices), outcome
    assert len(outcome.reason) < 600
    assert outcome.reason.isprintable()


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(99)",
        "while True: print('x' * 10000)",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "signal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import re\nre.match('(a+)+b', 'a' * 99)",
        "9 ** 9 ** 9",
        "import os\nos.closerange(0, 64)\nwhile True: pass",
        "class A:\n    def __str__(self):\n        while True: pass\nraise ValueError(A())",
    ],
)
def test_a_program_without_end_is_ended(program):
    start = time.monotonic()
    outcome = run(program, Limits(clock=0.5))
    assert outcome in [(False, "timed out"), (False, "out of memory")]
    assert time.monotonic() - start < 30


def test_processor_time_is_limited_too():
    assert run("while True: pass", Limits(seconds=1, clock=250)) == (False, "timed out")


def test_files_have_a_size():
    most = Limits(file_bytes=1 << 16)
    write = "file = open('{}', 'wb')\n{}file.write(bytes(40000))\nfile.close()\n"
    assert run(write.format("a", ""), most).passed
    assert run(write.format("a", "file.seek(30000)\n"), most).reason.startswith("failed: OSError")
    several = "".join(write.format(name, "") for name in "abc") + "import time\ntime.sleep(9)"
    reason = "failed: it writes more than 65,536 bytes of files"
    assert run(several, most) == (False, reason)
    many = "import time\nfor i in range(2000):\n    open(str(i), 'w').close()\ntime.sleep(9)"
    assert run(many, most).reason == reason
    assert run("open('a', 'w').seek(9**9)\nopen('b', 'w').truncate(9**9)", most).reason.startswith(
        "failed: OSError"
    )


def test_files_outside_are_neither_read_nor_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    path = tmp_path / "secret"
    path.write_text("x")
    before = path.stat()
    assert run("import os\nassert 'SECRET' not in os.environ and len(os.environ) < 8").passed
    ways = (
        "open({!r})",
        "open({!r}, 'a')",
        "import os\nos.open({!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os\nos.open({!r}, 3 | os.O_TRUNC)",
        "import os\nos.truncate({!r}, 0)",
        "import os\nos.remove({!r})",
        "import os\nos.rename({!r}, 'x')",
        "import os\nos.chmod({!r}, 0)",
        "import os\nos.utime({!r})",
        "import os\nos.chown({!r}, 5, 5)",
        "import os\nos.setxattr({!r}, 'user.x', b'x')",
        "import os\nos.link({!r}, 'x')",
        "import os\nos.mkdir({!r} + 'x')",
        "import os\nos.chroot(os.path.dirname({!r}))",
        "import os\nos.chdir('..')\nopen('x', 'w')",
    )
    for outcome in run_all([way.format(str(path)) for way in ways]):
        assert outcome.reason.startswith((DENIED, "failed: OSError: [Errno 18]")), outcome
    assert (path.read_text(), path.stat().st_mode) == ("x", before.st_mode)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [child.name for child in tmp_path.iterdir()] == ["secret"]


def test_a_program_ends_with_its_parent(tmp_path):
    source = (
        "from mistral_jax.evaluation.sandbox import run, Limits\n"
        'run(\'open("here", "w")\\nimport time\\ntime.sleep(200)\', Limits(clock=200))'
    )
    environment = dict(os.environ, TMPDIR=str(tmp_path), PYTHONPATH=os.pathsep.join(sys.path))
    parent = subprocess.Popen([sys.executable, "-c", source], env=environment)
    wait_for(lambda: list(tmp_path.glob("sandbox-*/here")))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not [p for p in Path("/proc").glob("[0-9]*/cwd") if lies_in(p, tmp_path)])
    (folder,) = tmp_path.glob("sandbox-*")
    (folder / "here").unlink()
    folder.rmdir()


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("jail._LANDLOCK = 999", "the kernel has no Landlock"),
        ("jail._SECCOMP = (999, 999)", "the kernel has no seccomp filters"),
        ("jail.platform.machine = lambda: 'riscv64'", "and this is Linux on riscv64"),
        ("raise ValueError", "its interpreter does not start"),
    ],
)
def test_a_machine_without_the_means_is_refused(tmp_path, monkeypatch, change, message):
    source = Path(jail.__file__)
    path = tmp_path / "jail.py"
    path.write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('x', '{source}')\n"
        f"jail = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(jail)\n"
        f"{change}\njail.main()\n"
    )
    monkeypatch.setattr(sandbox, "_JAIL", path)
    with pytest.raises(ValueError, match=f"cannot confine a program: .*{message}") as error:
        sandbox.check()
    assert str(error.value).count("\n") == 0


def test_other_systems_are_refused(monkeypatch):
    sandbox.check()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="needs seccomp and Landlock, and this is darwin"):
        sandbox.check()


def decide(code, machine, number, *arguments):
    """Runs a seccomp filter on a call; returns what it decides."""
    words = (*arguments, *(0,) * 6)[:6]
    data = struct.pack("=iIQ6Q", number, machine, 0, *words)
    steps = list(struct.iter_unpack("HBBI", code))
    at, value = 0, 0
    while True:
        kind, then, otherwise, constant = steps[at]
        at += 1
        if kind == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif kind == 0x54:
            value &= constant
        elif kind == 0x15:
            at += then if value == constant else otherwise
        else:
            assert kind == 0x06
            return constant


@pytest.mark.parametrize("machine", jail._MACHINES)
def test_the_filter_permits_what_is_listed_alone(machine):
    column, audit = jail._MACHINES[machine]
    code = b"".join(jail._filter(column, audit, 77))
    listed = {numbers[column] for numbers in jail._PERMITTED.values()} - {None}
    tables = (
        jail._OPEN,
        jail._OPENAT,
        jail._FCNTL,
        jail._IOCTL,
        jail._PRLIMIT,
        *((jail._KILL, jail._TGKILL)),
    )
    special = {numbers[column] for numbers in tables}
    allowed, refused = 0x7FFF0000, 0x00050001
    assert decide(code, 0x40000003, 0) == 0x80000000  # i386
    for number in (*range(500), 1 << 30, (1 << 30) + 1):
        if number not in special:
            assert decide(code, audit, number) == (allowed if number in listed else refused)
    for numbers, arguments, decision in (
        (jail._OPENAT, (0, 0, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), allowed),
        (jail._OPENAT, (0, 0, os.O_RDONLY | os.O_CLOEXEC), allowed),
        (jail._OPENAT, (0, 0, os.O_RDONLY | os.O_TRUNC), refused),
        (jail._OPENAT, (0, 0, 3 | os.O_TRUNC), refused),
        (jail._FCNTL, (0, 1), allowed),
        (jail._FCNTL, (0, 8), refused),
        (jail._IOCTL, (0, 0x5401), allowed),
        (jail._IOCTL, (0, 0x5412), refused),
        (jail._PRLIMIT, (0, 9, 0, 1 << 40), allowed),
        (jail._PRLIMIT, (0, 9, 1 << 40, 0), refused),
        (jail._PRLIMIT, (0, 9, 8, 0), refused),
        (jail._PRLIMIT, (5, 9, 0, 8), refused),
        (jail._KILL, (77, 9), allowed),
        (jail._KILL, (78, 9), refused),
        (jail._KILL, (2**64 - 77, 9), refused),
        (jail._TGKILL, (77, 77, 9), allowed),
        (jail._TGKILL, (1, 1, 9), refused),
    ):
        assert decide(code, audit, numbers[column], *arguments) == decision, (numbers, arguments)


@pytest.mark.parametrize(
    ("column", "header", "pattern"),
    [
        (0, "x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)$"),
        (1, "asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+) (\d+)$"),
    ],
)
def test_the_numbers_are_those_of_the_kernel(column, header, pattern):
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    numbers = {name: int(n) for name, n in re.findall(pattern, path.read_text(), re.MULTILINE)}
    numbers.setdefault("newfstatat", numbers.get("fstatat"))
    others = ("open", jail._OPEN), ("openat", jail._OPENAT), ("fcntl", jail._FCNTL)
    others += ("ioctl", jail._IOCTL), ("prlimit64", jail._PRLIMIT), ("kill", jail._KILL)
    others += ("tgkill", jail._TGKILL), ("seccomp", jail._SECCOMP)
    for name, known in (*jail._PERMITTED.items(), *others):
        assert numbers.get(name) == known[column], name
    assert numbers["landlock_create_ruleset"] == jail._LANDLOCK


def test_the_program_of_the_sandbox_needs_no_library():
    """It runs without the package, so it must import the standard library alone."""
    source = Path(jail.__file__).read_text()
    names = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert names <= set(sys.stdlib_module_names)
    assert importlib.util.find_spec("mistral_jax.evaluation.jail").origin == jail.__file__
