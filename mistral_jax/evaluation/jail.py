"""Runs one untrusted program in a process of its own, behind limits that the process cannot lift.

`sandbox.py` starts this file as a program, without the package. Before the untrusted program runs,
the process gives up what it does not need, for good:

- seccomp permits only the system calls of `_PERMITTED`. No processes, threads, sockets, signals to
  other processes, or changes of permissions are among them.
- Landlock permits reading Python's own files, and writing plain files in one empty folder.
- Resource limits bound processor time, memory, and the size of a file.

Neither needs privileges, and both bind root too. Numbers of system calls are those of the kernel's
`unistd.h`; None = the architecture does not have the call.
"""

import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import types

# Calls by name: their numbers on x86-64 and on aarch64.
_PERMITTED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "unlink": (87, None),
    "readlink": (89, None),
    "umask": (95, 166),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "fadvise64": (221, 223),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "getcpu": (309, 168),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
_OPEN, _OPENAT, _FCNTL, _IOCTL = (2, None), (257, 56), (72, 25), (16, 29)
_PRLIMIT, _KILL, _TGKILL = (302, 261), (62, 129), (234, 131)
_LANDLOCK = 444  # and the two calls after it, on every architecture
_SECCOMP = (317, 277)
# The column of these tables, and the audit number, of a machine.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Rights of Landlock.
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 14)
)
_RIGHTS = [0, 13, 14, 15, 15, 16]  # number of rights by version; later versions have as many
_LIBRARIES = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
_FILES = ["/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom"]
_SEARCHED = "LD_LIBRARY_PATH"

_LEVELS = 64  # of calls between this program and the untrusted one; see `sandbox.py`


class Refused(Exception):
    """The machine cannot confine a process; the message says what is missing."""


def confine(folder, memory, seconds, file_bytes):
    """Takes from this process all that the untrusted program must not do.

    Args:
      folder: the only folder in which it may write.
      memory: bytes of its address space.
      seconds: seconds of processor time.
      file_bytes: size of a file in bytes.

    Raises:
      Refused: the system has no means to do so.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES or struct.calcsize("P") != 8:
        raise Refused(
            "it needs seccomp and Landlock of Linux on x86-64 or aarch64, and this is "
            f"{platform.system()} on {platform.machine()}"
        )
    column, audit = _MACHINES[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number, *arguments):
        words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
        result = libc.syscall(ctypes.c_long(number), *words)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
            raise Refused("the kernel's prctl cannot forbid new privileges")
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, math.ceil(seconds)),
        (resource.RLIMIT_AS, memory),
    ):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # A program may ignore the signal at the soft limit of time, but not that at the hard one.
        hard = most + 1 if limit == resource.RLIMIT_CPU else most
        resource.setrlimit(limit, (most, hard))
    _restrict_files(call, folder)
    code = b"".join(_filter(column, audit, os.getpid()))
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    try:
        call(_SECCOMP[column], 1, 0, ctypes.create_string_buffer(program))
    except OSError as error:
        raise Refused(f"the kernel has no seccomp filters ({error.strerror})") from None


def _restrict_files(call, folder):
    """Permits reading Python's files, and reading and writing plain files in `folder`."""
    try:
        version = call(_LANDLOCK, None, 0, 1)
    except OSError as error:
        raise Refused(
            f"the kernel has no Landlock ({error.strerror}), which Linux has since 5.13 if it is "
            "among the security modules in /sys/kernel/security/lsm"
        ) from None
    handled = (1 << _RIGHTS[min(version, len(_RIGHTS) - 1)]) - 1
    attributes = ctypes.create_string_buffer(struct.pack("Q", handled))
    rules = call(_LANDLOCK, attributes, 8, 0)
    reads = _READ_FILE | _READ_DIR
    writes = reads | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE
    libraries = [os.path.join(sys.base_prefix, "lib"), *_LIBRARIES, *_FILES]
    libraries += filter(None, os.environ.get(_SEARCHED, "").split(os.pathsep))
    granted = [(path, reads) for path in (*sys.path, *libraries)]
    for path, rights in (*granted, ("/dev/null", writes), (folder, writes)):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # such as a folder of another distribution
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights & handled, place)
        call(_LANDLOCK + 1, rules, 1, ctypes.create_string_buffer(rule), 0)
        os.close(place)
    call(_LANDLOCK + 2, rules, 0)
    os.close(rules)


