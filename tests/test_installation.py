"""An installation holds every file of the package, is built without a warning, and runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_jax.config import CHECKOUT

# Folders of a checkout, and where an installation has them.
PLACES = {
    "mistral_jax": "mistral_jax",
    "convert": "mistral_jax/convert",
    "configs": "mistral_jax/configs",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Builds an sdist and, from it, a wheel; returns the folder that holds the wheel's files."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PLACES:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    _build("sdist", source, built)
    (sdist,) = built.glob("*.tar.gz")
    shutil.unpack_archive(sdist, built, filter="data")
    _build("wheel", built / sdist.name.removesuffix(".tar.gz"), built)
    (wheel,) = built.glob("*.whl")
    shutil.unpack_archive(wheel, built / "site", "zip")
    return built / "site"


def _build(kind: str, source: Path, target: Path) -> None:
    build = f"from hatchling.build import build_{kind}; build_{kind}({str(target)!r})"
    command = [sys.executable, "-W", "error", "-c", build]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(("folder", "inside"), PLACES.items())
def test_an_installation_has_every_file(installed, folder, inside):
    for path in (CHECKOUT / folder).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            shipped = installed / inside / path.relative_to(CHECKOUT / folder)
            assert shipped.read_bytes() == path.read_bytes(), path


def test_an_installation_runs_outside_a_checkout(installed, tmp_path):
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    assert entries.read_text().split() == [
        "[console_scripts]",
        *("mistral-jax", "=", "mistral_jax.cli.console:main"),
    ]
    configs = str(installed / "mistral_jax" / "configs")
    code = (
        "import sys; from mistral_jax import config; from mistral_jax.cli.console import main\n"
        f"assert config.CONFIG_DIR.samefile({configs!r})\n"
        "sys.exit(main())"
    )
    folder = installed / "mistral_jax" / "assets" / "nano"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", "inspect", folder],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoint of mistral_jax" in done.stdout
