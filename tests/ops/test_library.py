"""The library of C++ kernels: found or compiled again, and what is said where that fails."""

import ctypes
import logging
import os
import subprocess
import sys
import time

import jax
import jaxlib
import pytest
import tiny

from mistral_jax.engine.generate import generate
from mistral_jax.ops import library

COMPILER = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Begins as a process does, with an empty cache; a small source compiles in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "kernels.cc"
    source.write_text('extern "C" int number = 7;\n')
    monkeypatch.setattr(library, "SOURCES", [source])
    monkeypatch.setattr(library, "TARGETS", ())
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "mistral_jax" / "kernels").iterdir())


def number(opened):
    return ctypes.c_int.in_dll(opened, "number").value


def program(tmp_path, text):
    path = tmp_path / "a compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"'{path}'"


@COMPILER
def test_a_library_is_compiled_once(tmp_path, caplog):
    assert number(library.load()) == 7
    (path,) = kept(tmp_path)
    written = path.stat().st_mtime_ns
    library.load.cache_clear()
    assert number(library.load()) == 7
    assert [(path, written)] == [(path, path.stat().st_mtime_ns) for path in kept(tmp_path)]
    assert not caplog.records


@COMPILER
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_library_is_compiled_again(tmp_path, damage, caplog):
    library.load()
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    # A new file, as this process has mapped the old one.
    path.unlink()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:middle], "empty": b"", "flipped": flipped}[damage])
    library.load.cache_clear()
    assert number(library.load()) == 7
    (again,) = kept(tmp_path)
    assert again.stem.endswith(library._digest(again.read_bytes()))
    assert not caplog.records


@COMPILER
@pytest.mark.parametrize("what", ["jaxlib", "interface", "compiler", "source"])
def test_another_jaxlib_compiler_or_source_gets_another_library(tmp_path, what, monkeypatch):
    library.load()
    if what == "jaxlib":
        monkeypatch.setattr(jaxlib, "__version__", "0.0.1")
    elif what == "interface":
        api = tmp_path / "include" / "xla" / "ffi" / "api"
        api.mkdir(parents=True)
        (api / "c_api.h").write_text("#define XLA_FFI_API_MINOR 99\n")
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path / "include"))
    elif what == "compiler":
        monkeypatch.setenv("CXX", "c++ -g0")
    else:
        library.SOURCES[0].write_text('extern "C" int number = 8;\n')
    library.load.cache_clear()
    assert number(library.load()) == (8 if what == "source" else 7)
    assert len(kept(tmp_path)) == 2


@COMPILER
def test_a_compiler_may_be_several_words(tmp_path, monkeypatch, caplog):
    first = library.find_compiler()[0]
    launcher = program(tmp_path, f'test "$1" = --launch && shift && exec {first} "$@"')
    monkeypatch.setenv("CXX", f"{launcher} --launch -O1")
    assert number(library.load()) == 7
    assert not caplog.records


@COMPILER
def test_where_no_library_can_be_kept_it_is_compiled_for_the_process(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").touch()
    assert number(library.load()) == 7
    (record,) = caplog.records
    assert "compiled at every start" in record.getMessage()


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("no-such-compiler", "there is no C++ compiler 'no-such-compiler'"),
        ("false", "false ended with status 1"),
        ("'c++", "No closing quotation"),
        ("echo 'two\nlines' >&2; exit 3", "ended with status 3: two"),
        ("true", "kernels.so"),  # It says that it worked, and wrote nothing.
        ("sleep 100", "took more than 1 seconds"),
    ],
)
def test_without_a_library_one_line_says_why_and_xla_computes(
    tmp_path, monkeypatch, caplog, compiler, why
):
    if " " in compiler:
        compiler = program(tmp_path, compiler)
        monkeypatch.setattr(library, "_SECONDS", 1)
    library_kept = library.find_compiler() and library.load()
    library.load.cache_clear()
    caplog.clear()
    monkeypatch.setenv("CXX", compiler)
    began = time.monotonic()
    for _ in range(2):
        assert library.load() is None
    assert time.monotonic() - began < 20
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert why in record.getMessage()
    assert "XLA's own operations are used instead" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(kept(tmp_path)) == bool(library_kept) if (tmp_path / "cache").exists() else True
    model, params = tiny.build()
    assert len(generate(model, params, [[1, 5]], 2, stop_ids=())[0].tokens) == 2


@COMPILER
def test_a_library_that_xla_refuses_is_not_used(monkeypatch, caplog):
    def refuse(*args, **how):
        raise RuntimeError("FFI handler API version mismatch")

    monkeypatch.setattr(library, "TARGETS", ("number",))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    assert library.load() is None
    (record,) = caplog.records
    assert "API version mismatch" in record.getMessage()


def test_a_command_says_it_in_one_line():
    environment = os.environ | {"CXX": "false", "JAX_PLATFORMS": "cpu"}
    code = (
        "from mistral_jax.cli import command; from mistral_jax.ops import backend\n"
        "command.run(lambda: print(backend.default().has_native))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: no C++ kernels: ")
