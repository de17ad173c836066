"""The structure of the package: folders in one order, imports that only go down, no long files."""

import ast
import re
from pathlib import Path

import pytest

from mistral_jax.config import CHECKOUT

# From the lowest to the highest. Folders of one line do not import each other. Modules at the top
# level of the package, such as `config`, count as folders.
ORDER = [
    {"base"},
    {"config"},
    {"tokens", "ops"},
    {"model"},
    {"parallel"},
    {"checkpoint"},
    {"engine"},
    {"training"},
    {"evaluation", "planning", "serving"},
    {"cli"},
    {"", "evaluate", "plan", "sample", "serve", "train"},
]
HEIGHT = {name: height for height, names in enumerate(ORDER) for name in names}
FILES = {
    f"{top}.{'.'.join(path.relative_to(CHECKOUT / top).with_suffix('').parts)}": path
    for top in ("mistral_jax", "convert")
    for path in sorted((CHECKOUT / top).rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imports(module: str, path: Path) -> set[str]:
    """Returns the modules of this project that the source of `module` imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
    found = {name.replace("mistral_jax.convert", "convert") for name in found}
    return {name for name in found if name.split(".")[0] in ("mistral_jax", "convert")}


def package_modules():
    """Returns the path of each module of the package, by its name without `mistral_jax`."""
    return {
        name.removeprefix("mistral_jax").removeprefix("."): path
        for name, path in MODULES.items()
        if name.startswith("mistral_jax")
    }


def folder(name: str) -> str:
    """Returns the folder of a module; a module at the top level counts as a folder."""
    return name.partition(".")[0]


def test_the_order_names_every_folder():
    assert {folder(name) for name in package_modules()} == HEIGHT.keys()


@pytest.mark.parametrize(("name", "path"), package_modules().items())
def test_imports_between_folders_go_down(name, path):
    for imported in imports(f"mistral_jax.{name}" if name else "mistral_jax", path):
        other = folder(imported.removeprefix("mistral_jax").removeprefix("."))
        assert other in HEIGHT, f"{name} imports {imported}, which is not the package's"
        if other != folder(name):
            assert HEIGHT[other] < HEIGHT[folder(name)], f"{name} imports {imported} above it"


def test_convert_imports_its_own_modules_relatively():
    """Its absolute name is `convert` in a checkout and `mistral_jax.convert` in an installation."""
    for path in (CHECKOUT / "convert").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for absolute in ("import convert", "from convert", "mistral_jax.convert import"):
            assert absolute not in text, path


def test_imports_inside_functions_and_classes_are_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import mistral_jax.config\n"
        "def f():\n    from mistral_jax import checkpoint\n    import os, convert.names\n"
        "class C:\n    from .layers import MLP\n"
        "from ..sharding import mesh_of\nfrom ... import folder\n"
    )
    assert imports("mistral_jax.model.module", path) >= {
        "mistral_jax.config",
        "mistral_jax.checkpoint",
        "convert.names",
        "mistral_jax.model.layers",
        "mistral_jax.sharding",
    }


def test_only_tests_import_torch():
    for module, path in MODULES.items():
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.MULTILINE), module


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_has_more_than_400_lines(name):
    lines = MODULES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{MODULES[name]} has {lines} lines"
