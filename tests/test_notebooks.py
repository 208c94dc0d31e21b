"""Notebooks are kept without outputs, open in Colab, and begin alike; a run shows itself in them.

That each runs from top to bottom is a stage of .ci/run: `python scripts/run_notebooks.py`.
"""

import json
import re
import tomllib
from pathlib import Path

import pytest

from cnnjax.errors import UserError
from scripts import run_notebooks

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def cells_of(path):
    return json.loads(path.read_text())["cells"]


def test_there_are_notebooks():
    assert len(PATHS) == 5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_git_keeps_no_outputs(path):
    for cell in cells_of(path):
        assert not cell["metadata"], cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, (
                f"{cell['id']} has outputs: python scripts/run_notebooks.py --strip"
            )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_ids_of_cells_are_names(path):
    ids = [cell["id"] for cell in cells_of(path)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in ids)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_badge_opens_it_in_colab(path):
    text = "".join(cells_of(path)[0]["source"])
    place = REPOSITORY.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{path.name})" in (
        text
    )


def test_all_begin_with_the_same_cells():
    for name in ("install", "settings", "drive"):
        found = {
            "".join(cell["source"])
            for path in PATHS
            for cell in cells_of(path)
            if cell["id"] == name
        }
        assert len(found) == 1, name
    for path in PATHS:
        assert [cell["id"] for cell in cells_of(path)][1:4] == ["install", "settings", "drive"]
        assert "accelerator" in [cell["id"] for cell in cells_of(path)]


def test_they_install_from_the_repository():
    assert f"git+{REPOSITORY}" in "".join(cells_of(PATHS[0])[1]["source"])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_links_to_guides_and_notebooks_exist(path):
    for cell in cells_of(path):
        text = "".join(cell["source"])
        for link in re.findall(rf"\]\({REPOSITORY}/blob/main/([^)#]+)\)", text):
            assert (ROOT / link).exists(), link
        for link in re.findall(r"\]\(([^):#]+\.ipynb)\)", text):
            assert (path.parent / link).exists(), link


def test_stripping_takes_outputs_out_and_leaves_the_rest(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    cell = nbformat.v4.new_code_cell("1 + 1", id="sum", metadata={"execution": {}})
    cell.outputs = [nbformat.v4.new_output("stream", text="2")]
    cell.execution_count = 3
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text"), cell])
    bare = run_notebooks.stripped(notebook)
    assert bare.cells[1].source == "1 + 1" and bare.cells[1].id == "sum"
    assert bare.cells[1].outputs == [] and bare.cells[1].execution_count is None
    assert bare.cells[1].metadata == {} and notebook.cells[1].outputs
    for path in PATHS:
        run_notebooks.write(tmp_path / path.name, run_notebooks.stripped(run_notebooks.read(path)))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_an_unknown_notebook_is_one_line():
    with pytest.raises(UserError, match=r"unknown notebook 'lenet'.*1_lenet5"):
        run_notebooks.chosen(["lenet"])
    assert [path.stem for path in run_notebooks.chosen(["1_lenet5.ipynb"])] == ["1_lenet5"]


@pytest.mark.slow
def test_a_failing_cell_is_named_and_fails_the_run(tmp_path, capsys):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    text = f"import os; assert os.environ[{run_notebooks.SMALL_VARIABLE!r}] == '1'; 1 / 0"
    cell = nbformat.v4.new_code_cell(text, id="divide")
    path = tmp_path / "broken.ipynb"
    run_notebooks.write(path, nbformat.v4.new_notebook(cells=[cell]))
    assert not run_notebooks.run(path, tmp_path / "out", small=True)
    printed = capsys.readouterr()
    assert "FAILED broken" in printed.out
    assert "cell divide of" in printed.err and "ZeroDivisionError" in printed.err
    assert not (tmp_path / "out").exists()
