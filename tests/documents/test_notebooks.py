"""What notebooks have in common; that they run is for nbmake, which pytest calls on each."""

import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    """The path of a notebook, and the notebook."""
    made = nbformat.read(request.param, as_version=4)
    nbformat.validate(made)
    return request.param, made


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 7


def test_its_twin_in_python_has_the_same_cells(notebook):
    path, made = notebook
    twin = jupytext.read(path.with_suffix(".py"))

    def cells(of):
        return [(cell.cell_type, cell.source) for cell in of.cells]

    assert cells(twin) == cells(made)


def test_it_is_stored_without_results_and_traces_of_a_machine(notebook):
    _, made = notebook
    for cell in made.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"lines_to_next_cell"}  # Of jupytext.
    assert made.metadata.kernelspec == {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    assert set(made.metadata) <= {"kernelspec", "jupytext"}


def test_it_opens_with_a_title_and_its_own_badge(notebook):
    path, made = notebook
    title, badge, *_ = [line for line in made.cells[0].source.splitlines() if line]
    assert title.startswith("# ")
    name = REPOSITORY.removeprefix("https://github.com/")
    colab = "https://colab.research.google.com"
    image = f"{colab}/assets/colab-badge.svg"
    address = f"{colab}/github/{name}/blob/main/notebooks/{path.name}"
    assert badge == f"[![Open in Colab]({image})]({address})"


def test_it_installs_itself_as_all_do_and_runs_the_bundled_model(notebook):
    _, made = notebook
    first = nbformat.read(NOTEBOOKS[0], as_version=4)
    install, *others = [cell.source for cell in made.cells if cell.cell_type == "code"]
    assert install == next(cell.source for cell in first.cells if cell.cell_type == "code")
    assert f"git+{REPOSITORY}" in install
    assert "mistral-jax-flax[" in install
    lines = [line for source in others for line in source.splitlines()]
    assert len([line for line in lines if line.split("  #")[0] == "MODEL = None"]) == 1
