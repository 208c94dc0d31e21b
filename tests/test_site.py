"""The pages of docs/ say what the code has, and what makes the site of them does what it says.

The site itself is built in CI: `sphinx-build -W docs build/site`.
"""

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from cnnjax import models
from cnnjax.models.summary import summary

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CURRICULUM = (DOCS / "curriculum.md").read_text()


def load_site_pages():
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site_pages = load_site_pages()
LINKED = sorted(set(site_pages.FUNCTION_LINK.findall(CURRICULUM)))


def test_the_curriculum_links_to_many_functions():
    assert len(LINKED) > 50


@pytest.mark.parametrize(("name", "path"), LINKED)
def test_a_linked_function_is_defined_in_its_file(name, path):
    tree = ast.parse((ROOT / f"{path}.py").read_text())
    assert name in {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_table_of_lenet_is_that_of_its_summary():
    rows = re.findall(
        r"^\| (\w+) \| ([\dx]+) \| ([\d,]+) \| ([\d,]+) \|$", CURRICULUM, re.MULTILINE
    )
    found = summary(models.create("lenet5", num_classes=10), (28, 28, 1)).rows
    assert rows == [
        (row.path, "x".join(map(str, row.output_shape)), f"{row.parameters:,}", f"{row.macs:,}")
        for row in found
    ]


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_and_pictures_of_a_guide_exist(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"https?:|#", link):
            assert (DOCS / link.partition("#")[0]).exists(), link


def app_of(folder):
    config = SimpleNamespace(html_theme_options={"repository_url": "https://example.org/r"})
    return SimpleNamespace(srcdir=folder, config=config)


def test_guides_that_the_index_does_not_name_are_added(tmp_path):
    for name in ("index", "search", "known", "new"):
        (tmp_path / f"{name}.md").write_text("# Guide")
    app = app_of(tmp_path)
    content = ["```{toctree}\nknown\nMORE GUIDES\n```"]
    site_pages.for_the_site(app, "index", content)
    assert content == ["```{toctree}\nknown\nnew\n```"]


def test_functions_are_linked_by_their_lines_on_the_site():
    content = ["see [`conv2d`](../cnnjax/ops/convolution.py), [text](weights.md), [s](search.md#x)"]
    content[0] += " [file](../scripts/a.sh)"
    site_pages.for_the_site(app_of(DOCS), "curriculum", content)
    assert 'href="_modules/cnnjax/ops/convolution.html#conv2d"' in content[0]
    assert "[text](weights.md)" in content[0]
    assert "[file](https://example.org/r/blob/main/scripts/a.sh)" in content[0]
    assert "[s](copied/search_settings.md#x)" in content[0]


def test_docstrings_become_restructuredtext():
    lines = [
        "Takes `key`s and `**options`, a*b, `stage4/.*`, name_ and |x|.",
        "",
        "    a = b * c_",
        "",
        "Args:",
        "  text: of `one",
        "    two`.",
    ]
    site_pages.as_rst(None, "function", "f", None, None, lines)
    assert lines == [
        r"Takes ``key``\ s and ``**options``, a\*b, ``stage4/.*``, name\_ and \|x\|.",
        "",
        "::",
        "",
        "    a = b * c_",
        "",
        "Args:",
        "  text: of ``one",
        "    two``.",
    ]


def test_examples_in_docstrings_stay_as_they_are():
    lines = [">>> f(*parts)[0] | 1_000", "True", "", "Text."]
    site_pages.as_rst(None, "function", "f", None, None, lines)
    assert lines == [">>> f(*parts)[0] | 1_000", "True", "", "Text."]


def notebook(source, outputs):
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": [source], "outputs": outputs}
    text = f"[![x]({site_pages.COLAB_BADGE})](https://colab) "
    text += "[guide](https://github.com/a/b/blob/main/docs/export.md)"
    return {"cells": [{"cell_type": "markdown", "id": "t", "source": [text]}, cell]}


def test_outputs_of_another_notebook_are_not_shown(tmp_path):
    sources, executed, out = (tmp_path / name for name in ("sources", "executed", "out"))
    for folder in (sources, executed):
        folder.mkdir()
    (sources / "same.ipynb").write_text(json.dumps(notebook("1 + 1", [])))
    (executed / "same.ipynb").write_text(json.dumps(notebook("1 + 1", ["2"])))
    (sources / "torn.ipynb").write_text(json.dumps(notebook("1 + 1", [])))
    (executed / "torn.ipynb").write_text(json.dumps(notebook("1 + 1", ["2"]))[:-20])
    (sources / "changed.ipynb").write_text(json.dumps(notebook("1 + 2", [])))
    (executed / "changed.ipynb").write_text(json.dumps(notebook("1 + 1", ["2"])))
    site_pages.copy_notebooks(sources, executed, out)
    names = "same", "changed", "torn"
    same, changed, torn = (json.loads((out / f"{name}.ipynb").read_text()) for name in names)
    assert same["cells"][1]["outputs"] == ["2"]
    assert changed["cells"][1]["outputs"] == torn["cells"][1]["outputs"] == []
    text = "".join(same["cells"][0]["source"])
    assert "(../_static/colab.svg)" in text and "[guide](../export.md)" in text


def test_a_guide_with_a_name_of_sphinx_is_copied_with_its_links(tmp_path):
    (tmp_path / "search.md").write_text("[a](scale.md#x) [b](https://x.org) ![c](p.png)")
    site_pages.copy_guide(tmp_path / "search.md", tmp_path / "copied" / "s.md")
    assert (tmp_path / "copied" / "s.md").read_text() == (
        "[a](../scale.md#x) [b](https://x.org) ![c](../p.png)"
    )