def _filter(column, audit, pid):
    """Yields the instructions of the seccomp filter (classic BPF)."""
    LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
    ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM

    def do(code, value, then=0, otherwise=0):
        return struct.pack("HBBI", code, then, otherwise, value)

    def argument(index, high=0):
        return do(LOAD, 16 + 8 * index + 4 * high)

    def one_of(index, values):
        """Permits the call if the low half of an argument has one of some values."""
        tests = [argument(index)]
        for value in values:
            tests += [do(EQUAL, value, 0, 1), do(RETURN, ALLOW)]
        return [*tests, do(RETURN, REFUSE)]

    def opened(index):
        # The first versions of Landlock do not see that O_TRUNC empties a file that is only read.
        mask = os.O_TRUNC | os.O_ACCMODE
        tests = [argument(index), do(AND, mask)]
        for mode in (os.O_RDONLY, os.O_ACCMODE):
            tests += [do(EQUAL, os.O_TRUNC | mode, 0, 1), do(RETURN, REFUSE)]
        return [*tests, do(RETURN, ALLOW)]

    own_limits = [
        part
        for half in (argument(0), argument(2), argument(2, 1))  # of this process; none to set
        for part in (half, do(EQUAL, 0, 1, 0), do(RETURN, REFUSE))
    ]
    F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
    TCGETS, FIOCLEX = 0x5401, 0x5451
    rules = [(numbers, [do(RETURN, ALLOW)]) for numbers in _PERMITTED.values()]
    rules += [
        (_OPEN, opened(1)),
        (_OPENAT, opened(2)),
        (_FCNTL, one_of(1, [F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC])),
        (_IOCTL, one_of(1, [TCGETS, FIOCLEX])),
        (_PRLIMIT, [*own_limits, do(RETURN, ALLOW)]),
        (_KILL, one_of(0, [pid])),
        (_TGKILL, one_of(0, [pid])),
    ]
    yield from (do(LOAD, 4), do(EQUAL, audit, 1, 0), do(RETURN, KILL), do(LOAD, 0))
    for numbers, actions in rules:
        if numbers[column] is not None:
            yield from (do(EQUAL, numbers[column], 0, len(actions)), *actions)
    yield do(RETURN, REFUSE)


def nested(levels, work):
    """Calls `work` below some levels of calls on the native stack."""
    return next(map(nested, (levels - 1,), (work,))) if levels else work()


def main():
    """Confines this process, runs the program that the standard input describes, and reports.

    Standard output is a socket of two directions. The program gets neither of them.
    """
    read, write = os.read, os.write  # The program may replace those of the module.
    with open(0, encoding="utf-8", closefd=False) as file:
        request = json.load(file)
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    try:
        confine(request["folder"], request["memory"], request["seconds"], request["file_bytes"])
    except (Refused, OSError) as error:
        write(channel, message("refused", error))
        return
    module = types.ModuleType("program")  # Not __main__, so that such a block does not run.

    def work():
        sys.modules["program"] = sys.modules["__main__"] = module
        exec(compile(request["program"], "<program>", "exec", dont_inherit=True), module.__dict__)

    sys.setrecursionlimit(sys.getrecursionlimit() + 2 * _LEVELS)
    # The parent compares the stacks of the two reads, to know that the program has returned.
    for step in (b"ready\n", b"ended\n"):
        if step == b"ended\n":
            try:
                nested(_LEVELS, work)
            except MemoryError:
                write(channel, b"memory\n")
                return
            except BaseException as error:
                write(channel, message("failed", error))
                return
        write(channel, step)
        read(channel, 1)


def message(kind, error):
    """Returns the line that reports an error."""
    try:
        text = f"{type(error).__name__}: {error}" if kind == "failed" else str(error)
    except BaseException:  # The program may have defined the error.
        text = type(error).__name__
    line = " ".join(f"{kind} {text[:1000]}".removesuffix(": ").split())
    return line.encode("utf-8", "replace") + b"\n"


if __name__ == "__main__":
    main()
    os._exit(0)
